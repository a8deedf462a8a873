"""`nri.connection`, `calls` and `lanes`: a plugin and an engine of another hand, over a real socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hook.errors import (
    EngineUnsupported,
    FileUnreadable,
    HolderRefused,
    ModelUnknown,
    SczError,
    SystemCallFailed,
    TpmTimeout,
)
from oci_hook.nri import calls, connection, ttrpc
from oci_hook.nri.connection import Handler, Plugin, serve
from oci_hook.nri.lanes import Lanes
from oci_hook.nri.messages import Adjustment, Container, Event, Hook, Hooks, Mount, PodSandbox, Settings
from tests.nri_engine import DATA, PLUGIN, REQUEST, RESPONSE, Engine, about, container, field, fields, pod, request

ENOUGH = 60.0  # seconds, for what happens at once on a machine that has nothing else to do
UNIMPLEMENTED, INVALID, EXHAUSTED, PRECONDITION, ABORTED, INTERNAL, UNAVAILABLE = 12, 3, 8, 9, 10, 13, 14


class Recorder(Handler):
    """Writes down what it is called with; `then` is what it does in `create_container`."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.settings: list[Settings] = []
        self.lists: list[tuple[Sequence[PodSandbox], Sequence[Container]]] = []
        self.then: Callable[[Container, float], Adjustment | None] = lambda _container, _deadline: None
        self.on_configure: Exception | None = None
        self._changed = threading.Condition()

    def note(self, what: str, name: str) -> None:
        with self._changed:
            self.seen.append((what, name))
            self._changed.notify_all()

    def wait_for(self, what: str, name: str) -> None:
        """Wait until it was called so."""
        with self._changed:
            assert self._changed.wait_for(lambda: (what, name) in self.seen, ENOUGH), self.seen

    def configure(self, settings: Settings) -> None:
        self.settings.append(settings)
        if self.on_configure is not None:
            raise self.on_configure

    def synchronize(self, pods: Sequence[PodSandbox], containers: Sequence[Container]) -> None:
        self.lists.append((pods, containers))

    def run_pod_sandbox(self, pod: PodSandbox) -> None:
        self.note("run", pod.id)

    def stop_pod_sandbox(self, pod: PodSandbox) -> None:
        self.note("stop pod", pod.id)

    def remove_pod_sandbox(self, pod: PodSandbox) -> None:
        self.note("remove pod", pod.id)

    def create_container(self, pod: PodSandbox, container: Container, deadline: float) -> Adjustment | None:
        self.note("create", container.id)
        return self.then(container, deadline)

    def create_container_lost(self, pod: PodSandbox, container: Container) -> None:
        self.note("lost", container.id)

    def post_create_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("created", container.id)

    def start_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("start", container.id)

    def post_start_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("started", container.id)

    def stop_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("stop", container.id)

    def remove_container(self, pod: PodSandbox, container: Container) -> None:
        self.note("remove", container.id)

    def shutdown(self) -> None:
        self.note("shutdown", "")


