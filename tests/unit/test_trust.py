"""`trust`: owners' and issuers' files."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.documents import canonical, encode_base64url
from oci_hook.errors import TrustInvalid
from oci_hook.jws import public_jwk
from oci_hook.trust import parse_issuer, parse_owner
from tests.bundles import make_owner, new_key, value_or_none

OWNER: dict[str, Any] = json.loads(make_owner().owner.document)
EC_JWK = {**public_jwk(new_key().public_key()), "kid": "ec", "use": "sig", "alg": "ES256"}
RSA_NUMBERS = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
RSA_JWK = {"kty": "RSA", "kid": "rsa", "e": "AQAB", "n": encode_base64url(RSA_NUMBERS.n.to_bytes(256, "big"))}
ISSUER: dict[str, Any] = {
    "schema": "scz-smm/issuer/v1",
    "name": "cluster",
    "issuer": "https://kubernetes.default.svc",
    "type": "kubernetes",
    "jwks": {"keys": [EC_JWK, RSA_JWK]},
}


def test_an_owner() -> None:
    data = canonical(OWNER)
    owner = parse_owner(data)
    assert owner.name == "acme"
    assert owner.owner_id == owner.manifest_key.thumbprint
    assert len({owner.manifest_key.thumbprint, owner.boot_policy_key.thumbprint, owner.recovery_key.thumbprint}) == 3
    assert owner.document == data
    assert dict(owner.boot_policy_key.members) == OWNER["boot_policy_key"]


P384 = public_jwk(ec.generate_private_key(ec.SECP384R1()).public_key())


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "scz-smm/owner/v2"},
        {"name": "Acme"},
        {"name": "../acme"},
        {"name": "a" * 65},
        {"name": ""},
        {"manifest_key": None},
        {"manifest_key": P384},
        {"manifest_key": {**OWNER["manifest_key"], "kid": "a"}},
        {"manifest_key": {**OWNER["manifest_key"], "d": "AAAA"}},
        {"boot_policy_key": OWNER["manifest_key"]},
        {"recovery_key": OWNER["boot_policy_key"]},
        {"recovery_key": RSA_JWK},
        {"extra": 1},
    ],
)
def test_refused_owners(changes: dict[str, Any]) -> None:
    with pytest.raises(TrustInvalid):
        parse_owner(canonical({**OWNER, **changes}))


@pytest.mark.parametrize("missing", list(OWNER))
def test_incomplete_owners(missing: str) -> None:
    with pytest.raises(TrustInvalid):
        parse_owner(canonical({name: part for name, part in OWNER.items() if name != missing}))


def test_an_oversized_owner() -> None:
    assert parse_owner(canonical(OWNER) + b" " * (16384 - len(canonical(OWNER)))).name == "acme"
    with pytest.raises(TrustInvalid):
        parse_owner(canonical(OWNER) + b" " * 16384)


@pytest.mark.parametrize("kind", ["kubernetes", "spiffe", "oidc"])
def test_an_issuer(kind: str) -> None:
    issuer = parse_issuer(canonical({**ISSUER, "type": kind}))
    assert (issuer.name, issuer.issuer, issuer.kind) == ("cluster", "https://kubernetes.default.svc", kind)
    assert [key.kid for key in issuer.keys] == ["ec", "rsa"]


def test_further_members_of_a_jwk_set_are_ignored() -> None:
    jwks = {"keys": [{**EC_JWK, "use": "jwt-svid"}], "spiffe_sequence": 7, "spiffe_refresh_hint": 60}
    assert len(parse_issuer(canonical({**ISSUER, "type": "spiffe", "jwks": jwks})).keys) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "scz-smm/owner/v1"},
        {"name": "a b"},
        {"issuer": ""},
        {"issuer": "https://a\nb"},
        {"issuer": "a" * 1025},
        {"type": "saml"},
        {"jwks": []},
        {"jwks": {}},
        {"jwks": {"keys": []}},
        {"jwks": {"keys": {}}},
        {"jwks": {"keys": [EC_JWK, EC_JWK]}},
        {"jwks": {"keys": [EC_JWK, {**EC_JWK, "kid": "again"}]}},
        {"jwks": {"keys": [EC_JWK, {**public_jwk(new_key().public_key()), "kid": "ec"}]}},
        {"jwks": {"keys": [{**EC_JWK, "d": "AAAA"}]}},
        {"jwks": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}},
        {"jwks": {"keys": [RSA_JWK, {"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}]}},
        {"jwks": {"keys": [public_jwk(new_key().public_key()) for _ in range(65)]}},
        {"extra": 1},
    ],
)
def test_refused_issuers(changes: dict[str, Any]) -> None:
    with pytest.raises(TrustInvalid):
        parse_issuer(canonical({**copy.deepcopy(ISSUER), **changes}))


def test_an_oversized_issuer() -> None:
    with pytest.raises(TrustInvalid):
        parse_issuer(canonical(ISSUER) + b" " * 262_144)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    assert value_or_none(lambda: parse_owner(data), TrustInvalid) is None
    assert value_or_none(lambda: parse_issuer(data), TrustInvalid) is None


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(list(OWNER)), st.sampled_from(list(ISSUER)), VALUE)
def test_any_value(owner_field: str, issuer_field: str, value: object) -> None:
    data = json.dumps({**OWNER, owner_field: value}).encode()
    owner = value_or_none(lambda: parse_owner(data), TrustInvalid)
    assert owner is None or owner.document == data
    issuer = value_or_none(lambda: parse_issuer(json.dumps({**ISSUER, issuer_field: value}).encode()), TrustInvalid)
    assert issuer is None or issuer_field in ("name", "issuer")
