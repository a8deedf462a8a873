"""Whether a model fits, asked before it is decrypted: in the container's memory control group, and on the node.

Plaintext cannot be swapped, and a writer over its group's limit is killed without a word, so the limits are compared
beforehand. On the node a reserve stays free: what other hooks have promised themselves but not yet used is counted
from small files under one lock; each names its process, and those of processes that are gone are dropped.

It charges nothing itself: `join_cgroup` is for the writer. cgroup v1 and v2, also both at once (hybrid): the memory
controller's hierarchy is the one. Sources: cgroups(7), Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from oci_hook.errors import MemoryRefused, SystemCallFailed
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import Mount
from oci_hook.linux.processes import process_start_time, read_bounded
from oci_hook.locks import lock_file

_LOCK, _RESERVATIONS = "memory.lock", "reservations"
_RESERVATION = re.compile(r"([1-9][0-9]{0,9})\.([0-9]{1,20})")
_NUMBER_LIMIT_BYTES = 64
_STAT_LIMIT_BYTES = 1 << 16
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A control group in the hierarchy of one controller, found through our own mounts.

    Attributes:
        version: 1 or 2.
        top: Where the hierarchy is mounted.
        path: Of the group; `top` or below.
    """

    version: int
    top: str
    path: str


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """One group on the way up: its limit and usage in bytes; `reclaimable` is page cache that the kernel drops."""

    path: str
    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int

    @property
    def room_bytes(self) -> int:
        """What can still be charged."""
        return self.limit_bytes - max(0, self.usage_bytes - self.reclaimable_bytes)


def find_memory_cgroup(cgroup: bytes, mounts: Sequence[Mount]) -> Cgroup | None:
    """Where a process's memory is charged; as `find_cgroup`."""
    return find_cgroup("memory", cgroup, mounts)


def find_cgroup(controller: str, cgroup: bytes, mounts: Sequence[Mount]) -> Cgroup | None:
    """The group of a process in a controller's hierarchy.

    Args:
        controller: Such as `memory`.
        cgroup: The process's `/proc/<pid>/cgroup`.
        mounts: Our own.

    Returns:
        None if the controller has no group for it.

    Raises:
        SystemCallFailed: There is such a group, but it is not below any mount that we see.
    """
    unified = None
    for line in cgroup.splitlines():
        _, _, rest = line.partition(b":")
        controllers, separator, path = rest.partition(b":")
        if separator and controller.encode() in controllers.split(b","):
            own = [mount for mount in mounts if mount.kind == "cgroup" and controller in mount.super_options]
            return _mounted(1, os.fsdecode(path), own)
        if separator and not controllers:
            unified = os.fsdecode(path)
    candidates = [mount for mount in mounts if mount.kind == "cgroup2"]
    return _mounted(2, unified, candidates) if unified is not None and candidates else None


def _mounted(version: int, path: str, candidates: Sequence[Mount]) -> Cgroup:
    parts = path.split("/")
    for mount in candidates:
        root = [] if mount.root == "/" else mount.root.split("/")[1:]
        # "/.." in either: it lies outside our cgroup namespace.
        if ".." not in parts and ".." not in root and parts[1 : 1 + len(root)] == root:
            below = [part for part in parts[1 + len(root) :] if part]
            return Cgroup(version, mount.mount_point, os.path.join(mount.mount_point, *below))
    raise SystemCallFailed("the container's control group is not below any cgroup mount that the hook sees")


def load_levels(cgroup: Cgroup) -> tuple[MemoryLevel, ...]:
    """The limits of a group and of all groups above it that have one.

    Raises:
        SystemCallFailed: A file of the group cannot be read.
    """
    names = {
        1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", b"total_inactive_file"),
        2: (("memory.max", "memory.high"), "memory.current", b"inactive_file"),
    }
    limits, usage, cache = names[cgroup.version]
    levels = []
    path = cgroup.path
    while True:
        found = [limit for name in limits if (limit := _load_number(f"{path}/{name}")) is not None]
        used = _load_number(f"{path}/{usage}")
        if found and used is not None:
            levels.append(MemoryLevel(path, min(found), used, _load_stat(f"{path}/memory.stat", cache)))
        if path == cgroup.top:
            return tuple(levels)
        path = os.path.dirname(path)


