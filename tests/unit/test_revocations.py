"""bundle.revocations and lease: what is signed is what is read; every changed byte, and every excess, is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.bundle.revocations import (
    LINES_LIMIT,
    REVOCATIONS_LIMIT_BYTES,
    REVOCATIONS_TYP,
    Revocations,
    parse_revocations,
    sign_revocations,
    verify_revocations,
)
from oci_hook.documents import Fields, canonical
from oci_hook.errors import GrantInvalid
from oci_hook.jws import sign_compact
from oci_hook.key_errors import RevocationsMissing
from oci_hook.lease import CLOCK_LIMIT, RESETS_LIMIT, Lease, parse_lease
from oci_hook.owner.keyring import Keyring, create_keyring, open_keyring
from tests.attestation_vectors import changed_bytes, changed_document, value_or_ours


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    folder: Path = tmp_path_factory.mktemp("owner") / "keys"
    create_keyring(folder, "acme", None)
    return open_keyring(folder, lambda: "")


def a_list(keyring: Keyring, **changes: Any) -> Revocations:
    made = Revocations(
        owner_id=keyring.owner.owner_id,
        device_name="edge-1",
        ak_name=b"\x00\x0b" + b"a" * 32,
        counter_index=0x01800123,
        counter_name=b"\x00\x0b" + b"c" * 32,
        value=4,
        created=1_767_225_600,
        lines=(("minilm", 3), ("whisper", 1)),
    )
    return replace(made, **changes)


def signed(keyring: Keyring, payload: object, typ: str = REVOCATIONS_TYP) -> bytes:
    return sign_compact(canonical(payload), typ=typ, kid=keyring.owner.owner_id, key=keyring.manifest_key)


def document(keyring: Keyring) -> dict[str, Any]:
    compact = sign_revocations(a_list(keyring), key=keyring.manifest_key)
    loaded: dict[str, Any] = json.loads(parse_revocations(compact).unverified_payload)
    return loaded


def verified(keyring: Keyring, compact: bytes) -> Revocations:
    return verify_revocations(parse_revocations(compact), owner=keyring.owner)


def test_what_is_signed_is_what_is_read(keyring: Keyring) -> None:
    made = a_list(keyring)
    assert verified(keyring, sign_revocations(made, key=keyring.manifest_key)) == made
    assert [made.lowest_generation(name) for name in ("minilm", "whisper", "other")] == [3, 1, 1]
    empty = a_list(keyring, lines=())
    assert verified(keyring, sign_revocations(empty, key=keyring.manifest_key)) == empty


def test_another_owner_s_list_is_refused(keyring: Keyring, tmp_path: Path) -> None:
    create_keyring(tmp_path / "keys", "stranger", None)
    stranger = open_keyring(tmp_path / "keys", lambda: "")
    foreign = sign_revocations(a_list(stranger, value=9), key=stranger.manifest_key)
    with pytest.raises(RevocationsMissing, match="not by acme"):
        verified(keyring, foreign)
    head, payload, signature = foreign.split(b".")
    mine = sign_revocations(a_list(keyring), key=keyring.manifest_key).split(b".")
    for mixed in ((mine[0], payload, signature), (mine[0], mine[1], signature), (mine[0], payload, mine[2])):
        with pytest.raises(RevocationsMissing):
            verified(keyring, b".".join(mixed))
    assert head != mine[0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_are_refused(keyring: Keyring, data: st.DataObject) -> None:
    made = a_list(keyring)
    good = sign_revocations(made, key=keyring.manifest_key)
    found = value_or_ours(lambda each: verified(keyring, each), data.draw(changed_bytes(good)))
    assert found in (None, made)


def test_every_bit_counts(keyring: Keyring) -> None:
    good = sign_revocations(a_list(keyring), key=keyring.manifest_key)
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1
        with pytest.raises(RevocationsMissing):
            verified(keyring, bytes(flipped))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_owner_signs_is_read_or_refused(keyring: Keyring, data: st.DataObject) -> None:
    payload = data.draw(changed_document(canonical(document(keyring))))
    compact = sign_compact(payload, typ=REVOCATIONS_TYP, kid=keyring.owner.owner_id, key=keyring.manifest_key)
    found = value_or_ours(lambda each: verified(keyring, each), compact)
    assert found is None or sign_revocations(found, key=keyring.manifest_key)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "scz-smm/revocations/v2"},
        {"extra": 1},
        {"lines": [{"model": "b", "lowest_generation": 1}, {"model": "a", "lowest_generation": 1}]},
        {"lines": [{"model": "a", "lowest_generation": 1}, {"model": "a", "lowest_generation": 2}]},
        {"lines": [{"model": "a", "lowest_generation": 0}]},
        {"lines": [{"model": "a", "lowest_generation": True}]},
        {"lines": [{"model": "../a", "lowest_generation": 1}]},
        {"lines": [{"model": "a", "lowest_generation": 1, "more": 1}]},
        {"lines": [{"model": f"m{n:05}", "lowest_generation": 1} for n in range(LINES_LIMIT + 1)]},
        {"counter": {"index": 1, "name": "000b" + "63" * 32, "value": 4}},
        {"counter": {"index": 0x01800123, "name": "000c" + "63" * 32, "value": 4}},
        {"counter": {"index": 0x01800123, "name": "000b" + "63" * 32, "value": -1}},
        {"counter": {"index": 0x01800123, "name": "000b" + "63" * 32, "value": 1 << 63}},
        {"device": {"name": "edge-1", "ak_name": "000b"}},
        {"created": -1},
    ],
)
def test_what_the_specification_forbids_is_refused_though_signed(keyring: Keyring, change: dict[str, Any]) -> None:
    with pytest.raises(RevocationsMissing):
        verified(keyring, signed(keyring, {**document(keyring), **change}))


def test_another_kind_of_document_by_the_same_key_is_refused(keyring: Keyring) -> None:
    for typ in ("scz-smm-grant+jwt", "scz-smm-manifest+jwt", "JWT"):
        with pytest.raises(RevocationsMissing):
            parse_revocations(signed(keyring, document(keyring), typ))
    with pytest.raises(RevocationsMissing, match="larger"):
        parse_revocations(b"a" * (REVOCATIONS_LIMIT_BYTES + 1))


def test_what_a_reader_would_refuse_is_not_signed(keyring: Keyring) -> None:
    for change in ({"value": -1}, {"lines": (("b", 1), ("a", 1))}, {"device_name": "Edge 1"}, {"counter_index": 5}):
        with pytest.raises(RevocationsMissing):
            sign_revocations(a_list(keyring, **change), key=keyring.manifest_key)


# --- leases -----------------------------------------------------------------------------------------------------------


def read_lease(value: object) -> Lease | None:
    fields = Fields(value, what="grant", error=GrantInvalid)
    found = parse_lease(fields, "lease", error=GrantInvalid)
    fields.finish()
    return found


@pytest.mark.parametrize(
    "lease", [Lease(resets=0), Lease(clock_ms=0), Lease(7, 8), Lease(RESETS_LIMIT, CLOCK_LIMIT)], ids=str
)
def test_a_lease_comes_back(lease: Lease) -> None:
    assert read_lease({"lease": lease.document()}) == lease
    assert read_lease({}) is None


@pytest.mark.parametrize(
    "value",
    [
        {},
        None,
        [],
        {"resets": -1},
        {"resets": RESETS_LIMIT + 1},
        {"clock_ms": CLOCK_LIMIT + 1},
        {"resets": True},
        {"resets": 1.0},
        {"resets": None},
        {"hours": 5},
        {"resets": 1, "restarts": 1},
    ],
)
def test_a_lease_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(GrantInvalid):
        read_lease({"lease": value})


def test_a_lease_without_a_bound_is_our_fault() -> None:
    with pytest.raises(ValueError, match="bounds"):
        Lease()
