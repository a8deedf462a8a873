"""attestation.deadline: results and errors cross the pipe; a child that is killed or hangs gives no result."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from oci_hook.attestation.deadline import RESULT_LIMIT_BYTES, Deadline, with_deadline
from oci_hook.errors import InternalError, Refused, SczError, TpmTimeout
from oci_hook.key_errors import all_errors
from tests.stuck import stuck_filesystem


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No child and no descriptor is left, however a test ended."""
    before = set(os.listdir("/proc/self/fd"))
    children = set(_children())
    yield
    assert set(_children()) <= children
    assert set(os.listdir("/proc/self/fd")) == before


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


def raising(error: BaseException) -> Callable[[], bytes]:
    def action() -> NoReturn:
        raise error

    return action


def hang() -> bytes:
    time.sleep(60)
    return b"too late"


@pytest.mark.parametrize("size", [0, 1, 4096, 65_536, 65_537, RESULT_LIMIT_BYTES - 5])
def test_result(size: int) -> None:
    assert with_deadline(lambda: b"\xff" * size, 10) == b"\xff" * size


def test_more_than_a_mebibyte_is_refused() -> None:
    with pytest.raises(InternalError, match="more than 1 MiB"):
        with_deadline(lambda: bytes(RESULT_LIMIT_BYTES + 1), 10)


def test_it_is_another_process_and_changes_nothing_here() -> None:
    seen: list[int] = []

    def action() -> bytes:
        seen.append(1)
        return str(os.getpid()).encode()

    assert int(with_deadline(action, 10)) != os.getpid()
    assert seen == []


@pytest.mark.parametrize("name", sorted(cls.__name__ for cls in all_errors().values()))
def test_our_errors_cross_with_class_message_and_remedy(name: str) -> None:
    cls = next(cls for cls in all_errors().values() if cls.__name__ == name)
    for error in (cls("what was seen: ‘ä’"), cls("seen", remedy="do this")):
        with pytest.raises(SczError) as raised:
            with_deadline(raising(error), 10)
        assert type(raised.value) is cls
        assert (raised.value.message, raised.value.advice) == (error.message, error.advice)
        assert raised.value.code == cls.code


def test_an_error_without_a_number_of_its_own_is_internal() -> None:
    class Unnumbered(Refused):
        pass

    with pytest.raises(InternalError, match="seen"):
        with_deadline(raising(Unnumbered("seen")), 10)


@pytest.mark.parametrize("error", [ValueError("a secret"), KeyboardInterrupt(), SystemExit(0), MemoryError()])
def test_a_foreign_exception_is_internal_and_only_its_class_is_told(error: BaseException) -> None:
    with pytest.raises(InternalError, match=type(error).__name__) as raised:
        with_deadline(raising(error), 10)
    assert "secret" not in raised.value.message


def test_an_action_that_returns_no_bytes_is_internal() -> None:
    with pytest.raises(InternalError, match="TypeError"):
        with_deadline(lambda: "text", 10)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_is_ended_by_somebody_is_internal(number: signal.Signals) -> None:
    def action() -> bytes:
        os.kill(os.getpid(), number)
        return hang()

    with pytest.raises(InternalError, match="ended before it was done"):
        with_deadline(action, 10)


def test_a_child_that_leaves_by_itself_is_internal() -> None:
    def action() -> NoReturn:
        os._exit(0)

    with pytest.raises(InternalError, match="ended before it was done"):
        with_deadline(action, 10)


@pytest.mark.parametrize("action", [lambda: bytes(500_000), raising(Refused("x" * 500_000))])
def test_a_part_of_what_a_killed_child_wrote_is_no_result(action: Callable[[], bytes]) -> None:
    with Deadline(action, 10) as running:
        pid = int(_children()[-1])
        deadline = time.monotonic() + 5
        while "pipe" not in _waiting_in(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InternalError, match="ended before it was done"):
            running.result()


def _waiting_in(pid: int) -> str:
    """The kernel's function that a process sleeps in, or `pipe` if that is hidden and it sleeps."""
    with open(f"/proc/{pid}/stat") as file:
        sleeps = file.read().rpartition(")")[2].split()[0] == "S"
    with open(f"/proc/{pid}/wchan") as file:
        name = file.read()
    return "pipe" if sleeps and name in ("", "0") else name


def test_timeout_kills_the_child() -> None:
    begun = time.monotonic()
    running = Deadline(hang, 0.2)
    pid = int(_children()[-1])
    with running, pytest.raises(TpmTimeout, match=r"did not answer within 0\.2 s"):
        running.result()
    assert time.monotonic() - begun < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_timeout_kills_a_child_that_ignores_every_signal_it_can() -> None:
    def action() -> bytes:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        return hang()

    with pytest.raises(TpmTimeout):
        with_deadline(action, 0.2)


def test_a_deadline_in_the_past_is_a_timeout() -> None:
    with pytest.raises(TpmTimeout):
        with_deadline(hang, 0)


def test_leaving_without_asking_kills_the_child() -> None:
    with Deadline(hang, 60):
        pid = int(_children()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_other_work_goes_on_meanwhile() -> None:
    with Deadline(lambda: b"done", 10) as running:
        time.sleep(0.05)
        assert running.result() == b"done"


def test_a_child_that_no_signal_reaches_is_left_behind(tmp_path: Path) -> None:
    """It waits in the kernel for a server that never answers: as a TPM's driver can make it, or a container's FUSE."""
    with stuck_filesystem(tmp_path):
        running = Deadline(lambda: os.readlink(tmp_path / "x").encode(), 3)  # until then it hangs, on any machine
        pid = int(_children()[-1])
        with running, pytest.raises(TpmTimeout):
            running.result()
        assert str(pid) in _children()
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL  # once the server is gone


def test_the_child_holds_no_output() -> None:
    """A runtime reads a hook's output to its end, which a child that is left behind would keep away."""
    seen = with_deadline(lambda: "\n".join(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)).encode(), 10)
    assert seen.split() == [b"/dev/null"] * 3
