"""attestation.enrolment: its vectors, stored and fresh; the challenge; what a record holds; fuzz of the documents."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.device_record import format_device_record, parse_device_record
from oci_hook.attestation.ek_chain import parse_ca_certificates
from oci_hook.attestation.enrolment import (
    enrolment_qualifying_data,
    make_challenge,
    proof,
    verify_answer,
    verify_request,
)
from oci_hook.attestation.enrolment_documents import (
    format_answer,
    format_challenge,
    format_pending,
    format_request,
    parse_answer,
    parse_challenge,
    parse_pending,
    parse_request,
)
from oci_hook.attestation.structures import Public
from oci_hook.documents import canonical
from oci_hook.errors import DeviceInvalid, EnrolmentRefused
from tests.attestation_vectors import (
    STORED,
    Vector,
    check_enrolment,
    fresh,
    hostile,
    moment,
    names,
    pending_of,
    run_enrolment,
    value_or_ours,
)

NAMES = names("enrolment")
GOOD = STORED["enrolment-good"]
CHALLENGE = canonical(
    {
        "schema": "scz-smm/enroll-challenge/v1",
        "device": "edge-1",
        "owner": "A" * 43,
        "id_object": "AAEC",
        "encrypted_secret": "AwQF",
    }
)


@pytest.mark.parametrize("name", NAMES)
def test_stored_vector(name: str) -> None:
    assert STORED[name]["name"] == name
    check_enrolment(STORED[name])


def test_fresh_vectors_are_the_stored_ones_and_do_the_same() -> None:
    made = {name: vector for name, vector in fresh().items() if vector["area"] == "enrolment"}
    assert made.keys() == set(NAMES)
    for name, vector in made.items():
        outline = [(one["expected"], one["check"], one["description"]) for one in (vector, STORED[name])]
        assert outline[0] == outline[1]
        check_enrolment(vector)


@pytest.mark.parametrize("check", range(1, 10))
def test_every_check_has_vectors(check: int) -> None:
    assert sum(STORED[name]["check"] == check for name in NAMES) >= 4


def test_every_vector_that_is_refused_differs_from_the_good_one() -> None:
    for name in NAMES:
        vector = STORED[name]
        if vector["expected"] != "accepted":
            changed = [key for key in ("request", "answer", "authorities") if vector[key] != GOOD[key]]
            assert changed, name


# --- the challenge ----------------------------------------------------------------------------------------------------


def verified_of(vector: Vector):
    return verify_request(
        parse_request(vector["request"].encode()),
        authorities=parse_ca_certificates([pem.encode() for pem in vector["authorities"]]),
        now=moment(vector["now"]),
    )


def test_challenge_is_for_the_ek_and_the_ak_s_name_and_keeps_no_secret() -> None:
    verified, secret, asked = verified_of(GOOD), bytes.fromhex(GOOD["secret"]), []

    def make_credential(ek: Public, given: bytes, ak_name: bytes) -> tuple[bytes, bytes]:
        asked.append((ek, given, ak_name))
        return b"id object", b"encrypted secret"

    document, pending = make_challenge(verified, secret=secret, make_credential=make_credential)
    assert asked == [(verified.request.ek, secret, verified.request.ak.name)]
    challenge = parse_challenge(document)
    assert (challenge.id_object, challenge.encrypted_secret) == (b"id object", b"encrypted secret")
    assert (challenge.device, challenge.owner_id) == (verified.request.device, verified.request.owner_id)
    assert pending == pending_of(GOOD)
    kept = format_pending(pending)
    assert parse_pending(kept) == pending
    for hidden in (secret, proof(secret, verified.request.digest)):
        assert hidden.hex().encode() not in kept
        assert hidden.hex().encode() not in document


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_secret_of_another_length_is_our_fault(size: int) -> None:
    with pytest.raises(ValueError):
        make_challenge(verified_of(GOOD), secret=bytes(size), make_credential=lambda ek, secret, name: (b"", b""))


def test_each_kind_of_qualifying_data_is_another() -> None:
    digest = hashlib.sha256(b"request").digest()
    made = {kind: enrolment_qualifying_data(kind, bytes(32), digest) for kind in ("srk", "counter", "quote")}
    assert len(set(made.values())) == 3
    assert made["srk"] == hashlib.sha256(b"scz-smm/enroll/v1 srk\0" + bytes(32) + digest).digest()


def test_a_request_changed_after_the_challenge_is_refused_by_the_proof() -> None:
    respelled = " " + GOOD["request"]  # the same document, other bytes
    with pytest.raises(EnrolmentRefused, match="enrolment check 6"):
        run_enrolment({**GOOD, "request": respelled})


def test_a_certificate_that_expired_meanwhile_is_refused_with_the_answer() -> None:
    with pytest.raises(EnrolmentRefused, match="enrolment check 1: the EK certificate is not in its dates"):
        run_enrolment({**GOOD, "now": GOOD["now"] + 20 * 365 * 86_400})


def test_a_root_taken_out_meanwhile_is_refused_with_the_answer() -> None:
    with pytest.raises(EnrolmentRefused, match="enrolment check 1"):
        run_enrolment({**GOOD, "authorities": STORED["enrolment-chain-unknown-root"]["authorities"]})


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if STORED[name]["expected"] == "accepted"])
def test_record_holds_what_was_verified(name: str) -> None:
    vector = STORED[name]
    record, request = run_enrolment(vector), parse_request(vector["request"].encode())
    assert (record.ak, record.srk, record.counter) == (request.ak, request.srk, request.counter)
    assert record.ek_sha256 == hashlib.sha256(request.ek_certificate).hexdigest()
    assert record.ek_subject
    assert (record.enrolled, record.device_class) == (vector["now"], vector["device_class"])
    assert record.pcrs == parse_answer(vector["answer"].encode()).quote.pcrs
    assert parse_device_record(format_device_record(record)) == record


def test_subject_is_the_tpm_s_model_if_the_certificate_has_none() -> None:
    assert "2.23.133.2.1=id:53435A00" in run_enrolment(GOOD).ek_subject
    assert run_enrolment(STORED["enrolment-good-under-root"]).ek_subject == "CN=EK of a TPM"


def test_documents_are_written_as_they_are_read() -> None:
    request = parse_request(GOOD["request"].encode())
    fields = ("device", "owner_id", "ek_certificate", "ek", "ak", "srk", "counter")
    assert format_request(**{name: getattr(request, name) for name in fields}) == GOOD["request"].encode()
    answer = parse_answer(GOOD["answer"].encode())
    assert format_answer(answer) == GOOD["answer"].encode()
    challenge = parse_challenge(CHALLENGE)
    named = dataclasses.replace(request, device=challenge.device, owner_id=challenge.owner_id)
    assert format_challenge(named, challenge.id_object, challenge.encrypted_secret) == CHALLENGE


def test_a_document_is_not_taken_for_another() -> None:
    documents = {
        parse_request: GOOD["request"].encode(),
        parse_answer: GOOD["answer"].encode(),
        parse_challenge: CHALLENGE,
        parse_pending: format_pending(pending_of(GOOD)),
        parse_device_record: format_device_record(run_enrolment(GOOD)),
    }
    for parse in documents:
        for origin, data in documents.items():
            if origin is parse:
                parse(data)
            else:
                with pytest.raises(DeviceInvalid):
                    parse(data)


@pytest.mark.parametrize("parse", [parse_request, parse_answer, parse_challenge])
def test_a_document_above_one_mebibyte_is_refused_unread(parse) -> None:
    with pytest.raises(DeviceInvalid, match="larger than 1048576 bytes"):
        parse(b" " * (1 << 20) + b"{}")


# --- fuzz -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(hostile(GOOD["request"].encode()))
def test_fuzz_request(data: bytes) -> None:
    request = value_or_ours(parse_request, data)
    if request is not None:
        assert request.digest == hashlib.sha256(data).digest()


@settings(max_examples=150, deadline=None)
@given(hostile(GOOD["request"].encode()))
def test_fuzz_verification_of_a_request(data: bytes) -> None:
    vector = {**GOOD, "request": data.decode("utf-8", "replace")}
    verified = value_or_ours(lambda _: verified_of(vector), data)
    if verified is not None:
        good = parse_request(GOOD["request"].encode())
        assert verified.request.ek_certificate == good.ek_certificate


@settings(max_examples=150, deadline=None)
@given(hostile(GOOD["answer"].encode()))
def test_fuzz_answer(data: bytes) -> None:
    answer = value_or_ours(parse_answer, data)
    pending = pending_of(GOOD)
    if answer is not None:
        authorities = parse_ca_certificates([pem.encode() for pem in GOOD["authorities"]])
        record = value_or_ours(
            lambda _: verify_answer(
                pending, answer, authorities=authorities, now=moment(GOOD["now"]), device_class="default"
            ),
            data,
        )
        if record is not None:
            signed = parse_answer(GOOD["answer"].encode())
            assert answer.srk_certify.attest == signed.srk_certify.attest
            assert answer.quote.pcrs == signed.quote.pcrs


@settings(max_examples=60, deadline=None)
@given(hostile(CHALLENGE))
def test_fuzz_challenge(data: bytes) -> None:
    challenge = value_or_ours(parse_challenge, data)
    assert challenge is None or 0 < len(challenge.id_object) <= 4096


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz_pending_and_record(data: st.DataObject) -> None:
    pending = value_or_ours(parse_pending, data.draw(hostile(format_pending(pending_of(GOOD)))))
    assert pending is None or len(pending.verifier.quote) == 32
    record = value_or_ours(parse_device_record, data.draw(hostile(format_device_record(run_enrolment(GOOD)))))
    assert record is None or json.loads(format_device_record(record))["device"] == record.device
