"""Delivery: from content keys to models that a container can read, in one order that leaves nothing on any error.

    hold the holder ─► resolve the destinations ─►(keys exist from here)─► take shared copies ─► check memory
        ─► fill detached file systems ─► seal them ─►(the audit record is synced here)─► attach, the last effect

Every step before `attach` is undone by the end of the `with` block, or by the kernel if the hook is killed: children
end with it, and detached mounts with their last descriptor. What is admitted, audited and recorded is the caller's.
Specification: docs/design.md, "Delivery".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from oci_hook.delivery.attach import Attachment
from oci_hook.delivery.attached import Attached, look_at
from oci_hook.delivery.fill import FillOptions, Target
from oci_hook.delivery.holder import MOUNT_NAMESPACE, ContainerView, Holder, Runtime, own_mount_namespace
from oci_hook.delivery.looker import Looker
from oci_hook.delivery.memory import (
    Cgroup,
    MemoryLevel,
    find_memory_cgroup,
    keeps_cache,
    load_available_memory,
    load_levels,
    reserve_memory,
    verify_limits,
)
from oci_hook.delivery.recognise import hold
from oci_hook.delivery.room import ModelDelivery, Room, model_room
from oci_hook.delivery.share import SharedCopy, take_copies
from oci_hook.delivery.share_lock import GroupLocks
from oci_hook.delivery.writer import Progress, run_writer
from oci_hook.linux import mounts
from oci_hook.linux.mounts import MemoryFilesystem
from oci_hook.linux.syscalls import failing
from oci_hook.records import ContainerRecord

__all__ = ["Attached", "ContainerView", "Delivery", "DeliverySettings", "ModelDelivery", "Progress"]

_WRITER_BYTES = 16 << 20
_INODE_BYTES = 2048
_LOOKERS = 2


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """What root's configuration says.

    Attributes:
        memory_reserve_bytes: What stays available on the node.
        runtime_directory: For the lock and the reservations.
        workers: Threads of the writer; None: by the cores.
        timeout_seconds: For each answer of a child, and between two steps of the writer.
    """

    memory_reserve_bytes: int
    runtime_directory: str
    workers: int | None
    timeout_seconds: float


class Delivery:
    """The delivery to one container; `prepare`, `share`, `fill` and `attach` are called once, in this order.

    Without `share` every model is decrypted anew, and no other container gets a copy of it.

    Args:
        container: What the state and config.json say.
        settings: What root's configuration says.
        file_system: For tests; None: the best that the kernel has.
        find: Finds the holder; None: `hold`, by the process that runs this hook.
    """

    def __init__(
        self,
        container: ContainerView,
        settings: DeliverySettings,
        *,
        file_system: MemoryFilesystem | None = None,
        find: Callable[[], Holder] | None = None,
    ) -> None:
        self._container = container
        self._find = find or self._recognise
        self._settings = settings
        self._file_system = file_system
        self._stack = ExitStack()
        self._holder: Holder | None = None
        self._attachment: Attachment | None = None
        self._destinations: tuple[str, ...] = ()
        self._targets: tuple[Target, ...] = ()
        self._shareable: frozenset[str] = frozenset()
        self._copies: tuple[SharedCopy, ...] = ()
        self._locks = GroupLocks()
        self._lookers: tuple[Looker, ...] = ()
        self._expected: tuple[ContainerRecord, ...] = ()

    def __enter__(self) -> Delivery:
        """Find the holder and hold it.

        Raises:
            HolderRefused: It is not recognised.
            EngineUnsupported: The runtime would copy the model to the host's disk.
            HolderGone: It ended.
            SpecInvalid: `root.path` is no directory.
            SystemCallFailed: /proc cannot be read.
        """
        self._holder = self._stack.enter_context(self._find())
        return self

    def _recognise(self) -> Holder:
        settings = self._settings
        return hold(
            self._container,
            runtime_directory=settings.runtime_directory,
            timeout_seconds=settings.timeout_seconds,
        )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, traceback)

    @property
    def runtime(self) -> Runtime:
        """Who started the container."""
        return self._held.runtime

    @property
    def start_time(self) -> int:
        """Start time of the container's process, in clock ticks since boot."""
        return self._held.process.start_time

    @property
    def keeper(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Pid and start time of the process in whose mount namespace the models are, and that namespace's identity.

        Zeros for the process if that is the hook's own, which outlives the container.
        """
        process = self._held.keeper
        if process is None:
            return (0, 0), own_mount_namespace()
        return (process.pid, process.start_time), process.identity(MOUNT_NAMESPACE)

    def prepare(self, destinations: Sequence[str]) -> None:
        """Resolve every destination, from a child that then waits. Before any key exists in this process.

        Raises:
            DestinationInvalid: A destination cannot be used.
            DestinationRefused: A destination leads outside or shows the model to others.
            HolderRefused: The namespace does not hold the root file system.
            HolderGone: The child ended early.
            SystemCallFailed: The kernel refuses something else.
        """
        if self._attachment is not None:
            raise RuntimeError("destinations are prepared once")
        self._destinations = tuple(destinations)
        self._attachment = self._stack.enter_context(
            Attachment(self._held, self._container, self._destinations, timeout_seconds=self._settings.timeout_seconds)
        )

    def expect_copies(self, live: Sequence[ContainerRecord]) -> None:
        """Have children wait for `share`, before any key or token is in this process; without it nothing is looked for.

        Two: one may be lost to a holder that lets it hang. Also where no container lives yet that could give something:
        of many starts at once one decrypts, and the others look for its copy after their checks.

        Args:
            live: The records of the containers that live by now; these are tried first.

        Raises:
            SystemCallFailed: There is no process or descriptor left.
        """
        if self._can_share():
            self._lookers = tuple(self._stack.enter_context(Looker()) for _ in range(_LOOKERS))
            self._expected = tuple(live)

    def _can_share(self) -> bool:
        kind = self._file_system or mounts.probe_memory_filesystem()
        return self._held.keeper is not None and self._container.agent is None and kind is MemoryFilesystem.TMPFS

    def share(self, models: Sequence[ModelDelivery], live: Callable[[], Sequence[ContainerRecord]]) -> frozenset[str]:
        """Take the copies that other containers have; until the `with` block ends, others wait for what comes of it.

        On the host's side nothing is shared: what is taken away from there is emptied first. A ramfs is not either, as
        it cannot be told from another; nor in a guest, whose agent waits a few seconds only.

        Args:
            models: Those for which owner, container and its config.json allow it.
            live: The records of the containers that live.

        Returns:
            The destinations whose models need not be filled.
        """
        if not models or not self._can_share():
            return frozenset()
        self._shareable = frozenset(model.destination for model in models)
        self._copies = take_copies(
            models,
            self._container.uid_offset,
            self._container.gid_offset,
            runtime_directory=self._settings.runtime_directory,
            live=live,
            stack=self._stack,
            locks=self._stack.enter_context(self._locks),
            lookers=self._lookers,
            expected=self._expected,
        )
        return frozenset(copy.model.destination for copy in self._copies)

    def fill(self, models: Sequence[ModelDelivery], progress: Progress | None = None) -> None:
        """Decrypt the models into detached memory file systems, and seal them. Nothing is visible yet.

        Args:
            models: One for each destination that was prepared and not shared.
            progress: Called now and then.

        Raises:
            MemoryRefused: They do not fit; nothing was decrypted.
            DecryptionRefused: A file was changed.
            FileUnreadable: A file cannot be read.
            BundleInvalid: A file is missing.
            BundleMismatch: A file has another size.
            WriterFailed: The writer ended early, or stood still for too long.
            SystemCallFailed: The kernel refuses something.
        """
        shared = [copy.model.destination for copy in self._copies]
        if self._targets or sorted([*shared, *(model.destination for model in models)]) != sorted(self._destinations):
            raise RuntimeError("the models are filled once, one for each destination that was prepared")
        if not models:
            return
        rooms = [model_room(model) for model in models]
        total = sum(room.size_bytes for room in rooms)
        # 1. The container's limits, all the way up. What the kernel keeps for itself is charged there, too.
        cgroup = self._load_cgroup()
        kernel = total // 256 + sum(room.inodes for room in rooms) * _INODE_BYTES
        levels = load_levels(cgroup) if cgroup is not None else ()
        verify_limits(levels, total + kernel + _WRITER_BYTES)
        # 2. The node's reserve.
        settings = self._settings
        with reserve_memory(
            settings.runtime_directory,
            total + kernel,
            settings.memory_reserve_bytes,
            timeout_seconds=settings.timeout_seconds,
        ) as reservation:
            # 3. File systems without a path, each just large enough.
            self._targets = tuple(map(self._target, models, rooms))
            # 4. The writer, which is charged and then gone.
            options = self._options(models, levels, total + kernel)
            run_writer(
                self._targets,
                options,
                cgroup,
                settings.timeout_seconds,
                first=self._locks.leave_to_parent,
                left=reservation.keep,
                progress=progress,
            )
        # 5. Read-only for whoever may mount; EBUSY would mean that a writer is left.
        for target in self._targets:
            mounts.seal_superblock(target.mount.fd)
            mounts.set_mount_flags(target.mount.fd)

    def _options(self, models: Sequence[ModelDelivery], levels: Sequence[MemoryLevel], need_bytes: int) -> FillOptions:
        sealed = sum(entry.layer_size for model in models for entry in model.manifest.files)
        reserve = self._settings.memory_reserve_bytes
        return FillOptions(
            uid=self._container.uid_offset,
            gid=self._container.gid_offset,
            workers=self._settings.workers,
            drop_cache=not keeps_cache(levels, load_available_memory(), need_bytes, sealed, reserve),
        )

    def _target(self, model: ModelDelivery, room: Room) -> Target:
        kind = self._file_system or mounts.probe_memory_filesystem()
        made = mounts.create_memory_filesystem(room.size_bytes, room.inodes, kind)
        return Target(model, self._stack.enter_context(made))

    def attach(self) -> tuple[Attached, ...]:
        """Make the models visible: the last effect.

        Raises:
            HolderGone: The container's process ended or changed, or gave no answer: end the container.
            DestinationRefused: A destination changed; nothing is visible.
            SystemCallFailed: The kernel refuses; nothing is visible.
        """
        ready = {target.model.destination: (target.model, target.mount.fd, "") for target in self._targets}
        ready |= {copy.model.destination: (copy.model, copy.fd, copy.filled_by) for copy in self._copies}
        if self._attachment is None or not ready or set(ready) != set(self._destinations):
            raise RuntimeError("only what was prepared and filled can be attached")
        self._held.verify_unchanged()
        fds = [ready[path][1] for path in self._destinations]
        with self._held.announcing(fds, self._destinations):
            self._attachment.attach(fds)
        return tuple(look_at(*ready[path], shareable=path in self._shareable) for path in self._destinations)

    @property
    def _held(self) -> Holder:
        if self._holder is None:
            raise RuntimeError("a delivery is used in its `with` block")
        return self._holder

    def _load_cgroup(self) -> Cgroup | None:
        with failing("our own mounts cannot be looked at"):
            proc_fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ours = mounts.load_mountinfo(proc_fd)
        finally:
            os.close(proc_fd)
        return find_memory_cgroup(self._held.payer.read("cgroup"), ours)
