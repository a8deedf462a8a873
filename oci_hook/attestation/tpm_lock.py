"""One lock for all of this host's TPM transactions.

A TPM without a resource manager has three slots for objects and three for sessions: without the lock, processes fail
at random. It is an flock: the kernel releases it with its holder, however that ends. flock(2).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from oci_hook.errors import FileUnreadable, TpmTimeout

_FIRST_WAIT_SECONDS = 0.002
_LONGEST_WAIT_SECONDS = 0.05


@contextmanager
def tpm_lock(path: str | os.PathLike[str], *, timeout_seconds: float) -> Iterator[None]:
    """Hold the lock inside the block.

    Args:
        path: The lock file, in a directory that only root can write; made with mode 0600 if absent.
        timeout_seconds: How long to wait for other holders.

    Raises:
        TpmTimeout: Others held it for too long.
        FileUnreadable: The file cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as cause:
        raise FileUnreadable(f"the TPM's lock file {os.fspath(path)}: {cause.strerror}") from cause
    try:
        _acquire(fd, timeout_seconds)
        yield
    finally:
        os.close(fd)


def _acquire(fd: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    wait = _FIRST_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # Polled: a signal handler, the other way to bound flock, is not a library's to install.
            if time.monotonic() + wait > deadline:
                raise TpmTimeout(f"other processes held the TPM for {timeout_seconds:g} s") from None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
