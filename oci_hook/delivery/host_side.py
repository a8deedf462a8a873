"""A container of a gVisor pod: its gofer does not exist while the hook runs, so the model is mounted on the host.

runsc makes that gofer in `start`, and it takes over what is mounted below the root file system then. The pod's own
gofer serves another container and is never touched. The mount is on the host until the container is deleted: only
below a directory that other users cannot enter, and never without a record by which it is removed (`host_mounts`).

Source: gVisor, runsc/container/container.go (`New`, `createSubcontainer`), state_file.go.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

from oci_hook.delivery import host_mounts
from oci_hook.delivery.gofer import SANDBOX, find_gofers, flag, verify_joining_writes_in_memory
from oci_hook.delivery.holder import (
    ContainerView,
    Ground,
    Holder,
    identify_root,
    own_mount_namespace,
)
from oci_hook.delivery.host_records import HostMount, HostRecord, HostRecords
from oci_hook.documents import shown
from oci_hook.errors import HolderRefused, SystemCallFailed
from oci_hook.linux.processes import HeldProcess
from oci_hook.locks import lock_descriptor

_ID = re.compile(r"[A-Za-z0-9_+.-]{1,255}")


class HostSide(Holder):
    """The host's side of the root file system of a container that joins a pod's sandbox.

    Args:
        container: The container.
        runtime: The process that runs this hook.
        runtime_directory: For the record.
        timeout_seconds: For its lock.

    Raises:
        HolderRefused: A check below failed.
        EngineUnsupported: What the containers of the pod write would go to the host's disk.
        HolderGone: The sandbox or the runtime ended meanwhile.
        SpecInvalid: `root.path` is no directory.
        FileUnreadable: The lock cannot be made.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(
        self, container: ContainerView, runtime: HeldProcess, *, runtime_directory: str, timeout_seconds: float
    ) -> None:
        with ExitStack() as stack:
            # 1. The engine vouches that the container joins a pod, and the runtime has made no gofer for it.
            if not container.in_sandbox:
                raise HolderRefused(
                    "the sandbox was not made by the runtime that started this hook, and no engine vouches that the "
                    "container joins a pod",
                    remedy="name the engine: `sczctl install --engine ENGINE`, or `engine` in the configuration",
                )
            if find_gofers(runtime):
                raise HolderRefused("a container that joins a pod has a gofer already while its hook runs")
            # 2. `state.pid` is a sandbox that was there before, and the runtime's state puts the container into it.
            sandbox = stack.enter_context(HeldProcess(container.pid))
            self._runtime_root, self._sandbox_id = _identify_sandbox(sandbox, runtime, container.container_id)
            verify_joining_writes_in_memory(sandbox.arguments(), runtime.arguments(), container.annotations)
            # 3. The root file system is the container's own directory, below one that other users cannot enter.
            root = identify_root(container.bundle, container.root_path)
            verify_closed(root.path)
            root_fd = root.open_here()
            stack.callback(os.close, root_fd)
            self._container = container
            self._record: HostRecord | None = None
            self._creator = (runtime.pid, runtime.start_time)
            self._runtime_executable = "/".join(runtime.arguments()[:1])
            self._records = HostRecords(runtime_directory)
            self._timeout_seconds = timeout_seconds
            self._remove_earlier()
            # Opened before the child is forked that will attach: it shares the lock and holds it to its own end.
            lock_fd = self._records.open_lock()
            stack.callback(os.close, lock_fd)
            covering = (*container.mount_destinations, *container.tmpfs_destinations, *container.memory_volumes)
            ground = Ground(root, None, root_fd, private=False, covering=covering, lock_fd=lock_fd)
            super().__init__("runsc", sandbox, ground, stack, keeper=None)
            self.verify_unchanged()
            self._descriptors = stack.pop_all()

    def verify_unchanged(self) -> None:
        """Raise unless the sandbox lives still. Its parent, the runtime that made the pod, may end at any time.

        Raises:
            HolderGone: It does not.
        """
        self.process.verify_alive()

    @contextmanager
    def announcing(self, mount_fds: Sequence[int], destinations: Sequence[str]) -> Iterator[None]:
        """Hold the lock until the holder is let go, and write the record.

        Raises:
            FileUnreadable: The record cannot be written.
            SystemCallFailed: The lock was held for too long.
        """
        lock_fd, records, container = self.ground.lock_fd, self._records, self._container
        if lock_fd is None:
            raise RuntimeError("the lock is open as long as the holder is held")
        what = "the record of mounts on the host"
        lock_descriptor(lock_fd, what=what, timeout_seconds=self._timeout_seconds, error=SystemCallFailed)
        # Reached by two ways with a model each: then both are this container's.
        earlier = records.load(container.container_id, container.bundle)
        record = HostRecord(
            container_id=container.container_id,
            bundle=container.bundle,
            namespace=own_mount_namespace(),
            runtime_root=self._runtime_root,
            sandbox_id=self._sandbox_id,
            runtime_executable=self._runtime_executable,
            sandbox=(self.process.pid, self.process.start_time),
            creator=self._creator,
            mounts=(*(earlier.mounts if earlier else ()), *map(self._describe, mount_fds, destinations)),
        )
        records.write(record)
        self._record = record
        yield

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Whatever came after the record: the container will not run, so its models must not stay.
            if kind is not None and self._record is not None:
                host_mounts.forget(self._records, self._record)
        finally:
            super().__exit__(kind, value, traceback)

    def _remove_earlier(self) -> None:
        """Remove what a container of the same name and bundle before this one has left: its end was not told.

        Its state file cannot be told from the new container's. This very container's own record stays: a hook may be
        run twice.
        """
        records, container = self._records, self._container
        if not records.exist():
            return
        with records.locked(timeout_seconds=self._timeout_seconds):
            earlier = records.load(container.container_id, container.bundle)
            if earlier is None or earlier.creator == self._creator:
                return
            if left := host_mounts.forget(records, earlier).left:
                raise HolderRefused(f"a model of an earlier container of this name cannot be removed: {shown(left[0])}")

    def _describe(self, mount_fd: int, destination: str) -> HostMount:
        device = os.fstat(mount_fd).st_dev
        return HostMount(
            path=self.ground.root.path + destination,
            fsid=os.fstatvfs(mount_fd).f_fsid,
            device=f"{os.major(device)}:{os.minor(device)}",
        )


