"""What the shim adds to a call of a runtime: the runtime is /bin/true, so that nothing but the shim is measured.

The rows take turns, so that a busy machine is unfair to all of them alike. `added` is against the runtime alone, the
ratio against the interpreter's own bare start (`python3 -IS -c pass`), both of the same run.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.runtimes import make_bundle
from tests.shims import write_shim


@dataclass
class Row:
    """One line of the table; times in milliseconds."""

    name: str
    median_ms: float
    best_ms: float
    added_ms: float
    ratio: float


def measure(runs: int) -> list[Row]:
    """Start each program `runs` times."""
    folder = Path(tempfile.mkdtemp(prefix="scz-bench."))
    try:
        return _measure(folder, runs)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, runs: int) -> list[Row]:
    runtime, config = folder / "runc", folder / "config.toml"
    shutil.copy("/bin/true", runtime)
    config.write_text("")
    shim = write_shim(folder / "scz-runc", runtime=runtime, engine="containerd", config_file=config)
    interpreter = shim.read_text().split()[0].removeprefix("#!")
    plain = make_bundle(folder / "plain", args=["true"])
    ours = make_bundle(folder / "ours", args=["true"], annotations={"smm.scz/model": "small:1"})
    original = (ours / "config.json").read_bytes()
    create = ("--root", "/nowhere", "--log", "/nowhere/log", "--log-format", "json", "create", "--bundle")
    programs: dict[str, list[str]] = {
        "the runtime alone": [str(runtime), *create, str(plain), "x"],
        "python3 -IS -c pass": [interpreter, "-IS", "-c", "pass"],
        "python3 -IS -c 'import json'": [interpreter, "-IS", "-c", "import json"],
        "shim, another verb (state)": [str(shim), "--root", "/nowhere", "state", "x"],
        "shim, create, no annotation of ours": [str(shim), *create, str(plain), "x"],
        "shim, create, with a model: hooks added": [str(shim), *create, str(ours), "x"],
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, command in programs.items():
            (ours / "config.json").write_bytes(original)
            times[name].append(_seconds(lambda command=command: subprocess.run(command, env={}, check=True)))  # type: ignore[misc]
    if "--spec-digest" not in json.dumps(json.loads((ours / "config.json").read_bytes())):
        raise RuntimeError("the shim added nothing, so nothing was measured")
    alone, bare = (statistics.median(times[name]) for name in list(programs)[:2])
    return [
        Row(
            name,
            *(round(1e3 * value, 3) for value in (statistics.median(found), min(found))),
            round(1e3 * (statistics.median(found) - alone), 3),
            round(statistics.median(found) / bare, 3),
        )
        for name, found in times.items()
    ]


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
