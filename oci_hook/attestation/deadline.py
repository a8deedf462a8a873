"""A hard deadline for work that cannot be interrupted: it runs in a forked child, which is killed when time is up.

A child that hangs in the kernel (a driver, a FUSE server that never answers) survives SIGKILL until that lets go: it is
left to itself. It holds no output of its parent's, as a runtime waits until a hook's is closed.

A call into tpm2-tss blocks in C until the TPM answers, which a broken one never does. The child opens what it needs
(lock, TPM) itself, so that the kernel takes all of it back when the child ends. The result comes back over a pipe; the
child shares nothing else. It must be forked from a single-threaded process.

`Standby` is the same for several pieces of work whose libraries take long to load: a child that is forked before there
is anything to do loads them meanwhile, then forks for each piece.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final, NoReturn

from oci_hook.errors import InternalError, SczError, TpmTimeout
from oci_hook.key_errors import all_errors
from oci_hook.linux.processes import lock_memory
from oci_hook.linux.syscalls import failing, prctl_set_pdeathsig

RESULT_LIMIT_BYTES: Final = 1 << 20
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LENGTH_BYTES: Final = 4
_REAP_SECONDS, _IDLE_SECONDS = 2.0, 0.5
_GOOD, _BAD = b"+", b"-"
_SENT: Final = 85  # exit code of a child that has answered: a library that ends its process says 0 or 1
_ENDED: Final = "the TPM's child was ended before it was done"


def with_deadline(action: Callable[[], bytes], seconds: float) -> bytes:
    """Run `action` in a child and return its result.

    Args:
        action: What to do; it may raise an error of ours, which is raised here again, with its message and remedy.
        seconds: After so long the child is killed.

    Raises:
        TpmTimeout: The deadline passed.
        InternalError: The action raised something else, or its child was ended by somebody.
        SczError: What the action raised.
    """
    with Deadline(action, seconds) as running:
        return running.result()


class Deadline:
    """`with_deadline` in two steps, to do other work meanwhile: begin here, then ask for the `result`.

    A context manager: whatever is still running at its end is killed.
    """

    def __init__(self, action: Callable[[], bytes], seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        parent = os.getpid()
        # Blocked until the child has its own handlers: the hook's would unwind the child into the parent's code.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            with failing("a child for the TPM's work"):
                self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
                try:
                    self._pid: int | None = os.fork()
                except OSError:
                    os.close(self._read_fd)
                    os.close(write_fd)
                    raise
            if self._pid == 0:
                _run_child(action, write_fd, parent)
            os.close(write_fd)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # not yet reaped: the pid is still ours
            _reap(self._pid)
            self._pid = None
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1

    def count_anew(self) -> None:
        """Let the seconds begin now: until now the child was waiting for its caller."""
        self._until = time.monotonic() + self._seconds

    def result(self) -> bytes:
        """Wait for the child's result; once.

        Raises:
            TpmTimeout: The deadline passed.
            InternalError: The action raised something unknown, or its child was ended by somebody.
            SczError: What the action raised.
        """
        return _open_message(_receive(self._read_fd, self._until, self._seconds))


class Standby:
    """A child that is forked early, gets ready, and then forks for each request: none waits for what it imports.

    Each request has a process of its own, as in `with_deadline`, so a secret is in one for as long as it is worked on.
    That process is forked before its request comes, too: a fork, and locking the memory, takes longer than a quote.
    A context manager: at its end nothing of it runs.

    Args:
        ready: What every request needs; run once, in the child. What it raises is for the requests to find.
        act: What to do for a request.
    """

    def __init__(self, ready: Callable[[], object], act: Callable[[bytes], bytes]) -> None:
        parent, self._asked = os.getpid(), False
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            with failing("a child for the TPM's work"), ExitStack() as theirs, ExitStack() as ours:
                request_fd, self._request_fd = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, request_fd)
                ours.callback(os.close, self._request_fd)
                self._result_fd, result_fd = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, result_fd)
                ours.callback(os.close, self._result_fd)
                self._pid: int | None = os.fork()
                if self._pid == 0:
                    _run_standby(ready, act, (request_fd, result_fd), parent, ours)
                ours.pop_all()
                self._ends: tuple[int, ...] = (self._request_fd, self._result_fd)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.set_blocking(self._request_fd, False)

    def __enter__(self) -> Standby:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        # It ends by itself when it sees the end of the requests, after what it has running, which is its child.
        if not _reap(pid, _REAP_SECONDS + 1 if self._asked else _IDLE_SECONDS):
            os.kill(pid, signal.SIGKILL)
            _reap(pid)

    @property
    def is_there(self) -> bool:
        """Whether it takes requests: one that had no whole answer was the last."""
        return bool(self._ends)

    def end(self) -> None:
        """There are no more requests: what runs ends by itself, which is not waited for before the block's end."""
        ends, self._ends = self._ends, ()
        for fd in ends:
            os.close(fd)

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Have a request worked on, and wait for the result.

        Without a whole answer, for whatever reason, no other request can follow: the rest of the old answer would be
        taken for the beginning of the next.

        Args:
            request: For `act`.
            seconds: After so long all of it is ended.

        Raises:
            TpmTimeout: The deadline passed.
            InternalError: `act` raised something unknown, or a process was ended by somebody.
            SczError: What `act` raised.
        """
        until = time.monotonic() + seconds
        if not self._ends:
            raise InternalError(_ENDED)
        message = None
        try:
            _send_within(self._request_fd, _framed(request), until, seconds)
            self._asked = True
            message = _receive(self._result_fd, until, seconds)
        except BrokenPipeError as cause:
            raise InternalError(_ENDED) from cause
        finally:  # a signal's `Terminated`, too
            if message is None:
                self.__exit__()
        return _open_message(message)


def _receive(fd: int, until: float, seconds: float) -> bytearray:
    """Take one message from a pipe, whole, without its length: into one buffer, which `_open_message` wipes."""
    size = int.from_bytes(_take(fd, _LENGTH_BYTES, until, seconds), "big")
    if _LENGTH_BYTES + size > RESULT_LIMIT_BYTES:
        raise InternalError("the TPM's child sent more than 1 MiB")
    message = _take(fd, size, until, seconds)
    if message[:1] not in (_GOOD, _BAD):
        raise InternalError(_ENDED)
    return message


def _take(fd: int, size: int, until: float, seconds: float) -> bytearray:
    taken, done = bytearray(size), 0
    while done < size:
        _wait(fd, select.POLLIN, until, seconds)
        with memoryview(taken) as view:
            count = os.readv(fd, [view[done:]])
        if not count:
            raise InternalError(_ENDED)
        done += count
    return taken


def _send_within(fd: int, data: bytes, until: float, seconds: float) -> None:
    while data:
        _wait(fd, select.POLLOUT, until, seconds)
        data = data[os.write(fd, data) :]


def _wait(fd: int, event: int, until: float, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = until - time.monotonic()
    if left <= 0 or not poll.poll(1000 * left):
        raise TpmTimeout(f"the TPM did not answer within {seconds:g} s")


def _reap(pid: int, seconds: float = _REAP_SECONDS) -> bool:
    """Wait for a child that ends, and not for one that hangs in the kernel; whether it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:  # where SIGCHLD is ignored the kernel reaps; a hook does not (`harden_process`)
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(1000 * seconds)) and os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
    finally:
        os.close(pidfd)


