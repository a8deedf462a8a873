"""What a tenant can do to a node's plugin, with Debian 13's containerd (1.7, NRI 0.6), which sends whatever it has.

Containers of megabytes, lists of them, a token in a file system that does not answer: none of it may be the end of the
plugin, as then every other container of the node would be created without its model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cri import CriError, bind
from tests.integration.test_start import hook_processes
from tests.kubelet import Kubelet
from tests.matrix.test_nri import VM, NriNode, made_node, wait_for
from tests.scene import Scene
from tests.stuck import stuck_filesystem

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def one_node(scene: Scene, model_source: Path) -> Iterator[NriNode]:
    """A node of Debian 13's."""
    with made_node(scene, Kubelet(scene, model_source), "trixie") as node:
        yield node


@pytest.fixture
def node(one_node: NriNode) -> Iterator[NriNode]:
    """The node, with nothing left of another test, and looked at afterwards."""
    one_node.scene.forget_refusals()
    one_node.clean()
    yield one_node
    one_node.clean()


def log_since(node: NriNode, place: int) -> str:
    """What the plugin said after so many characters."""
    return node.nri.log.read_text()[place:]


def test_oversized_containers_are_no_end(node: NriNode) -> None:
    """As ttrpc allows 4 MiB, 1.7 sends more all the same: in annotations, in arguments, and in its list of all."""
    place, pid = len(node.nri.log.read_text()), node.nri.pid
    with node.cri.pod("mill", handler="runc", namespace="evil") as evil, node.pod_of("runc") as (pod, token):
        evil.create("noted", node.image, ["true"], annotations={"x": "x" * (5 * MEBIBYTE)})
        assert node.has_model(node.run(pod, "first", token))
        evil.create("argued", node.image, ["true", *["y" * 100_000] * 50])
        assert node.has_model(node.run(pod, "second", token))
        assert log_since(node, place) == ""  # the connection is the same
        node.containerd.restart()
        node.nri.wait_until_connected()
        assert node.has_model(node.run(pod, "third", token))
    assert node.nri.pid == pid


def test_a_list_that_the_engine_should_have_split_is_read(node: NriNode) -> None:
    with node.cri.pod("mill", handler="runc", namespace="evil") as evil, node.pod_of("runc") as (pod, token):
        for number in range(6):
            evil.create(f"middling-{number}", node.image, ["true", *["y" * 100_000] * 15])
        node.nri.kill()
        without = node.run(pod, "without", token)
        place = len(node.nri.log.read_text())
        node.nri.start()
        wait_for(node, lambda: f"container '{without}'" in log_since(node, place))  # the list was read to its end
        assert node.has_model(node.run(pod, "server", token))


@pytest.fixture
def volume(node: NriNode) -> Iterator[Path]:
    """A volume in which `s` will answer nothing; the engine waits 6 s for the plugin."""
    volume = node.scene.host / "volume"
    (volume / "s").mkdir(parents=True)
    usual, node.containerd.nri = node.containerd.nri, {"plugin_request_timeout": "6s"}
    node.containerd.restart()
    node.nri.wait_until_connected()
    yield volume
    node.containerd.nri = usual
    node.containerd.restart()
    node.nri.wait_until_connected()
    shutil.rmtree(volume)


STUCK = {"smm.scz/token": "/volume/s/token"}


def test_a_token_that_is_stuck(node: NriNode, volume: Path) -> None:
    """Refused in time and in words; the process that hangs is left to the kernel, and holds up nothing."""
    with node.pod_of("runc") as (other, token), node.pod_of(VM, {**node.annotations, **STUCK}) as (pod, _):
        with stuck_filesystem(volume / "s", pid=node.nri.pid):
            for name in ("first", "second"):
                with pytest.raises(CriError, match=r"scz-smm: Terminated \(71\): the model was not ready within"):
                    pod.create(name, node.image, ["sleep", "1000"], mounts=[bind(volume, "/volume")])
            assert node.nri.connected() is not None
            assert node.bound() == []
            assert node.has_model(node.run(other, "server", token))
        wait_for(node, lambda: hook_processes(node.scene) == [])


def test_the_end_of_the_plugin_beside_what_is_stuck(node: NriNode, volume: Path) -> None:
    """SIGTERM ends it, with nothing waited for; the engine goes on without it, and nothing is left behind."""
    with node.pod_of(VM, {**node.annotations, **STUCK}) as (pod, _), ThreadPoolExecutor() as pool:
        with stuck_filesystem(volume / "s", pid=node.nri.pid):
            creating = pool.submit(pod.create, "server", node.image, ["true"], mounts=[bind(volume, "/volume")])
            wait_for(node, lambda: hook_processes(node.scene))
            assert node.nri.stop() == 0
            with suppress(CriError):
                creating.result()
        node.nri.start()
        wait_for(node, lambda: hook_processes(node.scene) == [])
    wait_for(node, lambda: (node.bound(), node.prepared()) == ([], 0))
