"""`podman run` of a container that asks for a VM: podman's `precreate`, and a guest whose workload reads the model.

podman, its hooks and ours are real; its runtime is the stand-in for kata-runtime (tests/kata_runtime.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.engines.podman import OWN_DIRECTORY
from oci_hook.errors import RequirementRefused, TokenMissing
from tests.engines import RuntimeNamespace, unmount_below
from tests.guests import Kernel
from tests.integration.conftest import FILES, contents
from tests.kata_runtime import write_kata_runtime
from tests.scene import Scene

KATA = {"smm.scz/require": "runtime=kata"}
SUMS = " ".join(f"/models/small/{name}" for name in FILES)


@pytest.fixture(scope="module")
def host(scene: Scene) -> Scene:
    """The scene with the hooks' directories of `--before-create`, and podman in the host's mount namespace."""
    root = scene.directory / "root"
    scene.sczctl("install", "--engine", "podman", "--before-create", "--root", root)
    scene.podman.hooks_directories = [root / "usr/share/containers/oci/hooks.d", root / OWN_DIRECTORY.lstrip("/")]
    scene.podman.namespace.stop()
    scene.podman.namespace = RuntimeNamespace()
    return scene


@pytest.fixture(scope="module")
def runtime(guests_folder: Path, kernel: Kernel, agents: dict[str, Path]) -> str:
    """A runtime for podman."""
    return str(write_kata_runtime(guests_folder / "podman", kernel, agents["virtiofs"], kind="virtiofs"))


@pytest.fixture(autouse=True)
def nothing_is_left(host: Scene) -> Iterator[None]:
    """No model, and nothing that remembers one; other containers' are other scenes'."""
    host.forget_refusals()
    yield
    try:
        host.podman.call("rm", "--all", "--force", "--time=0", check=False)
        assert left(host) == []
    finally:
        unmount_below(host.runtime_directory)


def left(host: Scene) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    records = [str(path) for name in ("containers", "host-mounts") for path in host.runtime_directory.glob(f"{name}/*")]
    return [*records, *(line for line in lines if f" {host.runtime_directory}/" in line)]


def test_podman_starts_a_guest_that_reads_the_model(host: Scene, runtime: str) -> None:
    command = ["sh", "-c", f"uname -r; sha256sum {SUMS}; echo x > /models/small/new; exit 7"]
    done = host.run(host.image, command, model="small:1", token=host.token(), runtime=runtime, annotations=KATA)
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in done.stdout, done
    assert "amd64" in done.stdout.splitlines()[0]  # Debian's kernel: it was the guest that read
    assert "/models/small/new: Read-only file system" in done.stdout
    assert done.returncode == 7
    assert left(host) == []


def test_a_running_container_keeps_its_model_until_it_is_removed(host: Scene, runtime: str) -> None:
    """It is bound to podman's monitor, as Kata 1's own `create` has ended: a sweep leaves it."""
    options = ["--detach", "--name", "running"]
    command, token = ["sleep", "600"], host.token()
    done = host.run(
        host.image, command, model="small:1", token=token, runtime=runtime, annotations=KATA, options=options
    )
    assert done.returncode == 0, (done, host.why())
    host.sczctl("sweep")
    assert len([line for line in left(host) if "/bound/" in line]) == 1
    host.podman.rm("running")
    assert left(host) == []


def test_without_a_token_there_is_no_guest(host: Scene, runtime: str) -> None:
    done = host.run(host.image, ["true"], model="small:1", token=None, runtime=runtime, annotations=KATA)
    assert done.returncode not in (0, 7)
    assert host.why()["reason"] == TokenMissing.__name__
    assert left(host) == []


def test_a_model_that_was_made_ready_for_kata_is_not_given_to_runc(host: Scene) -> None:
    done = host.run(host.image, ["true"], model="small:1", token=host.token(), runtime="runc", annotations=KATA)
    assert done.returncode != 0
    assert host.why()["reason"] == RequirementRefused.__name__
    assert left(host) == []
