"""Detached memory file systems, their sealing, and what mountinfo says.

A detached mount has no path and lies in no namespace: nobody but the holder of its descriptor reaches it, and it is
gone, with its contents, when the last descriptor closes. `attach` is the only function that makes one visible.

It does not choose where a mount goes (`delivery.destination`) nor what is written (`delivery.fill`). Sources:
Documentation/filesystems/tmpfs.rst, fsopen(2), fspick(2), mount_setattr(2), move_mount(2), proc(5) on mountinfo.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from oci_hook.errors import SystemCallFailed
from oci_hook.linux import syscalls
from oci_hook.linux.processes import read_bounded

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SOURCE = "scz-smm"
"""What mountinfo and df show as a model's device."""
_MOUNTINFO_LIMIT_BYTES = 16 << 20
_MOST_NUMBERS = 500
_MOST_OVER = 1000
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
_NUMBER = re.compile(rb"[0-9]{1,10}")
_MODEL_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
    | syscalls.MOUNT_ATTR_NOSYMFOLLOW
)


class MemoryFilesystem(Enum):
    """What can hold plaintext: neither is ever written to swap."""

    TMPFS = "tmpfs"
    """tmpfs with `noswap`: Linux 6.4 and later."""
    RAMFS = "ramfs"
    """Before that. It knows no size limit: whoever fills it counts."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo.

    Attributes:
        mount_id: As `syscalls.statx_mount_id` gives it.
        device: `major:minor` of its superblock.
        root: The directory of that file system that is its root.
        mount_point: Relative to the reader's root.
        tags: The optional fields, such as `shared:1` and `master:2`.
        kind: The file system's type.
        super_options: The superblock's options.
        source: The device, or the name that whoever mounted it gave.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    options: frozenset[str]
    tags: tuple[str, ...]
    kind: str
    super_options: frozenset[str]
    source: str = ""

    @property
    def shared(self) -> bool:
        """Whether what is mounted on it propagates to its peers."""
        return any(tag.startswith("shared:") for tag in self.tags)


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field))


def parse_mountinfo(data: bytes) -> tuple[Mount, ...]:
    """Every line of a `/proc/<pid>/mountinfo`, in its order.

    Raises:
        SystemCallFailed: It has not the form of proc(5).
    """
    return tuple(_parse_line(line) for line in data.split(b"\n") if line)


def _parse_line(line: bytes) -> Mount:
    before, separator, after = line.partition(b" - ")
    fields, rest = before.split(b" "), after.split(b" ")
    numbers = all(_NUMBER.fullmatch(field) for field in fields[:2])
    if not separator or len(fields) < 6 or len(rest) < 3 or not numbers:
        raise SystemCallFailed("mountinfo cannot be read as proc(5) describes it")
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=os.fsdecode(fields[2]),
        root=_unescaped(fields[3]),
        mount_point=_unescaped(fields[4]),
        options=frozenset(os.fsdecode(fields[5]).split(",")),
        tags=tuple(os.fsdecode(tag) for tag in fields[6:]),
        kind=os.fsdecode(rest[0]),
        super_options=frozenset(os.fsdecode(rest[2]).split(",")),
        source=_unescaped(rest[1]),
    )


def load_mountinfo(proc_fd: int) -> tuple[Mount, ...]:
    """The mounts of the process whose `/proc/<pid>` directory this is.

    Raises:
        SystemCallFailed: It cannot be read.
        HolderGone: The process ended.
    """
    with syscalls.failing("mountinfo cannot be opened"):
        fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
    return parse_mountinfo(read_bounded(fd, "mountinfo", _MOUNTINFO_LIMIT_BYTES))


@dataclass(frozen=True, slots=True)
class DetachedMount:
    """A memory file system without a path; closed by its `with` block.

    Attributes:
        fd: O_PATH, of its root directory.
        huge: Whether huge pages were asked for. Whether large files get them is seen only when they are written: the
            global switch may deny them, or none may be free.
    """

    fd: int
    kind: MemoryFilesystem
    huge: bool

    def __enter__(self) -> DetachedMount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.fd)


def probe_memory_filesystem() -> MemoryFilesystem:
    """What this kernel offers: a tmpfs that is never swapped, or else a ramfs.

    Raises:
        SystemCallFailed: It has not the new mount API (Linux 5.2), or we lack CAP_SYS_ADMIN.
    """
    with syscalls.failing("this kernel cannot make a detached file system"):
        context = syscalls.fsopen("tmpfs")
        try:
            syscalls.fsconfig_flag(context, "noswap")
        except OSError as refusal:
            if refusal.errno != errno.EINVAL:
                raise
            return MemoryFilesystem.RAMFS
        finally:
            os.close(context)
    return MemoryFilesystem.TMPFS


def create_memory_filesystem(size_bytes: int, inodes: int, kind: MemoryFilesystem) -> DetachedMount:
    """Make an empty, writable, detached memory file system; its root has mode 0700.

    Args:
        size_bytes: The room for files' contents, each rounded up to pages; a ramfs ignores it.
        inodes: Files and directories, the root included; a ramfs ignores it.
        kind: What it is to be.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing(f"a detached {kind.value} cannot be made"):
        context = syscalls.fsopen(kind.value)
        try:
            huge = False
            syscalls.fsconfig_string(context, "source", SOURCE)
            syscalls.fsconfig_string(context, "mode", "0700")
            if kind is MemoryFilesystem.TMPFS:
                # tmpfs reads 0 as "no limit", so nothing at all still gets a page.
                syscalls.fsconfig_string(context, "size", str(max(size_bytes, PAGE_BYTES)))
                syscalls.fsconfig_string(context, "nr_inodes", str(inodes))
                syscalls.fsconfig_flag(context, "noswap")
                huge = _ask_for_huge_pages(context)
            syscalls.fsconfig_create(context)
            return DetachedMount(fd=syscalls.fsmount(context), kind=kind, huge=huge)
        finally:
            os.close(context)


