"""The certificates behind an SEV-SNP report: the table that the host hands over, and the chain up to AMD's root.

Pure. The certificates may come from anywhere, the host included: only the owner's pin of the root's key counts. So a
chain is exactly root (ARK), intermediate (ASK) and the key that signed the report: VCEK, which is derived from the chip
and its patch levels, or VLEK, which AMD gave to a cloud.
Specification: AMD 57230, VCEK Certificate and KDS Interface, 3 and 4; AMD 56421, GHCB, 4.1.8.1 (MSG_REPORT_REQ).
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, cast
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from oci_hook.attestation.sev_snp import Product, SigningKey, SnpReport, Tcb, parse_tcb
from oci_hook.errors import SczError
from oci_hook.tee_policy import PRODUCTS

Role = Literal["ark", "ask", "vcek", "vlek"]

TABLE_LIMIT_BYTES: Final = 64 << 10
CERTIFICATE_LIMIT_BYTES: Final = 16 << 10
_ENTRIES_LIMIT: Final = 16
_ENTRY_BYTES: Final = 24
_ROLES: Final[dict[UUID, Role]] = {
    UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ark",
    UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ask",
    UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "vlek",
}

_AMD: Final = "1.3.6.1.4.1.3704.1."
_LEVELS: Final = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8"}
_RESERVED_LEVELS: Final = ("3.4", "3.5", "3.6", "3.7")
_RSA_BITS: Final = 4096
_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA384()), salt_length=48)
_X509_RAISES: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Endorsement:
    """A key whose chain was verified: of which product, patch levels and chip (VCEK) or cloud (VLEK) it is."""

    key: ec.EllipticCurvePublicKey
    kind: SigningKey
    product: Product
    tcb: Tcb
    root: bytes


def parse_table(data: bytes, *, error: type[SczError]) -> Mapping[Role, bytes]:
    """Parse the table of certificates that a host hands over beside a report.

    Args:
        data: At most 64 KiB; empty: the host gives none.
        error: What to raise.

    Returns:
        DER by role; entries of another purpose are left out.

    Raises:
        SczError: The class `error`: no end, more than 16 entries, one that lies outside, in the header or in another.
    """
    if not data:
        return {}
    if len(data) > TABLE_LIMIT_BYTES:
        raise error(f"certificate table: more than {TABLE_LIMIT_BYTES} bytes")
    entries = _entries(data, error)
    header, found = (len(entries) + 1) * _ENTRY_BYTES, dict[Role, bytes]()
    end = header
    for _, offset, size in entries:
        if offset < end or size > len(data) - offset:
            raise error("certificate table: an entry lies outside, in the header or in another entry")
        end = offset + size
    if len({guid for guid, _, _ in entries}) != len(entries):
        raise error("certificate table: two entries of one kind")
    for guid, offset, size in entries:
        if guid in _ROLES:
            if not 0 < size <= CERTIFICATE_LIMIT_BYTES:
                raise error(f"certificate table: a certificate of {size} bytes")
            found[_ROLES[guid]] = data[offset : offset + size]
    return found


def _entries(data: bytes, error: type[SczError]) -> list[tuple[UUID, int, int]]:
    """(GUID, offset, size), in the order of their offsets."""
    found: list[tuple[UUID, int, int]] = []
    for place in range(0, (_ENTRIES_LIMIT + 1) * _ENTRY_BYTES, _ENTRY_BYTES):
        entry = data[place : place + _ENTRY_BYTES]
        if len(entry) < _ENTRY_BYTES:
            raise error("certificate table: it has no end")
        if not any(entry):
            return sorted(found, key=lambda each: each[1])
        found.append((UUID(bytes=entry[:16]), *struct.unpack("<II", entry[16:])))
    raise error(f"certificate table: more than {_ENTRIES_LIMIT} entries")


def verify_endorsement(
    certificates: Mapping[Role, bytes],
    report: SnpReport,
    *,
    roots: Collection[bytes],
    vlek_providers: Collection[str],
    now: datetime,
    error: type[SczError],
) -> Endorsement:
    """Verify that the key that is to have signed this report is AMD's, for this chip and these patch levels.

    Args:
        certificates: DER by role; the roles `ark`, `ask` and the report's signing key are there.
        report: Parsed; its signature is not verified yet.
        roots: SHA-256 of the root keys that the model's owner accepts.
        vlek_providers: CSP_IDs whose VLEK the owner accepts.
        now: With a time zone.
        error: What to raise.

    Raises:
        SczError: The class `error`: one of the seven checks failed.
    """
    try:
        with warnings.catch_warnings():  # the serial number of AMD's VCEKs is 0, and hostile names have other sizes
            warnings.simplefilter("ignore")
            return _verify(certificates, report, roots, vlek_providers, now, error)
    except _X509_RAISES as cause:
        raise error("SEV-SNP certificates: one is malformed") from cause


def _verify(
    certificates: Mapping[Role, bytes],
    report: SnpReport,
    roots: Collection[bytes],
    vlek_providers: Collection[str],
    now: datetime,
    error: type[SczError],
) -> Endorsement:
    kind = report.signing_key
    ark, ask, leaf = (_load(certificates[role], role, error) for role in ("ark", "ask", kind))
    # 1. The root's key is one that the owner pinned, and it signed itself.
    root = _digest(ark)
    if root not in roots:
        raise error(f"SEV-SNP certificates: the root's key {root.hex()} is none that the model's owner accepts")
    _verify_issued(ark, ark, "ark", error)
    # 2. The root signed the intermediate, that signed the key's certificate, and both may sign certificates.
    _verify_authority(ark, 1, "ark", error)
    _verify_issued(ask, ark, "ask", error)
    _verify_authority(ask, 0, "ask", error)
    _verify_issued(leaf, ask, kind, error)
    # 3. Each is what it is called, of one product, which is the report's.
    product = _product(ark, ask, leaf, kind, report, error)
    # 4. All are in their dates.
    for role, each in (("ark", ark), ("ask", ask), (kind, leaf)):
        if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
            raise error(f"SEV-SNP certificates: {role} is not in its dates")
    # 5. The key is an end's, on P-384.
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise error(f"SEV-SNP certificates: the key of {kind} is not on P-384")
    # 6. It is of the patch levels that the report says.
    tcb = _tcb(leaf, product, error)
    if tcb != parse_tcb(report.tcbs[0], product, error=error):
        raise error(f"SEV-SNP certificates: {kind} is for other patch levels ({tcb}) than the report's")
    # 7. It is of the chip that the report names, or of a cloud that the owner accepts.
    _verify_holder(leaf, report, product, vlek_providers, error)
    return Endorsement(key, kind, product, tcb, root)


def claimed_by(
    certificates: Mapping[Role, bytes], kind: SigningKey, *, error: type[SczError]
) -> tuple[bytes, str | None]:
    """What certificates say of themselves, for a person to compare: nothing of it is verified here.

    Args:
        certificates: As for `verify_endorsement`.
        kind: The report's signing key.
        error: What to raise.

    Returns:
        The digest of the root's key; of a VLEK the cloud that it calls its own.

    Raises:
        SczError: The class `error`: one is malformed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ark, leaf = (_load(certificates[role], role, error) for role in ("ark", kind))
            return _digest(ark), _ia5(leaf, "5", error) if kind == "vlek" else None
    except _X509_RAISES as cause:
        raise error("SEV-SNP certificates: one is malformed") from cause


