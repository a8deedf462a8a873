"""attestation.appraisal: its vectors, stored and fresh; messages name PCRs in words; nobody else makes a result."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given, settings

from oci_hook.attestation.appraisal import AttestationResult, differing_pcrs, nearest_form, pcrs_in_words
from oci_hook.documents import encode_base64url
from oci_hook.errors import DeviceInvalid, EvidenceRefused
from tests.attestation_vectors import (
    STORED,
    Vector,
    changed_bytes,
    fresh,
    names,
    refusal,
    run_appraisal,
    run_boot_policy,
    unb64,
)

NAMES = names("appraisal")
GOOD = STORED["appraisal-good"]

# What the message of each numbered check says; the first is made of several.
SAYS = {
    1: "the attestation structure",
    2: "the attestation's signature",
    3: "(extraData)",
    4: "(qualifiedSigner)",
    5: "select",
    6: "(digest)",
    7: "not as in the nearest approved boot state: ",
}


def check(vector: Vector) -> None:
    if vector["expected"] == "accepted":
        result, evidence = run_appraisal(vector), vector["evidence"]
        assert {str(pcr): value.hex() for pcr, value in result.form.pcrs.items()} == evidence["pcrs"]
        attest, signature = unb64(evidence["attest"]), unb64(evidence["signature"])
        signed = hashlib.sha256(len(attest).to_bytes(4, "big") + attest + signature).digest()
        assert result.evidence_digest == signed
        return
    message = refusal(vector, run_appraisal).message
    if vector["check"] is not None:
        assert SAYS[vector["check"]] in message
    for words in vector["words"]:
        assert words in message


@pytest.mark.parametrize("name", NAMES)
def test_stored_vector(name: str) -> None:
    assert STORED[name]["name"] == name
    check(STORED[name])


def test_fresh_vectors_are_the_stored_ones_and_do_the_same() -> None:
    made = {name: vector for name, vector in fresh().items() if vector["area"] == "appraisal"}
    assert made.keys() == set(NAMES)
    for name, vector in made.items():
        outline = [(one["expected"], one["check"], one["description"]) for one in (vector, STORED[name])]
        assert outline[0] == outline[1]
        check(vector)


@pytest.mark.parametrize("number", range(1, 8))
def test_every_check_has_vectors(number: int) -> None:
    assert sum(STORED[name]["check"] == number for name in NAMES) >= 4


# --- the operator's words ---------------------------------------------------------------------------------------------


def test_message_names_only_the_pcrs_that_differ() -> None:
    message = refusal(STORED["appraisal-state-other-kernel"], run_appraisal).message
    assert message == ("not as in the nearest approved boot state: PCR 9 (kernel and initrd, as GRUB read them)")


def test_values_are_not_in_the_message() -> None:
    vector = STORED["appraisal-state-nothing"]
    message = refusal(vector, run_appraisal).message
    assert not any(value in message for value in vector["evidence"]["pcrs"].values())


@pytest.mark.parametrize("pcr", range(24))
def test_every_pcr_has_words(pcr: int) -> None:
    words = pcrs_in_words((pcr,))
    assert words.startswith(f"PCR {pcr} (")
    assert ("not assigned" in words) == (pcr > 15)


def test_nearest_form_is_the_one_from_which_the_fewest_pcrs_differ() -> None:
    policy = run_boot_policy({**STORED["boot-policy-good-32-forms"]})
    for number in (0, 13, 31):
        form = policy.forms[number]
        values = {**form.pcrs, 9: bytes(32)}
        assert nearest_form(policy.forms, values) is form
        assert differing_pcrs(form, values) == (9,)
    assert nearest_form(policy.forms, {}) is policy.forms[0]
    assert differing_pcrs(policy.forms[0], {}) == (4, 7, 8, 9)


# --- the result -------------------------------------------------------------------------------------------------------


def test_nobody_else_makes_a_result() -> None:
    form = run_appraisal(GOOD).form
    for arguments in ((form, bytes(32)), (form, bytes(32), None), (form, bytes(32), object()), (form, bytes(32), True)):
        with pytest.raises(RuntimeError, match="only appraise_evidence"):
            AttestationResult(*arguments)


def test_a_result_cannot_be_changed_or_copied_with_changes() -> None:
    result = run_appraisal(GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.evidence_digest = bytes(32)  # type: ignore[misc]
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        dataclasses.replace(result, evidence_digest=bytes(32))
    with pytest.raises(TypeError):
        result.form.pcrs[9] = bytes(32)  # type: ignore[index]


# --- fuzz -------------------------------------------------------------------------------------------------------------

ATTEST, SIGNATURE = unb64(GOOD["evidence"]["attest"]), unb64(GOOD["evidence"]["signature"])


def evidence_refused(attest: bytes, signature: bytes) -> bool:
    """Whether evidence is refused as malformed or false; anything else comes through."""
    parts = {"attest": encode_base64url(attest), "signature": encode_base64url(signature)}
    try:
        run_appraisal({**GOOD, "evidence": {**GOOD["evidence"], **parts}})
    except (DeviceInvalid, EvidenceRefused):  # the first: no bytes at all
        return True
    return False


@settings(max_examples=250, deadline=None)
@given(changed_bytes(ATTEST))
def test_fuzz_a_changed_attest_is_never_accepted(attest: bytes) -> None:
    assert evidence_refused(attest, SIGNATURE) == (attest != ATTEST)


@settings(max_examples=250, deadline=None)
@given(changed_bytes(SIGNATURE))
def test_fuzz_a_changed_signature_is_never_accepted(signature: bytes) -> None:
    assert evidence_refused(ATTEST, signature) == (signature != SIGNATURE)
