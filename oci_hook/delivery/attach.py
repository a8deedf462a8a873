"""The child that waits in the container's mount namespace, and makes the models visible when it is told to.

It is forked before any key exists in this process, resolves every destination by descriptor, says that it is ready,
and waits. At "go" it gets the detached mounts over the socket, looks at the destinations once more, and attaches all of
them or none: the last effect of a delivery. If the hook dies before the first of them, the kernel kills the
child and nothing was attached; from there on nothing kills it, and everything will be.

It fills nothing. Specification: docs/design.md, "Delivery"; move_mount(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

from oci_hook.delivery.destination import (
    AllowedMounts,
    allow_mounts,
    find_mounts,
    parse_destinations,
    prepare_destination,
    verify_uncovered,
    verify_uncovered_beneath,
)
from oci_hook.delivery.holder import ContainerView, Ground, Holder
from oci_hook.errors import HolderGone, SystemCallFailed
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace

_WHAT = "the process in the container's mount namespace"


class Attachment:
    """The waiting child, seen from the hook; ended by its `with` block.

    Args:
        holder: Whose namespace.
        container: What config.json says of its mounts and of its root's uid and gid.
        destinations: Absolute paths in the container, in the order in which `attach` will get their mounts.
        timeout_seconds: For each of the child's answers.

    Raises:
        DestinationInvalid: A destination cannot be used.
        DestinationRefused: A destination is one that leads outside or shows the model to others.
        HolderRefused: The namespace does not hold the root file system.
        HolderGone: The child ended early.
        SystemCallFailed: The kernel refuses something else.
    """

    def __init__(
        self, holder: Holder, container: ContainerView, destinations: Sequence[str], *, timeout_seconds: float
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._count = len(destinations)
        parts = parse_destinations(destinations)
        ground = holder.ground
        for each in parts:
            verify_uncovered(each, ground.covering)

        def body(channel: Channel) -> Report:
            return _wait_in_namespace(channel, ground, container, parts)

        self._child = Child(_WHAT, body, gone=HolderGone, keep=ground.descriptors)
        try:
            self._child.receive(timeout_seconds)
        except BaseException:
            self._child.close()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.close()

    def attach(self, mount_fds: Sequence[int]) -> None:
        """Say "go": attach each mount at its destination.

        Args:
            mount_fds: Detached mounts, in the order of the destinations.

        Raises:
            DestinationRefused: A destination changed since it was prepared; nothing is attached.
            SystemCallFailed: The kernel refuses; nothing is attached.
            HolderGone: The child gave no answer: end the container.
        """
        if len(mount_fds) != self._count:
            raise RuntimeError("as many mounts as destinations were prepared can be attached")
        try:
            self._child.send({"go": self._count}, mount_fds)
            self._child.receive(self._timeout_seconds)
            self._child.join(self._timeout_seconds)
        except BaseException:
            self._child.close()  # what it has done is done when this returns
            raise


def _wait_in_namespace(
    channel: Channel, ground: Ground, container: ContainerView, parts: Sequence[Sequence[str]]
) -> Report:
    """The child: enter, prepare, wait, attach."""
    os.umask(0o022)
    with syscalls.failing("our own /proc directory cannot be opened"):
        # Opened here: after a pivot the namespace's /proc may be the container's, or missing.
        proc_fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    ours = mounts.load_mountinfo(proc_fd)
    if ground.namespace_fd is not None:
        enter_mount_namespace(ground.namespace_fd)
    root_fd = ground.root_fd
    if root_fd is None:
        root_fd = ground.root.open_in_namespace(mounts.load_mountinfo(proc_fd), ours)
    with syscalls.failing("the container's mounts cannot be looked at"):
        allowed = _allowed_mounts(root_fd, proc_fd, ground, container, ours)
        before = allowed()
        uid, gid = container.uid_offset, container.gid_offset
        destinations = [
            prepare_destination(root_fd, each, before, uid=uid, gid=gid, host_root_fd=ground.host_root_fd)
            for each in parts
        ]
        for each in parts:
            verify_uncovered_beneath(root_fd, each, ground.covering)
        channel.send({"ready": len(destinations)})
        received = channel.receive()
        if received is None:
            raise HolderGone("the hook ended before the models could be attached")
        now = allowed()
        for fd, each in zip(destinations, parts, strict=True):
            now.verify(syscalls.statx_mount_id(fd), "/" + "/".join(each))
        # From here on the hook's death must not leave a part of the models: it is a handful of calls.
        syscalls.prctl_set_pdeathsig(0)
    attach_all(received[1], destinations, proc_fd)
    return {"attached": len(destinations)}


def _allowed_mounts(
    root_fd: int, proc_fd: int, ground: Ground, container: ContainerView, ours: Sequence[mounts.Mount]
) -> Callable[[], AllowedMounts]:
    """What may carry a model, by the mounts at the moment of the call."""
    root_mount_id = syscalls.statx_mount_id(root_fd)
    # Where the sandbox makes them itself there are none to lie on.
    tmpfs = {} if ground.covering else find_mounts(root_fd, container.tmpfs_destinations)
    volumes = {} if ground.covering else find_mounts(root_fd, container.memory_volumes)
    foreign = frozenset(mount.device for mount in ours)

    def allowed() -> AllowedMounts:
        return allow_mounts(
            mounts.load_mountinfo(proc_fd),
            root_mount_id=root_mount_id,
            tmpfs_mount_ids=tmpfs.values(),
            foreign_devices=foreign,
            volumes=volumes,
            private=ground.private,
        )

    return allowed


def attach_all(mount_fds: Sequence[int], destinations: Sequence[int], proc_fd: int) -> None:
    """Attach every mount, or take back those that were attached, in the caller's mount namespace.

    Args:
        mount_fds: Detached mounts.
        destinations: O_PATH, a directory for each.
        proc_fd: Of the caller's own /proc directory.

    Raises:
        SystemCallFailed: One could not be attached, or something is mounted over or in one.
    """
    if len(mount_fds) != len(destinations):
        raise SystemCallFailed(f"{len(mount_fds)} mounts arrived for {len(destinations)} destinations")
    with ExitStack() as attached:
        for mount_fd, destination in zip(mount_fds, destinations, strict=True):
            mounts.attach(mount_fd, destination)
            attached.callback(mounts.detach, mount_fd)
        ours = {syscalls.statx_mount_id(fd) for fd in mount_fds}
        if any(mount.parent_id in ours for mount in mounts.load_mountinfo(proc_fd)):
            raise SystemCallFailed("something is mounted over or in a model that was attached")
        attached.pop_all()
