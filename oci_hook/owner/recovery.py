"""The offline recovery key: a second recipient of each content key, whose private half is kept away from the owner.

An owner names it once; `pack` then seals a copy of the content key to it, into the bundle's image manifest, where it
travels with the bundle through any registry. With the private half a version's key comes back into the owner's folder,
or the bundle is decrypted. No TPM and no boot policy stand before it: whoever has that key opens all these bundles.
Specification: docs/specification.md, "Owner" and "Model bundle"; RFC 9180 (HPKE).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.bundle.files import CREATE, NewFolder, closing, read_bounded, write_all
from oci_hook.bundle.image import IMAGE_MANIFEST_LIMIT_BYTES, parse_recovery_copy, recovery_annotations
from oci_hook.bundle.layout import Layout
from oci_hook.bundle.manifest import FileEntry, Manifest
from oci_hook.bundle.segments import ContentKey, associated_data, decrypt_stream
from oci_hook.disk_space import Need, block_bytes, full_disk_explained, verify_room
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import BundleInvalid, FileUnreadable, KeyInvalid
from oci_hook.jws import PublicJwk, owner_jwk, parse_document, public_jwk, sign_compact, verify_compact
from oci_hook.owner.keyring import Keyring, open_sealed, seal_content_key, seal_to, write_key_folder
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from oci_hook.trust import NAME, NAME_LIMIT, Owner
from oci_hook.trusted_file import load_file, replace_file

RECIPIENT_FILE: Final = "recovery.json"
RECOVERY_KEY_FILE: Final = "recovery.key"
NAMED_FILE: Final = "recipient.jwt"  # in the owner's folder
_SCHEMA: Final = "scz-smm/recovery-recipient/v1"
_TYP: Final = "scz-smm-recovery-recipient+jwt"
_LABEL: Final = b"scz-smm/recovery-copy/v1"
_LIMIT_BYTES: Final = 16 << 10
_REMEDY: Final = "free {size} on {mount}, or give another --output (`df -h {mount}`)"


@dataclass(frozen=True, slots=True)
class Recipient:
    """The public half of an offline recovery key, and the name that its owner gave it."""

    name: str
    key: PublicJwk

    def document(self) -> bytes:
        """The file `recovery.json`."""
        return canonical({"schema": _SCHEMA, "name": self.name, "key": dict(self.key.members)})


def parse_recipient(data: bytes) -> Recipient:
    """Parse a `recovery.json`, at most 16 KiB.

    Raises:
        KeyInvalid: Malformed, or not a P-256 key.
    """
    what = "recovery key's public file"
    document = parse_object(data, limit_bytes=_LIMIT_BYTES, what=what, error=KeyInvalid)
    fields = Fields(document, what=what, error=KeyInvalid)
    fields.literal("schema", _SCHEMA)
    recipient = Recipient(
        fields.string("name", pattern=NAME, limit=NAME_LIMIT), owner_jwk(fields.take("key"), error=KeyInvalid)
    )
    fields.finish()
    return recipient


def create_recovery_key(folder: Path, name: str, passphrase: str | None) -> Recipient:
    """Make a folder with a recovery key and its public file; it appears whole or not at all.

    Args:
        folder: Its parent exists, it does not. Mode 0700, the private key 0600.
        name: What the key is called.
        passphrase: Encrypts the private key; None leaves it in clear.

    Raises:
        OutputExists: The folder is there.
        KeyInvalid: A bad name or passphrase.
        FileUnreadable: The system said no.
    """
    if not re.fullmatch(NAME, name) or len(name) > NAME_LIMIT:
        raise KeyInvalid(f"{shown(name)} is not a name: lower-case letters, digits, and . _ - between them")
    key = ec.generate_private_key(ec.SECP256R1())
    recipient = Recipient(name, owner_jwk(public_jwk(key.public_key()), error=KeyInvalid))
    write_key_folder(folder, {RECOVERY_KEY_FILE: key}, {RECIPIENT_FILE: recipient.document()}, passphrase)
    return recipient


# --- the owner's side -------------------------------------------------------------------------------------------------


def name_recipient(keyring: Keyring, recipient: Recipient) -> None:
    """Let everything that is packed from now on be recoverable with that key; one that was named before is replaced.

    It is signed: who can write the owner's folder, and has no key of it, must not name a key of their own.

    Raises:
        KeyInvalid: It is one of the owner's own keys: it would be lost with them.
        FileUnreadable: The system said no.
    """
    owner = keyring.owner
    if recipient.key.thumbprint in {
        key.thumbprint for key in (owner.manifest_key, owner.boot_policy_key, owner.recovery_key)
    }:
        raise KeyInvalid(
            "that is a key of the owner's folder, and would be lost with it", remedy="`sczctl keygen --recovery-only`"
        )
    compact = sign_compact(recipient.document(), typ=_TYP, kid=owner.owner_id, key=keyring.manifest_key)
    replace_file(str(keyring.folder / NAMED_FILE), compact)


def load_recipient(folder: Path, owner: Owner) -> Recipient | None:
    """The recovery key that an owner named; None: there is none.

    Raises:
        KeyInvalid: The file is not signed by the owner, or malformed.
        FileUnreadable: The system said no.
    """
    path = str(folder / NAMED_FILE)
    if not os.path.lexists(path):
        return None
    what = f"{NAMED_FILE} of the owner's folder"
    try:
        data = load_file(path, limit_bytes=_LIMIT_BYTES, error=KeyInvalid)
        jws = parse_document(data, typ=_TYP, limit_bytes=_LIMIT_BYTES, what=what, error=KeyInvalid)
        return parse_recipient(verify_compact(jws, owner.manifest_key, "ES256", error=KeyInvalid))
    except KeyInvalid as cause:
        raise KeyInvalid(
            f"{what}: {cause.message}", remedy="name the offline recovery key anew: `sczctl keygen --recovery-key`"
        ) from cause


def recovery_copy(content_key: ContentKey, manifest_digest: str, recipient: Recipient) -> dict[str, str]:
    """The annotations of a bundle's image manifest that carry its content key, sealed to the recovery key."""
    sealed = seal_to(content_key, recipient.key, manifest_digest=manifest_digest, label=_LABEL)
    return recovery_annotations(recipient.key.thumbprint, sealed)


