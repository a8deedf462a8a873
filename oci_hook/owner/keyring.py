"""The owner's three keys: made, kept in PKCS#8 PEM under a passphrase, opened; content keys sealed to one of them.

The manifest key signs manifests and grants, the boot-policy key boot policies, the recovery key opens content keys. The
rest of the owner's folder is `records`. Specification: docs/specification.md, "Owner"; RFC 5958 (PKCS#8), 9180 (HPKE).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from oci_hook.bundle.files import NewFolder, closing, create_file, open_beneath, read_bounded, refusal
from oci_hook.bundle.segments import KEY_BYTES, ContentKey
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import FileUnreadable, KeyInvalid, TrustInvalid
from oci_hook.jws import PublicJwk, ec_public_key, owner_jwk, public_jwk
from oci_hook.owner.grant_batch import load_grants
from oci_hook.trust import NAME, NAME_LIMIT, OWNER_LIMIT_BYTES, Owner, parse_owner

__all__ = [
    "Keyring",
    "create_keyring",
    "load_grants",
    "load_owner",
    "open_content_key",
    "open_keyring",
    "seal_content_key",
]

OWNER_FILE = "owner.json"
STRETCH_FILE = "passphrase.json"
KEY_FILES = {"manifest_key": "manifest.key", "boot_policy_key": "boot-policy.key", "recovery_key": "recovery.key"}
SEALED_BYTES = 65 + KEY_BYTES + 16  # HPKE's enc (an uncompressed P-256 point), the key, the tag
_PEM_LIMIT_BYTES = 16 * 1024
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
_SALT_BYTES = 16
_SCRYPT_N = 1 << 17  # OWASP's recommendation with r = 8, p = 1
_STRETCH_SCHEMA = "scz-smm/passphrase/v1"
_HPKE_LABEL = b"scz-smm/content-key/v1"


@dataclass(frozen=True, slots=True)
class Keyring:
    """An owner's folder, opened: the public half and the three private keys."""

    folder: Path
    owner: Owner
    manifest_key: ec.EllipticCurvePrivateKey = field(repr=False)
    boot_policy_key: ec.EllipticCurvePrivateKey = field(repr=False)
    recovery_key: ec.EllipticCurvePrivateKey = field(repr=False)


def create_keyring(folder: Path, name: str, passphrase: str | None) -> Owner:
    """Make an owner's folder with three new P-256 keys; it appears whole or not at all.

    Args:
        folder: Its parent exists, it does not. Mode 0700, the keys 0600.
        name: The owner's name.
        passphrase: Encrypts the private keys; None leaves them in clear, and is said aloud by the caller.

    Raises:
        OutputExists: The folder is there; keys are never overwritten.
        KeyInvalid: A bad name, or a passphrase that is empty or over 1023 bytes.
        FileUnreadable: The system said no.
    """
    if not re.fullmatch(NAME, name) or len(name) > NAME_LIMIT:
        raise KeyInvalid(f"{shown(name)} is not an owner's name: lower-case letters, digits, and . _ - between them")
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in KEY_FILES}
    public = {role: public_jwk(key.public_key()) for role, key in keys.items()}
    document = canonical({"schema": "scz-smm/owner/v1", "name": name, **public})
    owner = parse_owner(document)
    write_key_folder(folder, {KEY_FILES[role]: key for role, key in keys.items()}, {OWNER_FILE: document}, passphrase)
    return owner


def write_key_folder(
    folder: Path,
    keys: Mapping[str, ec.EllipticCurvePrivateKey],
    documents: Mapping[str, bytes],
    passphrase: str | None,
) -> None:
    """Make a folder of private keys, 0600, and public documents, 0644, with what its passphrase is stretched by.

    Raises:
        OutputExists: The folder is there.
        KeyInvalid: A passphrase that is empty or over 1023 bytes.
        FileUnreadable: The system said no.
    """
    stretch = _Stretch(os.urandom(_SALT_BYTES))
    encryption = _encryption(passphrase, stretch)
    try:
        with NewFolder(folder) as new:
            for name, key in keys.items():
                pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
                create_file(new.partial / name, pem, mode=0o600)
            for name, document in documents.items():
                create_file(new.partial / name, document, mode=0o644)
            create_file(new.partial / STRETCH_FILE, stretch.document(), mode=0o600)
            new.publish(mode=0o700)
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or folder)}: {cause.strerror}") from cause


