"""Stand-ins for Kata, which no package registry carries: what a VM sandbox's runtime does toward hooks and mounts.

* `runc_as_kata`: a copy of runc named kata-runtime. It shows the way of a bind entry from end to end, by a container
  that reads its model; unlike Kata it shares its kernel with that container.
* `Kata`: an interpreter of that name which does as Kata's source does (katautils, `hook.go`): hooks run from the
  runtime in the host's mount namespace, and the state names a thread of the runtime (1.x) or the hypervisor (3.x).
  It has no guest: what a guest would be shown is read where the bind entries lead to.

    ready = before_create(scene, "id", bundle)            # what scz-nri does, before `create`
    done = Kata(folder).create(bundle, "id", "thread")
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oci_hook.linux.processes import process_start_time
from tests.scene import Scene

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_COMMAND = """
import json, sys
from oci_hook.invocation import Invocation
stage, config_file, engine = sys.argv[1:]
print(json.dumps(Invocation(stage, config_file=config_file, engine=engine).command()))
"""
_KATA = """
import hashlib, json, os, subprocess, sys, threading
bundle, name, names = sys.argv[1:]
spec = json.load(open(f"{bundle}/config.json"))
hypervisor = subprocess.Popen(["/bin/sleep", "600"])
said = []

def run(stage, pid):
    for hook in spec.get("hooks", {}).get(stage, []):
        state = {"ociVersion": "", "id": name, "status": "", "pid": pid, "bundle": bundle}
        done = subprocess.run(hook["args"], executable=hook["path"], env=dict(e.split("=", 1) for e in hook["env"]),
                              input=json.dumps(state).encode(), capture_output=True)
        said.append(done.stderr.decode())
        if done.returncode:
            return done.returncode
    return 0

def sums():
    for mount in spec["mounts"]:
        if mount.get("type") == "bind" and "/bound/" in mount["source"]:
            for folder, _, files in sorted(os.walk(mount["source"])):
                for file in sorted(files):
                    path = os.path.join(folder, file)
                    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
                    yield mount["destination"] + path.removeprefix(mount["source"]), digest

result = {}

def create():
    pid = threading.get_native_id() if names == "thread" else hypervisor.pid
    result["code"] = run("prestart", pid)
    result["sums"] = dict(sums()) if not result["code"] else {}

thread = threading.Thread(target=create)
thread.start()
thread.join()
print(json.dumps({**result, "said": said}), flush=True)
sys.stdin.readline()
if not result["code"]:
    run("poststop", 0)
hypervisor.kill()
hypervisor.wait()
"""


def hook_command(stage: str, scene: Scene, engine: str = "containerd") -> list[str]:
    """The command line of a stage, of the installed package."""
    words = [sys.executable, "-I", "-c", _COMMAND, stage, str(scene.config), engine]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60)
    return list(json.loads(done.stdout))


def our_hooks(scene: Scene, engine: str = "containerd") -> dict[str, list[dict[str, Any]]]:
    """Our hooks for config.json, as an engine's own configuration adds them."""

    def entry(stage: str) -> dict[str, Any]:
        command = hook_command(stage, scene, engine)
        return {"path": command[0], "args": command, "env": [f"PATH={PATH}"], "timeout": 300}

    return {stage: [entry(stage)] for stage in ("prestart", "poststop")}


def runc_as_kata(folder: Path) -> Path:
    """A copy of runc that is named as Kata's runtime is."""
    path = folder / "kata-runtime"
    if not path.exists():
        shutil.copy("/usr/bin/runc", path)
    return path


def ourselves() -> tuple[int, int]:
    """This process: it lives as long as the test."""
    started = process_start_time(os.getpid())
    assert started is not None
    return os.getpid(), started


def ask(
    scene: Scene,
    name: str,
    bundle: Path,
    *,
    runtime: str = "kata",
    creator: Sequence[int] = (),
    known: bool = True,
    prefix: Sequence[str] = (),
    engine: str = "containerd",
) -> subprocess.CompletedProcess[str]:
    """Run the stage `prepare` for a bundle's config.json, as scz-nri does.

    Args:
        known: Whether the bundle's path is told.
        prefix: Of the command, for another mount namespace.
    """
    spec = json.loads((bundle / "config.json").read_text())
    asking = {
        "container_id": name,
        "bundle": str(bundle) if known else "",
        "runtime": runtime,
        "creator": list(creator or ourselves()),
        "spec": {key: spec[key] for key in ("annotations", "mounts", "linux", "root") if key in spec},
    }
    command = [*prefix, *hook_command("prepare", scene, engine)]
    return subprocess.run(
        command, input=json.dumps(asking), capture_output=True, text=True, check=False, timeout=300, env={"PATH": PATH}
    )


def add_mounts(bundle: Path, mounts: Sequence[Mapping[str, Any]]) -> None:
    """Put mounts behind those of config.json."""
    file = bundle / "config.json"
    spec = json.loads(file.read_text())
    spec["mounts"] += [dict(mount) for mount in mounts]
    file.write_text(json.dumps(spec))


def before_create(scene: Scene, name: str, bundle: Path, **how: Any) -> list[dict[str, Any]]:
    """Have a container's models made ready, and put the bind entries into its config.json; returns them."""
    done = ask(scene, name, bundle, **how)
    assert done.returncode == 0, done
    entries = [{**bind, "type": "bind"} for bind in json.loads(done.stdout)["binds"]]
    add_mounts(bundle, entries)
    return entries


class Kata:
    """The interpreter that does as Kata does; a context manager that ends what it started.

    Args:
        folder: For the copy of the interpreter.
        names: What the state's pid is: `thread` or `hypervisor`.
        prefix: Of the command, for another mount namespace.
        monitor: The engine's own process above it: a copy of the shell of this name; empty: none.
    """

    def __init__(
        self, folder: Path, bundle: Path, name: str, names: str, *, prefix: Sequence[str] = (), monitor: str = ""
    ) -> None:
        program = folder / "python/bin/kata-runtime"
        if not program.exists():
            program.parent.mkdir(parents=True)
            shutil.copy(os.path.realpath(sys.executable), program)
        if monitor:
            shutil.copy(os.path.realpath("/bin/sh"), folder / monitor)
            prefix = (*prefix, str(folder / monitor), "-c", '"$@"; exit $?', "monitor")
        library = f"{sys.base_prefix}:{sys.base_exec_prefix}"
        self._process = subprocess.Popen(
            [*prefix, str(program), "-S", "-c", _KATA, str(bundle), name, names],
            env={"PATH": PATH, "PYTHONHOME": library},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The runtime's."""
        return self._process.pid

    def created(self) -> dict[str, Any]:
        """How `create` ended: its code, what hooks said, and the checksums of what a guest would be shown."""
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def delete(self) -> None:
        """The container's end, with its poststop hooks."""
        self._process.communicate("\n", timeout=120)

    def __enter__(self) -> Kata:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.delete()
