"""Intake: what a host takes into its store. Everything is verified first, on a private copy; then placed, names last.

A folder or files may hold a bundle (an OCI layout), grants and boot policies in any mixture. What one of them fails,
nothing of them enters; but a list of revocations does though one of its owner's grants is of no use here. A crash
between two placements leaves a bundle without a name, a grant or a policy more: all of them verified, none of them
reachable by an annotation until its name is there. Which of two documents stays is `precedence`'s, the placing
`placement`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oci_hook.attestation.boot_policy import BootPolicy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant, verify_grant_signature
from oci_hook.bundle.layout import BLOBS, INDEX_FILE, LAYOUT_FILE, Layout, open_layout, verify_bundle, verify_digests
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.revocations import Revocations
from oci_hook.copying import copy_blob, is_shared, write_new
from oci_hook.disk_space import Need, block_bytes, full_disk_explained, verify_room
from oci_hook.errors import (
    BundleInvalid,
    DeviceNotEnrolled,
    GrantRefused,
    ModelUnknown,
    OutputExists,
    SczError,
    StoreInvalid,
)
from oci_hook.incoming import Incoming
from oci_hook.placement import locked, place, staging
from oci_hook.precedence import LeftOut, Precedence, Settled, verified_policy, words
from oci_hook.provenance import find_owner, verified_manifest, verify_device
from oci_hook.revoked import Counting, IncomingList, verify_incoming
from oci_hook.store import Store, StoredModel, system_calls
from oci_hook.trust import Owner
from oci_hook.trusted_file import load_file, sync_directory

Progress = Callable[[int], object]
_SMALL_BYTES = 4096  # of an index or a grant: a block
_ADD_AGAIN = "`sczctl add` this folder again, for the grant"
_MAKE_ROOM = (
    "make room: `sczctl list` and `sczctl rm NAME:VERSION` of a model that is no longer needed, or free {size} on "
    "{mount} (`df -h {mount}`); then `sczctl add` again"
)


@dataclass(frozen=True, slots=True)
class Taken:
    """What entered the store; and what came beside a list and was left out."""

    models: tuple[StoredModel, ...]
    grants: tuple[Grant, ...]
    boot_policies: tuple[BootPolicy, ...]
    revocations: tuple[Revocations, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class Intake:
    """One run of `sczctl add`.

    Args:
        store: Where to.
        owners: Whom this host trusts.
        device: This host's enrolment, for grants; None if it is not enrolled.
        replace: Whether a version may get other contents.
        without_bundle: Whether a grant's bundle may be elsewhere, in images that carry it.
        progress: Called with the bytes done so far, of `measure`.
        counting: The owners' counters, for lists of revocations; None: a list is refused.
    """

    def __init__(
        self,
        store: Store,
        owners: Sequence[Owner],
        device: HostDevice | None,
        *,
        replace: bool = False,
        without_bundle: bool = False,
        progress: Progress = lambda _done: None,
        counting: Counting | None = None,
    ) -> None:
        self._store = store
        self._owners = owners
        self._device = device
        self._replace = replace
        self._without_bundle = without_bundle
        self._progress = progress
        self._counting = counting
        self._lists: list[IncomingList] = []
        self._unusable: list[LeftOut] = []
        self._done = 0
        self._models: dict[tuple[str, str], tuple[StoredModel, Manifest]] = {}
        self._carried: dict[tuple[str, str], StoredModel] = {}

    def verify(self, incoming: Incoming) -> Taken:
        """Verify everything where it is, and change nothing: what `take` would give now.

        Raises:
            SczError: The first check that failed.
        """
        for path in incoming.bundles:
            with open_layout(path) as layout:
                model, manifest = self._verified_bundle(path, layout)
                verify_digests(layout, manifest, self._counted())
            self._models[model.name, model.version] = model, manifest
        self._lists = self._verified_lists(incoming)
        return self._taken(self._settled(self._grants(incoming), self._policies(incoming)))

    def take(self, incoming: Incoming) -> Taken:
        """Verify everything, then place it, lists of revocations first; at the end the counters are counted up.

        While a list is here and its count not at the end nothing of its owner starts (76); the same call again goes on.

        Raises:
            SczError: The first check that failed; nothing was placed.
            FileUnreadable: Also if the disk has no room.
        """
        with (
            full_disk_explained(self._store.nearest_folder(), lambda: self._need(incoming)),
            staging(self._store) as folder,
        ):
            self._verify_room(incoming, folder)
            staged = [(self._stage(path, os.path.join(folder, str(n))), n) for n, path in enumerate(incoming.bundles)]
            self._lists = self._verified_lists(incoming)
            grants, policies = self._grants(incoming), self._policies(incoming)
            self._settled(grants, policies)  # refuses before the lock is waited for
            with locked(self._store):
                for model, _ in self._models.values():
                    self._verify_name_is_free(model)  # again: another `add` may have been faster
                for carried in self._carried.values():
                    self._verify_name_is_free(carried)
                bundles = [(os.path.join(folder, str(n)), digest) for digest, n in staged if digest is not None]
                self._lists = self._verified_lists(incoming)  # again, as well
                settled = self._settled(grants, policies)
                taken = self._taken(settled)
                place(self._store, bundles, self._documents(settled, taken.models))
                for each in self._lists:
                    each.count_up()
        return taken

    def _documents(self, settled: Settled, models: Sequence[StoredModel]) -> list[tuple[str, bytes]]:
        """Paths and contents in the order in which `place` puts them there."""
        lists = [(each.revocations.owner_id, each.compact) for each in self._lists]
        documents = [(self._store.revocations_path(owner_id), data) for owner_id, data in lists]
        documents += [(self._store.grant_path(grant.manifest_digest), data) for grant, data in settled.grants]
        documents += [
            (self._store.boot_policy_path(policy.owner_id, policy.model_name, policy.device_class), data)
            for policy, data in settled.policies
        ]
        return documents + [self._store.name_entry(model) for model in models]

    def _taken(self, settled: Settled) -> Taken:
        return Taken(
            (*(model for model, _ in self._models.values()), *self._carried.values()),
            tuple(grant for grant, _ in settled.grants),
            tuple(policy for policy, _ in settled.policies),
            tuple(each.revocations for each in self._lists),
            (*self._unusable, *settled.left_out),
        )

    # --- lists of revocations ---

    def _verified_lists(self, incoming: Incoming) -> list[IncomingList]:
        return verify_incoming(incoming.revocations, self._store, self._owners, self._device, self._counting)

    # --- bundles ---

    def _verify_room(self, incoming: Incoming, folder: str) -> None:
        """Look before hours of copying; where a copy shares its blocks with the source, it takes none."""
        with system_calls(folder):
            verify_room(folder, self._need(incoming, folder))

    def _need(self, incoming: Incoming, folder: str | None = None) -> Need:
        """The room that the copies take; with a folder of the store's, without those that take none there."""
        documents = len(incoming.grants) + len(incoming.boot_policies) + len(incoming.revocations)
        sizes = [_SMALL_BYTES] * documents
        for path in incoming.bundles:
            with open_layout(path) as layout:
                if folder is None or not is_shared(layout, folder):
                    sizes += [_SMALL_BYTES] * 2 + [_size_of(path, digest) for digest in _digests(layout)]
        return Need.of(sizes, block_bytes(self._store.nearest_folder()), _MAKE_ROOM)

    def _verified_bundle(self, source: str, layout: Layout) -> tuple[StoredModel, Manifest]:
        manifest, _ = verified_manifest(layout, self._owners)
        model = StoredModel(
            manifest.model.name, manifest.model.version, layout.image_digest, manifest.digest, manifest.owner_id
        )
        self._verify_name_is_free(model)
        other, _ = self._models.get((model.name, model.version), (model, manifest))
        if other != model:
            raise OutputExists(
                f"{source} is a second, different bundle of {model.name}:{model.version}", remedy="give one of them"
            )
        return model, manifest

    def _stage(self, source: str, target: str) -> str | None:
        """Copy a bundle and verify the copy; returns its image digest."""
        with open_layout(source) as layout:
            model, manifest = self._verified_bundle(source, layout)
            self._copy(source, layout, target)
        with open_layout(target) as copied:  # what is verified is the copy that stays
            if copied.image_digest != model.image_digest:
                raise BundleInvalid(f"{source} changed while it was copied")
            verify_bundle(copied, manifest)
            verify_digests(copied, manifest, self._counted())
        self._models[model.name, model.version] = model, manifest
        return model.image_digest

    def _verify_name_is_free(self, model: StoredModel) -> None:
        if self._replace or not self._store.knows(model.name, model.version):
            return
        try:
            known = self._store.load_model(model.name, model.version)
        except StoreInvalid:
            return  # damaged: what its owner signed takes its place
        # Of one whose bundle images carry, the bundle may come later; the manifest stays.
        if known.manifest_digest != model.manifest_digest or known.image_digest not in (None, model.image_digest):
            raise OutputExists(
                f"{model.name}:{model.version} is in the store with other contents",
                remedy=f"give --replace, or `sczctl rm {model.name}:{model.version}` first",
            )

    def _copy(self, source: str, layout: Layout, target: str) -> None:
        blobs = os.path.join(target, *BLOBS)
        with system_calls(target):
            os.makedirs(blobs, mode=0o700)
            for name in (LAYOUT_FILE, INDEX_FILE):
                path = os.path.join(source, name)
                write_new(os.path.join(target, name), load_file(path, limit_bytes=1 << 16, error=BundleInvalid))
        for digest in _digests(layout):
            descriptor = layout.open_blob(digest)
            try:
                for count in copy_blob(descriptor, os.path.join(blobs, digest.removeprefix("sha256:"))):
                    self._advance(count)
            finally:
                os.close(descriptor)
        for folder in (blobs, os.path.dirname(blobs), target):
            with system_calls(folder):
                sync_directory(folder)

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done)

    def _counted(self) -> Progress:
        """A progress function for one more part of the work: it takes the bytes done of that part."""
        before = self._done

        def count(done: int) -> None:
            self._done = before + done
            self._progress(self._done)

        return count

    # --- grants and boot policies ---

    def _settled(self, grants: Sequence[tuple[Grant, bytes]], policies: Sequence[tuple[BootPolicy, bytes]]) -> Settled:
        precedence = Precedence(self._store, self._owners, self._device, self._values(), replace=self._replace)
        return precedence.settle(grants, policies)

    def _values(self) -> dict[str, int]:
        """Each owner's list that comes, by its value; the highest is the last one."""
        return {each.revocations.owner_id: each.revocations.value for each in self._lists}

    def _grants(self, incoming: Incoming) -> list[tuple[Grant, bytes]]:
        self._unusable = []
        grants = []
        for data in incoming.grants:
            grant = self._verified_grant(data)
            try:
                self._verify_model(grant, data)
            except SczError as error:
                # A revocation grants anew what the device may have, whether it is here or not, damaged or whole.
                if grant.owner_id not in self._values():
                    raise
                self._unusable.append(LeftOut.of(words(grant), error, remedy=f"{error.advice}; then {_ADD_AGAIN}"))
                continue
            grants.append((grant, data))
        return grants

    def _policies(self, incoming: Incoming) -> list[tuple[BootPolicy, bytes]]:
        return [(verified_policy(data, self._owners), data) for data in incoming.boot_policies]

    def _verified_grant(self, data: bytes) -> Grant:
        unverified = parse_grant(data)
        grant = verify_grant_signature(unverified, owner=find_owner(unverified.owner_id, self._owners))
        if self._device is None:
            raise GrantRefused("this host is not enrolled, so no grant is for it", remedy=DeviceNotEnrolled.remedy)
        verify_device(grant, self._device)
        return grant

    def _verify_model(self, grant: Grant, data: bytes) -> None:
        """Check that a verified grant is for the model that has its name, which is here or comes along."""
        manifest = self._manifest(grant)
        if manifest is not None:
            verify_grant(parse_grant(data), owner=find_owner(grant.owner_id, self._owners), manifest=manifest)

    def _manifest(self, grant: Grant) -> Manifest | None:
        """The verified manifest of the grant's model: from a bundle that comes with it, or from the store.

        None where an image carries it: the hook then checks at each start what is checked here otherwise.
        """
        name, version = grant.model.name, grant.model.version
        if (name, version) in self._models:
            return self._models[name, version][1]
        known = self._store.load_model(name, version) if self._store.knows(name, version) else None
        if known is None or known.image_digest is None:
            if self._without_bundle or known is not None:
                carried = StoredModel(name, version, None, grant.manifest_digest, grant.owner_id)
                self._verify_name_is_free(carried)
                self._carried[name, version] = carried
                return None
            raise ModelUnknown(
                f"the grant is for {name}:{version}, which is not in the store",
                remedy="add the bundle with its grant, or give --without-bundle if images carry it (rootfs:)",
            )
        with self._store.open_model(known) as layout:
            return verified_manifest(layout, self._owners)[0]


def _digests(layout: Layout) -> list[str]:
    """Every blob of a bundle once."""
    return list(dict.fromkeys([layout.image_digest, layout.manifest_digest, *(item.digest for item in layout.layers)]))


def _size_of(bundle: str, digest: str) -> int:
    """What a blob has now, whatever the image manifest says; 0 if it is not there."""
    try:
        return os.lstat(os.path.join(bundle, *BLOBS, digest.removeprefix("sha256:"))).st_size
    except OSError:
        return 0
