"""The record of models that came before their container's `create`, and reach it by bind entries.

Its container is known to be gone by the process that adopted it. Until then it is known never to come by the process
that creates it, which may create others for years (podman's API service, containerd), by the engine's folder of the
container, and by time. And by the bundle, where it is known. It writes and removes nothing (`delivery.host_records`).
Decision: docs/adr/0014-before-create.md.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from oci_hook.documents import Fields
from oci_hook.errors import FileUnreadable
from oci_hook.linux.processes import process_start_time

KIND = "before-create"
NOBODY = (0, 0)
"""In the place of a process: none yet."""
ADOPTION_SECONDS = 600
"""From the record to its adoption: an engine goes on with a container at once, and a hook of ours takes 300 at most."""
_MAX_SECONDS = 1 << 40


@dataclass(frozen=True, slots=True)
class HostMount:
    """One model.

    Attributes:
        path: On the host.
        fsid: `f_fsid` of its file system.
        device: `major:minor` of its superblock; both together know it again.
        destination: In the container, if a bind entry shows it there; else empty.
    """

    path: str
    fsid: int
    device: str
    destination: str = ""


@dataclass(frozen=True, slots=True)
class BoundRecord:
    """The models of one container that came before its `create`, and reach it by bind entries.

    Attributes:
        container_id: The engine's.
        bundle: The state's `bundle`; empty until it is known.
        namespace: Device and inode of the mount namespace that they are in.
        runtime: Which runtime they were admitted for, `kata` say.
        creator: Pid and start time of a process that lives until the container is adopted.
        container: Of the process that lives as long as the container does; `NOBODY` until it is adopted.
        mounts: The models, each with its destination.
        folder: What is there as long as the container may still come: the engine's folder of it; empty: not known.
        adopt_by: Seconds on the clock that counts from boot; who has not adopted it by then never will. 0: no matter.
    """

    container_id: str
    bundle: str
    namespace: tuple[int, int]
    runtime: str
    creator: tuple[int, int]
    container: tuple[int, int]
    mounts: tuple[HostMount, ...]
    folder: str = ""
    adopt_by: int = 0

    def is_stale(self) -> bool:
        """Whether its container is known to be gone, or never to come."""
        if self.bundle and not os.path.isdir(self.bundle):
            return True
        if self.container != NOBODY:
            return not lives(self.container)
        if self.folder and not os.path.isdir(self.folder):
            return True
        return not lives(self.creator) or 0 < self.adopt_by < seconds_since_boot()

    def is_held_by_another(self, process: tuple[int, int]) -> bool:
        """Whether a process other than this one has adopted it, and lives."""
        return self.container not in (NOBODY, process) and lives(self.container)


def lives(process: tuple[int, int]) -> bool:
    """Whether a process, by pid and start time, has not ended."""
    return process_start_time(process[0]) == process[1]


def seconds_since_boot() -> int:
    """Of the clock that nobody sets, and that goes on while the host sleeps."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


def take_bound(fields: Fields, path: str) -> BoundRecord:
    """Such a record, all but its `kind`.

    Raises:
        FileUnreadable: It is none.
    """
    return BoundRecord(
        container_id=fields.string("container_id"),
        bundle=_take_path(fields, "bundle"),
        namespace=take_pair(fields, "namespace", path),
        runtime=fields.string("runtime", limit=64),
        creator=take_pair(fields, "creator", path),
        container=take_pair(fields, "container", path),
        mounts=fields.items("mounts", lambda value: read_mount(value, path, bound=True), low=1, high=64),
        folder=_take_path(fields, "folder") if fields.has("folder") else "",
        adopt_by=fields.integer("adopt_by", low=0, high=_MAX_SECONDS) if fields.has("adopt_by") else 0,
    )


def _take_path(fields: Fields, name: str) -> str:
    value = fields.take(name)
    return "" if value == "" else Fields({name: value}, what=name, error=FileUnreadable).string(name, limit=4096)


def take_pair(fields: Fields, name: str, path: str) -> tuple[int, int]:
    """A required list of two numbers from a record.

    Raises:
        FileUnreadable: It is none.
    """
    values = tuple(fields.items(name, lambda value: _number(value, path), low=2, high=2))
    return values[0], values[1]


def _number(value: object, path: str) -> int:
    if type(value) is not int or value < 0:
        raise FileUnreadable(f"{path}: a number is none")
    return value


def read_mount(value: object, path: str, *, bound: bool) -> HostMount:
    """One model of a record.

    Raises:
        FileUnreadable: It is none.
    """
    fields = Fields(value, what=path, error=FileUnreadable)
    mount = HostMount(
        path=fields.string("path", limit=1 << 13),
        fsid=fields.integer("fsid", low=0, high=(1 << 64) - 1),
        device=fields.string("device", pattern=r"[0-9]+:[0-9]+"),
        destination=fields.string("destination", limit=4096) if bound else "",
    )
    fields.finish()
    return mount
