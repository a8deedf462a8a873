"""The stand-in for kata-runtime itself: what other tests rely on when a container under it reads a model."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests import Kernel
from tests.kata_runtime import Caller, start_time, write_kata_runtime
from tests.runtimes import make_bundle, prestart

_WRITE_STATE = 'cat > "$0.$1"; readlink "/proc/$PPID/exe" > "$0.parent"; readlink /proc/self/ns/mnt > "$0.namespace"'


def names(path: Path, folder: Path) -> bool:
    """Whether a process's command line names a folder: QEMU's and virtiofsd's do."""
    try:
        return os.fsencode(folder) in path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def make_caller(guests_folder: Path, kernel: Kernel, agents: dict[str, Path]) -> Iterator[Callable[..., Caller]]:
    """Makes a runtime and what calls it."""
    made: list[Caller] = []

    def make(kind: str, *, hypervisor: bool = False) -> Caller:
        folder = guests_folder / f"runtime{len(list(guests_folder.iterdir()))}"
        made.append(Caller(write_kata_runtime(folder, kernel, agents[kind], kind=kind, hypervisor=hypervisor), folder))
        return made[-1]

    yield make
    for caller in made:
        caller.clear()


@pytest.mark.parametrize(("kind", "hypervisor"), [("9p", False), ("virtiofs", True)])
def test_a_container_runs_with_its_bind_entries(
    make_caller: Callable[..., Caller], tmp_path: Path, kind: str, hypervisor: bool
) -> None:
    call = make_caller(kind, hypervisor=hypervisor)
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(bytes(range(256)) * 4096)
    hooks = {
        stage: [prestart("/bin/sh", "-c", _WRITE_STATE, tmp_path / "state", stage)]
        for stage in ("prestart", "poststop")
    }
    mounts = [{"destination": "/models", "type": "bind", "source": str(source), "options": ["bind", "ro"]}]
    command = ["sh", "-c", "sha256sum /models/weights; touch /models/new; exit 7"]
    bundle = make_bundle(tmp_path / "bundle", args=command, mounts=mounts, hooks=hooks)
    done = call("run", "--bundle", bundle, "one")
    assert hashlib.sha256((source / "weights").read_bytes()).hexdigest() in done.stdout
    assert "Read-only file system" in done.stdout
    assert done.returncode == 7
    state = json.loads((tmp_path / "state.prestart").read_text())
    assert state == {"ociVersion": "", "id": "one", "status": "", "pid": state["pid"], "bundle": str(bundle)}
    assert (tmp_path / "state.poststop").exists()
    assert (tmp_path / "state.parent").read_text().strip().endswith("/kata-runtime")
    own = os.readlink("/proc/self/ns/mnt")
    assert ((tmp_path / "state.namespace").read_text().strip() == own) is not hypervisor
    assert not list(call.state.glob("*"))
    assert str(call.folder) not in Path("/proc/self/mountinfo").read_text()


def test_a_container_is_made_started_seen_killed_and_deleted(
    make_caller: Callable[..., Caller], tmp_path: Path
) -> None:
    call = make_caller("9p")
    bundle = make_bundle(tmp_path / "bundle", args=["sleep", "600"])
    assert call("create", "--bundle", bundle, "--pid-file", tmp_path / "pid", "one").returncode == 0
    state = json.loads(call("state", "one").stdout)
    assert (state["status"], state["pid"]) == ("created", int((tmp_path / "pid").read_text()))
    assert call("start", "one").returncode == 0
    assert call.status("one") == "running"
    assert call("delete", "one").returncode == 1
    assert call("kill", "one", "KILL").returncode == 0
    while call.status("one") != "stopped":
        time.sleep(0.1)
    assert call("delete", "one").returncode == 0
    assert call("state", "one").returncode == 1
    assert start_time(state["pid"]) == 0
    call.clear()  # and its monitor
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if names(path, call.folder)]


@pytest.mark.parametrize("hypervisor", [False, True])
def test_a_failing_prestart_hook_ends_create_and_poststop_does_not_run(
    make_caller: Callable[..., Caller], tmp_path: Path, hypervisor: bool
) -> None:
    call = make_caller("9p", hypervisor=hypervisor)
    failing = prestart("/bin/sh", "-c", "cat > /dev/null; echo refused >&2; exit 30")
    after = prestart("/bin/sh", "-c", _WRITE_STATE, tmp_path / "state", "poststop")
    bundle = make_bundle(tmp_path / "bundle", args=["true"], hooks={"prestart": [failing], "poststop": [after]})
    done = call("create", "--bundle", bundle, "one")
    assert done.returncode == 1
    assert "exit status 30" in done.stdout
    assert "refused" in done.stdout
    assert not (tmp_path / "state.poststop").exists()
    assert not list(call.state.glob("*"))
    assert str(call.folder) not in Path("/proc/self/mountinfo").read_text()
