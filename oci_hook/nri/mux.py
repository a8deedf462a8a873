"""Several connections over one socket: NRI's multiplexer. Bytes in, bytes out; the socket is `connection`'s.

Each frame: connection id and length, big-endian 32 bits each, then so many bytes of that connection's stream. There is
no opening and no closing. docs/nri.md, "Frames of the socket"; NRI, pkg/net/multiplex.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from oci_hook.errors import EngineUnsupported
from oci_hook.nri.ttrpc import MAX_MESSAGE_BYTES

#: The engine calls the plugin over the first one, the plugin the engine over the second.
PLUGIN_SERVICE, RUNTIME_SERVICE = 1, 2

MAX_PAYLOAD_BYTES = MAX_MESSAGE_BYTES
_HEADER = struct.Struct(">II")
# The engine reads a connection through a buffer of this size; a first frame of a message that exceeds it ends the
# connection (ENOMEM). What follows it is read into memory of the message's own size.
_FIRST_BYTES = 4096


def frames(connection: int, message: bytes) -> bytes:
    """The frames of one whole message of a connection.

    Args:
        connection: Its id.
        message: At most `MAX_PAYLOAD_BYTES`.
    """
    parts = (message[:_FIRST_BYTES], message[_FIRST_BYTES:])
    return b"".join(_HEADER.pack(connection, len(part)) + part for part in parts if part)


class Demultiplexer:
    """Takes the socket's bytes apart, in whatever pieces they come; keeps at most one frame."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Connection id and bytes of each frame that is complete now.

        Raises:
            EngineUnsupported: A frame is longer than a message can be. Nothing may be fed afterwards.
        """
        self._kept += data
        while len(self._kept) >= _HEADER.size:
            connection, length = _HEADER.unpack_from(self._kept)
            if length > MAX_PAYLOAD_BYTES:
                raise EngineUnsupported(f"the engine's frame has {length} bytes: that is not NRI")
            end = _HEADER.size + length
            if len(self._kept) < end:
                return
            payload = bytes(self._kept[_HEADER.size : end])
            del self._kept[:end]
            yield connection, payload
