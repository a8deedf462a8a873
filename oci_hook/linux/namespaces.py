"""Children that work in another namespace or another control group, and end with their parent.

`setns(CLONE_NEWNS)` needs a single-threaded process, and a process that joins a container's control group shares its
fate: both are done in a fork that holds little, reports over a socket in bounded messages, and is killed by the kernel
when the thread that forked it ends, however that happens. No program is executed.

What crosses the socket: JSON of at most 64 KiB and a few descriptors. An error of ours arrives as the class it was.
Sources: setns(2), mount_namespaces(7), PR_SET_PDEATHSIG(2const), unix(7).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, NoReturn

from oci_hook.documents import parse_object
from oci_hook.errors import InternalError, SczError, SystemCallFailed
from oci_hook.key_errors import all_errors
from oci_hook.linux import syscalls
from oci_hook.linux.processes import clear_signals

_MESSAGE_BYTES = 1 << 16
_MESSAGE_FDS = 128
_TERMINATION_SECONDS = 10.0
_LAST_FD = 1 << 20

Report = Mapping[str, Any]


def enter_mount_namespace(namespace_fd: int) -> None:
    """Make this single-threaded process a member of a mount namespace; root and cwd become that namespace's.

    Raises:
        SystemCallFailed: The kernel refuses.
    """
    with syscalls.failing("the container's mount namespace cannot be entered"):
        syscalls.setns(namespace_fd, syscalls.CLONE_NEWNS)


class Channel:
    """One end of the socket between parent and child."""

    def __init__(self, end: socket.socket, what: str) -> None:
        self._end = end
        self._what = what

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, report: Report, fds: Sequence[int] = ()) -> None:
        """Send one message; descriptors are duplicated into the receiver.

        Raises:
            BrokenPipeError: The other end is closed.
        """
        data = json.dumps(report).encode()
        if len(data) > _MESSAGE_BYTES or len(fds) > _MESSAGE_FDS:
            raise InternalError(f"{self._what}: a message is too large ({len(data)} bytes, {len(fds)} descriptors)")
        socket.send_fds(self._end, [data], list(fds), socket.MSG_NOSIGNAL)

    def send_lossy(self, report: Report) -> None:
        """Send one message unless the receiver is behind: progress is not worth waiting for."""
        with suppress(BlockingIOError):
            self._end.send(json.dumps(report).encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def receive(self) -> tuple[Report, list[int]] | None:
        """The next message and its descriptors, which the caller closes; None at the end."""
        try:
            data, fds, flags, _ = socket.recv_fds(self._end, _MESSAGE_BYTES, _MESSAGE_FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # the other end died with a message of ours unread
            return None
        if not data:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise InternalError(f"{self._what}: a message was cut off")
        report = parse_object(data, limit_bytes=_MESSAGE_BYTES, what=self._what, error=InternalError)
        return report, fds

    def close(self) -> None:
        """Close this end."""
        self._end.close()


class _Child:
    """The child's side: whatever happens in the block, the process ends with it and never returns to its caller."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __enter__(self) -> Channel:
        return self._channel

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> NoReturn:
        try:
            if isinstance(value, SczError):
                self._channel.send({"error": [value.reason, value.message[:4096], value.advice[:4096]]})
            elif value is not None:
                self._channel.send({"error": [InternalError.__name__, f"{type(value).__name__} in a child", ""]})
        finally:
            os._exit(0 if value is None else 1)


