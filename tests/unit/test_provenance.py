"""`provenance`: a bundle is by a trusted owner or by nobody; a grant is for this device or for another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.bundle.grant import Grant, parse_grant, verify_grant
from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.segments import ContentKey
from oci_hook.errors import BundleInvalid, BundleMismatch, GrantRefused, OwnerUntrusted
from oci_hook.provenance import find_owner, verified_manifest, verify_device
from tests.bundles import FILES, MODEL, OwnerKeys, make_owner, pack_files, write_source
from tests.commands import Household, flip_bit
from tests.devices import make_device

OWNER, OTHER = make_owner("acme"), make_owner("evil")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return packed(tmp_path, OWNER)


def packed(folder: Path, keys: OwnerKeys, name: str = "bundle") -> Path:
    source = write_source(folder / f"{name}-source", FILES)
    pack_files(keys, ContentKey(bytes(32)), source, folder / name)
    return folder / name


def test_an_owner_is_found_by_its_id_alone() -> None:
    assert find_owner(OWNER.owner.owner_id, [OTHER.owner, OWNER.owner]) is OWNER.owner
    for owners in ([], [OTHER.owner]):
        with pytest.raises(OwnerUntrusted, match=OWNER.owner.owner_id):
            find_owner(OWNER.owner.owner_id, owners)


def test_a_name_that_is_not_an_id_reaches_the_message_harmlessly() -> None:
    with pytest.raises(OwnerUntrusted) as caught:
        find_owner("\x1b[2J\n" + "x" * 500, [OWNER.owner])
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


def test_a_trusted_owner_s_bundle_is_verified_with_its_owner(bundle: Path) -> None:
    with open_layout(bundle) as layout:
        manifest, owner = verified_manifest(layout, [OTHER.owner, OWNER.owner])
    assert (manifest.model, owner, manifest.owner_id) == (MODEL, OWNER.owner, OWNER.owner.owner_id)


def test_a_bundle_by_nobody_whom_the_host_trusts_is_refused(bundle: Path) -> None:
    with open_layout(bundle) as layout:
        for owners in ([], [OTHER.owner]):
            with pytest.raises(OwnerUntrusted):
                verified_manifest(layout, owners)


def test_the_layers_are_the_signed_ones(tmp_path: Path, bundle: Path) -> None:
    other = packed(tmp_path, OTHER, "other")
    with open_layout(bundle) as layout, open_layout(other) as donor:
        layout.layers = donor.layers
        with pytest.raises(BundleMismatch):
            verified_manifest(layout, [OWNER.owner, OTHER.owner])


def test_a_manifest_that_is_no_manifest(bundle: Path) -> None:
    with open_layout(bundle) as layout:
        layout.config_blob = b"hello"
        with pytest.raises(BundleInvalid):
            verified_manifest(layout, [OWNER.owner])


def test_a_manifest_with_one_flipped_bit(bundle: Path) -> None:
    with open_layout(bundle) as layout:
        name = layout.manifest_digest.removeprefix("sha256:")
    flip_bit(bundle / "blobs" / "sha256" / name)
    with pytest.raises(BundleMismatch), open_layout(bundle) as layout:
        verified_manifest(layout, [OWNER.owner])


@pytest.fixture
def granted(tmp_path: Path) -> tuple[Household, Grant]:
    house = Household(tmp_path / "house")
    house.enrolled()
    out = house.pack()
    path = house.grant(out)
    with open_layout(out / "bundle") as layout:
        manifest, owner = verified_manifest(layout, [house.owner])
    return house, verify_grant(parse_grant(path.read_bytes()), owner=owner, manifest=manifest)


def test_a_grant_is_for_the_device_that_it_names(granted: tuple[Household, Grant]) -> None:
    house, grant = granted
    verify_device(grant, house.devices["edge-1"].host)
    with pytest.raises(GrantRefused, match="edge-1"):
        verify_device(grant, make_device(house.owner.owner_id).host)


@pytest.mark.parametrize("part", ["srk", "ak"])
def test_both_keys_count(granted: tuple[Household, Grant], part: str) -> None:
    house, grant = granted
    host, other = house.devices["edge-1"].host, make_device(house.owner.owner_id).host
    mixed = replace(host, **{part: getattr(other, part)})
    with pytest.raises(GrantRefused):
        verify_device(grant, mixed)
