"""System calls that Python 3.11 has no name for; the only module that imports ctypes.

Each wrapper is named as in the kernel, takes what the kernel takes, and raises `OSError` with the errno and the path or
object that the call was about. It decides nothing: policy and the project's own errors belong to the callers
(`failing` turns an `OSError` into `SystemCallFailed` for them).

Numbers 424 and above are the same on every architecture (Linux, include/uapi/asm-generic/unistd.h); the older calls go
through libc. Sources: open_tree(2), move_mount(2), fsopen(2), fsconfig(2), fsmount(2), fspick(2), mount_setattr(2),
openat2(2), statx(2), fstatfs(2), setns(2), unshare(2), prctl(2), umount2(2), mlockall(2), adjtimex(2),
inotify(7).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from oci_hook.errors import SczError, SystemCallFailed

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000

# linux/mount.h
OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
FSOPEN_CLOEXEC: Final = 1
FSPICK_CLOEXEC: Final = 1
FSPICK_EMPTY_PATH: Final = 8
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
FSCONFIG_CMD_RECONFIGURE: Final = 7
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

# linux/magic.h
TMPFS_MAGIC: Final = 0x01021994

# linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

# linux/sched.h
CLONE_NEWNS: Final = 0x00020000

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4

# sys/mount.h, sys/mman.h
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4

# sys/inotify.h
IN_DELETE_SELF: Final = 0x400
IN_UNMOUNT: Final = 0x2000

_STATX_MNT_ID: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STA_UNSYNC: Final = 0x40  # linux/timex.h
_TIMEX_LONGS: Final = 32  # struct timex is 208 bytes at most
_STATFS_LONGS: Final = 32  # struct statfs is 120 bytes at most; f_type is its first member

_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_FSPICK: Final = 433
_NR_OPENAT2: Final = 437
_NR_MOUNT_SETATTR: Final = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.mlockall.argtypes = (ctypes.c_int,)
_libc.adjtimex.argtypes = (ctypes.c_void_p,)
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    """struct mount_attr, linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    """struct statx, linux/stat.h, as far as it is read here."""

    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("before_dev", ctypes.c_uint8 * 132),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("stx_mnt_id", ctypes.c_uint64),
        ("after_mnt_id", ctypes.c_uint8 * 104),
    )


def _checked(result: int, call: str, about: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}", about)
    return int(result)


def _syscall(number: int, call: str, about: str, *arguments: int | bytes | ctypes.c_void_p | None) -> int:
    # Variadic: an int without a type would be passed as 32 bits and leave the register's upper half undefined.
    typed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *typed), call, about)


def _structure(value: ctypes.Structure) -> ctypes.c_void_p:
    return ctypes.cast(ctypes.byref(value), ctypes.c_void_p)


@contextmanager
def failing(what: str, error: type[SczError] = SystemCallFailed) -> Iterator[None]:
    """Turn an `OSError` inside the block into `error`, with what was being done and the kernel's words.

    Args:
        what: What was being done, for the message.
        error: The class to raise.

    Raises:
        SczError: The class `error`, if the block raised an `OSError`.
    """
    try:
        yield
    except OSError as cause:
        about = f" ({cause.filename})" if cause.filename is not None else ""
        raise error(f"{what}: {cause.strerror or cause}{about}") from cause


def fsopen(file_system: str) -> int:
    """A file system context to configure; the caller closes it."""
    return _syscall(_NR_FSOPEN, "fsopen", file_system, file_system.encode(), FSOPEN_CLOEXEC)


def fspick(directory_fd: int) -> int:
    """A context to reconfigure the superblock of the mount that `directory_fd` refers to; the caller closes it."""
    return _syscall(_NR_FSPICK, "fspick", f"fd {directory_fd}", directory_fd, b"", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH)


def fsconfig_string(context_fd: int, key: str, value: str) -> None:
    """Set `key`=`value` in a file system context."""
    about = f"{key}={value}"
    _syscall(_NR_FSCONFIG, "fsconfig", about, context_fd, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)


def fsconfig_flag(context_fd: int, key: str) -> None:
    """Set the flag `key` in a file system context."""
    _syscall(_NR_FSCONFIG, "fsconfig", key, context_fd, FSCONFIG_SET_FLAG, key.encode(), None, 0)


