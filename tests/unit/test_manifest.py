"""`bundle.manifest`: the vectors, and that nothing is signed that a reader would refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook import errors
from oci_hook.bundle.manifest import (
    MANIFEST_TYP,
    FileEntry,
    Manifest,
    model_document,
    parse_manifest,
    sign_manifest,
    verify_manifest,
)
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import ciphertext_size
from oci_hook.documents import canonical
from oci_hook.errors import BundleInvalid, KeyInvalid, OwnerUntrusted, SourceInvalid
from oci_hook.jws import sign_compact
from oci_hook.trust import parse_owner
from tests.bundles import CREATED, FIELDS, MODEL, POLICY, digest_of, load_vectors, make_owner, value_or_none
from tests.vectors.bundle import generate

VECTORS = load_vectors("manifest")
KEYS = make_owner()
FILES = (FileEntry("a", 3, "sha256:" + 64 * "0", ciphertext_size(3)), FileEntry("b/c", 0, "sha256:" + 64 * "1", 56))


def sign(**changes: Any) -> bytes:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "files": FILES,
        "access": POLICY,
        "fields": FIELDS,
        "created": CREATED,
        "owner_id": KEYS.owner.owner_id,
        "key": KEYS.manifest_key,
    }
    return sign_manifest(**{**arguments, **changes})


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str) -> None:
    vector = VECTORS[name]
    owner = parse_owner(canonical(vector["owner"]))
    compact = vector["manifest"].encode()
    if vector["expect"] is None:
        assert verify_manifest(parse_manifest(compact), owner).digest == digest_of(compact)
        return
    expected = getattr(errors, vector["expect"])
    with pytest.raises(errors.SczError) as refused:
        verify_manifest(parse_manifest(compact), owner)
    assert type(refused.value) is expected


def test_every_change_has_its_vector() -> None:
    """The folder is what the generator makes: nothing stale, nothing missing."""
    made = {name: vector["expect"] for name, vector in generate.signed_vectors()}
    stored = {**VECTORS, **load_vectors("grant")}
    assert made == {name: vector["expect"] for name, vector in stored.items()}


def test_what_is_signed_is_read() -> None:
    compact = sign()
    unverified = parse_manifest(compact)
    assert unverified.owner_id == KEYS.owner.owner_id
    manifest = verify_manifest(unverified, KEYS.owner)
    assert manifest == Manifest(
        model=MODEL,
        owner_id=KEYS.owner.owner_id,
        created=CREATED,
        files=FILES,
        access=POLICY,
        fields=FIELDS,
        digest=digest_of(compact),
    )


def test_model_json() -> None:
    manifest = verify_manifest(parse_manifest(sign()), KEYS.owner)
    assert json.loads(model_document(manifest)) == {
        "model": {"name": "demo", "version": "v1", "generation": 1},
        "manifest": manifest.digest,
        "fields": FIELDS,
    }


def test_another_owner_s_manifest_is_untrusted() -> None:
    other = make_owner("other")
    with pytest.raises(OwnerUntrusted):
        verify_manifest(parse_manifest(sign()), other.owner)
    with pytest.raises(OwnerUntrusted):  # the right id, another key behind it
        verify_manifest(parse_manifest(sign()), replace(other.owner, owner_id=KEYS.owner.owner_id))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelId("Demo", "v1", 1)},
        {"model": ModelId("demo", "v1", 0)},
        {"files": ()},
        {"files": FILES[::-1]},
        {"files": (FILES[0], FILES[0])},
        {"files": (replace(FILES[0], path="../a"),)},
        {"files": (replace(FILES[0], path="model.json"),)},
        {"files": (replace(FILES[0], size=4),)},
        {"files": tuple(replace(FILES[0], path=f"{n:05}") for n in range(10_001))},
        {"fields": {"a": "b" * 70_000}},
        {"fields": {"a": float("nan")}},
        {"fields": {"a": float("inf")}},
        {"fields": {"a": {1, 2}}},
        {"fields": {"a": "\ud800"}},
        {"fields": {"a": 10**30}},
        {"created": -1},
        {"access": replace(POLICY, token_age_seconds=1)},
        {"access": replace(POLICY, identities=())},
    ],
)
def test_nothing_unreadable_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(SourceInvalid):
        sign(**changes)


def test_a_manifest_of_ten_thousand_files_is_read() -> None:
    files = tuple(replace(FILES[0], path=f"folder/{n:05}") for n in range(10_000))
    assert len(verify_manifest(parse_manifest(sign(files=files)), KEYS.owner).files) == 10_000


def test_a_manifest_over_its_limit_is_not_signed() -> None:
    """Its JSON would fit, its base64 does not."""
    files = tuple(replace(FILES[0], path=f"{n:05}/{'x' * 250}/{'x' * 250}") for n in range(10_000))
    with pytest.raises(SourceInvalid, match="too many files"):
        sign(files=files)


def test_only_the_owner_s_key_signs() -> None:
    with pytest.raises(KeyInvalid):
        sign(key=KEYS.boot_policy_key)
    with pytest.raises(KeyInvalid):
        sign(owner_id="A" * 43)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    assert value_or_none(lambda: parse_manifest(data), BundleInvalid) is None


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARTS = ["schema", "model", "created", "files", "access", "fields", "extra"]


@given(st.sampled_from(PARTS), VALUE)
def test_any_signed_value(part: str, value: object) -> None:
    """Even an owner's signature does not let a reader stumble."""
    payload: dict[str, Any] = {
        "schema": "scz-smm/manifest/v1",
        "model": MODEL.document(),
        "created": CREATED,
        "files": [{"path": "a", "size": 0, "layer": {"digest": "sha256:" + 64 * "0", "size": 56}}],
        "access": {
            "identities": [{"issuer": "i", "audience": "a", "subjects": ["s"]}],
            "token_age_seconds": 60,
            "share": False,
        },
        "fields": {},
        part: value,
    }
    compact = sign_compact(
        json.dumps(payload).encode(), typ=MANIFEST_TYP, kid=KEYS.owner.owner_id, key=KEYS.manifest_key
    )
    manifest = value_or_none(lambda: verify_manifest(parse_manifest(compact), KEYS.owner), BundleInvalid)
    assert manifest is None or part in ("created", "fields")
    assert manifest is None or json.loads(model_document(manifest))["manifest"] == manifest.digest
