"""Pods of real containerds by NRI alone: no shim, no CDI, no hooks.d, no annotation that a handler hands on.

containerd is Debian 13's (1.7, NRI 0.6) and the newest that there is: sid's (2.x), or Debian 13's once more on a day on
which sid has none, which is said then. The plugin, the hook and the runtimes are real, the TPM is swtpm. A kubelet is
not there (`tests/kubelet.py`), nor is Kata: a copy of runc by the name kata-runtime stands for it behind handlers named
kata-…, which shows what the plugin, the engine and our records do, and nothing of a guest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.engines.nri import GUARD
from tests.containerd import Containerd
from tests.cri import CriClient, CriError, Pod, bind
from tests.integration.test_start import KEPT, files_of, hook_processes, model_mounts, tpm_handles
from tests.kubelet import MODEL, Kubelet
from tests.matrix.test_pods import _SECRETS, DESTINATION, DIGESTS, Node, refused
from tests.nri import NriPlugin
from tests.runsc_pods import write_runsc
from tests.runtimes import newer_runsc
from tests.scene import Scene
from tests.suites import NotInSuite, program

SUITES = ("trixie", "newest")
REQUEST_SECONDS = 60
VM = "kata-qemu"
GUARDED = "kata-guarded"
DEVICE, AGAIN = "smm.scz/model=pods", "smm.scz/model=again"
ELSEWHERE = "/models/again"
ANOTHER = "11111111-30f5-4dd8-9a2b-0b1f2f6c7d10"


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
    def pod_of(
        self, handler: str, annotations: dict[str, str] | None = None, *, token_of: str = ""
    ) -> Iterator[tuple[Pod, Path]]:
        """A pod of a handler that asks for the model, and its token, or that of another pod."""
        asked = dict(self.annotations) if annotations is None else annotations
        with self.cri.pod("shop", handler=handler, annotations=asked) as pod:
            yield pod, self.kubelet.project(pod.uid, self.kubelet.token(token_of or pod.uid))

    def bound(self) -> list[str]:
        """The models that lie on the host's side, in the engine's mount namespace."""
        return [path for path in self.models_on_host() if path.startswith(f"{self.scene.runtime_directory}/bound/")]

    def prepared(self) -> int:
        """The containers that the plugin has to look after."""
        return len(list((self.scene.runtime_directory / "nri/prepared").glob("*")))

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


def guarding_spec(ctr: Path, scene: Scene) -> Path:
    """What `sczctl install --nri --guard` writes for a containerd; returns the file."""
    root = scene.host / f"root-{ctr.parent.parent.name}"
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy(ctr, root / "usr/bin/ctr")
    scene.sczctl("install", "--engine", "containerd", "--nri", "--guard", "--root", root)
    return root / GUARD.lstrip("/")


def engine_of(suite: str) -> Path:
    """The folder of a containerd: a suite's, or the newest that there is."""
    if suite != "newest":
        return program(suite, "containerd").parent
    try:
        return program("sid", "containerd").parent
    except NotInSuite as absent:  # `test_what_sid_holds_today` prints it in every run
        print(f"newest: {absent}; these tests run Debian 13's containerd a second time, and nothing of NRI 0.8")
        return program("trixie", "containerd").parent


