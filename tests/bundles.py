"""Owners, policies and small bundles for the tests of `bundle/`, and bundles taken apart and put together again.

A bundle in a vector is a table from path to entry: `{"base64": …}`, with `"pad"` zero bytes after it, `{"symlink": …}`,
`{"fifo": true}` or `{"folder": true}`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import AcceptedIdentity, AccessPolicy
from oci_hook.bundle.grant import Counter, Grant, SealedKey, wrap_content_key
from oci_hook.bundle.layout import open_layout, verify_bundle, verify_digests
from oci_hook.bundle.manifest import Manifest, parse_manifest, verify_manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.pack import PackedBundle, pack
from oci_hook.bundle.segments import ContentKey, associated_data, decrypt_stream
from oci_hook.documents import canonical
from oci_hook.errors import SczError
from oci_hook.jws import public_jwk
from oci_hook.trust import Owner, parse_owner

T = TypeVar("T")
MODEL = ModelId("demo", "v1", 1)
CREATED = 1_767_225_600
POLICY = AccessPolicy(
    identities=(AcceptedIdentity("https://issuer.example", "scz-smm", ("system:serviceaccount:ml:app",), ()),),
    token_age_seconds=3600,
    not_before=None,
    not_after=None,
    runtimes=(),
    share=True,
)
FIELDS: dict[str, Any] = {"framework": "safetensors", "privacy": {"method": "differential privacy", "epsilon": 3.5}}
FILES = {"LICENSE": b"free", "config.json": b'{"layers":6}', "weights/model.safetensors": bytes(range(256))}


@dataclass(frozen=True)
class OwnerKeys:
    """An owner with its private keys."""

    owner: Owner
    manifest_key: ec.EllipticCurvePrivateKey
    boot_policy_key: ec.EllipticCurvePrivateKey
    recovery_key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def make_owner(name: str = "acme") -> OwnerKeys:
    """An owner with fresh keys."""
    keys = [new_key() for _ in range(3)]
    manifest, boot, recovery = (public_jwk(key.public_key()) for key in keys)
    document = {
        "schema": "scz-smm/owner/v1",
        "name": name,
        "manifest_key": manifest,
        "boot_policy_key": boot,
        "recovery_key": recovery,
    }
    return OwnerKeys(parse_owner(canonical(document)), *keys)


def write_source(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def pack_files(
    keys: OwnerKeys,
    content_key: ContentKey,
    source: Path,
    output: Path,
    *,
    model: ModelId = MODEL,
    random: Callable[[int], bytes] = os.urandom,
    progress: Callable[[int], object] = lambda done: None,
) -> PackedBundle:
    """`pack` with the tests' policy and fields."""
    return pack(
        source,
        output,
        model=model,
        access=POLICY,
        fields=FIELDS,
        created=CREATED,
        owner_id=keys.owner.owner_id,
        key=keys.manifest_key,
        content_key=content_key,
        random=random,
        progress=progress,
    )


def read_bundle(folder: Path, owner: Owner, content_key: ContentKey) -> tuple[Manifest, dict[str, bytes]]:
    """Everything that a reader does: open, verify the manifest, the layers and their digests, decrypt."""
    files: dict[str, bytes] = {}
    with open_layout(folder) as layout:
        manifest = verify_manifest(parse_manifest(layout.config_blob), owner)
        verify_bundle(layout, manifest)
        verify_digests(layout, manifest, lambda done: None)
        for entry in manifest.files:
            plain = bytearray()
            descriptor = layout.open_blob(entry.layer_digest)
            try:
                decrypt_stream(
                    lambda size: os.read(descriptor, size),  # noqa: B023  # called in this turn of the loop only
                    plain.extend,
                    content_key=content_key,
                    associated_data=associated_data(manifest.model, entry.path),
                    ciphertext_bytes=entry.layer_size,
                    plaintext_bytes=entry.size,
                )
            finally:
                os.close(descriptor)
            files[entry.path] = bytes(plain)
    return manifest, files


def make_grant(keys: OwnerKeys, manifest: Manifest, content_key: ContentKey, secret: bytes) -> Grant:
    """A grant with invented TPM parts; `secret` is what the TPM would unseal."""
    return Grant(
        model=manifest.model,
        manifest_digest=manifest.digest,
        owner_id=keys.owner.owner_id,
        created=CREATED,
        device_name="edge-1",
        device_class="default",
        ak_name=b"\x00\x0b" + bytes(32),
        srk_name=b"\x00\x0b" + bytes([1]) * 32,
        boot_policy_key_name=b"\x00\x0b" + bytes([2]) * 32,
        policy_ref=bytes([3]) * 32,
        counter=Counter(0x01812345, b"\x00\x0b" + bytes([4]) * 32, 7),
        sealed=SealedKey(b"public", b"duplicate", b"seed"),
        wrapped_key=wrap_content_key(content_key, secret, manifest.digest, bytes(range(12))),
    )


def value_or_none(action: Callable[[], T], error: type[SczError]) -> T | None:
    """What a fuzzed parser gives, or None if it refuses with exactly this class; anything else fails the test."""
    try:
        return action()
    except error as refused:
        if type(refused) is not error:
            raise
        return None


# --- bundles as tables ------------------------------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    """`sha256:` and the digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def blob_path(digest: str) -> str:
    """Where a blob lies in a layout."""
    return "blobs/sha256/" + digest.removeprefix("sha256:")


def file_entry(data: bytes, pad: int = 0) -> dict[str, Any]:
    """A table's entry for a file."""
    return {"base64": base64.b64encode(data).decode(), **({"pad": pad} if pad else {})}


def entry_bytes(entry: dict[str, Any]) -> bytes:
    """What `file_entry` was given."""
    return base64.b64decode(entry["base64"]) + bytes(entry.get("pad", 0))


def read_table(folder: Path) -> dict[str, dict[str, Any]]:
    """A bundle's folder as a table."""
    return {str(p.relative_to(folder)): file_entry(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def write_table(folder: Path, table: dict[str, dict[str, Any]]) -> Path:
    """A table as a bundle's folder."""
    folder.mkdir()
    for path, entry in table.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if "symlink" in entry:
            target.symlink_to(entry["symlink"])
        elif "fifo" in entry:
            os.mkfifo(target)
        elif "folder" in entry:
            target.mkdir()
        else:
            target.write_bytes(entry_bytes(entry))
    return folder


def load_vectors(kind: str) -> dict[str, dict[str, Any]]:
    """The vectors `tests/vectors/bundle/<kind>-*.json`, by name; at least one."""
    folder = Path(__file__).parent / "vectors" / "bundle"
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))}
    if not found:
        raise AssertionError(f"no vectors for {kind}: run python -m tests.vectors.bundle.generate")
    return found
