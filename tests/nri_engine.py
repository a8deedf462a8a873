"""A stand-in for an engine's side of NRI, for what no engine at hand does: newer calls, hostile frames, silence.

It shares no code with the plugin's side: frames and protobuf are put together here by hand, from the specifications.
Real engines are in `tests/matrix/test_nri_wire.py`.

    with Engine(path) as engine:
        engine.accept(); engine.register(); engine.call("Configure", …)
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from pathlib import Path

PLUGIN, RUNTIME = 1, 2
REQUEST, RESPONSE, DATA = 1, 2, 3
SERVICE = "nri.pkg.api.v1alpha1.Plugin"
_SECONDS = 60  # a machine with much to do


def varint(number: int) -> bytes:
    """Protobuf, "Base 128 Varints"."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def field(number: int, value: int | str | bytes | Mapping[str, str]) -> bytes:
    """A field's bytes: a number is a varint, text and bytes have a length, a map is a field for each key."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    if isinstance(value, Mapping):
        return b"".join(field(number, field(1, key) + field(2, text)) for key, text in value.items())
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data: bytes) -> dict[int, list[int | bytes]]:
    """A message's fields by number; only varints and what has a length occur."""
    found: dict[int, list[int | bytes]] = {}
    place = 0

    def read() -> int:
        nonlocal place
        number = shift = 0
        while True:
            byte = data[place]
            place += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while place < len(data):
        tag = read()
        if tag & 7 == 0:
            found.setdefault(tag >> 3, []).append(read())
        else:
            assert tag & 7 == 2, f"wire type {tag & 7}"
            length = read()
            found.setdefault(tag >> 3, []).append(data[place : place + length])
            place += length
    return found


def request(
    method: str, payload: bytes = b"", *, service: str = SERVICE, timeout_seconds: float | None = None
) -> bytes:
    """ttrpc's Request."""
    limit = b"" if timeout_seconds is None else field(4, int(timeout_seconds * 1e9))
    return field(1, service) + field(2, method) + field(3, payload) + limit


def pod(pod_id: str = "pod", **more: Mapping[str, str]) -> bytes:
    """A PodSandbox."""
    return field(1, pod_id) + field(2, "shop") + b"".join(field(6, value) for value in more.values())


def container(container_id: str, name: str = "server") -> bytes:
    """A Container."""
    return field(1, container_id) + field(2, "pod") + field(3, name)


def about(container_id: str) -> bytes:
    """A request about a container, with its pod."""
    return field(1, pod()) + field(2, container(container_id))


class Engine:
    """Listens where an engine would; serves one connection at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(_SECONDS)
        self._listener.bind(str(path))
        self._listener.listen()
        self.trunk: socket.socket | None = None
        self._stream = -1
        self._received = b""
        self._streams: dict[int, bytes] = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hang_up()
        self._listener.close()

    def accept(self) -> Engine:
        """Take the next connection."""
        self.hang_up()
        self.trunk, _ = self._listener.accept()
        self.trunk.settimeout(_SECONDS)
        self._stream, self._received, self._streams = -1, b"", {}
        return self

    def hang_up(self) -> None:
        """End the connection."""
        if self.trunk is not None:
            self.trunk.close()
            self.trunk = None

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        assert self.trunk is not None
        self.trunk.sendall(data)

    def send_frame(self, connection: int, stream: int, kind: int, flags: int, data: bytes) -> None:
        """A ttrpc frame in one frame of the socket."""
        message = struct.pack(">IIBB", len(data), stream, kind, flags) + data
        self.send(struct.pack(">II", connection, len(message)) + message)

    def ask(self, method: str, payload: bytes = b"", **how: object) -> int:
        """Call a method of the plugin; returns the stream, on which `answer` waits."""
        self._stream += 2
        self.send_frame(PLUGIN, self._stream, REQUEST, 0, request(method, payload, **how))  # type: ignore[arg-type]
        return self._stream

    # --- receiving ----------------------------------------------------------------------------------------------------

    def frame(self, connection: int) -> tuple[int, int, int, bytes]:
        """The next ttrpc frame of a connection: stream, type, flags, data."""
        while True:
            kept = self._streams.get(connection, b"")
            if len(kept) >= 10:
                length, stream, kind, flags = struct.unpack(">IIBB", kept[:10])
                if len(kept) >= 10 + length:
                    self._streams[connection] = kept[10 + length :]
                    return stream, kind, flags, kept[10 : 10 + length]
            number, payload = self._trunk_frame()
            self._streams[number] = self._streams.get(number, b"") + payload

    def answer(self, stream: int) -> tuple[bytes, int, str]:
        """The answer on a stream, which is the next: payload, code, message."""
        got, kind, flags, data = self.frame(PLUGIN)
        assert (got, kind, flags) == (stream, RESPONSE, 0)
        response = fields(data)
        (status,) = response.get(1, [b""])
        assert isinstance(status, bytes)
        code, message = fields(status).get(1, [0])[0], fields(status).get(2, [b""])[0]
        (payload,) = response.get(2, [b""])
        assert isinstance(code, int)
        assert isinstance(message, bytes)
        assert isinstance(payload, bytes)
        return payload, code, message.decode()

    def call(self, method: str, payload: bytes = b"", **how: object) -> tuple[bytes, int, str]:
        """`ask` and `answer`."""
        return self.answer(self.ask(method, payload, **how))

    def registered(self, code: int = 0, message: str = "") -> tuple[str, str]:
        """Take the plugin's registration and answer it; returns name and index."""
        stream, kind, flags, data = self.frame(RUNTIME)
        assert (stream, kind, flags) == (1, REQUEST, 0)
        asked = fields(data)
        assert asked[1] + asked[2] == [b"nri.pkg.api.v1alpha1.Runtime", b"RegisterPlugin"]
        (payload,) = asked[3]
        assert isinstance(payload, bytes)
        name, index = fields(payload)[1][0], fields(payload)[2][0]
        status = field(1, code) + field(2, message) if code else b""
        self.send_frame(RUNTIME, 1, RESPONSE, 0, field(1, status))
        assert isinstance(name, bytes)
        assert isinstance(index, bytes)
        return name.decode(), index.decode()

    def begin(self, request_milliseconds: int = 2000) -> Engine:
        """Accept, take the registration, configure and synchronize with nothing."""
        self.accept().registered()
        configure = field(2, "stand-in") + field(3, "1.0") + field(4, 5000) + field(5, request_milliseconds)
        assert self.call("Configure", configure)[1] == 0
        assert self.call("Synchronize")[1] == 0
        return self

    def ended(self) -> bool:
        """Whether the plugin ended the connection, without a further byte."""
        assert self.trunk is not None
        try:
            return self._received == b"" and self.trunk.recv(1) == b""
        except ConnectionResetError:
            return True

    def _trunk_frame(self) -> tuple[int, bytes]:
        header = self._read(8)
        number, length = struct.unpack(">II", header)
        return number, self._read(length)

    def _read(self, length: int) -> bytes:
        assert self.trunk is not None
        while len(self._received) < length:
            data = self.trunk.recv(65536)
            assert data, "the plugin ended the connection"
            self._received += data
        found, self._received = self._received[:length], self._received[length:]
        return found
