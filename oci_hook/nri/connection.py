"""A plugin's connection to its engine: registers, is configured and synchronized, serves until the connection ends.

    plugin = Plugin("scz-smm", "10", handler)
    plugin.serve("/var/run/nri/nri.sock")   # again and again: an engine that restarts ends the connection

One thread reads. Each container has a lane of its own: its calls are served one after the other in the order in which
they came, also over a reconnection, and those of other containers do not wait for them. NRI; docs/nri.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oci_hook import __version__
from oci_hook.documents import shown
from oci_hook.errors import EngineUnsupported, FileUnreadable, SczError, SystemCallFailed
from oci_hook.nri import encoding, mux, ttrpc
from oci_hook.nri.calls import Call, Calls, is_synchronize, refusal
from oci_hook.nri.handler import Handler
from oci_hook.nri.lanes import Lanes
from oci_hook.nri.ttrpc import Code, Frame, Kind, Request, Response

__all__ = ["SOCKET", "Handler", "Plugin", "serve"]

SOCKET = "/var/run/nri/nri.sock"
RUNTIME_SERVICE = "nri.pkg.api.v1alpha1.Runtime"
REGISTER_SECONDS = 30.0
#: An answer that would leave later than this before the engine's deadline is withdrawn: it might not count any more.
MARGIN_SECONDS = 0.05
_SEND_SECONDS = 30
_RECEIVE_BYTES = 256 << 10
_POLL_MILLISECONDS = 500
_MAX_LANES = 64
#: The requests that are being served, of all lanes.
_MAX_HELD_BYTES = 2 * ttrpc.MAX_RECEIVED_BYTES
_ENABLE = "`sczctl install --engine ENGINE --nri` turns NRI on in the engine; then restart the engine"
_ASK_ENGINE = "the engine's journal says why; docs/nri.md lists the engines that were tried"


class Plugin:
    """A plugin under its name; `serve` may be called again when it returned or raised.

    Args:
        name: Letters, digits and `_.+-`.
        index: Two digits: the engine calls its plugins in their order.
        handler: What it does.
        synchronized: Called when the engine has the answer to its list of all pods and containers, so that it asks this
            plugin from now on; with False if the list was too long to be read, so that the handler has not seen it.

    Raises:
        ValueError: Name or index are not what NRI takes, or the handler overrides nothing.
    """

    def __init__(
        self, name: str, index: str, handler: Handler, synchronized: Callable[[bool], None] = lambda _: None
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name) or not re.fullmatch(r"[0-9]{2}", index):
            raise ValueError(f"{index}-{name} is no name of a plugin")
        Calls(handler)
        self.name, self.index, self.handler = name, index, handler
        self._synchronized = synchronized
        self._lanes = Lanes(_MAX_LANES, _MAX_HELD_BYTES)
        self._session: _Session | None = None
        self._closed = False

    def serve(self, socket_path: str = SOCKET) -> None:
        """Connect, register, and serve until the engine ends the connection or `close` is called.

        It returns at once then. Calls that are under way go on: a `create_container` of them is followed by its
        `create_container_lost`. `wait` waits for them.

        Raises:
            FileUnreadable: Nothing listens at the socket, or who does is not root, or it does not answer.
            EngineUnsupported: The engine refused the registration, or ended the connection before it configured the
                plugin, or what it sends is not NRI.
            SystemCallFailed: The connection broke.
            SczError: What the handler's `configure` raised.
        """
        if self._closed:
            return
        with _connected(socket_path) as trunk:
            session = self._session = _Session(trunk, self.handler, self._lanes, self._synchronized)
            try:
                if not self._closed:  # by a signal, just now
                    session.run(self.name, self.index)
            except SczError:
                if not self._closed:
                    raise
            finally:
                session.end()
                self._session = None

    def close(self) -> None:
        """End it for good, from any thread or signal handler: `serve` returns, and any later one at once."""
        self._closed = True
        session = self._session
        if session is not None:
            session.end()

    def wait(self, seconds: float) -> bool:
        """Wait for the calls that are under way; False if some still are."""
        return self._lanes.wait(seconds)


def serve(socket_path: str, name: str, index: str, handler: Handler) -> None:
    """`Plugin(name, index, handler).serve(socket_path)`, once."""
    Plugin(name, index, handler).serve(socket_path)


@contextmanager
def _connected(path: str) -> Iterator[socket.socket]:
    """The engine's socket; root's, or this user's: whoever made it tells the plugin which containers there are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trunk:
        try:
            trunk.connect(path)
            credentials = trunk.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            # Whole seconds and microseconds; an engine that reads nothing must not hold a lane for ever.
            trunk.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0))
        except OSError as cause:
            reason = cause.strerror or str(cause)
            raise FileUnreadable(f"{shown(path, 200)}: no engine with NRI listens: {reason}", remedy=_ENABLE) from cause
        uid = struct.unpack("3i", credentials)[1]
        if uid not in (0, os.geteuid()):
            raise FileUnreadable(f"{shown(path, 200)} is served by the user {uid}, not by root")
        yield trunk


