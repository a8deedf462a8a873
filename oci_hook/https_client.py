"""One HTTPS connection to a server that the configuration names: TLS verified, nothing followed, answers bounded.

There is no way to turn verification off. The certificates of the caller's own authorities alone count, TLS 1.2 or
later; no redirect is followed, no proxy is taken from the environment, no key log is written. What a server says never
gets into a message, as it may say again what it was sent. A server that drips its bytes is the caller's to bound: call
this in a process with a deadline (`attestation.deadline`), which bounds the resolver as well.
Sources: RFC 9110 and 9112 (HTTP/1.1), RFC 9525 (names in certificates), RFC 5280.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from oci_hook.documents import shown
from oci_hook.errors import SczError

if TYPE_CHECKING:
    import http.client
    import ssl

ADDRESS = r"https://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(:[0-9]{1,5})?"
"""A server's address: no path, no user; a name, an IPv4 address or an IPv6 address in brackets."""
ADDRESS_AND_PATH = ADDRESS + r"(/[A-Za-z0-9._~/-]{0,255})?"
AUTHORITIES_LIMIT_BYTES = 256 << 10
_DEFAULT_PORT = 443


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: its name or address, its port, and the certificates (PEM) of the authorities that vouch for it."""

    host: str
    port: int
    authorities: bytes = field(repr=False)

    @property
    def address(self) -> str:
        """For messages."""
        return f"https://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: a status from 100 to 999, and the body, which is hostile and never shown."""

    status: int
    body: bytes = field(repr=False)


def parse_endpoint(address: str, authorities: bytes, *, error: type[SczError]) -> Endpoint:
    """Take an address apart.

    Args:
        address: `https://HOST[:PORT]`.
        authorities: Certificates in PEM, at most 256 KiB.
        error: What to raise.

    Raises:
        SczError: The class `error`: another form, or a port that is none.
    """
    if not re.fullmatch(ADDRESS, address):
        raise error(f"{shown(address)} is not https://HOST or https://HOST:PORT")
    host, _, port = address.removeprefix("https://").rpartition(":")
    if not host or port.endswith("]"):
        host, port = address.removeprefix("https://"), str(_DEFAULT_PORT)
    if not 0 < int(port) < 1 << 16:
        raise error(f"{shown(address)} has a port that is none")
    return Endpoint(host.strip("[]"), int(port), authorities)


class HttpsClient:
    """A connection; a context manager. It is opened with the first request and used for those that follow.

    Args:
        endpoint: Where to.
        what: What the server is, for messages.
        seconds: For each single wait for the server; the time as a whole is the caller's to bound.
        limit_bytes: A body that is larger is refused.
        error: What to raise when there is no answer that can be used.
    """

    def __init__(
        self, endpoint: Endpoint, *, what: str, seconds: float, limit_bytes: int, error: type[SczError]
    ) -> None:
        self._what = f"{what} at {endpoint.address}"
        self._limit_bytes = limit_bytes
        self._error = error
        self._connection = self._prepared(endpoint, seconds)

    def __enter__(self) -> HttpsClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def _prepared(self, endpoint: Endpoint, seconds: float) -> http.client.HTTPSConnection:
        import http.client
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies, and reads no SSLKEYLOGFILE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cadata=endpoint.authorities.decode("ascii"))
        except (ValueError, ssl.SSLError) as cause:
            raise self._error(
                f"the file with the authorities of {self._what} holds no certificates in PEM",
                remedy="write the certificate of the authority that signed the server's into it",
            ) from cause
        return http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=seconds, context=context)

    def close(self) -> None:
        """Close the connection; another request opens it anew."""
        self._connection.close()

    def connect(self) -> None:
        """Open the connection before there is anything to send.

        Raises:
            SczError: The class `error`: no such name, nobody there, a certificate that is not accepted.
        """
        self._guarded(self._connection.connect)

    def send(self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str]) -> Answer:
        """Make one request.

        Args:
            method: GET or POST.
            path: Absolute, of characters that need no escaping.
            body: JSON, or nothing.
            headers: Sent as they are; their values are printable ASCII.

        Raises:
            SczError: The class `error`: no answer, or one that is too large or not HTTP.
        """
        answers: list[Answer] = []

        def exchange() -> None:
            self._connection.request(method, path, body, {"Accept": "application/json", **headers})
            response = self._connection.getresponse()
            answers.append(Answer(response.status, response.read(self._limit_bytes + 1)))

        self._guarded(exchange)
        if len(answers[0].body) > self._limit_bytes:
            raise self._error(f"{self._what} answered with more than {self._limit_bytes} bytes")
        return answers[0]

    def _guarded(self, action: Callable[[], object]) -> None:
        """Do something with the connection; the messages of the libraries would repeat what the server said."""
        import http.client
        import ssl

        try:
            action()
        except ssl.SSLCertVerificationError as cause:
            raise self._error(
                f"the certificate of {self._what} is not accepted: {_verification(cause)}",
                remedy="look whether that is the right server; if so, correct its certificate or the file with its CA",
            ) from cause
        except ssl.SSLError as cause:
            raise self._error(f"no TLS connection with {self._what}: {cause.reason or 'it ended early'}") from cause
        except TimeoutError as cause:
            raise self._error(f"{self._what} did not answer in time") from cause
        except OSError as cause:
            raise self._error(f"{self._what} cannot be reached: {cause.strerror or type(cause).__name__}") from cause
        except (http.client.HTTPException, ValueError) as cause:
            raise self._error(f"{self._what} did not answer in HTTP ({type(cause).__name__})") from cause


def _verification(error: ssl.SSLCertVerificationError) -> str:
    """OpenSSL's words of its own, in which there are names of ours alone."""
    return str(error.verify_message)[:160]
