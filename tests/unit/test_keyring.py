"""`owner.keyring` and `owner.records`: keys on disk, sealed content keys, devices, grants."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.bundle.grant import sign_grant
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import ContentKey
from oci_hook.errors import DeviceInvalid, GrantRefused, KeyInvalid, OutputExists
from oci_hook.owner.grant_batch import load_grants
from oci_hook.owner.keyring import (
    KEY_FILES,
    SEALED_BYTES,
    Keyring,
    create_keyring,
    load_owner,
    open_content_key,
    open_keyring,
    seal_content_key,
)
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from tests.bundles import CREATED, FIELDS, MODEL, POLICY, OwnerKeys, make_grant, value_or_none

DIGEST = "sha256:" + 64 * "a"


def never() -> str:
    raise AssertionError("the passphrase was asked for")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_keyring(tmp_path / "keys", "acme", "correct horse")
    return tmp_path / "keys"


@pytest.fixture
def keyring(folder: Path) -> Keyring:
    return open_keyring(folder, lambda: "correct horse")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_keyring_is_made_and_opened(tmp_path: Path) -> None:
    owner = create_keyring(tmp_path / "keys", "acme", "pässphrase")
    keys = tmp_path / "keys"
    assert sorted(os.listdir(keys)) == [
        "boot-policy.key",
        "manifest.key",
        "owner.json",
        "passphrase.json",
        "recovery.key",
    ]
    assert mode(keys) == 0o700
    for name in KEY_FILES.values():
        assert mode(keys / name) == 0o600
        assert (keys / name).read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert os.listdir(tmp_path) == ["keys"]
    assert load_owner(keys) == owner
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        return "pässphrase"

    ring = open_keyring(keys, ask)
    assert asked == [1]
    assert ring.owner == owner
    assert "PrivateKey" not in repr(ring)


def test_without_a_passphrase_none_is_asked_for(tmp_path: Path) -> None:
    create_keyring(tmp_path / "keys", "acme", None)
    assert (tmp_path / "keys" / "manifest.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert open_keyring(tmp_path / "keys", never).owner.name == "acme"


@pytest.mark.parametrize("wrong", ["", "Correct horse", "correct horse ", "x" * 2000])
def test_a_wrong_passphrase_is_refused(folder: Path, wrong: str) -> None:
    with pytest.raises(KeyInvalid):
        open_keyring(folder, lambda: wrong)


@pytest.mark.parametrize("passphrase", ["", "x" * 1024])
def test_a_passphrase_that_cannot_be_used(tmp_path: Path, passphrase: str) -> None:
    with pytest.raises(KeyInvalid):
        create_keyring(tmp_path / "keys", "acme", passphrase)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "../a", "a" * 65, "a\n"])
def test_a_bad_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyInvalid):
        create_keyring(tmp_path / "keys", name, None)
    assert os.listdir(tmp_path) == []


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = (folder / "recovery.key").read_bytes()
    with pytest.raises(OutputExists):
        create_keyring(folder, "acme", None)
    assert (folder / "recovery.key").read_bytes() == before
    assert os.listdir(folder.parent) == ["keys"]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read(folder: Path, bits: int) -> None:
    (folder / "manifest.key").chmod(bits)
    with pytest.raises(KeyInvalid) as refused:
        open_keyring(folder, lambda: "correct horse")
    assert "chmod 600" in refused.value.advice


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(rsa.generate_private_key(65537, 2048)),
        bytes(20_000),
    ],
    ids=["empty", "broken", "another", "p384", "rsa", "oversized"],
)
def test_a_key_file_that_is_not_the_owner_s(folder: Path, data: bytes) -> None:
    (folder / "boot-policy.key").write_bytes(data)
    with pytest.raises(KeyInvalid):
        open_keyring(folder, lambda: "correct horse")


def test_two_keys_exchanged(folder: Path) -> None:
    os.rename(folder / "manifest.key", folder / "x")
    os.rename(folder / "boot-policy.key", folder / "manifest.key")
    os.rename(folder / "x", folder / "boot-policy.key")
    with pytest.raises(KeyInvalid):
        open_keyring(folder, lambda: "correct horse")


@pytest.mark.parametrize("name", ["owner.json", "manifest.key", "recovery.key"])
def test_a_missing_or_linked_file(folder: Path, name: str) -> None:
    os.rename(folder / name, folder.parent / "aside")
    with pytest.raises(KeyInvalid):
        open_keyring(folder, lambda: "correct horse")
    (folder / name).symlink_to(folder.parent / "aside")
    with pytest.raises(KeyInvalid):
        open_keyring(folder, lambda: "correct horse")


def test_no_folder(tmp_path: Path) -> None:
    for call in (lambda: load_owner(tmp_path / "none"), lambda: open_keyring(tmp_path / "none", never)):
        with pytest.raises(KeyInvalid):
            call()


# --- content keys -----------------------------------------------------------------------------------------------------


def test_a_content_key_is_sealed_and_opened(keyring: Keyring) -> None:
    key = ContentKey(os.urandom(32))
    sealed = seal_content_key(key, manifest_digest=DIGEST, owner=keyring.owner)
    assert len(sealed) == SEALED_BYTES == 113
    assert sealed != seal_content_key(key, manifest_digest=DIGEST, owner=keyring.owner)
    opened = open_content_key(sealed, manifest_digest=DIGEST, recovery_key=keyring.recovery_key)
    assert opened.value == key.value


def test_a_sealed_key_opens_for_its_owner_and_manifest_only(keyring: Keyring) -> None:
    sealed = seal_content_key(ContentKey(bytes(32)), manifest_digest=DIGEST, owner=keyring.owner)
    for changed, digest, key in (
        (sealed, "sha256:" + 64 * "b", keyring.recovery_key),
        (sealed, DIGEST, keyring.manifest_key),
        (sealed[:-1], DIGEST, keyring.recovery_key),
        (sealed + b"\0", DIGEST, keyring.recovery_key),
        (bytes(113), DIGEST, keyring.recovery_key),
        (sealed[:70] + bytes([sealed[70] ^ 1]) + sealed[71:], DIGEST, keyring.recovery_key),
    ):
        with pytest.raises(KeyInvalid):
            open_content_key(changed, manifest_digest=digest, recovery_key=key)


def test_a_sealed_key_of_another_length(keyring: Keyring) -> None:
    """Whoever has the public key can seal anything; what comes out must be a content key."""
    public = keyring.recovery_key.public_key()
    suite = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    for size in (0, 31, 33):
        sealed = suite.encrypt(bytes(size), public, b"scz-smm/content-key/v1\0" + DIGEST.encode())
        with pytest.raises(KeyInvalid):
            open_content_key(sealed, manifest_digest=DIGEST, recovery_key=keyring.recovery_key)
    sealed = suite.encrypt(bytes(32), public, b"scz-smm/content-key/v1\0" + DIGEST.encode())
    assert open_content_key(sealed, manifest_digest=DIGEST, recovery_key=keyring.recovery_key).value == bytes(32)


RECOVERY = ec.generate_private_key(ec.SECP256R1())


@given(st.binary(max_size=150))
def test_any_sealed_bytes(data: bytes) -> None:
    opened = value_or_none(lambda: open_content_key(data, manifest_digest=DIGEST, recovery_key=RECOVERY), KeyInvalid)
    assert opened is None


def record(keyring: Keyring) -> ContentKeyRecord:
    sealed = seal_content_key(ContentKey(bytes(range(32))), manifest_digest=DIGEST, owner=keyring.owner)
    return ContentKeyRecord(MODEL, DIGEST, "sha256:" + 64 * "b", sealed)


def test_content_keys_are_kept(keyring: Keyring, folder: Path) -> None:
    records = OwnerRecords(folder)
    assert records.content_keys() == ()
    records.verify_new_version("demo", "v1")
    records.save_content_key(record(keyring))
    kept = records.load_content_key("demo", "v1")
    assert (kept.model, kept.manifest_digest, kept.image_digest) == (MODEL, DIGEST, "sha256:" + 64 * "b")
    opened = open_content_key(kept.sealed_key, manifest_digest=DIGEST, recovery_key=keyring.recovery_key)
    assert opened.value == bytes(range(32))
    path = folder / "models" / "demo" / "v1.json"
    assert mode(path) == 0o600
    assert json.loads(path.read_bytes())["schema"] == "scz-smm/content-key/v1"
    assert os.listdir(path.parent) == ["v1.json"]
    assert records.content_keys() == (("demo", "v1"),)


def test_that_a_broker_is_wanted_is_kept(keyring: Keyring, folder: Path) -> None:
    records = OwnerRecords(folder)
    records.save_content_key(replace(record(keyring), broker=True))
    assert records.load_content_key("demo", "v1").broker
    path = folder / "models" / "demo" / "v1.json"
    document = json.loads(path.read_bytes())
    del document["broker"]
    path.write_text(json.dumps(document))  # as an earlier version wrote it
    assert not records.load_content_key("demo", "v1").broker


def test_a_content_key_is_never_overwritten(keyring: Keyring, folder: Path) -> None:
    records = OwnerRecords(folder)
    records.save_content_key(record(keyring))
    before = (folder / "models" / "demo" / "v1.json").read_bytes()
    with pytest.raises(OutputExists):
        records.save_content_key(record(keyring))
    with pytest.raises(OutputExists):
        records.verify_new_version("demo", "v1")
    assert (folder / "models" / "demo" / "v1.json").read_bytes() == before
    assert os.listdir(folder / "models" / "demo") == ["v1.json"]


def test_content_keys_that_are_not_there(keyring: Keyring, folder: Path) -> None:
    records = OwnerRecords(folder)
    records.save_content_key(record(keyring))
    for name, version in (("demo", "v2"), ("other", "v1"), ("..", "v1"), ("demo", "../../owner"), ("", "")):
        with pytest.raises(KeyInvalid):
            records.load_content_key(name, version)
    os.rename(folder / "models" / "demo" / "v1.json", folder / "models" / "demo" / "v2.json")
    with pytest.raises(KeyInvalid):  # another version's file under this name
        records.load_content_key("demo", "v2")
    (folder / "models" / "demo" / "v2.json").write_bytes(b"{}")
    with pytest.raises(KeyInvalid):
        records.load_content_key("demo", "v2")
    for version in ("../v3", "", ".", "a/b"):
        with pytest.raises(KeyInvalid):
            records.verify_new_version("demo", version)


def test_a_content_key_s_file_with_something_more(keyring: Keyring, folder: Path) -> None:
    records = OwnerRecords(folder)
    records.save_content_key(record(keyring))
    path = folder / "models" / "demo" / "v1.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "note": "x"}))
    with pytest.raises(KeyInvalid):
        records.load_content_key("demo", "v1")


# --- devices, challenges, grants --------------------------------------------------------------------------------------


def test_devices_and_challenges(folder: Path) -> None:
    records = OwnerRecords(folder)
    assert records.devices() == ()
    records.save_device("edge-1", b"old")
    records.save_device("edge-1", b"new")
    records.save_device("edge-0", b"x")
    assert records.devices() == ("edge-0", "edge-1")
    assert records.load_device("edge-1") == b"new"
    assert mode(folder / "devices" / "edge-1.json") == 0o600
    assert mode(folder / "devices") == 0o700
    records.save_pending("edge-2", b"challenge")
    assert records.load_pending("edge-2") == b"challenge"
    records.remove_pending("edge-2")
    records.remove_pending("edge-2")
    with pytest.raises(DeviceInvalid):
        records.load_pending("edge-2")
    for name in ("edge-9", "../owner", "Edge", ""):
        for call in (records.load_device, records.load_pending):
            with pytest.raises(DeviceInvalid):
                call(name)
    for name in ("../x", "a/b", ""):
        with pytest.raises(DeviceInvalid):
            records.save_device(name, b"")
        with pytest.raises(DeviceInvalid):
            records.remove_pending(name)


def test_an_oversized_record(folder: Path) -> None:
    records = OwnerRecords(folder)
    records.save_device("edge-1", bytes(2**20))
    assert len(records.load_device("edge-1")) == 2**20
    records.save_device("edge-1", bytes(2**20 + 1))
    with pytest.raises(DeviceInvalid):
        records.load_device("edge-1")


def test_grants_are_listed(keyring: Keyring, folder: Path) -> None:
    keys = OwnerKeys(keyring.owner, keyring.manifest_key, keyring.boot_policy_key, keyring.recovery_key)
    records = OwnerRecords(folder)
    assert records.grants() == ()
    for model, device in ((MODEL, "edge-1"), (ModelId("demo", "v2", 2), "edge-1"), (MODEL, "edge-0")):
        manifest = Manifest(model, keyring.owner.owner_id, CREATED, (), POLICY, FIELDS, DIGEST)
        grant = replace(make_grant(keys, manifest, ContentKey(bytes(32)), bytes(32)), device_name=device)
        records.save_grant(grant, sign_grant(grant, key=keyring.manifest_key))
    rows = [(row["model"], row["device"]) for row in load_grants(folder)]
    assert rows == [("demo:v1", "edge-0"), ("demo:v1", "edge-1"), ("demo:v2", "edge-1")]
    path = folder / "grants" / "demo" / "v1" / "edge-0.grant"
    path.write_bytes(path.read_bytes()[:-4] + b"AAAA")
    with pytest.raises(GrantRefused):
        load_grants(folder)


def test_the_passphrase_itself_opens_no_key_file(tmp_path: Path) -> None:
    create_keyring(tmp_path / "keys", "acme", "passphrase")
    pem = (tmp_path / "keys" / "manifest.key").read_bytes()
    with pytest.raises(ValueError, match=r"."):
        serialization.load_pem_private_key(pem, b"passphrase")


@pytest.mark.parametrize("change", [b'"n":131072 "n":2', b'"kdf":"scrypt" "kdf":"none"', b'"salt":" "salt":"00'])
def test_a_weakened_derivation_is_refused(tmp_path: Path, change: bytes) -> None:
    create_keyring(tmp_path / "keys", "acme", "passphrase")
    path = tmp_path / "keys" / "passphrase.json"
    path.write_bytes(path.read_bytes().replace(*change.split(b" ")))
    with pytest.raises(KeyInvalid):
        open_keyring(tmp_path / "keys", lambda: "passphrase")
