"""TLS servers for the tests: a CA of one's own, certificates by it, and a server that does what a test says.

They listen on loopback, at a port that the kernel picks, in a thread that ends with the block.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_STEP_SECONDS = 30


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as files in PEM."""

    certificate: Path
    key: Path


class Authority:
    """A CA below `folder`; `pem` is its certificate."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder, self.name, self._key = folder, name, ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"a test's {name}")])
        self._certificate = self._sign(self._subject, self._key, ca=True, names=(), days=(-1, 1), server=True)
        self.pem = self._certificate.public_bytes(Encoding.PEM).decode()
        self.file = folder / f"{name}.pem"
        self.file.write_text(self.pem)

    def issue(self, *names: str, days: tuple[int, int] = (-1, 1), server: bool = True, file: str = "server") -> Issued:
        """A certificate for names and addresses; valid from and to, in days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file)])
        made = self._sign(subject, key, ca=False, names=names, days=days, server=server)
        issued = Issued(self.folder / f"{self.name}-{file}.pem", self.folder / f"{self.name}-{file}.key")
        issued.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        issued.key.chmod(0o600)
        return issued

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        ca: bool,
        names: tuple[str, ...],
        days: tuple[int, int],
        server: bool,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        start, end = (now + datetime.timedelta(days=number) for number in days)
        builder = x509.CertificateBuilder(self._subject, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(start).not_valid_after(end)
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        ).add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        if ca:
            flags = {name: name in ("key_cert_sign", "crl_sign") for name in _USAGES}
            builder = builder.add_extension(x509.KeyUsage(**flags), critical=True)
        else:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
        return builder.sign(self._key, hashes.SHA256())


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@contextlib.contextmanager
def serving(issued: Issued, handle: Callable[[ssl.SSLSocket], None], *, client_ca: Path | None = None) -> Iterator[str]:
    """A server that lets `handle` answer each connection, one after the other; the value is its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    with listening(lambda plain: _answer(context, plain, handle)) as port:
        yield f"https://127.0.0.1:{port}"


def _answer(context: ssl.SSLContext, plain: socket.socket, handle: Callable[[ssl.SSLSocket], None]) -> None:
    with context.wrap_socket(plain, server_side=True) as secure:
        handle(secure)


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server on loopback that lets `handle` have each connection; the value is its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(_STEP_SECONDS)
            with contextlib.suppress(OSError), plain:  # the client may hang up at any time
                handle(plain)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def read_request(connection: socket.socket) -> bytes:
    """The whole of a request with Content-Length, or without a body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def response(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A response with Content-Length."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body
