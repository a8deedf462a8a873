"""`attestation.keylime` and `remote_appraisal`: what is asked, and what a malicious verifier gains by its answers."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.keylime import LIMIT_BYTES, PATH, keylime_request, read_keylime_answer
from oci_hook.config import Config, parse_config
from oci_hook.errors import ConfigInvalid
from oci_hook.https_request import Server
from oci_hook.key_errors import AppraisalRefused, VerifierUnavailable
from oci_hook.remote_appraisal import ask_keylime, host_verifier, parse_ca
from tests.attestation_vectors import hostile, public_of, value_or_ours
from tests.kept import APPROVED, CONTAINER, Witness, make_witness
from tests.tls_servers import Authority, read_request, response, serving

GOOD = {"code": 200, "status": "Success", "results": {"valid": True, "claims": {}, "failures": []}}


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return make_witness(tmp_path_factory.mktemp("witness"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_the_request_has_every_quoted_pcr_and_the_parts_of_the_quote(witness: Witness) -> None:
    start = witness.start()
    extra, ak = start.qualifying_data(CONTAINER), public_of(witness.ak)
    document = json.loads(keylime_request(start.quote, ak=ak, extra_data=extra, reference=APPROVED))
    data = document["data"]
    assert (document["type"], data["hash_alg"]) == ("tpm", "sha256")
    assert base64.b64decode(data["nonce"]) == extra
    assert base64.b64decode(data["tpm_ak"]) == ak.marshalled
    assert data["quote"][0] == "r"
    attest, signature, _pcrs = (base64.b64decode(part) for part in data["quote"][1:].split(":"))
    assert (attest, signature) == (start.quote.attest, start.quote.signature)
    policy = json.loads(data["tpm_policy"])
    assert policy.pop("mask") == "0x390"
    assert policy == {str(pcr): [value.hex()] for pcr, value in APPROVED.items()}


@pytest.mark.parametrize("pcr", sorted(APPROVED))
def test_a_pcr_without_a_reference_value_is_not_asked_about(witness: Witness, pcr: int) -> None:
    quote, less = witness.start().quote, {k: v for k, v in APPROVED.items() if k != pcr}
    for reference in (less, {**APPROVED, 0: bytes(32)}):
        with pytest.raises(AppraisalRefused, match="other PCRs"):
            keylime_request(quote, ak=public_of(witness.ak), extra_data=bytes(32), reference=reference)


# --- answers ----------------------------------------------------------------------------------------------------------


def answer(**results: Any) -> bytes:
    return json.dumps({**GOOD, "results": {"valid": True, "claims": {}, "failures": [], **results}}).encode()


def test_only_a_plain_yes_is_one() -> None:
    read_keylime_answer(200, json.dumps(GOOD).encode())
    failure = {"type": "quote_validation.nonce\n", "context": {"message": "another\x1b[0m nonce"}}
    with pytest.raises(AppraisalRefused, match="quote_validation") as raised:
        read_keylime_answer(200, answer(valid=False, failures=[failure]))
    assert raised.value.message.isprintable()
    with pytest.raises(AppraisalRefused, match="no reason"):
        read_keylime_answer(200, answer(valid=False))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (201, json.dumps(GOOD).encode()),
        (400, json.dumps(GOOD).encode()),
        (500, b"{}"),
        (200, b""),
        (200, b"[]"),
        (200, json.dumps({**GOOD, "code": 400}).encode()),
        (200, json.dumps({**GOOD, "code": True}).encode()),
        (200, answer(valid="true")),
        (200, answer(valid=1)),
        (200, answer(valid=True, failures=[{"type": "x"}])),
        (200, answer(failures=None)),
        (200, answer(valid=False, failures=["x"])),
        (200, answer(valid=False, failures=[{"type": "x"}] * 257)),
        (200, answer().replace(b'"valid": true', b'"valid": false, "valid": true')),
        (200, b" " * (LIMIT_BYTES + 1)),
        (200, json.dumps({"code": 200, "results": {"failures": []}}).encode()),
    ],
)
def test_what_cannot_be_used_is_not_a_yes(status: int, body: bytes) -> None:
    with pytest.raises(VerifierUnavailable):
        read_keylime_answer(status, body)


@settings(max_examples=300, deadline=None)
@given(hostile(json.dumps(GOOD).encode()) | st.binary(max_size=50))
def test_fuzz_an_answer_is_a_plain_yes_or_refused(body: bytes) -> None:
    if value_or_ours(lambda data: read_keylime_answer(200, data) or True, body):
        found = json.loads(body)
        assert (found["code"], found["results"]["valid"], found["results"]["failures"]) == (200, True, [])


# --- the verifier as a server -----------------------------------------------------------------------------------------


def ask(witness: Witness, server: Server, timeout_seconds: float = 20) -> None:
    start = witness.start()
    ask_keylime(
        server,
        start.quote,
        ak=public_of(witness.ak),
        extra_data=start.qualifying_data(CONTAINER),
        reference=start.quote.pcrs,
        timeout_seconds=timeout_seconds,
    )


def saying(data: bytes, seen: list[bytes] | None = None) -> Callable[[ssl.SSLSocket], None]:
    def handle(connection: ssl.SSLSocket) -> None:
        question = read_request(connection)
        if seen is not None:
            seen.append(question)
        connection.sendall(data)

    return handle


def test_a_verifier_is_asked_and_believed(witness: Witness, authority: Authority) -> None:
    seen: list[bytes] = []
    with serving(authority.issue("127.0.0.1"), saying(response(answer()), seen)) as address:
        ask(witness, Server(address, authority.pem))
    assert seen[0].startswith(f"POST {PATH} HTTP/1.1\r\n".encode())
    with (
        serving(authority.issue("127.0.0.1"), saying(response(answer(valid=False)))) as address,
        pytest.raises(AppraisalRefused),
    ):
        ask(witness, Server(address, authority.pem))


@pytest.mark.parametrize(
    "data",
    [
        response(b"x" * (LIMIT_BYTES + 1)),
        response(answer(), "302 Found", "Location: https://127.0.0.1/\r\n"),
        response(answer(), "500 No"),
        response(answer())[:-1],
        b"",
    ],
)
def test_a_malicious_verifier_makes_nothing_start(witness: Witness, authority: Authority, data: bytes) -> None:
    with (
        serving(authority.issue("127.0.0.1"), saying(data)) as address,
        pytest.raises(VerifierUnavailable),
    ):
        ask(witness, Server(address, authority.pem))


def test_another_s_verifier_gets_no_evidence(witness: Witness, authority: Authority, tmp_path: Path) -> None:
    seen: list[bytes] = []
    other = Authority(tmp_path, "other")
    with (
        serving(other.issue("127.0.0.1"), saying(response(answer()), seen)) as address,
        pytest.raises(VerifierUnavailable, match="certificate"),
    ):
        ask(witness, Server(address, authority.pem))
    assert seen == []


# --- the host's configuration -----------------------------------------------------------------------------------------


def test_the_configuration_names_the_verifier(authority: Authority) -> None:
    mine = authority.issue(server=False, file="client")
    config = replace(Config(), keylime_address="https://127.0.0.1:1", keylime_ca_file=str(authority.file))
    assert host_verifier(config) == Server("https://127.0.0.1:1", authority.pem)
    with_client = replace(config, keylime_certificate=str(mine.certificate), keylime_key=str(mine.key))
    assert host_verifier(with_client).client_key == str(mine.key)
    for without in (Config(), replace(config, keylime_ca_file=""), replace(config, keylime_address="")):
        with pytest.raises(ConfigInvalid, match="names no verifier"):
            host_verifier(without)
    with pytest.raises(ConfigInvalid, match="belong together"):
        host_verifier(replace(config, keylime_key=str(mine.key)))
    for mode, message in ((0o644, "read or written by others"), (0o666, "writable by others")):
        mine.key.chmod(mode)
        with pytest.raises(ConfigInvalid, match=message):
            host_verifier(with_client)
    for address in (
        "https://user:word@v.example:8881",
        "https://v.example?x",
        "http://v.example",
        "https://v..example#f",
    ):
        with pytest.raises(ConfigInvalid, match="address"):
            parse_config(f'[keylime]\naddress = "{address}"\n'.encode())
    assert parse_config(b'[keylime]\naddress = "https://v.example:8881/path"\n').keylime_address.endswith("/path")
    with pytest.raises(ConfigInvalid):
        parse_ca(b"\xff")
