"""`broker`, `openbao` and `https_client` against a broker that lies; what a grant says of a share.

The far end is a process of the tests that sends what it wants. Whatever that is, there is one of two errors, soon, in
words of ours, and the container's token is in none of them. The real server: integration/test_broker_server.py.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.attestation.deadline import Standby
from oci_hook.broker import ContainerAtBroker
from oci_hook.bundle.broker_share import BrokerShare, parse_broker_share, share_context
from oci_hook.bundle.grant import (
    parse_grant,
    sign_grant,
    unwrap_content_key,
    verify_grant,
    wrap_content_key,
)
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.segments import ContentKey
from oci_hook.cli.checks.broker import check_broker
from oci_hook.config import Config
from oci_hook.documents import Fields
from oci_hook.errors import ConfigInvalid, DeviceInvalid, GrantInvalid, GrantRefused, KeyRefused, SczError
from oci_hook.https_client import Answer, parse_endpoint
from oci_hook.key_errors import BrokerRefused, BrokerUnavailable
from oci_hook.openbao import OpenBao
from tests.bundles import CREATED, FIELDS, MODEL, POLICY, make_grant, make_owner
from tests.rogue_broker import Reply, RogueBroker, answer
from tests.tls import TestAuthority
from tests.workshop import wait_until

KEYS = make_owner()
SECRET, SHARE, CONTENT_KEY = os.urandom(32), os.urandom(32), ContentKey(os.urandom(32))
MANIFEST = Manifest(MODEL, KEYS.owner.owner_id, CREATED, (), replace(POLICY, broker=True), FIELDS, "sha256:" + 64 * "a")
MEMBER = BrokerShare("vault:v1:" + 80 * "A", "models", "transit", "auth/jwt", "recommender")
GRANT = replace(
    make_grant(KEYS, MANIFEST, CONTENT_KEY, SECRET),
    wrapped_key=wrap_content_key(CONTENT_KEY, SECRET, MANIFEST.digest, bytes(12), SHARE),
    broker=MEMBER,
)
TOKEN = b"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ0aGUtY29udGFpbmVyIn0.c2lnbmF0dXJlLW9mLXRoZS1jb250YWluZXI"
LOGIN = answer(b'{"auth": {"client_token": "s.the-client-token", "num_uses": 1}}')
SECONDS = 10


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture(scope="module")
def ca_file(authority: TestAuthority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(authority.certificate)
    return path


def ask(address: str, ca_file: Path, seconds: int = SECONDS) -> bytes:
    config = Config(broker_address=address, broker_ca_file=str(ca_file), broker_timeout_seconds=seconds)
    request = ContainerAtBroker(config, TOKEN).begin(GRANT)
    assert request is not None
    with request:
        return request.result()


def refused(error: type[SczError], words: str, address: str, ca_file: Path, seconds: int = SECONDS) -> SczError:
    with pytest.raises(error, match=words) as caught:
        ask(address, ca_file, seconds)
    said = f"{caught.value.message} {caught.value.advice}"
    for secret in (TOKEN.decode(), TOKEN.decode().split(".")[2], "s.the-client-token", MEMBER.ciphertext):
        assert secret not in said
    assert said.isascii()
    assert "\n" not in said
    return caught.value


def plaintext(share: bytes) -> bytes:
    return answer(json.dumps({"data": {"plaintext": base64.b64encode(share).decode()}}).encode())


def after_login(decryption: bytes) -> Reply:
    return lambda path, _body: [LOGIN if path.endswith("/login") else decryption]


def forever(first: bytes, piece: bytes, seconds: float = 0.0) -> Reply:
    def pieces() -> Iterator[bytes]:
        yield first
        while True:
            time.sleep(seconds)
            yield piece

    return lambda _path, _body: pieces()


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_what_is_sent(authority: TestAuthority, ca_file: Path, tmp_path: Path) -> None:
    with RogueBroker(tmp_path, after_login(plaintext(SHARE)), authority=authority) as rogue:
        assert ask(rogue.address, ca_file) == SHARE
    context = base64.b64encode(share_context(KEYS.owner.owner_id, MODEL)).decode()
    login, decrypt = (line.split(b" ", 2) for line in rogue.requests)
    assert login[:2] == [b"POST", b"/v1/auth/jwt/login"]
    assert json.loads(login[2]) == {"role": "recommender", "jwt": TOKEN.decode()}
    assert decrypt[:2] == [b"POST", b"/v1/transit/decrypt/models"]
    assert json.loads(decrypt[2]) == {"ciphertext": MEMBER.ciphertext, "context": context}


def test_a_token_that_is_not_single_use_is_given_back_in_its_namespace(
    authority: TestAuthority, ca_file: Path, tmp_path: Path
) -> None:
    def reply(path: str, _body: bytes) -> list[bytes]:
        if path.endswith("/login"):
            return [answer(b'{"auth": {"client_token": "s.the-client-token", "num_uses": 0}}')]
        return [plaintext(SHARE) if "decrypt" in path else answer(b"oops", "500 No")]

    for auth, before in (("auth/jwt", b""), ("t/auth/k", b"t/"), ("myauth/auth/jwt", b"myauth/")):
        grant = replace(GRANT, broker=replace(MEMBER, auth=auth))
        with RogueBroker(tmp_path, reply, authority=authority) as rogue:
            config = Config(broker_address=rogue.address, broker_ca_file=str(ca_file))
            request = ContainerAtBroker(config, TOKEN).begin(grant)
            assert request is not None
            with request:
                assert request.result() == SHARE
        assert rogue.requests[-1].split()[1] == b"/v1/" + before + b"auth/token/revoke-self"


def test_the_environment_s_proxies_and_key_logs_are_not_used(
    authority: TestAuthority, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    with RogueBroker(tmp_path, after_login(plaintext(SHARE)), authority=authority) as rogue:
        assert ask(rogue.address, ca_file) == SHARE
    assert not (tmp_path / "keys").exists()


def test_a_wrong_share_opens_nothing(authority: TestAuthority, ca_file: Path, tmp_path: Path) -> None:
    with RogueBroker(tmp_path, after_login(plaintext(bytes(32))), authority=authority) as rogue:
        share = ask(rogue.address, ca_file)
    with pytest.raises(BrokerRefused, match="another one"):
        unwrap_content_key(GRANT.wrapped_key, SECRET, MANIFEST.digest, share)


# --- answers that cannot be used --------------------------------------------------------------------------------------

ECHO = json.dumps({"errors": [f"jwt {TOKEN.decode()} with {MEMBER.ciphertext} s.the-client-token\n"]}).encode()
BAD_DECRYPTIONS = {
    "31 bytes": plaintext(bytes(31)),
    "33 bytes": plaintext(bytes(33)),
    "no bytes": plaintext(b""),
    "not base64": answer(b'{"data": {"plaintext": "' + b"*" * 44 + b'"}}'),
    "a number": answer(b'{"data": {"plaintext": 7}}'),
    "null": answer(b'{"data": null}'),
    "another member": answer(b'{"auth": {"plaintext": ""}}'),
    "errors with 200": answer(ECHO),
    "duplicate keys": answer(b'{"data": {"plaintext": "a"}, "data": {"plaintext": "b"}}'),
    "duplicate keys below": answer(b'{"data": {"plaintext": "a", "plaintext": "b"}}'),
    "garbage": answer(b"\x00\xff" * 100),
    "HTML": answer(b"<html>captive portal</html>"),
    "a list": answer(b"[]"),
    "nothing": answer(b""),
    "NaN": answer(b'{"data": NaN}'),
    "deep": answer(b'{"data": ' + b"[" * 30000 + b"]" * 30000 + b"}"),
    "digits": answer(b'{"data": ' + b"9" * 5000 + b"}"),
    "a byte order mark": answer(b'\xef\xbb\xbf{"data": {}}'),
    "cut short": answer(b'{"data": {"plaintext": "aaaa"}}')[:-5] + b"",
    "too large": answer(b" " * 70000),
    "a length that is a lie": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b" " * 70000,
    "no length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    "a chunk without end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n" + b" " * 70000,
    "a chunk's size that is none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"z" * 100 + b"\r\n",
    "compressed": answer(b"\x1f\x8b" + b"\x00" * 50, headers=b"Content-Encoding: gzip\r\n"),
    "HTTP/0.9": b'{"data": {"plaintext": ""}}\r\n',
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "a line without end": b"HTTP/1.1 200 " + b"A" * 70000,
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "server error": answer(ECHO, "500 Internal"),
    "bad gateway": answer(b"", "502 Bad Gateway"),
    "too many": answer(ECHO, "429 Too Many"),
    "standby": answer(b"", "473 Standby"),
    "created": answer(plaintext(SHARE)[-60:], "201 Created"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a refusal that is none": answer(b"<html>no</html>", "403 Forbidden"),
}


@pytest.mark.parametrize("name", BAD_DECRYPTIONS)
def test_answers_that_cannot_be_used(authority: TestAuthority, ca_file: Path, tmp_path: Path, name: str) -> None:
    def reply(path: str, _body: bytes) -> Iterable[bytes]:
        yield LOGIN if path.endswith("/login") else BAD_DECRYPTIONS[name]
        if not path.endswith("/login"):
            raise ValueError("the connection ends here")

    with RogueBroker(tmp_path, reply, authority=authority) as rogue:
        refused(BrokerUnavailable, "broker", rogue.address, ca_file)
    with RogueBroker(tmp_path, lambda _path, _body: [BAD_DECRYPTIONS[name]], authority=authority) as rogue:
        refused(BrokerUnavailable, "broker", rogue.address, ca_file, seconds=2)  # the same at the login


@pytest.mark.parametrize("status", ["400 Bad Request", "401 No", "403 Forbidden", "404 Not Found"])
def test_a_refusal_that_repeats_the_token(authority: TestAuthority, ca_file: Path, tmp_path: Path, status: str) -> None:
    with RogueBroker(tmp_path, lambda _path, _body: [answer(ECHO, status)], authority=authority) as rogue:
        refused(BrokerRefused, f"HTTP {status[:3]}", rogue.address, ca_file)


@pytest.mark.parametrize("token", ["", "s.a b", "s.a\r\nX-Evil: 1", "s.\u00e9", "s" * 3000, None, 7, ["s"]])
def test_client_tokens_that_are_none(authority: TestAuthority, ca_file: Path, tmp_path: Path, token: object) -> None:
    login = answer(json.dumps({"auth": {"client_token": token, "num_uses": 1}}).encode())
    with RogueBroker(tmp_path, lambda _path, _body: [login], authority=authority) as rogue:
        refused(BrokerUnavailable, "client_token", rogue.address, ca_file)
    assert len(rogue.requests) == 1


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_not_followed(authority: TestAuthority, ca_file: Path, tmp_path: Path, status: str) -> None:
    folders = [tmp_path / name for name in ("near", "far")]
    for folder in folders:
        folder.mkdir()
    with RogueBroker(folders[1], after_login(plaintext(SHARE)), authority=authority) as far:
        elsewhere = answer(b"", status, b"Location: %s/v1/auth/jwt/login\r\n" % far.address.encode())
        with RogueBroker(folders[0], lambda _path, _body: [elsewhere], authority=authority) as near:
            refused(BrokerUnavailable, "not followed", near.address, ca_file)
        assert (len(near.requests), far.requests) == (1, [])


# --- slow, and never ending -------------------------------------------------------------------------------------------

SLOW = {
    "silent": forever(b"", b"", 0.05),
    "drips a status line": forever(b"H", b"T", 0.05),
    "drips headers": forever(b"HTTP/1.1 200 OK\r\n", b"A: b", 0.05),
    "drips a body": forever(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" ", 0.05),
    "continues for ever": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "drips small chunks": forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.05),
}


@pytest.mark.parametrize("name", SLOW)
def test_one_deadline_for_all_of_it(authority: TestAuthority, ca_file: Path, tmp_path: Path, name: str) -> None:
    with RogueBroker(tmp_path, SLOW[name], authority=authority) as rogue:
        refused(BrokerUnavailable, "within 1 s|in time", rogue.address, ca_file, seconds=1)


def test_a_share_that_was_given_outlives_a_server_that_hangs_when_the_token_is_given_back(
    authority: TestAuthority, ca_file: Path, tmp_path: Path
) -> None:
    def reply(path: str, body: bytes) -> Iterable[bytes]:
        if path.endswith("/login"):
            return [answer(b'{"auth": {"client_token": "s.the-client-token", "num_uses": 0}}')]
        return [plaintext(SHARE)] if "decrypt" in path else SLOW["drips a body"](path, body)

    with RogueBroker(tmp_path, reply, authority=authority) as rogue:
        assert ask(rogue.address, ca_file, seconds=4) == SHARE
        assert rogue.requests[-1].split()[1] == b"/v1/auth/token/revoke-self"


def test_the_broker_s_process_holds_no_pipe_of_the_tpm_s(
    authority: TestAuthority, ca_file: Path, tmp_path: Path
) -> None:
    def pipes(pid: int | str) -> set[str]:
        found = set()
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # the directory's own, or one that is closed meanwhile
                found.add(os.readlink(each))
        return {each for each in found if each.startswith("pipe:")}

    before = pipes("self")
    with (
        Standby(lambda: None, lambda request: request) as standby,
        RogueBroker(tmp_path, after_login(plaintext(SHARE)), authority=authority) as rogue,
    ):
        of_the_tpm = pipes("self") - before
        assert len(of_the_tpm) == 2
        config = Config(broker_address=rogue.address, broker_ca_file=str(ca_file), broker_timeout_seconds=SECONDS)
        request = ContainerAtBroker(config, TOKEN, standby).begin(GRANT)
        assert request is not None
        with request:
            pid = request._deadline._pid
            assert pid is not None
            wait_until(lambda: not pipes(pid) & of_the_tpm)
            assert standby.ask(b"still there", 10) == b"still there"
            assert request.result() == SHARE


def test_chunks_without_end_are_too_large(authority: TestAuthority, ca_file: Path, tmp_path: Path) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    endless = forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk)
    with RogueBroker(tmp_path, endless, authority=authority) as rogue:
        refused(BrokerUnavailable, "more than 65536 bytes", rogue.address, ca_file)


def test_who_does_not_finish_a_handshake(authority: TestAuthority, ca_file: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, and nobody answers
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        refused(BrokerUnavailable, "within 1 s|in time", address, ca_file, seconds=1)


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"host": "localhost"}, "is not accepted"),
        ({"host": "127.0.0.2"}, "is not accepted"),
        ({"expired": True}, "expired"),
        ({"authority": TestAuthority()}, "is not accepted"),
        ({"newest": ssl.TLSVersion.TLSv1_1}, "no TLS connection"),
        ({"newest": ssl.TLSVersion.TLSv1}, "no TLS connection"),
        ({"newest": None}, "no TLS connection"),
    ],
)
def test_connections_that_are_not_made(
    authority: TestAuthority, ca_file: Path, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    with RogueBroker(tmp_path, after_login(plaintext(SHARE)), **{"authority": authority, **how}) as rogue:
        refused(BrokerUnavailable, words, rogue.address, ca_file)
        config = Config(broker_address=rogue.address, broker_ca_file=str(ca_file))
        (line,) = check_broker(config)
    assert rogue.requests == []  # no token either: it is sent after the handshake
    assert line.status == "fail"


def test_tls_1_2_is_enough(authority: TestAuthority, ca_file: Path, tmp_path: Path) -> None:
    newest = ssl.TLSVersion.TLSv1_2
    with RogueBroker(tmp_path, after_login(plaintext(SHARE)), authority=authority, newest=newest) as rogue:
        assert ask(rogue.address, ca_file) == SHARE


@given(st.binary(max_size=200), st.sampled_from([200, 400, 403, 404, 301, 503, 999]))
def test_any_answer(body: bytes, status: int) -> None:
    class Client:
        def send(self, *_words: object, **_more: object) -> Answer:
            return Answer(status, body)

    with pytest.raises((BrokerRefused, BrokerUnavailable)):
        OpenBao(Client()).decrypt("transit", "k", "c", b"", "t")  # type: ignore[arg-type]


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("https://a", "a", 443),
        ("https://broker.example:8200", "broker.example", 8200),
        ("https://127.0.0.1:1", "127.0.0.1", 1),
        ("https://[::1]", "::1", 443),
        ("https://[2001:db8::1]:65535", "2001:db8::1", 65535),
    ],
)
def test_addresses(address: str, host: str, port: int) -> None:
    endpoint = parse_endpoint(address, b"", error=ConfigInvalid)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert endpoint.address.startswith(address)


@pytest.mark.parametrize(
    "address",
    [
        *("", "https://", "http://a", "HTTPS://a", "a", "https://a:0", "https://a:65536", "https://a:x", "https://a/"),
        *("https://u@a", "https://u:p@a", "https://a?b", "https://a#b", "https://a b", "https://a\r\nb"),
        *("https://[::1", "https://::1", "https://-a", "https://a-", "https://" + "a" * 300),
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigInvalid):
        parse_endpoint(address, b"", error=ConfigInvalid)


# --- a grant's member -------------------------------------------------------------------------------------------------


def test_a_grant_with_a_share_is_signed_and_read() -> None:
    unverified = parse_grant(sign_grant(GRANT, key=KEYS.manifest_key))
    assert verify_grant(unverified, owner=KEYS.owner, manifest=MANIFEST) == GRANT
    assert unwrap_content_key(GRANT.wrapped_key, SECRET, MANIFEST.digest, SHARE).value == CONTENT_KEY.value
    assert MEMBER.ciphertext not in repr(GRANT)


def test_a_share_without_the_policy_or_the_policy_without_a_share_is_refused() -> None:
    pairs = ((GRANT, replace(MANIFEST, access=POLICY), "has a"), (replace(GRANT, broker=None), MANIFEST, "has no"))
    for grant, manifest, words in pairs:
        unverified = parse_grant(sign_grant(grant, key=KEYS.manifest_key))
        with pytest.raises(GrantRefused, match=words):
            verify_grant(unverified, owner=KEYS.owner, manifest=manifest)


def test_no_share_is_enough_by_itself() -> None:
    for secret, share in ((SECRET, None), (SHARE, None), (SECRET, bytes(32)), (bytes(32), SHARE), (SHARE, SECRET)):
        with pytest.raises((KeyRefused, BrokerRefused)):
            unwrap_content_key(GRANT.wrapped_key, secret, MANIFEST.digest, share)
    plain = wrap_content_key(CONTENT_KEY, SECRET, MANIFEST.digest, bytes(12))
    for share in (SHARE, bytes(32)):
        with pytest.raises(BrokerRefused):
            unwrap_content_key(plain, SECRET, MANIFEST.digest, share)
    for length in (0, 31, 33):
        with pytest.raises(KeyRefused):
            unwrap_content_key(GRANT.wrapped_key, SECRET, MANIFEST.digest, bytes(length))
        with pytest.raises(ValueError):
            wrap_content_key(CONTENT_KEY, SECRET, MANIFEST.digest, bytes(12), bytes(length))


def test_the_wrapping_is_the_specification_s() -> None:
    """Done by hand, from docs/specification.md."""
    info = b"scz-smm/grant/v1 tpm+broker\0" + MANIFEST.digest.encode()
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(SECRET + SHARE)
    assert GRANT.wrapped_key == bytes(12) + AESGCM(key).encrypt(bytes(12), CONTENT_KEY.value, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"ciphertext": "vault:v0:" + 80 * "A"},
        {"ciphertext": "vault:v1:"},
        {"ciphertext": "vault:v1:" + 80 * "A" + "\n"},
        {"ciphertext": "vault:v1:" + 2000 * "A"},
        {"key": ""},
        {"key": "a/b"},
        {"key": ".."},
        {"key": "a?b"},
        {"key": "%2e"},
        {"mount": "/transit"},
        {"mount": "transit/"},
        {"mount": "a/../b"},
        {"mount": "a//b"},
        {"mount": "/".join("abcdefghi")},
        {"auth": "jwt"},
        {"auth": "auth"},
        {"auth": "auth/../sys"},
        {"auth": "auth/jwt?x"},
        {"role": "a b"},
        {"role": ""},
        {"role": "r" * 65},
    ],
)
def test_members_that_no_owner_signs(changes: dict[str, str]) -> None:
    with pytest.raises(DeviceInvalid):
        sign_grant(replace(GRANT, broker=replace(MEMBER, **changes)), key=KEYS.manifest_key)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: {**document, "more": 1},
        lambda document: {**document, "kind": "kv"},
        lambda document: {**document, "share": 7},
        *(lambda document, name=name: {k: v for k, v in document.items() if k != name} for name in MEMBER.document()),
    ],
)
def test_members_that_no_host_reads(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def read(document: dict[str, Any]) -> BrokerShare:
        return parse_broker_share(Fields(document, what="grant: broker", error=GrantInvalid))

    assert read(MEMBER.document()) == MEMBER
    with pytest.raises(GrantInvalid):
        read(change(MEMBER.document()))
