"""Whose mount namespace holds the container's root file system.

Under runc and crun it is the container's init (`state.pid`), which waits while the hook runs: a child of the runtime,
as the hook is, in a mount namespace of its own, where the root file system is the very directory that the hook sees at
`root.path`. All of this is checked; what is not recognised is refused. gVisor's gofer and VM sandboxes are not here
yet. `state.pid`'s own executable says nothing (it reads `/`).

This module opens and compares; it enters no namespace. Facts: docs/runtimes.md; runtime-spec 1.3, "State".
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from oci_hook.documents import shown
from oci_hook.errors import HolderGone, HolderRefused, SpecInvalid
from oci_hook.linux import syscalls
from oci_hook.linux.processes import HeldProcess, ancestors

Runtime = Literal["runc", "crun"]

_MOUNT_NAMESPACE = "ns/mnt"
_RUNTIME = re.compile(r"(runc|crun)(?:[^a-z].*)?", re.DOTALL)


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


@dataclass(frozen=True, slots=True)
class RootIdentity:
    """The root file system's directory: where the hook sees it, and what it is."""

    path: str
    device: int
    inode: int

    def open_in_namespace(self) -> int:
        """Open it from inside the holder's mount namespace; the caller closes it.

        Before pivot_root it lies at the host's path; crun since 1.29 may have pivoted, then it is `/`.

        Raises:
            HolderRefused: It lies at neither: this namespace is not the container's.
        """
        for path in (self.path, "/"):
            try:
                fd = syscalls.openat2(
                    syscalls.AT_FDCWD,
                    path,
                    os.O_PATH | os.O_DIRECTORY,
                    resolve=syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_SYMLINKS,
                )
            except OSError:
                continue
            seen = os.fstat(fd)
            if (seen.st_dev, seen.st_ino) == (self.device, self.inode):
                return fd
            os.close(fd)
        raise HolderRefused("the process's mount namespace does not hold the container's root file system")


def recognise_runtime(executable_name: str) -> Runtime:
    """The runtime whose executable has this name: `runc`, `crun`, or one followed by what is not a small letter.

    Raises:
        HolderRefused: It is neither.
    """
    found = _RUNTIME.fullmatch(executable_name)
    if found is None:
        raise HolderRefused(f"the runtime {shown(executable_name)} is not recognised")
    return "runc" if found[1] == "runc" else "crun"


class Holder:
    """The process that holds the root file system, held itself until the `with` block ends.

    Attributes:
        process: `state.pid`.
        mount_namespace_fd: Its mount namespace.
        root: What the root file system is.
        runtime: Who started it.

    Args:
        container: The container.

    Raises:
        HolderRefused: A check below failed.
        HolderGone: The process ended meanwhile.
        SpecInvalid: `root.path` is no directory.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(self, container: ContainerView) -> None:
        # 1. The container has a mount namespace of its own, not another's by path.
        if container.mount_namespace_joined:
            raise HolderRefused("config.json joins another mount namespace by path")
        with ExitStack() as stack:
            if container.pid <= 1:
                raise HolderRefused(f"the state names process {container.pid}")
            self.process = stack.enter_context(HeldProcess(container.pid))
            # 2. The runtime that runs this hook is one whose ways are known.
            runtime_pid = os.getppid()
            with HeldProcess(runtime_pid) as runtime:
                self.runtime: Runtime = recognise_runtime(runtime.executable_name())
                # 3. It made the process: no other container's, no successor of a pid that was used before.
                _verify_made_by(self.process, runtime, self.runtime)
                foreign = _namespace_ids(runtime)
            # 4. Its mount namespace is neither the runtime's, nor ours, nor the host's.
            self.mount_namespace_fd = self.process.open(_MOUNT_NAMESPACE)
            stack.callback(os.close, self.mount_namespace_fd)
            self._namespace_id = _file_id(os.fstat(self.mount_namespace_fd))
            if self._namespace_id in foreign:
                raise HolderRefused("the container runs in the host's or the runtime's own mount namespace")
            # 5. The root file system is a directory below the host's, not the host's own.
            self.root = identify_root(container.bundle, container.root_path)
            # 6. What was opened belongs to one process, which lives still. That the root file system lies in the
            #    namespace is seen by the child that enters it (`RootIdentity.open_in_namespace`).
            self.verify_unchanged()
            self._descriptors = stack.pop_all()

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._descriptors.close()

    def verify_unchanged(self) -> None:
        """Raise unless the process lives still, with the parent, start time and mount namespace that it had.

        Raises:
            HolderGone: It does not.
        """
        self.process.verify_same()
        try:
            now = _file_id(os.stat(_MOUNT_NAMESPACE, dir_fd=self.process.proc_fd))
        except OSError as cause:
            raise HolderGone(f"process {self.process.pid} ended") from cause
        if now != self._namespace_id:
            raise HolderGone(f"process {self.process.pid} is in another mount namespace now")


def _verify_made_by(process: HeldProcess, runtime: HeldProcess, name: Runtime) -> None:
    """Raise unless the runtime made the process.

    It is the runtime's child. crun forks once more where a user namespace meets namespaces that exist already (podman's
    `--uidmap` with a network namespace); the process in between has ended then, and an ancestor of the runtime that
    reaps orphans (conmon, init) has adopted the container's.

    Raises:
        HolderRefused: It did not.
        HolderGone: One of them ended.
        SystemCallFailed: /proc cannot be read.
    """
    if process.parent_pid == runtime.pid:
        return
    younger = process.start_time >= runtime.start_time
    if name == "crun" and younger and process.parent_pid in ancestors(runtime):
        return
    raise HolderRefused(f"process {process.pid} was not made by the runtime that started this hook")


def identify_root(bundle: str, root_path: str) -> RootIdentity:
    """The root file system as the hook sees it.

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


def _file_id(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino


def _namespace_ids(runtime: HeldProcess) -> frozenset[tuple[int, int]]:
    """The mount namespaces that are not a container's: the runtime's, this process's, the host's init's."""
    with syscalls.failing("our own mount namespaces cannot be looked at"):
        found = {
            _file_id(os.stat(_MOUNT_NAMESPACE, dir_fd=runtime.proc_fd)),
            _file_id(os.stat("/proc/self/ns/mnt")),
        }
        # Hidden where init has more capabilities than we (a hook in a sandbox); a container reaches init's namespace
        # only by path, which was refused, or through the runtime's, which is in the set.
        with suppress(PermissionError):
            found.add(_file_id(os.stat("/proc/1/ns/mnt")))
        return frozenset(found)
