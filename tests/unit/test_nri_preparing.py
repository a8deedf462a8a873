"""`nri.preparing`: children that end, refuse, take too long, and that nothing ends."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oci_hook.errors import InternalError, SczError, Terminated
from oci_hook.invocation import Invocation
from oci_hook.nri import preparing
from oci_hook.nri.messages import Mount
from oci_hook.nri.preparing import end_children, run_prepare
from tests.stuck import stuck_filesystem

ENOUGH = 60.0
ANSWER = '{"binds": [{"destination": "/m", "source": "/s", "options": ["bind"]}]}'
ASKED = Invocation("prepare")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what is started instead of `prepare`."""

    def are(*words: str) -> None:
        monkeypatch.setattr(Invocation, "command", lambda _: list(words))

    return are


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The children that were started."""
    found: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *words: object, **how: object) -> None:
            super().__init__(*words, **how)  # type: ignore[call-overload]
            found.append(self)

    monkeypatch.setattr(preparing.subprocess, "Popen", Popen)
    return found


def closed(process: subprocess.Popen[bytes]) -> bool:
    """Whether nothing of its pipes is left."""
    return all(pipe is None or pipe.closed for pipe in (process.stdin, process.stdout, process.stderr))


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 60.0])
def test_an_engine_that_says_no_deadline(child: Callable[..., None], seconds: float) -> None:
    child("/bin/sh", "-c", f"cat > /dev/null; echo '{ANSWER}'")
    assert run_prepare(ASKED, b"{}", seconds=seconds, advice="x") == (Mount("/m", "bind", "/s", ("bind",)),)


def test_a_child_that_cannot_be_started(child: Callable[..., None]) -> None:
    child("/absent")
    with pytest.raises(InternalError, match="/absent cannot be started"):
        run_prepare(ASKED, b"{}", seconds=60, advice="x")


@pytest.mark.parametrize("how", ["sleep 1000", "trap '' TERM; sleep 1000 & wait; sleep 1000"])
def test_a_child_that_takes_too_long(
    child: Callable[..., None], started: list[subprocess.Popen[bytes]], how: str
) -> None:
    child("/bin/sh", "-c", how)
    with pytest.raises(Terminated, match=r"not ready within 0\.5 s"):
        run_prepare(ASKED, bytes(1 << 20), seconds=0.5, advice="x")
    assert closed(started[0])
    assert started[0].wait(ENOUGH) in (-15, -9)


@contextmanager
def stuck(folder: Path) -> Iterator[Path]:
    """A file of which the kernel says nothing."""
    folder.mkdir()
    with stuck_filesystem(folder):
        yield folder / "token"


def test_a_child_that_nothing_ends(
    child: Callable[..., None], started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """It waits in the kernel: refused without it. When the kernel lets it go, it is reaped."""
    with stuck(tmp_path / "s") as token:
        child(sys.executable, "-c", f"import os; os.stat('{token}')")
        with pytest.raises(Terminated, match="not ready within"):
            run_prepare(ASKED, b"{}", seconds=2.0, advice="x")
        process = started[-1]  # the file system's is the first
        assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
        assert closed(process)
        (reaper,) = [thread for thread in threading.enumerate() if thread.name == "reaper"]
        assert reaper.daemon
    reaper.join(ENOUGH)
    assert not reaper.is_alive()
    assert process.returncode in (-15, -9)


def test_the_end_of_the_service_ends_its_children(
    child: Callable[..., None], started: list[subprocess.Popen[bytes]]
) -> None:
    refusals: list[SczError] = []

    def prepare() -> None:
        try:
            run_prepare(ASKED, b"{}", seconds=600, advice="x")
        except SczError as error:
            refusals.append(error)

    child("/bin/sleep", "1000")
    thread = threading.Thread(target=prepare)
    thread.start()
    deadline = time.monotonic() + ENOUGH
    while not preparing._running and time.monotonic() < deadline:
        time.sleep(0.01)
    end_children()
    thread.join(ENOUGH)
    assert not thread.is_alive()
    assert started[0].returncode == -15
    assert "signal 15" in refusals[0].message
    assert not preparing._running