class Child:
    """A forked, single-threaded child that ends with its parent.

    The thread that makes it must outlive it (the kernel ties the child to that *thread*), and no other thread of the
    parent may hold a lock that `body` takes. Standard input, output and error are /dev/null in the child: a runtime
    waits for the end of a hook's output, and would wait for a child that holds it.

    Args:
        what: Names the child in messages.
        body: Runs in the child; what it returns is its last report. A `SczError` that it raises arrives in the parent.
        gone: The error for a child that ends without a report, or does not answer in time.
        keep: The descriptors that stay open in the child; None keeps all.
        ending_seconds: How long it is waited for once it was killed.

    Raises:
        SystemCallFailed: There is no process or descriptor left.
    """

    def __init__(
        self,
        what: str,
        body: Callable[[Channel], Report],
        *,
        gone: type[SczError],
        keep: Iterable[int] | None = None,
        ending_seconds: float = _TERMINATION_SECONDS,
    ) -> None:
        self._ending_seconds = ending_seconds
        self._what = what
        self._gone = gone
        self._status: int | None = None
        parent_pid = os.getpid()
        with syscalls.failing(f"{what} cannot be started"), ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(ours.close)
            # A handler of the parent that raises must not unwind the child into the parent's code.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                pid = os.fork()
                if pid == 0:
                    with _Child(Channel(theirs, what)) as channel:
                        _settle(parent_pid, None if keep is None else {*keep, theirs.fileno()}, ours)
                        channel.send({"done": body(channel)})
                self._pid = pid
                self._pidfd = os.pidfd_open(pid)
                stack.pop_all()
            finally:
                theirs.close()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._channel = Channel(ours, what)

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._pid

    @property
    def killed_by(self) -> int:
        """The number of the signal that ended it; 0 while it runs, and if none did."""
        return max(0, -(self._status or 0))

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def send(self, report: Report, fds: Sequence[int] = ()) -> None:
        """Send a message to the child.

        Raises:
            SczError: The class `gone`: it ended.
        """
        try:
            self._channel.send(report, fds)
        except OSError as cause:
            raise self._gone(f"{self._what} ended early{self._ending()}") from cause

    def receive(self, timeout_seconds: float) -> Report:
        """The child's next report.

        Raises:
            SczError: What `body` raised; or the class `gone`: no report in time, or the child ended without one.
        """
        report, fds = self.receive_descriptors(timeout_seconds)
        for fd in fds:
            os.close(fd)
        return report

    def receive_descriptors(self, timeout_seconds: float) -> tuple[Report, list[int]]:
        """The child's next report, and the descriptors that came with it, which are the caller's to close.

        Raises:
            SczError: As `receive`.
        """
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if not poll.poll(max(0.0, timeout_seconds) * 1000):
            raise self._gone(f"{self._what} gave no answer within {timeout_seconds:g} seconds")
        received = self._channel.receive()
        if received is None:
            raise self._gone(f"{self._what} ended early{self._ending()}")
        report, fds = received
        if "error" in report:
            reason, message, advice = report["error"]
            known = {cls.__name__: cls for cls in all_errors().values()}
            raise known.get(reason, InternalError)(message, remedy=advice or None)
        return report, fds

    def join(self, timeout_seconds: float) -> None:
        """Wait until the child has ended by itself, with its descriptors and mappings closed.

        Raises:
            SczError: The class `gone`: it did not end in time, or failed.
        """
        if not self._wait(timeout_seconds):
            raise self._gone(f"{self._what} did not end within {timeout_seconds:g} seconds")
        if self._status not in (0, None):
            raise self._gone(f"{self._what} failed{self._ending()}")

    def dismiss(self) -> None:
        """Kill the child without waiting for its end; `close` does that."""
        self._channel.close()
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child if it still runs, and reap it; never raises for one that is gone.

        Raises:
            SystemCallFailed: It survives SIGKILL: it hangs in the kernel, on a device that does not answer.
        """
        self._channel.close()
        if not self._wait(0):
            self.dismiss()
            if not self._wait(self._ending_seconds):
                raise SystemCallFailed(f"{self._what} (pid {self._pid}) cannot be ended: it waits for a device")

    def _wait(self, timeout_seconds: float) -> bool:
        """Reap the child; whether it is gone."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(max(0.0, timeout_seconds) * 1000):
            return False
        with suppress(ChildProcessError):  # where SIGCHLD is ignored the kernel has reaped it
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._pidfd)
        self._pidfd = -1
        return True

    def _ending(self) -> str:
        """How the child ended, for a message."""
        if not self._wait(1.0) or self._status is None:
            return ""
        if self._status < 0:
            return f" (killed by {signal.Signals(-self._status).name})"
        return f" (exit status {self._status})"


def _settle(parent_pid: int, keep: set[int] | None, parents_end: socket.socket) -> None:
    """The child's first steps: tied to its parent, default signals, no terminal, no descriptor without need."""
    syscalls.prctl_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the kernel was told
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    clear_signals()
    parents_end.close()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    if keep is not None:
        previous = 2
        for fd in sorted(keep):
            os.closerange(previous + 1, fd)
            previous = fd
        os.closerange(previous + 1, _LAST_FD)
