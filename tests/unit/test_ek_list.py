"""attestation.ek_list and what an enrolment makes of it: lines that are a list and lines that are none; checks 1, 2."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.device_record import format_device_record, parse_device_record
from oci_hook.attestation.ek_chain import parse_ca_certificates
from oci_hook.attestation.ek_list import (
    ENTRY_LIMIT,
    LIST_LIMIT_BYTES,
    EkList,
    ek_digest,
    parse_ek_list,
    verify_listed,
)
from oci_hook.attestation.enrolment import verify_answer, verify_request
from oci_hook.attestation.enrolment_documents import format_request, parse_answer, parse_request
from oci_hook.documents import canonical
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, KeyInvalid
from tests.attestation_vectors import (
    STORED,
    changed_bytes,
    moment,
    pending_of,
    public_of,
    run_enrolment,
    t,
    value_or_ours,
)

A, B = "a" * 64, "b" * 64
GOOD = STORED["enrolment-good"]
GOOD_LIST = f"# two\n{A} edge-1\n\n{B}\tedge-2  # in the shop\r\n".encode()


def test_a_list_says_who_is_who() -> None:
    assert parse_ek_list(GOOD_LIST) == EkList({A: "edge-1", B: "edge-2"})
    assert parse_ek_list(f"{A}  edge-1".encode()) == EkList({A: "edge-1"})  # as sha256sum writes it, without an end


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"# nobody\n\n", "empty"),
        (f"{A}".encode(), "line 1"),
        (f"{A} ".encode(), "line 1"),
        (f"{A[1:]} edge-1".encode(), "line 1"),
        (f"{A}a edge-1".encode(), "line 1"),
        (f"{A.upper()} edge-1".encode(), "line 1"),
        (f"{A} Edge 1".encode(), "line 1"),
        (f"{A} ../edge-1".encode(), "line 1"),
        (f"{A} edge-1 more".encode(), "line 1"),
        (f"{A} {'e' * 200}".encode(), "line 1"),
        (f"edge-1 {A}".encode(), "line 1"),
        (f"{A} edge-1\n{A} edge-2".encode(), "line 2: the EK of edge-1 again"),
        (f"{A} edge-1\n{A} edge-1".encode(), "line 2"),
        (f"{A} edge-1\n{B} edge-1".encode(), "line 2: edge-1 has an EK already"),
        (f"{A} edgé".encode(), "not ASCII"),
        (f"{A} edge-1".encode("utf-16"), "not ASCII"),
        (f"{A} edge-1\0".encode(), "line 1"),
        (f"{A} edge-1\x0b{B} edge-2".encode(), "line 1"),
        (b"#" * (LIST_LIMIT_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_what_is_no_list(data: bytes, word: str) -> None:
    with pytest.raises(KeyInvalid, match=word):
        parse_ek_list(data)


def test_a_list_is_bounded() -> None:
    lines = [f"{number:064x} e{number}\n" for number in range(ENTRY_LIMIT + 1)]
    assert len(parse_ek_list("".join(lines[:-1]).encode()).names) == ENTRY_LIMIT
    with pytest.raises(KeyInvalid, match="more than 10000"):
        parse_ek_list("".join(lines).encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | changed_bytes(GOOD_LIST))
def test_fuzz(data: bytes) -> None:
    found = value_or_ours(parse_ek_list, data)
    assert found is None or (found.names and len(set(found.names.values())) == len(found.names))


def test_the_hash_is_that_of_the_key_whatever_its_kind() -> None:
    key = rsa.generate_private_key(65537, 2048)
    ek = public_of(t.rsa_public(key, t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB))
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert ek_digest(ek) == hashlib.sha256(der).hexdigest()
    assert verify_listed(ek, "edge-1", EkList({ek_digest(ek): "edge-1"}), error=EnrolmentRefused) == ek_digest(ek)


def test_what_is_no_asymmetric_key_is_not_listed() -> None:
    request = parse_request(GOOD["request"].encode())
    none = dataclasses.replace(request.ek, public_key=None)
    with pytest.raises(DeviceInvalid, match="not an asymmetric key"):
        verify_listed(none, "edge-1", EkList({ek_digest(none): "edge-1"}), error=DeviceInvalid)


# --- in an enrolment --------------------------------------------------------------------------------------------------


def bare(vector=GOOD):
    """A vector's request without the certificate; everything in it that depends on the request's bytes is made anew."""
    document = json.loads(vector["request"])
    del document["ek_certificate"]
    return parse_request(canonical(document))


REQUEST = bare()
LISTED = EkList({ek_digest(REQUEST.ek): REQUEST.device})
ROOTS = parse_ca_certificates([pem.encode() for pem in GOOD["authorities"]])
NOW = moment(GOOD["now"])


def test_a_request_without_a_certificate_is_written_as_it_is_read() -> None:
    fields = ("device", "owner_id", "ek_certificate", "ek", "ak", "srk", "counter")
    assert REQUEST.ek_certificate is None
    assert format_request(**{name: getattr(REQUEST, name) for name in fields}) == REQUEST.document


def test_a_request_may_carry_the_authorities_that_its_tpm_holds() -> None:
    document = json.loads(GOOD["request"])
    for chain in ([], ["AAEC"] * 9, [""], ["!"], "AAEC", [1], [None], ["A" * 30_000]):
        with pytest.raises(DeviceInvalid):
            parse_request(canonical({**document, "ek_chain": chain}))
    request = parse_request(canonical({**document, "ek_chain": ["AAEC", "AwQF"]}))
    assert request.ek_chain == (b"\0\1\2", b"\3\4\5")
    fields = ("device", "owner_id", "ek_certificate", "ek", "ak", "srk", "counter", "ek_chain")
    assert format_request(**{name: getattr(request, name) for name in fields}) == request.document


def test_the_list_vouches_where_there_is_no_certificate() -> None:
    verified = verify_request(REQUEST, authorities=None, now=NOW, ek_list=LISTED)
    assert (verified.ek.vouched, verified.ek.sha256) == ("list", ek_digest(REQUEST.ek))
    assert verify_request(REQUEST, authorities=ROOTS, now=NOW, ek_list=LISTED) == verified


@pytest.mark.parametrize(
    ("request_", "authorities", "ek_list", "word"),
    [
        (REQUEST, ROOTS, None, "no list of EKs was given"),
        (REQUEST, None, None, "no list of EKs was given"),
        (REQUEST, ROOTS, EkList({A: "edge-1"}), "is not in the owner's list"),
        (REQUEST, ROOTS, EkList({ek_digest(REQUEST.ek): "edge-2"}), "as edge-2, not as 'edge-1'"),
        (parse_request(GOOD["request"].encode()), None, LISTED, "no folder of EK roots"),
        (bare(STORED["enrolment-good-rsa"]), ROOTS, LISTED, "is not in the owner's list"),
    ],
)
def test_nobody_vouches(request_, authorities, ek_list, word: str) -> None:
    with pytest.raises(EnrolmentRefused, match=f"enrolment check 1: .*{word}"):
        verify_request(request_, authorities=authorities, now=NOW, ek_list=ek_list)


def test_a_listed_certificate_s_chain_counts_all_the_same() -> None:
    request = parse_request(STORED["enrolment-chain-unknown-root"]["request"].encode())
    roots = parse_ca_certificates([pem.encode() for pem in STORED["enrolment-chain-unknown-root"]["authorities"]])
    with pytest.raises(EnrolmentRefused, match="enrolment check 1: the EK certificate does not chain"):
        verify_request(request, authorities=roots, now=NOW, ek_list=EkList({ek_digest(request.ek): request.device}))


def test_a_list_says_of_a_certified_tpm_whose_it_is() -> None:
    request = parse_request(GOOD["request"].encode())
    mine = ek_digest(request.ek)
    for names in ({A: "edge-2"}, {mine: "edge-1"}, {mine: "edge-1", A: "edge-2"}):
        assert verify_request(request, authorities=ROOTS, now=NOW, ek_list=EkList(names)).ek.vouched == "certificate"
    for names, word in (({mine: "edge-2"}, "as edge-2, not as"), ({A: "edge-1"}, "not the one")):
        with pytest.raises(EnrolmentRefused, match=f"enrolment check 1: .*{word}"):
            verify_request(request, authorities=ROOTS, now=NOW, ek_list=EkList(names))


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_other_checks_are_the_same(number: int) -> None:
    said = []
    for vector in STORED.values():
        if vector["area"] == "enrolment" and vector["check"] == number:
            request = bare(vector)
            ek_list = EkList({ek_digest(request.ek): request.device})
            with contextlib.suppress(EnrolmentRefused):
                verify_request(request, authorities=None, now=NOW, ek_list=ek_list)
                continue  # another key than the certificate's: there is none here
            with pytest.raises(EnrolmentRefused) as refused:
                verify_request(request, authorities=None, now=NOW, ek_list=ek_list)
            said.append(refused.value.message)
    assert len(said) >= 4
    assert [message for message in said if not message.startswith(f"enrolment check {number}: ")] == []


def test_records_say_who_vouched() -> None:
    certified = run_enrolment(GOOD)
    assert b"vouched" not in format_device_record(certified)  # as earlier versions read it
    by_list = dataclasses.replace(certified, vouched="list")
    data = format_device_record(by_list)
    assert parse_device_record(data) == by_list
    for wrong in ("certificate", "", "List", None, 1, ["list"]):
        with pytest.raises(DeviceInvalid):
            parse_device_record(canonical({**json.loads(data), "vouched": wrong}))


def test_an_answer_to_another_request_is_refused_by_the_proof() -> None:
    """The certificate was taken out of a request that was answered with it."""
    pending = dataclasses.replace(pending_of(GOOD), request=REQUEST)
    answer = dataclasses.replace(parse_answer(GOOD["answer"].encode()), proof=bytes(32))
    with pytest.raises(EnrolmentRefused, match="enrolment check 6"):
        verify_answer(pending, answer, authorities=None, now=NOW, device_class="default", ek_list=LISTED)