class _Session:
    """One connection, from its registration to its end."""

    def __init__(
        self, trunk: socket.socket, handler: Handler, lanes: Lanes, synchronized: Callable[[bool], None]
    ) -> None:
        self._trunk, self._lanes, self._synchronized = trunk, lanes, synchronized
        self._calls = Calls(handler)
        self._sending = threading.Lock()
        self._last_stream = 0
        self._configured = False
        self._not_configured: Exception | None = None

    def run(self, name: str, index: str) -> None:
        """Register and serve; returns at the end of the connection."""
        request = Request(
            RUNTIME_SERVICE,
            "RegisterPlugin",
            encoding.registration(name, index, f"scz-smm/{__version__}"),
            REGISTER_SECONDS,
        )
        deadline = time.monotonic() + REGISTER_SECONDS
        self._send(mux.RUNTIME_SERVICE, Frame(1, Kind.REQUEST, 0, ttrpc.encode_request(request)))
        trunk, plugin, runtime = mux.Demultiplexer(), ttrpc.FrameReader(), ttrpc.FrameReader(ttrpc.MAX_SENT_BYTES)
        while data := self._receive(deadline):
            for connection, payload in trunk.feed(data):
                if connection == mux.PLUGIN_SERVICE:
                    for frame in plugin.feed(payload):
                        self._called(frame)
                elif connection == mux.RUNTIME_SERVICE:
                    for frame in runtime.feed(payload):
                        _check_registration(frame)
        if self._not_configured is not None:
            raise self._not_configured
        if not self._configured:
            raise EngineUnsupported(
                "the engine ended the connection before it configured the plugin", remedy=_ASK_ENGINE
            )

    def end(self) -> None:
        """End the connection; takes no lock, as a signal handler may be the caller."""
        with contextlib.suppress(OSError):
            self._trunk.shutdown(socket.SHUT_RDWR)

    def _receive(self, deadline: float) -> bytes:
        """Some bytes; none at the end of the connection."""
        poll = select.poll()
        poll.register(self._trunk, select.POLLIN)
        try:
            # In portions: a signal that comes just before the call would be handled after it only.
            while not poll.poll(_POLL_MILLISECONDS):
                if not self._configured and time.monotonic() > deadline:
                    raise FileUnreadable(
                        f"the engine did not configure the plugin within {REGISTER_SECONDS:g} s", remedy=_ASK_ENGINE
                    )
            return self._trunk.recv(_RECEIVE_BYTES)
        except ConnectionResetError:
            return b""
        except OSError as cause:
            raise SystemCallFailed(f"the connection to the engine broke: {cause.strerror}") from cause

    def _send(self, connection: int, frame: Frame) -> bool:
        """Send a frame; False if the connection has ended."""
        data = mux.frames(connection, ttrpc.encode_frame(frame))
        try:
            with self._sending:
                self._trunk.sendall(data)
        except OSError:
            self.end()  # half a frame may have left: nothing can follow it
            return False
        return True

    def _answer(self, stream: int, response: Response) -> bool:
        return self._send(mux.PLUGIN_SERVICE, Frame(stream, Kind.RESPONSE, 0, ttrpc.encode_response(response)))

    def _called(self, frame: Frame) -> None:
        """Put a request into its lane, or answer why not."""
        received = time.monotonic()
        if frame.kind not in (Kind.REQUEST, Kind.DATA):
            return  # for later versions, or an answer that nobody asked for
        problem = self._misuse(frame)
        if problem:
            self._answer(frame.stream, Response(code=Code.INVALID_ARGUMENT, message=problem))
            return
        self._last_stream = frame.stream
        if frame.skipped_bytes:
            self._called_at_length(frame)
            return
        try:
            call = self._calls.call(ttrpc.parse_request(frame.data), received)
        except EngineUnsupported as error:
            self._answer(frame.stream, Response(code=Code.INVALID_ARGUMENT, message=error.message))
            return
        if call is None or frame.flags & ttrpc.REMOTE_OPEN:
            self._answer(frame.stream, Response(code=Code.UNIMPLEMENTED, message="scz-smm does not know this call"))
        elif not self._configured and not call.is_configure:
            self._answer(frame.stream, Response(code=Code.FAILED_PRECONDITION, message="scz-smm is not configured yet"))
        elif not self._lanes.put(call.lane, functools.partial(self._serve, frame.stream, call), len(frame.data)):
            self._answer(frame.stream, Response(code=Code.RESOURCE_EXHAUSTED, message="scz-smm has too much to do"))

    def _called_at_length(self, frame: Frame) -> None:
        """Answer a request that is too long to be read: its container fails, and the connection goes on.

        The list of all pods and containers must not fail: the engine would go on without the plugin, for every
        container of the node. What has gone meanwhile is found by a sweep then.
        """
        if self._configured and is_synchronize(frame.data):
            if self._answer(frame.stream, Response(encoding.synchronized(more=False))):
                self._synchronized(False)
            return
        said = f"scz-smm: a message of {frame.skipped_bytes} bytes; at most {ttrpc.MAX_RECEIVED_BYTES} can be read"
        self._answer(frame.stream, Response(code=Code.RESOURCE_EXHAUSTED, message=said))

    def _misuse(self, frame: Frame) -> str:
        if frame.kind == Kind.DATA:
            return "no stream here takes data"
        if frame.stream % 2 != 1:
            return "the number of a client's stream is odd"
        return "the number of a stream is used once and rises" if frame.stream <= self._last_stream else ""

    def _serve(self, stream: int, call: Call) -> None:
        """Run a call and answer it; in its lane's thread."""
        value, error = _attempt(call.run)
        made = error is None
        payload, error = _attempt(functools.partial(call.encode, value)) if made else (b"", error)
        if call.is_configure:
            self._configured, self._not_configured = error is None, error
        if error is not None:
            response = refusal(error)
        elif time.monotonic() > call.deadline - MARGIN_SECONDS:
            response = Response(
                code=Code.ABORTED, message="scz-smm: too late: the engine no longer waits for this answer"
            )
        else:
            response = Response(payload)
        arrived = self._answer(stream, response) and response.code == Code.OK
        if made and not arrived and call.lost is not None:
            _attempt(call.lost)
        if arrived and call.is_synchronize:
            self._synchronized(True)


def _check_registration(frame: Frame) -> None:
    """The engine's answers to us: the one to the registration counts."""
    if frame.stream != 1 or frame.kind != Kind.RESPONSE:
        return
    if frame.skipped_bytes:
        raise EngineUnsupported(f"the engine's answer to the registration has {frame.skipped_bytes} bytes")
    response = ttrpc.parse_response(frame.data)
    if response.code != Code.OK:
        raise EngineUnsupported(
            f"the engine refused the plugin's registration: {shown(response.message, 400)}", remedy=_ASK_ENGINE
        )


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returns, or what it raises: one call that fails is one answer, and the others are served on."""
    try:
        return function(), None
    except Exception as error:
        if not isinstance(error, SczError):
            traceback.print_exc()
        return None, error
