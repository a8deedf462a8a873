"""Provenance: who signed a bundle, and whether a grant is for this device; for the hook and for `sczctl add`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oci_hook.attestation.host_device import HostDevice
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.layout import Layout, verify_bundle
from oci_hook.bundle.manifest import Manifest, parse_manifest, verify_manifest
from oci_hook.documents import shown
from oci_hook.errors import GrantRefused, OwnerUntrusted
from oci_hook.trust import Owner


def find_owner(owner_id: str, owners: Sequence[Owner]) -> Owner:
    """The trusted owner with that id.

    Raises:
        OwnerUntrusted: There is none.
    """
    for owner in owners:
        if owner.owner_id == owner_id:
            return owner
    raise OwnerUntrusted(f"no trusted owner has the id {shown(owner_id)}")


def verified_manifest(layout: Layout, owners: Sequence[Owner]) -> tuple[Manifest, Owner]:
    """A layout's manifest, verified as a trusted owner's, and the layout verified against it.

    Raises:
        OwnerUntrusted: By nobody whom this host trusts.
        BundleMismatch: The layout is not what the owner signed.
        BundleInvalid: Malformed.
    """
    unverified = parse_manifest(layout.config_blob)
    owner = find_owner(unverified.owner_id, owners)
    manifest = verify_manifest(unverified, owner)
    verify_bundle(layout, manifest)
    return manifest, owner


@dataclass(frozen=True, slots=True)
class SignedBundle:
    """An open bundle, its manifest, and the trusted owner who signed that; made by `verify_signed`."""

    layout: Layout
    manifest: Manifest
    owner: Owner


def verify_signed(layout: Layout, owners: Sequence[Owner]) -> SignedBundle:
    """A bundle and who signed it; it stays the caller's to close. Raises as `verified_manifest`."""
    return SignedBundle(layout, *verified_manifest(layout, owners))


def verify_device(grant: Grant, device: HostDevice) -> None:
    """A grant is for this device if it names this device's SRK and AK.

    Raises:
        GrantRefused: It names others.
    """
    if (grant.srk_name, grant.ak_name) != (device.srk.name, device.ak.name):
        raise GrantRefused(f"the grant is for the device {grant.device_name}, whose keys are not this one's")
