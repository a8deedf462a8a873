"""Models that are mounted on the host's side of a root file system: taken away when their container is gone.

A mount is ours if its superblock's number *and* its `f_fsid` are those of the record; it is looked for among all mounts
of this namespace, wherever its directory has been moved to. What else lies there is left alone, and said. The file
system is emptied before its last record goes: whoever has a copy of the mount, or a file of it, in another namespace
reads nothing any more.

`close` is for poststop, `sweep` for every start and for a timer. Both wait for a hook that is about to attach.
Specification: docs/design.md, "Delivery".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from oci_hook.delivery.bound_folders import folders, remove_abandoned, remove_folder
from oci_hook.delivery.holder import open_directory, own_mount_namespace
from oci_hook.delivery.host_records import BoundRecord, HostMount, HostRecords, Record
from oci_hook.errors import HolderGone, SczError
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import Mount
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.records import ContainerRecords

_LOCK_SECONDS = 60.0
_CHILD_SECONDS = 60.0
_INIT = 1


@dataclass(frozen=True, slots=True)
class Removed:
    """What was done about one container.

    Attributes:
        container_id: The state's `id`.
        bundle: The state's `bundle`.
        paths: What was unmounted; empty if nothing was there any more.
        left: What could not be, each with the reason; the record stays, and a later sweep tries again.
        models: Of its run-time record, if that was closed, too; for the audit log.
    """

    container_id: str
    bundle: str
    paths: tuple[str, ...]
    left: tuple[str, ...]
    models: tuple[str, ...] = ()


def close(
    runtime_directory: str, container_id: str, bundle: str, *, timeout_seconds: float = _LOCK_SECONDS
) -> Removed | None:
    """Remove the models of one container, whose end the runtime tells.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm.
        container_id: The state's `id`.
        bundle: The state's `bundle`; empty: not known, for a container whose models came before its `create`.
        timeout_seconds: For the lock.

    Returns:
        None if nothing of it was mounted on the host's side.

    Raises:
        FileUnreadable: The record cannot be read.
        SystemCallFailed: The lock was held for too long, or our mounts cannot be read.
    """
    records = HostRecords(runtime_directory)
    if not records.exist():
        return None
    with records.locked(timeout_seconds=timeout_seconds):
        record = records.find(container_id, bundle)
        return remove(records, record) if record is not None else None


def sweep(runtime_directory: str, *, timeout_seconds: float = _LOCK_SECONDS) -> list[Removed]:
    """Remove the models of every container that is known to be gone.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm.
        timeout_seconds: For the lock.

    Returns:
        The containers that were gone; at the end one without id and bundle for the records that cannot be read, if any.

    Raises:
        FileUnreadable: The lock or a record cannot be touched.
        SystemCallFailed: The lock was held for too long, or our mounts cannot be read.
    """
    records = HostRecords(runtime_directory)
    if not records.exist() and not folders(runtime_directory):
        return []
    with records.locked(timeout_seconds=timeout_seconds):
        records.remove_half_written()
        found, unreadable = records.all()
        removed = [forget(records, record) for record in found if record.is_stale()]
        if not unreadable:
            used = {os.path.dirname(mount.path) for record in found for mount in record.mounts}
            remove_abandoned(runtime_directory, used)
    return [*removed, Removed("", "", (), unreadable)] if unreadable else removed


def forget(records: HostRecords, record: Record) -> Removed:
    """Remove the models of a container whose end was not told, and its run-time record. The caller holds the lock.

    That record names the pod's sandbox, which may live on: it would say that a successor of the same name has its
    models already.

    Raises:
        FileUnreadable: A record cannot be removed.
        SystemCallFailed: Our mounts cannot be read.
    """
    removed = remove(records, record)
    if removed.left:
        return removed
    closed = ContainerRecords(records.runtime_directory).close(record.container_id, record.bundle)
    return replace(removed, models=closed.models) if closed is not None else removed


def remove(records: HostRecords, record: Record) -> Removed:
    """Unmount one container's models and forget its record. The caller holds the lock.

    Raises:
        FileUnreadable: The record cannot be removed.
        SystemCallFailed: Our mounts cannot be read.
    """
    others = [each for each in records.all()[0] if each != record]
    last = [not any(model.fsid == one.fsid for each in others for one in each.mounts) for model in record.mounts]
    if record.namespace == own_mount_namespace():
        paths, left = _remove_here(record, last)
    else:
        paths, left = _remove_elsewhere(record, last)
    if not left:
        records.remove(record)
    return Removed(record.container_id, record.bundle, tuple(paths), tuple(left))


def _remove_here(record: Record, last: Sequence[bool]) -> tuple[list[str], list[str]]:
    """Unmount in this process's namespace; what was, and what could not be, each with the reason."""
    paths: list[str] = []
    left: list[str] = []
    for model, is_last in zip(record.mounts, last, strict=True):
        _remove_model(model, paths, left, last=is_last)
    if isinstance(record, BoundRecord) and not left:
        # Also takes away what a namespace kept that the unmounting has not reached: nothing is mounted on what is gone.
        for folder in {os.path.dirname(model.path) for model in record.mounts}:
            remove_folder(folder)
    return paths, left