def _digest(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).digest()


def _load(der: bytes, role: str, error: type[SczError]) -> x509.Certificate:
    if len(der) > CERTIFICATE_LIMIT_BYTES:
        raise error(f"SEV-SNP certificates: {role} is larger than {CERTIFICATE_LIMIT_BYTES} bytes")
    return x509.load_der_x509_certificate(der)


def _verify_issued(certificate: x509.Certificate, issuer: x509.Certificate, role: str, error: type[SczError]) -> None:
    """RSA-PSS with SHA-384 by a key of 4096 bits, nothing else."""
    key = issuer.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != _RSA_BITS:
        raise error(f"SEV-SNP certificates: what signed {role} is not an RSA key of {_RSA_BITS} bits")
    named = certificate.issuer == issuer.subject
    if not named or certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS:
        raise error(f"SEV-SNP certificates: {role} is not issued by the one above it with RSA-PSS")
    try:
        certificate.verify_directly_issued_by(issuer)  # also that it names one algorithm at both its places
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, _PSS, hashes.SHA384())
    except InvalidSignature as cause:
        raise error(f"SEV-SNP certificates: {role} is not signed by the one above it") from cause


def _verify_authority(certificate: x509.Certificate, issuers_below: int, role: str, error: type[SczError]) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as cause:
        raise error(f"SEV-SNP certificates: {role} does not say that it is an authority") from cause
    deep_enough = constraints.path_length is None or constraints.path_length >= issuers_below
    if not constraints.ca or not usage.key_cert_sign or not deep_enough:
        raise error(f"SEV-SNP certificates: {role} may not sign certificates")


