"""ttrpc's frames and its two messages, as far as calls with one request and one response go. Bytes in, bytes out.

Each frame: length, stream id (big-endian 32 bits each), type, flags, then so many bytes. NRI has no streams of data, so
a frame of data is refused by the caller. docs/nri.md, "Frames of a connection"; ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from oci_hook.errors import EngineUnsupported
from oci_hook.nri.schema import Schema

#: What ttrpc allows, and what is sent at most.
MAX_SENT_BYTES = 4 << 20
#: What is received at most: engines with NRI before 0.8 do not check what they send, and a container of megabytes, or a
#: list of all of them, must not be the end of the connection.
MAX_RECEIVED_BYTES = 64 << 20
#: So much of the data of a longer one is kept: what it is about stands there.
_BEGINNING_BYTES = 256
_HEADER = struct.Struct(">IIBB")
#: Flag of a request that more data of the same stream will follow.
REMOTE_OPEN = 0x2

# google.rpc.Status is a status's published form; it stands here under a name of its own.
_SCHEMA = Schema(
    "ttrpc",
    {
        "Request": "service=1 method=2 payload=3:bytes timeout_nano=4:int64",
        "Response": "status=1:Status payload=2:bytes",
        "Status": "code=1:int32 message=2",
    },
)


class Kind(enum.IntEnum):
    """Types of frames; others are for later versions and skipped."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


class Code(enum.IntEnum):
    """Those of gRPC's status codes that are used here.

    4, deadline exceeded, is not: an engine could take it for its own. 12 makes newer engines fall back to older calls.
    """

    OK = 0
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; the type is a `Kind` or a number that a later version knows.

    Attributes:
        skipped_bytes: How long its data was, if that was too long: `data` is only its beginning then.
    """

    stream: int
    kind: int
    flags: int
    data: bytes
    skipped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A call: `timeout_seconds` is what its caller still waits, None without a limit."""

    service: str
    method: str
    payload: bytes
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: `code` 0 for success; a message for people else."""

    payload: bytes = b""
    code: int = Code.OK
    message: str = ""


def encode_frame(frame: Frame) -> bytes:
    """A frame's bytes.

    Raises:
        EngineUnsupported: Its data is longer than ttrpc allows.
    """
    if len(frame.data) > MAX_SENT_BYTES:
        raise EngineUnsupported(f"a message of {len(frame.data)} bytes is longer than ttrpc allows")
    return _HEADER.pack(len(frame.data), frame.stream, frame.kind, frame.flags) + frame.data


class FrameReader:
    """Takes a connection's bytes apart, in whatever pieces they come; keeps at most one frame.

    Args:
        limit_bytes: So much data a frame may have; that of a longer one is thrown away as it comes.
    """

    def __init__(self, limit_bytes: int = MAX_RECEIVED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept = bytearray()
        self._too_long: Frame | None = None
        self._to_skip = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Each frame that is complete now; one that was too long has `skipped_bytes`."""
        self._kept += data
        while True:
            if self._too_long is not None:
                skipped = min(self._to_skip, len(self._kept))
                del self._kept[:skipped]
                self._to_skip -= skipped
                if self._to_skip:
                    return
                yield self._too_long
                self._too_long = None
            if len(self._kept) < _HEADER.size:
                return
            length, stream, kind, flags = _HEADER.unpack_from(self._kept)
            is_too_long = length > self._limit_bytes
            end = _HEADER.size + (min(length, _BEGINNING_BYTES) if is_too_long else length)
            if len(self._kept) < end:
                return
            with memoryview(self._kept) as view:
                frame = Frame(stream, kind, flags, bytes(view[_HEADER.size : end]), length if is_too_long else 0)
            del self._kept[:end]
            if is_too_long:
                self._too_long, self._to_skip = frame, _HEADER.size + length - end
            else:
                yield frame


def parse_request(data: bytes) -> Request:
    """A Request.

    Raises:
        EngineUnsupported: It is malformed.
    """
    found = _SCHEMA.parse("Request", data)
    seconds = found.timeout_nano / 1e9 if found.timeout_nano else None
    return Request(found.service, found.method, found.payload, seconds)


def encode_request(request: Request) -> bytes:
    """A Request's bytes."""
    nanoseconds = None if request.timeout_seconds is None else int(request.timeout_seconds * 1e9)
    fields = {"service": request.service, "method": request.method, "payload": request.payload}
    data: bytes = _SCHEMA.new("Request", timeout_nano=nanoseconds, **fields).SerializeToString()
    return data


def parse_response(data: bytes) -> Response:
    """A Response.

    Raises:
        EngineUnsupported: It is malformed.
    """
    found = _SCHEMA.parse("Response", data)
    return Response(found.payload, found.status.code, found.status.message)


def encode_response(response: Response) -> bytes:
    """A Response's bytes. A status is there on success too, as the published servers send it."""
    status = _SCHEMA.new("Status", code=int(response.code), message=response.message)
    data: bytes = _SCHEMA.new("Response", status=status, payload=response.payload).SerializeToString()
    return data