class Running:
    """A plugin that serves in a thread."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path, self.plugin = str(path), Plugin("scz-smm", "10", handler)
        self.error: SczError | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Running:
        self.error, self._thread = None, threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.plugin.serve(self.path)
        except SczError as error:
            self.error = error

    def ended(self) -> SczError | None:
        """Wait until `serve` returned or raised; what it raised."""
        self._thread.join(ENOUGH)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def path() -> Iterator[Path]:
    """Where the engine listens; a short path."""
    folder = tempfile.mkdtemp(prefix="nri-")
    yield Path(folder) / "nri.sock"
    shutil.rmtree(folder)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path) as engine:
        yield engine


@pytest.fixture
def handler() -> Recorder:
    return Recorder()


@pytest.fixture
def running(engine: Engine, handler: Recorder) -> Iterator[Running]:
    """A plugin that connects; everything it began is done at the end."""
    running = Running(engine.path, handler).start()
    yield running
    running.plugin.close()
    running.ended()
    assert running.plugin.wait(ENOUGH)


# --- the beginning ----------------------------------------------------------------------------------------------------


def test_it_registers_is_configured_and_gets_all_there_is(engine: Engine, handler: Recorder, running: Running) -> None:
    assert engine.accept().registered() == ("scz-smm", "10")
    payload, code, _ = engine.call("Configure", field(2, "containerd") + field(3, "2.1") + field(5, 2000))
    assert (code, payload) == (0, field(2, 0b11001111111))  # all but the updates
    assert handler.settings == [Settings("", "containerd", "2.1", 0.0, 2.0, "")]
    everything = field(1, pod("p1")) + field(2, container("c1")) + field(2, container("c2"))
    assert engine.call("Synchronize", everything) == (b"", 0, "")
    ((pods, containers),) = handler.lists
    assert ([one.id for one in pods], [one.id for one in containers]) == (["p1"], ["c1", "c2"])


def test_it_is_subscribed_to_what_it_overrides_and_to_nothing_else() -> None:
    class Two(Handler):
        def create_container(self, pod: PodSandbox, container: Container, deadline: float) -> None:
            return None

        def remove_container(self, pod: PodSandbox, container: Container) -> None:
            return None

    assert calls.subscribed(Two()) == {Event.CREATE_CONTAINER, Event.REMOVE_CONTAINER}
    with pytest.raises(ValueError, match="nothing"):
        Plugin("scz-smm", "10", Handler())


@pytest.mark.parametrize(("name", "index"), [("", "10"), ("a b", "10"), ("a", "1"), ("a", "1x"), ("a", "100")])
def test_a_name_that_no_engine_takes_is_refused_here(name: str, index: str, handler: Recorder) -> None:
    with pytest.raises(ValueError, match="no name of a plugin"):
        Plugin(name, index, handler)


def test_lists_in_parts_are_put_together(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    assert engine.call("Synchronize", field(1, pod("p1")) + field(3, 1)) == (field(2, 1), 0, "")
    assert engine.call("Synchronize", field(2, container("c1")) + field(3, 1)) == (field(2, 1), 0, "")
    assert engine.call("Synchronize", field(2, container("c2"))) == (b"", 0, "")
    pods, containers = handler.lists[-1]
    assert ([one.id for one in pods], [one.id for one in containers]) == (["p1"], ["c1", "c2"])
    assert engine.call("Synchronize") == (b"", 0, "")
    assert handler.lists[-1] == ((), ())


def test_lists_without_an_end_are_refused(
    engine: Engine, handler: Recorder, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_SYNCHRONIZE_BYTES", 100)
    engine.begin()
    assert engine.call("Synchronize", field(1, pod("p" * 60)) + field(3, 1))[1] == 0
    assert engine.call("Synchronize", field(1, pod("p" * 60)) + field(3, 1))[1] == INVALID
    assert len(handler.lists) == 1


def test_a_registration_that_the_engine_refuses_is_told(engine: Engine, running: Running) -> None:
    engine.accept().registered(code=2, message="plugin index \x1b[31mtaken")
    error = running.ended()
    assert isinstance(error, EngineUnsupported)
    assert error.message == "the engine refused the plugin's registration: 'plugin index ?[31mtaken'"


def test_an_engine_that_hangs_up_before_it_configures_is_told(engine: Engine, running: Running) -> None:
    engine.accept().registered()
    engine.hang_up()
    error = running.ended()
    assert isinstance(error, EngineUnsupported)
    assert "before it configured the plugin" in error.message


def test_an_engine_that_says_nothing_is_told(
    engine: Engine, handler: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REGISTER_SECONDS", 0.2)
    running = Running(engine.path, handler).start()
    error = running.ended()
    assert isinstance(error, FileUnreadable)
    assert error.message == "the engine did not configure the plugin within 0.2 s"


def test_what_configure_raises_is_answered_and_raised(engine: Engine, handler: Recorder, running: Running) -> None:
    handler.on_configure = ModelUnknown("this engine is too old", remedy="take a newer one")
    engine.accept().registered()
    said = "scz-smm: ModelUnknown (14): this engine is too old; take a newer one"
    assert engine.call("Configure") == (b"", INVALID, said)
    engine.hang_up()
    assert running.ended() is handler.on_configure


def test_nothing_is_served_before_it_is_configured(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.accept().registered()
    assert engine.call("CreateContainer", about("c1"))[1] == PRECONDITION
    assert engine.call("Configure")[1] == 0
    assert engine.call("CreateContainer", about("c1"))[1] == 0
    assert handler.seen == [("create", "c1")]


def test_without_an_engine_it_says_how_to_get_one(path: Path, handler: Recorder) -> None:
    with pytest.raises(FileUnreadable, match="no engine with NRI listens: No such file") as raised:
        serve(str(path), "scz-smm", "10", handler)
    assert "sczctl install" in raised.value.advice
    path.write_text("")
    with pytest.raises(FileUnreadable, match="Connection refused"):
        serve(str(path), "scz-smm", "10", handler)
    with pytest.raises(FileUnreadable, match="too long"):
        serve("/" + "x" * 200, "scz-smm", "10", handler)


def test_a_socket_that_another_user_serves_is_not_spoken_to(path: Path, handler: Recorder) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        listener.settimeout(ENOUGH)
        with pytest.raises(FileUnreadable, match="served by the user 65534, not by root"):
            serve(str(path), "scz-smm", "10", handler)
        trunk, _ = listener.accept()
        with trunk:
            assert trunk.recv(1) == b""


# --- calls ------------------------------------------------------------------------------------------------------------


def test_what_is_to_be_added_reaches_the_engine(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    long = "x" * 20_000  # several frames of the socket
    handler.then = lambda _container, _deadline: Adjustment({"a": long})
    payload, code, _ = engine.call("CreateContainer", about("c1"), timeout_seconds=ENOUGH)
    assert (payload, code) == (field(1, field(2, {"a": long})), 0)
    handler.then = lambda _container, _deadline: None
    assert engine.call("CreateContainer", about("c2")) == (b"", 0, "")
    assert handler.seen == [("create", "c1"), ("create", "c2")]


def test_the_handler_is_told_how_long_the_engine_waits(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    left: list[float] = []
    handler.then = lambda _container, deadline: left.append(deadline - time.monotonic())
    engine.call("CreateContainer", about("c1"), timeout_seconds=1000)
    engine.call("CreateContainer", about("c2"))
    assert 1000 - ENOUGH < left[0] <= 1000
    assert left[1] == float("inf")


EVENTS = {
    "RunPodSandbox": ("run", 1),
    "StopPodSandbox": ("stop pod", 2),
    "RemovePodSandbox": ("remove pod", 3),
    "PostCreateContainer": ("created", 5),
    "StartContainer": ("start", 6),
    "PostStartContainer": ("started", 7),
    "StopContainer": ("stop", 10),
    "RemoveContainer": ("remove", 11),
}


@pytest.mark.parametrize(("method", "word", "number"), [(method, *rest) for method, rest in EVENTS.items()])
def test_an_event_is_the_same_by_a_call_of_its_own_and_by_a_state_change(
    engine: Engine, handler: Recorder, running: Running, method: str, word: str, number: int
) -> None:
    engine.begin()
    assert engine.call(method, about("c1")) == (b"", 0, "")
    assert engine.call("StateChange", field(1, number) + field(2, pod()) + field(3, container("c1"))) == (b"", 0, "")
    assert handler.seen == [(word, "pod" if "Pod" in method else "c1")] * 2


def test_what_newer_engines_add_breaks_nothing(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    for number in (0, 4, 8, 12, 14, 99):  # unknown, or with an answer that a state change does not have
        assert engine.call("StateChange", field(1, number) + field(2, pod()) + field(3, container("c1")))[1] == 0
    for method in ("UpdatePodSandbox", "PostUpdatePodSandbox", "UpdateContainer", "FreezeContainer", ""):
        assert engine.call(method, about("c1"))[1] == UNIMPLEMENTED
    assert engine.call("CreateContainer", about("c1"), service="nri.pkg.api.v2.Plugin")[1] == UNIMPLEMENTED
    assert handler.seen == []
    assert engine.call("CreateContainer", about("c1") + field(40, "new"))[1] == 0
    assert engine.call("Shutdown")[1] == 0
    assert handler.seen == [("create", "c1"), ("shutdown", "")]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelUnknown("no model"), INVALID, f"scz-smm: ModelUnknown (14): no model; {ModelUnknown.remedy}"),
        (HolderRefused("no", remedy="do"), PRECONDITION, "scz-smm: HolderRefused (47): no; do"),
        (TpmTimeout("slow\n\x1b[0m"), UNAVAILABLE, f"scz-smm: TpmTimeout (61): slow??[0m; {TpmTimeout.remedy}"),
        (HolderRefused("é" * 9000), PRECONDITION, None),
        (RuntimeError("the key is 1234"), INTERNAL, "scz-smm: internal error: RuntimeError"),
    ],
    ids=["input", "refused", "could not tell", "long", "our mistake"],
)
def test_an_exception_is_the_answer_to_one_call(
    engine: Engine, handler: Recorder, running: Running, error: Exception, code: int, message: str | None
) -> None:
    def refuse(container: Container, _deadline: float) -> None:
        if container.id == "c1":
            raise error

    engine.begin()
    handler.then = refuse
    payload, got, said = engine.call("CreateContainer", about("c1"))
    assert (payload, got) == (b"", code)
    assert len(said) < 4200
    assert message is None or said == message
    assert engine.call("CreateContainer", about("c2")) == (b"", 0, "")
    assert handler.seen == [("create", "c1"), ("create", "c2")]  # what it raised, it knows: nothing is lost


@pytest.mark.parametrize(
    ("name", "version", "nri", "known"),
    [
        ("containerd", "1.7.24~ds1", "", False),
        ("containerd", "2.1.9+unknown", "", False),
        ("containerd", "2.2.0", "", True),
        ("containerd", "v2.10.1", "", True),
        ("containerd", "3.0", "", True),
        ("cri-o", "1.33.8", "", False),
        ("cri-o", "1.34.0", "", True),
        ("another", "9.9.9", "", False),
        ("another", "0.1", "v0.12.0", True),
        ("another", "0.1", "v1.0.0", True),
        ("another", "0.1", "unknown", False),
        ("containerd", "devel", "", False),
        ("containerd", "", "", False),
    ],
)
def test_it_validates_where_the_engine_knows_that(
    engine: Engine, handler: Recorder, running: Running, name: str, version: str, nri: str, known: bool
) -> None:
    """Then an engine whose plugin did not answer in time refuses the container; older ones would refuse the plugin."""
    engine.accept().registered()
    payload, code, _ = engine.call("Configure", field(2, name) + field(3, version) + field(6, nri))
    assert (payload, code) == (field(2, 0b11001111111 | known << 13), 0)


def test_what_another_plugin_took_away_is_refused(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    ours = Adjustment(
        mounts=(Mount("/models/demo", "bind", "/run/x", ("bind", "ro")),),
        hooks=Hooks(prestart=(Hook("/h", ("h", "p")),)),
    )
    handler.then = lambda _container, _deadline: ours
    mount = field(3, field(1, "/models/demo") + field(2, "bind") + field(3, "/run/x"))
    hook = field(1, field(1, "/h") + field(2, "h") + field(2, "p"))
    other = field(3, field(1, "/other"))

    def validate(adjust: bytes, name: str = "c1") -> dict[int, list[int | bytes]]:
        assert engine.call("CreateContainer", about("c1"))[1] == 0
        payload, code, _ = engine.call("ValidateContainerAdjustment", about(name) + field(3, adjust))
        assert code == 0
        return fields(payload)

    assert validate(other + mount + field(5, hook + field(6, field(1, "/last")))) == {}
    assert validate(b"", "another container") == {}
    said = validate(field(5, hook))
    assert said == {1: [1], 2: [b"scz-smm: another plugin took away its mount '/models/demo'"]}
    assert validate(field(3, field(1, "/models/demo") + field(3, "/elsewhere")) + field(5, hook)) == said
    said = validate(mount)
    assert said == {1: [1], 2: [b"scz-smm: another plugin took away its hook of the stage prestart"]}
    assert validate(mount + field(5, field(6, field(1, "/h") + field(2, "h") + field(2, "p")))) == said


# --- one after the other, and beside each other -----------------------------------------------------------------------


def test_a_container_that_takes_long_holds_up_its_own_calls_alone(
    engine: Engine, handler: Recorder, running: Running
) -> None:
    go_on = threading.Event()
    engine.begin()
    handler.then = lambda container, _deadline: None if container.id != "c1" else _wait(go_on)
    slow = engine.ask("CreateContainer", about("c1"))
    own = engine.ask("StopContainer", about("c1"))
    assert engine.call("CreateContainer", about("c2"))[1] == 0
    assert engine.call("StopContainer", about("c2"))[1] == 0
    assert ("stop", "c1") not in handler.seen
    go_on.set()
    assert engine.answer(slow)[1] == 0
    assert engine.answer(own)[1] == 0
    assert [what for what, name in handler.seen if name == "c1"] == ["create", "stop"]


def _wait(event: threading.Event) -> None:
    assert event.wait(ENOUGH)


def test_their_order_outlives_the_connection(engine: Engine, handler: Recorder, running: Running) -> None:
    go_on = threading.Event()
    engine.begin()
    handler.then = lambda _container, _deadline: _wait(go_on)
    engine.ask("CreateContainer", about("c1"))
    handler.wait_for("create", "c1")
    engine.hang_up()
    assert running.ended() is None
    running.start()
    engine.begin()
    own = engine.ask("RemoveContainer", about("c1"))
    assert engine.call("RemoveContainer", about("c2"))[1] == 0
    go_on.set()
    assert engine.answer(own)[1] == 0
    assert [what for what, name in handler.seen if name == "c1"] == ["create", "lost", "remove"]


def test_an_answer_that_comes_too_late_is_withdrawn(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()

    def slow(_container: Container, deadline: float) -> Adjustment:
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return Adjustment({"a": "b"})

    handler.then = slow
    payload, code, message = engine.call("CreateContainer", about("c1"), timeout_seconds=0.1)
    assert (payload, code) == (b"", ABORTED)
    assert "too late" in message
    handler.wait_for("lost", "c1")


def test_an_answer_that_is_too_long_is_withdrawn(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    handler.then = lambda _container, _deadline: Adjustment({"a": "x" * calls.MAX_ANSWER_BYTES})
    payload, code, message = engine.call("CreateContainer", about("c1"))
    assert (payload, code) == (b"", INVALID)
    assert "too much for an answer" in message
    handler.wait_for("lost", "c1")


def test_an_engine_that_goes_away_is_told_to_the_handler(engine: Engine, handler: Recorder, running: Running) -> None:
    go_on = threading.Event()
    engine.begin()
    handler.then = lambda _container, _deadline: _wait(go_on)
    engine.ask("CreateContainer", about("c1"))
    handler.wait_for("create", "c1")
    engine.hang_up()
    assert running.ended() is None
    assert not running.plugin.wait(0)
    go_on.set()
    handler.wait_for("lost", "c1")
    assert running.plugin.wait(ENOUGH)


def test_an_engine_that_reads_nothing_holds_nothing_for_ever(
    engine: Engine, handler: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SEND_SECONDS", 1)
    running = Running(engine.path, handler).start()
    engine.begin()
    handler.then = lambda _container, _deadline: Adjustment({"a": "x" * 1_000_000})
    engine.ask("CreateContainer", about("c1"))
    handler.wait_for("lost", "c1")
    assert running.ended() is None
    assert running.plugin.wait(ENOUGH)


def test_too_many_containers_at_once_are_refused(engine: Engine, handler: Recorder, running: Running) -> None:
    go_on = threading.Event()
    engine.begin()
    handler.then = lambda _container, _deadline: _wait(go_on)
    for number in range(64):
        engine.ask("CreateContainer", about(f"c{number}"))
    handler.wait_for("create", "c63")
    assert engine.call("CreateContainer", about("one too many"))[1] == EXHAUSTED
    assert ("create", "one too many") not in handler.seen
    go_on.set()
    for _ in range(64):
        assert engine.frame(PLUGIN)[1] == RESPONSE


def test_too_many_calls_of_one_container_are_refused() -> None:
    lanes, go_on, done = Lanes(3, 100), threading.Event(), []
    assert all(lanes.put("one", lambda: _wait(go_on)) for _ in range(3))
    assert not lanes.put("one", lambda: done.append("refused"))
    assert lanes.put("two", lambda: done.append("two"))
    go_on.set()
    assert lanes.wait(ENOUGH)
    assert done == ["two"]
    assert lanes.put("one", lambda: done.append("again"))
    assert lanes.wait(ENOUGH)
    assert done == ["two", "again"]


def test_calls_that_hold_too_much_together_are_refused() -> None:
    lanes, go_on, done = Lanes(9, 100), threading.Event(), []
    assert lanes.put("one", lambda: _wait(go_on), 60)
    assert lanes.put("one", lambda: _wait(go_on), 40)
    assert not lanes.put("one", lambda: done.append("refused"), 1)
    assert not lanes.put("two", lambda: done.append("refused"), 1)
    go_on.set()
    assert lanes.wait(ENOUGH)
    assert lanes.put("one", lambda: done.append("alone"), 101)
    assert lanes.wait(ENOUGH)
    assert done == ["alone"]


def test_a_call_that_never_ends_does_not_keep_the_process() -> None:
    script = """
