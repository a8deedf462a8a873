"""The manifest: the owner's signed list of a model's files, with its access policy and free fields.

Pure. The signature is verified before the payload is read; `verify_manifest` is the only way to a `Manifest`. Whether
the layers are the listed ones is for `layout` to check. Specification: docs/specification.md, "Manifest".
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import TIME_HIGH, AccessPolicy, access_policy_document, parse_access_policy
from oci_hook.bundle.model import PATH_LIMIT_BYTES, ModelId, parse_model_id, verify_path
from oci_hook.bundle.segments import FILE_LIMIT_BYTES, ciphertext_size
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import BundleInvalid, KeyInvalid, OwnerUntrusted, SczError, SourceInvalid
from oci_hook.jws import UnverifiedJws, owner_jwk, parse_document, public_jwk, sign_compact, verify_compact
from oci_hook.trust import Owner

MANIFEST_TYP = "scz-smm-manifest+jwt"
MANIFEST_LIMIT_BYTES = 8 * 2**20
FILES_LIMIT = 10_000
FIELDS_LIMIT_BYTES = 64 * 1024
MODEL_DOCUMENT = "model.json"
_SCHEMA = "scz-smm/manifest/v1"
_CIPHERTEXT_LIMIT_BYTES = ciphertext_size(FILE_LIMIT_BYTES)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: its path and size (plaintext, bytes), and the digest and size of its layer (ciphertext)."""

    path: str
    size: int
    layer_digest: str
    layer_size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest. `digest` is the manifest digest, over the compact bytes."""

    model: ModelId
    owner_id: str
    created: int
    files: tuple[FileEntry, ...]
    access: AccessPolicy
    fields: Mapping[str, Any] = field(hash=False)
    digest: str


@dataclass(frozen=True, slots=True)
class UnverifiedManifest:
    """A manifest whose signature was not looked at: only the owner id that it claims can be read."""

    owner_id: str
    _jws: UnverifiedJws


def compact_digest(compact: bytes) -> str:
    """The manifest digest of a manifest's compact bytes: `sha256:` and 64 digits."""
    return "sha256:" + hashlib.sha256(compact).hexdigest()


def parse_manifest(compact: bytes) -> UnverifiedManifest:
    """Take a manifest's compact bytes, at most 8 MiB, apart.

    Raises:
        BundleInvalid: Not a JWS with the manifest's header.
    """
    jws = parse_document(
        compact, typ=MANIFEST_TYP, limit_bytes=MANIFEST_LIMIT_BYTES, what="manifest", error=BundleInvalid
    )
    return UnverifiedManifest(owner_id=str(jws.unverified_header["kid"]), _jws=jws)


def verify_manifest(unverified: UnverifiedManifest, owner: Owner) -> Manifest:
    """Verify a manifest as this owner's.

    Raises:
        OwnerUntrusted: It names another owner, or the signature is not this owner's.
        BundleInvalid: The owner signed what the specification forbids.
    """
    # 1. It says that it is this owner's.
    if unverified.owner_id != owner.owner_id:
        raise OwnerUntrusted(f"the manifest is by {shown(unverified.owner_id)}, not by {owner.name} ({owner.owner_id})")
    # 2. It is.
    payload = verify_compact(unverified._jws, owner.manifest_key, "ES256", error=OwnerUntrusted)
    # 3. What it says can be used.
    return _parse_payload(payload, owner_id=owner.owner_id, compact=unverified._jws.compact, error=BundleInvalid)


def _parse_payload(payload: bytes, *, owner_id: str, compact: bytes, error: type[SczError]) -> Manifest:
    fields = Fields(
        parse_object(payload, limit_bytes=MANIFEST_LIMIT_BYTES, what="manifest", error=error),
        what="manifest",
        error=error,
    )
    fields.literal("schema", _SCHEMA)
    manifest = Manifest(
        model=parse_model_id(fields.fields("model")),
        owner_id=owner_id,
        created=fields.integer("created", low=0, high=TIME_HIGH),
        files=fields.items("files", lambda item: _file_entry(item, error), low=1, high=FILES_LIMIT),
        access=parse_access_policy(fields.take("access"), error=error),
        fields=_free_fields(fields.take("fields"), error),
        digest=compact_digest(compact),
    )
    fields.finish()
    verify_files(manifest.files, error=error)
    return manifest