def _load(path: str, limit_bytes: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # the root group, and groups without the controller, have none
        return None
    except OSError as cause:
        raise SystemCallFailed(f"{path} cannot be opened: {cause.strerror}") from cause
    return read_bounded(fd, path, limit_bytes)


def _load_number(path: str) -> int | None:
    text = _load(path, _NUMBER_LIMIT_BYTES)
    if text is None or text.strip() == b"max":
        return None
    if not re.fullmatch(rb"[0-9]{1,20}\n?", text):
        raise SystemCallFailed(f"{path} does not hold a number")
    return int(text)


def _load_stat(path: str, key: bytes) -> int:
    found = re.search(rb"^" + key + rb" ([0-9]{1,20})$", _load(path, _STAT_LIMIT_BYTES) or b"", re.MULTILINE)
    return int(found[1]) if found else 0


def verify_limits(levels: Sequence[MemoryLevel], need_bytes: int) -> None:
    """Raise unless every group has room.

    Raises:
        MemoryRefused: The tightest has not.
    """
    tightest = min(levels, key=lambda level: level.room_bytes, default=None)
    if tightest is not None and tightest.room_bytes < need_bytes:
        raise MemoryRefused(
            f"the model needs {_mib(need_bytes)}, but the control group {tightest.path} has a limit of "
            f"{_mib(tightest.limit_bytes)} and {_mib(max(0, tightest.room_bytes))} left"
        )


def verify_reserve(available_bytes: int, reserved_bytes: int, need_bytes: int, reserve_bytes: int) -> None:
    """Raise unless the node keeps its reserve.

    Args:
        available_bytes: MemAvailable.
        reserved_bytes: What other hooks have promised themselves.
        need_bytes: What this one wants.
        reserve_bytes: What must stay.

    Raises:
        MemoryRefused: It would not.
    """
    left = available_bytes - reserved_bytes - need_bytes
    if left < reserve_bytes:
        raise MemoryRefused(
            f"the model needs {_mib(need_bytes)}; the node has {_mib(available_bytes)} available, of which "
            f"{_mib(reserved_bytes)} are promised to other starts, and keeps {_mib(reserve_bytes)} in reserve"
        )


def keeps_cache(
    levels: Sequence[MemoryLevel], available_bytes: int, need_bytes: int, sealed_bytes: int, reserve_bytes: int
) -> bool:
    """Whether the encrypted files may stay in the page cache, where a restart finds them: if there is room for both.

    Args:
        levels: The container's groups: what the writer reads is charged there.
        available_bytes: MemAvailable.
        need_bytes: What the plaintext takes.
        sealed_bytes: What the encrypted files take.
        reserve_bytes: What must stay on the node.
    """
    both = need_bytes + sealed_bytes
    return available_bytes - both >= reserve_bytes and all(level.room_bytes >= both for level in levels)


def _mib(count_bytes: int) -> str:
    return f"{-(-count_bytes // _MIB)} MiB"


def join_cgroup(cgroup: Cgroup) -> None:
    """Have this process's future pages charged to a group. It is exposed to the group's limits from here on.

    Raises:
        SystemCallFailed: The kernel refuses: the pages would be charged to the engine, so nothing is written.
    """
    with syscalls.failing("the container's memory control group cannot be joined"):
        fd = os.open(f"{cgroup.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def load_available_memory() -> int:
    """MemAvailable of the node, in bytes.

    Raises:
        SystemCallFailed: /proc/meminfo cannot be read.
    """
    found = re.search(rb"^MemAvailable: +([0-9]{1,15}) kB$", _load("/proc/meminfo", 1 << 16) or b"", re.MULTILINE)
    if found is None:
        raise SystemCallFailed("/proc/meminfo has no MemAvailable")
    return int(found[1]) * 1024


class Reservation:
    """A promise of memory that other hooks count until the `with` block ends."""

    def __init__(self, path: str, need_bytes: int) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._write(need_bytes)

    def keep(self, left_bytes: int) -> None:
        """Promise only what is not yet used: used memory is missing from MemAvailable already."""
        with suppress(OSError):  # a promise that stays too large errs on the safe side
            self._write(left_bytes)

    def _write(self, count_bytes: int) -> None:
        os.pwrite(self._fd, b"%020d\n" % count_bytes, 0)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        with suppress(FileNotFoundError):
            os.unlink(self._path)


def reserve_memory(
    runtime_directory: str,
    need_bytes: int,
    reserve_bytes: int,
    *,
    timeout_seconds: float,
    available: Callable[[], int] = load_available_memory,
) -> Reservation:
    """Promise this process a part of the node's memory, if the reserve stays.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm; made if missing.
        need_bytes: What will be used.
        reserve_bytes: What must stay available.
        timeout_seconds: For the lock, which is held for a few file operations.
        available: Gives MemAvailable in bytes.

    Raises:
        MemoryRefused: The reserve would not stay.
        SystemCallFailed: The lock or a file cannot be had.
    """
    folder = os.path.join(runtime_directory, _RESERVATIONS)
    with syscalls.failing("memory cannot be reserved"):
        for path in (runtime_directory, folder):  # one by one: makedirs gives the mode to the last alone
            os.makedirs(path, mode=0o700, exist_ok=True)
        lock = os.path.join(runtime_directory, _LOCK)
        with lock_file(lock, timeout_seconds=timeout_seconds, error=SystemCallFailed):
            own = f"{os.getpid()}.{process_start_time(os.getpid())}"
            verify_reserve(available(), _sum_reservations(folder, own), need_bytes, reserve_bytes)
            return Reservation(os.path.join(folder, own), need_bytes)


def _sum_reservations(folder: str, own: str) -> int:
    """What live processes other than `own` have promised themselves; what dead ones left is removed."""
    total = 0
    for name in os.listdir(folder):
        found = _RESERVATION.fullmatch(name)
        path = os.path.join(folder, name)
        if found is None or process_start_time(int(found[1])) != int(found[2]):
            with suppress(FileNotFoundError):
                os.unlink(path)
        elif name != own:
            total += _load_number(path) or 0
    return total