# --- recovering -------------------------------------------------------------------------------------------------------


def load_recovery_copy(layout: Layout) -> tuple[str, bytes] | None:
    """The recovery key's thumbprint and the sealed copy that a bundle carries; None: it carries none.

    Raises:
        BundleInvalid: Malformed.
    """
    with closing(layout.open_blob(layout.image_digest)) as descriptor:
        return parse_recovery_copy(
            read_bounded(descriptor, IMAGE_MANIFEST_LIMIT_BYTES, "the image manifest", error=BundleInvalid)
        )


def recover_content_key(layout: Layout, manifest: Manifest, key: ec.EllipticCurvePrivateKey) -> ContentKey:
    """Open a bundle's recovery copy, and see that it opens the bundle: the copy itself is not signed.

    Args:
        layout: Verified against `manifest`.
        manifest: Verified.
        key: The recovery key's private half.

    Raises:
        KeyInvalid: There is no copy, it is for another key, or was changed.
        DecryptionRefused: It opens, but its content key is not the bundle's.
    """
    copy = load_recovery_copy(layout)
    if copy is None:
        raise KeyInvalid(
            "the bundle carries no recovery copy: its owner had named no offline recovery key",
            remedy="restore the owner's folder from its backup, or pack the model again from its source",
        )
    thumbprint, sealed = copy
    if owner_jwk(public_jwk(key.public_key()), error=KeyInvalid).thumbprint != thumbprint:
        raise KeyInvalid(
            f"the bundle's recovery copy is sealed to another key (thumbprint {thumbprint})",
            remedy="give the recovery key that was named when the version was packed",
        )
    content_key = open_sealed(sealed, key, manifest_digest=manifest.digest, label=_LABEL)
    smallest = min(manifest.files, key=lambda file: file.size)
    _decrypt(layout, manifest, smallest, content_key, lambda _piece: None)
    return content_key


def restore_record(folder: Path, owner: Owner, layout: Layout, manifest: Manifest, content_key: ContentKey) -> None:
    """Put a version's content key back into the owner's folder, so that it can be granted again.

    Raises:
        OutputExists: The folder has the version's key.
        FileUnreadable: The system said no.
    """
    sealed = seal_content_key(content_key, manifest_digest=manifest.digest, owner=owner)
    OwnerRecords(folder).save_content_key(
        ContentKeyRecord(manifest.model, manifest.digest, layout.image_digest, sealed, manifest.access.broker)
    )


def decrypt_bundle(
    layout: Layout, manifest: Manifest, content_key: ContentKey, output: Path, progress: Callable[[int], object]
) -> None:
    """Decrypt a bundle into a new folder (0700, files 0600), which appears whole or not at all.

    Args:
        layout: Verified against `manifest`.
        manifest: Verified.
        content_key: The bundle's.
        output: Its parent exists, it does not. Plaintext: it should lie in memory, or on an encrypted disk.
        progress: Called with the bytes of plaintext done so far.

    Raises:
        OutputExists: Something is there.
        DecryptionRefused: A file does not authenticate; nothing is left.
        FileUnreadable: The system said no; the disk has no room.
    """
    folder, done = Path(os.path.abspath(output)).parent, 0

    def need() -> Need:
        return Need.of([file.size for file in manifest.files], block_bytes(str(folder)), _REMEDY)

    try:
        with full_disk_explained(str(folder), need), NewFolder(output) as new:
            verify_room(str(folder), need())
            for file in manifest.files:
                path = new.partial / file.path
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with closing(os.open(path, CREATE, 0o600)) as descriptor:

                    def write(piece: memoryview, descriptor: int = descriptor) -> None:
                        nonlocal done
                        write_all(descriptor, piece)
                        done += len(piece)
                        progress(done)

                    _decrypt(layout, manifest, file, content_key, write)
                    os.fsync(descriptor)
            new.publish(mode=0o700)
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or output)}: {cause.strerror}") from cause


def _decrypt(
    layout: Layout,
    manifest: Manifest,
    file: FileEntry,
    content_key: ContentKey,
    write: Callable[[memoryview], None],
) -> None:
    with os.fdopen(layout.open_blob(file.layer_digest), "rb", buffering=0) as blob:
        decrypt_stream(
            blob.read,
            write,
            content_key=content_key,
            associated_data=associated_data(manifest.model, file.path),
            ciphertext_bytes=file.layer_size,
            plaintext_bytes=file.size,
        )
