"""The locks of sharing groups: while a start holds one, no other looks for, or makes, a copy of the group's model.

An flock(2) on a file of its own, which goes with the hook. Its file goes with the lock: whoever gets a lock looks
whether its file still has its name, and asks for the next one's if not. Reasons: docs/adr/0018.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from types import TracebackType

from oci_hook.errors import FileUnreadable, SystemCallFailed
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import make_private_directory

SHARES = "shares"  # below the run-time directory
# A quarter of the kubelet's two minutes, and a tenth of what `sczctl install` gives a hook: whoever waited in vain has
# time left to decrypt, and whoever is slow on purpose holds others up for no longer.
LOCK_SECONDS = 30.0


class GroupLocks:
    """Locks that are held until the end of the `with` block."""

    def __init__(self) -> None:
        self._held: list[tuple[int, str]] = []

    def __enter__(self) -> GroupLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, path in self._held:  # before it is unlocked: it is still ours
            with suppress(OSError):
                os.unlink(path)
        self.leave_to_parent()

    def lock(self, runtime_directory: str, names: Iterable[str]) -> None:
        """Lock every group, in one order for all starts: two that want the same two models never wait for each other.

        Args:
            runtime_directory: Root's own, such as /run/scz-smm; the files are below `shares` there.
            names: Of the groups.

        Raises:
            SystemCallFailed: Others held one of them for too long: 30 s for all.
            FileUnreadable: A file cannot be made or locked.
        """
        folder = os.path.join(runtime_directory, SHARES)
        for made in (runtime_directory, folder):
            make_private_directory(made)
        until = time.monotonic() + LOCK_SECONDS
        for name in sorted(set(names)):
            path = os.path.join(folder, name)
            self._held.append((_lock(path, until), path))

    def leave_to_parent(self) -> None:
        """In a forked child: close the descriptors, so that the locks end with the parent whatever becomes of it."""
        while self._held:
            os.close(self._held.pop()[0])


def _lock(path: str, until: float) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as cause:
            raise FileUnreadable(f"{path}: {cause.strerror}") from cause
        with ExitStack() as closing:
            closing.callback(os.close, fd)
            left = max(0.0, until - time.monotonic())
            lock_descriptor(fd, what=path, timeout_seconds=left, error=SystemCallFailed)
            if _is_named(fd, path):
                closing.pop_all()
                return fd


def _is_named(fd: int, path: str) -> bool:
    """Whether a file still has its name: who held it before us has taken that away."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
