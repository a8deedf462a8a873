"""One HTTPS request to a server that root or the appraiser names: bounded in time and size, and no more than that.

TLS is always verified, against the CA that is given and no other: neither the system's store nor any environment
variable counts. One deadline holds from the name's look-up to the last byte, however slowly they drip. Redirects are
not followed, proxies not used, nothing is tried again. Standard library only; RFC 9110, 9112, 6125.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final

from oci_hook.documents import shown
from oci_hook.errors import ConfigInvalid, SczError
from oci_hook.https_client import ADDRESS_AND_PATH

_ADDRESS: Final = re.compile(ADDRESS_AND_PATH)


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and whom to believe.

    Attributes:
        address: `https://host[:port][/path]`.
        ca_pem: PEM of the CA certificates of which one must have issued the server's.
        client_certificate, client_key: Paths of PEM files, if the server asks for a certificate.
    """

    address: str
    ca_pem: str = field(repr=False)
    client_certificate: str | None = None
    client_key: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status, and the whole body."""

    status: int
    body: bytes


def request(
    server: Server,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    timeout_seconds: float,
    limit_bytes: int,
    error: type[SczError],
) -> Answer:
    """Ask once.

    Args:
        server: Whom.
        method, path, body, headers: Of the request; the path goes behind that of the address.
        timeout_seconds: For everything together.
        limit_bytes: A longer body is refused.
        error: What to raise where there is no usable answer.

    Raises:
        ConfigInvalid: The address, the CA or the client's certificate cannot be used.
        SczError: The class `error`: not reached, not in time, another's certificate, too long, a redirect, no HTTP.
    """
    host, port, base = _parts(server.address)
    context = _context(server, time.monotonic() + timeout_seconds)
    try:
        with _connected(context, host, port) as connected:
            connection = http.client.HTTPConnection(host, port)
            connection.sock = connected
            connection.request(method, base + path, body, {**headers, "Connection": "close"})
            # An answer that was not read to its end holds the socket open.
            with closing(connection.getresponse()) as answer:
                status, data, left = answer.status, answer.read(limit_bytes + 1), answer.length
    except ssl.SSLCertVerificationError as cause:
        raise error(f"{server.address}: its certificate is not accepted: {cause.verify_message}") from cause
    except TimeoutError as cause:
        raise error(f"{server.address}: no whole answer within {timeout_seconds:g} s") from cause
    except (OSError, http.client.HTTPException, ValueError) as cause:
        raise error(f"{server.address}: {shown(f'{type(cause).__name__}: {cause}', 160)}") from cause
    if len(data) > limit_bytes:
        raise error(f"{server.address}: the answer is longer than {limit_bytes} bytes")
    if left:  # http.client gives what came, if it is less than Content-Length
        raise error(f"{server.address}: the answer ends too early")
    if 300 <= status < 400:
        raise error(f"{server.address}: a redirect ({status}), which is not followed")
    return Answer(status, data)


def _parts(address: str) -> tuple[str, int, str]:
    found = _ADDRESS.fullmatch(address)
    port = int(found[2][1:]) if found is not None and found[2] else 443
    if found is None or not 0 < port < 1 << 16:
        raise ConfigInvalid(f"{shown(address)} is not an address https://HOST[:PORT][/PATH]")
    return found[1].strip("[]"), port, (found[3] or "").rstrip("/")


class _DeadlineSocket(ssl.SSLSocket):
    """Gives each call what is left of one deadline: a server that sends a byte now and then gains nothing."""

    deadline = 0.0

    def _left(self) -> None:
        self.settimeout(_left(self.deadline))

    def do_handshake(self, block: bool = False) -> None:
        self._left()
        super().do_handshake(block)

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self._left()
        return super().recv_into(buffer, nbytes, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        self._left()
        return super().send(data, flags)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _context(server: Server, deadline: float) -> ssl.SSLContext:
    # Not create_default_context: it takes the system's CAs, and writes keys where SSLKEYLOGFILE says.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = type("_Socket", (_DeadlineSocket,), {"deadline": deadline})
    try:
        context.load_verify_locations(cadata=server.ca_pem)
        if server.client_certificate is not None:
            # A password would be asked for on the terminal.
            context.load_cert_chain(server.client_certificate, server.client_key, password=lambda: b"")
    except (OSError, ValueError) as cause:
        raise ConfigInvalid(f"{server.address}: the CA or the client's certificate cannot be used: {cause}") from cause
    return context


def _connected(context: ssl.SSLContext, host: str, port: int) -> ssl.SSLSocket:
    deadline: float = getattr(context.sslsocket_class, "deadline", 0.0)
    trouble: OSError = TimeoutError()
    for family, kind, protocol, _, address in _looked_up(host, port, deadline):
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(_left(deadline))
            plain.connect(address)
            # An end without TLS's own word for it may be anybody's who can cut the line.
            return context.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
        except ssl.SSLError:
            plain.close()
            raise
        except OSError as cause:
            plain.close()
            trouble = cause
    raise trouble


def _looked_up(host: str, port: int, deadline: float) -> list[Any]:
    """The addresses of a name; the C library's look-up cannot be given a deadline, so it is left behind at ours."""
    found: list[list[Any]] = []
    troubles: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as cause:  # the other: a name that IDNA cannot write
            troubles.append(cause)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if troubles:
        raise troubles[0]
    if not found:
        raise TimeoutError
    return found[0]
