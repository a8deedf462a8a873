"""The wire of NRI with real engines: Debian 13's containerd (1.7, NRI 0.6) and sid's (2.1, NRI 0.8).

A handler of the test's takes the place of scz-nri's; what that one does is in `test_nri.py`. containerd, its shim, runc
and the pods, made through CRI, are real. Of sid, whatever it holds today (`test_containerd.test_what_sid_holds_today`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from oci_hook.errors import HolderRefused
from oci_hook.nri import mux
from oci_hook.nri.connection import Handler, Plugin
from oci_hook.nri.messages import Adjustment, Container, ContainerState, Hook, Hooks, Mount, PodSandbox, Settings
from tests.containerd import Containerd
from tests.cri import CriClient, CriError, bind
from tests.suites import NotInSuite, program

ENOUGH = 120.0
SUITES = ("trixie", "sid")
each = pytest.mark.parametrize("suite", SUITES)


class Witness(Handler):
    """Writes down what the engine says; `then` decides what is answered to a creation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Container | None]] = []
        self.settings: list[Settings] = []
        self.lists: list[tuple[Sequence[PodSandbox], Sequence[Container]]] = []
        self.pods: dict[str, PodSandbox] = {}
        self.then: Callable[[Container, float], Adjustment | None] = lambda _container, _deadline: None
        self._changed = threading.Condition()

    def note(self, what: str, name: str, container: Container | None = None) -> None:
        with self._changed:
            self.seen.append((what, name, container))
            self._changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until something was written down that makes it so."""
        with self._changed:
            assert self._changed.wait_for(done, ENOUGH), self.seen

    def of(self, name: str) -> list[tuple[str, Container]]:
        """What was said of the container of this name, in its order."""
        return [(what, container) for what, seen, container in self.seen if seen == name and container is not None]

    def configure(self, settings: Settings) -> None:
        self.settings.append(settings)

    def synchronize(self, pods: Sequence[PodSandbox], containers: Sequence[Container]) -> None:
        with self._changed:
            self.lists.append((pods, containers))
            self._changed.notify_all()

    def run_pod_sandbox(self, pod: PodSandbox) -> None:
        self.pods[pod.id] = pod
        self.note("run pod", pod.id)

    def stop_pod_sandbox(self, pod: PodSandbox) -> None:
        self.note("stop pod", pod.id)

    def remove_pod_sandbox(self, pod: PodSandbox) -> None:
        self.note("remove pod", pod.id)

    def create_container(self, pod: PodSandbox, container: Container, deadline: float) -> Adjustment | None:
        self.note("create", container.name, container)
        return self.then(container, deadline)

    def create_container_lost(self, pod: PodSandbox, container: Container) -> None:
        self.note("lost", container.name, container)

    def post_create_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("created", container.name, container)

    def start_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("start", container.name, container)

    def post_start_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("started", container.name, container)

    def stop_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("stop", container.name, container)

    def remove_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("remove", container.name, container)


@dataclass
class Node:
    """An engine with a plugin that serves it."""

    containerd: Containerd
    cri: CriClient
    image: str
    folder: Path
    witness: Witness = field(default_factory=Witness)
    plugin: Plugin | None = None
    thread: threading.Thread | None = None

    def connect(self) -> Witness:
        """A new plugin, when the engine has told it all there is."""
        self.disconnect()
        self.witness = witness = Witness()
        self.plugin = plugin = Plugin("scz-smm", "10", witness)
        self.thread = threading.Thread(target=plugin.serve, args=(str(self.containerd.nri_socket),))
        self.thread.start()
        witness.wait_for(lambda: bool(witness.lists))
        return witness

    def disconnect(self) -> None:
        """End it, if it has not ended."""
        if self.plugin is not None and self.thread is not None:
            self.plugin.close()
            self.thread.join(ENOUGH)
            assert not self.thread.is_alive()
            assert self.plugin.wait(ENOUGH)
        self.plugin = None


class Nodes:
    """The suites' engines, each started when it is first asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._started: dict[str, Node] = {}

    def get(self, suite: str) -> Node | None:
        """A suite's; None if sid has none today."""
        if suite not in self._started:
            try:
                programs, runc = program(suite, "containerd").parent, program(suite, "runc")
            except NotInSuite:
                if suite != "sid":
                    raise
                return None
            place = self._folder / suite
            containerd = self._stack.enter_context(
                Containerd(place, handlers={"runc": runc}, programs=programs, nri={})
            )
            image = containerd.busybox_image(namespace="k8s.io")
            cri = self._stack.enter_context(
                CriClient(containerd.socket, self._folder, cgroup_parent=f"/{containerd.cgroup}")
            )
            self._started[suite] = Node(containerd, cri, image, self._folder)
        return self._started[suite]

    def disconnect(self) -> None:
        """End every plugin."""
        for node in self._started.values():
            node.disconnect()