import threading
from oci_hook.nri.lanes import Lanes
assert Lanes(1, 1).put("one", threading.Event().wait)
print("ended")
"""
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root, timeout=ENOUGH, check=True)
    assert ran.stdout == b"ended\n"


def test_a_process_that_may_have_no_more_threads_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lanes = Lanes(3, 100)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert not lanes.put("one", lambda: None)
    assert lanes.put("one", lambda: None)
    assert lanes.wait(ENOUGH)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_it_can_be_ended_from_elsewhere_and_stays_so(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    running.plugin.close()
    assert running.ended() is None
    assert engine.ended()
    running.plugin.serve(str(engine.path))  # returns at once: nobody accepts here


def test_it_can_be_ended_while_it_registers(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.accept().registered()
    running.plugin.close()
    assert running.ended() is None


def test_a_signal_ends_it(engine: Engine) -> None:
    """In a process of its own, with the signal's handler where `serve` runs."""
    script = """
import signal, sys
from oci_hook.nri.connection import Handler, Plugin
class Mine(Handler):
    def shutdown(self): pass
    def stop_container(self, pod, container): pass
plugin = Plugin("scz-smm", "10", Mine())
signal.signal(signal.SIGTERM, lambda *_: plugin.close())
plugin.serve(sys.argv[1])
print("ended")
"""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(engine.path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        engine.begin()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=ENOUGH)[0] == "ended\n"
        assert process.returncode == 0
        assert engine.ended()
    finally:
        process.kill()
        process.wait()


