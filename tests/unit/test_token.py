"""identity.token: every vector of tests/vectors/tokens, as stored and freshly made; what an Identity carries; fuzz."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook import errors
from oci_hook.access_policy import parse_access_policy
from oci_hook.documents import canonical, encode_base64url
from oci_hook.errors import BundleInvalid, SczError, TokenAlgorithmRefused, TokenClaimsRefused, TokenMalformed
from oci_hook.identity.token import TOKEN_LIMIT_BYTES, Identity, verify_token
from oci_hook.jws import parse_compact, verify_compact
from oci_hook.trust import parse_issuer

FOLDER = Path(__file__).parents[1] / "vectors" / "tokens"
STORED = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("token_vectors_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
BUILDER = GENERATOR.Builder()
FRESH = {vector["name"]: vector for vector in BUILDER.vectors()}


def token_of(vector: dict[str, Any]) -> bytes:
    append = vector.get("append", {"text": "", "times": 0})
    text: str = vector["token"] + append["text"] * append["times"]
    return text.encode()


def verify(vector: dict[str, Any], token: bytes | None = None) -> Identity:
    return verify_token(
        token_of(vector) if token is None else token,
        issuers=[parse_issuer(canonical(issuer)) for issuer in vector["issuers"]],
        access=parse_access_policy(vector["access"], error=BundleInvalid),
        now=vector["now"],
        leeway_seconds=vector["leeway_seconds"],
    )


def check(vector: dict[str, Any]) -> None:
    if vector["expected"] == "accepted":
        identity = verify(vector)
        assert identity.token_hash == hashlib.sha256(token_of(vector)).digest()
        assert identity.subject in identity.accepted.subjects
        return
    expected = getattr(errors, vector["expected"])
    with pytest.raises(SczError) as raised:
        verify(vector)
    assert type(raised.value) is expected, raised.value.message
    signature = vector["token"].rpartition(".")[2]
    assert len(signature) < 8 or signature not in raised.value.message
    assert raised.value.message.isprintable()


@pytest.mark.parametrize("name", sorted(STORED))
def test_stored_vector(name: str) -> None:
    assert STORED[name]["name"] == name
    check(STORED[name])


@pytest.mark.parametrize("name", sorted(FRESH))
def test_fresh_vector(name: str) -> None:
    check(FRESH[name])


def test_generator_makes_the_stored_vectors() -> None:
    def outline(vectors: dict[str, Any]) -> dict[str, tuple[str, str]]:
        return {name: (vector["expected"], vector["description"]) for name, vector in vectors.items()}

    assert outline(FRESH) == outline(STORED)


def test_every_vector_differs_from_the_good_one() -> None:
    good = STORED["es256"]
    for name, vector in STORED.items():
        if vector["expected"] != "accepted":
            assert vector != {
                **good,
                "name": name,
                "expected": vector["expected"],
                "description": vector["description"],
            }


@pytest.mark.parametrize(("name", "algorithm"), [("rfc7515-a2", "RS256"), ("rfc7515-a3", "ES256")])
def test_published_signature_verifies(name: str, algorithm: str) -> None:
    vector = STORED[name]
    jws = parse_compact(token_of(vector), limit_bytes=TOKEN_LIMIT_BYTES, what="RFC 7515", error=TokenMalformed)
    key = parse_issuer(canonical(vector["issuers"][0])).keys[0]
    payload = verify_compact(jws, key, algorithm, error=errors.TokenSignatureRefused)
    assert json.loads(payload) == {"iss": "joe", "exp": 1300819380, "http://example.com/is_root": True}


# --- what an Identity carries -----------------------------------------------------------------------------------------


def test_kubernetes_identity() -> None:
    identity = verify(STORED["kubernetes"])
    assert (identity.namespace, identity.service_account) == ("models", "reader")
    assert identity.pod_uid == GENERATOR.POD_UID
    assert identity.issuer.kind == "kubernetes"


def test_plain_identity_has_no_pod_even_if_it_claims_one() -> None:
    bound = {"namespace": "a", "serviceaccount": {"name": "b"}, "pod": {"uid": "c"}}
    token = BUILDER.token(GENERATOR.claims(**{"kubernetes.io": bound}))
    identity = verify(FRESH["es256"], token.encode())
    assert (identity.pod_uid, identity.namespace, identity.service_account) == (None, None, None)


def test_identity_of_several_is_the_one_that_fits_whole() -> None:
    vector = STORED["identity-of-several"]
    assert verify(vector).accepted == parse_access_policy(vector["access"], error=BundleInvalid).identities[2]


def test_times_and_hashes() -> None:
    vector = STORED["times-fractional"]
    identity = verify(vector)
    assert (identity.issued, identity.expires) == (GENERATOR.NOW - 0.5, GENERATOR.NOW + 9.25)
    signing_input = token_of(vector).rpartition(b".")[0]
    assert identity.signed_hash == hashlib.sha256(signing_input).digest()


def test_respelled_signature_has_another_token_hash_but_the_same_signed_hash() -> None:
    good = BUILDER.token().encode()
    start, _, signature = good.rpartition(b".")
    raw = GENERATOR.unb64(signature.decode())
    respelled = start + b"." + GENERATOR.respelled_es256(raw).encode()
    first, second = verify(FRESH["es256"], good), verify(FRESH["es256"], respelled)
    assert first.token_hash != second.token_hash
    assert first.signed_hash == second.signed_hash


def test_identity_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify(STORED["es256"]).subject = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("now", "leeway_seconds"), [(math.nan, 5), (math.inf, 5), (1_800_000_000, -1), (1_800_000_000, 61)]
)
def test_a_clock_or_leeway_that_cannot_be_is_our_fault(now: float, leeway_seconds: int) -> None:
    with pytest.raises(ValueError):
        verify({**STORED["es256"], "now": now, "leeway_seconds": leeway_seconds})


# --- fuzz -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CLAIM = st.sampled_from(["iss", "sub", "aud", "exp", "iat", "nbf", "kubernetes.io", "jti"])
HEADER = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "cty"])


def value_or_ours(vector: dict[str, Any], token: bytes) -> None:
    try:
        identity = verify(vector, token)
    except SczError:
        return
    assert identity.subject in identity.accepted.subjects
    assert identity.audience == identity.accepted.audience


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(SczError):
        verify(STORED["es256"], data)


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=0, max_value=255))
def test_one_changed_byte_is_never_accepted(position: int, byte: int) -> None:
    token = bytearray(token_of(STORED["es256"]))
    position %= len(token)
    if token[position] == byte:
        byte ^= 1
    token[position] = byte
    with pytest.raises(SczError):
        verify(STORED["es256"], bytes(token))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(CLAIM, JSON, max_size=4), st.sampled_from(["oidc", "kubernetes", "spiffe"]))
def test_arbitrary_signed_claims(changes: dict[str, Any], kind: str) -> None:
    issuers = [GENERATOR.trusted(BUILDER.keys.mixed(), kind=kind)]
    token = BUILDER.token(GENERATOR.claims(**changes)).encode()
    value_or_ours({**FRESH["es256"], "issuers": issuers}, token)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(HEADER, JSON, max_size=3))
def test_arbitrary_signed_header(changes: dict[str, Any]) -> None:
    token = BUILDER.token(header={**BUILDER.header(), **changes}).encode()
    value_or_ours(FRESH["es256"], token)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_arbitrary_signed_parts(header: bytes, payload: bytes) -> None:
    for raw_header, raw_payload in ((header, payload), (canonical(BUILDER.header()), payload)):
        value_or_ours(FRESH["es256"], BUILDER.token(raw_payload, header=raw_header).encode())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(min_value=-4000, max_value=4000),
    st.integers(min_value=-4000, max_value=4000),
    st.none() | st.integers(min_value=-100, max_value=100),
    st.integers(min_value=0, max_value=60),
)
def test_times_against_the_specification(iat: int, exp: int, nbf: int | None, leeway: int) -> None:
    now = GENERATOR.NOW
    claims = GENERATOR.claims(iat=now + iat, exp=now + exp, nbf=... if nbf is None else now + nbf)
    vector = {**FRESH["es256"], "leeway_seconds": leeway}
    well_formed = 0 < exp - iat <= GENERATOR.AGE
    in_time = iat <= leeway and (nbf is None or nbf <= leeway) and -leeway < exp
    token = BUILDER.token(claims).encode()
    if well_formed and in_time:
        identity = verify(vector, token)
        assert now - identity.issued < GENERATOR.AGE + leeway  # the age is bounded with the lifetime
        return
    with pytest.raises(errors.TokenExpired if well_formed else TokenClaimsRefused):
        verify(vector, token)


@pytest.mark.parametrize("algorithm", ["PS256", "PS384", "PS512", "EdDSA", "Ed448", "ES256K", "HS512", "none"])
def test_algorithms_beyond_the_six_are_refused_by_name(algorithm: str) -> None:
    vector = json.loads((FOLDER / "aud-list.json").read_text())
    _, payload, signature = token_of(vector).split(b".")
    header = encode_base64url(canonical({"alg": algorithm, "kid": "k"})).encode()
    with pytest.raises(TokenAlgorithmRefused, match=algorithm):
        verify(vector, b".".join((header, payload, signature)))
