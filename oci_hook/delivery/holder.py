"""Whose mount namespace holds the container's root file system: what is looked for, and what is found.

`hold` (delivery/recognise.py) finds it; each runtime's way is a module of its own: `container_init` (runc, crun),
`gofer` (gVisor), `host_side` (containers of a gVisor pod), `bound` (what is there before `create`). All of them give a
`Holder`, whose `Ground` is what the rest of a delivery works on: it knows no runtime.

This module compares; it enters no namespace. Facts: docs/runtimes.md; runtime-spec 1.3, "State".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from oci_hook.documents import shown
from oci_hook.errors import HolderGone, HolderRefused, SpecInvalid
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import Mount
from oci_hook.linux.processes import HeldProcess

Runtime = Literal["runc", "crun", "runsc", "kata"]

MOUNT_NAMESPACE = "ns/mnt"


@dataclass(frozen=True, slots=True)
class Agent:
    """Kata's agent, which runs the hook in a guest. Made by `oci_hook.guest`, never from what a container says.

    Attributes:
        pid: Of the process that called the hook.
        executable: Absolute path of what it has to be, by root's configuration.
        announce_fd: Gets one byte before the first model is attached; -1: none.
    """

    pid: int
    executable: str
    announce_fd: int = -1


@dataclass(frozen=True, slots=True)
class ContainerView:
    """What the state and config.json say of the container; none of it is believed without a look.

    Attributes:
        container_id: The state's `id`.
        pid: The state's `pid`.
        bundle: The state's `bundle`, absolute.
        root_path: `root.path`; relative to the bundle if not absolute.
        tmpfs_destinations: Destinations of the mounts of type tmpfs.
        uid_offset: Host uid of the container's root; 0 without a user namespace.
        gid_offset: Host gid of the container's root group.
        mount_namespace_joined: Whether `linux.namespaces` names a mount namespace by path.
        in_sandbox: The engine vouches that it joins a pod whose sandbox runs already (gVisor's sub-containers).
        mount_destinations: Of every mount in config.json, in its order.
        memory_volumes: Destinations of the pod's own memory-backed volumes (emptyDir), as the engine's kubelet names
            them.
        annotations: All of config.json: a runtime may obey some of them.
        agent: In a Kata guest, who called the hook; None elsewhere.
    """

    container_id: str
    pid: int
    bundle: str
    root_path: str
    tmpfs_destinations: frozenset[str]
    uid_offset: int
    gid_offset: int
    mount_namespace_joined: bool
    in_sandbox: bool = False
    mount_destinations: tuple[str, ...] = ()
    memory_volumes: frozenset[str] = frozenset()
    annotations: Mapping[str, str] = field(default_factory=dict)
    agent: Agent | None = None


@dataclass(frozen=True, slots=True)
class RootIdentity:
    """The root file system's directory: where the hook sees it, and what it is."""

    path: str
    device: int
    inode: int

    def is_at(self, fd: int) -> bool:
        """Whether this descriptor refers to it."""
        seen = os.fstat(fd)
        return (seen.st_dev, seen.st_ino) == (self.device, self.inode)

    def open_here(self) -> int:
        """Open it where the hook sees it; the caller closes it.

        Raises:
            HolderRefused: Another directory is there by now.
            SystemCallFailed: It cannot be opened.
        """
        with syscalls.failing("the container's root file system cannot be opened"):
            fd = open_directory(self.path)
        if not self.is_at(fd):
            os.close(fd)
            raise HolderRefused("the container's root file system was exchanged while the hook looked at it")
        return fd

    def open_in_namespace(self, theirs: Sequence[Mount], ours: Sequence[Mount]) -> int:
        """Open it from inside the holder's mount namespace; the caller closes it.

        Before pivot_root it lies at the host's path, where the runtime has mounted it onto itself: without that mount
        it is a directory that config.json names by now, not the one that the container will run on. crun since 1.29
        may have pivoted, then it is `/`.

        Args:
            theirs: The mounts of the holder's namespace.
            ours: Those of the hook's own.

        Raises:
            HolderRefused: It lies at neither: this namespace is not the container's.
        """
        added = _count(theirs, self.path) > _count(ours, self.path)
        for path in (*((self.path,) if added else ()), "/"):
            with suppress(OSError):
                fd = open_directory(path)
                if self.is_at(fd):
                    return fd
                os.close(fd)
        raise HolderRefused("the process's mount namespace does not hold the container's root file system")


def _count(mounts: Sequence[Mount], path: str) -> int:
    return sum(mount.mount_point == path for mount in mounts)


def open_directory(path: str) -> int:
    """An O_PATH descriptor of the directory at an absolute path without any link in it."""
    resolve = syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_SYMLINKS
    return syscalls.openat2(syscalls.AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, resolve=resolve)


def identify_root(bundle: str, root_path: str) -> RootIdentity:
    """The root file system as the hook sees it. Symbolic links are followed, as runtimes do; what they lead to must
    be what the holder has.

    Args:
        bundle: Absolute path of the OCI bundle.
        root_path: `root.path` of config.json.

    Raises:
        SpecInvalid: It is no directory, or the bundle's path is relative.
        HolderRefused: It is the host's own root.
    """
    if not os.path.isabs(bundle):
        raise SpecInvalid("the bundle's path is not absolute")
    try:
        path = os.path.realpath(os.path.join(bundle, root_path), strict=True)
        seen, host = os.stat(path), os.stat("/")
    except (OSError, ValueError) as cause:
        raise SpecInvalid(f"root.path {shown(root_path)} cannot be opened: {cause}") from cause
    if (seen.st_dev, seen.st_ino) == (host.st_dev, host.st_ino):
        raise HolderRefused("the container's root file system is the host's own")
    return RootIdentity(path, seen.st_dev, seen.st_ino)


def foreign_namespaces() -> frozenset[tuple[int, int]]:
    """The mount namespaces that are not a container's: this process's, which is the runtime's, and the host's init's.

    The runtime's own is not looked up by its pid: a thread of runc from 1.2 on is in the container's while hooks run,
    and may be the one that /proc shows (libcontainer/process_linux.go, `goCreateMountSources`).

    Raises:
        SystemCallFailed: /proc cannot be read.
    """
    found = {own_mount_namespace()}
    # Hidden where init has more capabilities than we (a hook in a sandbox); a container reaches init's namespace
    # only by path, which was refused, or through the runtime's, which is ours.
    with suppress(OSError):
        seen = os.stat("/proc/1/ns/mnt")
        found.add((seen.st_dev, seen.st_ino))
    return frozenset(found)


def own_mount_namespace() -> tuple[int, int]:
    """Device and inode of the mount namespace that this process is in.

    Raises:
        SystemCallFailed: /proc cannot be read.
    """
    with syscalls.failing("our own mount namespace cannot be looked at"):
        seen = os.stat("/proc/self/ns/mnt")
    return seen.st_dev, seen.st_ino


@dataclass(frozen=True, slots=True)
class Ground:
    """Where models become visible, and what holds there. Descriptors are the holder's.

    Attributes:
        root: The root file system.
        namespace_fd: The mount namespace to enter; None: the hook's own.
        root_fd: The root file system as the holder has it; None: it is looked for after entering.
        host_root_fd: The root file system as the hook's own namespace has it, if directories are to be made there.
        private: What is attached must not propagate out of the namespace.
        covering: Destinations of mounts that the sandbox will make over whatever lies there, the model too.
        lock_fd: What must stay open, and so locked, until the models are attached.
    """

    root: RootIdentity
    namespace_fd: int | None
    root_fd: int | None = None
    host_root_fd: int | None = None
    private: bool = True
    covering: tuple[str, ...] = ()
    lock_fd: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them."""
        found = (self.namespace_fd, self.root_fd, self.host_root_fd, self.lock_fd)
        return tuple(fd for fd in found if fd is not None)


class Holder:
    """What holds the root file system, held itself until the `with` block ends.

    Attributes:
        runtime: Who started the container.
        process: `state.pid`: it lives as long as the container does.
        payer: Whose cgroup the memory is charged to.
        keeper: The process in whose mount namespace the models will be; None: they will be in the hook's own.
        ground: Where to attach.

    Args:
        descriptors: Closed at the end of the block.
    """

    def __init__(
        self,
        runtime: Runtime,
        process: HeldProcess,
        ground: Ground,
        descriptors: ExitStack,
        *,
        keeper: HeldProcess | None,
    ) -> None:
        self.runtime: Runtime = runtime
        self.process = self.payer = process
        self.keeper = keeper
        self.ground = ground
        self._descriptors = descriptors

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._descriptors.close()

    def verify_unchanged(self) -> None:
        """Raise unless what is held lives still and is what it was.

        Raises:
            HolderGone: It is not.
        """
        self.process.verify_same()

    def announcing(
        self,
        mount_fds: Sequence[int],  # noqa: ARG002 - for holders that must remember them
        destinations: Sequence[str],  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Around the moment in which the mounts become visible; what must be remembered to remove them is on the disk.

        Args:
            mount_fds: Detached.
            destinations: Of each, in the container.
        """
        return nullcontext()


def verify_namespace_unchanged(process: HeldProcess, namespace: tuple[int, int]) -> None:
    """Raise unless the process lives still, with the parent, start time and mount namespace that it had.

    Raises:
        HolderGone: It does not.
    """
    process.verify_same()
    if process.identity(MOUNT_NAMESPACE) != namespace:
        raise HolderGone(f"process {process.pid} is in another mount namespace now")
