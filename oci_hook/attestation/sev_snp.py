"""An SEV-SNP attestation report: its fields and its signature.

Pure: bytes in, frozen values out. Versions 2 to 5 are known; of another one, and of a bit that is reserved there, is
refused, as nobody here knows what it would say. Whether a report is acceptable is for `tee` to say, whose key signed it
for `sev_snp_chain`.
Specification: AMD 56860, SEV Secure Nested Paging Firmware ABI: "ATTESTATION_REPORT", "Guest Policy",
"TCB_VERSION", "ECDSA P-384 with SHA-384".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from oci_hook.errors import SczError

Product = Literal["milan", "genoa", "turin"]
SigningKey = Literal["vcek", "vlek"]

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
REPORT_DATA_BYTES: Final = 64
_VERSIONS: Final = range(2, 6)
_ECDSA_P384_SHA384: Final = 1
_NUMBER_BYTES: Final = 72  # of r and of s, little-endian
_P384_BYTES: Final = 48

_POLICY_ONE: Final = 1 << 17  # reserved, must be one
_POLICY_KNOWN: Final = (1 << 26) - 1
_POLICY_MIGRATION, _POLICY_DEBUG = 1 << 18, 1 << 19
_PLATFORM_KNOWN: Final = 0b1011_1111
_SIGNING_KEYS: Final[dict[int, SigningKey]] = {0: "vcek", 1: "vlek"}  # 7: none

# Version 3 added the processor's family, model and stepping, version 5 two mitigation vectors; zero before.
_SINCE_3: Final = (0x188, 0x18B)
_SINCE_5: Final = (0x1F8, 0x208)
_ZERO: Final = ((0x4C, 0x50), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, SIGNED_BYTES))
_SIGNATURE: Final = (SIGNED_BYTES, SIGNED_BYTES + 2 * _NUMBER_BYTES)


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security patch levels, 0 to 255 each; `fmc` is Turin's alone, and 0 before."""

    fmc: int
    bootloader: int
    tee: int
    snp: int
    microcode: int

    def __str__(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class SnpReport:
    """What the report says, and what is signed of it. The four TCBs are 8 bytes whose layout is the product's.

    Attributes:
        product: By the processor's family and model; None in version 2, which does not say.
        vmpl: The privilege level that asked.
        report_data: What the guest gave, 64 bytes.
        measurement: Of the launch, 48 bytes.
        chip_id: 64 bytes; None if the host has it masked (MaskChipId: zeros).
        tcbs: Reported, current, committed and at launch, in this order.
        signature: r and s.
    """

    version: int
    guest_svn: int
    policy: int
    vmpl: int
    signing_key: SigningKey
    product: Product | None
    report_data: bytes
    measurement: bytes
    chip_id: bytes | None
    tcbs: tuple[bytes, bytes, bytes, bytes]
    signed: bytes
    signature: tuple[int, int]

    @property
    def may_debug(self) -> bool:
        """The host may read and write the guest's memory."""
        return bool(self.policy & _POLICY_DEBUG)

    @property
    def may_migrate(self) -> bool:
        """The guest may be handed to a migration agent."""
        return bool(self.policy & _POLICY_MIGRATION)


def parse_report(data: bytes, *, error: type[SczError]) -> SnpReport:
    """Parse an ATTESTATION_REPORT.

    Args:
        data: 1184 bytes.
        error: What to raise.

    Raises:
        SczError: The class `error`: another size or version, a reserved bit, an algorithm or a key that is not known.
    """
    if len(data) != REPORT_BYTES:
        raise error(f"SEV-SNP report: {len(data)} bytes, not {REPORT_BYTES}")
    version, guest_svn, policy = struct.unpack_from("<IIQ", data, 0)
    vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
    platform, key_info = struct.unpack_from("<QI", data, 0x40)
    if version not in _VERSIONS:
        raise error(f"SEV-SNP report: version {version} is not known; 2 to 5 are")
    zero = [*_ZERO, *([_SINCE_3] if version < 3 else []), *([_SINCE_5] if version < 5 else [])]
    if any(any(data[low:high]) for low, high in zero) or any(data[_SIGNATURE[1] :]):
        raise error("SEV-SNP report: a reserved byte is not zero")
    if not policy & _POLICY_ONE or policy & ~_POLICY_KNOWN:
        raise error(f"SEV-SNP report: the guest policy {policy:#x} has a reserved bit that is not as specified")
    if platform & ~_PLATFORM_KNOWN:
        raise error(f"SEV-SNP report: the platform information {platform:#x} has an unknown bit")
    if algorithm != _ECDSA_P384_SHA384:
        raise error(f"SEV-SNP report: signature algorithm {algorithm} is not ECDSA on P-384 with SHA-384")
    if vmpl > 3:  # all ones where the host asked, not the guest
        raise error(f"SEV-SNP report: VMPL {vmpl} is none of a guest's")
    if key_info >> 5 or key_info >> 2 not in _SIGNING_KEYS:
        raise error(f"SEV-SNP report: key information {key_info:#x} names neither a VCEK nor a VLEK")
    r, s = (data[low : low + _NUMBER_BYTES] for low in (SIGNED_BYTES, SIGNED_BYTES + _NUMBER_BYTES))
    if any(r[_P384_BYTES:] + s[_P384_BYTES:]):
        raise error("SEV-SNP report: the signature's numbers are longer than the curve's")
    chip_id = data[0x1A0:0x1E0]
    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        vmpl=vmpl,
        signing_key=_SIGNING_KEYS[key_info >> 2],
        product=_product(data[0x188], data[0x189], error) if version >= 3 else None,
        report_data=data[0x50:0x90],
        measurement=data[0x90:0xC0],
        chip_id=chip_id if any(chip_id) else None,
        tcbs=(data[0x180:0x188], data[0x38:0x40], data[0x1E0:0x1E8], data[0x1F0:0x1F8]),
        signed=data[:SIGNED_BYTES],
        signature=(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
    )


def _product(family: int, model: int, error: type[SczError]) -> Product:
    """By CPUID 1, combined family and model (AMD 56860, "ATTESTATION_REPORT"; AMD 57230)."""
    if family == 0x19 and model < 0x10:
        return "milan"
    if family == 0x19 and (0x10 <= model < 0x20 or 0xA0 <= model < 0xB0):
        return "genoa"
    if family == 0x1A and model <= 0x11:
        return "turin"
    raise error(f"SEV-SNP report: processor family {family:#x}, model {model:#x} is not known")


def parse_tcb(data: bytes, product: Product, *, error: type[SczError]) -> Tcb:
    """Parse a TCB_VERSION.

    Args:
        data: 8 bytes.
        product: Turin has a layout of its own.
        error: What to raise.

    Raises:
        SczError: The class `error`: a reserved byte is not zero.
    """
    if product == "turin":
        reserved, tcb = data[4:7], Tcb(data[0], data[1], data[2], data[3], data[7])
    else:
        reserved, tcb = data[2:6], Tcb(0, data[0], data[1], data[6], data[7])
    if any(reserved):
        raise error(f"SEV-SNP report: a reserved byte of a TCB version of {product} is not zero")
    return tcb


def verify_report_signature(report: SnpReport, key: ec.EllipticCurvePublicKey, *, error: type[SczError]) -> None:
    """Verify ECDSA on P-384 with SHA-384 over the first 0x2A0 bytes.

    Args:
        report: Parsed.
        key: Of a verified VCEK or VLEK.
        error: What to raise.

    Raises:
        SczError: The class `error`: it is not that key's signature.
    """
    try:
        key.verify(encode_dss_signature(*report.signature), report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as cause:
        raise error("SEV-SNP report: not signed by the key of its certificate") from cause
