"""`store`: what the hook finds by a name, what it refuses to believe, and the trust folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oci_hook.errors import (
    BootPolicyRefused,
    BundleInvalid,
    DeviceInvalid,
    DeviceNotEnrolled,
    FileUnreadable,
    GrantInvalid,
    GrantMissing,
    ModelUnknown,
    StoreInvalid,
    TrustInvalid,
)
from oci_hook.incoming import collect
from oci_hook.intake import Intake
from oci_hook.oci.annotations import ModelReference
from oci_hook.store import Store, StoredModel
from oci_hook.trust_folder import Trust
from tests.commands import Household, done, snapshot


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


def filled(house: Household, *versions: str) -> dict[str, StoredModel]:
    """Versions of one model in the store, without grants."""
    house.trust()
    for version in versions:
        out = house.pack(f"out-{version}", version=version)
        Intake(house.store, [house.owner], None).take(collect([str(out)]))
    return {model.version: model for model in house.store.models()}


# --- finding a model --------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_name_version_and_digest(house: Household) -> None:
    stored = filled(house, "1", "2")
    assert house.store.resolve(ModelReference("minilm", "1")) == stored["1"]
    assert house.store.resolve(ModelReference("minilm", None, stored["2"].image_digest)) == stored["2"]
    with house.store.open_reference(ModelReference("minilm", "2")) as layout:
        assert layout.image_digest == stored["2"].image_digest
        assert layout.manifest_digest == stored["2"].manifest_digest


def test_a_name_alone_means_the_only_version(house: Household) -> None:
    stored = filled(house, "1")
    assert house.store.resolve(ModelReference("minilm")) == stored["1"]
    filled(house, "2")
    with pytest.raises(ModelUnknown, match="2 versions"):
        house.store.resolve(ModelReference("minilm"))


@pytest.mark.parametrize(
    "reference",
    [ModelReference("other"), ModelReference("minilm", "3"), ModelReference("minilm", None, "sha256:" + "0" * 64)],
)
def test_what_is_not_here_is_unknown(house: Household, reference: ModelReference) -> None:
    filled(house, "1")
    with pytest.raises(ModelUnknown, match=str(reference)):
        house.store.resolve(reference)


def test_an_empty_and_an_absent_store_have_no_models(house: Household) -> None:
    assert house.store.models() == []
    with pytest.raises(ModelUnknown):
        house.store.resolve(ModelReference("minilm", "1"))
    assert not house.store_folder.exists()


def test_a_bundle_in_the_image_is_not_looked_for_in_the_store(house: Household) -> None:
    with pytest.raises(ModelUnknown):
        house.store.resolve(ModelReference("", rootfs_path="/models/x"))


# --- what is damaged, or not root's alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{}",
        b"[]",
        b'{"image":"sha256:00","manifest":"sha256:00","owner":"x"}',
        b'{"image":"../../etc","manifest":"../../etc","owner":"x"}',
        b"x" * 5000,
    ],
)
def test_a_damaged_entry_is_refused(house: Household, contents: bytes) -> None:
    filled(house, "1")
    Path(house.store.name_path("minilm", "1")).write_bytes(contents)
    with pytest.raises(StoreInvalid):
        house.store.resolve(ModelReference("minilm", "1"))
    with pytest.raises(StoreInvalid):
        house.store.models()
    assert house.store.names() == [("minilm", "1")]


def test_an_entry_with_one_member_more_is_refused(house: Household) -> None:
    filled(house, "1")
    path = Path(house.store.name_path("minilm", "1"))
    path.write_bytes(path.read_bytes()[:-1] + b',"x":1}')
    with pytest.raises(StoreInvalid, match="'x'"):
        house.store.resolve(ModelReference("minilm", "1"))


def test_an_entry_that_others_may_write_is_refused(house: Household) -> None:
    filled(house, "1")
    path = Path(house.store.name_path("minilm", "1"))
    path.chmod(0o666)
    with pytest.raises(StoreInvalid, match="writable by others"):
        house.store.resolve(ModelReference("minilm", "1"))
    path.chmod(0o600)
    path.parent.chmod(0o777)
    with pytest.raises(StoreInvalid, match="writable by others"):
        house.store.resolve(ModelReference("minilm", "1"))


def test_an_entry_of_somebody_else_s_is_refused(house: Household) -> None:
    filled(house, "1")
    os.chown(house.store.name_path("minilm", "1"), 1000, 1000)
    with pytest.raises(StoreInvalid, match="uid 1000"):
        house.store.resolve(ModelReference("minilm", "1"))


def test_a_name_must_mean_the_bundle_that_is_there(house: Household) -> None:
    stored = filled(house, "1", "2")
    one, two = (Path(house.store.bundle_path(stored[version].image_digest)) for version in ("1", "2"))
    one.rename(one.with_name("x"))
    two.rename(one)
    with pytest.raises(StoreInvalid, match="another image"):
        house.store.open_reference(ModelReference("minilm", "1"))
    with pytest.raises(BundleInvalid):
        house.store.open_reference(ModelReference("minilm", "2"))


# --- grants, boot policies, the device --------------------------------------------------------------------------------


def test_grants_and_boot_policies_that_are_not_there(house: Household) -> None:
    with pytest.raises(GrantMissing, match="sha256:0000"):
        house.store.load_grant("sha256:" + "0" * 64)
    with pytest.raises(BootPolicyRefused, match="device class default"):
        house.store.load_boot_policy("A" * 43, "minilm", "default")
    with pytest.raises(DeviceNotEnrolled):
        house.store.load_device()
    with pytest.raises(DeviceNotEnrolled):
        house.store.load_request("A" * 43)
    assert not house.store.has_grant("sha256:" + "0" * 64)


def test_a_grant_is_given_back_as_it_was_and_refused_if_others_may_write_it(house: Household) -> None:
    path = Path(house.store.grant_path("sha256:" + "a" * 64))
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"a.b.c")
    path.chmod(0o600)
    assert house.store.load_grant("sha256:" + "a" * 64) == b"a.b.c"
    path.chmod(0o622)
    with pytest.raises(GrantInvalid):
        house.store.load_grant("sha256:" + "a" * 64)


def test_the_device_is_kept_privately(house: Household) -> None:
    device = house.enrolled()
    house.is_device(device)
    assert house.store.load_device() == device.host
    assert (house.store_folder / "device.json").stat().st_mode & 0o777 == 0o600
    assert house.store_folder.stat().st_mode & 0o777 == 0o700
    (house.store_folder / "device.json").write_bytes(b"{}")
    with pytest.raises(DeviceInvalid):
        house.store.load_device()


def test_a_request_is_kept_for_each_owner(house: Household) -> None:
    house.store.save_request("A" * 43, b"one")
    house.store.save_request("B" * 43, b"two")
    assert house.store.load_request("A" * 43) == b"one"
    assert house.store.load_request("B" * 43) == b"two"


# --- the trust folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def trust(house: Household) -> Trust:
    house.trust()
    return Trust(str(house.host / "trust"))


def test_an_owner_is_trusted_until_it_is_removed(house: Household, trust: Trust) -> None:
    assert trust.owners() == (house.owner,)
    trust.remove("owners", "acme")
    assert trust.owners() == ()
    with pytest.raises(TrustInvalid, match="no owner named acme"):
        trust.remove("owners", "acme")


def test_no_folder_means_that_nobody_is_trusted(tmp_path: Path) -> None:
    trust = Trust(str(tmp_path / "absent"))
    assert (trust.owners(), trust.issuers()) == ((), ())
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("kind", ["owners", "issuers"])
def test_a_damaged_file_is_named_and_never_skipped(house: Household, trust: Trust, kind: str) -> None:
    folder = house.host / "trust" / kind
    folder.mkdir(exist_ok=True)
    (folder / "bad.json").write_bytes(b"{}")
    with pytest.raises(TrustInvalid, match=f"{kind}/bad.json") as caught:
        trust.owners() if kind == "owners" else trust.issuers()
    assert f"sczctl trust rm {kind[:-1]} bad" in caught.value.advice
    trust.remove(kind, "bad")
    assert (len(trust.owners()), trust.issuers()) == (1, ())


@pytest.mark.parametrize("name", ["notes.txt", ".acme.json.5f0c", "acme.json~"])
def test_other_files_are_nobody_s_word(house: Household, trust: Trust, name: str) -> None:
    (house.host / "trust" / "owners" / name).write_bytes(b"{}")
    assert trust.owners() == (house.owner,)


def test_a_trusted_file_that_others_may_write_is_refused(house: Household, trust: Trust) -> None:
    path = house.host / "trust" / "owners" / "acme.json"
    path.chmod(0o664)
    with pytest.raises(TrustInvalid, match="writable by others"):
        trust.owners()


def test_too_many_files_are_refused(house: Household, trust: Trust) -> None:
    for number in range(256):
        (house.host / "trust" / "owners" / f"o{number}.json").write_bytes(b"{}")
    with pytest.raises(TrustInvalid, match="more than 256"):
        trust.owners()


def test_a_trust_folder_that_cannot_be_made(house: Household) -> None:
    (house.host / "file").write_bytes(b"")
    before = snapshot(house.host)
    with pytest.raises(FileUnreadable):
        Trust(str(house.host / "file")).add("owners", "acme", b"{}")
    with pytest.raises(FileUnreadable):
        Trust(str(house.host / "file")).owners()
    assert snapshot(house.host) == before


def test_the_store_s_own_folders_can_be_read_by_root_alone(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    folders = [house.store_folder, *(path for path in house.store_folder.iterdir() if path.is_dir())]
    assert sorted(path.name for path in folders) == ["boot-policies", "grants", "models", "names", "store"]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_a_store_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(FileUnreadable):
        Store(str(folder)).save_device(b"{}")
    assert list(folder.iterdir()) == []
