"""What is remembered of models that are mounted on the host's side, so that they can be removed whatever happens.

One file a container below `<runtime_directory>/host-mounts`, root's alone, on the disk before the mount becomes visible
and removed after it is gone. A container's end is not always told (`poststop` does not run when the runtime is killed),
so a record also says by what its container is known to be gone: the sandbox's process, the bundle, and the state file
that runsc keeps (`<root>/<container>_sandbox:<sandbox>.state`, in 20221219 and 20240729) once the `create` that ran
the hook has ended. It removes no mount (`delivery.host_mounts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import FileUnreadable, SystemCallFailed
from oci_hook.linux.processes import process_start_time
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import load_root_file, make_private_directory, remove_half_written, replace_file

_LIMIT_BYTES = 256 << 10
_FOLDER, _LOCK = "host-mounts", "host-mounts.lock"


@dataclass(frozen=True, slots=True)
class HostMount:
    """One model.

    Attributes:
        path: On the host.
        fsid: `f_fsid` of its file system.
        device: `major:minor` of its superblock; both together know it again.
    """

    path: str
    fsid: int
    device: str


@dataclass(frozen=True, slots=True)
class HostRecord:
    """The models of one container.

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
        if not _lives(self.sandbox) or not os.path.isdir(self.bundle):
            return True
        return not _lives(self.creator) and not os.path.lexists(self.state_file)

    @property
    def state_file(self) -> str:
        """runsc's own record of the container. Neither id has a colon or a slash."""
        return os.path.join(self.runtime_root, f"{self.container_id}_sandbox:{self.sandbox_id}.state")


def _lives(process: tuple[int, int]) -> bool:
    return process_start_time(process[0]) == process[1]


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

    def write(self, record: HostRecord) -> None:
        """Write a record; it is on the disk when this returns.

        Raises:
            FileUnreadable: It cannot be written.
        """
        make_private_directory(self.runtime_directory)
        make_private_directory(self._directory)
        document = {name: getattr(record, name) for name in HostRecord.__slots__}
        document["mounts"] = [{name: getattr(each, name) for name in HostMount.__slots__} for each in record.mounts]
        replace_file(self._path(record.container_id, record.bundle), canonical(document), mode=0o600)

    def load(self, container_id: str, bundle: str) -> HostRecord | None:
        """A container's record; None if there is none.

        Raises:
            FileUnreadable: It cannot be read, or was not written by us.
        """
        path = self._path(container_id, bundle)
        return _load(path) if os.path.lexists(path) else None

    def all(self) -> tuple[tuple[HostRecord, ...], tuple[str, ...]]:
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

    def remove(self, record: HostRecord) -> None:
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


def _load(path: str) -> HostRecord:
    data = load_root_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)
    document = parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable)
    fields = Fields(document, what=path, error=FileUnreadable)
    record = HostRecord(
        container_id=fields.string("container_id"),
        bundle=fields.string("bundle", limit=4096),
        namespace=_pair(fields, "namespace", path),
        runtime_root=fields.string("runtime_root", limit=4096),
        sandbox_id=fields.string("sandbox_id"),
        runtime_executable=fields.string("runtime_executable", limit=4096),
        sandbox=_pair(fields, "sandbox", path),
        creator=_pair(fields, "creator", path),
        mounts=fields.items("mounts", lambda value: _mount(value, path), low=1, high=64),
    )
    fields.finish()
    return record


def _pair(fields: Fields, name: str, path: str) -> tuple[int, int]:
    values = tuple(fields.items(name, lambda value: _number(value, path), low=2, high=2))
    return values[0], values[1]


def _number(value: object, path: str) -> int:
    if type(value) is not int or value < 0:
        raise FileUnreadable(f"{path}: a number is none")
    return value


def _mount(value: object, path: str) -> HostMount:
    fields = Fields(value, what=path, error=FileUnreadable)
    mount = HostMount(
        path=fields.string("path", limit=1 << 13),
        fsid=fields.integer("fsid", low=0, high=(1 << 64) - 1),
        device=fields.string("device", pattern=r"[0-9]+:[0-9]+"),
    )
    fields.finish()
    return mount
