"""The endorsement key's certificate, up to a root in the owner's folder: check 1 of the enrolment.

Pure: PEM and DER in; time is an argument. The web's certificate rules do not fit here (no server name, a critical
name of the TPM's model), so each link is verified by itself. Which roots are in the folder is the owner's decision, and
the only thing that keeps software TPMs out. A maker's authority also issues to other chips and to its own servers: a
certificate that says what its key is for has to say that it is an EK. Specification: TCG EK Credential Profile 2.5,
section 3; RFC 5280, 4.2.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID as Oid

from oci_hook.errors import EnrolmentRefused, KeyInvalid, SczError

_E = TypeVar("_E", bound=x509.ExtensionType)

DEPTH_LIMIT: Final = 8
LINK_LIMIT: Final = DEPTH_LIMIT
CERTIFICATE_LIMIT_BYTES: Final = 16 * 1024
CA_LIMIT: Final = 1000
_SEQUENCE: Final = b"\x30\x82"  # X.690: with a length of two bytes
_SIGNATURE_LIMIT: Final = 2000  # what a folder of authorities of one name could cost otherwise
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_EK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
# Extensions whose say is heeded here, or that restrict nothing; another that is critical refuses (RFC 5280, 4.2).
_UNDERSTOOD: Final = frozenset(
    {
        Oid.BASIC_CONSTRAINTS,
        Oid.KEY_USAGE,
        Oid.EXTENDED_KEY_USAGE,
        Oid.SUBJECT_ALTERNATIVE_NAME,
        Oid.CERTIFICATE_POLICIES,
        Oid.SUBJECT_DIRECTORY_ATTRIBUTES,  # the TPM's specification, by TCG
        Oid.SUBJECT_KEY_IDENTIFIER,
        Oid.AUTHORITY_KEY_IDENTIFIER,
    }
)

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
    _by_name: Mapping[x509.Name, Sequence[x509.Certificate]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = defaultdict(list)
        for certificate in (*self.roots, *self.intermediates):
            by_name[certificate.subject].append(certificate)
        object.__setattr__(self, "_by_name", by_name)

    def named(self, name: x509.Name) -> Sequence[x509.Certificate]:
        """The certificates of that subject, roots first."""
        return self._by_name.get(name, ())


@dataclass(frozen=True, slots=True)
class EkCertificate:
    """An EK certificate whose chain was verified."""

    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    subject: str
    sha256: str


def parse_ca_certificates(files: Sequence[bytes]) -> CaCertificates:
    """Parse the files of an owner's folder of EK roots.

    Args:
        files: Each with one or more certificates in PEM, or with one in DER, as makers publish them.

    Raises:
        KeyInvalid: A file without certificates, a malformed one, more than 1000 in all, or no self-signed one.
    """
    roots: dict[bytes, x509.Certificate] = {}
    links: dict[bytes, x509.Certificate] = {}
    count = 0
    try:
        for data in files:
            if is_certificate(data):
                found = [x509.load_der_x509_certificate(data)]
            else:
                found = x509.load_pem_x509_certificates(data)
            count += len(found)
            if count > CA_LIMIT:
                raise KeyInvalid("the EK roots' folder holds more than 1000 certificates")
            for certificate in found:
                (roots if _is_self_signed(certificate) else links)[certificate.fingerprint(hashes.SHA256())] = (
                    certificate
                )
    except _X509_RAISES as cause:
        raise KeyInvalid("a file of the EK roots' folder holds no certificate, neither in PEM nor in DER") from cause
    if not roots:
        raise KeyInvalid("the EK roots' folder holds no self-signed certificate")
    return CaCertificates(tuple(roots.values()), tuple(links.values()))


def _is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether it is a root: one that another key of the same name signed (a maker's key change) is a link.

    A root's own signature proves nothing, and those that are made with SHA-1 can no longer be looked at.
    """
    if certificate.subject != certificate.issuer:
        return False
    try:
        certificate.verify_directly_issued_by(certificate)
    except InvalidSignature:
        return False
    except _X509_RAISES:
        pass
    return True


def is_certificate(data: bytes) -> bool:
    """Whether the contents of an NV index begin as a certificate of 256 bytes or more does."""
    return data[:2] == _SEQUENCE


def without_padding(certificate: bytes) -> bytes:
    """A certificate without what fills it up to the size of its NV index (X.690, 8.1.3: definite length).

    Args:
        certificate: As read from the TPM. What does not begin like a certificate is returned as it is.
    """
    if len(certificate) < 4 or not is_certificate(certificate):
        return certificate
    return certificate[: 4 + int.from_bytes(certificate[2:4], "big")]


def split_certificates(data: bytes) -> tuple[bytes, ...]:
    """The certificates that lie one behind the other in a TPM's NV, at most `LINK_LIMIT`; what follows is padding."""
    found: list[bytes] = []
    while is_certificate(data) and len(found) < LINK_LIMIT:
        found.append(without_padding(data))
        data = data[len(found[-1]) :]
    return tuple(found)


