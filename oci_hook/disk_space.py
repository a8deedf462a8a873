"""Room on a disk: asked for before long work, and said in full when it runs out all the same.

Asking beforehand spares hours and promises nothing, as others write meanwhile. Then the system says ENOSPC or EDQUOT,
whoever writes cleans up, and `full_disk_explained` adds what a person needs to know. Standard library only.
Source: statvfs(3), write(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from oci_hook.errors import FileUnreadable, SczError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DOCUMENTS = 16  # files and folders that come beside those that are counted: index, names, grants


@dataclass(frozen=True, slots=True)
class Need:
    """What is about to be written: bytes, and how many files.

    Attributes:
        remedy: What makes room; `{size}` and `{mount}` stand for how much, and on which file system.
    """

    size_bytes: int
    files: int
    remedy: str

    @classmethod
    def of(cls, sizes: Iterable[int], block_bytes: int, remedy: str) -> Need:
        """The need of files of these sizes in bytes, on a file system with such blocks."""
        blocks = [-(-size // block_bytes) for size in sizes]
        return cls(sum(blocks) * block_bytes, len(blocks), remedy)


def size_text(size_bytes: int) -> str:
    """A number of bytes for a person, rounded up so that it is enough: `12 KiB`, `3 MiB`, `10.1 GiB`."""
    if size_bytes < 1 << 20:
        return f"{-(-size_bytes // 1024)} KiB"
    if size_bytes < 10 << 30:
        return f"{-(-size_bytes // (1 << 20))} MiB"
    return f"{-(-size_bytes * 10 // (1 << 30)) / 10:.1f} GiB"


def block_bytes(folder: str) -> int:
    """The size of a block of the file system that a folder is on, in bytes (OSError)."""
    return os.statvfs(folder).f_frsize or 4096


def mount_point(folder: str) -> str:
    """The root of the file system that a folder is on, as `df` shows it (OSError)."""
    folder = os.path.realpath(folder)
    device = os.stat(folder).st_dev
    while folder != "/" and os.stat(os.path.dirname(folder)).st_dev == device:
        folder = os.path.dirname(folder)
    return folder


def verify_room(folder: str, need: Need) -> None:
    """Check that a folder's file system has room now.

    Args:
        folder: It exists.
        need: What is to be written into it.

    Raises:
        FileUnreadable: It has not; the message says how much is missing where, and what makes room.
        OSError: As statvfs(3) gives it.
    """
    found = os.statvfs(folder)
    free_files = found.f_ffree if os.geteuid() == 0 else found.f_favail
    # A file system that counts no blocks or files (some in user space, btrfs) says nothing about them.
    no_room = found.f_blocks > 0 and _free_bytes(found) < need.size_bytes
    if no_room or (found.f_files > 0 and free_files < need.files):
        raise _full(folder, need, f"{folder}: {os.strerror(errno.ENOSPC)}")


@contextlib.contextmanager
def full_disk_explained(folder: str, need: Callable[[], Need]) -> Iterator[None]:
    """What fails inside the block for want of room is told as `verify_room` would; every other error passes.

    The look at the disk comes after the block has cleaned up, so that what is said to be free is free.

    Args:
        folder: On the disk that may be full.
        need: Says what was to be written.

    Raises:
        FileUnreadable: The disk is full.
    """
    try:
        yield
    except OSError as refusal:
        if refusal.errno not in _FULL:
            raise
        problem = f"{refusal.filename or folder}: {refusal.strerror}"
        raise _explained(folder, need, FileUnreadable(problem)) from refusal
    except FileUnreadable as error:
        cause = error.__cause__
        explained = error.advice != FileUnreadable.remedy
        if explained or not isinstance(cause, OSError) or cause.errno not in _FULL:
            raise
        raise _explained(folder, need, error) from cause


def _explained(folder: str, need: Callable[[], Need], error: FileUnreadable) -> FileUnreadable:
    try:
        return _full(folder, need(), error.message)
    except (OSError, SczError):
        return error


def _free_bytes(found: os.statvfs_result) -> int:
    """Some blocks are root's alone."""
    return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * (found.f_frsize or 4096)


def _full(folder: str, need: Need, problem: str) -> FileUnreadable:
    mount, found = mount_point(folder), os.statvfs(folder)
    size, free = size_text(need.size_bytes), size_text(_free_bytes(found))
    message = f"{problem}: {size} are needed, and the file system on {mount} has {free} free"
    if found.f_files and found.f_ffree < need.files + _DOCUMENTS:
        message += f" and room for {found.f_ffree} more files"
    return FileUnreadable(message, remedy=need.remedy.format(size=size, mount=mount))