@dataclass(frozen=True, slots=True)
class _Stretch:
    """How a passphrase becomes the password of the PEM files: scrypt (RFC 7914), 128 MiB and about half a second.

    PKCS#8's own derivation, as the library writes it, is 2048 rounds of PBKDF2: cheap to guess from a stolen stick.
    """

    salt: bytes

    def document(self) -> bytes:
        return canonical(
            {"schema": _STRETCH_SCHEMA, "kdf": "scrypt", "n": _SCRYPT_N, "r": 8, "p": 1, "salt": self.salt.hex()}
        )

    def password(self, passphrase: str) -> bytes:
        """The PEM files' password: 64 hexadecimal digits."""
        secret = Scrypt(salt=self.salt, length=32, n=_SCRYPT_N, r=8, p=1).derive(_passphrase_bytes(passphrase))
        return secret.hex().encode()


def _load_stretch(folder: Path) -> _Stretch:
    data = _read(folder, STRETCH_FILE, _PEM_LIMIT_BYTES, private=True)
    fields = Fields(
        parse_object(data, limit_bytes=_PEM_LIMIT_BYTES, what=STRETCH_FILE, error=KeyInvalid),
        what=STRETCH_FILE,
        error=KeyInvalid,
    )
    fields.literal("schema", _STRETCH_SCHEMA)
    fields.literal("kdf", "scrypt")
    for name, value in (("n", _SCRYPT_N), ("r", 8), ("p", 1)):
        fields.integer(name, low=value, high=value)
    stretch = _Stretch(fields.hexadecimal("salt", low=_SALT_BYTES, high=_SALT_BYTES))
    fields.finish()
    return stretch


def _encryption(passphrase: str | None, stretch: _Stretch) -> serialization.KeySerializationEncryption:
    if passphrase is None:
        return serialization.NoEncryption()
    return serialization.BestAvailableEncryption(stretch.password(passphrase))


def _passphrase_bytes(passphrase: str) -> bytes:
    data = passphrase.encode("utf-8", "surrogateescape")  # a terminal's bytes, whatever they are
    if not 0 < len(data) < 1024:
        raise KeyInvalid("the passphrase is empty or longer than 1023 bytes")
    return data


def load_owner(folder: Path) -> Owner:
    """The public half of an owner's folder; no passphrase is needed.

    Raises:
        KeyInvalid: Not an owner's folder.
        FileUnreadable: The system said no.
    """
    try:
        return parse_owner(_read(folder, OWNER_FILE, OWNER_LIMIT_BYTES))
    except TrustInvalid as cause:
        raise KeyInvalid(f"{shown(folder)}: {cause.message}") from cause


def open_keyring(folder: Path, passphrase_source: Callable[[], str]) -> Keyring:
    """Open an owner's folder with its private keys.

    Args:
        folder: As `create_keyring` made it.
        passphrase_source: Asked once, and only if a key is encrypted.

    Raises:
        KeyInvalid: A wrong passphrase, a key file that others may read, that is malformed, or not of `owner.json`.
        FileUnreadable: The system said no.
    """
    owner = load_owner(folder)
    pems = {role: _read(folder, name, _PEM_LIMIT_BYTES, private=True) for role, name in KEY_FILES.items()}
    encrypted = any(pem.lstrip().startswith(_ENCRYPTED) for pem in pems.values())
    passphrase = _load_stretch(folder).password(passphrase_source()) if encrypted else None

    def key(role: str, expected: PublicJwk) -> ec.EllipticCurvePrivateKey:
        return _load_key(pems[role], passphrase, expected, KEY_FILES[role])

    return Keyring(
        folder=folder,
        owner=owner,
        manifest_key=key("manifest_key", owner.manifest_key),
        boot_policy_key=key("boot_policy_key", owner.boot_policy_key),
        recovery_key=key("recovery_key", owner.recovery_key),
    )


