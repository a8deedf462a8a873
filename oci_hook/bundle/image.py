"""The OCI documents of a bundle: `oci-layout`, `index.json` and the image manifest, read and written.

Pure. None of them is signed: what they say is believed only where the signed manifest says the same.
Specification: docs/specification.md, "Model bundle"; OCI image-spec 1.1; ModelPack (media types).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

from oci_hook.bundle.manifest import FILES_LIMIT, MANIFEST_LIMIT_BYTES
from oci_hook.bundle.model import PATH_LIMIT_BYTES, verify_path
from oci_hook.bundle.segments import FILE_LIMIT_BYTES, ciphertext_size
from oci_hook.documents import Fields, canonical, decode_base64url, encode_base64url, parse_object, shown
from oci_hook.errors import BundleInvalid

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
IMAGE_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.scz-smm.model.v1"
CONFIG_TYPE = "application/vnd.scz-smm.manifest.v1+jwt"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw+encrypted"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw+encrypted"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw+encrypted"
CODE_TYPE = "application/vnd.cncf.model.code.v1.raw+encrypted"
LAYER_TYPES = frozenset({WEIGHT_TYPE, WEIGHT_CONFIG_TYPE, DOC_TYPE, CODE_TYPE})
PATH_ANNOTATION = "org.cncf.model.filepath"
RECOVERY_ANNOTATION = "vnd.scz-smm.recovery.v1"
VERSION_ANNOTATION = "org.opencontainers.image.ref.name"
LAYOUT_FILE, INDEX_FILE, BLOBS = "oci-layout", "index.json", ("blobs", "sha256")
LAYOUT_DOCUMENT = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_LIMIT_BYTES = 64 * 1024
IMAGE_MANIFEST_LIMIT_BYTES = 8 * 2**20
_RECOVERY_COPY = r"[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{151}"  # a key's thumbprint, then 113 bytes
_LAYER_LIMIT_BYTES = ciphertext_size(FILE_LIMIT_BYTES)

_SUFFIX_TYPES: Mapping[str, str] = {
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".ini", ".jinja"), WEIGHT_CONFIG_TYPE),
    **dict.fromkeys((".md", ".rst", ".pdf", ".html"), DOC_TYPE),
    **dict.fromkeys((".py", ".sh", ".ipynb", ".cu", ".cpp"), CODE_TYPE),
}
_DOC_NAMES = frozenset({"license", "licence", "notice", "readme", "copying", "authors", "changelog"})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob, as an OCI document points to it; the size is in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as the image manifest names it: digest and size of the ciphertext, path of the file."""

    digest: str
    size: int
    path: str
    media_type: str


def layer_media_type(path: str) -> str:
    """The ModelPack media type of a file, by its name; weights, if the name says nothing."""
    name = PurePosixPath(path.lower())
    if name.name in _DOC_NAMES or (name.stem in _DOC_NAMES and name.suffix in (".txt", ".md")):
        return DOC_TYPE
    return _SUFFIX_TYPES.get(name.suffix, WEIGHT_TYPE)


def _document(data: bytes, limit_bytes: int, what: str) -> Fields:
    value = parse_object(data, limit_bytes=limit_bytes, what=what, error=BundleInvalid)
    return Fields(value, what=what, error=BundleInvalid)


def _descriptor(fields: Fields, media_type: str, *, limit_bytes: int) -> Descriptor:
    fields.literal("mediaType", media_type)
    return Descriptor(fields.digest("digest"), fields.integer("size", low=1, high=limit_bytes))


def parse_layout_file(data: bytes) -> None:
    """Check an `oci-layout` file.

    Raises:
        BundleInvalid: It is not of version 1.0.0.
    """
    fields = _document(data, INDEX_LIMIT_BYTES, LAYOUT_FILE)
    fields.literal("imageLayoutVersion", "1.0.0")
    fields.finish()