def is_free_number(device: str) -> bool:
    """Whether the kernel gives a superblock's number away now: proof that no file system has it, nor any file on one.

    The kernel gives the lowest number that is free, so file systems are made and kept until one gets this number, or a
    higher one. False: it is taken, or too many lower ones are free to try it.

    Args:
        device: `major:minor` of a file system without a disk.

    Raises:
        SystemCallFailed: The kernel refuses to make one.
    """
    major, wanted = (int(part) for part in device.split(":"))
    with ExitStack() as stack:
        for _ in range(_MOST_NUMBERS if major == 0 else 0):
            made = stack.enter_context(create_memory_filesystem(PAGE_BYTES, 1, MemoryFilesystem.RAMFS))
            minor = os.minor(os.fstat(made.fd).st_dev)
            if minor >= wanted:
                return minor == wanted
    return False


def _ask_for_huge_pages(context_fd: int) -> bool:
    """Set huge=within_size where the kernel knows it."""
    try:
        syscalls.fsconfig_string(context_fd, "huge", "within_size")
    except OSError as refusal:
        if refusal.errno != errno.EINVAL:
            raise
        return False
    return True


def seal_superblock(mount_fd: int) -> None:
    """Make the superblock read-only: no mount of it can be written, whoever remounts it in a user namespace.

    Raises:
        SystemCallFailed: A writable file or mapping is open still (the kernel's proof that a writer is left), or the
            kernel refuses.
    """
    with syscalls.failing("the model's file system cannot be made read-only"):
        context = syscalls.fspick(mount_fd)
        try:
            syscalls.fsconfig_flag(context, "ro")
            syscalls.fsconfig_reconfigure(context)
        except OSError as refusal:
            if refusal.errno == errno.EBUSY:
                raise SystemCallFailed("the model's file system cannot be sealed: a writer is left") from refusal
            raise
        finally:
            os.close(context)


def set_mount_flags(mount_fd: int) -> None:
    """Make the mount ro, nosuid, nodev, noexec and nosymfollow.

    Raises:
        SystemCallFailed: The kernel refuses; nosymfollow needs Linux 5.14.
    """
    with syscalls.failing("the model's mount cannot be made ro,nosuid,nodev,noexec,nosymfollow"):
        syscalls.mount_setattr(mount_fd, _MODEL_ATTRIBUTES)


def isolate(mount_fd: int) -> None:
    """Give a copy of a mount a model's flags, and end what ties it to the mount that it was copied from.

    A copy of a mount that its namespace has made shared is that mount's peer.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("the copy of the model's mount cannot be made private"):
        syscalls.mount_setattr(mount_fd, _MODEL_ATTRIBUTES, propagation=syscalls.MS_PRIVATE)


def erase(mount_fd: int) -> None:
    """Empty every file of a sealed memory file system: nobody who still has a mount or a file of it reads them again.

    The superblock becomes writable for that; the mounts that others see stay read-only. The one that writes has
    no path.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("the model's file system cannot be emptied"), ExitStack() as stack:
        context = syscalls.fspick(mount_fd)
        stack.callback(os.close, context)
        syscalls.fsconfig_flag(context, "rw")
        syscalls.fsconfig_reconfigure(context)
        own = syscalls.open_tree(mount_fd, clone=True)
        stack.callback(os.close, own)
        syscalls.mount_setattr(own, 0, clear=syscalls.MOUNT_ATTR_RDONLY)
        for _, _, files, directory in os.fwalk(".", dir_fd=own, follow_symlinks=False):
            for name in files:
                file = os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                os.close(file)


def unmount(mount_fd: int) -> None:
    """Take a mount away from where it is, by its descriptor; whoever has files of it open keeps them.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("the model cannot be unmounted"):
        syscalls.umount2(f"/proc/self/fd/{mount_fd}", syscalls.MNT_DETACH)


def attach(mount_fd: int, destination_fd: int) -> None:
    """Make a detached mount visible on the directory that `destination_fd` refers to, in the caller's namespace.

    Raises:
        SystemCallFailed: The kernel refuses; nothing became visible.
    """
    with syscalls.failing("the model cannot be attached"):
        syscalls.move_mount(mount_fd, destination_fd)


def make_private(path: str) -> None:
    """Let nothing that is mounted on this mount later appear elsewhere, nor the reverse.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("the model's mount cannot be made private"):
        syscalls.mount_propagation(path, syscalls.MS_PRIVATE)


def detach(mount_fd: int) -> None:
    """Undo `attach`, in the same namespace, with what is mounted over it or in it. Changes the working directory.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("an attached model cannot be detached"):
        os.fchdir(mount_fd)
        syscalls.umount2(".", syscalls.MNT_DETACH)  # the uppermost: the next one is asked for until ours is gone
        with suppress(OSError):
            for _ in range(_MOST_OVER):
                syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")