def open_key_file(path: Path, passphrase_source: Callable[[], str]) -> ec.EllipticCurvePrivateKey:
    """One private key as `write_key_folder` writes it; its `passphrase.json` lies beside it.

    Args:
        path: Of the PEM file.
        passphrase_source: Asked once, and only if the key is encrypted.

    Raises:
        KeyInvalid: A wrong passphrase, a file that others may read, or not a P-256 key.
        FileUnreadable: The system said no.
    """
    pem = _read(path.parent, path.name, _PEM_LIMIT_BYTES, private=True)
    encrypted = pem.lstrip().startswith(_ENCRYPTED)
    return _parse_key(pem, _load_stretch(path.parent).password(passphrase_source()) if encrypted else None, path.name)


def _load_key(pem: bytes, passphrase: bytes | None, expected: PublicJwk, name: str) -> ec.EllipticCurvePrivateKey:
    key = _parse_key(pem, passphrase, name)
    if owner_jwk(public_jwk(key.public_key()), error=KeyInvalid).thumbprint != expected.thumbprint:
        raise KeyInvalid(f"{name} is not the key that {OWNER_FILE} names")
    return key


def _parse_key(pem: bytes, passphrase: bytes | None, name: str) -> ec.EllipticCurvePrivateKey:
    used = passphrase if pem.lstrip().startswith(_ENCRYPTED) else None
    try:
        key = serialization.load_pem_private_key(pem, used)
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        raise KeyInvalid(f"{name} cannot be opened: a wrong passphrase, or not a PKCS#8 key") from cause
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyInvalid(f"{name} is not an elliptic-curve key")
    owner_jwk(public_jwk(key.public_key()), error=KeyInvalid)  # on P-256
    return key


def _read(folder: Path, name: str, limit_bytes: int, *, private: bool = False) -> bytes:
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as cause:
        raise refusal(cause, f"the owner's folder {shown(folder)}", KeyInvalid) from cause
    with closing(directory), closing(open_beneath(directory, (name,), error=KeyInvalid)) as descriptor:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if private and mode & 0o077:
            path = shown(folder / name)
            raise KeyInvalid(f"{path} may be read by others (mode {mode:04o})", remedy=f"chmod 600 {path}")
        return read_bounded(descriptor, limit_bytes, name, error=KeyInvalid)


# --- content keys -----------------------------------------------------------------------------------------------------


def _suite() -> Suite:
    return Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(label: bytes, manifest_digest: str) -> bytes:
    return label + b"\0" + manifest_digest.encode()


def seal_content_key(content_key: ContentKey, *, manifest_digest: str, owner: Owner) -> bytes:
    """Seal a content key to the owner's recovery key, bound to one manifest; 113 bytes, enc ‖ ciphertext."""
    return seal_to(content_key, owner.recovery_key, manifest_digest=manifest_digest, label=_HPKE_LABEL)


def seal_to(content_key: ContentKey, recipient: PublicJwk, *, manifest_digest: str, label: bytes) -> bytes:
    """Seal a content key to a P-256 key by HPKE; the label says what for, and keeps one use from another."""
    public = ec_public_key(recipient, error=KeyInvalid)
    return _suite().encrypt(content_key.value, public, _info(label, manifest_digest))


def open_content_key(sealed: bytes, *, manifest_digest: str, recovery_key: ec.EllipticCurvePrivateKey) -> ContentKey:
    """Open a content key that `seal_content_key` sealed.

    Raises:
        KeyInvalid: Another owner's, another manifest's, or changed.
    """
    return open_sealed(sealed, recovery_key, manifest_digest=manifest_digest, label=_HPKE_LABEL)


def open_sealed(sealed: bytes, key: ec.EllipticCurvePrivateKey, *, manifest_digest: str, label: bytes) -> ContentKey:
    """Open what `seal_to` sealed.

    Raises:
        KeyInvalid: To another key, for another manifest or use, or changed.
    """
    try:
        value = _suite().decrypt(sealed, key, _info(label, manifest_digest))
    except (InvalidTag, ValueError) as cause:
        raise KeyInvalid("the sealed content key does not open: another owner's or another manifest's") from cause
    if len(sealed) != SEALED_BYTES or len(value) != KEY_BYTES:
        raise KeyInvalid("the sealed content key has the wrong length")
    return ContentKey(value)
