"""Compact JWS and public JWKs: the only module that imports `jose`.

Parsing is ours and strict; `jose` is handed one key and one algorithm and asked for nothing but the signature. It
ignores `kid`, trusts the header's `alg` if no list is given, and lets foreign exceptions out: none of this reaches a
caller. Whose key it is, and what the payload says, is the caller's business. RFC 7515 (compact form), 7517 (JWK),
7518 (RS256-512, ES256-512), 7638 (thumbprint).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jose import jws as jose_jws
from jose.backends.cryptography_backend import CryptographyECKey, CryptographyRSAKey
from jose.exceptions import JOSEError

from oci_hook.documents import Fields, canonical, decode_base64url, encode_base64url, parse_object, shown
from oci_hook.errors import KeyInvalid, SczError

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "ES256", "ES384", "ES512"})
RSA_BITS_LOW, RSA_BITS_HIGH = 2048, 8192  # above: a verification would take long enough to be an attack
HEADER_LIMIT_BYTES = 16 * 1024

# RFC 7518, section 3.4: one curve for each algorithm.
_CURVES: Mapping[str, tuple[str, type[ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1], int]] = {
    "P-256": ("ES256", ec.SECP256R1, 32),
    "P-384": ("ES384", ec.SECP384R1, 48),
    "P-521": ("ES512", ec.SECP521R1, 66),
}
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_KTY = {"RS": "RSA", "ES": "EC"}

# What jose 3.5 was seen to raise on hostile input, besides its own: base64 and integer errors, missing members, deep
# JSON. LookupError is an unknown curve's KeyError; UnsupportedAlgorithm is cryptography's.
_JOSE_RAISES = (
    JOSEError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    UnsupportedAlgorithm,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class PublicJwk:
    """A public key, checked: on its curve, or RSA of 2048 to 8192 bits.

    `thumbprint` is RFC 7638's (SHA-256, base64url); `members` are the key's own members and no others.
    """

    kty: str
    crv: str | None
    kid: str | None
    alg: str | None
    use: str | None
    key_ops: tuple[str, ...] | None
    thumbprint: str
    members: Mapping[str, str] = field(hash=False)

    def fits(self, algorithm: str) -> bool:
        """Whether this key may verify `algorithm`: its type, curve, `alg`, `use` and `key_ops` all agree.

        A filter for choosing among keys, not a check of a signature.
        """
        return (
            algorithm in ALGORITHMS
            and self.kty == _KTY[algorithm[:2]]
            and (self.crv is None or _CURVES[self.crv][0] == algorithm)
            and self.alg in (None, algorithm)
            and self.use in (None, "sig", "jwt-svid")  # the last is SPIFFE's, in its trust bundles
            and (self.key_ops is None or "verify" in self.key_ops)
        )


@dataclass(frozen=True, slots=True)
class UnverifiedJws:
    """A JWS taken apart; nothing in it may be believed before `verify_compact`."""

    unverified_header: Mapping[str, object]
    unverified_payload: bytes
    compact: bytes


# --- keys -------------------------------------------------------------------------------------------------------------


def _thumbprint(members: Mapping[str, str]) -> str:
    return encode_base64url(hashlib.sha256(canonical(dict(members))).digest())  # RFC 7638, section 3


def _coordinate(fields: Fields, name: str, size: int) -> tuple[str, int]:
    data = fields.base64url(name, low=size, high=size)  # RFC 7518, section 6.2.1.2: full length
    return encode_base64url(data), int.from_bytes(data, "big")


def _ec_members(fields: Fields, error: type[SczError]) -> dict[str, str]:
    crv = fields.string("crv", pattern="P-256|P-384|P-521")
    _, curve, size = _CURVES[crv]
    x_text, x = _coordinate(fields, "x", size)
    y_text, y = _coordinate(fields, "y", size)
    try:
        ec.EllipticCurvePublicNumbers(x, y, curve()).public_key()
    except ValueError as cause:
        raise error("the JWK's point is not on its curve") from cause
    return {"crv": crv, "kty": "EC", "x": x_text, "y": y_text}


def _rsa_members(fields: Fields, error: type[SczError]) -> dict[str, str]:
    modulus = fields.base64url("n", low=RSA_BITS_LOW // 8, high=RSA_BITS_HIGH // 8)
    exponent = fields.base64url("e", low=1, high=8)
    # RFC 7518, section 2: the least number of octets. A leading zero would be a second thumbprint for one key.
    if modulus[0] == 0 or exponent[0] == 0:
        raise error("the JWK's n or e has a leading zero octet")
    n, e = int.from_bytes(modulus, "big"), int.from_bytes(exponent, "big")
    if n.bit_length() < RSA_BITS_LOW or n % 2 == 0 or e < 3:
        raise error(f"the JWK is not an RSA key of at least {RSA_BITS_LOW} bits")
    try:
        rsa.RSAPublicNumbers(e, n).public_key()
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise error("the JWK is not an RSA public key") from cause
    return {"e": encode_base64url(exponent), "kty": "RSA", "n": encode_base64url(modulus)}


def parse_jwk(value: object, *, error: type[SczError]) -> PublicJwk:
    """Check one public JWK of an issuer. Members that RFC 7517 does not name are ignored, as its section 4 asks.

    Args:
        value: What JSON gave.
        error: What to raise.

    Raises:
        SczError: The class `error`: not an object, private or symmetric members, `oct` or `OKP`, RSA under 2048 bits
            or even, a point off its curve, a number not in its one canonical spelling.
    """
    fields = Fields(value, what="JWK", error=error)
    if any(fields.has(name) for name in _PRIVATE_MEMBERS):
        raise error("the JWK has private members: it is a secret that should not be here")
    kty = fields.string("kty")
    if kty not in ("RSA", "EC"):
        raise error(f"the JWK's kty is {shown(kty)}, not RSA or EC")
    kid = fields.string("kid", limit=512) if fields.has("kid") else None
    alg = fields.string("alg", limit=64) if fields.has("alg") else None
    use = fields.string("use", limit=64) if fields.has("use") else None
    key_ops = fields.strings("key_ops", low=1, high=16, limit=64) if fields.has("key_ops") else None
    members = _ec_members(fields, error) if kty == "EC" else _rsa_members(fields, error)
    return PublicJwk(
        kty=kty,
        crv=members.get("crv"),
        kid=kid,
        alg=alg,
        use=use,
        key_ops=key_ops,
        thumbprint=_thumbprint(members),
        members=MappingProxyType(members),
    )


def owner_jwk(value: object, *, error: type[SczError]) -> PublicJwk:
    """Check an owner's JWK: exactly `kty`, `crv`, `x`, `y`, on P-256.

    Raises:
        SczError: The class `error`.
    """
    if not isinstance(value, dict) or set(value) != {"kty", "crv", "x", "y"}:
        raise error("an owner's JWK has exactly kty, crv, x and y")
    key = parse_jwk(value, error=error)
    if key.crv != "P-256":
        raise error("an owner's JWK is on P-256")
    return key


def public_jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The JWK of a P-256, P-384 or P-521 public key: `kty`, `crv`, `x`, `y`.

    Raises:
        KeyInvalid: Another curve.
    """
    for crv, (_, curve, size) in _CURVES.items():
        if isinstance(key.curve, curve):
            numbers = key.public_numbers()
            x, y = (encode_base64url(n.to_bytes(size, "big")) for n in (numbers.x, numbers.y))
            return {"crv": crv, "kty": "EC", "x": x, "y": y}
    raise KeyInvalid(f"no JWK for the curve {key.curve.name}")


