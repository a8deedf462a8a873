"""`owner.granting`: what a grant binds, and that nothing but its device's SRK and its own manifest open it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.attestation.policy import policy_ref, sealed_object_policy
from oci_hook.attestation.structures import ObjectAttributes, parse_public
from oci_hook.bundle.grant import Grant, parse_grant, unwrap_content_key, verify_grant
from oci_hook.bundle.layout import Layout, open_layout
from oci_hook.bundle.manifest import Manifest
from oci_hook.errors import DecryptionRefused, DeviceInvalid, GrantInvalid, GrantRefused, KeyInvalid, KeyRefused
from oci_hook.lease import Lease
from oci_hook.owner.granting import make_grant, verify_decryption
from oci_hook.owner.keyring import Keyring, open_content_key, open_keyring
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from oci_hook.provenance import verified_manifest
from tests.bundles import read_bundle
from tests.commands import FILES, Household, flip_bit
from tests.devices import make_device

CREATED = 1_767_225_600


def nobody_is_asked() -> str:
    raise AssertionError("the keys have no passphrase")


class Owner:
    """An owner with one packed version and one device."""

    def __init__(self, directory: Path) -> None:
        self.house = Household(directory)
        self.device = self.house.enrolled(counter_value=3)
        self.bundle = self.house.pack() / "bundle"
        self.keyring: Keyring = open_keyring(self.house.keys, nobody_is_asked)
        self.content: ContentKeyRecord = OwnerRecords(self.house.keys).load_content_key("minilm", "1")
        with open_layout(self.bundle) as layout:
            self.manifest: Manifest = verified_manifest(layout, [self.house.owner])[0]

    def make(self, maximum: int | None = None) -> tuple[Grant, bytes]:
        return make_grant(
            self.keyring, self.content, self.device.record, maximum=maximum, created=CREATED, random=os.urandom
        )


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


def test_the_device_alone_opens_what_the_owner_packed(owner: Owner) -> None:
    _, compact = owner.make()
    grant = verify_grant(parse_grant(compact), owner=owner.house.owner, manifest=owner.manifest)
    secret = owner.device.unseal(grant.sealed.public, grant.sealed.duplicate, grant.sealed.seed)
    content_key = unwrap_content_key(grant.wrapped_key, secret, grant.manifest_digest)
    assert read_bundle(owner.bundle, owner.house.owner, content_key)[1] == FILES
    with pytest.raises(ValueError, match="not for this device"):
        make_device(owner.house.owner.owner_id).unseal(grant.sealed.public, grant.sealed.duplicate, grant.sealed.seed)


def test_the_grant_says_what_it_binds(owner: Owner) -> None:
    grant, compact = owner.make(maximum=7)
    record = owner.device.record
    assert verify_grant(parse_grant(compact), owner=owner.house.owner, manifest=owner.manifest) == grant
    assert (grant.device_name, grant.device_class, grant.created) == ("edge-1", "default", CREATED)
    assert (grant.srk_name, grant.ak_name) == (record.srk.name, record.ak.name)
    assert (grant.counter.index, grant.counter.name, grant.counter.maximum) == (
        record.counter.index,
        record.counter.name,
        7,
    )
    assert grant.policy_ref == policy_ref("minilm", "default")
    assert grant.manifest_digest == owner.manifest.digest


def test_the_sealed_object_opens_by_that_policy_alone(owner: Owner) -> None:
    grant, _ = owner.make(maximum=7)
    sealed = parse_public(grant.sealed.public, what="sealed object", error=GrantInvalid)
    assert sealed.kind == "keyedhash"
    assert sealed.attributes == ObjectAttributes.NO_DA  # no userWithAuth: the empty password opens nothing
    expected = sealed_object_policy(grant.boot_policy_key_name, grant.policy_ref, grant.counter.name, 7)
    assert sealed.auth_policy == expected
    for other in (6, 8):
        assert expected != sealed_object_policy(grant.boot_policy_key_name, grant.policy_ref, grant.counter.name, other)


@pytest.mark.parametrize("lease", [Lease(resets=4), Lease(clock_ms=5), Lease(4, 5)], ids=str)
def test_a_lease_and_an_epoch_are_in_the_grant_and_in_the_policy(owner: Owner, lease: Lease) -> None:
    grant, compact = make_grant(
        owner.keyring,
        owner.content,
        owner.device.record,
        maximum=None,
        created=CREATED,
        random=os.urandom,
        epoch=2,
        lease=lease,
    )
    assert verify_grant(parse_grant(compact), owner=owner.house.owner, manifest=owner.manifest) == grant
    assert (grant.lease, grant.policy_ref) == (lease, policy_ref("minilm", "default", 2))
    sealed = parse_public(grant.sealed.public, what="sealed object", error=GrantInvalid)
    key_name, name = grant.boot_policy_key_name, grant.counter.name
    assert sealed.auth_policy == sealed_object_policy(key_name, grant.policy_ref, name, 3, lease)
    assert sealed.auth_policy != sealed_object_policy(key_name, grant.policy_ref, name, 3)
    plain = owner.make()[0]
    assert plain.lease is None
    assert b"lease" not in parse_grant(owner.make()[1])._jws.unverified_payload


def test_a_revoked_device_is_granted_nothing(owner: Owner) -> None:
    revoked = replace(owner.device.record, revoked=CREATED)
    with pytest.raises(DeviceInvalid, match="was revoked"):
        make_grant(owner.keyring, owner.content, revoked, maximum=None, created=CREATED, random=os.urandom)
    for far in (1003, 1 << 62):
        with pytest.raises(DeviceInvalid, match="could not count beyond"):
            owner.make(maximum=far)
    assert owner.make(maximum=1002)[0].counter.maximum == 1002


def test_without_a_maximum_the_value_at_enrolment_counts(owner: Owner) -> None:
    assert owner.make()[0].counter.maximum == 3
    assert owner.make(maximum=3)[0].counter.maximum == 3


@pytest.mark.parametrize("maximum", [0, 2])
def test_a_grant_that_could_never_open_is_not_made(owner: Owner, maximum: int) -> None:
    with pytest.raises(DeviceInvalid, match="is 3") as caught:
        owner.make(maximum=maximum)
    assert "--maximum" in caught.value.advice


def test_no_two_grants_share_a_secret(owner: Owner) -> None:
    first, second = (owner.make()[0] for _ in range(2))
    secrets = [owner.device.unseal(g.sealed.public, g.sealed.duplicate, g.sealed.seed) for g in (first, second)]
    assert secrets[0] != secrets[1]
    assert first.wrapped_key != second.wrapped_key
    with pytest.raises(KeyRefused):
        unwrap_content_key(first.wrapped_key, secrets[1], first.manifest_digest)


def test_another_manifest_opens_nothing(owner: Owner) -> None:
    grant, _ = owner.make()
    secret = owner.device.unseal(grant.sealed.public, grant.sealed.duplicate, grant.sealed.seed)
    with pytest.raises(KeyRefused):
        unwrap_content_key(grant.wrapped_key, secret, "sha256:" + "0" * 64)


def test_another_owner_s_content_key_is_not_granted(owner: Owner, tmp_path: Path) -> None:
    other = Owner(tmp_path / "other")
    with pytest.raises(KeyInvalid, match="does not open"):
        make_grant(other.keyring, owner.content, other.device.record, maximum=None, created=CREATED, random=os.urandom)


def test_a_content_key_of_another_manifest_is_not_granted(owner: Owner) -> None:
    moved = replace(owner.content, manifest_digest="sha256:" + "0" * 64)
    with pytest.raises(KeyInvalid, match="does not open"):
        make_grant(owner.keyring, moved, owner.device.record, maximum=None, created=CREATED, random=os.urandom)


def test_a_changed_grant_is_not_the_owner_s(owner: Owner) -> None:
    _, compact = owner.make()
    head, payload, signature = compact.split(b".")
    other = owner.make()[1].split(b".")[1]
    with pytest.raises(GrantRefused):
        verify_grant(parse_grant(b".".join((head, other, signature))), owner=owner.house.owner, manifest=owner.manifest)
    assert payload != other


# --- verify_decryption ------------------------------------------------------------------------------------------------


def decrypt(owner: Owner, layout: Layout) -> list[int]:
    seen: list[int] = []
    verify_decryption(owner.keyring, layout, owner.manifest, seen.append)
    return seen


def test_every_file_is_decrypted_and_counted(owner: Owner) -> None:
    with open_layout(owner.bundle) as layout:
        seen = decrypt(owner, layout)
    assert seen == sorted(seen)
    assert seen[-1] == sum(len(data) for data in FILES.values())


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_does_not_authenticate(owner: Owner, number: int) -> None:
    with open_layout(owner.bundle) as layout:
        digest = layout.layers[number].digest.removeprefix("sha256:")
        flip_bit(owner.bundle / "blobs" / "sha256" / digest)
        with pytest.raises(DecryptionRefused):
            decrypt(owner, layout)


def test_the_key_of_another_packing_is_told_apart_before_any_decryption(owner: Owner) -> None:
    path = owner.house.keys / "models" / "minilm" / "1.json"
    path.unlink()
    owner.house.pack("again")
    with open_layout(owner.bundle) as layout, pytest.raises(KeyInvalid, match="another bundle"):
        decrypt(owner, layout)


def test_no_key_no_decryption(owner: Owner) -> None:
    (owner.house.keys / "models" / "minilm" / "1.json").unlink()
    with open_layout(owner.bundle) as layout, pytest.raises(KeyInvalid):
        decrypt(owner, layout)


def test_the_content_key_in_the_folder_is_sealed(owner: Owner) -> None:
    key = open_content_key(
        owner.content.sealed_key, manifest_digest=owner.manifest.digest, recovery_key=owner.keyring.recovery_key
    )
    for path in owner.house.keys.rglob("*"):
        assert not path.is_file() or key.value not in path.read_bytes()
