"""`bundle.grant`: the vectors, the wrapping of the content key, and that nothing unreadable is signed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from oci_hook import errors
from oci_hook.bundle.grant import (
    Counter,
    SealedKey,
    parse_grant,
    sign_grant,
    unwrap_content_key,
    verify_grant,
    verify_grant_signature,
    wrap_content_key,
)
from oci_hook.bundle.manifest import Manifest, parse_manifest, verify_manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import ContentKey
from oci_hook.documents import canonical
from oci_hook.errors import DeviceInvalid, GrantInvalid, GrantRefused, KeyInvalid, KeyRefused
from oci_hook.trust import parse_owner
from tests.bundles import CREATED, FIELDS, MODEL, POLICY, load_vectors, make_grant, make_owner, value_or_none

VECTORS = load_vectors("grant")
KEYS = make_owner()
SECRET, CONTENT_KEY = os.urandom(32), ContentKey(os.urandom(32))
MANIFEST = Manifest(MODEL, KEYS.owner.owner_id, CREATED, (), POLICY, FIELDS, "sha256:" + 64 * "a")
GRANT = make_grant(KEYS, MANIFEST, CONTENT_KEY, SECRET)


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str) -> None:
    vector = VECTORS[name]
    owner = parse_owner(canonical(vector["owner"]))
    manifest = verify_manifest(parse_manifest(vector["manifest"].encode()), owner)
    secret = bytes.fromhex(vector["secret"])

    def read() -> ContentKey:
        grant = verify_grant(parse_grant(vector["grant"].encode()), owner=owner, manifest=manifest)
        return unwrap_content_key(grant.wrapped_key, secret, manifest.digest)

    if vector["expect"] is None:
        assert read().value.hex() == vector["content_key"]
        return
    with pytest.raises(errors.SczError) as refused:
        read()
    assert type(refused.value) is getattr(errors, vector["expect"])


def test_what_is_signed_is_read() -> None:
    unverified = parse_grant(sign_grant(GRANT, key=KEYS.manifest_key))
    assert unverified.owner_id == KEYS.owner.owner_id
    assert verify_grant(unverified, owner=KEYS.owner, manifest=MANIFEST) == GRANT
    assert verify_grant_signature(unverified, owner=KEYS.owner) == GRANT


def test_another_owner_s_manifest_is_refused() -> None:
    unverified = parse_grant(sign_grant(GRANT, key=KEYS.manifest_key))
    with pytest.raises(GrantRefused):
        verify_grant(unverified, owner=KEYS.owner, manifest=replace(MANIFEST, owner_id="A" * 43))
    with pytest.raises(GrantRefused):
        verify_grant(unverified, owner=make_owner("other").owner, manifest=MANIFEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelId("Demo", "v1", 1)},
        {"manifest_digest": "sha256:1"},
        {"created": -1},
        {"device_name": "Edge 1"},
        {"device_class": ""},
        {"ak_name": bytes(34)},
        {"srk_name": b"\x00\x0b" + bytes(33)},
        {"policy_ref": bytes(31)},
        {"counter": Counter(0x81000001, GRANT.counter.name, 1)},
        {"counter": replace(GRANT.counter, maximum=2**64)},
        {"sealed": SealedKey(b"", b"x", b"x")},
        {"sealed": SealedKey(b"x", b"x", bytes(2049))},
        {"wrapped_key": bytes(59)},
    ],
)
def test_nothing_unreadable_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(DeviceInvalid):
        sign_grant(replace(GRANT, **changes), key=KEYS.manifest_key)


def test_only_the_owner_s_key_signs() -> None:
    with pytest.raises(KeyInvalid):
        sign_grant(GRANT, key=KEYS.recovery_key)


def test_the_wrapping_is_the_specification_s() -> None:
    """Done by hand, from docs/specification.md."""
    digest, nonce = "sha256:" + 64 * "b", os.urandom(12)
    info = b"scz-smm/grant/v1 tpm\0" + digest.encode()
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(SECRET)
    expected = nonce + AESGCM(key).encrypt(nonce, CONTENT_KEY.value, None)
    assert wrap_content_key(CONTENT_KEY, SECRET, digest, nonce) == expected
    assert unwrap_content_key(expected, SECRET, digest).value == CONTENT_KEY.value


@pytest.mark.parametrize("offset", [0, 11, 12, 43, 44, 59])
def test_a_changed_wrapping_is_refused(offset: int) -> None:
    changed = bytearray(GRANT.wrapped_key)
    changed[offset] ^= 0x80
    with pytest.raises(KeyRefused):
        unwrap_content_key(bytes(changed), SECRET, MANIFEST.digest)


def test_another_secret_or_manifest_is_refused() -> None:
    for secret, digest in (
        (os.urandom(32), MANIFEST.digest),
        (SECRET[:31], MANIFEST.digest),
        (SECRET + b"\0", MANIFEST.digest),
        (b"", MANIFEST.digest),
        (SECRET, "sha256:" + 64 * "c"),
        (SECRET, MANIFEST.digest.removeprefix("sha256:")),
    ):
        with pytest.raises(KeyRefused):
            unwrap_content_key(GRANT.wrapped_key, secret, digest)


def test_our_own_mistakes_are_value_errors() -> None:
    for secret, nonce in ((bytes(31), bytes(12)), (bytes(32), bytes(11))):
        with pytest.raises(ValueError):
            wrap_content_key(CONTENT_KEY, secret, MANIFEST.digest, nonce)


def test_the_wrapped_key_is_not_shown() -> None:
    assert repr(GRANT.wrapped_key) not in repr(GRANT)
    assert json.dumps(VECTORS["grant-good"]["content_key"]) not in repr(GRANT)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    assert value_or_none(lambda: parse_grant(data), GrantInvalid) is None


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_any_wrapping(wrapped: bytes, secret: bytes) -> None:
    assert value_or_none(lambda: unwrap_content_key(wrapped, secret, MANIFEST.digest), KeyRefused) is None
