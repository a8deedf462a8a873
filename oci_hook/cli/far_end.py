"""A command on another machine, through whatever the owner names (`ssh edge-1 sudo`): bytes in, bytes out, bounded.

The far end is not believed: it may write without end, nothing, or never end. The words are executed as they are,
without a shell, with this process's environment and terminal, as ssh needs both. What is ended is the program that was
started; what that has started itself ends by its closed pipes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence

from oci_hook.documents import shown
from oci_hook.errors import DeviceInvalid, FileUnreadable

_CHUNK_BYTES = 1 << 16
_SAID_BYTES = 4096
_END_SECONDS = 2.0
_ADVICE = "run the command by hand to see what it says; the four files work without it (sczctl-enroll(1))"


def call(words: Sequence[str], data: bytes, *, limit_bytes: int, timeout_seconds: float) -> bytes:
    """Run a command with `data` on its standard input.

    Args:
        words: The program, looked for in PATH, and its arguments.
        data: All of its input.
        limit_bytes: The most that it may write to standard output.
        timeout_seconds: The most that it may take.

    Returns:
        Its standard output.

    Raises:
        DeviceInvalid: It wrote more than `limit_bytes`.
        FileUnreadable: It cannot be started, took too long, or failed; with the end of what it said.
    """
    deadline = time.monotonic() + timeout_seconds
    with _started(words) as child:
        talk = _Conversation(child, data, limit_bytes)
        in_time = talk.run(deadline)
        if len(talk.found) > limit_bytes:
            raise DeviceInvalid(f"{shown(words[0])} wrote more than {limit_bytes} bytes", remedy=_ADVICE)
        late = FileUnreadable(
            f"{shown(words[0])} did not end within {timeout_seconds:g} s{_end_of(talk.said)}", remedy=_ADVICE
        )
        if not in_time:
            raise late
        try:
            code = child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired as cause:
            raise late from cause
    if code != 0:
        raise FileUnreadable(f"{shown(words[0])} ended with {code}{_end_of(talk.said)}", remedy=_ADVICE)
    return bytes(talk.found)


def _end_of(said: bytes) -> str:
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {shown(' / '.join(lines[-3:]), 400)}" if lines else ""


@contextlib.contextmanager
def _started(words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(list(words), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    except (OSError, ValueError) as cause:
        raise FileUnreadable(f"{shown(words[0])} cannot be started: {cause}", remedy=_ADVICE) from cause
    try:
        yield child
    finally:
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class _Conversation:
    """What goes to and comes from a program that runs; at most `limit_bytes` and a piece are kept of its output."""

    def __init__(self, child: subprocess.Popen[bytes], data: bytes, limit_bytes: int) -> None:
        self.found, self.said, self._left, self._limit_bytes = bytearray(), b"", memoryview(data), limit_bytes
        self._streams = {"in": child.stdin, "out": child.stdout, "error": child.stderr}
        self._selector = selectors.DefaultSelector()

    def run(self, deadline: float) -> bool:
        """Write and read until standard output ends or is too much; False: the time was up before.

        The end of standard error is not waited for: a master connection of ssh keeps it open.
        """
        with self._selector:
            for name, stream in self._streams.items():
                if stream is not None:
                    os.set_blocking(stream.fileno(), False)
                    events = selectors.EVENT_WRITE if name == "in" else selectors.EVENT_READ
                    self._selector.register(stream, events, name)
            while self._streams["out"] is not None and len(self.found) <= self._limit_bytes:
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    return False
                for key, _ in self._selector.select(seconds):
                    if key.data == "in":
                        self._feed(key.fd)
                    else:
                        self._take(key.data, key.fd)
        return True

    def _feed(self, descriptor: int) -> None:
        try:
            self._left = self._left[os.write(descriptor, self._left[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            return
        except OSError:  # it does not want more
            self._left = memoryview(b"")
        if not self._left:
            self._end("in")

    def _take(self, name: str, descriptor: int) -> None:
        try:
            piece = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not piece:
            self._end(name)
        elif name == "out":
            self.found += piece
        else:
            self.said = (self.said + piece)[-_SAID_BYTES:]

    def _end(self, name: str) -> None:
        stream, self._streams[name] = self._streams[name], None
        if stream is not None:
            self._selector.unregister(stream)
            stream.close()
