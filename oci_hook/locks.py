"""Exclusive locks with a deadline: an flock(2), which the kernel frees with its holder, however that ends.

Polled, as a signal handler, the other way to bound flock, is not a library's to install. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from oci_hook.errors import FileUnreadable, SczError

_FIRST_WAIT_SECONDS = 0.001
_LONGEST_WAIT_SECONDS = 0.02


def lock_descriptor(descriptor: int, *, what: str, timeout_seconds: float, error: type[SczError]) -> None:
    """Lock an open file; closing it unlocks.

    Args:
        descriptor: Of the file; what else is open on it shares the lock.
        what: Its name, for messages.
        timeout_seconds: How long to wait for other holders.
        error: What to raise if they held it for longer.

    Raises:
        FileUnreadable: It cannot be locked.
    """
    deadline, wait = time.monotonic() + timeout_seconds, _FIRST_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise error(f"{what} was locked by others for {timeout_seconds:g} s") from None
        except OSError as cause:
            raise FileUnreadable(f"{what} cannot be locked: {cause.strerror}") from cause
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


@contextlib.contextmanager
def lock_file(path: str | os.PathLike[str], *, timeout_seconds: float, error: type[SczError]) -> Iterator[None]:
    """Hold the lock of a file of its own inside the block.

    Args:
        path: In a directory that only root can write; made with mode 0600 if absent.
        timeout_seconds: How long to wait for other holders.
        error: What to raise if they held it for longer.

    Raises:
        FileUnreadable: The file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as cause:
        raise FileUnreadable(f"{os.fspath(path)}: {cause.strerror}") from cause
    try:
        lock_descriptor(descriptor, what=os.fspath(path), timeout_seconds=timeout_seconds, error=error)
        yield
    finally:
        os.close(descriptor)
