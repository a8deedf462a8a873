"""Project Wycheproof's vectors, through what we call: AES-256-GCM, HKDF-SHA-256, ECDSA P-256, RS256 and JWS.

Known attacks on implementations: edge cases of the arithmetic, malformed and malleable signatures, padding of PKCS #1,
confusion of algorithms. Where a library stands between, our own module is called, not the library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jose.backends.cryptography_backend import CryptographyECKey, CryptographyRSAKey

from oci_hook.attestation.attest import verify_attest_signature
from oci_hook.attestation.structures import (
    ALG_ECDSA,
    ALG_SHA256,
    ecdsa_signing_public,
    parse_public,
    tpm2b,
)
from oci_hook.errors import DeviceInvalid, EvidenceRefused, SczError, TokenMalformed, TokenSignatureRefused
from oci_hook.jws import ALGORITHMS, ec_public_key, parse_compact, parse_jwk, verify_compact

FOLDER = Path(__file__).parents[1] / "vectors" / "wycheproof"
Vector = dict[str, Any]

#: Short r and s without the leading zeros that r ‖ s must have; a TPM's form has a size for each, so it needs none.
OTHER_SIZE = "incorrect size of signature"


def groups(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())
    return loaded


def vectors(name: str) -> Iterator[tuple[dict[str, Any], Vector]]:
    for group in groups(name):
        for vector in group["tests"]:
            yield group, vector


def of(vector: Vector, *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def test_aes_gcm() -> None:
    """Decryption as `bundle.segments` does it, into a buffer."""
    seen = {"valid": 0, "invalid": 0}
    for _, vector in vectors("aes_gcm_test"):
        key, nonce, aad, plain, cipher, tag = of(vector, "key", "iv", "aad", "msg", "ct", "tag")
        opened = bytearray(len(plain))
        seen[vector["result"]] += 1
        if vector["result"] == "valid":
            AESGCM(key).decrypt_into(nonce, cipher + tag, aad or None, opened)
            assert bytes(opened) == plain, vector["tcId"]
            assert AESGCM(key).encrypt(nonce, plain, aad or None) == cipher + tag, vector["tcId"]
        else:
            with pytest.raises(InvalidTag):
                AESGCM(key).decrypt_into(nonce, cipher + tag, aad or None, opened)
    assert min(seen.values()) > 20


def test_hkdf_sha256() -> None:
    seen = {"valid": 0, "invalid": 0}
    for _, vector in vectors("hkdf_sha256_test"):
        material, salt, info, wanted = of(vector, "ikm", "salt", "info", "okm")
        seen[vector["result"]] += 1
        if vector["result"] == "valid":
            derived = HKDF(algorithm=SHA256(), length=vector["size"], salt=salt or None, info=info).derive(material)
            assert derived == wanted, vector["tcId"]
        else:  # more than 255 blocks
            with pytest.raises(ValueError, match="Cannot derive keys larger"):
                HKDF(algorithm=SHA256(), length=vector["size"], salt=salt or None, info=info)
    assert seen["valid"] > 80
    assert seen["invalid"] > 0


def tpm_signature(signature: bytes) -> bytes:
    """r ‖ s as a TPMT_SIGNATURE: ECDSA with SHA-256."""
    half = len(signature) // 2
    head = ALG_ECDSA.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
    return head + tpm2b(signature[:half]) + tpm2b(signature[half:])


def test_ecdsa_p256() -> None:
    """As the verifier of quotes has it, and as that of JWS has it."""
    seen = {"valid": 0, "invalid": 0}
    for group, vector in vectors("ecdsa_secp256r1_sha256_p1363_test"):
        jwk = parse_jwk(group["jwk"], error=TokenMalformed)
        public: ec.EllipticCurvePublicKey = ec_public_key(jwk, error=TokenMalformed)
        ak = parse_public(tpm2b(ecdsa_signing_public(public)), what="a vector's key", error=DeviceInvalid)
        message, signature = of(vector, "msg", "sig")
        seen[vector["result"]] += 1
        theirs = CryptographyECKey(dict(jwk.members), "ES256")
        if vector["result"] == "valid" or vector["comment"] == OTHER_SIZE:
            verify_attest_signature(message, tpm_signature(signature), ak, error=EvidenceRefused)
        else:
            with pytest.raises(EvidenceRefused):
                verify_attest_signature(message, tpm_signature(signature), ak, error=EvidenceRefused)
        assert theirs.verify(message, signature) is (vector["result"] == "valid"), vector["tcId"]
    assert min(seen.values()) > 80


def test_rsa_pkcs1() -> None:
    """The key that `jws` hands to jose; "acceptable" is a padding without its NULL, which must not be accepted."""
    seen = {"valid": 0, "invalid": 0, "acceptable": 0}
    for group, vector in vectors("rsa_signature_2048_sha256_test"):
        jwk = parse_jwk(group["jwk"], error=TokenMalformed)
        message, signature = of(vector, "msg", "sig")
        seen[vector["result"]] += 1
        key = CryptographyRSAKey(dict(jwk.members), "RS256")
        assert key.verify(message, signature) is (vector["result"] == "valid"), vector["tcId"]
    assert seen["valid"] > 5
    assert seen["invalid"] > 200


def verified(group: dict[str, Any], vector: Vector) -> bytes:
    """What a token goes through: parsed strictly, one key, one algorithm that the key is for."""
    jws = parse_compact(vector["jws"].encode(), limit_bytes=16384, what="a vector", error=TokenMalformed)
    key = parse_jwk(group["jwk"], error=TokenMalformed)
    algorithm = jws.unverified_header.get("alg")
    return verify_compact(jws, key, str(algorithm), error=TokenSignatureRefused)


def test_json_web_signatures() -> None:
    """Whatever Wycheproof calls invalid is refused; what it calls valid is read if its algorithm is one of ours."""
    read = 0
    for group, vector in vectors("json_web_signature_test"):
        ours = group["jwk"].get("alg") in ALGORITHMS
        if vector["result"] == "valid" and ours:
            verified(group, vector)
            read += 1
            continue
        if isinstance(vector["jws"], str):
            with pytest.raises(SczError) as refused:
                verified(group, vector)
            assert isinstance(refused.value, TokenMalformed | TokenSignatureRefused), (vector["tcId"], refused.value)
    assert read > 15
