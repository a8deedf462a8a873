"""How many cores this process may keep busy: what it may run on, and what its control groups pay for.

A quota is of the group and of all groups above it, in both versions of control groups; the writer reads it after it has
joined the container's group, so that on version 2 the container's quota counts, on version 1 the engine's. Sources:
sched_setaffinity(2), Documentation/scheduler/sched-bwc.rst, Documentation/admin-guide/cgroup-v2.rst on `cpu.max`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from oci_hook.delivery.memory import Cgroup, find_cgroup
from oci_hook.errors import SystemCallFailed
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import load_mountinfo
from oci_hook.linux.processes import read_bounded

_FILE_LIMIT_BYTES = 1 << 16


def usable_cores() -> int:
    """The cores that the affinity allows, or fewer if a quota does; at least 1. What cannot be read limits nothing."""
    cores = len(os.sched_getaffinity(0))
    if cores > 1:
        with suppress(SystemCallFailed):  # our own group is not found
            cores = min(cores, load_quota_cores(_own_group()))
    return cores


def _own_group() -> Cgroup | None:
    with syscalls.failing("our own control group cannot be looked at"):
        proc_fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd = os.open("cgroup", os.O_RDONLY, dir_fd=proc_fd)
            return find_cgroup("cpu", read_bounded(fd, "cgroup", _FILE_LIMIT_BYTES), load_mountinfo(proc_fd))
        finally:
            os.close(proc_fd)


def load_quota_cores(cgroup: Cgroup | None) -> int:
    """The cores that a group and all above it pay for, begun ones counted whole; all that there are without a quota.

    A group whose files cannot be read limits nothing, and those above it still do.
    """
    least = os.cpu_count() or 1
    path = cgroup.path if cgroup is not None else ""
    while cgroup is not None:
        names = ("cpu.max",) if cgroup.version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        # The root group, and groups without the controller, have no such file; others may be refused to us.
        with suppress(OSError, SystemCallFailed):
            least = min(least, _quota([number for name in names for number in _numbers(f"{path}/{name}")], least))
        if path == cgroup.top:
            break
        path = os.path.dirname(path)
    return least


def _numbers(path: str) -> list[bytes]:
    return read_bounded(os.open(path, os.O_RDONLY), path, _FILE_LIMIT_BYTES).split()


def _quota(numbers: Sequence[bytes], unlimited: int) -> int:
    """Cores of `[quota, period]` in microseconds; `max` and -1 are no quota."""
    if len(numbers) != 2 or not all(number.isdigit() and len(number) < 20 and int(number) for number in numbers):
        return unlimited
    quota, period = map(int, numbers)
    return -(-quota // period)
