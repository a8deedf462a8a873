"""`jws`: published vectors, keys that must be refused, and what jose would let through."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import itertools
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jose import jws as jose_jws
from jose.exceptions import JWSError

from oci_hook.documents import encode_base64url
from oci_hook.errors import BundleInvalid, KeyInvalid, SczError, TokenMalformed, TokenSignatureRefused, TrustInvalid
from oci_hook.jws import (
    ALGORITHMS,
    ec_public_key,
    owner_jwk,
    parse_compact,
    parse_document,
    parse_jwk,
    public_jwk,
    sign_compact,
    sign_token,
    verify_compact,
)
from tests.bundles import value_or_none

# RFC 7515, appendix A.3: ES256
A3_KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
A3_PRIVATE = "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"
A3_JWS = (
    b"eyJhbGciOiJFUzI1NiJ9."
    b"eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ."
    b"DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
A3_PAYLOAD = b'{"iss":"joe",\r\n "exp":1300819380,\r\n "http://example.com/is_root":true}'

# RFC 7638, section 3.1
RFC7638_KEY = {
    "kty": "RSA",
    "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjB"
    "ZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8"
    "KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_"
    "xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
    "e": "AQAB",
    "alg": "RS256",
    "kid": "2011-04-29",
}
RFC7638_THUMBPRINT = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"

RSA_KEY = rsa.generate_private_key(65537, 2048)
CURVES: dict[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}


def rsa_jwk(key: rsa.RSAPrivateKey = RSA_KEY) -> dict[str, Any]:
    numbers = key.public_key().public_numbers()
    n = numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")
    return {"kty": "RSA", "n": encode_base64url(n), "e": "AQAB"}


def parsed(data: bytes) -> Any:
    return parse_compact(data, limit_bytes=16384, what="token", error=TokenMalformed)


def test_rfc7515_a3_verifies() -> None:
    key = parse_jwk(A3_KEY, error=TrustInvalid)
    assert verify_compact(parsed(A3_JWS), key, "ES256", error=TokenSignatureRefused) == A3_PAYLOAD


def test_rfc7515_a3_private_key_gives_the_public_one() -> None:
    number = int.from_bytes(base64.urlsafe_b64decode(A3_PRIVATE + "="), "big")
    assert public_jwk(ec.derive_private_key(number, ec.SECP256R1()).public_key()) == A3_KEY


def test_rfc7515_a3_changed_is_refused() -> None:
    key = parse_jwk(A3_KEY, error=TrustInvalid)
    changed = A3_JWS[:-4] + b"AAAA"
    with pytest.raises(TokenSignatureRefused):
        verify_compact(parsed(changed), key, "ES256", error=TokenSignatureRefused)


def test_rfc7638_thumbprint() -> None:
    assert parse_jwk(RFC7638_KEY, error=TrustInvalid).thumbprint == RFC7638_THUMBPRINT


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_signs_and_verifies(algorithm: str) -> None:
    private = RSA_KEY if algorithm.startswith("RS") else ec.generate_private_key(CURVES[algorithm])
    value = rsa_jwk() if isinstance(private, rsa.RSAPrivateKey) else public_jwk(private.public_key())
    token = sign_token({"sub": "a"}, kid="k", key=private, algorithm=algorithm)
    jws = parsed(token)
    assert dict(jws.unverified_header) == {"alg": algorithm, "kid": "k", "typ": "JWT"}
    assert (
        verify_compact(jws, parse_jwk(value, error=TrustInvalid), algorithm, error=TokenSignatureRefused)
        == b'{"sub":"a"}'
    )
    for other in ALGORITHMS - {algorithm}:
        with pytest.raises(TokenSignatureRefused):
            verify_compact(jws, parse_jwk(value, error=TrustInvalid), other, error=TokenSignatureRefused)


def test_documents_round_trip() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    owner = owner_jwk(public_jwk(key.public_key()), error=TrustInvalid)
    compact = sign_compact(b"{}", typ="x+jwt", kid=owner.thumbprint, key=key)
    jws = parse_document(compact, typ="x+jwt", limit_bytes=4096, what="document", error=BundleInvalid)
    assert dict(jws.unverified_header) == {"alg": "ES256", "kid": owner.thumbprint, "typ": "x+jwt"}
    assert jws.compact == compact
    assert verify_compact(jws, owner, "ES256", error=BundleInvalid) == b"{}"
    with pytest.raises(BundleInvalid):
        parse_document(compact, typ="y+jwt", limit_bytes=4096, what="document", error=BundleInvalid)


def test_ec_public_key_is_the_same_key() -> None:
    for curve in CURVES.values():
        key = ec.generate_private_key(curve).public_key()
        assert ec_public_key(parse_jwk(public_jwk(key), error=TrustInvalid), error=KeyInvalid) == key
    with pytest.raises(KeyInvalid):
        ec_public_key(parse_jwk(rsa_jwk(), error=TrustInvalid), error=KeyInvalid)
    with pytest.raises(KeyInvalid):
        public_jwk(ec.generate_private_key(ec.SECP256K1()).public_key())


def test_the_header_s_algorithm_is_the_one_that_was_asked_for() -> None:
    token = parsed(sign_token({}, kid="k", key=RSA_KEY, algorithm="RS512"))
    with pytest.raises(TokenSignatureRefused, match="header's algorithm is not 'RS256'"):
        verify_compact(token, parse_jwk(rsa_jwk(), error=TrustInvalid), "RS256", error=TokenSignatureRefused)


# --- what jose would accept -------------------------------------------------------------------------------------------


def test_hs256_signed_with_the_public_key_is_refused() -> None:
    """jose 3.5 accepts this if no list of algorithms is given (CVE-2024-33663)."""
    der = RSA_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signing = b".".join(encode_base64url(part).encode() for part in (b'{"alg":"HS256"}', b'{"sub":"a"}'))
    token = signing + b"." + encode_base64url(hmac.new(der, signing, hashlib.sha256).digest()).encode()
    key = parse_jwk(rsa_jwk(), error=TrustInvalid)
    for algorithm in ("HS256", "RS256"):
        with pytest.raises(TokenSignatureRefused):
            verify_compact(parsed(token), key, algorithm, error=TokenSignatureRefused)


@pytest.mark.parametrize(
    "members",
    [
        {"alg": "RS512"},
        {"alg": "RSA-OAEP"},
        {"use": "enc"},
        {"use": "x509-svid"},
        {"key_ops": ["sign"]},
        {"key_ops": ["encrypt", "wrapKey"]},
    ],
)
def test_a_key_for_something_else_is_refused(members: dict[str, Any]) -> None:
    token = parsed(sign_token({}, kid="k", key=RSA_KEY, algorithm="RS256"))
    key = parse_jwk({**rsa_jwk(), **members}, error=TrustInvalid)
    assert not key.fits("RS256")
    with pytest.raises(TokenSignatureRefused):
        verify_compact(token, key, "RS256", error=TokenSignatureRefused)


@pytest.mark.parametrize(
    "members",
    [{"alg": "RS256"}, {"use": "sig"}, {"use": "jwt-svid"}, {"key_ops": ["verify"]}, {"x5t": "A", "x5c": ["A"]}],
)
def test_a_key_for_verifying_is_taken(members: dict[str, Any]) -> None:
    token = parsed(sign_token({"sub": "a"}, kid="k", key=RSA_KEY, algorithm="RS256"))
    key = parse_jwk({**rsa_jwk(), **members}, error=TrustInvalid)
    assert set(key.members) == {"kty", "n", "e"}
    assert verify_compact(token, key, "RS256", error=TokenSignatureRefused) == b'{"sub":"a"}'


def test_exceptions_of_jose_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    key, token = parse_jwk(A3_KEY, error=TrustInvalid), parsed(A3_JWS)
    for kind in (JWSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):

        def fail(*args: object, kind: type[Exception] = kind) -> bytes:
            raise kind("hostile")

        monkeypatch.setattr(jose_jws, "verify", fail)
        with pytest.raises(TokenSignatureRefused):
            verify_compact(token, key, "ES256", error=TokenSignatureRefused)
    monkeypatch.setattr(jose_jws, "verify", lambda *args: b"another payload")
    with pytest.raises(TokenSignatureRefused):
        verify_compact(token, key, "ES256", error=TokenSignatureRefused)


# --- parsing ----------------------------------------------------------------------------------------------------------


def part(text: str) -> bytes:
    return encode_base64url(text.encode()).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"..",
        b"a.b",
        A3_JWS + b".",
        A3_JWS + b"\n",
        b" " + A3_JWS,
        A3_JWS + b"=",
        A3_JWS[:-1] + b"V",
        A3_JWS.replace(b"-", b"+"),
        part('{"alg":"ES256","crit":["x"]}') + b".e30.",
        part('{"alg":"ES256","b64":false}') + b".e30.",
        part('{"alg":"ES256","alg":"none"}') + b".e30.",
        part('["alg"]') + b".e30.",
        part("[" * 5000) + b".e30.",
        part('{"a":NaN}') + b".e30.",
        "é.é.é".encode(),
        b"\xff.\xff.\xff",
        b"e30." + b"A" * 16384 + b".",
    ],
)
def test_malformed_tokens(data: bytes) -> None:
    with pytest.raises(TokenMalformed):
        parsed(data)


def test_alg_none_parses_and_never_verifies() -> None:
    token = parsed(part('{"alg":"none"}') + b".e30.")
    for algorithm in ("none", "ES256", ""):
        with pytest.raises(TokenSignatureRefused):
            verify_compact(token, parse_jwk(A3_KEY, error=TrustInvalid), algorithm, error=TokenSignatureRefused)


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "ES256", "typ": "x+jwt"},
        {"alg": "ES256", "typ": "x+jwt", "kid": "short"},
        {"alg": "ES256", "typ": "x+jwt", "kid": "A" * 44},
        {"alg": "ES384", "typ": "x+jwt", "kid": "A" * 43},
        {"alg": "ES256", "typ": "X+JWT", "kid": "A" * 43},
        {"alg": "ES256", "typ": "x+jwt", "kid": "A" * 43, "jku": "https://evil.example"},
        {"alg": ["ES256"], "typ": "x+jwt", "kid": "A" * 43},
    ],
)
def test_other_headers_of_documents(header: dict[str, Any]) -> None:
    with pytest.raises(BundleInvalid):
        parse_document(
            part(json.dumps(header)) + b".e30.", typ="x+jwt", limit_bytes=4096, what="x", error=BundleInvalid
        )


# --- classes of attack on every part of a token -----------------------------------------------------------------------

SIGNING_KEY = ec.generate_private_key(ec.SECP256R1())
SIGNING_JWK = public_jwk(SIGNING_KEY.public_key())
SIGNED = sign_token({"sub": "a"}, kid="k", key=SIGNING_KEY, algorithm="ES256")
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
EDGES = [0, 1, P256_ORDER - 1, P256_ORDER, P256_ORDER + 1, 2**255, 2**256 - 1]


def is_refused(token: bytes, members: dict[str, Any] = SIGNING_JWK, algorithm: str = "ES256") -> bool:
    """Whether a token is refused, as malformed or by its signature, and in no other way."""
    try:
        verify_compact(parsed(token), parse_jwk(members, error=TrustInvalid), algorithm, error=TokenSignatureRefused)
    except (TokenMalformed, TokenSignatureRefused):
        return True
    return False


def test_parts_that_are_missing_moved_or_more() -> None:
    header, claims, signature = SIGNED.split(b".")
    assert not is_refused(SIGNED)
    tokens = [
        b".".join(parts) for size in (1, 2) for parts in itertools.permutations((header, claims, signature), size)
    ]
    tokens += [b".".join(parts) for parts in itertools.permutations((header, claims, signature))][1:]
    for place in range(3):
        parts = [header, claims, signature]
        parts[place] = b""
        tokens.append(b".".join(parts))
    tokens += [SIGNED + b".", b"." + SIGNED, SIGNED + b"." + signature, header + b".." + claims + b"." + signature]
    tokens += [header + claims + signature, b"..", b"...", json.dumps({"payload": claims.decode()}).encode()]
    assert [token for token in tokens if not is_refused(token)] == []


def test_each_character_of_a_token_counts() -> None:
    for place, byte in enumerate(SIGNED):
        for other in b"A_. =+\n\x00":
            if other != byte:
                assert is_refused(SIGNED[:place] + bytes([other]) + SIGNED[place + 1 :]), (place, other)
            assert is_refused(SIGNED[:place] + bytes([other]) + SIGNED[place:]), (place, other)
        assert is_refused(SIGNED[:place] + SIGNED[place + 1 :]), place
        assert is_refused(SIGNED[:place]), place


def test_edges_of_the_arithmetic_in_es256() -> None:
    head = SIGNED.rsplit(b".", 1)[0] + b"."
    for r, s in itertools.product(EDGES, repeat=2):
        assert is_refused(head + encode_base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big")).encode()), (r, s)


def test_other_spellings_of_a_good_es256_signature() -> None:
    head, encoded = SIGNED.rsplit(b".", 1)
    good = base64.urlsafe_b64decode(encoded + b"==")
    r, s = int.from_bytes(good[:32], "big"), int.from_bytes(good[32:], "big")
    wide = [number.to_bytes(size, "big") for size in (33, 48, 66) for number in (r, s)]
    spellings = [good + b"\0", b"\0" + good, good + good, *(b"".join(wide[at : at + 2]) for at in (0, 2, 4))]
    spellings += [encode_dss_signature(r, s), encode_dss_signature(r, s + P256_ORDER), good[32:] + good[:32]]
    spellings += [good[:32] + (P256_ORDER - 1).to_bytes(32, "big"), good[:31] + good[32:], good[::-1]]
    assert not is_refused(head + b"." + encode_base64url(good).encode())
    assert [each for each in spellings if not is_refused(head + b"." + encode_base64url(each).encode())] == []


@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_a_public_key_of_either_type_is_no_secret(hash_name: str) -> None:
    """A MAC under any spelling of the public key, by whichever name the header calls it."""
    for private, members, asked in ((SIGNING_KEY, SIGNING_JWK, "ES256"), (RSA_KEY, rsa_jwk(), "RS256")):
        public = private.public_key()
        secrets = [json.dumps(members).encode(), *(members[name].encode() for name in ("x", "n") if name in members)]
        for encoding in (Encoding.DER, Encoding.PEM):
            secrets.append(public.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo))
        if isinstance(public, ec.EllipticCurvePublicKey):
            secrets.append(public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
        else:
            secrets.append(public.public_bytes(Encoding.PEM, PublicFormat.PKCS1))
        for secret, said in itertools.product(secrets, (f"HS{hash_name[3:]}", asked)):
            signing = part(json.dumps({"alg": said})) + b"." + part('{"sub":"a"}')
            token = signing + b"." + encode_base64url(hmac.new(secret, signing, hash_name).digest()).encode()
            for algorithm in (said, asked):
                assert is_refused(token, members, algorithm), (said, algorithm)


def test_a_key_in_the_header_is_not_used() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    header = {"alg": "ES256", "jwk": public_jwk(other.public_key()), "kid": "k"}
    signing = part(json.dumps(header)) + b"." + part('{"sub":"a"}')
    r, s = decode_dss_signature(other.sign(signing, ec.ECDSA(SHA256())))
    token = signing + b"." + encode_base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big")).encode()
    assert not is_refused(token, public_jwk(other.public_key()))  # it is rightly signed, by somebody else
    assert is_refused(token)


def test_paddings_and_hashes_of_rsa_are_not_exchanged() -> None:
    """PS256 for RS256, RS384 for RS256, and the other way round; each by its own name and by the other's."""
    hashes = {"256": SHA256(), "384": SHA384(), "512": SHA512()}
    good = 0
    for scheme, size, said in itertools.product(("RS", "PS"), hashes, ("RS256", "RS384", "RS512", "PS256", "none")):
        signing = part(json.dumps({"alg": said})) + b"." + part("{}")
        pss = padding.PSS(padding.MGF1(hashes[size]), hashes[size].digest_size)
        used: padding.AsymmetricPadding = pss if scheme == "PS" else padding.PKCS1v15()
        token = signing + b"." + encode_base64url(RSA_KEY.sign(signing, used, hashes[size])).encode()
        for asked in ("RS256", "RS384", "RS512", "PS256", "none"):
            is_right = f"{scheme}{size}" == said == asked and said in ALGORITHMS
            assert is_refused(token, rsa_jwk(), asked) is not is_right, (scheme, size, said, asked)
            good += is_right
    assert good == 3


