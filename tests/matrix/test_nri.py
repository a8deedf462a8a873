"""Pods of real containerds by NRI alone: no shim, no CDI, no hooks.d, no annotation that a handler hands on.

containerd is Debian 13's (1.7, NRI 0.6) and sid's (2.x), the plugin, the hook and the runtimes are real, the TPM is
swtpm. A kubelet is not there (`tests/kubelet.py`), nor is Kata: a copy of runc by the name kata-runtime stands for it
behind handlers named kata-…, which shows what the plugin, the engine and our records do, and nothing of a guest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containerd import Containerd
from tests.cri import CriClient, CriError, Pod, bind
from tests.integration.test_start import CODES, KEPT, files_of, hook_processes, model_mounts, tpm_handles
from tests.kubelet import Kubelet
from tests.matrix.test_pods import _SECRETS, DIGESTS, Node, refused
from tests.nri import NriPlugin
from tests.scene import Scene
from tests.suites import NotInSuite, program

SUITES = ("trixie", "sid")
REQUEST_SECONDS = 60


@dataclass
class NriNode(Node):
    """A node whose containerd has the plugin.

    Attributes:
        plugin: It runs when a test begins, and when it ends.
    """

    plugin: NriPlugin | None = None

    @property
    def nri(self) -> NriPlugin:
        """The plugin."""
        assert self.plugin is not None
        return self.plugin

    @contextmanager
    def pod_of(self, handler: str, annotations: dict[str, str] | None = None) -> Iterator[tuple[Pod, Path]]:
        """A pod of a handler that asks for the model, and its token."""
        asked = dict(self.annotations) if annotations is None else annotations
        with self.cri.pod("shop", handler=handler, annotations=asked) as pod:
            yield pod, self.kubelet.project(pod.uid, self.kubelet.token(pod.uid))

    def clean(self) -> None:
        """Nothing is left of any pod, on disk or in memory."""
        run, kept = self.scene.runtime_directory, (*KEPT, "host-mounts", "host-mounts.lock", "nri", "bound")
        assert self.cri.pods() == []
        assert model_mounts(self.scene) == []
        assert hook_processes(self.scene) == []
        assert tpm_handles(self.scene) == ""
        left = {path for path in files_of(self.scene) if not path.endswith(".lock")}
        assert left <= {str(run / name) for name in kept}
        assert list((run / "nri/prepared").glob("*")) == []
        assert [path for path in (run / "bound").rglob("*") if path.is_file()] == []


@contextmanager
def made_node(scene: Scene, kubelet: Kubelet, suite: str) -> Iterator[NriNode]:
    """containerd of a suite, with runc itself and what stands for Kata behind handlers of their own."""
    try:
        programs = program(suite, "containerd").parent
    except NotInSuite:  # `test_what_sid_holds_today` says so
        programs = program("trixie", "containerd").parent
    trace, folder = scene.host / f"trace-{suite}", scene.host / f"runtimes-{suite}"
    for path in (trace, folder):
        path.mkdir()
    kata = folder / "kata-runtime"
    shutil.copy(program("trixie", "runc"), kata)
    handlers = {"runc": program("trixie", "runc"), "crun": program("trixie", "crun"), "kata-qemu": kata}
    with ExitStack() as stack:
        containerd = stack.enter_context(
            Containerd(
                scene.directory / f"nri-{suite}",
                handlers=handlers,
                programs=programs,
                pod_annotations=(),
                nri={"plugin_request_timeout": f"{REQUEST_SECONDS}s"},
            )
        )
        scene.write_config(nri=f'[nri]\nsocket = "{containerd.nri_socket}"')
        cri = stack.enter_context(
            CriClient(containerd.socket, scene.host / "logs", cgroup_parent=f"/{containerd.cgroup}")
        )
        print(f"{suite}: {cri.version()}")
        image = cri.wait_for_image(containerd.busybox_image("k8s.io"))
        log = scene.host / f"nri-{suite}.log"
        plugin = NriPlugin(scene.config, scene.runtime_directory, log, containerd.namespace.prefix)
        stack.enter_context(plugin)
        yield NriNode(scene, kubelet, containerd, cri, image, trace, plugin=plugin)


@pytest.fixture(scope="module")
def kubelet(scene: Scene, model_source: Path) -> Kubelet:
    """The cluster, trusted, and a model for its service account."""
    return Kubelet(scene, model_source)


@pytest.fixture(scope="module", params=SUITES)
def one_node(request: pytest.FixtureRequest, scene: Scene, kubelet: Kubelet) -> Iterator[NriNode]:
    """The node of each suite."""
    with made_node(scene, kubelet, request.param) as node:
        yield node


@pytest.fixture
def node(one_node: NriNode) -> Iterator[NriNode]:
    """The node, with nothing left of another test, and looked at afterwards."""
    one_node.scene.forget_refusals()
    for path in one_node.trace.iterdir():
        path.unlink()
    one_node.clean()
    yield one_node
    one_node.clean()


# --- runc and crun: the plugin adds the hooks -------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_a_model_by_nri_alone(node: NriNode, handler: str) -> None:
    with node.pod_of(handler, {**node.annotations, "smm.scz/containers": "server"}) as (pod, token):
        server, sidecar = node.run(pod, "server", token), node.run(pod, "sidecar", token)
        assert node.digests(server) == {**DIGESTS, "model.json": node.digests(server)["model.json"]}
        assert not node.has_model(sidecar)
        assert node.records() == {server}
        assert node.models_on_host() == []
        pod.stop_container(server)
        assert node.records() == set()
        assert model_mounts(node.scene) == []
        assert node.cri.state(sidecar) == "CONTAINER_RUNNING"


def test_both_containers_of_a_pod(node: NriNode) -> None:
    with node.pod_of("runc") as (pod, token):
        first, second = (node.run(pod, name, token) for name in ("first", "second"))
        assert node.digests(first) == node.digests(second)
        assert node.records() == {first, second}


def test_a_pod_that_asks_for_nothing(node: NriNode) -> None:
    with node.pod_of("runc", {}) as (pod, _):
        plain = node.run(pod, "plain", None)
        assert not node.has_model(plain)
        bundle = node.containerd.directory / "state/io.containerd.runtime.v2.task/k8s.io" / plain
        assert b"launch.py" not in (bundle / "config.json").read_bytes()
        assert node.records() == set()


def test_the_hook_refuses(node: NriNode) -> None:
    with node.pod_of("runc") as (pod, _):
        other = node.kubelet.project(pod.uid, node.kubelet.token("11111111-30f5-4dd8-9a2b-0b1f2f6c7d10"))
        said = refused(node, "TokenBoundElsewhere", pod, "thief", other)
        assert "TokenBoundElsewhere (41)" in said


@pytest.mark.parametrize("handler", ["runc", "kata-qemu"])
def test_the_plugin_refuses_where_the_client_sees_it(node: NriNode, handler: str) -> None:
    with node.pod_of(handler, {"smm.scz/modle": "pods:1"}) as (pod, token):
        said = refused(node, "AnnotationInvalid", pod, "server", token)
        assert "CreateContainer:" in said
        assert "scz-smm: AnnotationInvalid (12): the annotation 'smm.scz/modle' is not known" in said
        assert "docs/annotations.md" in said


# --- the plugin and its engine come and go ----------------------------------------------------------------------------


def test_the_plugin_is_restarted(node: NriNode) -> None:
    with node.pod_of("runc") as (pod, token):
        first = node.run(pod, "first", token)
        assert node.nri.stop() == 0
        assert DIGESTS.items() <= node.digests(first).items()
        node.nri.start()
        second = node.run(pod, "second", token)
        assert DIGESTS.items() <= node.digests(second).items()
        assert node.records() == {first, second}


def test_the_engine_is_restarted(node: NriNode) -> None:
    with node.pod_of("runc") as (pod, token):
        first = node.run(pod, "first", token)
        node.containerd.restart()
        node.nri.wait_until_connected()
        assert "the engine ended the connection; trying again" in node.nri.log.read_text()
        second = node.run(pod, "second", token)
        assert DIGESTS.items() <= node.digests(second).items()
        assert node.records() == {first, second}


def test_what_is_created_without_the_plugin_has_no_model(node: NriNode) -> None:
    """NRI fails open: the container starts, without hook and without model, and the plugin says so afterwards."""
    with node.pod_of("runc") as (pod, token):
        node.nri.kill()
        open_ = node.run(pod, "open", token)
        assert not node.has_model(open_)
        assert model_mounts(node.scene) == []
        assert node.records() == set()
        node.nri.start()
        wait_for_line(node, f"container '{open_}' of 'shop'/'shop' asks for a model and was created while")


def wait_for_line(node: NriNode, text: str) -> None:
    """Until the plugin has said something."""
    deadline = time.monotonic() + 60
    while text not in node.nri.log.read_text():
        assert time.monotonic() < deadline, node.nri.log.read_text()
        time.sleep(0.02)