def _file_entry(value: object, error: type[SczError]) -> FileEntry:
    fields = Fields(value, what="manifest: file", error=error)
    path = verify_path(fields.string("path", limit=PATH_LIMIT_BYTES), error=error)
    size = fields.integer("size", low=0, high=FILE_LIMIT_BYTES)
    layer = fields.fields("layer")
    fields.finish()
    entry = FileEntry(
        path=path,
        size=size,
        layer_digest=layer.digest("digest"),
        layer_size=layer.integer("size", low=0, high=_CIPHERTEXT_LIMIT_BYTES),
    )
    layer.finish()
    if entry.layer_size != ciphertext_size(size):
        raise error(f"manifest: the layer of {shown(path)} has not the size that its file's size asks for")
    return entry


def _free_fields(value: object, error: type[SczError]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise error("manifest: 'fields' is not an object")
    try:
        size = len(canonical(value))
    except (ValueError, RecursionError, TypeError) as cause:  # 1e999 reads as infinity, which JSON cannot write
        raise error("manifest: 'fields' has a value that JSON cannot hold") from cause
    if size > FIELDS_LIMIT_BYTES:
        raise error(f"manifest: 'fields' is larger than {FIELDS_LIMIT_BYTES} bytes")
    return MappingProxyType(value)


def verify_files(files: Sequence[FileEntry], *, error: type[SczError]) -> None:
    """Check that the paths make one tree: sorted, each once, none below a file, none in `model.json`'s place.

    Raises:
        SczError: The class `error`.
    """
    paths = [entry.path for entry in files]
    if any(left >= right for left, right in itertools.pairwise(paths)):
        raise error("manifest: the files are not sorted by path, or a path is there twice")
    taken = {*paths, MODEL_DOCUMENT}
    if len(taken) != len(paths) + 1:
        raise error(f"manifest: {MODEL_DOCUMENT!r} is the name of a file that is added on delivery")
    for path in paths:
        parts = path.split("/")
        if any("/".join(parts[:depth]) in taken for depth in range(1, len(parts))):
            raise error(f"manifest: {shown(path)} lies below a file")


def sign_manifest(
    model: ModelId,
    files: Sequence[FileEntry],
    access: AccessPolicy,
    fields: Mapping[str, Any],
    created: int,
    *,
    owner_id: str,
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """Sign a manifest.

    Args:
        model: What it is the manifest of.
        files: Sorted by path.
        access: Who may have the model.
        fields: The owner's free object, at most 64 KiB as JSON.
        created: Seconds since 1970.
        owner_id: The thumbprint of `key`.
        key: The owner's manifest key.

    Returns:
        The compact bytes: the bundle's config blob.

    Raises:
        SourceInvalid: Something that a reader would refuse.
        KeyInvalid: The key is not the owner's.
    """
    document = {
        "schema": _SCHEMA,
        "model": model.document(),
        "created": created,
        "files": [
            {"path": entry.path, "size": entry.size, "layer": {"digest": entry.layer_digest, "size": entry.layer_size}}
            for entry in files
        ],
        "access": access_policy_document(access),
        "fields": dict(fields),
    }
    _free_fields(document["fields"], SourceInvalid)
    payload = canonical(document)
    compact = sign_owned(payload, typ=MANIFEST_TYP, owner_id=owner_id, key=key)
    if len(compact) > MANIFEST_LIMIT_BYTES:
        raise SourceInvalid(f"the manifest would be larger than {MANIFEST_LIMIT_BYTES} bytes: too many files")
    # The reader is the writer's check: what it would refuse is never signed away.
    _parse_payload(payload, owner_id=owner_id, compact=compact, error=SourceInvalid)
    return compact


def sign_owned(payload: bytes, *, typ: str, owner_id: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a document in an owner's name.

    Raises:
        KeyInvalid: The key is not the one whose thumbprint is `owner_id`.
    """
    if owner_jwk(public_jwk(key.public_key()), error=KeyInvalid).thumbprint != owner_id:
        raise KeyInvalid("the manifest key is not the owner's")
    return sign_compact(payload, typ=typ, kid=owner_id, key=key)


def model_document(manifest: Manifest) -> bytes:
    """The bytes of `model.json`, which is delivered beside the files."""
    return canonical({"model": manifest.model.document(), "manifest": manifest.digest, "fields": dict(manifest.fields)})
