"""attestation.ek_chain: the owner's folder, padding, depth, hostile certificates. Chains: the enrolment's vectors."""

from __future__ import annotations

import hashlib
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.ek_chain import (
    CERTIFICATE_LIMIT_BYTES,
    CaCertificates,
    parse_ca_certificates,
    split_certificates,
    verify_ek_certificate,
    without_padding,
)
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, KeyInvalid
from tests.attestation_vectors import GENERATOR, changed_bytes, moment, t, value_or_ours

NOW = moment(t.NOW)
EK_KEY = t.p256()
ROOT = t.Authority("root")
LINK = t.Authority("link", ROOT)
DER = LINK.ek_certificate(EK_KEY)


def folder(*authorities) -> CaCertificates:
    return parse_ca_certificates([authority.pem.encode() for authority in authorities])


FOLDER = folder(ROOT, LINK)


def test_what_is_told_of_a_certificate() -> None:
    verified = verify_ek_certificate(DER, FOLDER, now=NOW)
    assert verified.public_key == EK_KEY.public_key()
    assert verified.sha256 == hashlib.sha256(DER).hexdigest()
    assert "2.23.133.2.2=vectors" in verified.subject


def test_error_is_the_caller_s() -> None:
    with pytest.raises(DeviceInvalid):
        verify_ek_certificate(b"", FOLDER, now=NOW, error=DeviceInvalid)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_self_signed_ones_are_roots_and_others_links() -> None:
    found = parse_ca_certificates([(LINK.pem + ROOT.pem).encode()])
    assert (found.roots, found.intermediates) == ((ROOT.certificate,), (LINK.certificate,))


@pytest.mark.parametrize(
    "files",
    [[], [b""], [b"no PEM"], [LINK.pem.encode()], [ROOT.pem.encode(), b""], [ROOT.pem.replace("M", "N", 3).encode()]],
)
def test_folders_that_are_refused(files: list[bytes]) -> None:
    with pytest.raises(KeyInvalid):
        parse_ca_certificates(files)


def test_more_than_a_thousand_certificates_are_refused() -> None:
    thousand = [ROOT.pem.encode() * 500] * 2
    assert parse_ca_certificates(thousand).roots == (ROOT.certificate,)  # each is kept once
    with pytest.raises(KeyInvalid, match="more than 1000"):
        parse_ca_certificates([*thousand, LINK.pem.encode()])


def test_a_link_is_not_trusted_by_itself() -> None:
    other = t.Authority("other root")
    with pytest.raises(EnrolmentRefused, match="does not chain"):
        verify_ek_certificate(DER, folder(other, LINK), now=NOW)


def test_a_malformed_one_that_issued_nothing_here_spoils_nothing() -> None:
    """Bundles of TPM makers hold odd certificates; they are looked at only once they turn out to be the issuer."""
    broken = GENERATOR.Enrolments.broken_constraints()
    odd_root = t.Authority("odd root", ca=None, more=[(broken, True)])
    odd_link = t.Authority("odd link", ROOT, ca=None, more=[(broken, True)])
    verify_ek_certificate(DER, folder(odd_root, odd_link, ROOT, LINK), now=NOW)
    for authority in (odd_root, odd_link):
        with pytest.raises(EnrolmentRefused, match="malformed"):
            verify_ek_certificate(authority.ek_certificate(EK_KEY), folder(odd_root, odd_link, ROOT), now=NOW)


def test_authorities_that_issued_each_other_end_the_search() -> None:
    key_a, key_b = t.p256(), t.p256()
    a, b = t.Authority("a", key=key_a), t.Authority("b", key=key_b)
    a_by_b, b_by_a = t.Authority("a", b, key=key_a), t.Authority("b", a, key=key_b)
    with pytest.raises(EnrolmentRefused, match="does not chain"):
        verify_ek_certificate(a.ek_certificate(EK_KEY), folder(ROOT, a_by_b, b_by_a), now=NOW)
    verify_ek_certificate(a.ek_certificate(EK_KEY), folder(b, a_by_b, b_by_a), now=NOW)


def test_dates_are_those_of_the_moment_asked_for() -> None:
    der = LINK.ek_certificate(EK_KEY, begins=t.NOW, ends=t.NOW + 10)
    for seconds in (0, 10):
        verify_ek_certificate(der, FOLDER, now=moment(t.NOW + seconds))
    for seconds in (-1, 11):
        with pytest.raises(EnrolmentRefused, match="not in its dates"):
            verify_ek_certificate(der, FOLDER, now=moment(t.NOW + seconds))


def der_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def made_by_root(*extensions: tuple[x509.ExtensionType, bool], key=EK_KEY) -> bytes:
    return der_of(t.certificate("EK of a TPM", key, ROOT.name, ROOT.key, extensions))


