"""deadline.Standby: forked before there is work, one process for each request, and nothing of it outlives its block."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook.attestation.deadline import RESULT_LIMIT_BYTES, Standby, with_deadline
from oci_hook.errors import InternalError, KeyRefused, SczError, Terminated, TpmTimeout
from tests.stuck import stuck_filesystem


def _children(pid: int) -> set[int]:
    try:
        return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()


@pytest.fixture
def others() -> set[int]:
    """Children that are there already: of other tests, which may have left one that hung."""
    return _children(os.getpid())


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No child and no descriptor is left, however a test ended."""
    before, children = set(os.listdir("/proc/self/fd")), _children(os.getpid())
    yield
    assert _children(os.getpid()) <= children
    assert set(os.listdir("/proc/self/fd")) == before


def nothing() -> None:
    """What gets ready at once."""


def echo(request: bytes) -> bytes:
    return b"got " + request


def pids(_request: bytes) -> bytes:
    return f"{os.getpid()} {os.getppid()}".encode()


def hang(_request: bytes) -> bytes:
    time.sleep(60)
    return b"too late"


def refuse(request: bytes) -> bytes:
    if request == b"fail":
        raise ValueError("a secret")
    if request == b"refuse":
        raise KeyRefused("seen: ‘ä’", remedy="do this")
    return request


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
def test_a_request_of_any_size_and_its_result(size: int) -> None:
    with Standby(nothing, lambda request: str(len(request)).encode()) as standby:
        assert standby.ask(bytes(size), 10) == str(size).encode()


@pytest.mark.parametrize("size", [0, 65_537, RESULT_LIMIT_BYTES - 5])
def test_a_result_of_any_size(size: int) -> None:
    with Standby(nothing, lambda _request: b"\xff" * size) as standby:
        assert standby.ask(b"", 10) == b"\xff" * size


def test_more_than_a_mebibyte_is_refused() -> None:
    with (
        Standby(nothing, lambda _request: bytes(RESULT_LIMIT_BYTES + 1)) as standby,
        pytest.raises(InternalError, match="more than 1 MiB"),
    ):
        standby.ask(b"", 10)


def test_each_request_has_a_process_of_its_own_that_is_gone_when_the_next_begins() -> None:
    with Standby(nothing, pids) as standby:
        (first, child), (second, same) = (standby.ask(b"", 10).split() for _ in range(2))
        assert child == same
        assert len({first, second, child, str(os.getpid()).encode()}) == 4
        assert _is_gone(int(first))


def test_what_it_gets_ready_is_there_for_every_request_and_not_here() -> None:
    there: list[int] = []
    with Standby(lambda: there.append(1), lambda _request: bytes(there)) as standby:
        assert [standby.ask(b"", 10) for _ in range(2)] == [b"\x01", b"\x01"]
    assert there == []


def test_what_cannot_be_made_ready_is_told_by_the_request() -> None:
    with Standby(lambda: 1 // 0, refuse) as standby:
        assert standby.ask(b"x", 10) == b"x"
        with pytest.raises(KeyRefused):
            standby.ask(b"refuse", 10)


def test_our_errors_cross_and_another_request_may_follow() -> None:
    with Standby(nothing, refuse) as standby:
        with pytest.raises(SczError) as raised:
            standby.ask(b"refuse", 10)
        assert type(raised.value) is KeyRefused
        assert (raised.value.message, raised.value.advice) == ("seen: ‘ä’", "do this")
        assert standby.ask(b"x", 10) == b"x"


def test_of_a_foreign_exception_only_the_class_is_told_and_nothing_follows() -> None:
    with Standby(nothing, refuse) as standby:
        with pytest.raises(InternalError, match="ValueError") as raised:
            standby.ask(b"fail", 10)
        assert "secret" not in raised.value.message
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"x", 10)


def test_one_that_is_never_asked_ends_in_silence(others: set[int]) -> None:
    with Standby(lambda: time.sleep(60), echo):
        (child,) = _children(os.getpid()) - others
    assert _is_gone(child)


def test_a_timeout_ends_all_of_it(others: set[int]) -> None:
    with Standby(nothing, hang) as standby:
        (child,) = _children(os.getpid()) - others
        with pytest.raises(TpmTimeout, match=r"did not answer within 0\.2 s"):
            standby.ask(b"", 0.2)
        assert _is_gone(child)
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"", 10)


def test_a_timeout_ends_a_process_that_ignores_every_signal_it_can(others: set[int]) -> None:
    def act(_request: bytes) -> bytes:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        return hang(b"")

    with Standby(nothing, act) as standby:
        (child,) = _children(os.getpid()) - others
        standby._asked = True
        os.write(standby._request_fd, (0).to_bytes(4, "big"))
        _wait(lambda: bool(_children(child)))
        (worker,) = _children(child)
    assert _is_gone(child)
    assert _is_gone(worker)


def test_one_that_is_not_ready_in_time_is_a_timeout() -> None:
    with Standby(lambda: time.sleep(60), echo) as standby, pytest.raises(TpmTimeout):
        standby.ask(bytes(3_000_000), 0.2)  # more than the pipe holds: nobody reads


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("whose", ["the child's", "the request's"])
def test_an_end_by_somebody_is_internal(whose: str, number: signal.Signals) -> None:
    def act(_request: bytes) -> bytes:
        os.kill(os.getppid() if whose == "the child's" else os.getpid(), number)
        return hang(b"")

    with Standby(nothing, act) as standby:
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"", 10)
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"", 10)


