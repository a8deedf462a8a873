"""TPM structures, marshalled by hand, and certificates: what the attestation vectors are put together from.

Nothing of the code under test is imported: the layouts stand here a second time, from the specification.
Specification: TPM 2.0 Library, Part 2, 8.3, 10.12, 11.3, 12.2.4 and 13; Part 1, chapter 16; TCG EK Credential Profile.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

NOW = 1_767_960_000  # 2026-01-09
DAY = 86_400

RSA, KEYEDHASH, ECC = 0x0001, 0x0008, 0x0023
AES, CFB, CTR, NULL = 0x0006, 0x0043, 0x0040, 0x0010
SHA1, SHA256, SHA384 = 0x0004, 0x000B, 0x000C
RSASSA, ECDSA = 0x0014, 0x0018
AES_128_CFB = (AES, 128, CFB)
ECDSA_SHA256 = (ECDSA, SHA256)
CURVES: Mapping[str, int] = {"secp256r1": 0x0003, "secp384r1": 0x0004}

FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN, USER_WITH_AUTH = 1 << 1, 1 << 4, 1 << 5, 1 << 6
ADMIN_WITH_POLICY, NO_DA, RESTRICTED, DECRYPT, SIGN = 1 << 7, 1 << 10, 1 << 16, 1 << 17, 1 << 18
BORN = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED
EK_ATTRIBUTES = BORN | ADMIN_WITH_POLICY | DECRYPT
SRK_ATTRIBUTES = BORN | USER_WITH_AUTH | NO_DA | DECRYPT
AK_ATTRIBUTES = BORN | USER_WITH_AUTH | SIGN

NV_OWNERWRITE, NV_AUTHWRITE, NV_OWNERREAD, NV_AUTHREAD = 1 << 1, 1 << 2, 1 << 17, 1 << 18
NV_POLICY_DELETE, NV_WRITELOCKED, NV_NO_DA = 1 << 10, 1 << 11, 1 << 25
NV_WRITTEN, NV_PLATFORMCREATE = 1 << 29, 1 << 30
NV_ORDINARY, NV_COUNTER, NV_BITS, NV_EXTEND, NV_PIN_FAIL = (number << 4 for number in (0, 1, 2, 4, 8))
NV_WITHOUT_TYPE = NV_OWNERWRITE | NV_AUTHWRITE | NV_OWNERREAD | NV_AUTHREAD | NV_NO_DA | NV_WRITTEN
COUNTER_ATTRIBUTES = NV_WITHOUT_TYPE | NV_COUNTER

GENERATED = 0xFF544347
ST_NV, ST_SESSION_AUDIT, ST_CERTIFY, ST_QUOTE, ST_TIME = 0x8014, 0x8016, 0x8017, 0x8018, 0x8019
ENDORSEMENT, OWNER_HIERARCHY = 0x4000000B, 0x40000001

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def dumps(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    x, y = (b64(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    return {"crv": "P-256", "kty": "EC", "x": x, "y": y}


# --- structures -------------------------------------------------------------------------------------------------------


def tpm2b(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _symmetric(value: tuple[int, int, int] | None) -> bytes:
    return struct.pack(">H", NULL) if value is None else struct.pack(">HHH", *value)


def _scheme(value: tuple[int, int] | None) -> bytes:
    return struct.pack(">H", NULL) if value is None else struct.pack(">HH", *value)


def ecc_public(
    key: ec.EllipticCurvePrivateKey,
    attributes: int,
    *,
    name_alg: int = SHA256,
    policy: bytes = b"",
    symmetric: tuple[int, int, int] | None = None,
    scheme: tuple[int, int] | None = None,
) -> bytes:
    """A TPMT_PUBLIC."""
    numbers, size = key.public_key().public_numbers(), (key.curve.key_size + 7) // 8
    head = struct.pack(">HHI", ECC, name_alg, attributes) + tpm2b(policy)
    parameters = _symmetric(symmetric) + _scheme(scheme) + struct.pack(">HH", CURVES[key.curve.name], NULL)
    return head + parameters + tpm2b(numbers.x.to_bytes(size, "big")) + tpm2b(numbers.y.to_bytes(size, "big"))


def rsa_public(
    key: rsa.RSAPrivateKey,
    attributes: int,
    *,
    name_alg: int = SHA256,
    policy: bytes = b"",
    symmetric: tuple[int, int, int] | None = None,
    exponent: int = 0,
) -> bytes:
    """A TPMT_PUBLIC; the exponent 0 is 65537."""
    modulus = key.public_key().public_numbers().n
    head = struct.pack(">HHI", RSA, name_alg, attributes) + tpm2b(policy)
    parameters = _symmetric(symmetric) + _scheme(None) + struct.pack(">HI", key.key_size, exponent)
    return head + parameters + tpm2b(modulus.to_bytes(key.key_size // 8, "big"))


def nv_public(
    index: int, attributes: int = COUNTER_ATTRIBUTES, *, name_alg: int = SHA256, policy: bytes = b"", size: int = 8
) -> bytes:
    """A TPMS_NV_PUBLIC."""
    return struct.pack(">IHI", index, name_alg, attributes) + tpm2b(policy) + struct.pack(">H", size)


def named(algorithm: int, data: bytes) -> bytes:
    digest = {SHA256: hashlib.sha256, SHA384: hashlib.sha384}[algorithm](data).digest()
    return struct.pack(">H", algorithm) + digest


def object_name(public: bytes) -> bytes:
    """The Name of a TPMT_PUBLIC."""
    return named(int.from_bytes(public[2:4], "big"), public)


def nv_name(public: bytes) -> bytes:
    """The Name of a TPMS_NV_PUBLIC."""
    return named(int.from_bytes(public[4:6], "big"), public)


def qualified_name(public: bytes, hierarchy: int = ENDORSEMENT) -> bytes:
    """The Qualified Name of a primary."""
    return named(int.from_bytes(public[2:4], "big"), struct.pack(">I", hierarchy) + object_name(public))


def attest(
    kind: int,
    attested: bytes,
    *,
    signer: bytes,
    extra_data: bytes,
    magic: int = GENERATED,
    safe: int = 1,
) -> bytes:
    """A TPMS_ATTEST."""
    head = struct.pack(">IH", magic, kind) + tpm2b(signer) + tpm2b(extra_data)
    return head + struct.pack(">QIIB", 123_456, 7, 2, safe) + struct.pack(">Q", 0x20240125_00120000) + attested


def selection(pcrs: Iterable[int], bank: int = SHA256, size: int = 3) -> bytes:
    """A TPMS_PCR_SELECTION."""
    return struct.pack(">HB", bank, size) + sum(1 << pcr for pcr in pcrs).to_bytes(size, "little")


def selections(*banks: bytes) -> bytes:
    """A TPML_PCR_SELECTION."""
    return struct.pack(">I", len(banks)) + b"".join(banks)


def pcr_digest(pcrs: Mapping[int, bytes]) -> bytes:
    return hashlib.sha256(b"".join(value for _, value in sorted(pcrs.items()))).digest()


def quote_info(pcrs: Mapping[int, bytes], selected: bytes | None = None) -> bytes:
    """A TPMS_QUOTE_INFO."""
    return (selections(selection(pcrs)) if selected is None else selected) + tpm2b(pcr_digest(pcrs))


def certify_info(public: bytes, hierarchy: int = OWNER_HIERARCHY) -> bytes:
    """A TPMS_CERTIFY_INFO."""
    return tpm2b(object_name(public)) + tpm2b(qualified_name(public, hierarchy))


def nv_certify_info(name: bytes, contents: bytes, offset: int = 0) -> bytes:
    """A TPMS_NV_CERTIFY_INFO."""
    return tpm2b(name) + struct.pack(">H", offset) + tpm2b(contents)


def signed(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """A TPMT_SIGNATURE: ECDSA with SHA-256."""
    size = (key.curve.key_size + 7) // 8
    return signature(*decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256()))), size=size)


def signature(r: int, s: int, *, scheme: int = ECDSA, digest: int = SHA256, size: int = 32) -> bytes:
    """A TPMT_SIGNATURE."""
    return struct.pack(">HH", scheme, digest) + tpm2b(r.to_bytes(size, "big")) + tpm2b(s.to_bytes(size, "big"))


def flipped(data: bytes, byte: int = -1) -> bytes:
    changed = bytearray(data)
    changed[byte] ^= 1
    return bytes(changed)


# --- certificates -----------------------------------------------------------------------------------------------------


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


_TPM_NAME = x509.Name(
    [
        x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:53435A00"),
        x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.2"), "vectors"),
        x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.3"), "id:20240125"),
    ]
)


def _moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def certificate(
    subject: str,
    key: Any,
    issuer: str,
    issuer_key: Any,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    *,
    begins: int = NOW - 365 * DAY,
    ends: int = NOW + 3650 * DAY,
) -> x509.Certificate:
    builder = x509.CertificateBuilder(
        issuer_name=_name(issuer),
        subject_name=_name(subject),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=_moment(begins),
        not_valid_after=_moment(ends),
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def key_usage(*, cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=not cert_sign,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """A certificate authority for EKs: root, or under another."""

    def __init__(
        self,
        name: str,
        parent: Authority | None = None,
        *,
        key: Any = None,
        ca: bool | None = True,
        path_length: int | None = None,
        cert_sign: bool | None = True,
        more: Sequence[tuple[x509.ExtensionType, bool]] = (),
        **dates: int,
    ) -> None:
        self.name, self.key = name, key or p256()
        extensions: list[tuple[x509.ExtensionType, bool]] = []
        if ca is not None:
            extensions.append((x509.BasicConstraints(ca, path_length), True))
        if cert_sign is not None:
            extensions.append((key_usage(cert_sign=cert_sign), True))
        issuer = parent or self
        self.certificate = certificate(name, self.key, issuer.name, issuer.key, [*extensions, *more], **dates)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def ek_certificate(self, key: Any, *, subject: str = "", ca: bool = False, **dates: int) -> bytes:
        """A TCG EK certificate, DER: no subject, the TPM's model in a critical alternative name, the EK's usage."""
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca, None), True),
            (key_usage(cert_sign=ca), True),
            (x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")]), False),
            (x509.SubjectAlternativeName([x509.DirectoryName(_TPM_NAME)]), True),
        ]
        made = certificate(subject, key, self.name, self.key, extensions, **dates)
        return made.public_bytes(Encoding.DER)
