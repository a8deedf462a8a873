"""SEV-SNP reports, certificates and tables of certificates for tests, made with keys of our own.

They are put together from the specification (AMD 56860, 57230, 56421), not with the parsers that they test; the real
report and chain beside them are in tests/fixtures/sev_snp. A root made here is accepted by nobody who does not pin it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

FIXTURES = Path(__file__).parent / "fixtures" / "sev_snp"
REAL = {role: (FIXTURES / f"{role}.der").read_bytes() for role in ("ark", "ask", "vcek")}
REAL_REPORT = (FIXTURES / "report.bin").read_bytes()
REAL_DATA = bytes([1, 2, 3, 4, 5]).ljust(64, b"\0")
REAL_ROOT = bytes.fromhex("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9")
NOW = datetime(2026, 12, 1, tzinfo=UTC)

GUIDS = {
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
}
CHIP = bytes(range(1, 65))
CHIP_OF_TURIN = bytes(range(1, 9)).ljust(64, b"\0")
MEASUREMENT = hashlib.sha384(b"launch").digest()
# Bytes in the order of the report: Milan's and Genoa's, then Turin's.
TCB = bytes([4, 1, 0, 0, 0, 0, 22, 213])
TCB_OF_TURIN = bytes([1, 4, 2, 22, 0, 0, 0, 213])
MODELS = {"Milan": (0x19, 1, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 2, 1)}
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), salt_length=48)


@cache
def rsa_key(name: str, bits: int = 4096) -> rsa.RSAPrivateKey:
    """One for each name; `name` says whose."""
    del name
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    """One for each name."""
    del name
    return ec.generate_private_key(ec.SECP384R1())


def root_digest(key: rsa.RSAPrivateKey) -> bytes:
    """What an owner pins of a root."""
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def name(common: str) -> x509.Name:
    """AMD's names differ in the common name alone."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Advanced Micro Devices"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def integer(number: int) -> bytes:
    """A DER INTEGER from 0 to 255."""
    return bytes([2, 1, number]) if number < 0x80 else bytes([2, 2, 0, number])


def ia5(text: str) -> bytes:
    """A short DER IA5String."""
    return bytes([0x16, len(text)]) + text.encode()


def extensions(product: str, *, hwid: bytes | None = CHIP, csp: str | None = None) -> dict[str, bytes]:
    """AMD's extensions of a VCEK or VLEK, by the last parts of their object identifiers."""
    levels = {"3.1": 4, "3.2": 1, "3.3": 22, "3.8": 213}
    levels |= {"3.9": 1, "3.2": 2} if product == "Turin" else {"3.4": 0}
    levels |= {"3.5": 0, "3.6": 0, "3.7": 0}
    found = {"1": integer(product == "Turin"), "2": ia5(f"{product}-B1")}
    found |= {oid: integer(level) for oid, level in levels.items()}
    if csp is not None:
        return {**found, "5": ia5(csp)}
    return {**found, "4": (hwid or b"")[: 8 if product == "Turin" else 64]}


def certificate(
    subject: str,
    issuer: str,
    public_key: Any,
    signer: Any,
    *,
    ca: int | None = None,
    may_sign: bool = True,
    amd: dict[str, bytes] | None = None,
    dates: tuple[datetime, datetime] = (NOW - timedelta(days=4000), NOW + timedelta(days=12000)),
    pss: padding.PSS | None = PSS,
    hash_: hashes.HashAlgorithm | None = None,
) -> bytes:
    """One certificate, DER. `ca` is the path length of an authority: −1 for none."""
    builder = x509.CertificateBuilder(
        subject_name=name(subject),
        issuer_name=name(issuer),
        public_key=public_key,
        serial_number=x509.random_serial_number(),
        not_valid_before=dates[0],
        not_valid_after=dates[1],
    )
    if ca is not None:
        length = ca if ca >= 0 else None
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=length), critical=True)
        usage = x509.KeyUsage(*[False] * 5, may_sign, *[False] * 3)
        builder = builder.add_extension(usage, critical=True)
    for oid, value in (amd or {}).items():
        identifier = x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{oid}")
        builder = builder.add_extension(x509.UnrecognizedExtension(identifier, value), critical=False)
    signed = builder.sign(signer, hash_ or hashes.SHA384(), rsa_padding=pss)
    return signed.public_bytes(Encoding.DER)


