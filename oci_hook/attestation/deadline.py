"""A hard deadline for work that cannot be interrupted: it runs in a forked child, which is killed when time is up.

A child that hangs in the kernel (a driver, a FUSE server that never answers) survives SIGKILL until that lets go: it is
left to itself. It holds no output of its parent's, as a runtime waits until a hook's is closed.

A call into tpm2-tss blocks in C until the TPM answers, which a broken one never does. The child opens what it needs
(lock, TPM) itself, so that the kernel takes all of it back when the child ends. The result comes back over a pipe; the
child shares nothing else. It must be forked from a single-threaded process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, NoReturn

from oci_hook.errors import InternalError, SczError, TpmTimeout, all_errors
from oci_hook.linux.processes import lock_memory
from oci_hook.linux.syscalls import failing, prctl_set_pdeathsig

RESULT_LIMIT_BYTES: Final = 1 << 20
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LENGTH_BYTES: Final = 4
_REAP_SECONDS: Final = 2.0
_GOOD, _BAD = b"+", b"-"


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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)  # not yet reaped: the pid is still ours
            _reap(self._pid)
            self._pid = None
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1

    def result(self) -> bytes:
        """Wait for the child's result; once.

        Raises:
            TpmTimeout: The deadline passed.
            InternalError: The action raised something unknown, or its child was ended by somebody.
            SczError: What the action raised.
        """
        received = bytearray()
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        while True:
            left = self._until - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise TpmTimeout(f"the TPM did not answer within {self._seconds:g} s")
            chunk = os.read(self._read_fd, 1 << 16)
            if not chunk:
                return _open_message(bytes(received))
            received += chunk
            if len(received) > RESULT_LIMIT_BYTES:
                raise InternalError("the TPM's child sent more than 1 MiB")


def _reap(pid: int) -> None:
    """Wait for a killed child, and not for one that hangs in the kernel."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(1000 * _REAP_SECONDS):
            os.waitpid(pid, os.WNOHANG)
    finally:
        os.close(pidfd)


def _run_child(action: Callable[[], bytes], write_fd: int, parent: int) -> NoReturn:
    try:
        prctl_set_pdeathsig(signal.SIGKILL)
        if os.getppid() == parent:  # else the parent died before the line above, and no signal will come
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            lock_memory()  # mlockall is not inherited, and a secret will be here
            _send(write_fd, _framed(_outcome(action, write_fd)))
    finally:
        os._exit(0)  # nothing may unwind into the parent's code


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


def _open_message(received: bytes) -> bytes:
    message = received[_LENGTH_BYTES:]
    if len(message) != int.from_bytes(received[:_LENGTH_BYTES], "big"):
        raise InternalError("the TPM's child was ended before it was done")
    if message[:1] == _GOOD:
        return message[1:]
    if message[:1] != _BAD:
        raise InternalError("the TPM's child was ended before it was done")
    sent = json.loads(message[1:])
    classes = {cls.__name__: cls for cls in all_errors().values()}
    raise classes.get(sent["reason"], InternalError)(sent["message"], remedy=sent["advice"])