def parse_index(data: bytes) -> tuple[Descriptor, str | None]:
    """Take an `index.json`, at most 64 KiB, apart.

    Tools rewrite it when they copy a bundle (skopeo, oras), so what OCI knows and we do not need may be there.

    Returns:
        The image manifest's descriptor, and the tag, if any.

    Raises:
        BundleInvalid: Malformed, not one descriptor, or not of an image manifest.
    """
    fields = _document(data, INDEX_LIMIT_BYTES, INDEX_FILE)
    fields.integer("schemaVersion", low=2, high=2)
    if fields.has("mediaType"):
        fields.literal("mediaType", INDEX_TYPE)
    if fields.has("annotations"):
        fields.fields("annotations").rest()
    (entry,) = fields.items("manifests", lambda item: Fields(item, what=INDEX_FILE, error=BundleInvalid), low=1, high=1)
    fields.finish()
    image = _descriptor(entry, IMAGE_MANIFEST_TYPE, limit_bytes=IMAGE_MANIFEST_LIMIT_BYTES)
    if entry.has("artifactType"):
        entry.literal("artifactType", ARTIFACT_TYPE)
    tag = None
    if entry.has("annotations"):
        annotations = entry.fields("annotations")
        tag = annotations.string(VERSION_ANNOTATION, limit=256) if annotations.has(VERSION_ANNOTATION) else None
        annotations.rest()
    entry.finish()
    return image, tag


def parse_image_manifest(data: bytes) -> tuple[Descriptor, tuple[Layer, ...]]:
    """Take an image manifest, at most 8 MiB, apart. Only `pack` writes one, so nothing further may be there.

    Returns:
        The config blob's descriptor (our signed manifest) and the layers, in order.

    Raises:
        BundleInvalid: Malformed, another type, no layer, more than 10,000, or a path that `verify_path` refuses.
    """
    fields = _document(data, IMAGE_MANIFEST_LIMIT_BYTES, "image manifest")
    fields.integer("schemaVersion", low=2, high=2)
    fields.literal("mediaType", IMAGE_MANIFEST_TYPE)
    fields.literal("artifactType", ARTIFACT_TYPE)
    config = fields.fields("config")
    layers = fields.items("layers", _layer, low=1, high=FILES_LIMIT)
    _recovery_copy(fields)
    fields.finish()
    blob = _descriptor(config, CONFIG_TYPE, limit_bytes=MANIFEST_LIMIT_BYTES)
    config.finish()
    return blob, layers


def parse_recovery_copy(data: bytes) -> tuple[str, bytes] | None:
    """The sealed copy of the content key that an image manifest carries for an offline recovery key.

    Returns:
        The recovery key's thumbprint and the copy, 113 bytes; None: it carries none.

    Raises:
        BundleInvalid: Malformed.
    """
    text = _recovery_copy(_document(data, IMAGE_MANIFEST_LIMIT_BYTES, "image manifest"))
    if text is None:
        return None
    thumbprint, _, sealed = text.partition(".")
    return thumbprint, decode_base64url(sealed, what="the recovery copy", error=BundleInvalid)


def recovery_annotations(thumbprint: str, sealed: bytes) -> dict[str, str]:
    """The annotations of an image manifest that carries a recovery copy."""
    return {RECOVERY_ANNOTATION: f"{thumbprint}.{encode_base64url(sealed)}"}


def _recovery_copy(fields: Fields) -> str | None:
    if not fields.has("annotations"):
        return None
    annotations = fields.fields("annotations")
    text = annotations.string(RECOVERY_ANNOTATION, pattern=_RECOVERY_COPY)
    annotations.finish()
    return text


def _layer(value: object) -> Layer:
    fields = Fields(value, what="image manifest: layer", error=BundleInvalid)
    media_type = fields.string("mediaType")
    if media_type not in LAYER_TYPES:
        raise BundleInvalid(f"image manifest: a layer has the media type {shown(media_type)}")
    annotations = fields.fields("annotations")
    layer = Layer(
        digest=fields.digest("digest"),
        size=fields.integer("size", low=1, high=_LAYER_LIMIT_BYTES),
        path=verify_path(annotations.string(PATH_ANNOTATION, limit=PATH_LIMIT_BYTES), error=BundleInvalid),
        media_type=media_type,
    )
    annotations.finish()
    fields.finish()
    return layer


def image_manifest_document(
    config: Descriptor, layers: Sequence[Layer], annotations: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """The bytes of an image manifest."""
    more = {"annotations": dict(annotations)} if annotations else {}
    return canonical(
        {
            **more,
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.size},
            "layers": [
                {
                    "mediaType": layer.media_type,
                    "digest": layer.digest,
                    "size": layer.size,
                    "annotations": {PATH_ANNOTATION: layer.path},
                }
                for layer in layers
            ],
        }
    )


def index_document(image: Descriptor, version: str) -> bytes:
    """The bytes of `index.json`, with one descriptor."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [
                {
                    "mediaType": IMAGE_MANIFEST_TYPE,
                    "digest": image.digest,
                    "size": image.size,
                    "annotations": {VERSION_ANNOTATION: version},
                }
            ],
        }
    )