# --- keys -------------------------------------------------------------------------------------------------------------


def changed_jwk(base: dict[str, Any], **changes: object) -> dict[str, Any]:
    value = copy.deepcopy(base)
    for name, change in changes.items():
        if change is None:
            del value[name]
        else:
            value[name] = change
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "jwk",
        {},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "oct"},
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        {"kty": ["EC"]},
        {**RFC7638_KEY, "kty": "OKP"},
        {**A3_KEY, "kty": "ec"},
        changed_jwk(A3_KEY, d=A3_PRIVATE),
        changed_jwk(A3_KEY, k="AAAA"),
        changed_jwk(A3_KEY, x=None),
        changed_jwk(A3_KEY, crv="P-384"),
        changed_jwk(A3_KEY, crv="secp256k1"),
        changed_jwk(A3_KEY, x=A3_KEY["y"]),
        changed_jwk(A3_KEY, x="A" * 43, y="A" * 43),
        changed_jwk(A3_KEY, x=A3_KEY["x"] + "="),
        changed_jwk(A3_KEY, x=A3_KEY["x"][:-2]),
        changed_jwk(A3_KEY, x=A3_KEY["x"][:-1] + "V"),
        changed_jwk(A3_KEY, kid=7),
        changed_jwk(A3_KEY, key_ops="verify"),
        changed_jwk(A3_KEY, key_ops=["verify", "verify"]),
        changed_jwk(RFC7638_KEY, n="AA" + RFC7638_KEY["n"]),
        changed_jwk(RFC7638_KEY, e="AAEAAQ"),
        changed_jwk(RFC7638_KEY, e="AQ"),
        changed_jwk(RFC7638_KEY, e="Ag"),
        changed_jwk(RFC7638_KEY, n=RFC7638_KEY["n"][:-4]),
        changed_jwk(RFC7638_KEY, n=encode_base64url(b"\x80" + bytes(255))),
        changed_jwk(RFC7638_KEY, n=encode_base64url(b"\xff" * 1025)),
        changed_jwk(RFC7638_KEY, p="AQAB"),
        changed_jwk(RFC7638_KEY, oth=[]),
    ],
)
def test_refused_keys(value: object) -> None:
    with pytest.raises(TrustInvalid):
        parse_jwk(value, error=TrustInvalid)


