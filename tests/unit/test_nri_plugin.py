"""`nri.plugin`: the engine that is believed, what is refused before anything is prepared, what is looked after."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.config import Config
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostMount, HostRecords
from oci_hook.errors import AnnotationInvalid, EngineUnsupported, SystemCallFailed, Terminated
from oci_hook.linux.processes import process_start_time
from oci_hook.nri.messages import Container, Hook, Hooks, Mount, Namespace, PodSandbox, Settings
from oci_hook.nri.plugin import ModelPlugin, creator_of
from oci_hook.nri.prepared import Prepared, load_connected
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.report import load_refusals

MODEL = {"smm.scz/model": "minilm:1"}


class Plugin:
    """The plugin, with a folder of its own and what it says."""

    def __init__(self, directory: Path, **config: str) -> None:
        self.run = directory / "run"
        self.config = directory / "config.toml"
        self.config.write_text(f'[paths]\nruntime = "{self.run}"\naudit = "{directory}/audit.jsonl"\n')
        self.config.chmod(0o644)
        self.said: list[str] = []
        settings = Config(runtime_directory=str(self.run), audit_file=f"{directory}/audit.jsonl", **config)  # type: ignore[arg-type]
        self.handler = ModelPlugin(settings, str(self.config), self.said.append)


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def settings(name: str, seconds: float = 0.0) -> Settings:
    return Settings("", name, "v1", 5.0, seconds, "")


POD = PodSandbox(
    "p", name="shop", uid="u", namespace="shop", annotations=MODEL, runtime_handler="kata", pid=os.getpid()
)
CONTAINER = Container("c", pod_id="p", name="server")


def soon() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize(
    ("named", "says", "fits"),
    [
        ("containerd", "containerd", True),
        ("containerd", "v2", True),
        ("containerd", "cri-o", False),
        ("containerd", "CRIO", False),
        ("cri-o", "cri-o", True),
        ("cri-o", "containerd", False),
    ],
)
def test_the_engine_is_the_one_that_root_names(tmp_path: Path, named: str, says: str, fits: bool) -> None:
    plugin = Plugin(tmp_path, nri_engine=named)
    if not fits:
        with pytest.raises(EngineUnsupported, match=f"engine is {named}"):
            plugin.handler.configure(settings(says))
        assert load_connected(str(plugin.run)) is None
        return
    plugin.handler.configure(settings(says, 100.0))
    assert load_connected(str(plugin.run)) is None  # the engine does not ask it before it has told all
    plugin.handler.synchronize([], [])
    connected = load_connected(str(plugin.run))
    assert connected is not None
    assert (connected.pid, connected.engine, connected.request_seconds) == (os.getpid(), f"{says} v1", 100)


def test_an_engine_that_does_not_wait_long(plugin: Plugin) -> None:
    plugin.handler.configure(settings("containerd", 2.0))
    assert "`sczctl install --engine containerd --nri` makes the engine wait for 100 s" in plugin.said[-1]


def test_what_asks_for_nothing_passes(plugin: Plugin) -> None:
    for pod in (replace(POD, annotations={}), replace(POD, annotations={**MODEL, "smm.scz/containers": "other"})):
        assert plugin.handler.create_container(pod, CONTAINER, soon()) is None
    assert not plugin.run.exists()


def test_a_refusal_is_kept_for_why(plugin: Plugin) -> None:
    with pytest.raises(AnnotationInvalid):
        plugin.handler.create_container(replace(POD, annotations={"smm.scz/x": "y"}), CONTAINER, soon())
    (refusal,) = load_refusals(str(plugin.run))
    assert (refusal.container_id, refusal.reason) == ("c", "AnnotationInvalid")


def test_a_user_namespace_in_a_virtual_machine(plugin: Plugin) -> None:
    container = replace(CONTAINER, namespaces=(Namespace("user"),))
    with pytest.raises(EngineUnsupported, match="NRI does not tell the ids"):
        plugin.handler.create_container(POD, container, soon())
    assert Prepared(str(plugin.run)).ids() == ()
    runc = replace(POD, runtime_handler="runc")
    assert plugin.handler.create_container(runc, container, soon()) is not None


def test_no_time_left(plugin: Plugin) -> None:
    with pytest.raises(Terminated, match="longer the engine does not wait"):
        plugin.handler.create_container(POD, CONTAINER, time.monotonic() - 1)
    assert Prepared(str(plugin.run)).ids() == ()


def test_who_creates(plugin: Plugin, tmp_path: Path) -> None:
    assert creator_of(POD, "/absent") == (os.getpid(), process_start_time(os.getpid()))
    nobody = replace(POD, pid=0)
    with pytest.raises(SystemCallFailed):
        creator_of(nobody, "/absent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        assert creator_of(nobody, str(tmp_path / "s")) == (os.getpid(), process_start_time(os.getpid()))


def test_what_has_gone_is_discarded_when_it_connects(plugin: Plugin) -> None:
    prepared = Prepared(str(plugin.run))
    for name in ("there", "gone", "without"):
        prepared.add(name)
    mount = Mount("/models/minilm", "bind", f"{plugin.run}/bound/x/0", ("bind",))
    there = Container("there", pod_id="p", mounts=(mount,))
    plugin.handler.synchronize([POD], [there, Container("without", pod_id="p")])
    assert prepared.ids() == ("there",)
    plugin.handler.stop_container(POD, there)
    assert prepared.ids() == ()


def test_what_is_being_prepared_is_left_to_its_call(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine came back meanwhile, and knows nothing of the container."""
    prepared = Prepared(str(plugin.run))

    def prepare(*_: object, **__: object) -> tuple[Mount, ...]:
        plugin.handler.synchronize([POD], [])
        return (Mount("/models/minilm", "bind", f"{plugin.run}/bound/x/0", ("bind",)),)

    monkeypatch.setattr("oci_hook.nri.plugin.run_prepare", prepare)
    assert plugin.handler.create_container(POD, CONTAINER, soon()) is not None
    assert prepared.ids() == ("c",)
    plugin.handler.synchronize([POD], [])
    assert prepared.ids() == ()


