"""What the token vectors are made of: fresh keys, signatures by `cryptography` alone, good claims, policy and issuer.

Nothing of the code under test is used here, so that a fault of its signing could not hide one of its verifying.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

NOW = 1_800_000_000
LEEWAY = 5
AGE = 3600
ISSUER = "https://issuer.example"
CLUSTER = "https://kubernetes.default.svc.cluster.local"
DOMAIN = "spiffe://example.org"
AUDIENCE = "scz-smm"
SUBJECT = "workload-a"
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
POD_UID = "5b1f1d57-7a5e-4c0b-9d3e-0c3f5d7a9b11"

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


@dataclass(frozen=True)
class Key:
    """A private key with the kid under which its issuer publishes it."""

    private: PrivateKey
    kid: str

    def jwk(self, **members: object) -> dict[str, Any]:
        public = self.private.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            numbers = public.public_numbers()
            own = {"kty": "RSA", "n": b64(integer(numbers.n)), "e": b64(integer(numbers.e))}
        else:
            point = public.public_numbers()
            size = (public.key_size + 7) // 8
            crv = {256: "P-256", 384: "P-384", 521: "P-521"}[public.key_size]
            own = {
                "kty": "EC",
                "crv": crv,
                "x": b64(point.x.to_bytes(size, "big")),
                "y": b64(point.y.to_bytes(size, "big")),
            }
        return {**own, "kid": self.kid, **members}

    def thumbprint(self) -> str:
        members = {name: value for name, value in self.jwk().items() if name != "kid"}
        return b64(hashlib.sha256(json.dumps(members, sort_keys=True, separators=(",", ":")).encode()).digest())


def integer(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def respelled_es256(raw: bytes) -> str:
    """(r, n − s), which verifies whenever (r, s) does."""
    return b64(raw[:32] + (P256_ORDER - int.from_bytes(raw[32:], "big")).to_bytes(32, "big"))


class Keys:
    """Fresh keys; `set_of` is the JWK set of the issuer that most vectors use, of mixed types."""

    def __init__(self) -> None:
        self.rsa = Key(rsa.generate_private_key(65537, 2048), "rsa-1")
        self.other_rsa = Key(rsa.generate_private_key(65537, 2048), "rsa-2")
        self.weak_rsa = Key(rsa.generate_private_key(65537, 1024), "rsa-1")
        self.ec = Key(ec.generate_private_key(ec.SECP256R1()), "ec-1")
        self.other_ec = Key(ec.generate_private_key(ec.SECP256R1()), "ec-2")
        self.ec384 = Key(ec.generate_private_key(ec.SECP384R1()), "ec-384")
        self.ec521 = Key(ec.generate_private_key(ec.SECP521R1()), "ec-521")
        self.attacker = Key(ec.generate_private_key(ec.SECP256R1()), "ec-1")
        self.edwards = ed25519.Ed25519PrivateKey.generate()

    def mixed(self) -> list[dict[str, Any]]:
        return [key.jwk() for key in (self.rsa, self.ec, self.ec384, self.ec521)]


def signature(signing_input: bytes, key: Key, algorithm: str) -> bytes:
    """As RFC 7518, sections 3.3 and 3.4."""
    digest = HASHES[algorithm[2:]]
    if isinstance(key.private, rsa.RSAPrivateKey):
        return key.private.sign(signing_input, padding.PKCS1v15(), digest)
    r, s = decode_dss_signature(key.private.sign(signing_input, ec.ECDSA(digest)))
    size = (key.private.key_size + 7) // 8
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def signed(header: bytes, payload: bytes, key: Key, algorithm: str) -> str:
    """A token of raw header and payload bytes."""
    start = f"{b64(header)}.{b64(payload)}"
    return f"{start}.{b64(signature(start.encode(), key, algorithm))}"


def claims(**changes: object) -> dict[str, Any]:
    """Good claims with changes; the value `...` removes one."""
    base: dict[str, Any] = {"iss": ISSUER, "sub": SUBJECT, "aud": AUDIENCE, "iat": NOW - 60, "exp": NOW + 540}
    return {name: value for name, value in {**base, **changes}.items() if value is not ...}


def raw_claims(**texts: str) -> bytes:
    """Good claims of which some are given as JSON text, so that it may be text that no encoder writes."""
    members = {name: json.dumps(value) for name, value in claims().items()} | texts
    return ("{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in members.items()) + "}").encode()


def identity(**changes: object) -> dict[str, Any]:
    return {"issuer": ISSUER, "audience": AUDIENCE, "subjects": [SUBJECT], **changes}


def policy(*identities: dict[str, Any]) -> dict[str, Any]:
    return {"identities": list(identities) or [identity()], "token_age_seconds": AGE, "share": False}


def trusted(
    keys: list[dict[str, Any]], *, issuer: str = ISSUER, kind: str = "oidc", name: str = "main"
) -> dict[str, Any]:
    return {"schema": "scz-smm/issuer/v1", "name": name, "issuer": issuer, "type": kind, "jwks": {"keys": keys}}


RFC7515_A2_MODULUS = (
    "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgN"
    "MsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xs"
    "mtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
)
RFC7515_A2_SIGNATURE = (
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1d"
    "nZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwu"
    "sC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
)
RFC7515_A3_SIGNATURE = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
