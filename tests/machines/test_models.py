"""A model under a VM sandbox, from the shim to the guest.

It is complete on the host before `create`, a bind entry shows it to the guest, and it goes with the container.

The runtime behind the shim is the stand-in for kata-runtime (tests/kata_runtime.py, tests/sandboxes.py): QEMU, a guest
of Debian's kernel, real 9p and virtio-fs, shared as Kata's sources share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import HolderRefused, TokenMissing
from tests.engines import unmount_below
from tests.guests import Kernel
from tests.integration.conftest import FILES, contents
from tests.kata_runtime import Caller, write_kata_runtime
from tests.runtimes import make_bundle
from tests.scene import TOKEN_PATH, Scene
from tests.shims import write_shim

MODEL = {"smm.scz/model": "small:1", "smm.scz/require": "runtime=kata"}
SUMS = " ".join(f"/models/small/{name}" for name in FILES)
_SECONDS = 120


class Host:
    """The scene's host with the shim before a stand-in for kata-runtime."""

    def __init__(self, scene: Scene, runtime: Path, folder: Path) -> None:
        self.scene, self.folder = scene, folder
        shim = write_shim(folder / "scz-kata", runtime=runtime, engine="containerd", config_file=scene.config)
        self.call, self.bare = Caller(shim, folder), Caller(runtime, folder)

    def bundle(self, shell: str, *, token: bool = True, **more: Any) -> Path:
        """A bundle that asks for the model; its workload is a line of shell."""
        mounts = []
        if token:
            source = str(self.scene.token())
            mounts.append({"destination": TOKEN_PATH, "type": "bind", "source": source, "options": ["bind", "ro"]})
        mounts += more.pop("mounts", [])
        place = self.folder / f"b-{uuid.uuid4().hex[:8]}"
        return make_bundle(place, args=["sh", "-c", shell], mounts=mounts, annotations=MODEL, **more)

    def models(self) -> list[str]:
        """This host's models that are mounted. Other tests copy their mount namespaces from ours: not theirs."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        place = f" {self.scene.runtime_directory}/"
        return sorted({line.split()[4] for line in lines if " scz-smm " in line and place in line})

    def records(self) -> list[str]:
        """What is remembered of containers."""
        place = self.scene.runtime_directory
        return sorted(
            str(path.relative_to(place))
            for name in ("containers", "host-mounts")
            for path in place.glob(f"{name}/*.json")
        )

    def live(self) -> list[str]:
        """The containers that `sczctl ps` knows."""
        told = json.loads(self.scene.sczctl("ps", "--json").stdout)
        return [each["container_id"] for each in told]


@pytest.fixture
def make_host(
    scene: Scene, guests_folder: Path, kernel: Kernel, agents: dict[str, Path]
) -> Iterator[Callable[..., Host]]:
    """Makes a host with a runtime of a kind; afterwards nothing of a model is left."""
    made: list[Host] = []

    def make(kind: str, *, hypervisor: bool = False, initramfs: Path | None = None) -> Host:
        folder = guests_folder / f"host-{uuid.uuid4().hex[:8]}"
        runtime = write_kata_runtime(folder, kernel, initramfs or agents[kind], kind=kind, hypervisor=hypervisor)
        made.append(Host(scene, runtime, folder))
        return made[-1]

    scene.forget_refusals()
    yield make
    try:
        for host in made:
            host.bare.clear()
            host.call.clear()
            for bundle in host.folder.glob("b-*"):  # as engines do
                shutil.rmtree(bundle)
        scene.sczctl("sweep")
        assert [host.models() for host in made] == [[] for _ in made]
        assert [host.records() for host in made] == [[] for _ in made]
    finally:
        unmount_below(scene.runtime_directory)


@pytest.mark.parametrize(("kind", "hypervisor"), [("9p", False), ("virtiofs", True)], ids=["1.x", "3.x"])
def test_the_guest_reads_exactly_what_was_packed(make_host: Callable[..., Host], kind: str, hypervisor: bool) -> None:
    host = make_host(kind, hypervisor=hypervisor)
    done = host.call("run", "--bundle", host.bundle(f"sha256sum {SUMS}; echo x > /models/small/new"), "one")
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in done.stdout, done
    assert "/models/small/new: Read-only file system" in done.stdout
    assert done.returncode == 1
    assert (host.models(), host.records()) == ([], [])  # poststop
    entries = [json.loads(line) for line in host.scene.audit.read_text().splitlines()]
    assert [entry["event"] for entry in entries if entry.get("event") in ("grant", "closed")][-2:] == [
        "grant",
        "closed",
    ]


@pytest.mark.parametrize("hypervisor", [False, True], ids=["1.x", "3.x"])
def test_a_sweep_leaves_a_running_containers_model_and_takes_a_dead_ones(
    make_host: Callable[..., Host], hypervisor: bool
) -> None:
    host = make_host("9p", hypervisor=hypervisor)
    waiting = "sleep 2; until [ -e /go ]; do sleep 1; done; sha256sum /models/small/config.json"
    bundle = host.bundle(waiting)
    assert host.call("create", "--bundle", bundle, "--pid-file", host.folder / "pid", "one").returncode == 0, (
        host.call.said()
    )
    assert len(host.models()) == 1
    assert host.call("start", "one").returncode == 0
    host.scene.sczctl("sweep")
    assert host.live() == ["one"]
    (bundle / "rootfs/go").touch()
    while host.call.status("one") != "stopped":
        time.sleep(0.2)
    assert host.call("delete", "one").returncode == 0
    if hypervisor:  # its poststop hook runs in another mount namespace, and what created the container has ended
        host.scene.sczctl("sweep")
    assert (host.models(), host.records(), host.live()) == ([], [], [])


def test_a_container_that_was_killed_with_its_hypervisor(make_host: Callable[..., Host]) -> None:
    """Nobody runs a poststop hook then: the sweep takes the model."""
    host = make_host("9p", hypervisor=True)
    bundle = host.bundle("sleep 600")
    assert host.call("create", "--bundle", bundle, "--pid-file", host.folder / "pid", "one").returncode == 0, (
        host.call.said()
    )
    os.kill(int((host.folder / "pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + _SECONDS
    while host.records() and time.monotonic() < deadline:
        host.scene.sczctl("sweep")
        time.sleep(0.2)
    assert (host.models(), host.records()) == ([], [])


def test_a_guest_that_does_not_start(make_host: Callable[..., Host], tmp_path: Path) -> None:
    """`create` fails after the prestart hook, and poststop is not run: the next sweep takes the model."""
    host = make_host("9p", initramfs=tmp_path / "absent")
    done = host.call("create", "--bundle", host.bundle("true"), "one")
    assert done.returncode != 0
    assert "absent" in done.stdout


def test_a_refused_container_never_has_a_sandbox(make_host: Callable[..., Host]) -> None:
    host = make_host("9p")
    done = host.call("run", "--bundle", host.bundle("cat /models/small/config.json", token=False), "one")
    assert done.returncode == TokenMissing.code
    assert f"TokenMissing ({TokenMissing.code})" in done.stdout
    assert not list(host.call.state.glob("*"))
    assert (host.models(), host.records()) == ([], [])


@pytest.mark.parametrize("hypervisor", [False, True], ids=["1.x", "3.x"])
def test_without_the_shim_the_hook_refuses_and_mounts_nothing(make_host: Callable[..., Host], hypervisor: bool) -> None:
    """Its state names a thread of the runtime, or the hypervisor: both are in the host's mount namespace."""
    host = make_host("9p", hypervisor=hypervisor)
    bundle = host.bundle("true")
    config = json.loads((bundle / "config.json").read_text())
    config["hooks"] = hooks_of(host.scene)
    (bundle / "config.json").write_text(json.dumps(config))
    done = host.bare("create", "--bundle", bundle, "one")
    assert done.returncode == 1
    assert f"HolderRefused ({HolderRefused.code})" in done.stdout
    assert "--nri" in done.stdout
    assert (host.models(), host.records()) == ([], [])


def hooks_of(scene: Scene) -> dict[str, Any]:
    """Our prestart hook, as hooks.d hands it to a runtime."""
    (path,) = scene.hooks.glob("*prestart*.json")
    return {"prestart": [json.loads(path.read_text())["hook"]]}
