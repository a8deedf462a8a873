"""Packed models for the tests: real bundles, signed by an owner made for the occasion.

    owner = TestOwner(folder)
    model = owner.pack("name", {"weights": b"..."})

Test material only: the keys lie in memory and nowhere else.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import AcceptedIdentity, AccessPolicy
from oci_hook.bundle.layout import Layout
from oci_hook.bundle.manifest import Manifest, model_document, parse_manifest, verify_manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.pack import pack
from oci_hook.bundle.segments import ContentKey
from oci_hook.delivery.room import ModelDelivery
from oci_hook.errors import KeyInvalid
from oci_hook.jws import owner_jwk, public_jwk
from oci_hook.trust import Owner, parse_owner

Files = Mapping[str, bytes]

MIB = 1 << 20
FIRST, OTHER = MIB - 56, MIB - 16
"""Plaintext bytes of a file's first segment, and of each other (docs/specification.md, "Encrypted file")."""
AROUND_SEGMENTS = [
    *(0, 1, 15, 16, 4095, 4096, 4097, FIRST - 1, FIRST, FIRST + 1, MIB, FIRST + OTHER - 1, FIRST + OTHER),
    *(FIRST + OTHER + 1, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, FIRST + 3 * OTHER, 7 * MIB + 4097),
]
"""Sizes of files at which something could be off by one."""


def noise(size: int, seed: int = 0) -> bytes:
    """Reproducible bytes that do not compress."""
    return random.Random(f"{size}/{seed}").randbytes(size)


@dataclass(frozen=True)
class PackedModel:
    """A bundle, with what is needed to open it."""

    bundle: Path
    key: bytes
    files: Files

    def layer(self, path: str) -> Path:
        """The encrypted file of `path`."""
        for blob in (self.bundle / "blobs/sha256").iterdir():
            with blob.open("rb") as file:
                if file.read(1) != b"{":
                    continue
            for layer in json.loads(blob.read_bytes()).get("layers", ()):
                if layer["annotations"]["org.cncf.model.filepath"] == path:
                    return self.bundle / "blobs" / str(layer["digest"]).replace(":", "/")
        raise KeyError(path)


class TestOwner:
    """An owner with keys of its own, who packs below `folder`."""

    __test__ = False  # not a class of tests

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._signer = ec.generate_private_key(ec.SECP256R1())
        keys = [self._signer, *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))]
        names = ("manifest_key", "boot_policy_key", "recovery_key")
        self.document = folder / "owner.json"
        self.document.write_text(
            json.dumps(
                {"schema": "scz-smm/owner/v1", "name": "tester"}
                | {name: public_jwk(key.public_key()) for name, key in zip(names, keys, strict=True)}
            )
        )

    @property
    def owner(self) -> Owner:
        """As the host trusts it."""
        return parse_owner(self.document.read_bytes())

    def pack(self, name: str, files: Files) -> PackedModel:
        """A bundle `<name>.bundle` of these files, by path."""
        source = self.folder / f"{name}.source"
        for path, data in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        model = self.pack_folder(name, source)
        shutil.rmtree(source)
        return PackedModel(model.bundle, model.key, files)

    def pack_folder(self, name: str, source: Path, *, share: bool = False) -> PackedModel:
        """A bundle `<name>.bundle` of a folder, however large; its files are not kept in memory."""
        key = os.urandom(32)
        pack(
            source,
            self.folder / f"{name}.bundle",
            model=ModelId(name, "1", 1),
            access=AccessPolicy(
                (AcceptedIdentity("issuer", "audience", ("subject",), ()),), 3600, None, None, (), share
            ),
            fields={},
            created=1,
            owner_id=owner_jwk(public_jwk(self._signer.public_key()), error=KeyInvalid).thumbprint,
            key=self._signer,
            content_key=ContentKey(key),
            random=os.urandom,
            progress=lambda _done: None,
        )
        return PackedModel(self.folder / f"{name}.bundle", key, {})

    def manifest(self, layout: Layout) -> Manifest:
        """The verified manifest of an open bundle."""
        return verify_manifest(parse_manifest(layout.config_blob), self.owner)

    def delivery(self, model: PackedModel, layout: Layout, destination: str = "/models") -> ModelDelivery:
        """What the delivery needs of a model whose bundle is open."""
        manifest = self.manifest(layout)
        key = ContentKey(model.key)
        return ModelDelivery(destination, destination, manifest, layout, key, model_document(manifest))
