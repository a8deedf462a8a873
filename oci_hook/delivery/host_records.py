"""What is remembered of models that are mounted on the host's side, so that they can be removed whatever happens.

One file a container below `<runtime_directory>/host-mounts`, root's alone, on the disk before the mount becomes visible
and removed after it is gone. A container's end is not always told (`poststop` does not run when the runtime is killed),
so a record also says by what its container is known to be gone. Of a gVisor pod's: the sandbox's process, the bundle,
and the state file that runsc keeps (`<root>/<container>_sandbox:<sandbox>.state`, in 20221219 and 20240729) once the
`create` that ran the hook has ended. Of one whose models came before `create`: `delivery.bound_record` says it. It
removes no mount (`delivery.host_mounts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from oci_hook.delivery.bound_record import (
    KIND,
    NOBODY,
    BoundRecord,
    HostMount,
    lives,
    read_mount,
    take_bound,
    take_pair,
)
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import FileUnreadable, HolderRefused, SystemCallFailed
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import load_root_file, make_private_directory, remove_half_written, replace_file

__all__ = ["NOBODY", "BoundRecord", "HostMount", "HostRecord", "HostRecords", "Record"]

_LIMIT_BYTES = 256 << 10
_FOLDER, _LOCK = "host-mounts", "host-mounts.lock"


@dataclass(frozen=True, slots=True)
class HostRecord:
    """The models of one container of a gVisor pod.

    Attributes:
        container_id: The state's `id`.
        bundle: The state's `bundle`.
        namespace: Device and inode of the mount namespace that they are in.
        runtime_root: Where the runtime keeps its state files.
        sandbox_id: As the runtime names the pod's sandbox.
        runtime_executable: For people.
        sandbox: Pid and start time of the pod's sandbox.
        creator: Pid and start time of the runtime's `create`.
        mounts: The models.
    """

    container_id: str
    bundle: str
    namespace: tuple[int, int]
    runtime_root: str
    sandbox_id: str
    runtime_executable: str
    sandbox: tuple[int, int]
    creator: tuple[int, int]
    mounts: tuple[HostMount, ...]

    def is_stale(self) -> bool:
        """Whether its container is known to be gone."""
        if not lives(self.sandbox) or not os.path.isdir(self.bundle):
            return True
        return not lives(self.creator) and not os.path.lexists(self.state_file)

    @property
    def state_file(self) -> str:
        """runsc's own record of the container. Neither id has a colon or a slash."""
        return os.path.join(self.runtime_root, f"{self.container_id}_sandbox:{self.sandbox_id}.state")


Record = HostRecord | BoundRecord