def _remove_elsewhere(record: Record, last: Sequence[bool]) -> tuple[list[str], list[str]]:
    """The same in the record's namespace, if it lives: a VM's shim runs its hooks in one of its own.

    Only the host's init's and the creator's are entered: whose number another has by now is not theirs.
    """
    for pid in (_INIT, record.creator[0]) if isinstance(record, BoundRecord) else ():
        try:
            namespace_fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            seen = os.fstat(namespace_fd)
            if (seen.st_dev, seen.st_ino) == record.namespace:
                return _remove_in(namespace_fd, record, last)
        except SczError as cause:
            return [], [f"{record.mounts[0].path}: {cause.message}"]
        finally:
            os.close(namespace_fd)
    if _holds(record.namespace, record):
        return [], [f"{record.mounts[0].path}: in another mount namespace than this process's"]
    return [], []


def _remove_in(namespace_fd: int, record: Record, last: Sequence[bool]) -> tuple[list[str], list[str]]:
    def body(_channel: Channel) -> Report:
        enter_mount_namespace(namespace_fd)
        paths, left = _remove_here(record, last)
        return {"paths": paths, "left": left}

    what = "the process that unmounts in the host's namespace"
    with Child(what, body, gone=HolderGone, keep=(namespace_fd,)) as child:
        done = child.receive(_CHILD_SECONDS)["done"]
        child.join(_CHILD_SECONDS)
    return done["paths"], done["left"]


def _remove_model(model: HostMount, paths: list[str], left: list[str], *, last: bool) -> None:
    """Unmount every mount of a model's file system in this namespace, the topmost first.

    Where another record names that file system, only what lies at this one's path: a ramfs has no number that is not
    used again, so it may be another container's by now. What the last record finds goes wherever it is.
    """
    for mount in reversed(_own_mounts()):
        if mount.device != model.device or mount.source != mounts.SOURCE:
            continue
        if not last and mount.mount_point != model.path:
            continue
        try:
            unknown = _unmount(mount, model, last=last)
        except (SczError, OSError) as cause:
            left.append(f"{mount.mount_point}: {cause}")
            continue
        if unknown is None:
            paths.append(mount.mount_point)
        elif unknown:
            left.append(f"{mount.mount_point}: {unknown}")


def _unmount(mount: Mount, model: HostMount, *, last: bool) -> str | None:
    """Unmount one mount if it is the model's: None; or why not: empty if it is another's."""
    fd = open_directory(mount.mount_point)
    try:
        if syscalls.statx_mount_id(fd) != mount.mount_id:
            return "a mount that is not ours covers it"
        if os.fstatvfs(fd).f_fsid != model.fsid:
            return ""
        if last:
            mounts.erase(fd)
        mounts.unmount(fd)
        return None
    finally:
        os.close(fd)


def _own_mounts() -> Sequence[Mount]:
    with syscalls.failing("our own mounts cannot be looked at"):
        proc_fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.load_mountinfo(proc_fd)
    finally:
        os.close(proc_fd)


def _holds(namespace: tuple[int, int], record: Record) -> bool:
    """Whether a mount namespace that is not ours has one of the record's mounts.

    With its last process a namespace goes, and its mounts with it; its number may be another's by now.
    """
    with syscalls.failing("/proc cannot be read"):
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    devices = {model.device for model in record.mounts}
    for pid in pids:
        try:
            seen = os.stat(f"/proc/{pid}/ns/mnt")
            if (seen.st_dev, seen.st_ino) != namespace:
                continue
            proc_fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = mounts.load_mountinfo(proc_fd)
        except SczError:
            continue  # it ended meanwhile; another process of its namespace says the same
        finally:
            os.close(proc_fd)
        if any(mount.device in devices and mount.source == mounts.SOURCE for mount in found):
            return True  # one that has another root does not see it, so each is asked
    return False