def _with_links(authorities: CaCertificates, links: Sequence[bytes]) -> CaCertificates:
    """The owner's folder and what came from the TPM: links, whatever they say of themselves."""
    if not links:
        return authorities
    more = tuple(x509.load_der_x509_certificate(der) for der in links)
    return CaCertificates(authorities.roots, authorities.intermediates + more)


def verify_ek_certificate(
    der: bytes,
    authorities: CaCertificates,
    *,
    now: datetime,
    links: Sequence[bytes] = (),
    error: type[SczError] = EnrolmentRefused,
) -> EkCertificate:
    """Check 1: an EK certificate chains to a root; all are in their dates; issuers are CAs.

    Args:
        der: The certificate, as it lies in the TPM.
        authorities: The owner's folder.
        now: With a time zone.
        links: Authorities' certificates that the TPM holds beside it, DER; none of them becomes a root.
        error: What to raise.

    Raises:
        SczError: The class `error`: malformed, expired, a CA itself, not for an EK, with a critical extension that is
            not understood, or no chain of at most 8 links to a root.
    """
    if len(der) > CERTIFICATE_LIMIT_BYTES:
        raise error("the EK certificate is larger than 16 KiB")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        _verify_dates(certificate, now, "the EK certificate", error)
        if _is_ca(certificate, 0):
            raise error("the EK certificate is a certificate authority's")
        _verify_purpose(certificate, error)
        if not _chains_to_root(certificate, _with_links(authorities, links), now):
            raise error("the EK certificate does not chain to a root in the owner's folder by valid links")
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise error("the EK certificate's key is neither RSA nor ECC")
        return EkCertificate(key, _subject(certificate), hashlib.sha256(der).hexdigest())
    except _X509_RAISES as cause:
        raise error("the EK certificate is malformed") from cause


def _verify_dates(certificate: x509.Certificate, now: datetime, what: str, error: type[SczError]) -> None:
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise error(f"{what} is not in its dates")


def _verify_purpose(certificate: x509.Certificate, error: type[SczError]) -> None:
    """Whether it is for an EK, as far as it says; older ones say nothing (EK Credential Profile 2.5, 3.5.6, 3.5.13)."""
    if not _understood(certificate):
        raise error("the EK certificate has a critical extension that is not understood")
    usage, purposes = _extension(certificate, x509.KeyUsage), _extension(certificate, x509.ExtendedKeyUsage)
    if usage is not None and not (usage.key_encipherment or usage.key_agreement):
        raise error("the EK certificate's key is not for encryption: it is another kind of certificate")
    if purposes is not None and _EK_CERTIFICATE not in purposes:
        raise error("the EK certificate says that it is for something else: tcg-kp-EKCertificate is not in it")


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _understood(certificate: x509.Certificate) -> bool:
    return all(each.oid in _UNDERSTOOD for each in certificate.extensions if each.critical)


def _is_ca(certificate: x509.Certificate, issuers_below: int) -> bool:
    """Whether it may issue certificates, with so many issuers between itself and the EK certificate."""
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return False
    if constraints.path_length is not None and constraints.path_length < issuers_below:
        return False
    usage = _extension(certificate, x509.KeyUsage)
    return usage is None or usage.key_cert_sign


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether `issuer`'s key signed `certificate`, with a hash that still means something."""
    try:
        if not isinstance(certificate.signature_hash_algorithm, _HASHES):
            return False
        certificate.verify_directly_issued_by(issuer)
    except (*_X509_RAISES, InvalidSignature):
        return False
    return True


def _chains_to_root(certificate: x509.Certificate, authorities: CaCertificates, now: datetime) -> bool:
    """Breadth first: what was reached by fewer links is never worse, so each authority is looked at once."""
    level, seen, signatures = [certificate], {certificate}, 0
    for issuers_below in range(DEPTH_LIMIT):
        above = []
        for each in level:
            for issuer in authorities.named(each.issuer):
                if issuer in seen:
                    continue
                signatures += 1
                if signatures > _SIGNATURE_LIMIT:
                    return False
                # The signature first: a malformed authority that issued nothing here spoils nothing here.
                if not _issued(each, issuer) or not _may_issue(issuer, now, issuers_below):
                    continue
                if issuer in authorities.roots:
                    return True
                seen.add(issuer)
                above.append(issuer)
        level = above
    return False


def _may_issue(issuer: x509.Certificate, now: datetime, issuers_below: int) -> bool:
    in_its_dates = issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc
    return in_its_dates and _is_ca(issuer, issuers_below) and _understood(issuer)


def _subject(certificate: x509.Certificate) -> str:
    """Who made the TPM: the subject, or the directory name that TCG puts in its place."""
    names = [certificate.subject]
    alternative = _extension(certificate, x509.SubjectAlternativeName)
    if alternative is not None:
        names += alternative.get_values_for_type(x509.DirectoryName)
    texts = [name.rfc4514_string() for name in names]
    return next((text for text in texts if text), "(no subject)")[:256]