def test_a_part_of_a_result_is_none(others: set[int]) -> None:
    def act(_request: bytes) -> bytes:
        os.kill(os.getppid(), signal.SIGSTOP)  # so that nobody but the test ends this process
        return bytes(500_000)

    with Standby(nothing, act) as standby:
        (child,) = _children(os.getpid()) - others
        standby._asked = True
        os.write(standby._request_fd, (0).to_bytes(4, "big"))
        _wait(lambda: bool(_children(child)))
        (worker,) = _children(child)
        assert os.read(standby._result_fd, 1 << 16)
        os.kill(worker, signal.SIGKILL)
        os.kill(child, signal.SIGCONT)
        with pytest.raises(InternalError):
            standby.ask(b"", 10)


def too_much(request: bytes) -> bytes:
    return bytes(RESULT_LIMIT_BYTES + 1) if request == b"too much" else echo(request)


def test_after_too_much_no_other_request_gets_the_rest_of_it() -> None:
    with Standby(nothing, too_much) as standby:
        child = standby._pid
        with pytest.raises(InternalError, match="more than 1 MiB"):
            standby.ask(b"too much", 10)
        assert child is not None
        assert _is_gone(child)
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"x", 10)


def test_a_signal_in_the_middle_of_a_result_ends_it() -> None:
    """As the hook's handler raises; the rest of the answer stays in the pipe."""

    def act(request: bytes) -> bytes:
        os.kill(hook, signal.SIGUSR1)
        return request * 900_000

    def terminate(_number: int, _frame: object) -> None:
        raise Terminated("a signal came")

    hook, before = os.getpid(), signal.signal(signal.SIGUSR1, terminate)
    try:
        with Standby(nothing, act) as standby:
            with pytest.raises(Terminated):
                standby.ask(b"x", 10)
            with pytest.raises(InternalError, match="ended before it was done"):
                standby.ask(b"y", 10)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("code", [0, 1])
def test_a_process_that_leaves_without_an_answer_is_internal(code: int) -> None:
    with Standby(nothing, lambda _request: os._exit(code)) as standby:
        for _ in range(2):
            with pytest.raises(InternalError, match="ended before it was done"):
                standby.ask(b"", 10)


@pytest.mark.parametrize("answer", [b"", b"?what"])
def test_what_is_no_answer_is_none(answer: bytes) -> None:
    """A library in the child could write anything."""
    with Standby(lambda: time.sleep(60), echo) as standby:
        read_fd, write_fd = os.pipe()
        os.write(write_fd, len(answer).to_bytes(4, "big") + answer)
        os.dup2(read_fd, standby._result_fd, inheritable=False)
        os.close(read_fd)
        for _ in range(2):
            with pytest.raises(InternalError, match="ended before it was done"):
                standby.ask(b"", 10)
        os.close(write_fd)


def test_the_end_of_the_requests_ends_it_before_the_block_does() -> None:
    with Standby(nothing, echo) as standby:
        child = standby._pid
        assert child is not None
        assert standby.ask(b"x", 10) == b"got x"
        standby.end()
        _wait(lambda: _is_gone(child))
        standby.end()
        with pytest.raises(InternalError, match="ended before it was done"):
            standby.ask(b"y", 10)


def test_where_sigchld_is_ignored() -> None:
    """As a runtime may start a hook; a child of its own is told, and waits for its children all the same."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            with Standby(nothing, echo) as standby:
                answers = standby.ask(b"x", 10) + standby.ask(b"y", 10)
            os.write(write_fd, answers + b" and " + with_deadline(lambda: b"z", 10))
        finally:
            os._exit(0)
    os.close(write_fd)
    try:
        assert os.read(read_fd, 100) == b"got xgot y and z"
    finally:
        os.close(read_fd)
        os.waitpid(pid, 0)


def test_when_its_parent_is_killed_all_of_it_ends() -> None:
    read_fd, write_fd = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            standby = Standby(nothing, lambda _request: (os.write(write_fd, pids(b"")) and hang(b"")) or b"")
            standby.ask(b"", 60)
        finally:
            os._exit(1)
    os.close(write_fd)
    worker, child = (int(word) for word in os.read(read_fd, 100).split())
    os.close(read_fd)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    _wait(lambda: _is_gone(child) and _is_gone(worker))


def test_it_holds_no_output_and_nothing_of_others(tmp_path: Path) -> None:
    def act(_request: bytes) -> bytes:
        names = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in names if os.path.lexists(f"/proc/self/fd/{fd}")}
        return "\n".join(f"{fd} {link}" for fd, link in links.items()).encode()

    with Standby(nothing, act) as standby, (tmp_path / "opened later").open("w"):
        lines = standby.ask(b"", 10).decode().splitlines()
        assert [line.split()[1] for line in lines[:3]] == ["/dev/null"] * 3
        assert not any("opened later" in line for line in lines)


def test_a_process_that_no_signal_reaches_is_left_behind(tmp_path: Path) -> None:
    """It waits in the kernel for a server that never answers, as a TPM's driver can make it; we do not wait for it."""
    with (
        stuck_filesystem(tmp_path),
        Standby(nothing, lambda _request: os.readlink(tmp_path / "x").encode()) as standby,
    ):
        child = standby._pid
        with pytest.raises(TpmTimeout):
            standby.ask(b"", 0.2)
        assert child is not None
        assert _is_gone(child)