def _run_child(action: Callable[[], bytes], write_fd: int, parent: int) -> NoReturn:
    code = 1
    try:
        if _is_alone(parent):
            lock_memory()  # mlockall is not inherited, and a secret will be here
            _send(write_fd, _framed(_outcome(action, write_fd)))
            code = _SENT
    finally:
        os._exit(code)  # nothing may unwind into the parent's code


def _is_alone(parent: int) -> bool:
    """Make this child die with its parent and hold no output; False: the parent is gone already."""
    prctl_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above, and no signal will come
        return False
    for number in (*_SIGNALS, signal.SIGCHLD):  # where that is ignored no child can be waited for
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    return True


def _run_standby(
    ready: Callable[[], object], act: Callable[[bytes], bytes], fds: tuple[int, int], parent: int, ends: ExitStack
) -> NoReturn:
    try:
        ends.close()  # the parent's
        request_fd, result_fd = fds
        if _is_alone(parent):
            with suppress(Exception):
                ready()
            own, stays = os.getpid(), True
            while stays:
                pid = os.fork()
                if pid == 0:
                    _run_child(lambda: act(_next_request(request_fd)), result_fd, own)
                stays = _stays(pid, request_fd)
    finally:
        os._exit(0)


def _next_request(fd: int) -> bytes:
    received = bytearray()
    while len(received) < _LENGTH_BYTES or len(received) < _LENGTH_BYTES + int.from_bytes(received[:_LENGTH_BYTES]):
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            os._exit(1)  # there is none
        received += chunk
    return bytes(received[_LENGTH_BYTES:])


def _stays(pid: int, request_fd: int) -> bool:
    """Wait for a request's process, or for the end of the requests, which ends it; whether another may follow."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(request_fd, 0)  # the other end was closed
    if pidfd in dict(poll.poll()):
        os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == _SENT
    os.kill(pid, signal.SIGKILL)
    _reap(pid)
    return False


def _outcome(action: Callable[[], bytes], write_fd: int) -> bytes:
    try:
        return _GOOD + action()
    except SczError as error:
        return _error_message(error)
    except BaseException as error:
        _send(write_fd, _framed(_error_message(InternalError(f"the TPM's child failed: {type(error).__name__}"))))
        raise


def _error_message(error: SczError) -> bytes:
    return _BAD + json.dumps({"reason": error.reason, "message": error.message, "advice": error.advice}).encode()


def _framed(message: bytes) -> bytes:
    """With its length before it: a child that is killed while it writes has sent a part, which is no result."""
    return len(message).to_bytes(_LENGTH_BYTES, "big") + message


def _send(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _open_message(message: bytearray) -> bytes:
    with memoryview(message) as view:
        kind, told = bytes(view[:1]), bytes(view[1:])
    message[:] = bytes(len(message))  # the one copy of a secret that is ours to wipe
    if kind == _GOOD:
        return told
    sent = json.loads(told)
    classes = {cls.__name__: cls for cls in all_errors().values()}
    raise classes.get(sent["reason"], InternalError)(sent["message"], remedy=sent["advice"])
