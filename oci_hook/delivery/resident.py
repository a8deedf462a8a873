"""How much memory the models of running containers take now.

A child enters each container's mount namespace and opens its models, whose folders are the container's: a file system
of its own above them (FUSE) may never answer, and no signal ends who waits for it. So there is a time for each and one
for all, and a namespace in which a killed child of before still waits is not entered again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress

from oci_hook.delivery.holder import MOUNT_NAMESPACE, foreign_namespaces, open_directory, own_mount_namespace
from oci_hook.errors import HolderGone, SczError
from oci_hook.held import HeldModel
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import Mount
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.linux.processes import HeldProcess, read_bounded
from oci_hook.records import ContainerRecord

_ONE_SECONDS, _ALL_SECONDS, _ENDING_SECONDS = 1.5, 10.0, 0.5
_WHAT = "the process that looks at the container's models"
_PENDING = re.compile(rb"^(?:SigPnd|ShdPnd):\s*([0-9a-f]{1,16})$", re.MULTILINE)
_SIGKILL = 1 << 8


def memory_bytes(records: Sequence[ContainerRecord]) -> tuple[tuple[int | None, ...] | None, ...]:
    """What the models of containers take now, in the order of the records.

    Returns:
        For each record the bytes in the order of its `held`, where None is a model that is not there; or None: its
        models cannot be seen, or not in time (1.5 s each, 10 s all).
    """
    stuck = stuck_namespaces({record.namespace for record in records if record.keeper != (0, 0)})
    until = time.monotonic() + _ALL_SECONDS
    found: list[tuple[int | None, ...] | None] = []
    for record in records:
        left = min(until - time.monotonic(), _ONE_SECONDS)
        found.append(None if left <= 0 or record.namespace in stuck else _ask(record, left))
    return tuple(found)


def _ask(record: ContainerRecord, seconds: float) -> tuple[int | None, ...] | None:
    with suppress(SczError), ExitStack() as stack:
        namespace_fd = hold_namespace(record, stack)
        keep = () if namespace_fd is None else (namespace_fd,)

        def body(_channel: Channel) -> Report:
            proc_fd = own_proc()
            if namespace_fd is not None:
                enter_mount_namespace(namespace_fd)
            return {"bytes": [_taken(proc_fd, model) for model in record.held]}

        child = stack.enter_context(Child(_WHAT, body, gone=HolderGone, keep=keep, ending_seconds=_ENDING_SECONDS))
        return tuple(child.receive(seconds)["done"]["bytes"])
    return None


def stuck_namespaces(wanted: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those mount namespaces in which a process of this pid namespace was killed and cannot end: a child of ours."""
    wanted, found = set(wanted), set()
    ours = os.stat("/proc/self/ns/pid")
    for pid in os.listdir("/proc") if wanted else []:
        with suppress(OSError, SczError):  # one that ended meanwhile
            if not pid.isdigit():
                continue
            namespace = os.stat(f"/proc/{pid}/ns/mnt")
            place = (namespace.st_dev, namespace.st_ino)
            if place in wanted and os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), ours):
                status = read_bounded(os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC), "status", 1 << 16)
                if any(int(mask, 16) & _SIGKILL for mask in _PENDING.findall(status)):
                    found.add(place)
    return found


def hold_namespace(record: ContainerRecord, stack: ExitStack) -> int | None:
    """Open the namespace that a record names, with its process held; None: it is our own.

    Raises:
        HolderGone: Process or namespace are others by now.
        SystemCallFailed: /proc cannot be read.
    """
    if record.keeper == (0, 0):
        if record.namespace != own_mount_namespace():
            raise HolderGone("the models are in another mount namespace than this process's")
        return None
    process = stack.enter_context(HeldProcess(record.keeper[0]))
    if process.start_time != record.keeper[1]:
        raise HolderGone(f"process {record.keeper[0]} ended, and another one has its number")
    namespace_fd = process.open(MOUNT_NAMESPACE)
    stack.callback(os.close, namespace_fd)
    seen = os.fstat(namespace_fd)
    if (seen.st_dev, seen.st_ino) != record.namespace or record.namespace in foreign_namespaces():
        raise HolderGone(f"process {process.pid} is in another mount namespace than its container was given")
    return namespace_fd


def own_proc() -> int:
    """A descriptor of our own /proc directory, which outlives the change of namespace."""
    with syscalls.failing("our own /proc directory cannot be opened"):
        return os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def find_mount(proc_fd: int, model: HeldModel) -> Mount | None:
    """The model's mount, among those that a process sees; None: it is not there."""
    for mount in mounts.load_mountinfo(proc_fd):
        if (mount.mount_id, mount.device, mount.source) == (model.mount_id, model.device, mounts.SOURCE):
            return mount
    return None


def open_mount(mount: Mount, model: HeldModel) -> int | None:
    """Open the mount's root, a descriptor of O_PATH; None if something else lies there."""
    try:
        fd = open_directory(mount.mount_point)
    except OSError:
        return None
    if syscalls.statx_mount_id(fd) == mount.mount_id and os.fstatvfs(fd).f_fsid == model.fsid:
        return fd
    os.close(fd)
    return None


def _taken(proc_fd: int, model: HeldModel) -> int | None:
    mount = None if model.released else find_mount(proc_fd, model)
    fd = open_mount(mount, model) if mount is not None else None
    if fd is None:
        return None
    try:
        seen = os.fstatvfs(fd)
        if seen.f_blocks:
            return (seen.f_blocks - seen.f_bfree) * seen.f_bsize
        total = 0  # a ramfs counts nothing
        for _, _, files, directory in os.fwalk(".", dir_fd=fd, follow_symlinks=False):
            total += sum(os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512 for name in files)
        return total
    finally:
        os.close(fd)
