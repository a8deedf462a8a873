"""Intake: what a host takes into its store. Everything is verified first, on a private copy; then placed, names last.

A folder or files may hold a bundle (an OCI layout), grants and boot policies in any mixture. What one of them fails,
nothing of them enters. A crash between two placements leaves a bundle without a name, a grant or a policy more: all of
them verified, none of them reachable by an annotation until its name is there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant
from oci_hook.bundle.layout import BLOBS, INDEX_FILE, LAYOUT_FILE, Layout, open_layout, verify_digests
from oci_hook.bundle.manifest import Manifest
from oci_hook.errors import (
    BundleInvalid,
    DeviceNotEnrolled,
    FileUnreadable,
    GrantRefused,
    ModelUnknown,
    OutputExists,
    SczError,
)
from oci_hook.provenance import find_owner, verified_manifest, verify_device
from oci_hook.store import Store, StoredModel
from oci_hook.trust import Owner
from oci_hook.trusted_file import load_file, sync_directory

_DOCUMENT_BYTES = 1 << 20
_MAX_ENTRIES = 1000
Progress = Callable[[int], object]


@dataclass(slots=True)
class Incoming:
    """What was found below the given paths, sorted by kind; nothing of it is verified."""

    bundles: list[str] = field(default_factory=list)
    grants: list[bytes] = field(default_factory=list)
    boot_policies: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Taken:
    """What entered the store."""

    models: tuple[StoredModel, ...]
    grants: tuple[Grant, ...]
    boot_policies: tuple[BootPolicy, ...]


def collect(paths: Iterable[str]) -> Incoming:
    """Sort files and folders by what they are: a folder with `oci-layout` is a bundle, any other is looked into.

    Raises:
        FileUnreadable: A path is absent or cannot be read.
        BundleInvalid: A folder holds too much to be what was meant, or a file is none of ours.
    """
    incoming = Incoming()
    for path in paths:
        _collect(path, incoming, depth=0)
    return incoming


def _collect(path: str, incoming: Incoming, depth: int) -> None:
    try:
        mode = os.stat(path).st_mode if depth == 0 else os.lstat(path).st_mode
        entries = sorted(os.listdir(path)) if stat.S_ISDIR(mode) else []
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    if LAYOUT_FILE in entries:
        incoming.bundles.append(path)
    elif stat.S_ISDIR(mode):
        if depth > 1 or len(entries) > _MAX_ENTRIES:
            raise BundleInvalid(f"{path} is not a folder with a bundle, a grant and a boot policy")
        for entry in entries:
            _collect(os.path.join(path, entry), incoming, depth + 1)
    elif path.endswith(".jwt"):
        incoming.grants.append(load_file(path, limit_bytes=_DOCUMENT_BYTES, error=BundleInvalid))
    elif path.endswith(".json"):
        incoming.boot_policies.append(load_file(path, limit_bytes=_DOCUMENT_BYTES, error=BundleInvalid))
    else:
        raise BundleInvalid(f"{path} is neither a bundle's folder, a grant (.jwt) nor a boot policy (.json)")


class Intake:
    """One run of `sczctl add`.

    Args:
        store: Where to.
        owners: Whom this host trusts.
        device: This host's enrolment, for grants; None if it is not enrolled.
    """

    def __init__(self, store: Store, owners: Sequence[Owner], device: HostDevice | None) -> None:
        self._store = store
        self._owners = owners
        self._device = device
        self._progress: Progress = lambda _done: None
        self._done = 0
        self._manifests: dict[str, Manifest] = {}

    def measure(self, incoming: Incoming) -> int:
        """The bytes that `take` will report as done at its end: each layer is copied, then verified."""
        total = 0
        for path in incoming.bundles:
            with open_layout(path) as layout:
                total += 2 * sum(layer.size for layer in layout.layers)
        return total

    def take(self, incoming: Incoming, progress: Progress, *, replace: bool = False) -> Taken:
        """Verify everything, then place it.

        Args:
            incoming: From `collect`.
            progress: Called with the bytes done so far, of `measure`.
            replace: Whether a version may get other contents.

        Raises:
            SczError: The first check that failed; nothing was placed.
        """
        self._progress, self._done = progress, 0
        with contextlib.ExitStack() as stack:
            staged = [
                self._stage(path, stack.enter_context(self._store.staging()), replace) for path in incoming.bundles
            ]
            grants = [(self._verified_grant(data), data) for data in incoming.grants]
            policies = [(self._verified_policy(data), data) for data in incoming.boot_policies]
            for folder, model in staged:
                self._store.place_bundle(folder, model.image_digest)
            for grant, data in grants:
                self._store.place_grant(grant.manifest_digest, data)
            for policy, data in policies:
                self._store.place_boot_policy(policy.owner_id, policy.model_name, policy.device_class, data)
            for _, model in staged:
                self._store.place_name(model)
        return Taken(
            tuple(model for _, model in staged),
            tuple(grant for grant, _ in grants),
            tuple(policy for policy, _ in policies),
        )

    def _stage(self, source: str, target: str, replace: bool) -> tuple[str, StoredModel]:
        with open_layout(source) as layout:
            manifest, _ = verified_manifest(layout, self._owners)
            model = StoredModel(
                manifest.model.name, manifest.model.version, layout.image_digest, manifest.digest, manifest.owner_id
            )
            self._verify_name_is_free(model, replace)
            self._copy(source, layout, target)
        with open_layout(target) as copied:  # what is verified is the copy that stays
            if copied.image_digest != model.image_digest:
                raise BundleInvalid(f"{source} changed while it was copied")
            before = self._done
            verify_digests(copied, manifest, lambda done: self._advance(before + done))
        self._manifests[manifest.digest] = manifest
        return target, model

    def _verify_name_is_free(self, model: StoredModel, replace: bool) -> None:
        for other in self._store.models():
            same_name = (other.name, other.version) == (model.name, model.version)
            if same_name and other.image_digest != model.image_digest and not replace:
                raise OutputExists(
                    f"{model.name}:{model.version} is in the store with other contents",
                    remedy=f"give --replace, or `sczctl rm {model.name}:{model.version}` first",
                )

    def _copy(self, source: str, layout: Layout, target: str) -> None:
        blobs = os.path.join(target, *BLOBS)
        os.makedirs(blobs, mode=0o700)
        for name in (LAYOUT_FILE, INDEX_FILE):
            _write(
                os.path.join(target, name),
                load_file(os.path.join(source, name), limit_bytes=1 << 16, error=BundleInvalid),
            )
        for digest in dict.fromkeys((layout.image_digest, layout.manifest_digest, *(x.digest for x in layout.layers))):
            descriptor = layout.open_blob(digest)
            try:
                for count in _copy_blob(descriptor, os.path.join(blobs, digest.removeprefix("sha256:"))):
                    self._advance(self._done + count)
            finally:
                os.close(descriptor)
        sync_directory(blobs)
        sync_directory(target)

    def _advance(self, done: int) -> None:
        self._done = done
        self._progress(done)

    def _verified_grant(self, data: bytes) -> Grant:
        unverified = parse_grant(data)
        owner = find_owner(unverified.owner_id, self._owners)
        refusal: SczError | None = None
        for manifest in (*self._manifests.values(), *self._stored_manifests(owner)):
            try:
                grant = verify_grant(unverified, owner=owner, manifest=manifest)
            except GrantRefused as cause:
                refusal = cause
                continue
            self._verify_device(grant)
            return grant
        raise refusal or ModelUnknown("the grant's model is not in the store", remedy="add the bundle with its grant")

    def _verify_device(self, grant: Grant) -> None:
        if self._device is None:
            raise GrantRefused("this host is not enrolled, so no grant is for it", remedy=DeviceNotEnrolled.remedy)
        verify_device(grant, self._device)

    def _stored_manifests(self, owner: Owner) -> Iterable[Manifest]:
        for model in self._store.models():
            if model.owner_id == owner.owner_id and model.manifest_digest not in self._manifests:
                with self._store.open_model(model) as layout:
                    yield verified_manifest(layout, self._owners)[0]

    def _verified_policy(self, data: bytes) -> BootPolicy:
        unverified = parse_boot_policy(data)
        return verify_boot_policy(
            unverified,
            owner=find_owner(unverified.unverified_owner_id, self._owners),
            model_name=unverified.unverified_model_name,
            device_class=unverified.unverified_device_class,
        )


def _write(path: str, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_blob(source: int, path: str) -> Iterable[int]:
    """Copy in the kernel (a reflink where the file system can); yields the bytes of each step."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        while count := os.copy_file_range(source, target, 16 << 20):
            yield count
        os.fsync(target)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    finally:
        os.close(target)
