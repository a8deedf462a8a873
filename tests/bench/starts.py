"""Whole starts under runc with the real hook and a software TPM: one, its memory, a second one, and many at once.

The scene is made once for a run, and models are added to it as they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tests.bench.containers import Started, Station, memory_file_systems
from tests.bench.hot_path import HUGE, Work
from tests.bench.rows import Row, failed, make_row, sized
from tests.bench.timing import Samples, take_turns
from tests.bench.workspace import Workspace, touch_memory, warm

_MIB = 1 << 20
_CHECKS = "AES-256-GCM, every segment; manifest, grant, token, TPM"
_TARGETS = {"start": 1.5, "memory": 40.0, "second": 5.0, "second-memory": 0.0, "copies": 1.0}
_JUDGED_CROWD = 16


class Stations:
    """The scene of a run, made when the first benchmark needs it.

    Attributes:
        stack: What ends with the run.
    """

    def __init__(self, space: Workspace, stack: ExitStack) -> None:
        self._space, self.stack = space, stack
        self._station: Station | None = None
        self._models: dict[int, str] = {}

    def model(self, size_bytes: int) -> tuple[Station, str]:
        """The station, and the name of a model of that size on it."""
        if self._station is None:
            self._station = self.stack.enter_context(Station(self._space))
        if size_bytes not in self._models:
            self._models[size_bytes] = f"m{size_bytes}"
            self._station.add_model(self._models[size_bytes], size_bytes)
        return self._station, self._models[size_bytes]


def _once(station: Station, model: str | None, *, sample: bool = False) -> Started:
    with station.container(model, sample=sample) as container:
        return container.start()


def measure_start(space: Workspace, stations: Stations) -> list[Row]:
    """Row 6, for each size up to the usual one: the hook's process from its start to its exit, against `cp`."""
    rows = []
    for size in sorted({1, space.size, *(size for size in space.sizes if size < space.size)}):
        key = "start.hook" if size == space.size else f"start.{size}"
        name = f"the whole hook, {sized(size)}, TPM on swtpm"
        target = _TARGETS["start"] if size == space.size else None
        more: dict[str, Any] = {
            "target": target,
            "size": size,
            "series": "starts" if size > 1 else "",
            "checks": _CHECKS,
        }
        lacking = space.lacking(memory_bytes=4 * size, disk_bytes=4 * size)
        if lacking:
            rows.append(Row(key, name, left_out=lacking, **more))
            continue
        station, model = stations.model(size)
        work = Work(space, size)

        def hook(station: Station = station, model: str = model, size: int = size) -> float:
            warm(station.store)
            touch_memory(size)
            return _once(station, model).hook_seconds

        actions: dict[str, Callable[[], float]] = {"hook": hook, "cp": work.copy}
        found = take_turns(actions, space.rounds, space.say)
        against = f"{HUGE} (huge=within_size)"
        rows.append(make_row(key, name, found["hook"], found["cp"], against=against, **more))
    return rows


def measure_memory(space: Workspace, stations: Stations) -> list[Row]:
    """Row 5: the most private memory of the hook's processes, seen from outside, against a model of 1 byte."""
    fitting = [size for size in sorted(space.sizes) if not _lacking_for_start(space, size)]
    wanted = max(space.sizes)
    key, target = "memory.hook", _TARGETS["memory"]
    if not fitting:
        why = _lacking_for_start(space, wanted)
        return [Row(key, "private memory of the hook", unit="MiB", judged="median", target=target, left_out=why)]
    size = fitting[-1]
    station, model = stations.model(size)
    station, tiny = stations.model(1)
    actions: dict[str, Callable[[], float]] = {
        "model": lambda: _once(station, model, sample=True).hook_bytes / _MIB,
        "tiny": lambda: _once(station, tiny, sample=True).hook_bytes / _MIB,
    }
    found = take_turns(actions, min(space.rounds, 3), space.say)
    note = "the highest sum of Pss_Anon of hook and children, a look each 2 ms: each page once, also what a fork shares"
    if size != wanted:
        note += f"; not at {sized(wanted)}: {_lacking_for_start(space, wanted)}"
    name = f"private memory of the hook at {sized(size)}"
    more: dict[str, Any] = {"unit": "MiB", "judged": "median", "target": target, "size": size, "note": note}
    return [make_row(key, name, found["model"], found["tiny"], against="a model of 1 byte", factor=1, **more)]


def _lacking_for_start(space: Workspace, size: int) -> str:
    """The bundle is packed and then copied into the store; the node keeps a reserve."""
    return space.lacking(memory_bytes=size + (1 << 30), disk_bytes=2 * size + min(size, 1 << 30))