class HostRecords:
    """The records of one runtime directory, with the lock that whoever mounts or removes holds.

    Attributes:
        runtime_directory: Root's own, such as /run/scz-smm.
    """

    def __init__(self, runtime_directory: str) -> None:
        self.runtime_directory = runtime_directory
        self._directory = os.path.join(runtime_directory, _FOLDER)

    def exist(self) -> bool:
        """Whether there may be any: a start without them costs one look."""
        try:
            return bool(os.listdir(self._directory))
        except OSError:
            return False

    def open_lock(self) -> int:
        """Open the lock's file; whoever has a duplicate of the descriptor holds the lock with its owner.

        Raises:
            FileUnreadable: It cannot be made.
        """
        make_private_directory(self.runtime_directory)
        path = os.path.join(self.runtime_directory, _LOCK)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as cause:
            raise FileUnreadable(f"{path}: {cause.strerror}") from cause

    @contextlib.contextmanager
    def locked(self, *, timeout_seconds: float) -> Iterator[None]:
        """Hold the lock inside the block.

        Raises:
            SystemCallFailed: Others held it for longer.
            FileUnreadable: It cannot be locked.
        """
        descriptor = self.open_lock()
        try:
            lock_descriptor(descriptor, what=_LOCK, timeout_seconds=timeout_seconds, error=SystemCallFailed)
            yield
        finally:
            os.close(descriptor)

    def _path(self, container_id: str, bundle: str) -> str:
        name = hashlib.sha256(f"{container_id}\0{bundle}".encode()).hexdigest()
        return os.path.join(self._directory, f"{name}.json")

    def write(self, record: Record) -> None:
        """Write a record; it is on the disk when this returns.

        Raises:
            FileUnreadable: It cannot be written.
        """
        make_private_directory(self.runtime_directory)
        make_private_directory(self._directory)
        document = asdict(record)
        if isinstance(record, BoundRecord):
            document["kind"] = KIND
        else:
            for mount in document["mounts"]:
                del mount["destination"]
        replace_file(self._path(record.container_id, record.bundle), canonical(document), mode=0o600)

    def load(self, container_id: str, bundle: str) -> Record | None:
        """A container's record; None if there is none.

        Raises:
            FileUnreadable: It cannot be read, or was not written by us.
        """
        path = self._path(container_id, bundle)
        return _load(path) if os.path.lexists(path) else None

    def find(self, container_id: str, bundle: str) -> Record | None:
        """A container's record; also one that was made before its bundle was known, or by its bundle's real path.

        Two namespaces of containerd may use one id: a record without a bundle that a living process has adopted is not
        that of a container which names its own.

        Args:
            container_id: The engine's.
            bundle: Empty: not known; then the one record of this id whose models came before `create`.

        Raises:
            HolderRefused: No bundle is known, and there are several records of this id.
            FileUnreadable: It cannot be read, or was not written by us.
        """
        for path in dict.fromkeys((bundle, os.path.realpath(bundle) if bundle else "", "")):
            record = self.load(container_id, path)
            if record is None or (path != bundle and not isinstance(record, BoundRecord)):
                continue
            if path or not bundle or not (isinstance(record, BoundRecord) and record.is_held_by_another(NOBODY)):
                return record
        if bundle:
            return None
        of_this_id = [each for each in self.bound() if each.container_id == container_id]
        if len(of_this_id) > 1:
            bundles = ", ".join(shown(each.bundle) for each in of_this_id)
            raise HolderRefused(
                f"models were made ready for several containers {shown(container_id)}, and it is not known which is "
                f"meant: {bundles}",
                remedy="end the others of this id; then `sczctl sweep`",
            )
        return of_this_id[0] if of_this_id else None

    def may_concern(self, container_id: str, bundle: str) -> bool:
        """Whether models came before a `create` of this id, with this bundle or before one was known.

        Raises:
            FileUnreadable: A record cannot be read, or was not written by us.
        """
        paths = dict.fromkeys((bundle, os.path.realpath(bundle), ""))
        return any(isinstance(self.load(container_id, path), BoundRecord) for path in paths)

    def bound(self) -> tuple[BoundRecord, ...]:
        """Every record of a container whose models came before `create`."""
        return tuple(record for record in self.all()[0] if isinstance(record, BoundRecord))

    def all(self) -> tuple[tuple[Record, ...], tuple[str, ...]]:
        """Every record, and why others cannot be read: one bad file must not keep the rest from being removed."""
        found, unreadable = [], []
        for name in sorted(os.listdir(self._directory)) if os.path.isdir(self._directory) else []:
            path = os.path.join(self._directory, name)
            if name.startswith("."):
                continue  # half-written
            try:
                found.append(_load(path))
            except FileUnreadable as cause:
                unreadable.append(cause.message)
        return tuple(found), tuple(unreadable)

    def remove_half_written(self) -> None:
        """Remove what killed writers left; the caller holds the lock."""
        remove_half_written(self._directory, nobody_writes=True)

    def remove(self, record: Record) -> None:
        """Forget a record.

        Raises:
            FileUnreadable: It cannot be removed.
        """
        path = self._path(record.container_id, record.bundle)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as cause:
            raise FileUnreadable(f"{path}: {cause.strerror}") from cause


def _load(path: str) -> Record:
    data = load_root_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)
    document = parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable)
    fields = Fields(document, what=path, error=FileUnreadable)
    record: Record
    if fields.has("kind"):
        fields.literal("kind", KIND)
        record = take_bound(fields, path)
    else:
        record = HostRecord(
            container_id=fields.string("container_id"),
            bundle=fields.string("bundle", limit=4096),
            namespace=take_pair(fields, "namespace", path),
            runtime_root=fields.string("runtime_root", limit=4096),
            sandbox_id=fields.string("sandbox_id"),
            runtime_executable=fields.string("runtime_executable", limit=4096),
            sandbox=take_pair(fields, "sandbox", path),
            creator=take_pair(fields, "creator", path),
            mounts=fields.items("mounts", lambda value: read_mount(value, path, bound=False), low=1, high=64),
        )
    fields.finish()
    return record
