"""attestation.evidence: what ties a quote to one start, and the six checks of a quote."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.evidence import Evidence, qualifying_data, verify_quote
from oci_hook.errors import EnrolmentRefused
from tests.attestation_vectors import public_of, t

KEY = t.p256()
AK = t.ecc_public(KEY, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
EXTRA = hashlib.sha256(b"occasion").digest()
NONCE, TOKEN, HEAD = (bytes([number]) * 32 for number in (1, 2, 3))
CONTAINER, MANIFEST = "c0ffee", "sha256:" + "ab" * 32


def evidence(pcrs: dict[int, bytes], selected: bytes | None = None) -> Evidence:
    info = t.quote_info(pcrs, selected)
    attest = t.attest(t.ST_QUOTE, info, signer=t.qualified_name(AK), extra_data=EXTRA)
    return Evidence(attest, t.signed(KEY, attest), pcrs)


def verify(quoted: Evidence, *selections: frozenset[int]) -> None:
    verify_quote(quoted, ak=public_of(AK), extra_data=EXTRA, selections=selections, error=EnrolmentRefused)


def test_qualifying_data_is_the_specification_s() -> None:
    hashed = hashlib.sha256(CONTAINER.encode()).digest() + hashlib.sha256(MANIFEST.encode()).digest()
    expected = hashlib.sha256(b"scz-smm/evidence/v1" + NONCE + TOKEN + hashed + HEAD).digest()
    assert qualifying_data(NONCE, TOKEN, CONTAINER, MANIFEST, HEAD) == expected


def test_every_part_of_the_qualifying_data_counts() -> None:
    parts = (NONCE, TOKEN, CONTAINER, MANIFEST, HEAD)
    made = {qualifying_data(*parts), qualifying_data(TOKEN, NONCE, *parts[2:])}
    made |= {qualifying_data(NONCE, TOKEN, MANIFEST, CONTAINER, HEAD), qualifying_data(HEAD, TOKEN, *parts[2:4], NONCE)}
    for place, part in enumerate(parts):
        other = bytes(32) if isinstance(part, bytes) else part + "0"
        made.add(qualifying_data(*parts[:place], other, *parts[place + 1 :]))
    assert len(made) == 4 + len(parts)


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_part_of_another_length_is_our_fault(place: int, size: int) -> None:
    parts = [NONCE, TOKEN, CONTAINER, MANIFEST, HEAD]
    parts[place] = bytes(size)
    with pytest.raises(ValueError):
        qualifying_data(*parts)  # type: ignore[arg-type]


def test_digest_covers_attest_and_signature_and_their_border() -> None:
    one = Evidence(b"ab", b"c", {})
    assert one.digest == hashlib.sha256(b"\0\0\0\2abc").digest()
    assert one.digest != Evidence(b"a", b"bc", {}).digest
    assert one.digest == Evidence(b"ab", b"c", {4: bytes(32)}).digest


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 23), min_size=1), st.sets(st.integers(0, 23), min_size=1))
def test_only_the_selection_that_was_asked_for_is_accepted(quoted: set[int], asked: set[int]) -> None:
    made = evidence({pcr: bytes([pcr + 1]) * 32 for pcr in sorted(quoted)})
    verify(made, frozenset(quoted))
    verify(made, frozenset(asked), frozenset(quoted))
    if quoted == asked:
        verify(made, frozenset(asked))
    else:
        with pytest.raises(EnrolmentRefused, match="selects other PCRs"):
            verify(made, frozenset(asked))


def test_nothing_was_asked_for() -> None:
    with pytest.raises(EnrolmentRefused, match="selects other PCRs"):
        verify(evidence({4: bytes(32)}))


@pytest.mark.parametrize("pcr", [4, 8, 9])
@pytest.mark.parametrize("bit", [0, 255])
def test_a_changed_value_is_refused(pcr: int, bit: int) -> None:
    values = {number: bytes([number]) * 32 for number in (4, 8, 9)}
    made = evidence(values)
    changed = (int.from_bytes(values[pcr], "big") ^ 1 << bit).to_bytes(32, "big")
    with pytest.raises(EnrolmentRefused, match=r"not those that the TPM quoted \(digest\)"):
        verify(Evidence(made.attest, made.signature, {**values, pcr: changed}), frozenset(values))


def test_values_of_other_lengths_cannot_be_shifted_past_the_parsers() -> None:
    """The digest alone does not tell where a value ends: parsers allow 32 bytes only, which this relies on."""
    values = {4: b"a" * 32, 8: b"b" * 32}
    shifted = {4: b"a" * 32 + b"b", 8: b"b" * 31}
    assert pcr_digest(values) == pcr_digest(shifted)