@pytest.fixture(scope="module")
def started() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="nri-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        yield Nodes(folder, stack)


@pytest.fixture
def nodes(started: Nodes) -> Iterator[Nodes]:
    yield started
    started.disconnect()


@each
def test_a_containers_life_is_told_from_beginning_to_end(nodes: Nodes, suite: str) -> None:
    node = nodes.get(suite)
    if node is None:
        return
    witness = node.connect()
    ((pods, containers),) = witness.lists
    assert (pods, containers) == ((), ())
    (settings,) = witness.settings
    assert settings.runtime_name == "containerd"
    assert settings.runtime_version.startswith(f"{node.containerd.version[0]}.{node.containerd.version[1]}.")
    assert settings.request_seconds == 2.0 or node.containerd.version < (2, 0)
    source = node.folder / f"data-{suite}"
    source.mkdir()
    with node.cri.pod("shop", handler="runc", annotations={"smm.scz/model": "demo:1"}) as pod:
        command = ["sh", "-c", "sleep 1000"]
        server = pod.create("server", node.image, command, mounts=[bind(source, "/data")], memory_limit_bytes=64 << 20)
        pod.start(server)
        pid = next(container.pid for what, container in witness.of("server") if what == "started")
        deadline = time.monotonic() + ENOUGH
        while b"sleep" not in (words := Path(f"/proc/{pid}/cmdline").read_bytes()):  # runc is in the middle of execve
            assert time.monotonic() < deadline, words
            time.sleep(0.02)
        pod.stop_container(server)
        seen = witness.pods[pod.id]
    assert (seen.name, seen.namespace, seen.uid, seen.runtime_handler) == ("shop", "shop", pod.uid, "runc")
    assert seen.annotations["smm.scz/model"] == "demo:1"
    assert seen.cgroup_parent == f"/{node.containerd.cgroup}"
    told = witness.of("server")
    assert [what for what, _ in told] == ["create", "created", "start", "started", "stop", "remove"]
    assert {container.id for _, container in told} == {server}
    created = told[0][1]
    assert (created.pod_id, created.memory_limit_bytes) == (pod.id, 64 << 20)
    assert created.annotations["smm.scz/model"] == "demo:1"  # `pod_annotations` of the handler
    assert created.annotations["io.kubernetes.cri.container-type"] == "container"
    assert [(one.type, one.source) for one in created.mounts if one.destination == "/data"] == [("bind", str(source))]
    assert ("mount", "") in [(one.type, one.path) for one in created.namespaces]
    assert created.cgroups_path.startswith(f"/{node.containerd.cgroup}/")
    assert created.pid == 0
    assert [container.state for what, container in told if what == "started"] == [ContainerState.RUNNING]
    assert [what for what, name, _ in witness.seen if name == pod.id] == ["run pod", "stop pod", "remove pod"]


@each
def test_what_the_plugin_adds_is_there(nodes: Nodes, suite: str) -> None:
    node = nodes.get(suite)
    if node is None:
        return
    witness = node.connect()
    folder = node.folder / f"added-{suite}"
    folder.mkdir()
    (folder / "file").write_text("from the host")
    hook = folder / "hook"
    hook.write_text(f"#!/bin/sh\ncat > {folder}/state-$1-$NAME\n")
    hook.chmod(0o755)
    hooks = Hooks(
        prestart=(Hook(str(hook), ("hook", "prestart"), ("NAME=one", "PATH=/bin"), 30),),
        poststop=(Hook(str(hook), ("hook", "poststop"), ("NAME=two", "PATH=/bin")),),
    )
    long = "x" * 200_000  # in many frames
    witness.then = lambda _container, _deadline: Adjustment(
        {"smm.scz/added": long},
        (Mount("/models/demo", "bind", str(folder), ("bind", "ro", "nosuid", "nodev", "noexec")),),
        ("ADDED=a=b", "PATH=/bin"),
        hooks,
    )
    with node.cri.pod("shop", handler="runc") as pod:
        server = pod.run("server", node.image, ["sleep", "1000"])
        seen = node.cri.exec(server, ["sh", "-c", 'echo "$ADDED $PATH"; cat /models/demo/file; touch /models/demo/no'])
        assert seen.stdout == "a=b /bin\nfrom the host"
        assert "Read-only file system" in seen.stderr
        pod.stop_container(server)
        state = json.loads((folder / "state-prestart-one").read_text())
        assert (state["id"], state["annotations"]["smm.scz/added"]) == (server, long)
        assert json.loads((folder / "state-poststop-two").read_text())["id"] == server


