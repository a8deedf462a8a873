"""Who uses a file system: open files, mappings, working directories, and copies of its mount in any mount namespace.

What is looked at is /proc alone: no file of a container's is touched, as its file system may answer never (FUSE). It is
a look, not a proof: files of a process that has them for a thread of its own, or in a message under way, are not found.
The proof is the kernel's (EBUSY, IN_UNMOUNT). Source: proc(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
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


@dataclass(frozen=True, slots=True)
class Remains:
    """What is there still of a file system whose one known mount is gone.

    Attributes:
        another: Its superblock's number is another's: that file system is gone.
        copies: Mounts of it elsewhere.
        files: Open files, mappings and directories on it, whether or not a mount of it is seen anywhere.
    """

    another: bool
    copies: tuple[Use, ...] = ()
    files: tuple[Use, ...] = ()


def find_uses(
    device: str, mount_id: int, *, without: frozenset[int], known: frozenset[int] = frozenset()
) -> tuple[Use, ...]:
    """Every use of a file system but the one mount that is asked about.

    Args:
        device: `major:minor` of its superblock, which lives.
        mount_id: Of the mount that is not a use.
        without: Pids that are left out.
        known: Other mounts that are left out, with what is open by them; a mapping does not say by which it was made.

    Raises:
        SystemCallFailed: /proc cannot be read.
    """
    pids = _pids(without)
    ids, copies = {mount_id}, []
    for pid, visible in _views(pids):
        theirs = [mount for mount in visible if mount.device == device and mount.source == mounts.SOURCE]
        theirs = [mount for mount in theirs if mount.mount_id not in known]
        copies += [Use(pid, _command(pid), "mount", each.mount_point) for each in theirs if each.mount_id not in ids]
        ids |= {each.mount_id for each in theirs}
    return (*copies, *_files_of(pids, device, lambda _, found: found in ids))


def find_remains(device: str, *, without: frozenset[int], known: frozenset[int] = frozenset()) -> Remains:
    """Who keeps a file system that was unmounted: it may live on without any mount that is seen (`umount -l`).

    Args:
        device: `major:minor` of its superblock, or what was that.
        without: Pids that are left out.
        known: Mounts that are left out, as in `find_uses`.

    Raises:
        SystemCallFailed: /proc cannot be read.
    """
    pids = _pids(without)
    devices: dict[int, str] = {}
    copies = []
    for pid, visible in _views(pids):
        for each in visible:
            if each.device == device and each.source != mounts.SOURCE:  # the source of a copy is the mount's own
                return Remains(another=True)
            if each.device == device and each.mount_id not in (devices.keys() | known):
                copies.append(Use(pid, _command(pid), "mount", each.mount_point))
            devices[each.mount_id] = "" if each.mount_id in known else each.device

    def is_on_it(link: str, mount_id: int) -> bool:
        return (devices[mount_id] if mount_id in devices else syscalls.statx_device(link)) == device

    return Remains(another=False, copies=tuple(copies), files=_files_of(pids, device, is_on_it))


def _pids(without: frozenset[int]) -> list[int]:
    with syscalls.failing("/proc cannot be read"):
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if pid not in without]


def _files_of(pids: list[int], device: str, is_on_it: Callable[[str, int], bool]) -> tuple[Use, ...]:
    major, minor = (int(part) for part in device.split(":"))
    mapped = f"{major:02x}:{minor:02x}".encode()
    found: dict[tuple[int, str, str], Use] = {}
    for pid in pids:
        with suppress(OSError, SczError):  # one that ended meanwhile uses nothing
            for use in _uses_of(pid, is_on_it, mapped):
                found[pid, use.what, use.path] = use
    return tuple(found.values())


def _views(pids: list[int]) -> Iterator[tuple[int, tuple[mounts.Mount, ...]]]:
    """The mounts that processes see, once for each mount namespace and root, in the name of one process."""
    seen = set()
    for pid in pids:
        with suppress(OSError, SczError):
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            view = (namespace, os.readlink(f"/proc/{pid}/root"))  # one that has another root sees other mounts
            if view in seen:
                continue
            seen.add(view)
            proc_fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                visible = mounts.load_mountinfo(proc_fd)
            finally:
                os.close(proc_fd)
            yield pid, visible


def _uses_of(pid: int, is_on_it: Callable[[str, int], bool], mapped: bytes) -> Iterator[Use]:
    for what, name in (("working directory", "cwd"), ("root directory", "root")):
        fd = os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC)
        try:
            if is_on_it(f"/proc/{pid}/{name}", _mount_id(f"/proc/self/fdinfo/{fd}")):
                yield Use(pid, _command(pid), what, os.readlink(f"/proc/{pid}/{name}"))
        finally:
            os.close(fd)
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError, SczError):
            if is_on_it(f"/proc/{pid}/fd/{name}", _mount_id(f"/proc/{pid}/fdinfo/{name}")):
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
