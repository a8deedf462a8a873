"""Several connections over one socket: NRI's multiplexer. Bytes in, bytes out; the socket is `connection`'s.

Each frame: connection id and length, big-endian 32 bits each, then so many bytes of that connection's stream. There is
no opening and no closing. docs/nri.md, "Frames of the socket"; NRI, pkg/net/multiplex.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from oci_hook.errors import EngineUnsupported
from oci_hook.nri.ttrpc import MAX_SENT_BYTES

#: The engine calls the plugin over the first one, the plugin the engine over the second.
PLUGIN_SERVICE, RUNTIME_SERVICE = 1, 2

#: Of a frame of a connection that is not known. No such one was ever seen: something else than NRI would begin so.
_MAX_UNKNOWN_BYTES = MAX_SENT_BYTES
_HEADER = struct.Struct(">II")
# The engine reads a connection through a buffer of this size; a first frame of a message that exceeds it ends the
# connection (ENOMEM). What follows it is read into memory of the message's own size.
_FIRST_BYTES = 4096


def frames(connection: int, message: bytes) -> bytes:
    """The frames of one whole message of a connection.

    Args:
        connection: Its id.
        message: Of any length; `ttrpc` bounds it.
    """
    parts = (message[:_FIRST_BYTES], message[_FIRST_BYTES:])
    return b"".join(_HEADER.pack(connection, len(part)) + part for part in parts if part)


class Demultiplexer:
    """Takes the socket's bytes apart, in whatever pieces they come; keeps a frame's header and nothing of its bytes."""

    def __init__(self) -> None:
        self._header = b""
        self._connection = self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Connection id and bytes of each frame, as far as they are here; of a frame in pieces, the pieces.

        Raises:
            EngineUnsupported: A frame of an unknown connection is long. Nothing may be fed afterwards.
        """
        place = 0
        while place < len(data):
            if self._left:
                piece = data[place : place + self._left]
                place += len(piece)
                self._left -= len(piece)
                yield self._connection, piece
                continue
            part = data[place : place + _HEADER.size - len(self._header)]
            place += len(part)
            self._header += part
            if len(self._header) < _HEADER.size:
                return
            self._connection, self._left = _HEADER.unpack(self._header)
            self._header = b""
            if self._connection not in (PLUGIN_SERVICE, RUNTIME_SERVICE) and self._left > _MAX_UNKNOWN_BYTES:
                raise EngineUnsupported(f"the engine's frame has {self._left} bytes: that is not NRI")
