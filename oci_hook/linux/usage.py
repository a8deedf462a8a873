"""Who uses a file system: open files, mappings, working directories, and copies of its mount in any mount namespace.

What is looked at is /proc alone: no file of a container's is touched, as its file system may answer never (FUSE). It is
a look, not a proof: files of a process that has them for a thread of its own, or in a message under way, are not found.
The proof is the kernel's (EBUSY, IN_UNMOUNT). Source: proc(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from oci_hook.errors import SczError
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.processes import read_bounded

_MNT_ID = re.compile(rb"^mnt_id:\s*([0-9]{1,18})$", re.MULTILINE)
_MAPS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Use:
    """One process's use of a file system.

    Attributes:
        pid: In our own pid namespace.
        command: What the process calls itself; not to be believed.
        what: `open file`, `mapping`, `working directory`, `root directory` or `mount`.
        path: As that process names it.
    """

    pid: int
    command: str
    what: str
    path: str


def find_uses(device: str, mount_id: int, *, without: frozenset[int], counted: bool = False) -> tuple[Use, ...]:
    """Every use of a file system but the one mount that is asked about.

    Args:
        device: `major:minor` of its superblock, which lives.
        mount_id: Of the mount that is not a use.
        without: Pids that are left out.
        counted: That mount is a use, too, wherever it is; or it is gone, and then only mounts of our name and files on
            them count, as the number of its superblock may be another's by now.

    Raises:
        SystemCallFailed: /proc cannot be read.
    """
    with syscalls.failing("/proc cannot be read"):
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    pids = [pid for pid in pids if pid not in without]
    ids, copies = _mounts_of(device, set() if counted else {mount_id}, pids)
    if not ids:
        return ()
    major, minor = (int(part) for part in device.split(":"))
    mapped = f"{major:02x}:{minor:02x}".encode()
    found = list(copies)
    for pid in pids:
        with suppress(OSError, SczError):  # one that ended meanwhile uses nothing
            found += {use.what + use.path: use for use in _uses_of(pid, ids, mapped)}.values()
    return tuple(found)


def _mounts_of(device: str, ids: set[int], pids: list[int]) -> tuple[set[int], list[Use]]:
    """The ids of all mounts of the file system, and those that are new, each in the name of one process."""
    copies, seen = [], set()
    for pid in pids:
        with suppress(OSError, SczError):
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            view = (namespace, os.readlink(f"/proc/{pid}/root"))  # one that has another root sees other mounts
            if view in seen:
                continue
            seen.add(view)
            proc_fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                theirs = [
                    mount
                    for mount in mounts.load_mountinfo(proc_fd)
                    if mount.device == device and mount.source == mounts.SOURCE
                ]
            finally:
                os.close(proc_fd)
            copies += [
                Use(pid, _command(pid), "mount", each.mount_point) for each in theirs if each.mount_id not in ids
            ]
            ids |= {each.mount_id for each in theirs}
    return ids, copies


def _uses_of(pid: int, ids: set[int], mapped: bytes) -> Iterator[Use]:
    for what, name in (("working directory", "cwd"), ("root directory", "root")):
        fd = os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC)
        try:
            if _mount_id(f"/proc/self/fdinfo/{fd}") in ids:
                yield Use(pid, _command(pid), what, os.readlink(f"/proc/{pid}/{name}"))
        finally:
            os.close(fd)
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError, SczError):
            if _mount_id(f"/proc/{pid}/fdinfo/{name}") in ids:
                yield Use(pid, _command(pid), "open file", os.readlink(f"/proc/{pid}/fd/{name}"))
    maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    for line in read_bounded(maps, "maps", _MAPS_BYTES).splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[3] == mapped:
            yield Use(pid, _command(pid), "mapping", os.fsdecode(fields[5]))


def _mount_id(fdinfo: str) -> int:
    found = _MNT_ID.search(read_bounded(os.open(fdinfo, os.O_RDONLY | os.O_CLOEXEC), fdinfo, 1 << 20))
    return int(found[1]) if found else -1


def _command(pid: int) -> str:
    """What it calls itself: its first argument without folders, or else the kernel's name for it."""
    for name, end in (("cmdline", b"\0"), ("comm", b"\n")):
        with suppress(OSError, SczError):
            fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            if found := os.path.basename(os.fsdecode(read_bounded(fd, name, 1 << 20).partition(end)[0])):
                return found[:64]
    return "?"
