"""A store entry that was damaged on the disk: what each command says of it, what mends it, and what removes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook.errors import BundleInvalid, BundleMismatch, FileUnreadable, GrantInvalid, ModelUnknown, StoreInvalid
from oci_hook.oci.annotations import ModelReference
from tests.commands import Household, done, flip_bit, misused, refused, sczctl, snapshot

MENDS = "remedy: `sczctl add FOLDER` again, with what"


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def out(house: Household) -> Path:
    """What travelled; it is in the store already."""
    out = house.prepared()
    done(house.ctl("add", out))
    return out


def bundle(house: Household) -> Path:
    """The store's one bundle."""
    (folder,) = (house.store_folder / "models").iterdir()
    return folder


def blobs(house: Household) -> list[Path]:
    """Its blobs, largest, so a layer, first."""
    return sorted((bundle(house) / "blobs" / "sha256").iterdir(), key=lambda path: -path.stat().st_size)


def layer(house: Household) -> Path:
    return blobs(house)[0]


def name(house: Household) -> Path:
    return Path(house.store.name_path("minilm", "1"))


def replaced_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def replaced_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"?")


#: What happened to the entry, and the code that every look at it gives.
DAMAGES: dict[str, tuple[Callable[[Household], object], int]] = {
    "a truncated layer": (lambda house: os.truncate(layer(house), 5), BundleMismatch.code),
    "an empty layer": (lambda house: os.truncate(layer(house), 0), BundleMismatch.code),
    "a longer layer": (lambda house: layer(house).write_bytes(layer(house).read_bytes() + b"x"), BundleMismatch.code),
    "a missing layer": (lambda house: layer(house).unlink(), BundleInvalid.code),
    "a layer that is a link": (lambda house: replaced_by_link(layer(house)), BundleInvalid.code),
    "a layer that is a folder": (lambda house: replaced_by_folder(layer(house)), BundleInvalid.code),
    "a missing index": (lambda house: (bundle(house) / "index.json").unlink(), BundleInvalid.code),
    "an empty index": (lambda house: os.truncate(bundle(house) / "index.json", 0), BundleInvalid.code),
    "a missing layout file": (lambda house: (bundle(house) / "oci-layout").unlink(), BundleInvalid.code),
    "no blobs": (lambda house: shutil.rmtree(bundle(house) / "blobs"), BundleInvalid.code),
    "blobs that are a file": (lambda house: replaced_by_file(bundle(house) / "blobs"), BundleInvalid.code),
    "no bundle": (lambda house: shutil.rmtree(bundle(house)), BundleInvalid.code),
    "a bundle that is a file": (lambda house: replaced_by_file(bundle(house)), BundleInvalid.code),
    "every small blob flipped": (lambda house: [flip_bit(path) for path in blobs(house)[2:]], BundleMismatch.code),
    "a layer of somebody else's": (lambda house: os.chown(layer(house), 1000, 1000), StoreInvalid.code),
    "a layer that others may write": (lambda house: layer(house).chmod(0o666), StoreInvalid.code),
    "an index of somebody else's": (lambda house: os.chown(bundle(house) / "index.json", 1000, -1), StoreInvalid.code),
    "a bundle of somebody else's": (lambda house: os.chown(bundle(house), 1000, 1000), StoreInvalid.code),
    "a bundle that others may write": (lambda house: bundle(house).chmod(0o777), StoreInvalid.code),
    "blobs that others may write": (lambda house: (bundle(house) / "blobs").chmod(0o770), StoreInvalid.code),
    "an empty name": (lambda house: name(house).write_bytes(b""), StoreInvalid.code),
    "a name that is garbage": (lambda house: name(house).write_bytes(b"\x00\xff"), StoreInvalid.code),
    "a name of somebody else's": (lambda house: os.chown(name(house), 1000, 1000), StoreInvalid.code),
    "a name that others may write": (lambda house: name(house).chmod(0o666), StoreInvalid.code),
    "a name that is a folder": (lambda house: replaced_by_folder(name(house)), StoreInvalid.code),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_look_tells_it_and_add_mends_it(house: Household, out: Path, what: str) -> None:
    whole = snapshot(house.store_folder)
    damage, code = DAMAGES[what]
    damage(house)
    shown = house.ctl("list")
    assert (shown.code, shown.out.split()[-1]) == (code, "damaged"), shown
    assert MENDS in shown.err
    assert "damaged" in house.ctl("list", "--json").json[0]
    refused(house.ctl("verify", "minilm:1"), code, MENDS)
    with pytest.raises((BundleInvalid, BundleMismatch, StoreInvalid)) as caught:  # as the hook does
        house.store.verify_present(house.store.resolve(ModelReference("minilm", "1")))
    assert "sczctl add FOLDER" in caught.value.advice
    done(house.ctl("add", out))
    assert {path: data for path, data in snapshot(house.store_folder).items() if path in whole} == whole
    assert house.verified_models() == {"minilm:1": True}
    done(house.ctl("verify", "minilm:1"))
    assert done(house.ctl("list")).out.split()[-1] == "granted"


@pytest.mark.parametrize("what", DAMAGES)
def test_rm_removes_it(house: Household, out: Path, what: str) -> None:
    assert out.is_dir()
    DAMAGES[what][0](house)
    done(house.ctl("rm", "minilm:1"))
    left = [path for kind in ("models", "grants", "names") for path in (house.store_folder / kind).rglob("*")]
    assert left == []
    assert done(house.ctl("list")).out == ""


def test_a_flipped_bit_of_a_layer_is_found_by_verify(house: Household, out: Path) -> None:
    assert "2 files are what was signed" in done(house.ctl("verify", "minilm:1")).out
    flip_bit(layer(house))
    refused(house.ctl("verify", "minilm:1"), BundleMismatch.code, "does not hash", "sczctl add")
    done(house.ctl("list"))  # which does not read layers
    done(house.ctl("add", out))
    done(house.ctl("verify", "minilm:1"))


def test_inspect_of_the_store_s(house: Household, out: Path) -> None:
    told = done(house.ctl("inspect", "minilm:1", "--json")).json
    assert told == done(sczctl("inspect", out / "bundle", "--json")).json
    (bundle(house) / "index.json").unlink()
    refused(house.ctl("inspect", "minilm:1"), BundleInvalid.code, MENDS)
    refused(house.ctl("inspect", "minilm:2"), ModelUnknown.code, "minilm:1")
    refused(house.ctl("inspect", "../minilm:1"), FileUnreadable.code)


def test_verify_of_what_is_not_in_the_store(house: Household, out: Path) -> None:
    refused(house.ctl("verify", "minilm:2"), ModelUnknown.code, "minilm:1")
    misused(house.ctl("verify", out / "bundle"), "--owner")
    done(house.ctl("trust", "rm", "owner", "acme"))
    refused(house.ctl("verify", "minilm:1"), 30)


def test_a_damaged_grant_and_boot_policy_are_mended(house: Household, out: Path) -> None:
    whole = snapshot(house.store_folder)
    (grant,) = (house.store_folder / "grants").iterdir()
    (policy,) = (house.store_folder / "boot-policies").glob("*/*")
    grant.chmod(0o666)
    with pytest.raises(GrantInvalid) as caught:
        house.store.load_grant(house.store.models()[0].manifest_digest)
    assert "`sczctl add` the owner's grant again" in caught.value.advice
    for path in (grant, policy):
        path.write_bytes(b"?")
    done(house.ctl("add", out))
    assert snapshot(house.store_folder) == whole


@pytest.mark.parametrize("folder", ["names", "names/minilm", "grants", "models"])
def test_a_folder_that_others_may_write_is_given_back_by_hand(house: Household, out: Path, folder: str) -> None:
    path = house.store_folder / folder
    path.chmod(0o777)
    before = snapshot(house.store_folder)
    tried = house.ctl("add", out)
    refused(tried, tried.code, f"chown root: {path} && chmod go-w {path}")
    assert snapshot(house.store_folder) == before
    path.chmod(0o700)
    done(house.ctl("add", out))


def test_others_are_shown_and_can_be_used(house: Household, out: Path) -> None:
    second = house.pack("second", version="2")
    done(house.ctl("add", second))
    damaged = Path(house.store.bundle_path(house.store.load_model("minilm", "1").image_digest or ""))
    (damaged / "index.json").unlink()
    shown = house.ctl("list")
    assert [line.split()[0] + " " + line.split()[-1] for line in shown.out.splitlines()] == [
        "minilm:1 damaged",
        "minilm:2 grant",
    ]
    done(house.ctl("verify", "minilm:2"))
    done(house.ctl("add", out))
    assert house.verified_models() == {"minilm:1": True, "minilm:2": False}