@dataclass(frozen=True)
class Maker:
    """Who makes a chip's chain and reports.

    Attributes:
        product: Milan, Genoa or Turin.
        kind: vcek or vlek.
        csp: Of a VLEK.
    """

    product: str = "Milan"
    kind: str = "vcek"
    csp: str = "cloud-1"

    @property
    def root(self) -> bytes:
        """What an owner pins."""
        return root_digest(rsa_key("ark"))

    @property
    def tcb(self) -> bytes:
        """The chip's patch levels."""
        return TCB_OF_TURIN if self.product == "Turin" else TCB

    @property
    def chip(self) -> bytes:
        """The chip's number."""
        return CHIP_OF_TURIN if self.product == "Turin" else CHIP

    @property
    def middle(self) -> str:
        """The intermediate's name."""
        return f"SEV-{'VLEK-' if self.kind == 'vlek' else ''}{self.product}"

    def ark(self, **changes: Any) -> bytes:
        """The root."""
        named = f"ARK-{self.product}"
        return certificate(named, named, rsa_key("ark").public_key(), rsa_key("ark"), **{"ca": -1, **changes})

    def ask(self, **changes: Any) -> bytes:
        """The intermediate."""
        key = rsa_key("ask").public_key()
        return certificate(self.middle, f"ARK-{self.product}", key, rsa_key("ark"), **{"ca": 0, **changes})

    def leaf(self, **changes: Any) -> bytes:
        """The certificate of the key that signs reports."""
        amd = extensions(self.product, hwid=self.chip, csp=self.csp if self.kind == "vlek" else None)
        parts = {"public_key": ec_key("chip").public_key(), "signer": rsa_key("ask"), "amd": amd, **changes}
        subject = parts.pop("subject", f"SEV-{self.kind.upper()}")
        return certificate(subject, self.middle, **parts)

    def chain(self) -> dict[str, bytes]:
        """All three, by role."""
        return {"ark": self.ark(), "ask": self.ask(), self.kind: self.leaf()}

    def report(self, data: bytes = bytes(64), *, version: int | bytes = 3, sign: bool = True, **changes: Any) -> bytes:
        """A report that this chip signed; `changes` are fields of it: a number, or bytes, by name."""
        fields: dict[str, Any] = {
            "version": version,
            "policy": 0x30000,
            "algorithm": 1,
            "platform": 0x25,
            "key_info": {"vcek": 0, "vlek": 4}[self.kind],
            "report_data": data,
            "measurement": MEASUREMENT,
            "report_id": bytes(range(32)),
            "report_id_ma": b"\xff" * 32,
            "reported": self.tcb,
            "cpuid": bytes(MODELS[self.product]) if version != 2 else b"",
            "chip_id": self.chip,
            "current": self.tcb,
            "committed": self.tcb,
            "launch": self.tcb,
            **changes,
        }
        body = bytearray(0x2A0)
        for field, value in fields.items():
            offset, size = OFFSETS[field]
            raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            assert len(raw) <= size
            body[offset : offset + len(raw)] = raw
        return bytes(body) + (signature(ec_key("chip"), bytes(body)) if sign else bytes(0x200))


OFFSETS = {
    "version": (0, 4),
    "guest_svn": (4, 4),
    "policy": (8, 8),
    "family_id": (0x10, 16),
    "image_id": (0x20, 16),
    "vmpl": (0x30, 4),
    "algorithm": (0x34, 4),
    "current": (0x38, 8),
    "platform": (0x40, 8),
    "key_info": (0x48, 4),
    "reserved": (0x4C, 4),
    "report_data": (0x50, 64),
    "measurement": (0x90, 48),
    "host_data": (0xC0, 32),
    "id_key_digest": (0xE0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported": (0x180, 8),
    "cpuid": (0x188, 3),
    "reserved_2": (0x18B, 21),
    "chip_id": (0x1A0, 64),
    "committed": (0x1E0, 8),
    "current_version": (0x1E8, 3),
    "reserved_3": (0x1EB, 1),
    "committed_version": (0x1EC, 3),
    "reserved_4": (0x1EF, 1),
    "launch": (0x1F0, 8),
    "mitigations": (0x1F8, 16),
    "reserved_5": (0x208, 152),
}


def signature(key: ec.EllipticCurvePrivateKey, body: bytes) -> bytes:
    """The report's signature: r and s, 72 bytes each, little-endian, then zeros."""
    r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA384())))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(0x200, b"\0")


def table(certificates: dict[str, bytes], *, gap: int = 0) -> bytes:
    """A table of certificates, as a hypervisor hands it over, filled up to pages of 4 KiB."""
    header, blobs = b"", b""
    start = 24 * (len(certificates) + 1) + gap
    for role, der in certificates.items():
        header += entry(UUID(GUIDS[role]).bytes, start + len(blobs), len(der))
        blobs += der
    data = header + bytes(24 + gap) + blobs
    return data + bytes(-len(data) % 4096)


def entry(guid: bytes, offset: int, size: int) -> bytes:
    """One line of the table."""
    return guid + struct.pack("<II", offset, size)


def policy_document(maker: Maker, **changes: Any) -> dict[str, Any]:
    """The access policy's `tee` that accepts a maker's reports."""
    return {
        "kind": "sev-snp",
        "measurements": [MEASUREMENT.hex()],
        "roots": [maker.root.hex()],
        **({"vlek_providers": [maker.csp]} if maker.kind == "vlek" else {}),
        **changes,
    }


def of(product: str) -> Maker:
    """The maker of a product's VCEKs."""
    return replace(Maker(), product=product)