def test_it_serves_again_after_the_engine_came_back(engine: Engine, handler: Recorder, running: Running) -> None:
    for number in range(3):
        engine.begin()
        assert engine.call("CreateContainer", about(f"c{number}"))[1] == 0
        engine.hang_up()
        assert running.ended() is None
        running.start()
    assert handler.seen == [("create", "c0"), ("create", "c1"), ("create", "c2")]


# --- hostile and newer frames -----------------------------------------------------------------------------------------


def test_frames_that_break_a_rule_are_answered_and_served_on(
    engine: Engine, handler: Recorder, running: Running
) -> None:
    engine.begin()
    ask = request("CreateContainer", about("no"))
    for stream, kind, flags, data, code in [
        (2, REQUEST, 0, ask, INVALID),  # a server's number
        (1, REQUEST, 0, ask, INVALID),  # used before
        (101, DATA, 0, b"x", INVALID),  # no stream takes data
        (103, REQUEST, 0, b"\xff", INVALID),  # no message
        (105, REQUEST, 0, request("CreateContainer", b"\xff"), INVALID),
        (107, REQUEST, 2, ask, UNIMPLEMENTED),  # more data would follow
    ]:
        engine.send_frame(PLUGIN, stream, kind, flags, data)
        assert engine.answer(stream)[1] == code
    engine.send_frame(PLUGIN, 109, REQUEST, 1, request("StopContainer", about("yes")))  # no more data will follow
    assert engine.answer(109)[1] == 0
    assert handler.seen == [("stop", "yes")]


