"""`sczctl add`, `list`, `rm`: the operator's commands, and that a refusal changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.errors import (
    BundleInvalid,
    BundleMismatch,
    DeviceInvalid,
    FileUnreadable,
    GrantRefused,
    ModelUnknown,
    OutputExists,
    OwnerUntrusted,
    StoreInvalid,
    TrustInvalid,
)
from tests.bundles import blob_path
from tests.commands import Household, done, flip_bit, misused, refused, snapshot


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def out(house: Household) -> Path:
    return house.prepared()


# --- add --------------------------------------------------------------------------------------------------------------


def test_add_says_what_it_added(house: Household, out: Path) -> None:
    added = done(house.ctl("add", out))
    assert re.fullmatch(
        r"added model minilm:1 \(sha256:[0-9a-f]{12}…\)\n"
        r"added grant for minilm:1 to edge-1\n"
        r"added boot policy for minilm, device class default\n",
        added.out,
    )
    assert "verifying" in added.err
    assert house.verified_models() == {"minilm:1": True}


def test_add_tells_scripts_the_same(house: Household, out: Path) -> None:
    tried = done(house.ctl("add", "--dry-run", "--json", out)).json
    assert house.store.names() == []
    added = done(house.ctl("add", "--json", out)).json
    assert (tried.pop("dry_run"), added.pop("dry_run")) == (True, False)
    assert tried == added
    (model,) = house.store.models()
    assert added == {
        "models": [{"name": "minilm", "version": "1", "image": model.image_digest, "manifest": model.manifest_digest}],
        "grants": [{"model": "minilm:1", "manifest": model.manifest_digest, "device": "edge-1"}],
        "boot_policies": [{"model": "minilm", "class": "default", "owner": house.owner.owner_id}],
        "revocations": [],
        "left_out": [],
    }


def test_a_dry_run_of_add_verifies_and_changes_nothing(house: Household, out: Path) -> None:
    before = snapshot(house.host)
    assert done(house.ctl("add", "--dry-run", out)).out.startswith("would add model minilm:1")
    assert snapshot(house.host) == before
    with open_layout(out / "bundle") as layout:
        flip_bit(out / "bundle" / blob_path(layout.layers[0].digest))
    refused(house.ctl("add", "--dry-run", out), BundleMismatch.code)
    assert snapshot(house.host) == before


def test_add_refuses_with_a_code_for_each_reason(house: Household, out: Path, tmp_path: Path) -> None:
    before = snapshot(house.host)
    other = Household(tmp_path / "other", name="evil")
    house.enrolled("edge-2")
    house.grant(out, device="edge-2", file="foreign.jwt")
    (out / "notes.txt").write_bytes(b"x")
    for words, code, word in (
        ([out], BundleInvalid.code, "notes.txt"),
        ([out / "absent"], FileUnreadable.code, "absent"),
        ([out / "grant.jwt"], ModelUnknown.code, "minilm:1"),
        ([out / "bundle", out / "foreign.jwt"], GrantRefused.code, "edge-2"),
        ([other.pack() / "bundle"], OwnerUntrusted.code, other.owner.owner_id),
        ([house.usb / "empty"], BundleInvalid.code, "no bundle"),
    ):
        (house.usb / "empty").mkdir(exist_ok=True)
        refused(house.ctl("add", *words), code, word)
        assert snapshot(house.host) == before
    assert house.store.names() == []


def test_add_of_nothing_is_wrong_usage(house: Household) -> None:
    misused(house.ctl("add"), "PATHS")


def test_add_asks_before_a_version_changes(house: Household, out: Path) -> None:
    done(house.ctl("add", out))
    (house.keys / "models" / "minilm" / "1.json").unlink()
    other = house.pack("other")
    before = snapshot(house.host)
    refused(house.ctl("add", other), OutputExists.code, "--replace", "sczctl rm minilm:1")
    refused(house.ctl("add", "--dry-run", other), OutputExists.code)
    assert snapshot(house.host) == before
    done(house.ctl("add", "--dry-run", "--replace", other))
    assert snapshot(house.host) == before
    done(house.ctl("add", "--replace", other))
    assert house.verified_models() == {"minilm:1": False}


def test_add_on_a_host_whose_trust_is_damaged(house: Household, out: Path) -> None:
    (house.host / "trust" / "owners" / "bad.json").write_bytes(b"{}")
    before = snapshot(house.host)
    refused(house.ctl("add", out), TrustInvalid.code, "bad.json", "sczctl trust rm owner bad")
    assert snapshot(house.host) == before


def test_add_on_a_host_whose_enrolment_is_damaged(house: Household, out: Path) -> None:
    (house.store_folder / "device.json").write_bytes(b"{}")
    before = snapshot(house.host)
    refused(house.ctl("add", out), DeviceInvalid.code)
    assert snapshot(house.host) == before


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_shows_models_and_whether_they_are_granted(house: Household, out: Path) -> None:
    empty = done(house.ctl("list"))
    assert (empty.out, empty.err) == ("", "no model is in the store\n")
    assert done(house.ctl("list", "--json")).json == []
    assert house.store.names() == []
    done(house.ctl("add", out, house.pack("two", version="2") / "bundle"))
    lines = done(house.ctl("list")).out.splitlines()
    assert [(line.split()[0], " ".join(line.split()[2:])) for line in lines] == [
        ("minilm:1", "granted"),
        ("minilm:2", "no grant"),
    ]
    rows = done(house.ctl("list", "--json")).json
    assert [(row["version"], row["granted"], row["owner"]) for row in rows] == [
        ("1", True, house.owner.owner_id),
        ("2", False, house.owner.owner_id),
    ]


def test_list_shows_what_it_can_and_ends_with_an_error_if_an_entry_is_damaged(house: Household, out: Path) -> None:
    done(house.ctl("add", out, house.pack("two", version="2") / "bundle"))
    Path(house.store.name_path("minilm", "1")).write_bytes(b"?")
    shown = house.ctl("list")
    assert shown.code == StoreInvalid.code
    assert [line.split()[0] + line.split()[-1] for line in shown.out.splitlines()] == [
        "minilm:1damaged",
        "minilm:2grant",
    ]
    assert "remedy: `sczctl add FOLDER` again" in shown.err
    rows = house.ctl("list", "--json")
    assert rows.code == StoreInvalid.code
    assert "damaged" in rows.json[0]
    done(house.ctl("rm", "minilm:1"))
    done(house.ctl("list"))


# --- rm ---------------------------------------------------------------------------------------------------------------


def test_rm_takes_away_what_add_brought(house: Household, out: Path) -> None:
    before = snapshot(house.store_folder)
    done(house.ctl("add", out / "bundle", out / "grant.jwt"))
    stored = snapshot(house.store_folder)
    assert done(house.ctl("rm", "--dry-run", "minilm:1")).out == "would remove minilm:1\n"
    assert done(house.ctl("rm", "--dry-run", "--json", "minilm:1")).json["dry_run"] is True
    assert snapshot(house.store_folder) == stored
    assert done(house.ctl("rm", "minilm:1")).out == "removed minilm:1\n"
    assert snapshot(house.store_folder) == before


@pytest.mark.parametrize("model", ["minilm:2", "other:1"])
def test_rm_of_what_is_not_there(house: Household, out: Path, model: str) -> None:
    done(house.ctl("add", out))
    before = snapshot(house.host)
    refused(house.ctl("rm", model), ModelUnknown.code, model, "there is minilm:1", "sczctl list")
    refused(house.ctl("rm", "--dry-run", model), ModelUnknown.code)
    assert snapshot(house.host) == before


@pytest.mark.parametrize("model", ["minilm", "../models:x", "minilm:../../device.json", "", ":1", "a:b:c", "minilm:."])
def test_rm_of_what_is_no_model(house: Household, out: Path, model: str) -> None:
    done(house.ctl("add", out))
    before = snapshot(house.host)
    misused(house.ctl("rm", model))
    assert snapshot(house.host) == before


def test_rm_on_a_host_without_a_store(house: Household) -> None:
    refused(house.ctl("rm", "minilm:1"), ModelUnknown.code, "there are none")
    assert not house.store_folder.exists()