def test_short_rsa_keys_are_refused() -> None:
    short = rsa.generate_private_key(65537, 1024)
    with pytest.raises(TrustInvalid):
        parse_jwk(rsa_jwk(short), error=TrustInvalid)
    with pytest.raises(KeyInvalid):
        sign_token({}, kid="k", key=short, algorithm="RS256")


@pytest.mark.parametrize(
    "value",
    [
        {**A3_KEY, "kid": "a"},
        {**A3_KEY, "alg": "ES256"},
        public_jwk(ec.generate_private_key(ec.SECP384R1()).public_key()),
        {**RFC7638_KEY},
        None,
    ],
)
def test_refused_owner_keys(value: object) -> None:
    with pytest.raises(TrustInvalid):
        owner_jwk(value, error=TrustInvalid)


def test_keys_that_do_not_fit_do_not_sign() -> None:
    p384 = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(KeyInvalid):
        sign_compact(b"{}", typ="x", kid="k", key=p384)
    for key, algorithm in (
        (p384, "RS256"),
        (RSA_KEY, "ES256"),
        (RSA_KEY, "PS256"),
        (RSA_KEY, "none"),
        (RSA_KEY, "HS256"),
    ):
        with pytest.raises(KeyInvalid):
            sign_token({}, kid="k", key=key, algorithm=algorithm)


# --- fuzz -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.binary(max_size=300)
    | st.lists(st.binary(max_size=60), min_size=3, max_size=3).map(
        lambda parts: b".".join(encode_base64url(p).encode() for p in parts)
    )
)
def test_any_bytes_as_token(data: bytes) -> None:
    jws = value_or_none(lambda: parsed(data), TokenMalformed)
    assert jws is None or jws.compact == data


@given(
    st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "kid", "alg", "use", "key_ops", "d"]), JSON)
    | JSON
)
def test_any_value_as_key(value: object) -> None:
    with pytest.raises(SczError):
        parse_jwk(value, error=TrustInvalid)


@given(st.binary(min_size=64, max_size=64))
def test_any_signature_is_refused(signature: bytes) -> None:
    token = parsed(A3_JWS.rsplit(b".", 1)[0] + b"." + encode_base64url(signature).encode())
    with pytest.raises(TokenSignatureRefused):
        verify_compact(token, parse_jwk(A3_KEY, error=TrustInvalid), "ES256", error=TokenSignatureRefused)
