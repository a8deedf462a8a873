"""Containers of one pod in one guest, each with bind entries of the stage `prepare`, as the NRI plugin asks for them.

The first is shared before the second is asked for, which is then shared with a guest that runs: the order of a pod. The
sharing stands in for Kata's (tests/sandboxes.py); what asks is the test itself, without containerd.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.before_create import adopt, discard, known
from oci_hook.config import Config, load_config
from tests.engines import unmount_below
from tests.guests import Kernel
from tests.integration.conftest import FILES, contents
from tests.kata_runtime import contained
from tests.runtimes import make_bundle
from tests.sandboxes import KINDS, Sandbox
from tests.scene import TOKEN_PATH, Scene
from tests.vms import before_create

SUMS = {f"/models/small/{name}": hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}


@dataclass
class Pod:
    """A sandbox, and the bundles of its containers."""

    scene: Scene
    sandbox: Sandbox
    folder: Path

    def container(self, name: str) -> Path:
        """Have a container's model made ready, then share it with the guest; returns the model's place on the host."""
        token = str(self.scene.token(f"token-{name}"))
        mounts = [{"destination": TOKEN_PATH, "type": "bind", "source": token, "options": ["bind", "ro"]}]
        asked = {"smm.scz/model": "small:1", "smm.scz/require": "runtime=kata"}
        bundle = make_bundle(self.folder / name, args=["true"], mounts=mounts, annotations=asked)
        (entry,) = before_create(self.scene, name, bundle, known=False)
        adopt(name, "", self.sandbox.guest.pid, self.config)
        self.sandbox.create(name, contained(bundle, json.loads((bundle / "config.json").read_text())))
        return Path(entry["source"])

    def reads(self, name: str) -> dict[str, str]:
        """What a container reads: its checksums by path."""
        _, lines = self.sandbox.run(name, "sha256sum", *SUMS)
        return {line.split()[1]: line.split()[0] for line in lines if line.split()[0] != "sha256sum:"}

    @property
    def config(self) -> Config:
        """The host's."""
        return load_config(str(self.scene.config))


@pytest.fixture(params=KINDS)
def pod(
    request: pytest.FixtureRequest, scene: Scene, guests_folder: Path, kernel: Kernel, agents: dict[str, Path]
) -> Iterator[Pod]:
    """A running guest without containers; afterwards no model is left."""
    folder = guests_folder / f"pod-{request.param}"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(unmount_below, scene.runtime_directory)
        sandbox = Sandbox(folder / "sandbox", kernel, agents[request.param], request.param)
        yield Pod(scene, stack.enter_context(sandbox), folder)
        assert known(load_config(str(scene.config))) == ()
        assert f" {scene.runtime_directory}/" not in Path("/proc/self/mountinfo").read_text()


def test_two_containers_of_a_pod_read_their_models_until_they_end(pod: Pod) -> None:
    first = pod.container("first")
    assert pod.reads("first") == SUMS
    second = pod.container("second")
    assert pod.reads("second") == SUMS
    assert pod.reads("first") == SUMS
    assert first != second
    assert known(pod.config) == ("first", "second")
    pod.sandbox.remove("first")
    discard("first", "", pod.config)
    assert (first.exists(), known(pod.config)) == (False, ("second",))
    assert pod.reads("second") == SUMS
    # The model of one that ends while the guest still has it: truncated first, so that nobody keeps it by a descriptor.
    discard("second", "", pod.config)
    waiting = "while grep -q . /models/small/config.json; do sleep 1; done; cat /models/small/config.json 2>/dev/null"
    _, lines = pod.sandbox.run("second", "sh", "-c", waiting)
    assert [line for line in lines if not line.startswith("grep: ")] == []
    pod.sandbox.remove("second")
