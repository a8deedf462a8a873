"""The endorsement key's certificate, up to a root in the owner's folder: check 1 of the enrolment.

Pure: PEM and DER in; time is an argument. The web's certificate rules do not fit here (no server name, a critical
name of the TPM's model), so each link is verified by itself. Which roots are in the folder is the owner's decision, and
the only thing that keeps software TPMs out. Specification: TCG EK Credential Profile 2.5, section 3; RFC 5280, 4.2.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID

from oci_hook.errors import EnrolmentRefused, KeyInvalid, SczError

DEPTH_LIMIT: Final = 8
CERTIFICATE_LIMIT_BYTES: Final = 16 * 1024
CA_LIMIT: Final = 1000
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)

# What cryptography 50 raises on hostile certificates: most parts are parsed when they are first looked at.
_X509_RAISES: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class CaCertificates:
    """The certificates of an owner's folder: trusted roots (self-signed ones) and mere links."""

    roots: tuple[x509.Certificate, ...]
    intermediates: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class EkCertificate:
    """An EK certificate whose chain was verified."""

    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    subject: str
    sha256: str


def parse_ca_certificates(files: Sequence[bytes]) -> CaCertificates:
    """Parse the PEM files of an owner's folder of EK roots.

    Args:
        files: Each with one or more certificates.

    Raises:
        KeyInvalid: A file without certificates, a malformed one, more than 1000 in all, or no self-signed one.
    """
    roots: list[x509.Certificate] = []
    intermediates: list[x509.Certificate] = []
    try:
        for data in files:
            for certificate in x509.load_pem_x509_certificates(data):
                self_issued = certificate.subject == certificate.issuer
                (roots if self_issued else intermediates).append(certificate)
    except _X509_RAISES as cause:
        raise KeyInvalid("a file of the EK roots' folder holds no PEM certificate") from cause
    if not roots or len(roots) + len(intermediates) > CA_LIMIT:
        raise KeyInvalid("the EK roots' folder holds no self-signed certificate, or more than 1000 certificates")
    return CaCertificates(tuple(roots), tuple(intermediates))


def without_padding(certificate: bytes) -> bytes:
    """A certificate without what fills it up to the size of its NV index (X.690, 8.1.3: definite length).

    Args:
        certificate: As read from the TPM. What does not begin like a certificate is returned as it is.
    """
    if len(certificate) < 4 or certificate[:2] != b"\x30\x82":
        return certificate
    return certificate[: 4 + int.from_bytes(certificate[2:4], "big")]


def verify_ek_certificate(
    der: bytes, authorities: CaCertificates, *, now: datetime, error: type[SczError] = EnrolmentRefused
) -> EkCertificate:
    """Check 1: an EK certificate chains to a root; all are in their dates; issuers are CAs.

    Args:
        der: The certificate, as it lies in the TPM.
        authorities: The owner's folder.
        now: With a time zone.
        error: What to raise.

    Raises:
        SczError: The class `error`: malformed, expired, a CA itself, or no chain of at most 8 links to a root.
    """
    if len(der) > CERTIFICATE_LIMIT_BYTES:
        raise error("the EK certificate is larger than 16 KiB")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        _verify_dates(certificate, now, "the EK certificate", error)
        if _is_ca(certificate, 0):
            raise error("the EK certificate is a certificate authority's")
        if not _chains_to_root(certificate, authorities, now, 0):
            raise error("the EK certificate does not chain to a root in the owner's folder by valid links")
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise error("the EK certificate's key is neither RSA nor ECC")
        return EkCertificate(key, _subject(certificate), hashlib.sha256(der).hexdigest())
    except _X509_RAISES as cause:
        raise error("the EK certificate is malformed") from cause


def _verify_dates(certificate: x509.Certificate, now: datetime, what: str, error: type[SczError]) -> None:
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise error(f"{what} is not in its dates")


def _is_ca(certificate: x509.Certificate, issuers_below: int) -> bool:
    """Whether it may issue certificates, with so many issuers between itself and the EK certificate."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    if not constraints.ca or (constraints.path_length is not None and constraints.path_length < issuers_below):
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether `issuer`'s key signed `certificate`, with a hash that still means something."""
    if certificate.issuer != issuer.subject or not isinstance(certificate.signature_hash_algorithm, _HASHES):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*_X509_RAISES, InvalidSignature):
        return False
    return True


def _chains_to_root(
    certificate: x509.Certificate, authorities: CaCertificates, now: datetime, issuers_below: int
) -> bool:
    if issuers_below >= DEPTH_LIMIT:
        return False
    for issuer in (*authorities.roots, *authorities.intermediates):
        if not _issued(certificate, issuer):  # first: a malformed one that issued nothing here spoils nothing here
            continue
        if not issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc or not _is_ca(issuer, issuers_below):
            continue
        if issuer in authorities.roots or _chains_to_root(issuer, authorities, now, issuers_below + 1):
            return True
    return False


def _subject(certificate: x509.Certificate) -> str:
    """Who made the TPM: the subject, or the directory name that TCG puts in its place."""
    names = [certificate.subject]
    try:
        alternative = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
        if isinstance(alternative, x509.SubjectAlternativeName):
            names += alternative.get_values_for_type(x509.DirectoryName)
    except x509.ExtensionNotFound:
        pass
    texts = [name.rfc4514_string() for name in names]
    return next((text for text in texts if text), "(no subject)")[:256]
