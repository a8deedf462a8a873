"""The vectors of tests/vectors/attestation for the unit tests: as stored, as freshly made, and how each is run.

Also the strategies with which the attestation tests change good bytes and good documents.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from oci_hook import errors
from oci_hook.attestation.appraisal import AttestationResult, appraise_evidence
from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.ek_chain import parse_ca_certificates
from oci_hook.attestation.enrolment import verify_answer, verify_request
from oci_hook.attestation.enrolment_documents import Pending, Verifier, parse_answer, parse_request
from oci_hook.attestation.measurement import parse_evidence
from oci_hook.attestation.structures import Public, parse_public
from oci_hook.documents import Fields, canonical, decode_base64url
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, SczError
from oci_hook.trust import Owner, parse_owner

Vector = dict[str, Any]

FOLDER = Path(__file__).parent / "vectors" / "attestation"
STORED: dict[str, Vector] = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attestation_vectors_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
t = GENERATOR.t


@cache
def builder() -> Any:
    """One set of fresh keys for all tests."""
    return GENERATOR.Builder()


@cache
def fresh() -> dict[str, Vector]:
    """Every vector, made anew."""
    return {vector["name"]: vector for vector in builder().vectors()}


def names(area: str) -> list[str]:
    """The names of an area's stored vectors."""
    return [name for name, vector in STORED.items() if vector["area"] == area]


def public(data: str) -> Public:
    """A TPM2B_PUBLIC in base64url."""
    return parse_public(unb64(data), what="a vector's key", error=DeviceInvalid)


def public_of(raw: bytes) -> Public:
    """A TPMT_PUBLIC."""
    return parse_public(t.tpm2b(raw), what="a test's key", error=DeviceInvalid)


def unb64(text: str) -> bytes:
    return decode_base64url(text, what="a vector", error=DeviceInvalid)


def owner_of(vector: Vector) -> Owner:
    return parse_owner(canonical(vector["owner"]))


def moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


# --- running ----------------------------------------------------------------------------------------------------------


def run_boot_policy(vector: Vector) -> BootPolicy:
    """Parse and verify."""
    unverified = parse_boot_policy(vector["document"].encode())
    return verify_boot_policy(
        unverified, owner=owner_of(vector), model_name=vector["model"], device_class=vector["class"]
    )


def run_appraisal(vector: Vector) -> AttestationResult:
    """Parse evidence and boot policy, and appraise."""
    document = vector["boot_policy"]
    boot_policy = verify_boot_policy(
        parse_boot_policy(canonical(document)),
        owner=owner_of(vector),
        model_name=document["model"],
        device_class=document["class"],
    )
    return appraise_evidence(
        parse_evidence(Fields(vector["evidence"], what="evidence", error=DeviceInvalid)),
        ak=public(vector["ak_public"]),
        expected_extra_data=bytes.fromhex(vector["extra_data"]),
        boot_policy=boot_policy,
    )


def pending_of(vector: Vector) -> Pending:
    """What the owner keeps, by the specification's formulas, not by the code under test."""
    request, secret = vector["request"].encode(), bytes.fromhex(vector["secret"])
    digest = hashlib.sha256(request).digest()
    proof = hmac.digest(secret, b"scz-smm/enroll/v1 proof" + digest, "sha256")
    kinds = (b"srk", b"counter", b"quote")
    expected = [hashlib.sha256(b"scz-smm/enroll/v1 " + kind + b"\0" + secret + digest).digest() for kind in kinds]
    return Pending(parse_request(request), Verifier(hashlib.sha256(proof).digest(), *expected))


def run_request(vector: Vector) -> None:
    """The owner's side before the challenge: checks 1 to 5."""
    request = parse_request(vector["request"].encode())
    authorities = parse_ca_certificates([pem.encode() for pem in vector["authorities"]])
    verify_request(request, authorities=authorities, now=moment(vector["now"]))


def run_enrolment(vector: Vector) -> DeviceRecord:
    """The owner's side with the answer: all nine checks."""
    return verify_answer(
        pending_of(vector),
        parse_answer(vector["answer"].encode()),
        authorities=parse_ca_certificates([pem.encode() for pem in vector["authorities"]]),
        now=moment(vector["now"]),
        device_class=vector["device_class"],
    )


def refusal(vector: Vector, run: Callable[[Vector], object]) -> SczError:
    """The error that a vector is refused with, which is of the expected class and fit for one line."""
    expected = getattr(errors, vector["expected"])
    with pytest.raises(SczError) as raised:
        run(vector)
    assert type(raised.value) is expected, raised.value.message
    assert raised.value.message.isprintable()
    return raised.value


def check_enrolment(vector: Vector) -> None:
    """Run both halves of an enrolment's vector."""
    if vector["expected"] == "accepted":
        run_request(vector)
        assert run_enrolment(vector).counter_value in (5, (1 << 63) - 1)
        return
    message = refusal(vector, run_enrolment).message
    check = vector["check"]
    if check is None:
        assert "enrolment check" not in message
        return
    assert message.startswith(f"enrolment check {check}: ")
    if check <= 5:
        with pytest.raises(EnrolmentRefused) as raised:
            run_request(vector)
        assert raised.value.message == message
    else:
        run_request(vector)  # nothing else is wrong with it


# --- fuzz -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes with a few places overwritten, cut out or stuffed."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["overwrite", "cut", "insert", "truncate"]))
        piece = draw(st.binary(min_size=1, max_size=6))
        if kind == "overwrite":
            data[start : start + len(piece)] = piece
        elif kind == "cut":
            del data[start : start + len(piece)]
        elif kind == "insert":
            data[start:start] = piece
        else:
            del data[start:]
    return bytes(data)


def _places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


@st.composite
def changed_document(draw: st.DrawFn, good: bytes) -> bytes:
    """A good JSON document with one value replaced, removed or added, or a string of it changed."""
    document: Any = json.loads(good)
    path = draw(st.sampled_from([place for place in _places(document) if place]))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    kind = draw(st.sampled_from(["replace", "remove", "add", "change"]))
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=4))] = draw(JSON)
    elif kind == "change" and isinstance(parent[path[-1]], str):
        text = draw(changed_bytes(parent[path[-1]].encode()))
        parent[path[-1]] = text.decode("utf-8", "replace")
    else:
        parent[path[-1]] = draw(JSON)
    return json.dumps(document).encode()


def hostile(good: bytes) -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, and good ones that were changed."""
    return st.binary(max_size=200) | changed_bytes(good) | changed_document(good)


def value_or_ours(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """What `parse` makes of it, or None for a refusal of ours; anything else comes through and fails the test."""
    try:
        return parse(data)
    except SczError as error:
        if not error.message.isprintable():
            raise
        return None
