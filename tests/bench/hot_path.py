"""Decrypt, authenticate and place a model, against `cp` of its plaintext: the hot path, without the hook around it.

Ours is `delivery.fill` on a packed bundle, in a forked writer, into a detached memory file system, as in
`delivery.deliver`; the time is from the fork to the writer's end. `cp` is started anew each time and writes into a file
system of its own, made the same way. Making and freeing file systems is not timed, nor is the one comparison by
SHA-256. The CPU time that each took is told as well: other programs on the machine change it less than the time.
"""

from __future__ import annotations

import hashlib
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from oci_hook.bundle.layout import open_layout
from oci_hook.delivery.fill import FillOptions, Target, fill
from oci_hook.delivery.room import model_room
from oci_hook.errors import WriterFailed
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import DetachedMount, MemoryFilesystem
from oci_hook.linux.namespaces import Channel, Child, Report
from oci_hook.linux.processes import lock_memory
from tests.bench.rows import Row, make_row, sized
from tests.bench.timing import take_turns
from tests.bench.workspace import GIB, Workspace, touch_memory, warm

Pages = Literal["within_size", "always", "never"]
HUGE, SMALL = "cp, huge-page tmpfs", "cp, default tmpfs"
_CHUNK_BYTES = 1 << 22
_CHECKS = "AES-256-GCM, every segment"
_TARGETS = {"huge": 0.75, "default": 0.35, "small": 0.85, "large": 0.70}
_LARGE_BYTES = 8 * GIB