def _product(
    ark: x509.Certificate,
    ask: x509.Certificate,
    leaf: x509.Certificate,
    kind: SigningKey,
    report: SnpReport,
    error: type[SczError],
) -> Product:
    """Of all three by their names, and of the leaf by its extension (`Milan-B0`)."""
    name = _ia5(leaf, "2", error).partition("-")[0]
    middle = f"SEV-VLEK-{name}" if kind == "vlek" else f"SEV-{name}"
    names = [_common_name(each, error) for each in (ark, ask, leaf)]
    if names != [f"ARK-{name}", middle, f"SEV-{kind.upper()}"] or name.lower() not in PRODUCTS:
        raise error(f"SEV-SNP certificates: {', '.join(ascii(each) for each in names)} are no chain of a {kind}")
    product = cast(Product, name.lower())
    if report.product not in (None, product):
        raise error(f"SEV-SNP certificates: they are of {product}, the report of {report.product}")
    return product


def _common_name(certificate: x509.Certificate, error: type[SczError]) -> str:
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(found) != 1 or not isinstance(found[0].value, str):
        raise error("SEV-SNP certificates: one has no name")
    return found[0].value[:64]


def _tcb(leaf: x509.Certificate, product: Product, error: type[SczError]) -> Tcb:
    """Turin's certificates have a level more, and of the reserved ones not all."""
    levels = {name: _number(leaf, oid, error) for name, oid in _LEVELS.items()}
    present = {each.oid.dotted_string for each in leaf.extensions}
    if any(_number(leaf, oid, error) for oid in _RESERVED_LEVELS if _AMD + oid in present):
        raise error("SEV-SNP certificates: a reserved patch level is not zero")
    return Tcb(fmc=_number(leaf, "3.9", error) if product == "turin" else 0, **levels)


def _verify_holder(
    leaf: x509.Certificate,
    report: SnpReport,
    product: Product,
    vlek_providers: Collection[str],
    error: type[SczError],
) -> None:
    if report.signing_key == "vlek":
        provider = _ia5(leaf, "5", error)
        if provider not in vlek_providers:
            raise error(f"SEV-SNP certificates: the VLEK of {provider!a} is none that the model's owner accepts")
        return
    if report.chip_id is None:
        raise error("SEV-SNP report: the host masks the chip's number, which the VCEK is to be compared with")
    size = 8 if product == "turin" else 64  # Turin's numbers are 8 bytes, zeros after them
    if _extension(leaf, "4", error) != report.chip_id[:size] or any(report.chip_id[size:]):
        raise error("SEV-SNP certificates: the VCEK is another chip's than the report's")


def _extension(leaf: x509.Certificate, oid: str, error: type[SczError]) -> bytes:
    """The value of one of AMD's extensions; that none is there twice, the library has seen to."""
    try:
        value = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(_AMD + oid)).value
    except x509.ExtensionNotFound as cause:
        raise error(f"SEV-SNP certificates: the extension {_AMD}{oid} is missing") from cause
    return cast(x509.UnrecognizedExtension, value).value


def _number(leaf: x509.Certificate, oid: str, error: type[SczError]) -> int:
    """A DER INTEGER from 0 to 255."""
    value = _extension(leaf, oid, error)
    number = int.from_bytes(value[2:], "big")
    if value != (bytes([2, 1, number]) if number < 0x80 else b"\2\2\0" + bytes([number & 0xFF])):
        raise error(f"SEV-SNP certificates: the extension {_AMD}{oid} is not a number from 0 to 255")
    return number


def _ia5(leaf: x509.Certificate, oid: str, error: type[SczError]) -> str:
    """A DER IA5String of 1 to 64 characters."""
    value = _extension(leaf, oid, error)
    text = value[2:]
    if value[:2] != bytes([0x16, len(text) & 0x7F]) or not 0 < len(text) <= 64 or not text.isascii():
        raise error(f"SEV-SNP certificates: the extension {_AMD}{oid} is not a short text")
    return text.decode("ascii")