def record(plugin: Plugin, name: str, **changes: object) -> HostRecords:
    """A container that was prepared and has no process."""
    creator = (os.getpid(), process_start_time(os.getpid()) or 0)
    place = plugin.run / "bound" / name / "0"
    place.mkdir(parents=True)
    for folder in (plugin.run, *place.parents[:2], place):
        folder.chmod(0o700)
    seen = os.stat("/proc/self/ns/mnt")
    mount = HostMount(str(place), 1, "0:1", "/models/minilm")
    made = BoundRecord(name, "", (seen.st_dev, seen.st_ino), "kata", creator, NOBODY, (mount,))
    records = HostRecords(str(plugin.run))
    records.write(replace(made, **changes))  # type: ignore[arg-type]
    assert name in [each.container_id for each in records.bound()]
    return records


def test_a_refusal_takes_nothing_from_another_container_of_that_id(plugin: Plugin) -> None:
    """Its creator is another one: the shim's, say, in another namespace of the engine."""
    with subprocess.Popen(["/bin/sleep", "600"]) as other:
        try:
            creator = (other.pid, process_start_time(other.pid))
            records = record(plugin, "c", creator=creator)
            with pytest.raises(Terminated):
                plugin.handler.create_container(POD, CONTAINER, time.monotonic() - 1)
            assert [each.creator for each in records.bound()] == [creator]
            assert Prepared(str(plugin.run)).ids() == ()
        finally:
            other.kill()


def test_what_was_prepared_and_is_not_marked(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object, **__: object) -> tuple[Mount, ...]:
        record(plugin, "c")
        Prepared(str(plugin.run)).remove("c")
        return ()

    monkeypatch.setattr("oci_hook.nri.plugin.run_prepare", prepare)
    with pytest.raises(Terminated, match="given up while its model was made ready"):
        plugin.handler.create_container(POD, CONTAINER, soon())
    assert HostRecords(str(plugin.run)).bound() == ()
    record(plugin, "c")
    plugin.handler.create_container_lost(POD, CONTAINER)
    assert HostRecords(str(plugin.run)).bound() == ()


def test_what_others_prepared_is_not_touched(plugin: Plugin) -> None:
    """podman's and the shim's containers are no engine's with NRI: other processes create them."""
    records = record(plugin, "lost")
    record(plugin, "adopted", container=(os.getpid(), process_start_time(os.getpid()) or 0))
    record(plugin, "shims", bundle=str(plugin.run))
    record(plugin, "podmans", creator=(1, process_start_time(1) or 0))
    plugin.handler.synchronize([POD], [])
    assert sorted(each.container_id for each in records.bound()) == ["adopted", "podmans", "shims"]


def test_a_container_that_another_way_serves(plugin: Plugin) -> None:
    """A handler of the shim: NRI does not show its hook, and its model is there."""
    pid, start_time = os.getpid(), process_start_time(os.getpid()) or 0
    one = ("minilm:1",)
    served = ContainerRecord("c", "/b", pid, start_time, 1, one, one, one, ("/models/minilm",), "s", 1, delivered=True)
    ContainerRecords(str(plugin.run)).write(served)
    plugin.handler.synchronize([POD], [CONTAINER])
    assert plugin.said == []


def test_a_container_that_was_made_without_it(plugin: Plugin) -> None:
    hooked = Container("b", pod_id="p", hooks=Hooks(prestart=(Hook("/x", ("/usr/lib/scz-smm/oci_hook/launch.py",)),)))
    plain = Container("d", pod_id="other")
    plugin.handler.synchronize([POD], [CONTAINER, hooked, plain])
    assert len(plugin.said) == 1
    assert "container 'c' of 'shop'/'shop' asks for a model" in plugin.said[0]