def ec_public_key(key: PublicJwk, *, error: type[SczError]) -> ec.EllipticCurvePublicKey:
    """The `cryptography` object of an elliptic-curve JWK.

    Raises:
        SczError: The class `error`: it is an RSA key.
    """
    if key.crv is None:
        raise error("an RSA key stands where an elliptic-curve key is needed")
    x, y = (int.from_bytes(decode_base64url(key.members[n], what=n, error=error), "big") for n in ("x", "y"))
    return ec.EllipticCurvePublicNumbers(x, y, _CURVES[key.crv][1]()).public_key()


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_compact(data: bytes, *, limit_bytes: int, what: str, error: type[SczError]) -> UnverifiedJws:
    """Take a compact JWS apart; nothing is verified.

    Args:
        data: header "." payload "." signature, with no white space and no line feed.
        limit_bytes: More than this is refused unread.
        what: Its name, for messages.
        error: What to raise.

    Raises:
        SczError: The class `error`: too large, not three parts of canonical base64url, a header that is not one strict
            JSON object, or that has `crit` or `b64` (extensions that we do not know change what is signed).
    """
    if len(data) > limit_bytes:
        raise error(f"{what} is larger than {limit_bytes} bytes")
    try:
        parts = data.decode("ascii").split(".")
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not a JWS in compact form") from cause
    if len(parts) != 3:
        raise error(f"{what} is not a JWS in compact form: three parts")
    header, payload, _ = (decode_base64url(part, what=f"{what}: a part", error=error) for part in parts)
    members = parse_object(header, limit_bytes=HEADER_LIMIT_BYTES, what=f"{what}: header", error=error)
    if "crit" in members or "b64" in members:
        raise error(f"{what}: the header has crit or b64, which are not understood here")
    return UnverifiedJws(MappingProxyType(members), payload, data)


