"""A container that does not exist yet: its models become visible on the host, and a bind entry shows them to it.

For VM sandboxes, which share with their guest what is mounted when `create` begins and nothing that comes later. The
holder is the hook's own mount namespace; what lives as long as the holder is the process that creates the container
(its engine, the shim), until the prestart hook adopts the record. The memory is charged to the process that prepares:
there is no cgroup of the container yet, and a VM's guest memory is another's.

Source: Kata, virtcontainers, `Sandbox.shareFiles` and `Container.mountSharedDirMounts`; docs/adr/0014.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType

from oci_hook.delivery import host_mounts
from oci_hook.delivery.bound_folders import folder_of, lock_folder, remove_folder
from oci_hook.delivery.bound_record import ADOPTION_SECONDS, seconds_since_boot
from oci_hook.delivery.holder import Ground, Holder, RootIdentity, Runtime, own_mount_namespace
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostMount, HostRecords
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, HolderGone, HolderRefused, SystemCallFailed
from oci_hook.linux.processes import HeldProcess
from oci_hook.locks import lock_descriptor


class Bound(Holder):
    """The folder on the host of a container that does not exist yet.

    Args:
        container_id: The engine's.
        bundle: Absolute path of the OCI bundle, without links; empty where it is not known.
        runtime: What it will run under.
        creator: Pid and start time of the process that creates it.
        destinations: In the container; the models' places in the folder are their numbers, in this order.
        engine_folder: The engine's folder of the container, without which it will never come; empty: not known.
        runtime_directory: For folder and record.
        timeout_seconds: For the records' lock.

    Raises:
        HolderRefused: Another process prepares the same container.
        HolderGone: The creator ended.
        FileUnreadable: Folder or lock cannot be made.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(
        self,
        container_id: str,
        bundle: str,
        runtime: Runtime,
        creator: tuple[int, int],
        destinations: Sequence[str],
        *,
        engine_folder: str = "",
        runtime_directory: str,
        timeout_seconds: float,
    ) -> None:
        self._container_id, self._bundle = container_id, bundle
        self._destinations, self._engine_folder = tuple(destinations), engine_folder
        self._records = HostRecords(runtime_directory)
        self._record: BoundRecord | None = None
        self._timeout_seconds = timeout_seconds
        self._folder = folder_of(runtime_directory, container_id, bundle)
        with ExitStack() as stack:
            process = stack.enter_context(HeldProcess(creator[0]))
            if process.start_time != creator[1]:
                raise HolderGone(f"process {creator[0]} ended, which creates the container")
            stack.callback(os.close, lock_folder(self._folder, container_id))
            seen = os.stat(self._folder)
            root = RootIdentity(self._folder, seen.st_dev, seen.st_ino)
            root_fd = root.open_here()
            stack.callback(os.close, root_fd)
            # Shared by the child that attaches, which holds the lock to its own end.
            lock_fd = self._records.open_lock()
            stack.callback(os.close, lock_fd)
            ground = Ground(root, None, root_fd, private=False, lock_fd=lock_fd)
            super().__init__(runtime, process, ground, stack, keeper=None)
            self.payer = stack.enter_context(HeldProcess(os.getpid()))
            self._descriptors = stack.pop_all()

    def verify_unchanged(self) -> None:
        """Raise unless the creator lives still.

        Raises:
            HolderGone: It does not.
        """
        self.process.verify_alive()

    @contextmanager
    def announcing(self, mount_fds: Sequence[int], destinations: Sequence[str]) -> Iterator[None]:
        """Hold the lock until the holder is let go, and write the record.

        Raises:
            HolderRefused: The container has a record by now.
            FileUnreadable: The record cannot be written.
            SystemCallFailed: The lock was held for too long.
        """
        lock_fd, records = self.ground.lock_fd, self._records
        if lock_fd is None:
            raise RuntimeError("the lock is open as long as the holder is held")
        what = "the record of mounts on the host"
        lock_descriptor(lock_fd, what=what, timeout_seconds=self._timeout_seconds, error=SystemCallFailed)
        if records.load(self._container_id, self._bundle) is not None:
            raise HolderRefused(f"the container {shown(self._container_id)} has models on the host's side already")
        record = BoundRecord(
            container_id=self._container_id,
            bundle=self._bundle,
            namespace=own_mount_namespace(),
            runtime=self.runtime,
            creator=(self.process.pid, self.process.start_time),
            container=NOBODY,
            mounts=tuple(map(self._describe, mount_fds, destinations)),
            folder=self._engine_folder,
            adopt_by=seconds_since_boot() + ADOPTION_SECONDS,
        )
        self._record = record  # first: half of a record is removed, too
        records.write(record)
        yield

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                if self._record is not None:
                    host_mounts.forget(self._records, self._record)
                with suppress(FileUnreadable):
                    if self._records.load(self._container_id, self._bundle) is None:  # else the folder is that record's
                        remove_folder(self._folder)
        finally:
            super().__exit__(kind, value, traceback)

    def _describe(self, mount_fd: int, place: str) -> HostMount:
        device = os.fstat(mount_fd).st_dev
        return HostMount(
            path=self._folder + place,
            fsid=os.fstatvfs(mount_fd).f_fsid,
            device=f"{os.major(device)}:{os.minor(device)}",
            destination=self._destinations[int(place.removeprefix("/"))],
        )
