"""Copying a bundle's files into the store: in the kernel, by reference where the file system can; new files of root's.

Nothing is verified here. copy_file_range(2), sendfile(2), ioctl_ficlone(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from oci_hook.bundle.files import closing
from oci_hook.bundle.layout import Layout
from oci_hook.errors import SczError
from oci_hook.store import system_calls

_STEP_BYTES = 4 << 20
_FICLONE = 0x40049409  # include/uapi/linux/fs.h
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def shares_blocks(source: int, folder: str) -> bool:
    """Whether a copy of the file in `folder` takes no room, as the file system copies by reference: tried, and undone.

    Args:
        source: A descriptor of the file.
        folder: On the file system that the copy shall be on.
    """
    path = os.path.join(folder, "shared")
    with contextlib.suppress(OSError):
        target = os.open(path, _CREATE, 0o400)
        try:
            fcntl.ioctl(target, _FICLONE, source)
            return True
        finally:
            os.close(target)
            os.unlink(path)
    return False


def is_shared(layout: Layout, folder: str) -> bool:
    """Whether copies of a bundle's files in `folder` take no room (`shares_blocks`)."""
    try:
        with closing(layout.open_blob(layout.layers[0].digest)) as descriptor:
            return shares_blocks(descriptor, folder)
    except SczError:
        return False  # the copy will say what is wrong


def write_new(path: str, data: bytes) -> None:
    """Write and sync a new file (OSError)."""
    with open(os.open(path, _CREATE, 0o400), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_blob(source: int, path: str) -> Iterator[int]:
    """Copy what the file holds now, and no more if it grows; yields the bytes of each step."""
    with system_calls(path):
        left = os.fstat(source).st_size
        target = os.open(path, _CREATE, 0o400)
        try:
            while left > 0 and (count := _copy_some(source, target, min(left, _STEP_BYTES))):
                left -= count
                yield count
            os.fsync(target)
        finally:
            os.close(target)


def _copy_some(source: int, target: int, limit_bytes: int) -> int:
    """Copy in the kernel: by reference where the file system can, by bytes from another one (a USB stick)."""
    try:
        if count := os.copy_file_range(source, target, limit_bytes):
            return count
    except OSError as cause:
        if cause.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return os.sendfile(target, source, None, limit_bytes)