def parse_document(data: bytes, *, typ: str, limit_bytes: int, what: str, error: type[SczError]) -> UnverifiedJws:
    """Take one of our own documents apart: its header is exactly `alg` = ES256, `kid`, and `typ` as given.

    The exact `typ` keeps one document from being passed off as another by the same key (RFC 8725, section 3.11).

    Raises:
        SczError: The class `error`, as for `parse_compact`, or another header.
    """
    document = parse_compact(data, limit_bytes=limit_bytes, what=what, error=error)
    fields = Fields(dict(document.unverified_header), what=f"{what}: header", error=error)
    fields.literal("alg", "ES256")
    fields.literal("typ", typ)
    fields.string("kid", pattern="[A-Za-z0-9_-]{43}")
    fields.finish()
    return document


def verify_compact(jws: UnverifiedJws, key: PublicJwk, algorithm: str, *, error: type[SczError]) -> bytes:
    """Verify the signature with one key and one algorithm.

    Args:
        jws: From `parse_compact` or `parse_document`.
        key: The one key that the caller chose.
        algorithm: The one algorithm that the caller accepts; never taken from the header unseen.
        error: What to raise.

    Returns:
        The payload, now verified.

    Raises:
        SczError: The class `error`: the header names another algorithm, the key does not fit it, or the signature is
            not this key's.
    """
    # 1. The algorithm is one of ours, and the header's (RFC 8725, section 3.1).
    if algorithm not in ALGORITHMS or jws.unverified_header.get("alg") != algorithm:
        raise error(f"the header's algorithm is not {shown(algorithm)}")
    # 2. The key is of that algorithm's type and curve, and meant for verifying.
    if not key.fits(algorithm):
        raise error(f"the key is not one for {algorithm}")
    # 3. The signature. A list of one algorithm: as a string, jose would look for a part of it.
    try:
        payload = jose_jws.verify(jws.compact, dict(key.members), [algorithm])
    except _JOSE_RAISES as cause:
        raise error("the signature does not verify") from cause
    # 4. jose split the same bytes at the same places as we did.
    if payload != jws.unverified_payload:
        raise error("the signed payload is not the one that was parsed")
    return payload


# --- writing ----------------------------------------------------------------------------------------------------------


def _sign(
    payload: bytes, header: Mapping[str, str], key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, algorithm: str
) -> bytes:
    if algorithm not in ALGORITHMS:
        raise KeyInvalid(f"{shown(algorithm)} is not one of {', '.join(sorted(ALGORITHMS))}")
    prepared: type[CryptographyECKey | CryptographyRSAKey]
    if isinstance(key, rsa.RSAPrivateKey):
        fits, prepared = algorithm.startswith("RS") and key.key_size >= RSA_BITS_LOW, CryptographyRSAKey
    else:
        fits = any(isinstance(key.curve, curve) and name == algorithm for name, curve, _ in _CURVES.values())
        prepared = CryptographyECKey
    if not fits:
        raise KeyInvalid(f"the key is not one for {algorithm}")
    try:
        return jose_jws.sign(payload, prepared(key, algorithm), headers=header, algorithm=algorithm).encode("ascii")
    except _JOSE_RAISES as cause:
        raise KeyInvalid(f"the key cannot sign with {algorithm}") from cause


def sign_compact(payload: bytes, *, typ: str, kid: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign one of our own documents with ES256.

    Args:
        payload: The bytes to sign.
        typ: The document's type, for the header.
        kid: The owner id, for the header.
        key: A P-256 key.

    Raises:
        KeyInvalid: Not a P-256 key.
    """
    return _sign(payload, {"kid": kid, "typ": typ}, key, "ES256")


def sign_token(
    claims: Mapping[str, object], *, kid: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, algorithm: str
) -> bytes:
    """Sign a JWT (`typ` JWT), as `sczctl token issue` does.

    Raises:
        KeyInvalid: The algorithm is not one of ours, or the key does not fit it.
    """
    return _sign(canonical(dict(claims)), {"kid": kid, "typ": "JWT"}, key, algorithm)
