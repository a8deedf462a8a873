"""`intake`: everything is verified before anything enters the store; what fails leaves the store as it was."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook import intake
from oci_hook.bundle.layout import open_layout
from oci_hook.errors import (
    BootPolicyInvalid,
    BootPolicyRefused,
    BundleInvalid,
    BundleMismatch,
    FileUnreadable,
    GrantInvalid,
    GrantRefused,
    ModelUnknown,
    OutputExists,
    OwnerUntrusted,
    SczError,
)
from oci_hook.incoming import Incoming, collect, measure
from oci_hook.intake import Intake, Taken
from oci_hook.oci.annotations import ModelReference
from oci_hook.placement import remove
from tests.bundles import blob_path
from tests.commands import Household, done, flip_bit, sczctl, snapshot
from tests.devices import make_device


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def out(house: Household) -> Path:
    return house.prepared()


def take(house: Household, *paths: Path, enrolled: bool = True, replace: bool = False) -> Taken:
    device = house.devices["edge-1"].host if enrolled else None
    return Intake(house.store, [house.owner], device, replace=replace).take(collect(str(path) for path in paths))


def refuses(
    house: Household, error: type[SczError], *paths: Path, match: str | None = None, enrolled: bool = True
) -> None:
    """Both a dry run and the run refuse, and neither leaves a trace."""
    before = snapshot(house.store_folder)
    device = house.devices["edge-1"].host if enrolled else None
    for method in (Intake.verify, Intake.take):
        with pytest.raises(error, match=match):
            method(Intake(house.store, [house.owner], device), collect(str(path) for path in paths))
        assert snapshot(house.store_folder) == before
    assert not list((house.store_folder / "models").glob(".*"))


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_whole(house: Household, out: Path) -> None:
    taken = take(house, out)
    assert [(model.name, model.version) for model in taken.models] == [("minilm", "1")]
    assert [grant.device_name for grant in taken.grants] == ["edge-1"]
    assert [policy.model_name for policy in taken.boot_policies] == ["minilm"]
    assert house.store.models() == list(taken.models)
    assert house.store.load_grant(taken.models[0].manifest_digest) == (out / "grant.jwt").read_bytes()
    policy = (out / "boot-policy.json").read_bytes()
    assert house.store.load_boot_policy(house.owner.owner_id, "minilm", "default") == policy
    assert house.verified_models() == {"minilm:1": True}


@pytest.mark.parametrize("order", list(itertools.permutations(["bundle", "grant.jwt", "boot-policy.json"])))
def test_files_come_in_any_order(house: Household, out: Path, order: tuple[str, ...]) -> None:
    take(house, *(out / name for name in order))
    assert house.verified_models() == {"minilm:1": True}


def test_what_belongs_together_may_come_one_by_one(house: Household, out: Path) -> None:
    for name in ("boot-policy.json", "bundle", "grant.jwt"):
        take(house, out / name)
    assert house.verified_models() == {"minilm:1": True}


def test_a_bundle_needs_no_grant_and_no_enrolment(house: Household, out: Path) -> None:
    taken = take(house, out / "bundle", enrolled=False)
    assert (taken.grants, taken.boot_policies) == ((), ())
    assert house.verified_models() == {"minilm:1": False}


def test_a_folder_of_folders(house: Household, out: Path) -> None:
    house.grant(house.pack("out2", version="2"), model="minilm:2")
    take(house, house.usb)
    assert house.verified_models() == {"minilm:1": True, "minilm:2": True}


def test_what_is_stored_is_a_copy_of_what_was_signed(house: Household, out: Path) -> None:
    (model,) = take(house, out).models
    assert model.image_digest is not None
    stored = house.store_folder / "models" / model.image_digest.removeprefix("sha256:")
    for path in (out / "bundle").rglob("*"):
        if path.is_file():
            copy = stored / path.relative_to(out / "bundle")
            assert copy.read_bytes() == path.read_bytes()
            assert copy.stat().st_nlink == 1
            assert copy.stat().st_mode & 0o777 == 0o400


def test_what_nobody_signed_does_not_come_along(house: Household, out: Path) -> None:
    (out / "bundle" / "extra").write_bytes(b"x")
    (out / "bundle" / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")
    (model,) = take(house, out).models
    assert model.image_digest is not None
    stored = house.store_folder / "models" / model.image_digest.removeprefix("sha256:")
    assert not (stored / "extra").exists()
    assert len(list((stored / "blobs" / "sha256").iterdir())) == 4


def test_hidden_files_in_a_folder_are_passed_over(house: Household, out: Path) -> None:
    (out / ".bundle.partial-abc" / "blobs" / "sha256").mkdir(parents=True)
    (out / ".DS_Store").write_bytes(b"x")
    take(house, out)
    assert house.verified_models() == {"minilm:1": True}


def test_a_bundle_on_another_file_system(house: Household, out: Path) -> None:
    # copy_file_range(2) gives EXDEV between most file systems: a USB stick, a memory file system.
    assert os.stat("/dev/shm").st_dev != os.stat(house.host).st_dev
    elsewhere = Path("/dev/shm") / f"scz-intake.{os.getpid()}"
    shutil.copytree(out, elsewhere)
    try:
        take(house, elsewhere)
    finally:
        shutil.rmtree(elsewhere)
    assert house.verified_models() == {"minilm:1": True}


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_a_file_system_that_cannot_copy_by_itself(
    house: Household, out: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    def copy_file_range(*_arguments: object) -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0  # as some file systems in user space say

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    take(house, out)
    assert house.verified_models() == {"minilm:1": True}


@pytest.mark.parametrize("answer", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails(house: Household, out: Path, monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    def fails(*_arguments: object) -> int:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "copy_file_range", fails)
    before = snapshot(house.store_folder)
    with pytest.raises(FileUnreadable, match=os.strerror(answer)):
        take(house, out)
    assert snapshot(house.store_folder) == before


def test_progress_goes_up_to_what_was_measured(house: Household, out: Path) -> None:
    (house.source / "large").write_bytes(os.urandom(9 << 20))
    big = house.pack("big", version="big")
    incoming = collect([str(out), str(big)])
    for copied in (False, True):
        seen: list[int] = []
        intake = Intake(house.store, [house.owner], house.devices["edge-1"].host, progress=seen.append)
        if copied:
            intake.take(incoming)
        else:
            intake.verify(incoming)
        total = measure(incoming, copied=copied)
        assert seen == sorted(seen)
        assert total <= seen[-1] < total + 16384  # the manifests are copied too, and not worth a word
        assert len(seen) > 4
    assert house.verified_models().keys() == {"minilm:1", "minilm:big"}


def test_a_dry_run_takes_nothing(house: Household, out: Path) -> None:
    before = snapshot(house.host)
    intake = Intake(house.store, [house.owner], house.devices["edge-1"].host)
    verified = intake.verify(collect([str(out)]))
    assert snapshot(house.host) == before
    assert not (house.store_folder / "models").exists()
    assert verified == take(house, out)


# --- collect ----------------------------------------------------------------------------------------------------------


def test_collect_sorts_by_kind_and_reads_nothing_else(house: Household, out: Path) -> None:
    assert collect([str(out)]) == Incoming(
        [str(out / "bundle")], [(out / "grant.jwt").read_bytes()], [(out / "boot-policy.json").read_bytes()]
    )


@pytest.mark.parametrize("name", ["README", "grant.JWT", "key.pem", "bundle.tar"])
def test_a_file_of_another_kind_is_not_passed_over(house: Household, out: Path, name: str) -> None:
    (out / name).write_bytes(b"x")
    refuses(house, BundleInvalid, out, match=name)


def test_nothing_to_add_is_not_a_success(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(BundleInvalid, match="no bundle"):
        collect([str(tmp_path / "empty")])
    with pytest.raises(BundleInvalid):
        collect([])


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable, match="absent"):
        collect([str(tmp_path / "absent")])


def test_a_folder_that_was_not_meant(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    with pytest.raises(BundleInvalid):
        collect([str(tmp_path)])
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1001):
        (many / f"{number}.jwt").touch()
    with pytest.raises(BundleInvalid):
        collect([str(many)])


def test_a_document_that_is_too_large_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "large.jwt").write_bytes(b"x" * ((1 << 20) + 1))
    os.mkfifo(tmp_path / "fifo.jwt")
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    for name, error in (("large.jwt", BundleInvalid), ("fifo.jwt", BundleInvalid), ("link.json", FileUnreadable)):
        with pytest.raises(error, match=name):
            collect([str(tmp_path / name)])


# --- what is refused --------------------------------------------------------------------------------------------------


def layers(out: Path) -> list[Path]:
    with open_layout(out / "bundle") as layout:
        return [out / "bundle" / blob_path(layer.digest) for layer in layout.layers]


@pytest.mark.parametrize("number", [0, 1])
def test_a_flipped_bit_in_a_layer(house: Household, out: Path, number: int) -> None:
    flip_bit(layers(out)[number])
    refuses(house, BundleMismatch, out, match="does not hash")


def test_a_layer_of_another_length(house: Household, out: Path) -> None:
    path = layers(out)[0]
    path.write_bytes(path.read_bytes() + b"x")
    refuses(house, BundleMismatch, out, match="bytes instead of")
    path.write_bytes(path.read_bytes()[:-2])
    refuses(house, BundleMismatch, out, match="bytes instead of")


def test_swapped_layers(house: Household, out: Path) -> None:
    one, two = layers(out)
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    refuses(house, BundleMismatch, out)


def test_a_missing_layer(house: Household, out: Path) -> None:
    layers(out)[1].unlink()
    refuses(house, BundleInvalid, out)


@pytest.mark.parametrize("target", ["/etc/hostname", "copy"])
def test_a_blob_that_is_a_link(house: Household, out: Path, target: str) -> None:
    path = layers(out)[0]
    shutil.copy(path, path.with_name("copy"))
    path.unlink()
    path.symlink_to(target)
    refuses(house, BundleInvalid, out, match="symbolic link")


def test_a_blobs_folder_that_is_a_link(house: Household, out: Path) -> None:
    blobs = out / "bundle" / "blobs"
    blobs.rename(house.usb / "elsewhere")
    blobs.symlink_to(house.usb / "elsewhere")
    refuses(house, SczError, out)


def test_a_blob_that_is_a_fifo(house: Household, out: Path) -> None:
    path = layers(out)[0]
    path.unlink()
    os.mkfifo(path)
    refuses(house, BundleInvalid, out, match="not a regular file")


def test_an_index_of_another_bundle(house: Household, out: Path) -> None:
    other = house.pack("other", version="2")
    shutil.copy(other / "bundle" / "index.json", out / "bundle" / "index.json")
    refuses(house, BundleInvalid, out)


def test_a_bundle_by_somebody_else(house: Household, out: Path, tmp_path: Path) -> None:
    other = Household(tmp_path / "other", name="evil")
    refuses(house, OwnerUntrusted, other.pack() / "bundle", match=other.owner.owner_id)


def test_a_grant_without_its_bundle(house: Household, out: Path) -> None:
    refuses(house, ModelUnknown, out / "grant.jwt", match="minilm:1")


def test_a_grant_of_another_device(house: Household, out: Path) -> None:
    house.enrolled("edge-2")
    house.grant(out, device="edge-2", file="grant2.jwt")
    refuses(house, GrantRefused, out, match="edge-2")
    take(house, out / "bundle")
    refuses(house, GrantRefused, out / "grant2.jwt", match="edge-2")


def test_a_grant_on_a_host_that_is_not_enrolled(house: Household, out: Path) -> None:
    refuses(house, GrantRefused, out, match="not enrolled", enrolled=False)


def test_a_grant_by_somebody_else(house: Household, out: Path, tmp_path: Path) -> None:
    other = Household(tmp_path / "other", name="evil")
    other.enrolled()
    stranger = other.grant(other.pack())
    shutil.copy(stranger, out / "grant.jwt")
    refuses(house, OwnerUntrusted, out)


def test_a_grant_for_another_packing_of_the_version(house: Household, out: Path) -> None:
    (house.keys / "models" / "minilm" / "1.json").unlink()
    other = house.pack("other")
    house.grant(other)
    shutil.copy(other / "grant.jwt", out / "grant.jwt")
    refuses(house, GrantRefused, out, match="minilm:1")


@pytest.mark.parametrize(("name", "error"), [("grant.jwt", GrantInvalid), ("boot-policy.json", BootPolicyInvalid)])
@pytest.mark.parametrize("contents", [b"", b"x", b"{}", b"a.b.c", b"\xff" * 100])
def test_a_document_that_is_none(
    house: Household, out: Path, name: str, error: type[SczError], contents: bytes
) -> None:
    (out / name).write_bytes(contents)
    refuses(house, error, out)


def test_a_grant_with_a_flipped_bit(house: Household, out: Path) -> None:
    head, payload, signature = (out / "grant.jwt").read_bytes().split(b".")
    other = b"A" if signature[:1] != b"A" else b"B"
    (out / "grant.jwt").write_bytes(b".".join((head, payload, other + signature[1:])))
    refuses(house, GrantRefused, out)


def test_a_boot_policy_with_other_values(house: Household, out: Path) -> None:
    document = json.loads((out / "boot-policy.json").read_bytes())
    document["forms"][0]["pcrs"]["4"] = "ab" * 32
    (out / "boot-policy.json").write_text(json.dumps(document))
    refuses(house, BootPolicyRefused, out)


@pytest.mark.parametrize(("key", "value"), [("model", "other"), ("class", "other")])
def test_a_boot_policy_moved_to_another_model_or_class(house: Household, out: Path, key: str, value: str) -> None:
    document = json.loads((out / "boot-policy.json").read_bytes())
    (out / "boot-policy.json").write_text(json.dumps({**document, key: value}))
    refuses(house, BootPolicyRefused, out)


def test_a_boot_policy_by_somebody_else(house: Household, out: Path, tmp_path: Path) -> None:
    other = Household(tmp_path / "other", name="evil")
    other.enrolled()
    done(sczctl(*other.sign_words(out / "other-policy.json")))
    refuses(house, OwnerUntrusted, out)


# --- names that are taken ---------------------------------------------------------------------------------------------


def repacked(house: Household) -> Path:
    (house.keys / "models" / "minilm" / "1.json").unlink()
    return house.pack("other")


def test_a_name_does_not_change_its_meaning_unasked(house: Household, out: Path) -> None:
    take(house, out)
    other = repacked(house)
    refuses(house, OutputExists, other, match="other contents")
    take(house, out)  # the same contents again
    old = house.store.models()[0]
    take(house, other, replace=True)
    new = house.store.models()[0]
    assert old.image_digest != new.image_digest
    # What nothing means any more is gone, also the grant, which opened the old contents only.
    assert [path.name for path in (house.store_folder / "models").iterdir()] == [new.image_digest[7:]]
    assert list((house.store_folder / "grants").iterdir()) == []
    assert house.verified_models() == {"minilm:1": False}


def test_two_bundles_of_one_name_at_once(house: Household, out: Path) -> None:
    other = repacked(house)
    refuses(house, OutputExists, out, other, match="second")
    with pytest.raises(OutputExists):
        take(house, out, other, replace=True)
    take(house, out / "bundle", out / "bundle")  # the same one twice
    assert house.verified_models() == {"minilm:1": False}


def test_a_name_that_is_taken_meanwhile(house: Household, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = repacked(house)
    verified_policy: Callable[..., object] = intake.verified_policy

    def faster(*arguments: object) -> object:
        monkeypatch.undo()
        take(house, other)
        return verified_policy(*arguments)

    monkeypatch.setattr(intake, "verified_policy", faster)
    with pytest.raises(OutputExists):
        take(house, out)
    with open_layout(other / "bundle") as layout:
        assert house.store.models()[0].image_digest == layout.image_digest
    assert house.verified_models() == {"minilm:1": False}
    assert not [path for path in (house.store_folder / "models").iterdir() if path.name.startswith(".")]


def test_the_newest_of_several_grants_and_policies_stays(
    house: Household, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    house.grant(out, file="a-newer.jwt")
    done(sczctl(*house.sign_words(out / "a-newer.json")))
    monkeypatch.undo()
    (model,) = take(house, out).models
    assert house.store.load_grant(model.manifest_digest) == (out / "a-newer.jwt").read_bytes()
    policy = house.store.load_boot_policy(house.owner.owner_id, "minilm", "default")
    assert policy == (out / "a-newer.json").read_bytes()


def test_a_damaged_neighbour_is_in_nobody_s_way(house: Household, out: Path) -> None:
    take(house, house.pack("two", version="2"))
    Path(house.store.name_path("minilm", "2")).write_bytes(b"?")
    take(house, out)
    model = house.store.load_model("minilm", "1")
    assert house.store.has_grant(model.manifest_digest)


def test_a_source_that_changes_while_it_is_copied(house: Household, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = os.copy_file_range

    def flips(source: int, target: int, count: int) -> int:
        written = copy(source, target, count)
        if written:
            os.pwrite(target, b"\0", 0)  # where every blob has another first byte
        return written

    monkeypatch.setattr(os, "copy_file_range", flips)
    before = snapshot(house.store_folder)
    with pytest.raises((BundleInvalid, BundleMismatch)):
        take(house, out)
    assert snapshot(house.store_folder) == before


def test_a_device_is_told_by_both_its_keys(house: Household, out: Path) -> None:
    host = make_device(house.owner.owner_id).host
    before = snapshot(house.store_folder)
    with pytest.raises(GrantRefused):
        Intake(house.store, [house.owner], host).take(collect([str(out)]))
    assert snapshot(house.store_folder) == before


def test_an_older_document_does_not_come_back(
    house: Household, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take(house, out)
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    newer = house.usb / "newer"
    newer.mkdir()
    house.grant(newer)
    done(sczctl(*house.sign_words(newer / "boot-policy.json")))
    monkeypatch.undo()
    take(house, newer)
    before = snapshot(house.store_folder)
    for old in ("grant.jwt", "boot-policy.json"):
        with pytest.raises(OutputExists, match="newer"):
            take(house, out / old)
        assert snapshot(house.store_folder) == before
    device = house.devices["edge-1"].host
    Intake(house.store, [house.owner], device, replace=True).take(collect([str(out / "boot-policy.json")]))
    policy = house.store.load_boot_policy(house.owner.owner_id, "minilm", "default")
    assert policy == (out / "boot-policy.json").read_bytes()


def test_a_stick_full_of_documents_is_bounded(tmp_path: Path) -> None:
    folder = tmp_path / "stick"
    folder.mkdir()
    for number in range(40):
        with (folder / f"{number}.json").open("wb") as file:
            file.truncate(1 << 20)
    with pytest.raises(BundleInvalid, match="at once"):
        collect([str(folder)])


# --- a grant for a bundle that images carry ---------------------------------------------------------------------------


def take_without_bundle(house: Household, *paths: Path) -> Taken:
    intake = Intake(house.store, [house.owner], house.devices["edge-1"].host, without_bundle=True)
    return intake.take(collect(str(path) for path in paths))


def test_a_grant_whose_bundle_images_carry(house: Household, out: Path) -> None:
    (model,) = take_without_bundle(house, out / "grant.jwt").models
    assert house.store.models() == [model]
    assert model.image_digest is None
    assert house.store.has_grant(model.manifest_digest)
    with pytest.raises(ModelUnknown, match="only the grant"):
        house.store.open_reference(ModelReference("minilm"))
    take(house, out / "grant.jwt")  # a newer one needs no option
    remove(house.store, "minilm", "1")
    assert not house.store.has_grant(model.manifest_digest)


def test_the_bundle_may_come_later(house: Household, out: Path) -> None:
    take_without_bundle(house, out / "grant.jwt")
    take(house, out / "bundle")
    assert house.verified_models() == {"minilm:1": True}
    take_without_bundle(house, out / "grant.jwt")  # and is not forgotten again
    assert house.verified_models() == {"minilm:1": True}


def test_another_model_of_that_name_is_in_images(house: Household, out: Path) -> None:
    take_without_bundle(house, out / "grant.jwt")
    next((house.keys / "models").glob("**/*1.json")).unlink()  # its owner packs other contents under the same version
    other = house.pack("other")
    refuses(house, OutputExists, other / "bundle")
    take(house, other / "bundle", replace=True)
    assert house.verified_models() == {"minilm:1": False}
