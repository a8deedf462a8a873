"""A broker that lies: whatever bytes a test wants, over TLS on loopback, from a process of its own.

It listens until its block ends. What it was sent, it keeps: `requests` has the request lines with their bodies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.tls import TestAuthority

Reply = Callable[[str, bytes], Iterable[bytes]]
"""Path and body of a request, to what is sent, piece by piece; between the pieces it may sleep."""


def answer(body: bytes, status: str = "200 OK", headers: bytes = b"") -> bytes:
    """A well-formed answer."""
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status.encode(), len(body), headers, body)


class RogueBroker:
    """A context manager; `reply` is run in its process.

    Args:
        folder: For its certificate and what it keeps.
        reply: What it answers.
        authority: Who signs its certificate.
        host: The name in it.
        expired: Whether it has expired.
        newest: The newest version of TLS that it speaks; None: it speaks none, but plain HTTP.
    """

    def __init__(
        self,
        folder: Path,
        reply: Reply,
        *,
        authority: TestAuthority,
        host: str = "127.0.0.1",
        expired: bool = False,
        newest: ssl.TLSVersion | None = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        self._reply, self._kept = reply, folder / "requests"
        self._kept.write_bytes(b"")
        self._context: ssl.SSLContext | None = None
        if newest is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            if newest < ssl.TLSVersion.TLSv1_2:
                self._context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # old versions are what is asked for
                self._context.maximum_version = newest
            self._context.load_cert_chain(*authority.issue(folder, host=host, expired=expired))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pid = 0
        self.port = int(self._listener.getsockname()[1])
        self.address = f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> RogueBroker:
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._serve()
            finally:
                os._exit(1)
        self._listener.close()
        return self

    def __exit__(self, *exception: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    @property
    def requests(self) -> list[bytes]:
        """What it was sent: method, path and body of each request."""
        return self._kept.read_bytes().splitlines()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(OSError, ValueError), connection:
                connection.settimeout(30)
                if self._context is None:
                    connection.recv(65536)
                    connection.sendall(answer(b"this is not HTTPS", "400 Bad Request"))
                else:
                    with self._context.wrap_socket(connection, server_side=True) as secured:
                        self._converse(secured)

    def _converse(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while line := stream.readline(65536):
                method, path, _ = line.split(b" ", 2)
                length = 0
                while (header := stream.readline(65536)) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = stream.read(length)
                with self._kept.open("ab") as kept:
                    kept.write(b"%s %s %s\n" % (method, path, body))
                for piece in self._reply(path.decode(), body):
                    connection.sendall(piece)
                    time.sleep(0)