def test_der_files_of_makers_are_read_too() -> None:
    found = parse_ca_certificates([der_of(ROOT.certificate), LINK.pem.encode()])
    assert (found.roots, found.intermediates) == ((ROOT.certificate,), (LINK.certificate,))
    with pytest.raises(KeyInvalid):
        parse_ca_certificates([der_of(ROOT.certificate) + b"\0"])


def test_a_maker_s_change_of_keys_is_no_root() -> None:
    """Its name is its issuer's, but another key signed it."""
    renewed = t.Authority("root", ROOT)
    found = folder(ROOT, renewed)
    assert (found.roots, found.intermediates) == ((ROOT.certificate,), (renewed.certificate,))
    verify_ek_certificate(renewed.ek_certificate(EK_KEY), found, now=NOW)
    with pytest.raises(EnrolmentRefused, match="does not chain"):
        verify_ek_certificate(renewed.ek_certificate(EK_KEY), folder(t.Authority("x"), renewed), now=NOW)


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["/usr/bin/openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("rsa:2048", ["-sha1"]), ("rsa:2048", ["-sha256", "-sigopt", "rsa_padding_mode:pss"]), ("rsa-pss", ["-sha256"])],
)
def test_roots_of_real_makers(tmp_path: Path, kind: str, options: list[str]) -> None:
    """Roots of 2012 are signed with SHA-1: nobody relies on a root's own signature. Others are for RSA-PSS."""
    root = ["req", "-x509", "-newkey", kind, "-nodes", "-keyout", "key", "-out", "root", "-subj", "/CN=old root"]
    openssl(tmp_path, *root, "-days", "9000", "-addext", "keyUsage=critical,keyCertSign", *options)
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl(tmp_path, "req", "-new", *curve, "-nodes", "-keyout", "ek", "-out", "asked", "-subj", "/CN=EK of a TPM")
    issue = ["x509", "-req", "-in", "asked", "-CA", "root", "-CAkey", "key", "-CAcreateserial", "-sha256"]
    openssl(tmp_path, *issue, "-days", "900", "-outform", "DER", "-out", "der")
    found = parse_ca_certificates([(tmp_path / "root").read_bytes()])
    now = found.roots[0].not_valid_before_utc + timedelta(days=1)
    assert verify_ek_certificate((tmp_path / "der").read_bytes(), found, now=now).subject == "CN=EK of a TPM"


def test_an_ek_certificate_signed_with_rsa_pss() -> None:
    key = rsa.generate_private_key(65537, 2048)
    root = t.Authority("pss", key=key)
    builder = x509.CertificateBuilder(
        issuer_name=root.certificate.subject,
        subject_name=x509.Name([]),
        public_key=EK_KEY.public_key(),
        serial_number=1,
        not_valid_before=root.certificate.not_valid_before_utc,
        not_valid_after=root.certificate.not_valid_after_utc,
    )
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    verify_ek_certificate(der_of(builder.sign(key, hashes.SHA256(), rsa_padding=pss)), folder(root), now=NOW)


USAGE = t.key_usage(cert_sign=False)
SIGNING = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
EK_PURPOSE = x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")])
OTHER_PURPOSES = [x509.ObjectIdentifier("2.23.133.8.3"), x509.ExtendedKeyUsageOID.SERVER_AUTH]  # an AIK; a server
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
NAMES = x509.SubjectAlternativeName([x509.DirectoryName(ROOT.certificate.subject)])
CONSTRAINED = x509.NameConstraints(permitted_subtrees=[x509.DNSName("example")], excluded_subtrees=None)


@pytest.mark.parametrize(
    "extensions",
    [
        [],  # the oldest say nothing
        [(USAGE, False), (EK_PURPOSE, True)],
        [(NAMES, False)],
        [(x509.ExtendedKeyUsage([*EK_PURPOSE, OTHER_PURPOSES[1]]), False)],
        [(UNKNOWN, False)],
    ],
)
def test_what_an_ek_certificate_may_say(extensions: list[tuple[x509.ExtensionType, bool]]) -> None:
    assert verify_ek_certificate(made_by_root(*extensions), FOLDER, now=NOW).public_key == EK_KEY.public_key()


@pytest.mark.parametrize(
    ("extensions", "word"),
    [
        ([(SIGNING, True)], "not for encryption"),
        ([(x509.ExtendedKeyUsage(OTHER_PURPOSES[:1]), False)], "something else"),
        ([(USAGE, True), (x509.ExtendedKeyUsage(OTHER_PURPOSES), True)], "something else"),
        ([(UNKNOWN, True)], "not understood"),
        ([(CONSTRAINED, True)], "not understood"),
    ],
)
def test_another_kind_of_certificate_by_the_same_maker(
    extensions: list[tuple[x509.ExtensionType, bool]], word: str
) -> None:
    with pytest.raises(EnrolmentRefused, match=word):
        verify_ek_certificate(made_by_root(*extensions), FOLDER, now=NOW)


