"""`nri.main`: the service as a process, beside an engine of another hand: its start, an outage, its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.nri.main import Journal, notify
from tests.nri_engine import Engine, about, container, field, pod
from tests.process_memory import copies

ENOUGH = 60.0  # seconds, for what happens at once on a machine that has nothing else to do
ROOT = Path(__file__).resolve().parents[2]


def unit_environment() -> dict[str, str]:
    """What the unit's `Environment=` gives it."""
    lines = (ROOT / "config/systemd/scz-nri.service").read_text().splitlines()
    words = [line.partition("=")[2] for line in lines if line.startswith("Environment=")]
    return dict(word.split("=", 1) for word in words)


class Service:
    """The service in a process of its own; what it tells systemd and people.

    Args:
        folder: With a short path; sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket, self.log = folder, folder / "nri.sock", folder / "log"
        config = folder / "config.toml"
        config.write_text(
            f'[paths]\nruntime = "{folder}/run"\naudit = "{folder}/audit.jsonl"\n[nri]\nsocket = "{self.socket}"\n'
        )
        config.chmod(0o644)
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.bind(str(folder / "notify"))
        script = f"from oci_hook.nri.main import main; raise SystemExit(main(['--config', '{config}']))"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                env={"NOTIFY_SOCKET": str(folder / "notify"), **unit_environment()},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def told(self, seconds: float = 0.0) -> bytes:
        """What systemd was told since; nothing if nothing came for so long."""
        self.systemd.settimeout(seconds)
        try:
            return self.systemd.recv(100)
        except (TimeoutError, BlockingIOError):
            return b""

    def end(self) -> int:
        """End it as systemd does."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ENOUGH)


@pytest.fixture
def service() -> Iterator[Service]:
    folder = Path(tempfile.mkdtemp(prefix="nri-"))
    service = Service(folder)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()
        service.systemd.close()
        print(service.log.read_text())
        shutil.rmtree(folder)


CONFIGURE = field(2, "containerd") + field(3, "1.7") + field(5, 60_000)


def test_it_is_ready_when_the_engine_has_let_it_in(service: Service) -> None:
    with Engine(service.socket) as engine:
        engine.accept().registered()
        assert engine.call("Configure", CONFIGURE)[1] == 0
        assert service.told() == b""
        assert engine.call("Synchronize")[1] == 0
        assert service.told(ENOUGH) == b"READY=1"
        assert service.end() == 0


def test_after_an_outage_it_is_back_at_once(service: Service) -> None:
    """However long it lasted, as what is created before has no model; and it is not told anew at each attempt."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(service.socket))
        listener.listen()
        listener.settimeout(ENOUGH)
        for _ in range(12):  # doubling from 0.25 s, the last pauses had been 8 s
            listener.accept()[0].close()
            listener.settimeout(5)
    service.socket.unlink()
    with Engine(service.socket) as engine:
        engine.accept().registered()
        assert engine.call("Configure", CONFIGURE)[1] == 0
        assert engine.call("Synchronize")[1] == 0
        assert service.told(ENOUGH) == b"READY=1"
        said = service.log.read_text().splitlines()
        assert len(said) == len(set(said))
        assert len(said) <= 5  # not there, ended, refused, broken; connected
        engine.hang_up()
        engine.accept()  # an outage later is told again
    assert service.end() == 0
    assert service.log.read_text().count("the engine ended the connection; trying again") == 1


def test_nothing_of_it_is_to_be_read_by_others(service: Service) -> None:
    with Engine(service.socket) as engine:
        engine.accept().registered()
        limits = Path(f"/proc/{service.process.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
        assert "VmLck:\t       0 kB" not in Path(f"/proc/{service.process.pid}/status").read_text()
        assert service.end() == 0


@pytest.mark.parametrize("size", [3000, 300_000])
def test_of_others_containers_nothing_stays_in_memory(service: Service, size: int) -> None:
    secret = b"of another container's, " + os.urandom(8).hex().encode()
    with Engine(service.socket) as engine:
        engine.accept().registered()
        assert engine.call("Configure", CONFIGURE)[1] == 0
        assert engine.call("Synchronize")[1] == 0
        other = container("c1") + field(7, "x" * size) + field(8, b"PASSWORD=" + secret)
        assert engine.call("CreateContainer", field(1, pod()) + field(2, other))[1] == 0
        for number in range(3):
            assert engine.call("CreateContainer", about(f"next-{number}"))[1] == 0
        assert copies(service.process.pid, secret) == 0
        assert copies(service.process.pid, b"nri.sock") > 0


def test_its_end_beside_a_call_that_was_refused(service: Service) -> None:
    with Engine(service.socket) as engine:
        engine.accept().registered()
        assert engine.call("Configure", CONFIGURE)[1] == 0
        assert engine.call("CreateContainer", about("c1"))[1] == 0
        assert service.end() == 0
        assert engine.ended()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(abstract: bool, tmp_path: Path) -> None:
    name = f"@scz-test-{os.getpid()}" if abstract else f"{tmp_path}/n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(ENOUGH)
        notify(name, "READY=1")
        assert systemd.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "relative", "/absent", "@" + "x" * 200, "/nul\0"])
def test_where_systemd_did_not_ask_nothing_is_told(path: str) -> None:
    notify(path, "READY=1")


def test_while_it_tries_a_line_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal()
    for word in ("absent", "absent", "refused", "absent"):
        journal.say(word)
    journal.begin_anew()
    for word in ("connected", "no", "no"):
        journal.say(word)
    journal.hold()
    journal.say("ended")
    journal.say("ended")
    said = [line.removeprefix("scz-nri: ") for line in capsys.readouterr().err.splitlines()]
    assert said == ["absent", "refused", "connected", "no", "no", "ended"]