def test_frames_of_later_versions_are_skipped(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    engine.send_frame(3, 1, REQUEST, 0, request("CreateContainer", about("no")))  # a connection that is not known
    engine.send(struct.pack(">II", 0, 3) + b"new")
    engine.send_frame(PLUGIN, 51, 9, 0xFF, b"new")  # a type that is not known
    engine.send_frame(PLUGIN, 53, RESPONSE, 0, b"new")
    engine.send_frame(2, 77, RESPONSE, 0, b"\xff")  # an answer to what was not asked
    engine.send_frame(2, 1, DATA, 0, b"\xff")
    assert engine.call("StopContainer", about("c1"))[1] == 0
    assert handler.seen == [("stop", "c1")]


def test_a_frame_in_many_small_ones_is_one(engine: Engine, handler: Recorder, running: Running) -> None:
    engine.begin()
    data = request("StopContainer", about("c1"))
    for byte in struct.pack(">IIBB", len(data), 201, REQUEST, 0) + data:
        engine.send(struct.pack(">II", PLUGIN, 1) + bytes([byte]))
    assert engine.answer(201)[1] == 0
    assert handler.seen == [("stop", "c1")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack(">II", 3, 0xFFFFFFFF), "that is not NRI"),
        (b"HTTP/1.1 400 Bad Request\r\n", "that is not NRI"),
    ],
    ids=["frame of the socket", "another protocol"],
)
def test_what_cannot_be_followed_ends_the_connection(
    engine: Engine, handler: Recorder, running: Running, data: bytes, said: str
) -> None:
    engine.begin()
    engine.send(data)
    error = running.ended()
    assert isinstance(error, EngineUnsupported)
    assert said in error.message
    assert engine.ended()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects from now on reads 1000 bytes at most."""
    monkeypatch.setattr(ttrpc.FrameReader.__init__, "__defaults__", (1000,))


def test_a_container_that_is_too_long_fails_alone(
    short: None, engine: Engine, handler: Recorder, running: Running
) -> None:
    """As the published servers answer (ttrpc, server.go); an engine with NRI before 0.8 sends whatever it has."""
    engine.begin()
    for number in range(3):
        payload, code, message = engine.call("CreateContainer", about("long" * 1000))
        assert (payload, code) == (b"", EXHAUSTED)
        assert "can be read" in message
        assert engine.call("CreateContainer", about(f"c{number}"))[1] == 0
    assert handler.seen == [("create", "c0"), ("create", "c1"), ("create", "c2")]


def test_a_list_of_all_that_is_too_long_lets_the_plugin_in_all_the_same(
    short: None, engine: Engine, handler: Recorder
) -> None:
    """Else whoever makes enough long containers turns the plugin off for the node, at the engine's next start."""
    told: list[bool] = []
    running = Running(engine.path, handler)
    running.plugin = Plugin("scz-smm", "10", handler, told.append)
    running.start()
    try:
        engine.accept().registered()
        assert engine.call("Synchronize", about("long" * 1000))[1] == EXHAUSTED  # not configured
        assert engine.call("Configure", field(2, "stand-in"))[1] == 0
        assert told == []
        assert engine.call("Synchronize", about("long" * 1000)) == (b"", 0, "")
        assert engine.call("Synchronize") == (b"", 0, "")
        assert engine.call("CreateContainer", about("c1"))[1] == 0
        assert (handler.lists, handler.seen) == ([((), ())], [("create", "c1")])
        assert told == [False, True]
    finally:
        running.plugin.close()
        running.ended()


