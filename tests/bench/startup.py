"""What is there before any byte of a model: mount, seal and attach; and the hook where no annotation is ours."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oci_hook.errors import WriterFailed
from oci_hook.invocation import ENVIRONMENT
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.namespaces import Channel, Child, Report
from tests.bench.containers import hook_command
from tests.bench.rows import Row, make_row
from tests.bench.timing import Samples, seconds, take_turns
from tests.bench.workspace import Workspace

_TARGETS = {"mount": 0.3, "idle": 8.0}
_REPEATS = 20  # of what takes so little that one look at the clock would not do
_MOUNT_MIB = 64


def measure(space: Workspace) -> list[Row]:
    """Rows 7 and 8."""
    return [_mount(space), *_idle(space)]


def _mount(space: Workspace) -> Row:
    """In a mount namespace of its own, which ends with the child."""
    place = space.folder / "mount-point"
    place.mkdir()

    def body(_channel: Channel) -> Report:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.make_private("/")
        found = take_turns({"ours": lambda: _attach(place), "mount": lambda: _command(place)}, space.rounds * 4)
        return {name: samples.values for name, samples in found.items()}

    with Child("the child that mounts", body, gone=WriterFailed) as child:
        report = child.receive(300)["done"]
        child.join(10)
    own, command = (Samples(tuple(report[name])) for name in ("ours", "mount"))
    against = "mount -t tmpfs, the program"
    more: dict[str, Any] = {"judged": "median", "target": _TARGETS["mount"]}
    return make_row("startup.mount", "mount, seal, attach", own, command, against=against, **more)


def _attach(place: Path) -> float:
    """Seconds of one, the median of a few."""
    took = []
    for _ in range(_REPEATS):
        destination = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        began = time.perf_counter()
        with mounts.create_memory_filesystem(_MOUNT_MIB << 20, 16, mounts.MemoryFilesystem.TMPFS) as mount:
            mounts.seal_superblock(mount.fd)
            mounts.set_mount_flags(mount.fd)
            mounts.attach(mount.fd, destination)
            took.append(time.perf_counter() - began)
            mounts.detach(mount.fd)
        os.close(destination)
    return statistics.median(took)


def _command(place: Path) -> float:
    words = ["/usr/bin/mount", "-t", "tmpfs", "-o", f"ro,nosuid,nodev,noexec,size={_MOUNT_MIB}m", "tmpfs", str(place)]
    took = seconds(lambda: subprocess.run(words, check=True))
    syscalls.umount2(str(place), syscalls.MNT_DETACH)
    return took


def _idle(space: Workspace) -> list[Row]:
    """A container that asks for nothing: with annotations of others in its state, and with none there."""
    config = space.folder / "idle.toml"
    config.write_text("")
    bundle = space.folder / "idle"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": {}, "root": {"path": "r"}}))
    state = {"ociVersion": "1.0.2", "id": "x", "status": "created", "pid": os.getpid(), "bundle": str(bundle)}
    others = json.dumps(state | {"annotations": {"io.kubernetes.cri.container-type": "container"}}).encode()
    none = json.dumps(state).encode()
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    hook = hook_command("prestart", config)
    environment = dict(word.split("=", 1) for word in ENVIRONMENT)

    def run(command: list[str], given: bytes) -> float:
        # Without a timeout: with one, `subprocess` looks for the end at intervals, which would be what is measured.
        return seconds(lambda: subprocess.run(command, input=given, env=environment, check=True))

    actions: dict[str, Callable[[], float]] = {
        "hook": lambda: run(hook, others),
        "hook, no annotations": lambda: run(hook, none),
        "python": lambda: run([python, "-I", "-S", "-c", "pass"], others),
        "true": lambda: run(["/bin/true"], others),
    }
    found = take_turns(actions, space.rounds * 8)
    true, bare = found["true"], found["python"]
    note = f"/bin/true: {true.median * 1e3:.2f}, {true.minimum * 1e3:.2f} ms"
    against = "python3 -I -S -c pass"
    more: dict[str, Any] = {"judged": "median", "note": note}
    first = make_row(
        "startup.idle",
        "a container without our annotation",
        found["hook"],
        bare,
        against=against,
        target=_TARGETS["idle"],
        **more,
    )
    name = "the same, its state without annotations"
    return [
        first,
        make_row("startup.idle-no-annotations", name, found["hook, no annotations"], bare, against=against, **more),
    ]