def fsconfig_create(context_fd: int) -> None:
    """Make the superblock that a context describes."""
    _syscall(_NR_FSCONFIG, "fsconfig", "create", context_fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsconfig_reconfigure(context_fd: int) -> None:
    """Apply a context from `fspick` to its superblock. EBUSY: a writable file or mapping is open."""
    _syscall(_NR_FSCONFIG, "fsconfig", "reconfigure", context_fd, FSCONFIG_CMD_RECONFIGURE, None, None, 0)


def fsmount(context_fd: int, attributes: int = 0) -> int:
    """A detached mount of a created context: no path, no namespace; it is gone when the last fd to it closes."""
    return _syscall(_NR_FSMOUNT, "fsmount", "detached mount", context_fd, FSMOUNT_CLOEXEC, attributes)


def open_tree(directory_fd: int, path: str = "", *, clone: bool = False) -> int:
    """An O_PATH fd to a mount, or with `clone` a detached copy of it (not of what is mounted below)."""
    flags = OPEN_TREE_CLOEXEC | (OPEN_TREE_CLONE if clone else 0) | (AT_EMPTY_PATH if not path else 0)
    return _syscall(_NR_OPEN_TREE, "open_tree", path or f"fd {directory_fd}", directory_fd, os.fsencode(path), flags)


def move_mount(mount_fd: int, destination_fd: int) -> None:
    """Attach the (detached) mount `mount_fd` on what `destination_fd` refers to. Never a path on either side."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_NR_MOVE_MOUNT, "move_mount", f"fd {destination_fd}", mount_fd, b"", destination_fd, b"", flags)


def mount_setattr(mount_fd: int, attributes: int, *, clear: int = 0, propagation: int = 0) -> None:
    """Set and clear mount attributes (MOUNT_ATTR_…), and the propagation (MS_…; 0: as it is), of a mount by its fd."""
    value = _MountAttr(attr_set=attributes, attr_clr=clear, propagation=propagation)
    size = ctypes.sizeof(value)
    about = f"fd {mount_fd}"
    _syscall(_NR_MOUNT_SETATTR, "mount_setattr", about, mount_fd, b"", AT_EMPTY_PATH, _structure(value), size)


def openat2(directory_fd: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
    """open(2) beneath `directory_fd` with RESOLVE_… restrictions; O_CLOEXEC is always set."""
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=mode, resolve=resolve)
    return _syscall(_NR_OPENAT2, "openat2", path, directory_fd, os.fsencode(path), _structure(how), ctypes.sizeof(how))


def statx_mount_id(fd: int) -> int:
    """The id that /proc/<pid>/mountinfo shows for the mount on which `fd` lies (Linux 5.8)."""
    value = _Statx()
    about = f"fd {fd}"
    _checked(_libc.statx(fd, b"", AT_EMPTY_PATH, _STATX_MNT_ID, _structure(value)), "statx", about)
    if not value.stx_mask & _STATX_MNT_ID:
        raise OSError(95, "statx: no mount id; Linux 5.8 or later is needed", about)
    return int(value.stx_mnt_id)


def fstatfs_type(fd: int) -> int:
    """`f_type` of the file system on which `fd` lies (linux/magic.h); an overlay has its own, whatever it lies on."""
    value = (ctypes.c_long * _STATFS_LONGS)()
    _checked(_libc.fstatfs(fd, ctypes.cast(value, ctypes.c_void_p)), "fstatfs", f"fd {fd}")
    return int(value[0])


def statx_device(path: str) -> str:
    """`major:minor` of the superblock of what a magic link of /proc leads to; no server (FUSE) is asked for it."""
    value = _Statx()
    _checked(_libc.statx(AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, 0, _structure(value)), "statx", path)
    return f"{value.stx_dev_major}:{value.stx_dev_minor}"


def setns(namespace_fd: int, namespace_type: int) -> None:
    """Enter a namespace. CLONE_NEWNS gives EINVAL in a process that has a second thread or shares its fs."""
    _checked(_libc.setns(namespace_fd, namespace_type), "setns", f"fd {namespace_fd}")


def unshare(flags: int) -> None:
    """Leave what is shared (CLONE_…)."""
    _checked(_libc.unshare(flags), "unshare", hex(flags))


def mount_propagation(path: str, flags: int) -> None:
    """Change a mount's propagation (MS_PRIVATE, MS_REC, …), nothing else."""
    _checked(_libc.mount(b"none", os.fsencode(path), None, flags, None), "mount", path)


def umount2(path: str, flags: int) -> None:
    """Unmount what is mounted at `path`."""
    _checked(_libc.umount2(os.fsencode(path), flags), "umount2", path)


def prctl_set_pdeathsig(signal_number: int) -> None:
    """Have this process killed when the *thread* that forked it ends. The caller checks its parent afterwards."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl", "PR_SET_PDEATHSIG")


def prctl_set_dumpable(dumpable: bool) -> None:
    """Whether this process leaves cores and can be traced or read in /proc by its own uid."""
    _checked(_libc.prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl", "PR_SET_DUMPABLE")


def mlockall(flags: int) -> None:
    """Keep this process's pages out of swap (MCL_…). Not inherited by fork."""
    _checked(_libc.mlockall(flags), "mlockall", hex(flags))


def clock_is_synchronised() -> bool:
    """Whether somebody keeps the clock right, by the kernel's word: adjtimex(2) with modes 0, which changes nothing."""
    value = (ctypes.c_long * _TIMEX_LONGS)()
    _checked(_libc.adjtimex(ctypes.cast(value, ctypes.c_void_p)), "adjtimex", "clock")
    # modes (int, padded), offset, freq, maxerror, esterror, then the int status
    status = ctypes.c_int.from_buffer(value, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not status & _STA_UNSYNC


def inotify_init1() -> int:
    """A descriptor for events of file systems; the caller closes it."""
    return _checked(_libc.inotify_init1(os.O_CLOEXEC), "inotify_init1", "inotify")


def inotify_add_watch(inotify_fd: int, path: str, mask: int) -> int:
    """Watch an inode. It pins no mount: IN_UNMOUNT comes when its whole file system is gone."""
    return _checked(_libc.inotify_add_watch(inotify_fd, os.fsencode(path), mask), "inotify_add_watch", path)