@each
def test_a_refusal_ends_the_creation_with_its_reason(nodes: Nodes, suite: str) -> None:
    node = nodes.get(suite)
    if node is None:
        return
    witness = node.connect()

    def refuse(container: Container, _deadline: float) -> None:
        if container.name == "refused":
            raise HolderRefused("the runtime is not one of ours", remedy="`sczctl install` names those that are")

    witness.then = refuse
    with node.cri.pod("shop", handler="runc") as pod:
        with pytest.raises(CriError, match=r"scz-smm: HolderRefused \(47\): the runtime is not one of ours; `sczctl"):
            pod.create("refused", node.image, ["sleep", "1000"])
        pod.run("server", node.image, ["sleep", "1000"])  # the connection goes on
    # The engine undoes what it had not done: a handler hears of containers that never were.
    assert [what for what, _ in witness.of("refused")] == ["create", "stop", "remove"]
    assert [what for what, _ in witness.of("server")][:4] == ["create", "created", "start", "started"]


@each
def test_past_its_time_the_engine_goes_on_without_the_plugin(nodes: Nodes, suite: str) -> None:
    """What NRI does by itself. `sczctl install --nri` raises the time; the model is not there in any case.

    Should sid have got an engine in which a plugin validates (2.2), that one refuses the container.
    """
    node = nodes.get(suite)
    if node is None:
        return
    witness = node.connect()
    told = []

    def slow(_container: Container, deadline: float) -> Adjustment:
        told.append(deadline - time.monotonic())
        while time.monotonic() < deadline:
            time.sleep(0.05)
        return Adjustment(env=("ADDED=1",))

    witness.then = slow
    with node.cri.pod("shop", handler="runc") as pod:
        if node.containerd.version >= (2, 2):
            with pytest.raises(CriError, match="validator plugin 10-scz-smm failed"):
                pod.run("server", node.image, ["sleep", "1000"])
            witness.wait_for(lambda: "lost" in [what for what, _ in witness.of("server")])
            return
        server = pod.run("server", node.image, ["sleep", "1000"])
        witness.wait_for(lambda: "lost" in [what for what, _ in witness.of("server")])
        assert 0 < told[0] <= 2
        assert node.cri.exec(server, ["sh", "-c", 'echo "<$ADDED>"']).stdout == "<>\n"
        assert node.thread is not None
        node.thread.join(ENOUGH)
        assert not node.thread.is_alive()  # the engine ended the connection
        again = node.connect()
        ((pods, containers),) = again.lists
        assert [one.id for one in pods] == [pod.id]
        assert [(one.id, one.state) for one in containers] == [(server, ContainerState.RUNNING)]
        assert containers[0].pid > 0


def test_an_answer_in_one_long_frame_would_not_be_heard(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `mux.frames` divides: the engine's reader has 4096 bytes, and goes on without a plugin that sends more."""
    node = nodes.get("trixie")
    assert node is not None
    witness = node.connect()
    witness.then = lambda _container, _deadline: Adjustment({"smm.scz/long": "x" * 5000}, env=("ADDED=1",))
    with node.cri.pod("shop", handler="runc") as pod:
        heard = pod.run("heard", node.image, ["sleep", "1000"])
        assert node.cri.exec(heard, ["sh", "-c", 'echo "<$ADDED>"']).stdout == "<1>\n"
        monkeypatch.setattr(mux, "_FIRST_BYTES", 1 << 20)
        unheard = pod.run("unheard", node.image, ["sleep", "1000"])
        assert node.cri.exec(unheard, ["sh", "-c", 'echo "<$ADDED>"']).stdout == "<>\n"
        assert node.thread is not None
        node.thread.join(ENOUGH)
        assert not node.thread.is_alive()


def test_a_list_that_is_longer_than_a_message_comes_in_parts(nodes: Nodes) -> None:
    """NRI from 0.7 on, so sid's engine alone. Two pods: NRI 0.8 divides a single one by two and never sends it."""
    node = nodes.get("sid")
    if node is None:
        return
    long = {"smm.scz/long": "x" * 300_000}
    with node.cri.pod("shop", handler="runc") as first, node.cri.pod("mill", handler="runc") as second:
        made = {
            pod.create(f"server-{number}", node.image, ["true"], annotations=long)
            for pod in (first, second)
            for number in range(10)
        }
        ((pods, containers),) = node.connect().lists
    assert {one.id for one in pods} == {first.id, second.id}
    assert {one.id for one in containers} == made
    assert (len(pods), len(containers)) == (2, 20)