def test_an_authority_with_a_restriction_that_is_not_understood_issues_nothing() -> None:
    link = t.Authority("narrow", ROOT, more=[(CONSTRAINED, True)])
    with pytest.raises(EnrolmentRefused, match="does not chain"):
        verify_ek_certificate(link.ek_certificate(EK_KEY), folder(ROOT, link), now=NOW)


def test_a_crowd_of_authorities_that_issued_each_other_ends_the_search() -> None:
    """A search that goes every way would take forty to the power of eight steps."""
    key_a, key_b = t.p256(), t.p256()
    a, b = t.Authority("a", key=key_a), t.Authority("b", key=key_b)
    crowd = [t.Authority("a", b, key=key_a) for _ in range(40)] + [t.Authority("b", a, key=key_b) for _ in range(40)]
    with pytest.raises(EnrolmentRefused, match="does not chain"):
        verify_ek_certificate(a.ek_certificate(EK_KEY), folder(ROOT, *crowd), now=NOW)
    verify_ek_certificate(a.ek_certificate(EK_KEY), folder(b, *crowd), now=NOW)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", [b"", b"\0", b"\xff" * 500, bytes(2000)])
def test_padding_of_an_nv_index_is_cut_off(filler: bytes) -> None:
    assert without_padding(DER + filler) == DER


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_what_is_no_certificate_is_left_or_shortened(data: bytes) -> None:
    assert data.startswith(without_padding(data))


def test_larger_than_sixteen_kibibytes_is_refused_unread() -> None:
    with pytest.raises(EnrolmentRefused, match="larger than 16 KiB"):
        verify_ek_certificate(bytes(CERTIFICATE_LIMIT_BYTES + 1), FOLDER, now=NOW)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | changed_bytes(DER))
def test_fuzz_a_changed_certificate_is_never_accepted(der: bytes) -> None:
    verified = value_or_ours(lambda data: verify_ek_certificate(data, FOLDER, now=NOW), der)
    assert (verified is not None) == (der == DER)


@settings(max_examples=300, deadline=None)
@given(
    changed_bytes(ROOT.certificate.public_bytes(Encoding.DER)),
    changed_bytes(LINK.certificate.public_bytes(Encoding.DER)),
)
def test_fuzz_changed_authorities(root: bytes, link: bytes) -> None:
    def run(_: bytes) -> object:
        parsed = []
        for der in (root, link):
            try:
                parsed.append(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
            except ValueError:
                return None
        return verify_ek_certificate(DER, parse_ca_certificates(parsed), now=NOW)

    verified = value_or_ours(run, b"")
    assert verified is None or verified.public_key == EK_KEY.public_key()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | changed_bytes((LINK.pem + ROOT.pem).encode()))
def test_fuzz_folder(data: bytes) -> None:
    found = value_or_ours(lambda pem: parse_ca_certificates([pem]), data)
    assert found is None or found.roots


# --- authorities' certificates that the TPM holds ---------------------------------------------------------------------


def test_links_from_the_tpm_complete_a_chain_and_are_no_roots() -> None:
    upper, own = t.Authority("upper", ROOT), t.Authority("own root")
    lower = t.Authority("lower", upper)
    der, links = lower.ek_certificate(EK_KEY), [der_of(each.certificate) for each in (lower, upper)]
    verify_ek_certificate(der, folder(ROOT), now=NOW, links=links)
    verify_ek_certificate(der, folder(ROOT), now=NOW, links=[*links, der_of(ROOT.certificate)])
    for few in ([], links[:1], links[1:]):
        with pytest.raises(EnrolmentRefused, match="does not chain"):
            verify_ek_certificate(der, folder(ROOT), now=NOW, links=few)
    forged = own.ek_certificate(EK_KEY)
    for more in ([der_of(own.certificate)], [der_of(t.Authority("root", key=own.key).certificate)]):
        with pytest.raises(EnrolmentRefused, match="does not chain"):
            verify_ek_certificate(forged, folder(ROOT), now=NOW, links=more)
    with pytest.raises(EnrolmentRefused, match="malformed"):
        verify_ek_certificate(der, folder(ROOT), now=NOW, links=[b"\x30\x82", *links])


@pytest.mark.parametrize("filler", [b"", b"\xff" * 90, bytes(900)])
def test_certificates_one_behind_the_other(filler: bytes) -> None:
    ders = [der_of(each.certificate) for each in (ROOT, LINK)]
    assert split_certificates(b"".join(ders) + filler) == tuple(ders)
    assert split_certificates(filler) == ()
    assert len(split_certificates(ders[0] * 20)) == 8


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | changed_bytes(DER * 2))
def test_fuzz_certificates_one_behind_the_other(data: bytes) -> None:
    found = split_certificates(data)
    assert data.startswith(b"".join(found))
    value_or_ours(lambda _: verify_ek_certificate(DER, FOLDER, now=NOW, links=found), data)