@dataclass(frozen=True, slots=True)
class Work:
    """A model, packed and plain, and what it takes of a memory file system."""

    space: Workspace
    size_bytes: int

    @contextmanager
    def target(self, pages: Pages = "within_size") -> Iterator[Target]:
        """The model, and an empty file system just large enough; its pages as said."""
        model = self.space.packed(self.size_bytes)
        with open_layout(model.bundle) as layout:
            delivery = self.space.owner.delivery(model, layout)
            room = model_room(delivery)
            with memory(room.size_bytes, room.inodes, pages) as mount:
                yield Target(delivery, mount)

    def decrypt(self, pages: Pages = "within_size") -> float:
        """Seconds of one decryption."""
        warm(self.space.packed(self.size_bytes).bundle)
        touch_memory(self.size_bytes)
        with self.target(pages) as target:
            return _fill(target)

    def copy(self, pages: Pages = "within_size") -> float:
        """Seconds of one `cp`."""
        source = self.space.plain_folder(self.size_bytes)
        warm(source)
        files = sorted(source.iterdir())
        size = sum(-(-path.stat().st_size // mounts.PAGE_BYTES) for path in files) * mounts.PAGE_BYTES
        touch_memory(size)
        with memory(size, len(files) + 1, pages) as mount:
            return run_into(mount, ["/bin/cp", *map(str, files), "{}"])

    def verify(self, pages: Pages = "within_size") -> None:
        """What is decrypted is the plaintext: compared by SHA-256."""
        self.space.say(f"comparing {sized(self.size_bytes)} by SHA-256")
        with self.target(pages) as target:
            _fill(target)
            known: dict[int, str] = {}
            for path in sorted(self.space.plain_folder(self.size_bytes).iterdir()):
                wanted = known.setdefault(path.stat().st_ino, _digest(path))
                if _digest(Path(f"/proc/self/fd/{target.mount.fd}") / path.name) != wanted:
                    raise RuntimeError(f"{path.name} was not decrypted to what it was")


@contextmanager
def memory(size_bytes: int, inodes: int, pages: Pages) -> Iterator[DetachedMount]:
    """A detached tmpfs as a delivery makes it, but for its pages."""
    with mounts.create_memory_filesystem(size_bytes, inodes, MemoryFilesystem.TMPFS) as mount:
        if pages != "within_size":
            context = syscalls.fspick(mount.fd)
            try:
                syscalls.fsconfig_string(context, "huge", pages)
                syscalls.fsconfig_reconfigure(context)
            finally:
                os.close(context)
        yield replace(mount, huge=mount.huge and pages != "never")


def run_into(mount: DetachedMount, command: list[str], **options: object) -> float:
    """Seconds of a program that writes into a detached file system: `{}` in its words is the way there."""
    top = f"/proc/self/fd/{mount.fd}"
    began = time.perf_counter()
    done = subprocess.run(
        [word.replace("{}", top) for word in command],
        pass_fds=[mount.fd],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    took = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-500:]!r}")
    return took


def _fill(target: Target) -> float:
    def body(_channel: Channel) -> Report:
        lock_memory()
        return {"filled": fill([target], FillOptions(0, 0, None, False), lambda _done: None)}

    began = time.perf_counter()
    with Child("the writer", body, gone=WriterFailed) as writer:
        report = writer.receive(600)
        writer.join(60)
    took = time.perf_counter() - began
    if report != {"done": {"filled": sum(entry.size for entry in target.model.manifest.files)}}:
        raise RuntimeError(f"the writer said {report}")
    return took


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class _Counts:
    """What the kernel has counted until now."""

    cpu_seconds: float
    disk_bytes: int
    huge: int
    huge_refused: int

    @classmethod
    def now(cls) -> _Counts:
        """The first two of this process's children; the others of the whole machine."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        pages = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        huge = (int(pages.get(name, 0)) for name in ("thp_file_alloc", "thp_file_fallback"))
        return cls(used.ru_utime + used.ru_stime, used.ru_inblock * 512, *huge)

    def since(self, earlier: _Counts) -> _Counts:
        """The difference."""
        return _Counts(
            self.cpu_seconds - earlier.cpu_seconds,
            self.disk_bytes - earlier.disk_bytes,
            self.huge - earlier.huge,
            self.huge_refused - earlier.huge_refused,
        )


class _Counted:
    """What some actions took besides time; ours are children, as the programs are."""

    def __init__(self, actions: Mapping[str, Callable[[], float]]) -> None:
        self._taken: dict[str, list[_Counts]] = {name: [] for name in actions}
        self._actions = actions

    def actions(self) -> dict[str, Callable[[], float]]:
        """The same actions, counted."""
        return {name: partial(self._run, name) for name in self._actions}

    def _run(self, name: str) -> float:
        before = _Counts.now()
        took = self._actions[name]()
        self._taken[name].append(_Counts.now().since(before))
        return took

    def note(self, own: str, baseline: str) -> str:
        """For a reader: medians of the CPU time; and what a machine short of memory does to both."""
        first, second = (
            statistics.median(taken.cpu_seconds for taken in self._taken[name]) * 1e3 for name in (own, baseline)
        )
        said = [f"CPU time, all cores: {first:.0f} ms, of the baseline {second:.0f} ms"]
        refused = statistics.median(
            taken.huge_refused / max(1, taken.huge + taken.huge_refused) for taken in self._taken[own]
        )
        if refused >= 0.01:
            said.append(f"huge pages that the kernel was asked for and did not have: {refused:.0%}")
        disk = [statistics.median(taken.disk_bytes for taken in self._taken[name]) / GIB for name in (own, baseline)]
        if max(disk) >= 0.01:
            said.append(f"read from the disk, as the page cache did not keep it: {disk[0]:.2f}, {disk[1]:.2f} GiB")
        return "; ".join(said)


def measure(space: Workspace) -> list[Row]:
    """Rows 1 to 3: one size, three kinds of pages."""
    size = space.size
    label = sized(size)
    keys = {
        "huge": f"decrypt + authenticate + place {label}",
        "default": f"the same {label} against a default tmpfs",
        "small": f"the same {label}, 4 KiB pages only",
    }
    lacking = space.lacking(memory_bytes=3 * size, disk_bytes=2 * size)
    if lacking:
        return [Row(f"hot-path.{key}", name, target=_TARGETS[key], left_out=lacking) for key, name in keys.items()]
    work = Work(space, size)
    work.verify()
    work.verify("never")
    actions: dict[str, Callable[[], float]] = {
        "ours": work.decrypt,
        "ours, 4 KiB": lambda: work.decrypt("never"),
        "cp, huge": lambda: work.copy("within_size"),
        "cp, always": lambda: work.copy("always"),
        "cp, default": lambda: work.copy("never"),
    }
    counted = _Counted(actions)
    found = take_turns(counted.actions(), space.rounds, space.say)

    def row(key: str, own: str, baseline: str, against: str, note: str = "") -> Row:
        note = "; ".join([counted.note(own, baseline), *([note] if note else [])])
        more: dict[str, Any] = {
            "target": _TARGETS[key],
            "size": size,
            "checks": _CHECKS,
            "note": note,
        }
        return make_row(f"hot-path.{key}", keys[key], found[own], found[baseline], against=against, **more)

    always = found["cp, always"]
    beside = f"cp into huge=always: {always.median * 1e3:.0f}, {always.minimum * 1e3:.0f} ms"
    return [
        row("huge", "ours", "cp, huge", f"{HUGE} (huge=within_size)", beside),
        row("default", "ours", "cp, default", SMALL),
        row("small", "ours, 4 KiB", "cp, default", SMALL),
    ]


def measure_sizes(space: Workspace) -> list[Row]:
    """How cost grows with the model; row 4 is the one of 8 GiB."""
    rows = []
    for size in space.sizes:
        large = size >= _LARGE_BYTES
        key, name = f"sizes.{size}", f"decrypt + authenticate + place {sized(size)}"
        target = _TARGETS["large"] if large else None
        # The model in memory and its encrypted form in the page cache; the plaintext is there once for each file.
        lacking = space.lacking(memory_bytes=2 * size + min(size, GIB), disk_bytes=size + min(size, GIB))
        if lacking:
            rows.append(Row(key, name, target=target, size=size, series="sizes", left_out=lacking))
            continue
        work = Work(space, size)
        work.verify()
        counted = _Counted({"ours": work.decrypt, "cp": work.copy})
        found = take_turns(counted.actions(), space.rounds, space.say)
        more: dict[str, Any] = {
            "target": target,
            "size": size,
            "series": "sizes",
            "checks": _CHECKS,
        }
        more["note"] = counted.note("ours", "cp")
        rows.append(make_row(key, name, found["ours"], found["cp"], against=f"{HUGE} (huge=within_size)", **more))
        if size != space.size:
            space.forget(size)
        space.look_at_the_machine()
    return rows