def _identify_sandbox(sandbox: HeldProcess, runtime: HeldProcess, container_id: str) -> tuple[str, str]:
    """Where runsc keeps its state, and the sandbox's id.

    Raises:
        HolderRefused: The process is no sandbox that the runtime has put this container into.
        HolderGone: It ended.
        SystemCallFailed: /proc cannot be read.
    """
    arguments = sandbox.arguments()
    younger = sandbox.start_time > runtime.start_time
    if arguments[:1] != (SANDBOX,) or not _ID.fullmatch(arguments[-1]) or younger:
        raise HolderRefused(f"process {sandbox.pid} is not the sandbox of a pod")
    root = flag(arguments, "root")
    if root is None or not os.path.isabs(root):
        raise HolderRefused("the sandbox does not say by an absolute path where the runtime keeps its state")
    sandbox_id = arguments[-1]
    if not os.path.isfile(os.path.join(root, f"{container_id}_sandbox:{sandbox_id}.state")):
        raise HolderRefused(f"the runtime's state does not have this container in the sandbox {shown(sandbox_id)}")
    return root, sandbox_id


def verify_closed(root_path: str) -> None:
    """Raise unless a directory above the root file system keeps other users out.

    Args:
        root_path: Absolute, without links.

    Raises:
        HolderRefused: Any user could walk to it, or its path is not UTF-8.
    """
    try:
        root_path.encode()
    except UnicodeEncodeError as cause:
        raise HolderRefused("the path of the container's root file system is not UTF-8") from cause
    parts = root_path.split("/")[1:-1]
    for depth in range(len(parts) + 1):
        try:
            seen = os.lstat("/" + "/".join(parts[:depth]))
        except OSError as cause:
            raise HolderRefused(f"the root file system's directories cannot be looked at: {cause.strerror}") from cause
        others, group = seen.st_mode & stat.S_IXOTH, seen.st_mode & stat.S_IXGRP
        if seen.st_uid == 0 and not others and (seen.st_gid == 0 or not group):
            return
    raise HolderRefused(
        f"every user of the host could walk to {shown(root_path)}, where the model would be mounted",
        remedy="keep the engine's state below a directory of root's with mode 0700 or 0710",
    )
