"""A key that signs attestation results: P-256, made at first use, its own public half always beside it as a JWK.

It is a key of its own, in software. The TPM's attestation key cannot do it: it is restricted to what the TPM made.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from oci_hook.bundle.files import save_new_file
from oci_hook.documents import canonical, parse_object
from oci_hook.errors import KeyInvalid, OutputExists, SczError
from oci_hook.jws import PublicJwk, parse_jwk, public_jwk
from oci_hook.trusted_file import load_file, load_root_file, replace_file

_LIMIT_BYTES = 16 << 10


def signing_key(path: str, *, only_root: bool = False) -> ec.EllipticCurvePrivateKey:
    """The key of a file, which is made where there is none; `<path>.jwk` beside it is written if it is not the key's.

    Args:
        path: PEM (PKCS #8), mode 0600; its folder exists.
        only_root: Refuse a file that others than root could have written.

    Raises:
        KeyInvalid: The file is not a P-256 private key, or others may read or write it.
        FileUnreadable: It cannot be read or written.
    """
    if not os.path.lexists(path):
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with contextlib.suppress(OutputExists):  # another was faster: then it is that one's
            save_new_file(Path(path), pem, mode=0o600)
    read = load_root_file if only_root else load_file
    try:
        key = load_pem_private_key(read(path, limit_bytes=_LIMIT_BYTES, error=KeyInvalid, is_secret=True), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        raise KeyInvalid(f"{path} is not a private key without a passphrase") from cause
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyInvalid(f"{path} is not a key on P-256")
    public = canonical(public_jwk(key.public_key()))
    if _jwk_beside(path) != public:
        replace_file(f"{os.path.abspath(path)}.jwk", public, mode=0o644)
    return key


def _jwk_beside(path: str) -> bytes | None:
    """What lies there: of the key that was in the file before, perhaps; None: nothing that can be read."""
    try:
        return load_file(f"{path}.jwk", limit_bytes=_LIMIT_BYTES, error=KeyInvalid)
    except SczError:
        return None


def parse_public_key(data: bytes) -> PublicJwk:
    """A public key in a file: a JWK, or an elliptic-curve key in PEM.

    Raises:
        KeyInvalid: Neither.
    """
    if data.lstrip()[:1] == b"{":
        return parse_jwk(
            parse_object(data, limit_bytes=_LIMIT_BYTES, what="public key", error=KeyInvalid), error=KeyInvalid
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise KeyInvalid("the public key is neither a JWK nor PEM") from cause
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise KeyInvalid("the public key is not on an elliptic curve")
    return parse_jwk(public_jwk(key), error=KeyInvalid)
