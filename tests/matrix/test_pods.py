"""Pods of a real containerd through CRI: shim, pod annotations, projected tokens, two containers of which one is meant.

The engine is the machine's own containerd (1.6 on Debian 12) with the machine's runtimes, and Debian 13's (1.7) with
those of Debian 13. containerd, its shim, the runtimes, our shim, hook and TPM are real; a kubelet is not there, its
half is `tests/kubelet.py`. Under gVisor a script stands in for gVisor's own containerd shim (`tests/runsc_pods.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from oci_hook.records import ContainerRecord, ContainerRecords
from tests.containerd import Containerd, write_shim
from tests.cri import CriClient, CriError, Pod, bind
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import CODES, KEPT, files_of, hook_processes, model_mounts, mounts_below, tpm_handles
from tests.kubelet import MODEL, Kubelet
from tests.runsc_pods import write_runsc
from tests.runtimes import newer_runsc, own_runsc
from tests.scene import SCZCTL, Scene
from tests.suites import NotInSuite, machine_suite, program

RUNTIMES = ("runc", "crun", "runsc")
SUITES = ("own",) if machine_suite() == "trixie" else ("own", "trixie")
DESTINATION = "/models/pods"
DIGESTS = {name: hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}
_SECRETS = "/var/run/secrets/scz-smm"


def holders(scene: Scene) -> list[ContainerRecord]:
    """The running containers that hold a model of this scene, as `sczctl ps` finds them."""
    return list(ContainerRecords(str(scene.runtime_directory)).live())


def nothing_left(scene: Scene) -> None:
    """No plaintext in any mount namespace, no hook, no record, no mount on the host's side, no handle in the TPM."""
    run, kept = scene.runtime_directory, (*KEPT, "host-mounts", "host-mounts.lock")
    assert model_mounts(scene) == []
    assert hook_processes(scene) == []
    assert set(files_of(scene)) <= {str(run / name) for name in kept}
    assert list((run / "host-mounts").glob("*")) == []
    assert tpm_handles(scene) == ""


