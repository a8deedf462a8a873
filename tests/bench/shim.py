"""What the shim adds to a call of a runtime: the runtime is /bin/true, so that nothing but the shim is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable

from tests.bench.rows import Row, make_row
from tests.bench.timing import seconds, take_turns
from tests.bench.workspace import Workspace
from tests.runtimes import make_bundle
from tests.shims import write_shim

_TURNS = 10  # for each round of the larger benchmarks


def measure(space: Workspace) -> list[Row]:
    """Start each program in turn; what it adds is against the runtime alone."""
    folder = space.folder / "shim"
    folder.mkdir()
    runtime, config = folder / "runc", folder / "config.toml"
    shutil.copy("/bin/true", runtime)
    config.write_text("")
    shim = write_shim(folder / "scz-runc", runtime=runtime, engine="containerd", config_file=config)
    interpreter = shim.read_text().split()[0].removeprefix("#!")
    plain = make_bundle(folder / "plain", args=["true"])
    ours = make_bundle(folder / "ours", args=["true"], annotations={"smm.scz/model": "small:1"})
    original = (ours / "config.json").read_bytes()
    create = ("--root", "/nowhere", "--log", "/nowhere/log", "--log-format", "json", "create", "--bundle")
    alone = "the runtime alone"
    programs: dict[str, tuple[str, list[str]]] = {
        alone: ("alone", [str(runtime), *create, str(plain), "x"]),
        "python3 -IS -c pass": ("python", [interpreter, "-IS", "-c", "pass"]),
        "python3 -IS -c 'import json'": ("python-json", [interpreter, "-IS", "-c", "import json"]),
        "shim, another verb (state)": ("other", [str(shim), "--root", "/nowhere", "state", "x"]),
        "shim, create, no annotation of ours": ("none", [str(shim), *create, str(plain), "x"]),
        "shim, create, with a model: hooks added": ("model", [str(shim), *create, str(ours), "x"]),
    }

    def run(command: list[str]) -> float:
        (ours / "config.json").write_bytes(original)
        return seconds(lambda: subprocess.run(command, env={}, check=True))

    actions: dict[str, Callable[[], float]] = {
        name: lambda command=command: run(command)  # type: ignore[misc]
        for name, (_, command) in programs.items()
    }
    found = take_turns(actions, space.rounds * _TURNS)
    run(programs["shim, create, with a model: hooks added"][1])
    if "--spec-digest" not in json.dumps(json.loads((ours / "config.json").read_bytes())):
        raise RuntimeError("the shim added nothing, so nothing was measured")
    return [
        make_row(f"shim.{key}", name, found[name], found[alone], against=alone, judged="difference")
        for name, (key, _) in programs.items()
        if name != alone
    ]
