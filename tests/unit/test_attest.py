"""attestation.attest: the three kinds of what a TPM signs, their signature, and fuzz."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.attest import parse_attest, pcr_digest, verify_attest, verify_attest_signature
from oci_hook.errors import EnrolmentRefused, EvidenceRefused
from tests.attestation_vectors import changed_bytes, public_of, t, value_or_ours

KEY = t.p256()
AK = t.ecc_public(KEY, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
SRK = t.ecc_public(t.p256(), t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)
PCRS = {4: b"\x04" * 32, 8: b"\x08" * 32, 9: b"\x09" * 32}
EXTRA = hashlib.sha256(b"occasion").digest()
COUNTER_NAME = t.nv_name(t.nv_public(0x01800001))


def made(kind: int, attested: bytes, **changes) -> bytes:
    return t.attest(kind, attested, **{"signer": t.qualified_name(AK), "extra_data": EXTRA, **changes})


QUOTE = made(t.ST_QUOTE, t.quote_info(PCRS))
CERTIFY = made(t.ST_CERTIFY, t.certify_info(SRK))
NV = made(t.ST_NV, t.nv_certify_info(COUNTER_NAME, bytes(7) + b"\x2a"))


def parse(data: bytes):
    return parse_attest(data, error=EvidenceRefused)


def test_quote() -> None:
    attest = parse(QUOTE)
    assert (attest.kind, attest.extra_data, attest.qualified_signer) == ("quote", EXTRA, t.qualified_name(AK))
    assert (attest.clock, attest.reset_count, attest.restart_count, attest.safe) == (123_456, 7, 2, True)
    assert attest.quote is not None
    assert attest.quote.selections == ((0x0B, (4, 8, 9)),)
    assert attest.quote.digest == hashlib.sha256(b"\x04" * 32 + b"\x08" * 32 + b"\x09" * 32).digest()
    assert (attest.certified_name, attest.nv_index_name, attest.nv_contents) == (None, None, None)


def test_certification() -> None:
    attest = parse(CERTIFY)
    assert (attest.kind, attest.certified_name) == ("certify", t.object_name(SRK))
    assert (attest.quote, attest.nv_index_name) == (None, None)


def test_nv_certification() -> None:
    attest = parse(NV)
    assert (attest.kind, attest.nv_index_name, attest.nv_offset) == ("nv", COUNTER_NAME, 0)
    assert attest.nv_contents == bytes(7) + b"\x2a"
    assert (attest.quote, attest.certified_name) == (None, None)


def test_selections_of_any_size_are_read_in_the_order_of_bits() -> None:
    banks = t.selections(t.selection((0, 23)), t.selection((31,), t.SHA1, 4), t.selection((), t.SHA384, 0))
    quote = parse(made(t.ST_QUOTE, t.quote_info(PCRS, banks))).quote
    assert quote is not None
    assert quote.selections == ((0x0B, (0, 23)), (0x04, (31,)), (0x0C, ()))


def test_pcr_digest_is_in_the_order_of_numbers() -> None:
    assert pcr_digest({9: b"b", 4: b"a", 11: b"c"}) == hashlib.sha256(b"abc").digest()
    assert pcr_digest({}) == hashlib.sha256().digest()


@pytest.mark.parametrize("number", sorted(set(range(0x8000, 0x8030)) - {t.ST_QUOTE, t.ST_CERTIFY, t.ST_NV}))
def test_other_types_are_refused(number: int) -> None:
    with pytest.raises(EvidenceRefused, match="neither a quote nor a certification"):
        parse(made(number, t.quote_info(PCRS)))


@pytest.mark.parametrize("data", [QUOTE, CERTIFY, NV])
def test_every_truncation_and_what_follows_the_end_is_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(EvidenceRefused, match="ends too early"):
            parse(data[:size])
    with pytest.raises(EvidenceRefused, match="after its end"):
        parse(data + b"\0")


# --- verification -----------------------------------------------------------------------------------------------------


def verify(attest: bytes, kind, **changes):
    base = {"ak": public_of(AK), "extra_data": EXTRA, "error": EnrolmentRefused}
    return verify_attest(attest, t.signed(KEY, attest), kind=kind, **{**base, **changes})


@pytest.mark.parametrize(("kind", "data"), [("quote", QUOTE), ("certify", CERTIFY), ("nv", NV)])
def test_each_kind_is_accepted_as_itself_alone(kind: str, data: bytes) -> None:
    assert verify(data, kind) == parse(data)
    for other in {"quote", "certify", "nv"} - {kind}:
        with pytest.raises(EnrolmentRefused, match=f"is of the kind {kind}, not {other}"):
            verify(data, other)


def test_checks_in_their_order() -> None:
    other = public_of(t.ecc_public(t.p256(), t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256))
    with pytest.raises(EnrolmentRefused, match="is not by the enrolled attestation key"):
        verify(QUOTE, "quote", ak=other)
    with pytest.raises(EnrolmentRefused, match="another occasion"):
        verify(QUOTE, "quote", extra_data=bytes(32))
    with pytest.raises(EnrolmentRefused, match="names another key"):
        verify(made(t.ST_QUOTE, t.quote_info(PCRS), signer=t.qualified_name(AK, t.OWNER_HIERARCHY)), "quote")


def test_the_key_must_be_on_p256() -> None:
    rsa_ak = public_of(t.rsa_public(rsa.generate_private_key(65537, 2048), t.AK_ATTRIBUTES))
    with pytest.raises(EvidenceRefused, match="not on P-256"):
        verify_attest_signature(QUOTE, t.signed(KEY, QUOTE), rsa_ak, error=EvidenceRefused)


def test_short_numbers_of_a_signature_are_accepted_as_tpms_write_them() -> None:
    data, shortened = QUOTE, None
    while shortened is None:  # one signature of 128 has an r or s with a leading zero byte
        signature = t.signed(KEY, data)
        r, s = signature[6:38], signature[40:72]
        if r[0] == 0 or s[0] == 0:
            shortened = signature[:4] + t.tpm2b(r.lstrip(b"\0")) + t.tpm2b(s.lstrip(b"\0"))
    assert len(shortened) < 72
    verify_attest_signature(data, shortened, public_of(AK), error=EvidenceRefused)
    with pytest.raises(EvidenceRefused):
        verify_attest_signature(data + b"\0", shortened, public_of(AK), error=EvidenceRefused)


# --- fuzz -------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([QUOTE, CERTIFY, NV]).flatmap(changed_bytes))
def test_fuzz_attest(data: bytes) -> None:
    attest = value_or_ours(parse, data)
    if attest is not None:
        assert data[:4] == b"\xffTCG"
        given_parts = (attest.quote is not None, attest.certified_name is not None, attest.nv_contents is not None)
        assert given_parts == (attest.kind == "quote", attest.kind == "certify", attest.kind == "nv")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | changed_bytes(t.signed(KEY, QUOTE)))
def test_fuzz_signature(data: bytes) -> None:
    def run(signature: bytes) -> bool:
        verify_attest_signature(QUOTE + b"\1", signature, public_of(AK), error=EvidenceRefused)
        return True

    assert value_or_ours(run, data) is None
