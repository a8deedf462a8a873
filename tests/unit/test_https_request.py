"""`https_request` against real TLS servers that behave badly: whom it believes, how long it waits, what it takes."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook.errors import ConfigInvalid
from oci_hook.https_request import Answer, Server, request
from oci_hook.key_errors import VerifierUnavailable
from tests.tls_servers import Authority, listening, read_request, response, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def ask(server: Server, *, timeout_seconds: float = 20, limit_bytes: int = 1000) -> Answer:
    return request(
        server,
        "POST",
        "/ask",
        b"question",
        {"X-Test": "1"},
        timeout_seconds=timeout_seconds,
        limit_bytes=limit_bytes,
        error=VerifierUnavailable,
    )


def answering(data: bytes) -> Callable[[ssl.SSLSocket], None]:
    def handle(connection: ssl.SSLSocket) -> None:
        read_request(connection)
        connection.sendall(data)

    return handle


def refused(server: Server, match: str, *, timeout_seconds: float = 20, limit_bytes: int = 1000) -> None:
    with pytest.raises(VerifierUnavailable, match=match) as raised:
        ask(server, timeout_seconds=timeout_seconds, limit_bytes=limit_bytes)
    assert raised.value.message.isprintable()


def test_a_good_server_is_asked_once(authority: Authority) -> None:
    seen: list[bytes] = []

    def handle(connection: ssl.SSLSocket) -> None:
        seen.append(read_request(connection))
        connection.sendall(response(b"answer", "418 teapot"))

    with serving(authority.issue("127.0.0.1"), handle) as address:
        assert ask(Server(f"{address}/base/", authority.pem)) == Answer(418, b"answer")
    (question,) = seen
    assert question.startswith(b"POST /base/ask HTTP/1.1\r\n")
    assert b"\r\nX-Test: 1\r\n" in question
    assert question.endswith(b"\r\n\r\nquestion")


def test_the_environment_counts_for_nothing(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, keys = Authority(tmp_path, "other"), tmp_path / "keys"
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", str(other.file))
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    with serving(authority.issue("127.0.0.1"), answering(response(b"a"))) as address:
        assert ask(Server(address, authority.pem)).body == b"a"
    with serving(other.issue("127.0.0.1"), answering(response(b"a"))) as address:
        refused(Server(address, authority.pem), "certificate is not accepted")
    assert not keys.exists()


def test_a_certificate_of_another_kind_is_refused(authority: Authority) -> None:
    for issued, why in (
        (authority.issue("127.0.0.2", file="other-address"), "not valid for '127.0.0.1'"),
        (authority.issue("localhost", file="name"), "not valid for '127.0.0.1'"),
        (authority.issue(file="nameless"), "not valid for '127.0.0.1'"),
        (authority.issue("127.0.0.1", days=(-3, -2), file="old"), "expired"),
        (authority.issue("127.0.0.1", days=(2, 3), file="early"), "not yet valid"),
        (authority.issue("127.0.0.1", server=False, file="client-s"), "purpose"),
    ):
        seen: list[bytes] = []
        with serving(issued, lambda connection, seen=seen: seen.append(connection.recv(1))) as address:  # type: ignore[misc]
            refused(Server(address, authority.pem), why)
        assert b"".join(seen) == b""  # nothing was said to it


def test_a_client_s_certificate_is_shown_where_there_is_one(authority: Authority, tmp_path: Path) -> None:
    mine = authority.issue(server=False, file="client")
    with serving(authority.issue("127.0.0.1"), answering(response(b"a")), client_ca=authority.file) as address:
        server = Server(address, authority.pem, str(mine.certificate), str(mine.key))
        assert ask(server).body == b"a"
        refused(Server(address, authority.pem), "127.0.0.1")
        for certificate, key in ((mine.key, mine.key), (tmp_path / "none", mine.key)):
            with pytest.raises(ConfigInvalid):
                ask(Server(address, authority.pem, str(certificate), str(key)))


def test_a_redirect_is_not_followed(authority: Authority) -> None:
    seen: list[bytes] = []
    with serving(authority.issue("127.0.0.1"), lambda c: seen.append(read_request(c))) as elsewhere:
        for status in ("301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
            data = response(b"", status, f"Location: {elsewhere}/\r\n")
            with serving(authority.issue("127.0.0.1"), answering(data)) as address:
                refused(Server(address, authority.pem), "redirect")
    assert seen == []


def test_an_answer_that_is_too_long_is_not_taken(authority: Authority) -> None:
    endless = threading.Event()

    def flood(connection: ssl.SSLSocket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                connection.sendall(b"x" * 65536)
        except OSError:
            endless.set()

    with serving(authority.issue("127.0.0.1"), answering(response(b"x" * 1000))) as address:
        assert len(ask(Server(address, authority.pem)).body) == 1000
    with serving(authority.issue("127.0.0.1"), answering(response(b"x" * 1001))) as address:
        refused(Server(address, authority.pem), "longer than 1000 bytes")
    with serving(authority.issue("127.0.0.1"), flood) as address:
        refused(Server(address, authority.pem), "longer than 1000 bytes")
    assert endless.wait(20)  # the client hung up


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(authority: Authority, data: bytes) -> None:
    with serving(authority.issue("127.0.0.1"), answering(data)) as address:
        refused(Server(address, authority.pem), "127.0.0.1")


def dripping(head: bytes) -> Callable[[ssl.SSLSocket], None]:
    """Say the head, then a byte now and then, for as long as somebody listens."""

    def handle(connection: ssl.SSLSocket) -> None:
        read_request(connection)
        connection.sendall(head)
        pause = threading.Event()
        while True:
            connection.sendall(b"x")
            pause.wait(0.05)

    return handle


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
)
def test_a_slow_drip_ends_with_the_one_deadline(authority: Authority, head: bytes) -> None:
    with serving(authority.issue("127.0.0.1"), dripping(head)) as address:
        refused(Server(address, authority.pem), "no whole answer within 1 s", timeout_seconds=1)


def test_silence_ends_with_the_deadline_wherever_it_falls(authority: Authority) -> None:
    def silent(connection: socket.socket) -> None:
        while connection.recv(65536):  # until the client hangs up
            pass

    with listening(silent) as port:  # in the handshake
        refused(Server(f"https://127.0.0.1:{port}", authority.pem), "no whole answer", timeout_seconds=1)
    with serving(authority.issue("127.0.0.1"), silent) as address:
        refused(Server(address, authority.pem), "no whole answer", timeout_seconds=1)


def test_who_does_not_listen_or_speak_tls_is_said(authority: Authority) -> None:
    with listening(lambda _plain: None) as port:
        pass
    refused(Server(f"https://127.0.0.1:{port}", authority.pem), "refused")
    with listening(lambda plain: plain.sendall(response(b"in clear"))) as port:
        refused(Server(f"https://127.0.0.1:{port}", authority.pem), "127.0.0.1")
    refused(Server("https://no-such-host.invalid", authority.pem), "no-such-host.invalid")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "http://127.0.0.1",
        "https://",
        "https://user@host",
        "https://host:0",
        "https://host:65536",
        "https://host/?q",
        "https://host/#f",
        "https://host\r\nX: y",
        "https://ho st",
        "HTTPS://host",
        "https://host-",
        "https://host.example./path?q",
    ],
)
def test_an_address_of_another_form_is_refused(authority: Authority, address: str) -> None:
    with pytest.raises(ConfigInvalid):
        ask(Server(address, authority.pem))


@pytest.mark.parametrize("name", ["a..b", f"{'a' * 70}.example"])
def test_a_name_that_no_resolver_can_be_asked_for(authority: Authority, name: str) -> None:
    refused(Server(f"https://{name}", authority.pem), "UnicodeError")


@pytest.mark.parametrize("pem", ["", "none", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"])
def test_without_a_ca_nobody_is_asked(pem: str) -> None:
    with pytest.raises(ConfigInvalid):
        ask(Server("https://127.0.0.1:9", pem))