@contextmanager
def made_node(scene: Scene, kubelet: Kubelet, suite: str) -> Iterator[NriNode]:
    """containerd of a suite, with runc itself and what stands for Kata behind handlers of their own."""
    programs = engine_of(suite)
    trace, folder = scene.host / f"trace-{suite}", scene.host / f"runtimes-{suite}"
    for path in (trace, folder, folder / "cdi"):
        path.mkdir()
    kata = folder / "kata-runtime"
    shutil.copy(program("trixie", "runc"), kata)
    runsc = write_runsc(folder / "gvisor", newer_runsc())
    base, devices = guarding_spec(programs / "ctr", scene), folder / "cdi"
    words = ("cdi", "generate", "--engine", "containerd", "-o")
    scene.sczctl(*words, devices / "scz.json", "--name", "pods", MODEL)
    scene.sczctl(*words, devices / "scz-again.json", "--name", "again", "--path", ELSEWHERE, MODEL)
    handlers = {
        "runc": program("trixie", "runc"),
        "crun": program("trixie", "crun"),
        "runsc": runsc,
        VM: kata,
        GUARDED: kata,
    }
    with ExitStack() as stack:
        containerd = stack.enter_context(
            Containerd(
                scene.directory / f"nri-{suite}",
                handlers=handlers,
                programs=programs,
                pod_annotations=(),
                handler_settings={GUARDED: {"pod_annotations": ["smm.scz/*"], "base_runtime_spec": str(base)}},
                cdi_directories=[devices],
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


@pytest.mark.parametrize("handler", ["runc", "crun", "runsc"])
def test_a_model_by_nri_alone(node: NriNode, handler: str) -> None:
    with node.pod_of(handler, {**node.annotations, "smm.scz/containers": "server"}) as (pod, token):
        server, sidecar = node.run(pod, "server", token), node.run(pod, "sidecar", token)
        assert node.digests(server) == {**DIGESTS, "model.json": node.digests(server)["model.json"]}
        assert not node.has_model(sidecar)
        assert node.records() == {server}
        assert len(node.models_on_host()) == (handler == "runsc")  # where nobody gets in
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
    with node.pod_of("runc", token_of=ANOTHER) as (pod, token):
        said = refused(node, "TokenBoundElsewhere", pod, "thief", token)
        assert "StartContainer:" in said
        assert "TokenBoundElsewhere (41)" in said


@pytest.mark.parametrize("handler", ["runc", VM])
def test_the_plugin_refuses_where_the_client_sees_it(node: NriNode, handler: str) -> None:
    with node.pod_of(handler, {"smm.scz/modle": "pods:1"}) as (pod, token):
        said = refused(node, "AnnotationInvalid", pod, "server", token)
        assert "CreateContainer:" in said
        assert "scz-smm: AnnotationInvalid (12): the annotation 'smm.scz/modle' is not known" in said
        assert "docs/annotations.md" in said


# --- a virtual machine's handler: the model is there before the container ---------------------------------------------


def test_a_model_before_create(node: NriNode) -> None:
    with node.pod_of(VM, {**node.annotations, "smm.scz/containers": "first,second"}) as (pod, token):
        first, second = (create(node, pod, name, token) for name in ("first", "second"))
        other = create(node, pod, "other", token)
        # Complete before anything is started, and before the runtime has been told of the container.
        assert len(node.bound()) == 2
        assert not (node.containerd.directory / "state/io.containerd.runtime.v2.task/k8s.io" / first).exists()
        for container in (first, second, other):
            pod.start(container)
        assert DIGESTS.items() <= node.digests(first).items()
        assert node.digests(first) == node.digests(second)
        assert not node.has_model(other)
        assert node.records() == {first, second}
        assert node.cri.exec(first, ["touch", f"{DESTINATION}/new"]).returncode != 0
        options = node.cri.exec(first, ["grep", f" {DESTINATION} ", "/proc/mounts"]).stdout.split()[3].split(",")
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
        pod.stop_container(first)
        assert (len(node.bound()), node.prepared(), node.records()) == (1, 1, {second})
        assert DIGESTS.items() <= node.digests(second).items()
    assert (node.bound(), node.prepared(), node.records()) == ([], 0, set())


def test_prepare_refuses_where_the_client_sees_it(node: NriNode) -> None:
    with node.pod_of(VM, token_of=ANOTHER) as (pod, token):
        said = refused(node, "TokenBoundElsewhere", pod, "thief", token)
        assert "CreateContainer:" in said
        assert "scz-smm: TokenBoundElsewhere (41): " in said
        assert (node.bound(), node.prepared()) == ([], 0)


def test_a_container_that_is_never_started(node: NriNode) -> None:
    with node.pod_of(VM) as (pod, token):
        container = create(node, pod, "server", token)
        assert len(node.bound()) == 1
        pod.stop_container(container)
        assert (node.bound(), node.prepared()) == ([], 0)


def test_a_container_that_ends_by_itself(node: NriNode) -> None:
    with node.pod_of(VM) as (pod, token):
        container = node.run(pod, "server", token, then=f"sha256sum {DESTINATION}/config.json; sleep 1")
        wait_for(node, lambda: node.cri.state(container) == "CONTAINER_EXITED")
        wait_for(node, lambda: node.bound() == [])
        assert DIGESTS["config.json"] in pod.log("server")


def test_a_container_that_cannot_be_started(node: NriNode) -> None:
    with node.pod_of(VM) as (pod, token):
        mounts = [bind(token, _SECRETS, readonly=True)]
        container = pod.create("server", node.image, ["/absent"], mounts=mounts)
        assert len(node.bound()) == 1
        with pytest.raises(CriError, match="/absent"):
            pod.start(container)
        pod.stop_container(container)
        assert (node.bound(), node.prepared()) == ([], 0)


def test_a_model_that_takes_longer_than_nris_default(node: NriNode) -> None:
    """The TPM is silent for longer than the 2 s that an engine waits if nothing is configured."""
    with node.pod_of(VM) as (pod, token), ThreadPoolExecutor() as pool:
        node.scene.tpm.pause()
        try:
            creating = pool.submit(create, node, pod, "server", token)
            time.sleep(3)
            assert not creating.done()
        finally:
            node.scene.tpm.resume()
        pod.start(container := creating.result())
        assert DIGESTS.items() <= node.digests(container).items()
    assert node.nri.connected() is not None


def test_the_engines_time_is_up(node: NriNode) -> None:
    """With NRI's default of 2 s: refused by the plugin in time, for the engine would go on without it."""
    usual, node.containerd.nri = node.containerd.nri, {}
    node.containerd.restart()
    try:
        node.nri.wait_until_connected()
        with node.pod_of(VM) as (pod, token):
            node.scene.tpm.pause()
            try:
                with pytest.raises(CriError) as error:
                    create(node, pod, "server", token)
            finally:
                node.scene.tpm.resume()
            said = str(error.value)
            assert "scz-smm: Terminated (71): the model was not ready within" in said
            assert "`sczctl install --engine containerd --nri` makes the engine wait for 100 s" in said
            assert node.nri.connected() is not None
            assert (node.bound(), node.prepared()) == ([], 0)
            container = create(node, pod, "server", token)  # the plugin is asked again
            pod.start(container)
            assert DIGESTS.items() <= node.digests(container).items()
    finally:
        node.containerd.nri = usual
        node.containerd.restart()
        node.nri.wait_until_connected()


def create(node: NriNode, pod: Pod, name: str, token: Path, **how: object) -> str:
    """As `Node.run`, but not started."""
    mounts = [bind(node.trace, "/trace"), bind(token, _SECRETS, readonly=True)]
    mounts += how.pop("mounts", [])  # type: ignore[arg-type]
    return pod.create(name, node.image, ["sh", "-c", f"echo > /trace/{name}; sleep 1000"], mounts=mounts)


# --- beside other ways ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["runc", VM])
@pytest.mark.parametrize("annotated", [False, True])
def test_beside_cdi_a_model_comes_once(node: NriNode, handler: str, annotated: bool) -> None:
    where = {**node.annotations, "smm.scz/path": DESTINATION} if annotated else {}
    with node.pod_of(handler, where) as (pod, token):
        server = node.run(pod, "server", token, cdi_devices=[DEVICE])
        assert DIGESTS.items() <= node.digests(server).items()
        mounted = node.cri.exec(server, ["grep", "-c", f" {DESTINATION} ", "/proc/mounts"]).stdout
        assert mounted == "1\n"
        assert node.records() == {server}
        assert len(node.bound()) == (handler == VM)


@pytest.mark.parametrize("handler", ["runc", VM])
@pytest.mark.parametrize(("annotated", "devices"), [(False, [DEVICE, AGAIN]), (True, [AGAIN]), (True, [DEVICE, AGAIN])])
def test_beside_cdi_two_models(node: NriNode, handler: str, annotated: bool, devices: list[str]) -> None:
    """Two devices, or one and an annotation that asks for something else."""
    with node.pod_of(handler, {} if not annotated else None) as (pod, token):
        server = node.run(pod, "server", token, cdi_devices=devices)
        assert DIGESTS.items() <= node.digests(server).items()
        again = node.cri.exec(server, ["sha256sum", f"{ELSEWHERE}/config.json"]).stdout
        assert again.split()[0] == DIGESTS["config.json"]
        assert node.cri.exec(server, ["grep", "-c", "^[^ ]* /models/", "/proc/mounts"]).stdout == "2\n"
        assert node.records() == {server}
        assert len(node.bound()) == 2 * (handler == VM)


# --- the plugin is absent: what keeps a container from starting -------------------------------------------------------


def test_a_handler_whose_base_specification_has_our_hooks(node: NriNode) -> None:
    """It cannot be absent: with the plugin the hook finds its record, without it there is none, and nothing starts."""
    with node.pod_of(GUARDED) as (pod, token):
        server = node.run(pod, "server", token)
        assert DIGESTS.items() <= node.digests(server).items()
        node.nri.kill()
        try:
            said = refused(node, "HolderRefused", pod, "second", token)
            assert "StartContainer:" in said
            assert DIGESTS.items() <= node.digests(server).items()
        finally:
            node.nri.start()
    with node.pod_of(GUARDED, {}) as (pod, _):
        assert not node.has_model(node.run(pod, "plain", None))


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
        line = f"container '{open_}' of 'shop'/'shop' asks for a model and was created while"
        wait_for(node, lambda: line in node.nri.log.read_text())


def test_a_virtual_machines_model_outlives_engine_and_plugin(node: NriNode) -> None:
    with node.pod_of(VM) as (pod, token):
        running, made = node.run(pod, "running", token), create(node, pod, "made", token)
        node.containerd.restart()
        node.nri.wait_until_connected()
        assert node.nri.stop() == 0
        node.nri.start()
        assert (len(node.bound()), node.prepared()) == (2, 2)
        assert DIGESTS.items() <= node.digests(running).items()
        pod.start(made)
        assert DIGESTS.items() <= node.digests(made).items()
        assert node.records() == {running, made}


def test_what_goes_while_the_plugin_is_away(node: NriNode) -> None:
    """A container that ran is looked after by its poststop hook, one that did not by the plugin's next start."""
    with node.pod_of(VM) as (pod, token):
        running, made = node.run(pod, "running", token), create(node, pod, "made", token)
        node.nri.kill()
        pod.stop_container(running)
        pod.stop_container(made)
        assert len(node.bound()) == 1
        node.nri.start()
        wait_for(node, lambda: (node.bound(), node.prepared()) == ([], 0))


def test_the_plugin_is_killed_in_the_middle_of_a_create(node: NriNode) -> None:
    """The engine goes on without it: no model, no plaintext; what the child of the plugin still makes is taken away."""
    with node.pod_of(VM) as (pod, token), ThreadPoolExecutor() as pool:
        node.scene.tpm.pause()
        try:
            creating = pool.submit(create, node, pod, "server", token)
            wait_for(node, lambda: hook_processes(node.scene))
            node.nri.kill()
            container = creating.result()
        finally:
            node.scene.tpm.resume()
        pod.start(container)
        assert not node.has_model(container)
        deadline = time.monotonic() + 60
        while hook_processes(node.scene) and time.monotonic() < deadline:
            time.sleep(0.05)
        node.nri.start()
        wait_for(node, lambda: (node.bound(), node.prepared()) == ([], 0))
        assert not node.has_model(container)
        again = node.run(pod, "again", token)
        assert DIGESTS.items() <= node.digests(again).items()


def test_the_engine_is_restarted_in_the_middle_of_a_create(node: NriNode) -> None:
    """It comes back and knows nothing of the container; what is prepared then is for nobody."""
    with node.pod_of(VM) as (pod, token), ThreadPoolExecutor() as pool:
        node.scene.tpm.pause()
        try:
            creating = pool.submit(create, node, pod, "server", token)
            wait_for(node, lambda: hook_processes(node.scene))
            node.containerd.restart()
            node.nri.wait_until_connected()
            other = node.run(pod, "plain", None, annotations={"smm.scz/containers": "server"})
            assert (node.prepared(), len(hook_processes(node.scene)) > 0) == (1, True)
        finally:
            node.scene.tpm.resume()
        with pytest.raises(CriError):
            creating.result()
        wait_for(node, lambda: hook_processes(node.scene) == [])
        wait_for(node, lambda: (node.bound(), node.prepared()) == ([], 0))
        assert not node.has_model(other)
        again = node.run(pod, "again", token)
        assert DIGESTS.items() <= node.digests(again).items()


def wait_for(node: NriNode, happened: Callable[[], object]) -> None:
    """Until something has happened."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, node.nri.log.read_text()
        time.sleep(0.02)