def measure_second(space: Workspace, stations: Stations) -> list[Row]:
    """Row 9: a second container of a model while the first lives, beside one of a model of 1 byte: the same checks."""
    size = space.size
    keys = {"second": "second container of a model: beyond the checks", "second-memory": "the same: extra memory"}
    lacking = space.lacking(memory_bytes=5 * size, disk_bytes=4 * size)
    if lacking:
        return [Row(f"sharing.{key}", name, target=_TARGETS[key], left_out=lacking) for key, name in keys.items()]
    station, model = stations.model(size)
    station, tiny = stations.model(1)
    times: dict[str, list[float]] = {"first": [], "second": [], "tiny": []}
    extra: list[float] = []
    own: list[float] = []
    for number in range(space.rounds):
        space.say(f"round {number + 1} of {space.rounds}")
        warm(station.store)
        with station.container(model) as first, station.container(model) as second, station.container(tiny) as small:
            times["first"].append(first.start().hook_seconds)
            alone = sum(memory_file_systems([first]).values())
            for key, container in (("second", second), ("tiny", small))[:: 1 if number % 2 else -1]:
                times[key].append(container.start().hook_seconds)
            own.append(alone / _MIB)
            extra.append(sum(memory_file_systems([first, second]).values()) / _MIB - alone / _MIB)
    found = {key: Samples(tuple(values)) for key, values in times.items()}
    said, of = station.shared()
    told = f"; the audit log says shared {said} of {of} times" if of else ""
    note = f"the first: {found['first'].median * 1e3:.0f}, {found['first'].minimum * 1e3:.0f} ms{told}"
    more: dict[str, Any] = {"judged": "difference", "target": _TARGETS["second"], "size": size, "note": note}
    memory: dict[str, Any] = {
        "unit": "MiB",
        "judged": "median",
        "target": _TARGETS["second-memory"],
        "size": size,
        "factor": 1,
    }
    return [
        make_row(
            "sharing.second",
            keys["second"],
            found["second"],
            found["tiny"],
            against="the first container of a model of 1 byte",
            **more,
        ),
        make_row(
            "sharing.second-memory",
            keys["second-memory"],
            Samples(tuple(extra)),
            Samples(tuple(own)),
            against="the first container's",
            note="bytes of memory file systems, by superblock",
            **memory,
        ),
    ]


def measure_crowd(space: Workspace, stations: Stations) -> list[Row]:
    """Row 10: many containers of one model at once, until each has read it; against as many without a model."""
    size = space.crowd_size
    rows = []
    for count in space.containers:
        key, name = f"crowd.{count}", f"{_containers(count)} of one model ({sized(size)}) at once"
        more: dict[str, Any] = {"size": count, "series": "crowd"}
        lacking = space.lacking(memory_bytes=count * (size + 40 * _MIB), disk_bytes=3 * size)
        if lacking:
            rows.append(Row(key, name, left_out=lacking, **more))
            continue
        station, model = stations.model(size)
        copies: list[dict[str, int]] = []

        def start(
            of: str | None,
            *,
            count: int = count,
            station: Station = station,
            copies: list[dict[str, int]] = copies,
        ) -> float:
            with ExitStack() as stack:
                containers = [stack.enter_context(station.container(of)) for _ in range(count)]
                began = time.monotonic()
                for container in containers:
                    container.begin()
                for container in containers:
                    container.finish()
                wall = time.monotonic() - began
                if of is not None:
                    copies.append(memory_file_systems(containers))
                for container in containers:
                    container.kill()
                for container in containers:
                    container.process.wait(60)
                return wall

        space.say(name)
        actions: dict[str, Callable[[], float]] = {
            "ours": lambda start=start, model=model: start(model),  # type: ignore[misc]
            "bare": lambda start=start: start(None),  # type: ignore[misc]
        }
        try:
            found = take_turns(actions, space.rounds, space.say)
        except Exception as error:  # of so many at once
            rows.append(Row(key, name, left_out=failed(error), **more))
            continue
        against = f"{_containers(count)} without a hook at once"
        rows.append(make_row(key, name, found["ours"], found["bare"], against=against, note="all ran", **more))
        rows.append(_crowd_memory(count, copies))
        space.look_at_the_machine()
    return rows


def _crowd_memory(count: int, copies: Sequence[Mapping[str, int]]) -> Row:
    """The bytes of memory file systems that live at once, by superblock, against one copy."""
    together = Samples(tuple(sum(found.values()) / _MIB for found in copies))
    one = Samples(tuple(max(found.values()) / _MIB for found in copies))
    more: dict[str, Any] = {"unit": "MiB", "target": _TARGETS["copies"] if count == _JUDGED_CROWD else None}
    return make_row(
        f"crowd-memory.{count}",
        f"memory of the models of {_containers(count)} at once",
        together,
        one,
        against="one copy",
        factor=1,
        size=count,
        series="crowd-memory",
        note=f"file systems: {max(len(found) for found in copies)}",
        **more,
    )


def _containers(count: int) -> str:
    return "1 container" if count == 1 else f"{count} containers"