def test_an_answer_to_the_registration_that_is_too_long_is_refused(engine: Engine, running: Running) -> None:
    engine.accept()
    engine.frame(2)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        engine.send_frame(2, 1, RESPONSE, 0, bytes((4 << 20) + 1))
    error = running.ended()
    assert isinstance(error, EngineUnsupported)
    assert "the engine's answer to the registration has 4194305 bytes" in error.message


ANY_FRAME = st.tuples(
    st.integers(0, 3), st.integers(0, 9), st.integers(0, 4), st.integers(0, 3), st.binary(max_size=120)
)
A_CALL = st.builds(
    request, st.sampled_from([*EVENTS, "Configure", "Synchronize", "StateChange", "X"]), st.binary(max_size=60)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ANY_FRAME | A_CALL | st.binary(max_size=60), max_size=8))
def test_whatever_an_engine_sends_is_served_or_ends_the_connection(
    parts: list[tuple[int, int, int, int, bytes] | bytes],
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nri-"))
    handler = Recorder()
    with Engine(folder / "nri.sock") as engine:
        running = Running(engine.path, handler).start()
        try:
            engine.begin()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for number, part in enumerate(parts):
                    if isinstance(part, tuple):
                        connection_id, stream, kind, flags, data = part
                        engine.send_frame(connection_id, 100 + 10 * number + stream, kind, flags, data)
                    elif number % 2:
                        engine.send(part)
                    else:
                        engine.send_frame(PLUGIN, 105 + 10 * number, REQUEST, 0, part)
            engine.hang_up()
            error = running.ended()
            assert error is None or isinstance(error, EngineUnsupported | SystemCallFailed)
            assert running.plugin.wait(ENOUGH)
            assert "lost" not in dict(handler.seen)  # it was asked for nothing that could get lost
        finally:
            running.plugin.close()
            running.ended()
            shutil.rmtree(folder)


def test_an_answer_has_no_other_fields_than_the_published_ones(
    engine: Engine, handler: Recorder, running: Running
) -> None:
    engine.begin()
    stream = engine.ask("StopContainer", about("c1"))
    _, _, _, data = engine.frame(PLUGIN)
    assert fields(data) == {1: [b""]}
    assert stream > 0
