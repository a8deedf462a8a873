"""Devices without a TPM: what a TPM would hold is made in software, and what is sealed to it can be opened here.

Good for tests of the owner's side and of the store, which see a device's public areas only. An enrolment refuses none
of these records, as an enrolment is what they did not go through.
Specification: TPM 2.0 Library, Part 1, 11.4.10 (KDFa, KDFe) and 23.3 (outer wrapping of a duplicate).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.key_checks import (
    COUNTER_ATTRIBUTES,
    COUNTER_BYTES,
    counter_indices,
    verify_ak,
    verify_counter,
    verify_srk,
)
from oci_hook.attestation.structures import (
    ALG_AES,
    ALG_CFB,
    ALG_ECC,
    ALG_ECDSA,
    ALG_NULL,
    ALG_SHA256,
    CURVE_P256,
    NvAttributes,
    NvPublic,
    ObjectAttributes,
    Public,
    parse_nv_public,
    parse_public,
    tpm2b,
)
from oci_hook.errors import DeviceInvalid

ENROLLED = 1_767_225_600
_BORN_IN_TPM = (
    ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.RESTRICTED
)


def measured(changes: Mapping[int, bytes] = MappingProxyType({})) -> dict[int, bytes]:
    """PCR values 0 to 15 of a machine that booted something; `changes` by PCR."""
    values = {pcr: hashlib.sha256(b"booted %d" % pcr).digest() for pcr in range(16)}
    return {**values, **changes}


def _public(key: ec.EllipticCurvePrivateKey, attributes: int, *parameters: int) -> Public:
    numbers = key.public_key().public_numbers()
    head = (ALG_ECC, ALG_SHA256, attributes >> 16, attributes & 0xFFFF, 0)  # the last: an empty policy
    fixed = b"".join(value.to_bytes(2, "big") for value in (*head, *parameters, CURVE_P256, ALG_NULL))
    point = tpm2b(numbers.x.to_bytes(32, "big")) + tpm2b(numbers.y.to_bytes(32, "big"))
    return parse_public(tpm2b(fixed + point), what="a test's key", error=DeviceInvalid)


def _counter(owner_id: str) -> NvPublic:
    raw = counter_indices(owner_id)[0].to_bytes(4, "big") + ALG_SHA256.to_bytes(2, "big")
    raw += int(COUNTER_ATTRIBUTES | NvAttributes.WRITTEN).to_bytes(4, "big") + tpm2b(b"")
    return parse_nv_public(tpm2b(raw + COUNTER_BYTES.to_bytes(2, "big")), what="a test's counter", error=DeviceInvalid)


@dataclass(frozen=True)
class SoftwareDevice:
    """A device: what its owner and what its host know of it, and its SRK's private half."""

    record: DeviceRecord
    host: HostDevice
    srk_key: ec.EllipticCurvePrivateKey

    def unseal(self, public: bytes, duplicate: bytes, seed: bytes) -> bytes:
        """What TPM2_Import and TPM2_Unseal would give, if the policy held: nobody looks at it here.

        Args:
            public: TPM2B_PUBLIC of the sealed object.
            duplicate: TPM2B_PRIVATE.
            seed: TPM2B_ENCRYPTED_SECRET.
        """
        name = parse_public(public, what="a sealed object", error=DeviceInvalid).name
        point, _ = _take(seed)
        x, rest = _take(point)
        y, _ = _take(rest)
        ephemeral = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1())
        shared = self.srk_key.exchange(ec.ECDH(), ephemeral.public_key())
        own_x = self.srk_key.public_key().public_numbers().x.to_bytes(32, "big")
        start = hashlib.sha256((1).to_bytes(4, "big") + shared + b"DUPLICATE\0" + x + own_x).digest()  # KDFe
        private, _ = _take(duplicate)
        integrity, encrypted = _take(private)
        proof = hmac.digest(_kdfa(start, b"INTEGRITY", b"", 256), encrypted + name, "sha256")
        if not hmac.compare_digest(proof, integrity):
            raise ValueError("the duplicate is not intact, or not for this device")
        cipher = Cipher(algorithms.AES(_kdfa(start, b"STORAGE", name, 128)), CFB(bytes(16))).decryptor()
        sensitive, _ = _take(cipher.update(encrypted) + cipher.finalize())
        _, rest = _take(sensitive[2:])  # the type, then the authorisation value
        _, rest = _take(rest)  # the obfuscation value
        secret, _ = _take(rest)
        return secret


def _take(data: bytes) -> tuple[bytes, bytes]:
    """The first TPM2B of some bytes, and what follows it."""
    size = int.from_bytes(data[:2], "big")
    return data[2 : 2 + size], data[2 + size :]


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    message = (1).to_bytes(4, "big") + label + b"\0" + context + bits.to_bytes(4, "big")
    return hmac.digest(key, message, "sha256")[: bits // 8]


def make_device(
    owner_id: str,
    name: str = "edge-1",
    *,
    device_class: str = "default",
    counter_value: int = 1,
    pcrs: Mapping[int, bytes] | None = None,
) -> SoftwareDevice:
    """A device with fresh keys that an owner enrolled."""
    srk_key, ak_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    srk = _public(srk_key, _BORN_IN_TPM | ObjectAttributes.DECRYPT, ALG_AES, 128, ALG_CFB, ALG_NULL)
    ak = _public(ak_key, _BORN_IN_TPM | ObjectAttributes.SIGN, ALG_NULL, ALG_ECDSA, ALG_SHA256)
    counter = _counter(owner_id)
    verify_srk(srk, error=DeviceInvalid)
    verify_ak(ak, error=DeviceInvalid)
    verify_counter(counter, owner_id, error=DeviceInvalid)
    record = DeviceRecord(
        device=name,
        device_class=device_class,
        enrolled=ENROLLED,
        ek_sha256=hashlib.sha256(srk.name).hexdigest(),
        ek_subject="a software device of the tests",
        ak=ak,
        srk=srk,
        counter=counter,
        counter_value=counter_value,
        pcrs=MappingProxyType(dict(pcrs or measured())),
    )
    host = HostDevice(0x81000001, srk, b"serialised", 0x81010001, ak, MappingProxyType({owner_id: counter}))
    return SoftwareDevice(record, host, srk_key)
