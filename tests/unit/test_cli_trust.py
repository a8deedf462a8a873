"""`sczctl trust` and `sczctl token`: whom a host believes changes only when it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import AcceptedIdentity, AccessPolicy
from oci_hook.errors import FileUnreadable, KeyInvalid, OutputExists, TrustInvalid
from oci_hook.identity.token import verify_token
from oci_hook.jws import public_jwk
from oci_hook.trust import parse_issuer
from oci_hook.trust_folder import Trust
from tests.commands import Household, done, misused, refused, snapshot

ISSUER = "https://kubernetes.default.svc"


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


def trusted(house: Household) -> Trust:
    return Trust(str(house.host / "trust"))


# --- owners -----------------------------------------------------------------------------------------------------------


def test_an_owner_is_trusted_by_the_file_that_it_published(house: Household) -> None:
    before = snapshot(house.host)
    tried = done(house.ctl("trust", "add", "owner", "--dry-run", house.keys / "owner.json"))
    assert tried.out.startswith(f"would trust owner acme ({house.owner.owner_id}) in ")
    assert snapshot(house.host) == before
    told = done(house.ctl("trust", "add", "owner", house.keys / "owner.json"))
    assert house.owner.owner_id in told.out
    assert trusted(house).owners() == (house.owner,)
    assert (house.host / "trust" / "owners" / "acme.json").stat().st_mode & 0o777 == 0o644
    done(house.ctl("trust", "add", "owner", house.keys / "owner.json"))  # again: nothing changes


def test_a_trusted_name_does_not_change_its_keys_unasked(house: Household, tmp_path: Path) -> None:
    house.trust()
    other = Household(tmp_path / "other")  # also called acme
    mixed = json.loads((house.keys / "owner.json").read_text())
    mixed["boot_policy_key"] = json.loads((other.keys / "owner.json").read_text())["boot_policy_key"]
    (house.usb / "mixed.json").write_text(json.dumps(mixed))  # the same id, another boot-policy key
    before = snapshot(house.host)
    for path in (other.keys / "owner.json", house.usb / "mixed.json"):
        refused(house.ctl("trust", "add", "owner", path), OutputExists.code, house.owner.owner_id, "--replace")
        refused(house.ctl("trust", "add", "owner", "--dry-run", path), OutputExists.code)
        assert snapshot(house.host) == before
    done(house.ctl("trust", "add", "owner", "--replace", "--dry-run", other.keys / "owner.json"))
    assert snapshot(house.host) == before
    done(house.ctl("trust", "add", "owner", "--replace", other.keys / "owner.json"))
    assert trusted(house).owners() == (other.owner,)


def test_a_damaged_file_is_mended_by_adding_it_again(house: Household) -> None:
    house.trust()
    (house.host / "trust" / "owners" / "acme.json").write_bytes(b"?")
    refused(house.ctl("trust", "list"), TrustInvalid.code, "owners/acme.json", "sczctl trust rm owner acme")
    house.trust()
    assert trusted(house).owners() == (house.owner,)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/x"},
        {"name": "a/b"},
        {"name": ".hidden"},
        {"name": ""},
        {"name": "Acme"},
        {"schema": "scz-smm/owner/v2"},
        {"extra": 1},
        {"manifest_key": {}},
        {"recovery_key": None},
    ],
)
def test_a_malformed_owner_is_not_trusted(house: Household, change: dict[str, Any]) -> None:
    document = json.loads((house.keys / "owner.json").read_text())
    (house.usb / "owner.json").write_text(json.dumps({**document, **change}))
    before = snapshot(house.host)
    refused(house.ctl("trust", "add", "owner", house.usb / "owner.json"), TrustInvalid.code)
    refused(house.ctl("trust", "add", "owner", "--replace", house.usb / "owner.json"), TrustInvalid.code)
    assert snapshot(house.host) == before


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"x" * (2 << 20), b'{"a":1,"a":2}', b"\xff"])
def test_what_is_no_document_is_not_trusted(house: Household, contents: bytes) -> None:
    (house.usb / "x").write_bytes(contents)
    before = snapshot(house.host)
    refused(house.ctl("trust", "add", "owner", house.usb / "x"), TrustInvalid.code)
    refused(house.ctl("trust", "add", "issuer", house.usb / "x"), TrustInvalid.code)
    refused(house.ctl("trust", "add", "owner", house.usb / "absent"), FileUnreadable.code)
    assert snapshot(house.host) == before


# --- issuers ----------------------------------------------------------------------------------------------------------


def jwks(house: Household, *keys: dict[str, Any], **more: Any) -> Path:
    path = house.usb / "jwks.json"
    path.write_text(json.dumps({"keys": list(keys), **more}))
    return path


def new_jwk(kid: str = "k1") -> dict[str, Any]:
    return {**public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()), "kid": kid, "use": "sig"}


def plain(path: Path, *, name: str = "cluster", issuer: str = ISSUER, kind: str = "kubernetes") -> list[str | Path]:
    return ["trust", "add", "issuer", path, "--name", name, "--issuer", issuer, "--type", kind]


def test_a_plain_jwk_set_becomes_an_issuer(house: Household) -> None:
    path = jwks(house, new_jwk(), sequence=7)  # members that are not known do not matter (RFC 7517, section 5)
    before = snapshot(house.host)
    assert done(house.ctl(*plain(path), "--dry-run")).out.startswith("would trust issuer cluster (")
    assert snapshot(house.host) == before
    assert "1 keys" in done(house.ctl(*plain(path))).out
    (issuer,) = trusted(house).issuers()
    assert (issuer.name, issuer.issuer, issuer.kind, len(issuer.keys)) == ("cluster", ISSUER, "kubernetes", 1)
    shown = done(house.ctl("trust", "list", "--json")).json
    assert shown["issuers"] == [
        {"name": "cluster", "issuer": ISSUER, "type": "kubernetes", "keys": [issuer.keys[0].thumbprint]}
    ]
    assert "cluster" in done(house.ctl("trust", "list")).out


def test_an_issuer_s_keys_are_renewed_and_its_meaning_is_not(house: Household) -> None:
    done(house.ctl(*plain(jwks(house, new_jwk("old")))))
    done(house.ctl(*plain(jwks(house, new_jwk("old"), new_jwk("new")))))
    assert [key.kid for key in trusted(house).issuers()[0].keys] == ["old", "new"]
    before = snapshot(house.host)
    for words in (plain(jwks(house, new_jwk()), issuer="https://evil"), plain(jwks(house, new_jwk()), kind="oidc")):
        refused(house.ctl(*words), OutputExists.code, ISSUER, "--replace")
        assert snapshot(house.host) == before
    done(house.ctl(*plain(jwks(house, new_jwk()), issuer="https://other"), "--replace"))
    assert trusted(house).issuers()[0].issuer == "https://other"


def test_options_that_do_not_fit_the_file(house: Household) -> None:
    path = jwks(house, new_jwk())
    before = snapshot(house.host)
    misused(house.ctl("trust", "add", "issuer", path), "plain JWK set", "--name, --issuer and --type")
    for words in (["--name", "x"], ["--issuer", "x"], ["--type", "oidc"], ["--name", "x", "--issuer", "y"]):
        misused(house.ctl("trust", "add", "issuer", path, *words), "go together")
    misused(house.ctl(*plain(path, name="a/b")), "--name", "is not a name")
    misused(house.ctl(*plain(path, name="../x")), "--name")
    misused(house.ctl(*plain(path, kind="saml")), "--type")
    (house.usb / "issuer.json").write_text(json.dumps({"schema": "scz-smm/issuer/v1", "jwks": {"keys": []}}))
    misused(house.ctl(*plain(house.usb / "issuer.json")), "issuer's file")
    assert snapshot(house.host) == before


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [{}],
        [{"kty": "oct", "k": "c2VjcmV0"}],
        [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}],
        [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}],
        "x",
        None,
    ],
)
def test_a_jwk_set_that_cannot_be_used(house: Household, keys: Any) -> None:
    (house.usb / "jwks.json").write_text(json.dumps({"keys": keys}))
    before = snapshot(house.host)
    refused(house.ctl(*plain(house.usb / "jwks.json")), TrustInvalid.code)
    assert snapshot(house.host) == before


def test_a_jwk_set_with_a_private_key_is_not_kept(house: Household) -> None:
    number = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
    path = jwks(house, {**new_jwk(), "d": f"{number:064x}"})
    before = snapshot(house.host)
    refused(house.ctl(*plain(path)), TrustInvalid.code)
    assert snapshot(house.host) == before


def test_an_issuer_name_that_would_forge_a_line(house: Household) -> None:
    before = snapshot(house.host)
    refused(house.ctl(*plain(jwks(house, new_jwk()), issuer="https://x\nowner acme")), TrustInvalid.code)
    assert snapshot(house.host) == before


# --- list, rm ---------------------------------------------------------------------------------------------------------


def test_nobody_is_trusted_at_first(house: Household) -> None:
    shown = done(house.ctl("trust", "list"))
    assert (shown.out, shown.err) == ("", "nobody is trusted yet\n")
    assert done(house.ctl("trust", "list", "--json")).json == {"owners": [], "issuers": []}
    assert not (house.host / "trust").exists()


def test_trust_ends_when_it_is_removed(house: Household) -> None:
    house.trust()
    done(house.ctl(*plain(jwks(house, new_jwk()))))
    before = snapshot(house.host)
    assert done(house.ctl("trust", "rm", "--dry-run", "owner", "acme")).out == "would remove owner acme\n"
    assert snapshot(house.host) == before
    done(house.ctl("trust", "rm", "owner", "acme"))
    done(house.ctl("trust", "rm", "issuer", "cluster"))
    assert (trusted(house).owners(), trusted(house).issuers()) == ((), ())
    for words in (["owner", "acme"], ["issuer", "cluster"], ["--dry-run", "owner", "acme"]):
        refused(house.ctl("trust", "rm", *words), TrustInvalid.code, "sczctl trust list")


@pytest.mark.parametrize("name", ["../config", "a/b", "/etc/passwd", ".", "..", ".acme", "cluster", "ACME"])
def test_rm_reaches_nothing_but_its_folder(house: Household, name: str) -> None:
    house.trust()
    (house.host / "config.json").write_text("{}")
    done(house.ctl(*plain(jwks(house, new_jwk()))))
    before = snapshot(house.host)
    refused(house.ctl("trust", "rm", "owner", name), TrustInvalid.code)
    assert snapshot(house.host) == before


def test_rm_of_a_kind_that_is_none(house: Household) -> None:
    misused(house.ctl("trust", "rm", "host", "acme"))


# --- token ------------------------------------------------------------------------------------------------------------


def init(house: Household, *words: str | Path) -> list[str | Path]:
    return ["token", "init", "--issuer", "https://host.example", *words]


def issue(house: Household, *words: str | Path) -> list[str | Path]:
    return ["token", "issue", "--subject", "s", "-o", house.usb / "token", *words]


def test_the_host_s_own_issuer_issues_tokens_that_are_accepted(house: Household) -> None:
    told = done(house.ctl(*init(house, "-o", house.usb / "issuer.json")))
    assert f"sczctl trust add issuer {house.usb / 'issuer.json'}" in told.out
    key = house.store_folder / "issuer" / "issuer.key"
    assert key.stat().st_mode & 0o777 == 0o600
    done(house.ctl("trust", "add", "issuer", house.usb / "issuer.json"))
    done(house.ctl(*issue(house, "--ttl", "120", "--audience", "a")))
    assert (house.usb / "token").stat().st_mode & 0o777 == 0o600
    accepted = AcceptedIdentity("https://host.example", "a", ("s",), ())
    access = AccessPolicy((accepted,), 600, None, None, (), share=False)
    token = (house.usb / "token").read_bytes()
    now = json.loads(_payload(token))["iat"]
    identity = verify_token(token, issuers=trusted(house).issuers(), access=access, now=now, leeway_seconds=5)
    assert (identity.subject, identity.expires - identity.issued) == ("s", 120)
    assert key.read_bytes() not in token


def _payload(token: bytes) -> bytes:
    import base64

    return base64.urlsafe_b64decode(token.split(b".")[1] + b"==")


def test_an_issuer_is_made_once(house: Household) -> None:
    done(house.ctl(*init(house)))
    before = snapshot(house.host)
    refused(house.ctl(*init(house)), OutputExists.code, "issuer.json")
    assert snapshot(house.host) == before


def test_an_issuer_is_not_made_by_halves(house: Household) -> None:
    (house.usb / "taken").write_bytes(b"precious")
    before = snapshot(house.host, house.usb)
    refused(house.ctl(*init(house, "-o", house.usb / "taken")), OutputExists.code, "taken")
    refused(house.ctl(*init(house, "-o", house.usb / "absent" / "x")), FileUnreadable.code, "mkdir -p")
    misused(house.ctl(*init(house, "--name", "Big")), "--name")
    refused(house.ctl("token", "init", "--issuer", "a\nb"), TrustInvalid.code)
    assert snapshot(house.host, house.usb) == before


def test_a_token_is_replaced_only_if_asked(house: Household) -> None:
    refused(house.ctl(*issue(house)), KeyInvalid.code, "sczctl token init")
    done(house.ctl(*init(house)))
    done(house.ctl(*issue(house)))
    first = (house.usb / "token").read_bytes()
    refused(house.ctl(*issue(house)), OutputExists.code, "--force")
    assert (house.usb / "token").read_bytes() == first
    done(house.ctl(*issue(house, "--force")))
    assert (house.usb / "token").read_bytes() != first
    for ttl in ("0", "29", "31622401", "x"):
        misused(house.ctl(*issue(house, "--ttl", ttl, "--force")), "--ttl")


@pytest.mark.parametrize("contents", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_issuer_s_key(house: Household, contents: bytes) -> None:
    done(house.ctl(*init(house)))
    (house.store_folder / "issuer" / "issuer.key").write_bytes(contents)
    refused(house.ctl(*issue(house)), KeyInvalid.code, "sczctl token init")
    assert not (house.usb / "token").exists()


def test_the_public_file_is_an_issuer_s(house: Household) -> None:
    done(house.ctl(*init(house, "--name", "mine")))
    issuer = parse_issuer((house.store_folder / "issuer" / "issuer.json").read_bytes())
    assert (issuer.name, issuer.kind) == ("mine", "oidc")
