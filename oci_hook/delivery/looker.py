"""The child that looks for a model's copy in other containers' mount namespaces, and clones it there.

It waits, is sent namespaces by descriptor, and believes nothing of what it finds but what is compared here; what it
gives back is verified by `delivery.share`. Sources: open_tree(2), mount_namespaces(7).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import asdict

from oci_hook.delivery.resident import find_mount, open_mount, own_proc
from oci_hook.errors import HolderGone, SczError
from oci_hook.held import HeldModel
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import MemoryFilesystem
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace

_ENDING_SECONDS = 0.5
# Only CAP_SYS_ADMIN in the initial user namespace undoes the one, and the kernel takes the other from nobody else.
_SEALED = {"ro", "noswap"}
_WHAT = "the process that looks for a copy in another container"


class Looker:
    """A child that waits, and clones out of the mount namespaces that it is sent; ended by its `with` block.

    To be made before any key or token is in this process: it is a copy of it, not locked into memory, goes where others
    rule, and may hang there, out of reach of every signal, long after its parent has ended.
    """

    def __init__(self) -> None:
        self._child = Child(_WHAT, _look, gone=HolderGone, keep=(), ending_seconds=_ENDING_SECONDS)
        self._was_ended = False

    def __enter__(self) -> Looker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it; one that hangs in a holder's file system stays until that answers, and is waited for once."""
        if not self._was_ended:
            self._was_ended = True
            with suppress(SczError):
                self._child.close()

    def dismiss(self) -> None:
        """Kill it and do not wait; `end` does."""
        self._child.dismiss()

    def clone(self, namespace_fd: int, held: HeldModel, seconds: float) -> int | None:
        """A detached clone of a model's mount, which the caller closes; None: it is not there.

        Raises:
            HolderGone: There was no answer in time: the child is of no more use.
            SczError: What the child met.
        """
        self._child.send({"held": asdict(held)}, [namespace_fd])
        report, fds = self._child.receive_descriptors(seconds)
        if report.get("cloned") == held.mount_id and len(fds) == 1:
            return fds[0]
        for fd in fds:
            os.close(fd)
        return None


def _look(channel: Channel) -> Report:
    """The child: for each namespace that comes, enter it and say what was found there."""
    proc_fd = own_proc()
    mounts.load_mountinfo(proc_fd)  # its pages are the parent's until they are touched: now, while nobody waits
    while (received := channel.receive()) is not None:
        (namespace_fd,), held = received[1], HeldModel(**received[0]["held"])
        found: tuple[int, ...] = ()
        with suppress(SczError, OSError), ExitStack() as stack:
            stack.callback(os.close, namespace_fd)
            enter_mount_namespace(namespace_fd)
            found = _clone_of(proc_fd, held)
        channel.send({"cloned": held.mount_id if found else 0}, found)
        for fd in found:
            os.close(fd)
    return {}


def _clone_of(proc_fd: int, held: HeldModel) -> tuple[int, ...]:
    """A detached clone of what is told of, in this process's mount namespace; empty: it is not there."""
    mount = find_mount(proc_fd, held)
    if mount is None or mount.kind != MemoryFilesystem.TMPFS.value or not mount.super_options >= _SEALED:
        return ()
    fd = open_mount(mount, held)
    if fd is None:
        return ()
    try:
        return (syscalls.open_tree(fd, clone=True),)
    finally:
        os.close(fd)
