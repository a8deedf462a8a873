"""A place where containers get models by the project's delivery, with a key from a file in the TPM's place.

    workshop.bundle("c", {"/models": workshop.pack("m", files)}, args)

The hook is `tests/integration/delivery_hook.py`; what it is to do, and what it said, lie beside the OCI bundles.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci_hook.errors import SczError
from tests.models import MIB, Files, PackedModel, TestOwner, noise
from tests.runtimes import Outcome, Runsc, make_bundle, prestart, run_container

HOOK = Path(__file__).with_name("integration") / "delivery_hook.py"
SUMS = ("sh", "-c", "cd /models && find . -type f -exec sha256sum {} +")
SMALL = {"weights": noise(3 * MIB + 5), "config.json": b"{}"}


@dataclass
class Workshop:
    """An owner, a folder for everything, and what must be as before when a test ends."""

    folder: Path

    def __post_init__(self) -> None:
        self.owner = TestOwner(self.folder)
        self.pack = self.owner.pack
        self.runtime_directory = self.folder / "run"

    def bundle(
        self,
        name: str,
        models: Mapping[str, PackedModel],
        args: Sequence[str],
        *,
        instructions: Mapping[str, Any] | None = None,
        stage: str = "prestart",
        hook_seconds: int = 30,
        **options: Any,
    ) -> Path:
        """An OCI bundle whose hook delivers `models` (by destination)."""
        orders = {
            "result": str(self.result(name)),
            "owner": str(self.owner.document),
            "runtime_directory": str(self.runtime_directory),
            "models": [
                {"slot": str(slot), "destination": path, "bundle": str(model.bundle), "key": model.key.hex()}
                for slot, (path, model) in enumerate(models.items())
            ],
        } | dict(instructions or {})
        file = self.folder / f"{name}.instructions"
        file.write_text(json.dumps(orders))
        hooks = {stage: [prestart(sys.executable, "-I", HOOK, file, timeout_seconds=hook_seconds)]}
        return make_bundle(self.folder / name, args=args, hooks=hooks, **options)

    def result(self, name: str) -> Path:
        """Where the hook of the container `name` says what happened."""
        return self.folder / f"{name}.result"

    def reported(self, name: str) -> dict[str, Any]:
        """What it said."""
        report: dict[str, Any] = json.loads(self.result(name).read_text())
        return report


def host_mounts(folder: Path) -> list[str]:
    """The host's mounts that a test could have made: below its folder, or one elsewhere that bears its name."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if f"/{folder.name}" in line.split(" - ")[0]]


def hooks_alive(folder: Path) -> list[int]:
    """Processes of the test's hooks: a forked child keeps its parent's command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(HOOK).encode() in command and str(folder).encode() in command:
                found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition that must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def open_workshop(folder: Path) -> Iterator[Workshop]:
    """A workshop in `folder`; at the end nothing that its containers could have left may be there."""
    folder.chmod(0o755)
    for parent in folder.parents:
        if parent.is_relative_to("/tmp/pytest-of-root"):
            parent.chmod(0o755)  # a user namespace's root walks to the root file system
    before = host_mounts(folder)
    yield Workshop(folder)
    wait_until(lambda: hooks_alive(folder) == [])
    assert host_mounts(folder) == before
    reservations = folder / "run/reservations"
    assert not reservations.exists() or list(reservations.iterdir()) == []


def refuse(workshop: Workshop, runtime: str | Runsc, name: str, bundle: Path, error: type[SczError]) -> dict[str, Any]:
    """Run a container that must be refused with `error`, before its workload runs; what the hook said."""
    before = host_mounts(workshop.folder)
    outcome = run_container(runtime, bundle)
    report = workshop.reported(name)
    assert report["error"] == error.__name__, report
    assert outcome.returncode != 0
    assert outcome.stdout == ""
    assert host_mounts(workshop.folder) == before
    return report


def sums(files: Files) -> set[str]:
    """What `sha256sum` prints of them."""
    return {f"{hashlib.sha256(data).hexdigest()}  {path}" for path, data in files.items()}


def delivered(outcome: Outcome) -> set[str]:
    """What `SUMS` printed, without our own model.json."""
    assert outcome.returncode == 0, outcome
    return {line.replace("  ./", "  ") for line in outcome.stdout.splitlines() if not line.endswith("/model.json")}


def is_dead(pid: int) -> bool:
    """Whether a process ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for_pause(workshop: Workshop, name: str, point: str) -> int:
    """The pid of the hook, when it has come to a point."""
    marker = Path(f"{workshop.result(name)}.{point}")
    wait_until(lambda: marker.exists() and marker.read_text() != "")
    return int(marker.read_text())


def resume(workshop: Workshop, name: str) -> None:
    """Let a paused hook go on."""
    Path(f"{workshop.result(name)}.go").touch()