@dataclass
class Node:
    """A scene's host with a containerd and what a kubelet would add.

    Attributes:
        trace: A folder of the host that containers leave a file in as their first act.
    """

    scene: Scene
    kubelet: Kubelet
    containerd: Containerd
    cri: CriClient
    image: str
    trace: Path
    annotations: Mapping[str, str] = field(default_factory=lambda: {"smm.scz/model": MODEL})

    @contextmanager
    def pod(self, runtime: str, annotations: Mapping[str, str] | None = None) -> Iterator[Pod]:
        """A pod whose annotations ask for the model."""
        asked = self.annotations if annotations is None else annotations
        with self.cri.pod("shop", handler=f"scz-{runtime}", annotations=asked) as pod:
            yield pod

    def run(self, pod: Pod, name: str, token: Path | None, *, then: str = "sleep 1000", **how: object) -> str:
        """Create and start a container that leaves its trace, then runs `then`."""
        mounts = [bind(self.trace, "/trace"), *how.pop("mounts", ())]  # type: ignore[misc]
        if token is not None:
            mounts.append(bind(token, _SECRETS, readonly=True))
        command = ["sh", "-c", f"echo > /trace/{name}; {then}"]
        return pod.run(name, self.image, command, mounts=mounts, **how)

    def ran(self) -> set[str]:
        """The containers that left a trace."""
        return {path.name for path in self.trace.iterdir()}

    def digests(self, container: str) -> Mapping[str, str]:
        """Each file below the model's path in a container, with its SHA-256."""
        find = f"cd {DESTINATION} && find . -type f -exec sha256sum {{}} +"
        done = self.cri.exec(container, ["sh", "-c", find])
        assert done.returncode == 0, done
        return {name.removeprefix("./"): digest for digest, name in map(str.split, done.stdout.splitlines())}

    def has_model(self, container: str) -> bool:
        """Whether a container sees the model's path at all."""
        return self.cri.exec(container, ["test", "-e", DESTINATION]).returncode == 0

    def records(self) -> set[str]:
        """The ids of the running containers that hold a model."""
        return {record.container_id for record in holders(self.scene)}

    def on_host(self, *command: str | Path) -> str:
        """What a command says in the engine's mount namespace."""
        words = [*self.containerd.namespace.prefix, *command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def models_on_host(self) -> list[str]:
        """Where a model is mounted in the engine's mount namespace, which is the host's or takes its place."""
        lines = self.on_host("cat", "/proc/self/mountinfo").splitlines()
        points = [line.split()[4] for line in lines if " scz-smm " in line]
        return [point for point in points if point.startswith(f"{self.scene.directory}/")]  # others have theirs

    def clean(self) -> None:
        """Nothing is left of any pod."""
        assert self.cri.pods() == []
        nothing_left(self.scene)
        assert [line for line in mounts_below(self.scene) if "kubelet" in line] == []


@pytest.fixture(scope="module")
def kubelet(scene: Scene, model_source: Path) -> Kubelet:
    """The cluster, trusted, and a model for its service account."""
    return Kubelet(scene, model_source)


@contextmanager
def engine(scene: Scene, suite: str) -> Iterator[Containerd]:
    """A suite's containerd, with our shim in front of each of the suite's runtimes."""
    folder = scene.host / f"shims-{suite}"
    runsc = write_runsc(folder / "gvisor", own_runsc() if suite == "own" else newer_runsc())  # sid's is trixie's
    runtimes = {"runsc": runsc}
    for name in ("runc", "crun"):
        runtimes[name] = Path("/usr/bin") / name if suite == "own" else program(suite, name)
    handlers = {}
    for name, path in runtimes.items():
        handlers[f"scz-{name}"] = write_shim(folder / name, path, scene.config)
    programs = Path("/usr/bin") if suite == "own" else program(suite, "containerd").parent
    with Containerd(scene.directory / f"ctd-{suite}", handlers=handlers, programs=programs) as containerd:
        yield containerd


@contextmanager
def made_node(scene: Scene, kubelet: Kubelet, suite: str) -> Iterator[Node]:
    """A node with one suite's programs."""
    trace = scene.host / f"trace-{suite}"
    trace.mkdir()
    with ExitStack() as stack:
        containerd = stack.enter_context(engine(scene, suite))
        cri = stack.enter_context(
            CriClient(containerd.socket, scene.host / "logs", cgroup_parent=f"/{containerd.cgroup}")
        )
        print(f"{suite}: {cri.version()}")
        image = cri.wait_for_image(containerd.busybox_image("k8s.io"))
        yield Node(scene, kubelet, containerd, cri, image, trace)


@pytest.fixture(scope="module", params=SUITES)
def one_node(request: pytest.FixtureRequest, scene: Scene, kubelet: Kubelet) -> Iterator[Node]:
    """The node of each suite that must be there."""
    with made_node(scene, kubelet, request.param) as node:
        yield node


@pytest.fixture
def node(one_node: Node) -> Iterator[Node]:
    """The node, with nothing left of another test, and looked at afterwards."""
    one_node.scene.forget_refusals()
    for path in one_node.trace.iterdir():
        path.unlink()
    one_node.clean()
    yield one_node
    one_node.clean()


def refused(node: Node, reason: str, pod: Pod, name: str, token: Path | None, **how: object) -> str:
    """Check that a container is refused for that reason, that its workload never ran; returns what the engine says."""
    before = node.records()
    with pytest.raises(CriError) as error:
        node.run(pod, name, token, **how)
    why = node.scene.why()
    assert why.get("reason") == reason, (why, error.value)
    assert why["code"] == CODES[reason]
    assert name not in node.ran()
    assert node.records() == before
    return str(error.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_the_named_container_has_the_model(node: Node, runtime: str) -> None:
    annotations = {**node.annotations, "smm.scz/containers": "server"}
    with node.pod(runtime, annotations) as pod:
        token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
        server = node.run(pod, "server", token, then="cat /models/pods/config.json; sleep 1000")
        sidecar = node.run(pod, "sidecar", token)
        assert node.digests(server) == {**DIGESTS, "model.json": node.digests(server)["model.json"]}
        assert not node.has_model(sidecar)
        # runc and crun: mounted in the container alone, read-only. gVisor: on the host's side, where nobody gets in;
        # its overlay lets the container make changes of its own, which nobody else sees.
        touched = node.cri.exec(server, ["touch", f"{DESTINATION}/new"]).returncode == 0
        assert not touched or runtime == "runsc"
        rootfs = node.containerd.directory / "state/io.containerd.runtime.v2.task/k8s.io" / server / "rootfs"
        assert node.models_on_host() == ([f"{rootfs}{DESTINATION}"] if runtime == "runsc" else [])
        if runtime == "runsc":
            listed = node.on_host("ls", f"{rootfs}{DESTINATION}").split()
            assert listed == sorted({name.split("/")[0] for name in (*DIGESTS, "model.json")})
            assert node.on_host("stat", "--format=%a", rootfs.parent) == "700\n"
        assert node.records() == {server}
        assert node.ran() == {"server", "sidecar"}
        # The sandbox's config.json is as containerd wrote it, although it has the pod's annotations.
        sandbox = node.containerd.directory / "state/io.containerd.runtime.v2.task/k8s.io" / pod.id / "config.json"
        assert b'"smm.scz/containers":"server"' in sandbox.read_bytes()
        assert b"launch.py" not in sandbox.read_bytes()
        pod.stop_container(server)
        assert node.records() == set()
        assert model_mounts(node.scene) == []
        assert node.cri.state(sidecar) == "CONTAINER_RUNNING"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_containers_of_a_pod_share_its_token(node: Node, runtime: str) -> None:
    with node.pod(runtime) as pod:
        token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
        first, second = (node.run(pod, name, token) for name in ("first", "second"))
        assert node.digests(first) == node.digests(second)
        assert node.records() == {first, second}
        pod.stop_container(first)
        assert node.records() == {second}
        assert DIGESTS.items() <= node.digests(second).items()
        # As a kubelet restarts a container: a new one of the same name, with the same token.
        again = node.run(pod, "first", token)
        assert DIGESTS.items() <= node.digests(again).items()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_token_of_another_pod(node: Node, runtime: str) -> None:
    with node.pod(runtime) as pod:
        token = node.kubelet.project(pod.uid, node.kubelet.token("11111111-30f5-4dd8-9a2b-0b1f2f6c7d10"))
        said = refused(node, "TokenBoundElsewhere", pod, "thief", token)
        # The engine shows what the runtime shows: runc the hook's line, crun the code alone.
        shown = f"exit code: {CODES['TokenBoundElsewhere']}" if runtime == "crun" else "TokenBoundElsewhere (41)"
        assert shown in said
        assert model_mounts(node.scene) == []


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_pod_without_annotations_is_untouched(node: Node, runtime: str) -> None:
    with node.pod(runtime, {}) as pod:
        container = node.run(pod, "plain", None)
        assert not node.has_model(container)
        assert node.cri.state(container) == "CONTAINER_RUNNING"
        assert node.records() == set()


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_memory_backed_empty_dir_at_the_destination(node: Node, runtime: str) -> None:
    prefix = node.containerd.namespace.prefix
    with ExitStack() as stack:
        pod = stack.enter_context(node.pod(runtime))
        token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
        volume = stack.enter_context(node.kubelet.memory_volume(pod.uid, "models", prefix=prefix))
        stack.callback(pod.remove)  # before its volume goes, as a kubelet does
        server = node.run(pod, "server", token, mounts=[bind(volume, DESTINATION)])
        assert DIGESTS.items() <= node.digests(server).items()
        kinds = node.cri.exec(server, ["grep", f" {DESTINATION} ", "/proc/mounts"]).stdout.split("\n")
        assert [line.split()[0] for line in kinds if line] == ["tmpfs", "scz-smm"]
        # The volume is on the host, too, for as long as the pod is: the model is not.
        assert node.on_host("ls", "-A", volume) == ""
        assert node.models_on_host() == []


@pytest.mark.parametrize(("runtime", "below"), [("runc", ""), ("crun", "/deep")])
def test_a_memory_backed_empty_dir_that_propagates(node: Node, runtime: str, below: str) -> None:
    prefix = node.containerd.namespace.prefix
    with ExitStack() as stack:
        pod = stack.enter_context(node.pod(runtime, {**node.annotations, "smm.scz/path": f"/shared{below}"}))
        token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
        volume = stack.enter_context(node.kubelet.memory_volume(pod.uid, "models", prefix=prefix))
        stack.callback(pod.remove)
        mounts = [bind(volume, "/shared", propagation="BIDIRECTIONAL")]
        refused(node, "DestinationRefused", pod, "server", token, mounts=mounts)
        assert node.models_on_host() == []


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_host_path_at_the_destination(node: Node, runtime: str) -> None:
    folder = node.scene.host / "data"
    folder.mkdir(exist_ok=True)
    with node.pod(runtime) as pod:
        token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
        refused(node, "DestinationRefused", pod, "server", token, mounts=[bind(folder, DESTINATION)])
        assert list(folder.iterdir()) == []


def test_sids_containerd(scene: Scene, kubelet: Kubelet) -> None:
    """Whatever sid has today, 2.x now; that it has none is said by `test_what_sid_holds_today` of test_containerd."""
    with ExitStack() as stack:
        try:
            node = stack.enter_context(made_node(scene, kubelet, "sid"))
        except NotInSuite:
            return
        stack.callback(shutil.rmtree, node.trace)
        for runtime in ("runc", "crun"):
            with node.pod(runtime, {**node.annotations, "smm.scz/containers": "server"}) as pod:
                token = node.kubelet.project(pod.uid, node.kubelet.token(pod.uid))
                server, sidecar = node.run(pod, "server", token), node.run(pod, "sidecar", token)
                assert DIGESTS.items() <= node.digests(server).items()
                assert not node.has_model(sidecar)
            with node.pod(runtime) as pod:
                other = node.kubelet.project(pod.uid, node.kubelet.token("11111111-30f5-4dd8-9a2b-0b1f2f6c7d10"))
                refused(node, "TokenBoundElsewhere", pod, "stolen", other)
            node.clean()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_who_holds_it_and_its_release(node: Node, runtime: str) -> None:
    """runc and crun: the memory comes back. gVisor: the model is on the host's side, and stays until the end."""
    with node.pod(runtime) as pod:
        container = node.run(pod, "server", node.kubelet.project(pod.uid, node.kubelet.token(pod.uid)))
        sczctl = [*SCZCTL, "--config", node.scene.config]
        (row,) = json.loads(node.on_host(*sczctl, "ps", "--json"))
        assert (row["container_id"], row["runtime"], row["holds"][0]["model"]) == (container, runtime, MODEL)
        assert row["memory_bytes"] >= sum(FILES.values())
        done = node.scene.sczctl("release", container, check=False)
        if runtime == "runsc":
            assert (done.returncode, "end the container" in done.stderr) == (25, True)
            assert len(node.models_on_host()) == 1
        else:
            assert (done.returncode, done.stderr) == (0, "")
            assert node.scene.sczctl("ps", "--json").stdout == "[]\n"
        assert node.cri.exec(container, ["test", "-e", f"{DESTINATION}/config.json"]).returncode == (runtime != "runsc")
    node.clean()
