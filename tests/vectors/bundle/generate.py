"""Makes the vectors of this folder: `python -m tests.vectors.bundle.generate`, from the repository's root.

One failure each, named after it; `expect` is the class of the error, or null where the vector is a control that must be
accepted. Kinds: `file` (one encrypted file, described by edits of a deterministic one and pinned by its SHA-256),
`layout` (a whole bundle), `manifest`, `grant` (compact JWS). Keys are fresh at each run, and nobody's.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from oci_hook.bundle.grant import GRANT_TYP, sign_grant
from oci_hook.bundle.image import ARTIFACT_TYPE, PATH_ANNOTATION
from oci_hook.bundle.manifest import MANIFEST_TYP, FileEntry, parse_manifest, sign_manifest, verify_manifest
from oci_hook.bundle.segments import ContentKey, ciphertext_size
from oci_hook.documents import canonical, decode_base64url, encode_base64url
from oci_hook.errors import SczError
from oci_hook.jws import sign_compact
from tests import bundles
from tests.vectors.bundle.files import FILE_VECTORS, build

Json = dict[str, Any]
Table = dict[str, Json]
FOLDER = Path(__file__).parent


def flip(data: bytes, offset: int) -> bytes:
    """One bit changed."""
    changed = bytearray(data)
    changed[offset] ^= 1
    return bytes(changed)


# --- encrypted files --------------------------------------------------------------------------------------------------


def file_vectors() -> Iterator[tuple[str, Json]]:
    """Encrypted files: the description, and the digest of what `build` makes of it."""
    for name, vector in FILE_VECTORS.items():
        yield name, {**vector, "sha256": bundles.digest_of(build(vector))}


# --- layouts ----------------------------------------------------------------------------------------------------------


class Bundle:
    """A good bundle as a table, and what it takes to change one thing in it and keep the rest whole."""

    def __init__(self, table: Table) -> None:
        self.table = copy.deepcopy(table)

    def data(self, path: str) -> bytes:
        return bundles.entry_bytes(self.table[path])

    def put(self, path: str, data: bytes, pad: int = 0) -> None:
        self.table[path] = bundles.file_entry(data, pad)

    @property
    def index(self) -> Json:
        index: Json = json.loads(self.data("index.json"))
        return index

    @property
    def image(self) -> Json:
        image: Json = json.loads(self.data(self.image_path))
        return image

    @property
    def image_path(self) -> str:
        return bundles.blob_path(self.index["manifests"][0]["digest"])

    @property
    def config_path(self) -> str:
        return bundles.blob_path(self.image["config"]["digest"])

    def layer_path(self, number: int) -> str:
        return bundles.blob_path(self.image["layers"][number]["digest"])

    def set_index(self, index: Json) -> None:
        self.put("index.json", canonical(index))

    def set_image(self, image: bytes) -> None:
        """Another image manifest, rightly named by the index."""
        del self.table[self.image_path]
        index = self.index
        index["manifests"][0] |= {"digest": bundles.digest_of(image), "size": len(image)}
        self.set_index(index)
        self.put(self.image_path, image)

    def change_image(self, change: Callable[[Json], None]) -> None:
        image = self.image
        change(image)
        self.set_image(canonical(image))

    def set_layer(self, number: int, data: bytes) -> None:
        """Another layer, rightly named by the image manifest: only the signed list does not agree."""
        digest = bundles.digest_of(data)
        self.change_image(lambda image: image["layers"][number].update(digest=digest, size=len(data)))
        self.put(bundles.blob_path(digest), data)


def layout_changes(other: Table, other_key: Table) -> dict[str, tuple[str | None, Callable[[Bundle], None]]]:
    """Every change by name. `other` is another owner's bundle; `other_key` the owner's files encrypted anew."""

    def index_with(change: Callable[[Json], None]) -> Callable[[Bundle], None]:
        def apply(bundle: Bundle) -> None:
            index = bundle.index
            change(index)
            bundle.set_index(index)

        return apply

    def image_with(change: Callable[[Json], None]) -> Callable[[Bundle], None]:
        return lambda bundle: bundle.change_image(change)

    def blob_with(where: Callable[[Bundle], str], change: Callable[[bytes], bytes]) -> Callable[[Bundle], None]:
        return lambda bundle: bundle.put(where(bundle), change(bundle.data(where(bundle))))

    def replaced(where: Callable[[Bundle], str], entry: Json | None) -> Callable[[Bundle], None]:
        def apply(bundle: Bundle) -> None:
            path = where(bundle)
            del bundle.table[path]
            if entry is not None:
                bundle.table[path] = entry

        return apply

    def link_aside(where: Callable[[Bundle], str]) -> Callable[[Bundle], None]:
        """The right bytes, but behind a symbolic link."""

        def apply(bundle: Bundle) -> None:
            path = where(bundle)
            bundle.table["aside"] = bundle.table.pop(path)
            bundle.table[path] = {"symlink": "../" * path.count("/") + "aside"}

        return apply

    def blobs_linked(bundle: Bundle) -> None:
        bundle.table = {p.replace("blobs/", "elsewhere/"): e for p, e in bundle.table.items()}
        bundle.table["blobs"] = {"symlink": "elsewhere"}

    def become_other(bundle: Bundle) -> None:
        bundle.table = copy.deepcopy(other)

    def encrypted_by_another(bundle: Bundle) -> None:
        theirs = Bundle(other_key)
        bundle.set_layer(2, theirs.data(theirs.layer_path(2)))

    def config_replaced(bundle: Bundle) -> None:
        """The other owner's manifest over the first owner's layers."""
        theirs = Bundle(other)
        data = theirs.data(theirs.config_path)
        bundle.change_image(lambda image: image["config"].update(digest=bundles.digest_of(data), size=len(data)))
        bundle.put(bundle.config_path, data)

    def swap_layers(image: Json) -> None:
        image["layers"][0], image["layers"][1] = image["layers"][1], image["layers"][0]

    def swap_paths(image: Json) -> None:
        first, second = image["layers"][0]["annotations"], image["layers"][1]["annotations"]
        image["layers"][0]["annotations"], image["layers"][1]["annotations"] = second, first

    def path_is(path: str) -> Callable[[Bundle], None]:
        return image_with(lambda image: image["layers"][0]["annotations"].update({PATH_ANNOTATION: path}))

    def index_of(bundle: Bundle) -> str:
        return "index.json"

    def image_of(bundle: Bundle) -> str:
        return bundle.image_path

    def config_of(bundle: Bundle) -> str:
        return bundle.config_path

    def layer_of(bundle: Bundle) -> str:
        return bundle.layer_path(2)

    invalid, mismatch = "BundleInvalid", "BundleMismatch"
    return {
        "good": (None, lambda bundle: None),
        "good-without-tag": (None, index_with(lambda index: index["manifests"][0].pop("annotations"))),
        "good-tagged-anew": (
            None,
            index_with(lambda i: i["manifests"][0].update(annotations={"org.opencontainers.image.ref.name": "prod"})),
        ),
        "good-unreferenced-blob": (None, lambda bundle: bundle.put("blobs/sha256/" + "0" * 64, b"left over")),
        "layout-file-missing": (invalid, replaced(lambda bundle: "oci-layout", None)),
        "layout-file-version": (invalid, lambda bundle: bundle.put("oci-layout", b'{"imageLayoutVersion":"2.0.0"}')),
        "layout-file-unknown-key": (
            invalid,
            lambda bundle: bundle.put("oci-layout", b'{"imageLayoutVersion":"1.0.0","x":1}'),
        ),
        "index-missing": (invalid, replaced(index_of, None)),
        "index-symlink": (invalid, link_aside(index_of)),
        "index-fifo": (invalid, replaced(index_of, {"fifo": True})),
        "index-folder": (invalid, replaced(index_of, {"folder": True})),
        "index-oversized": (invalid, lambda bundle: bundle.put("index.json", bundle.data("index.json"), pad=65536)),
        "index-not-json": (invalid, lambda bundle: bundle.put("index.json", b"{")),
        "index-duplicate-key": (
            invalid,
            blob_with(index_of, lambda data: data.replace(b"{", b'{"schemaVersion":2,', 1)),
        ),
        "index-unknown-key": (invalid, index_with(lambda index: index.update(subject={}))),
        "index-descriptor-with-data": (invalid, index_with(lambda index: index["manifests"][0].update(data="e30="))),
        "index-schema-version": (invalid, index_with(lambda index: index.update(schemaVersion=1))),
        "index-two-descriptors": (invalid, index_with(lambda index: index["manifests"].append(index["manifests"][0]))),
        "index-no-descriptor": (invalid, index_with(lambda index: index.update(manifests=[]))),
        "index-of-an-index": (
            invalid,
            index_with(lambda i: i["manifests"][0].update(mediaType="application/vnd.oci.image.index.v1+json")),
        ),
        "index-digest-traversal": (
            invalid,
            index_with(lambda index: index["manifests"][0].update(digest="sha256:../../index.json")),
        ),
        "index-digest-upper-case": (
            invalid,
            index_with(lambda i: i["manifests"][0].update(digest="sha256:" + i["manifests"][0]["digest"][7:].upper())),
        ),
        "index-image-size": (mismatch, index_with(lambda index: index["manifests"][0].update(size=1))),
        "index-image-oversized": (invalid, index_with(lambda index: index["manifests"][0].update(size=8 * 2**20 + 1))),
        "blobs-folder-symlink": (invalid, blobs_linked),
        "image-missing": (invalid, replaced(image_of, None)),
        "image-symlink": (invalid, link_aside(image_of)),
        "image-bit-flipped": (mismatch, blob_with(image_of, lambda data: flip(data, 40))),
        "image-trailing-byte": (mismatch, blob_with(image_of, lambda data: data + b"\n")),
        "image-duplicate-key": (
            invalid,
            lambda bundle: bundle.set_image(bundle.data(bundle.image_path).replace(b"{", b'{"schemaVersion":2,', 1)),
        ),
        "image-unknown-key": (invalid, image_with(lambda image: image.update(subject={}))),
        "image-media-type": (
            invalid,
            image_with(lambda i: i.update(mediaType="application/vnd.docker.distribution.manifest.v2+json")),
        ),
        "image-artifact-type": (invalid, image_with(lambda image: image.update(artifactType=ARTIFACT_TYPE + "x"))),
        "image-artifact-type-missing": (invalid, image_with(lambda image: image.pop("artifactType"))),
        "image-no-layers": (invalid, image_with(lambda image: image.update(layers=[]))),
        "config-media-type": (
            invalid,
            image_with(lambda i: i["config"].update(mediaType="application/vnd.oci.image.config.v1+json")),
        ),
        "config-with-urls": (invalid, image_with(lambda image: image["config"].update(urls=["https://x"]))),
        "config-oversized": (invalid, image_with(lambda image: image["config"].update(size=8 * 2**20 + 1))),
        "config-missing": (invalid, replaced(config_of, None)),
        "config-symlink": (invalid, link_aside(config_of)),
        "config-bit-flipped": (mismatch, blob_with(config_of, lambda data: flip(data, 200))),
        "config-truncated": (mismatch, blob_with(config_of, lambda data: data[:-1])),
        "config-of-another-owner": ("OwnerUntrusted", config_replaced),
        "bundle-of-another-owner": ("OwnerUntrusted", become_other),
        "layer-missing": (mismatch, image_with(lambda image: image["layers"].pop(1))),
        "layer-added": (mismatch, image_with(lambda image: image["layers"].append(image["layers"][2]))),
        "layers-in-another-order": (mismatch, image_with(swap_layers)),
        "layer-names-swapped": (mismatch, image_with(swap_paths)),
        "layer-name-changed": (mismatch, path_is("LICENCE")),
        "layer-name-traversal": (invalid, path_is("../LICENSE")),
        "layer-name-absolute": (invalid, path_is("/LICENSE")),
        "layer-name-missing": (invalid, image_with(lambda image: image["layers"][0].update(annotations={}))),
        "layer-annotation-unknown": (invalid, image_with(lambda i: i["layers"][0]["annotations"].update(x="y"))),
        "layer-media-type": (
            invalid,
            image_with(lambda i: i["layers"][0].update(mediaType="application/vnd.cncf.model.weight.v1.raw")),
        ),
        "layer-unknown-key": (invalid, image_with(lambda image: image["layers"][0].update(urls=["https://x"]))),
        "layer-size-changed": (mismatch, image_with(lambda image: image["layers"][0].update(size=61))),
        "layer-one-digest-two-sizes": (
            invalid,
            image_with(lambda i: i["layers"][1].update(digest=i["layers"][0]["digest"])),
        ),
        "layer-blob-missing": (invalid, replaced(layer_of, None)),
        "layer-blob-symlink": (invalid, link_aside(layer_of)),
        "layer-blob-fifo": (invalid, replaced(layer_of, {"fifo": True})),
        "layer-header-bit-flipped": (mismatch, blob_with(layer_of, lambda data: flip(data, 0))),
        "layer-salt-bit-flipped": (mismatch, blob_with(layer_of, lambda data: flip(data, 1))),
        "layer-body-bit-flipped": (mismatch, blob_with(layer_of, lambda data: flip(data, 40))),
        "layer-tag-bit-flipped": (mismatch, blob_with(layer_of, lambda data: flip(data, -1))),
        "layer-truncated": (mismatch, blob_with(layer_of, lambda data: data[:-1])),
        "layer-extended": (mismatch, blob_with(layer_of, lambda data: data + b"\0")),
        "layer-of-another-file": (mismatch, lambda bundle: bundle.set_layer(2, bundle.data(bundle.layer_path(1)))),
        "layer-rightly-encrypted-by-another": (mismatch, encrypted_by_another),
    }


def layout_vectors() -> Iterator[tuple[str, Json]]:
    """Whole bundles."""
    acme, other = bundles.make_owner("acme"), bundles.make_owner("other")
    key, other_key = ContentKey(os.urandom(32)), ContentKey(os.urandom(32))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = bundles.write_source(folder / "source", bundles.FILES)

        def packed(keys: bundles.OwnerKeys, used: ContentKey, output: str) -> Table:
            bundles.pack_files(keys, used, source, folder / output)
            return bundles.read_table(folder / output)

        good = packed(acme, key, "good")
        changes = layout_changes(packed(other, other_key, "other"), packed(acme, key, "again"))
    for case, (expect, change) in changes.items():
        bundle = Bundle(good)
        change(bundle)
        yield (
            f"layout-{case}",
            {
                "expect": expect,
                "owner": json.loads(acme.owner.document),
                "content_key": key.value.hex(),
                "bundle": bundle.table,
            },
        )


# --- signed documents -------------------------------------------------------------------------------------------------


def jws_changes(
    good: bytes, keys: bundles.OwnerKeys, other: bundles.OwnerKeys, typ: str
) -> dict[str, tuple[str, bytes]]:
    """What can be wrong with a JWS, whatever it says: `malformed` or `untrusted`."""
    header, payload, signature = good.split(b".")
    body = decode_base64url(payload.decode(), what="payload", error=SczError)
    raw = decode_base64url(signature.decode(), what="signature", error=SczError)
    kid = keys.owner.owner_id

    def part(data: bytes) -> bytes:
        return encode_base64url(data).encode()

    def signed(header_bytes: bytes) -> bytes:
        """A header of any kind, rightly signed."""
        signing = part(header_bytes) + b"." + payload
        r, s = decode_dss_signature(keys.manifest_key.sign(signing, ec.ECDSA(SHA256())))
        return signing + b"." + part(r.to_bytes(32, "big") + s.to_bytes(32, "big"))

    def with_header(members: Json) -> bytes:
        return signed(canonical(members))

    right = {"alg": "ES256", "kid": kid, "typ": typ}
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    malformed, untrusted = "malformed", "untrusted"
    return {
        "alg-none": (malformed, part(canonical({**right, "alg": "none"})) + b"." + payload + b"."),
        "alg-hs256": (malformed, with_header({**right, "alg": "HS256"})),
        "alg-es384": (malformed, with_header({**right, "alg": "ES384"})),
        "alg-missing": (malformed, with_header({"kid": kid, "typ": typ})),
        "typ-of-another-document": (malformed, sign_compact(body, typ="scz-smm-x+jwt", kid=kid, key=keys.manifest_key)),
        "typ-missing": (malformed, with_header({"alg": "ES256", "kid": kid})),
        "kid-missing": (malformed, with_header({"alg": "ES256", "typ": typ})),
        "kid-not-a-thumbprint": (malformed, sign_compact(body, typ=typ, kid="acme", key=keys.manifest_key)),
        "header-crit": (malformed, with_header({**right, "crit": ["exp"], "exp": 1})),
        "header-b64": (malformed, with_header({**right, "b64": False})),
        "header-jwk": (malformed, with_header({**right, "jwk": json.loads(other.owner.document)["manifest_key"]})),
        "header-duplicate-key": (malformed, signed(canonical(right).replace(b"{", b'{"alg":"none",', 1))),
        "header-not-json": (malformed, signed(b"x")),
        "header-list": (malformed, signed(b"[]")),
        "four-parts": (malformed, good + b".AAAA"),
        "two-parts": (malformed, header + b"." + payload),
        "padded": (malformed, good + b"=="),
        "line-feed": (malformed, good + b"\n"),
        "not-canonical-base64": (malformed, good[:-1] + bytes([good[-1] + 1])),
        "json-serialization": (malformed, canonical({"payload": payload.decode(), "signatures": []})),
        "signature-missing": (untrusted, header + b"." + payload + b"."),
        "signature-bit-flipped": (untrusted, header + b"." + payload + b"." + part(flip(raw, 10))),
        "signature-truncated": (untrusted, header + b"." + payload + b"." + part(raw[:-1])),
        "signature-in-der": (untrusted, header + b"." + payload + b"." + part(der)),
        "signature-of-zeros": (untrusted, header + b"." + payload + b"." + part(bytes(64))),
        "payload-bit-flipped": (untrusted, header + b"." + part(flip(body, 20)) + b"." + signature),
        "signed-by-another": (untrusted, sign_compact(body, typ=typ, kid=kid, key=other.manifest_key)),
        "signed-by-the-boot-policy-key": (untrusted, sign_compact(body, typ=typ, kid=kid, key=keys.boot_policy_key)),
        "kid-of-another": (untrusted, sign_compact(body, typ=typ, kid=other.owner.owner_id, key=keys.manifest_key)),
        "owned-by-another": (
            untrusted,
            sign_compact(body, typ=typ, kid=other.owner.owner_id, key=other.manifest_key),
        ),
    }


def payload_changes(good: Json, changes: dict[str, Callable[[Json], object]]) -> Iterator[tuple[str, bytes]]:
    """The good payload, changed in one place."""
    for name, change in changes.items():
        payload = copy.deepcopy(good)
        change(payload)
        yield name, canonical(payload)


def manifest_payload_changes() -> dict[str, Callable[[Json], object]]:
    """What an owner must not sign."""

    def path(*paths: str) -> Callable[[Json], object]:
        entry = {"size": 1, "layer": {"digest": "sha256:" + 64 * "0", "size": ciphertext_size(1)}}
        return lambda p: p.update(files=[{"path": each, **entry} for each in paths])

    def access(**changes: object) -> Callable[[Json], object]:
        return lambda p: p["access"].update(changes)

    def identity(**changes: object) -> Callable[[Json], object]:
        return lambda p: p["access"]["identities"][0].update(changes)

    def model(**changes: object) -> Callable[[Json], object]:
        return lambda p: p["model"].update(changes)

    return {
        "schema": lambda p: p.update(schema="scz-smm/manifest/v2"),
        "unknown-key": lambda p: p.update(extra=1),
        "created-missing": lambda p: p.pop("created"),
        "created-negative": lambda p: p.update(created=-1),
        "created-fraction": lambda p: p.update(created=1.5),
        "model-name": model(name="Demo"),
        "model-name-long": model(name="a" * 65),
        "model-version": model(version="v/1"),
        "model-generation-zero": model(generation=0),
        "model-generation-true": model(generation=True),
        "model-unknown-key": model(extra=1),
        "files-none": path(),
        "files-not-sorted": path("b", "a"),
        "files-duplicate-path": path("a", "a"),
        "files-below-a-file": path("a", "a-b", "a/b"),
        "files-named-model-json": path("model.json"),
        "files-below-model-json": path("model.json/a"),
        "path-empty": path(""),
        "path-absolute": path("/a"),
        "path-traversal": path("a/../b"),
        "path-dot": path("./a"),
        "path-empty-part": path("a//b"),
        "path-trailing-slash": path("a/"),
        "path-nul": path("a\0b"),
        "path-line-feed": path("a\nb"),
        "path-c1-control": path("a\x9bb"),
        "path-part-long": path("ä" * 128),
        "path-long": path("/".join(["a" * 200] * 6)),
        "path-deep": path("/".join("abcdefghijklmnopq")),
        "path-number": lambda p: p["files"][0].update(path=1),
        "file-size-negative": lambda p: p["files"][0].update(size=-1),
        "file-size-huge": lambda p: p["files"][0].update(size=2**62),
        "file-unknown-key": lambda p: p["files"][0].update(mode=493),
        "file-layer-unknown-key": lambda p: p["files"][0]["layer"].update(urls=[]),
        "layer-digest": lambda p: p["files"][0]["layer"].update(digest="sha512:" + 64 * "0"),
        "layer-size-disagrees": lambda p: p["files"][0]["layer"].update(size=p["files"][0]["layer"]["size"] + 16),
        "fields-missing": lambda p: p.pop("fields"),
        "fields-list": lambda p: p.update(fields=[]),
        "fields-oversized": lambda p: p.update(fields={"a": "b" * 65536}),
        "access-missing": lambda p: p.pop("access"),
        "access-unknown-key": access(skip_checks=True),
        "access-no-identities": access(identities=[]),
        "access-token-age-short": access(token_age_seconds=59),
        "access-token-age-long": access(token_age_seconds=31_622_401),
        "access-runtimes-empty": access(runtimes=[]),
        "access-runtimes-unknown": access(runtimes=["runc", "runx"]),
        "access-window-empty": access(not_before=10, not_after=10),
        "access-share-number": access(share=1),
        "identity-no-subjects": identity(subjects=[]),
        "identity-subject-twice": identity(subjects=["a", "a"]),
        "identity-subject-line-feed": identity(subjects=["a\nb"]),
        "identity-keys-empty": identity(keys=[]),
        "identity-keys-not-a-thumbprint": identity(keys=["abc"]),
        "identity-unknown-key": identity(subject="a"),
    }


def signed_vectors() -> Iterator[tuple[str, Json]]:
    """Manifests and grants."""
    keys, other = bundles.make_owner("acme"), bundles.make_owner("other")
    owner = json.loads(keys.owner.document)
    content_key, secret = ContentKey(os.urandom(32)), os.urandom(32)
    files = [FileEntry("config.json", 12, "sha256:" + 64 * "1", ciphertext_size(12))]

    def manifest_of(payload: bytes) -> bytes:
        return sign_compact(payload, typ=MANIFEST_TYP, kid=keys.owner.owner_id, key=keys.manifest_key)

    def grant_of(payload: bytes) -> bytes:
        return sign_compact(payload, typ=GRANT_TYP, kid=keys.owner.owner_id, key=keys.manifest_key)

    def payload_of(compact: bytes) -> bytes:
        return decode_base64url(compact.split(b".")[1].decode(), what="payload", error=SczError)

    good = sign_manifest(
        bundles.MODEL,
        files,
        bundles.POLICY,
        bundles.FIELDS,
        bundles.CREATED,
        owner_id=keys.owner.owner_id,
        key=keys.manifest_key,
    )

    def manifest_vector(name: str, expect: str | None, compact: bytes) -> tuple[str, Json]:
        return f"manifest-{name}", {"expect": expect, "owner": owner, "manifest": compact.decode()}

    payload = json.loads(payload_of(good))
    yield manifest_vector("good", None, good)
    for name, (kind, compact) in jws_changes(good, keys, other, MANIFEST_TYP).items():
        yield manifest_vector(name, {"malformed": "BundleInvalid", "untrusted": "OwnerUntrusted"}[kind], compact)
    for name, changed in payload_changes(payload, manifest_payload_changes()):
        yield manifest_vector(name, "BundleInvalid", manifest_of(changed))
    raw = canonical(payload)
    for name, changed in {
        "payload-not-json": b"{",
        "payload-list": b"[]",
        "payload-duplicate-key": raw.replace(b"{", b'{"created":1,', 1),
        "payload-byte-order-mark": b"\xef\xbb\xbf" + raw,
        "payload-lone-surrogate": raw.replace(b'"safetensors"', b'"\\ud800"'),
        "payload-nan": raw.replace(b"3.5", b"NaN"),
        "payload-infinity": raw.replace(b"3.5", b"1e999"),
        "payload-deep": raw.replace(b"3.5", b"[" * 5000 + b"]" * 5000),
    }.items():
        yield manifest_vector(name, "BundleInvalid", manifest_of(changed))

    manifest = verify_manifest(parse_manifest(good), keys.owner)
    grant = sign_grant(bundles.make_grant(keys, manifest, content_key, secret), key=keys.manifest_key)

    def grant_vector(name: str, expect: str | None, compact: bytes, used: bytes = secret) -> tuple[str, Json]:
        return f"grant-{name}", {
            "expect": expect,
            "owner": owner,
            "manifest": good.decode(),
            "grant": compact.decode(),
            "secret": used.hex(),
            "content_key": content_key.value.hex(),
        }

    yield grant_vector("good", None, grant)
    for name, (kind, compact) in jws_changes(grant, keys, other, GRANT_TYP).items():
        yield grant_vector(name, {"malformed": "GrantInvalid", "untrusted": "GrantRefused"}[kind], compact)
    payload = json.loads(payload_of(grant))
    for expect, changes in grant_payload_changes().items():
        for name, changed in payload_changes(payload, changes):
            yield grant_vector(name, expect, grant_of(changed))
    yield grant_vector("secret-of-another-grant", "KeyRefused", grant, flip(secret, 0))
    yield grant_vector("secret-short", "KeyRefused", grant, secret[:-1])


def grant_payload_changes() -> dict[str, dict[str, Callable[[Json], object]]]:
    """What an owner must not sign, and what it signed for something else, by the expected class."""

    def within(part: str, **changes: object) -> Callable[[Json], object]:
        return lambda p: p[part].update(changes)

    def wrapped_flipped(payload: Json) -> None:
        wrapped = decode_base64url(payload["wrapped_key"], what="key", error=SczError)
        payload["wrapped_key"] = encode_base64url(flip(wrapped, 20))

    return {
        "GrantInvalid": {
            "schema": lambda p: p.update(schema="scz-smm/grant/v2"),
            "unknown-key": lambda p: p.update(extra=1),
            "device-missing": lambda p: p.pop("device"),
            "device-name": within("device", name="Edge 1"),
            "device-class": within("device", **{"class": "../x"}),
            "device-unknown-key": within("device", ek="00"),
            "ak-name-short": within("device", ak_name="000b" + 62 * "0"),
            "srk-name-sha384": within("device", srk_name="000c" + 64 * "0"),
            "srk-name-upper-case": within("device", srk_name="000B" + 64 * "0"),
            "key-name-missing": lambda p: p["boot_policy"].pop("key_name"),
            "policy-ref-short": within("boot_policy", policy_ref=62 * "0"),
            "counter-not-nv": within("counter", index=0x81000001),
            "counter-maximum-negative": within("counter", maximum=-1),
            "counter-maximum-huge": within("counter", maximum=2**64),
            "counter-maximum-missing": lambda p: p["counter"].pop("maximum"),
            "sealed-empty": within("sealed", seed=""),
            "sealed-padded": within("sealed", seed="AA=="),
            "sealed-oversized": within("sealed", duplicate="A" * 4096),
            "wrapped-key-short": lambda p: p.update(wrapped_key=p["wrapped_key"][:-4]),
            "manifest-digest": lambda p: p.update(manifest="sha256:0"),
        },
        "GrantRefused": {
            "of-another-model": within("model", name="other"),
            "of-another-version": within("model", version="v2"),
            "of-another-generation": within("model", generation=2),
            "of-another-manifest": lambda p: p.update(manifest="sha256:" + 64 * "0"),
        },
        "KeyRefused": {"wrapped-key-bit-flipped": wrapped_flipped},
    }


def main() -> None:
    """Write every vector; what is there already goes."""
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for source in (file_vectors, layout_vectors, signed_vectors):
        for name, vector in source():
            (FOLDER / f"{name}.json").write_text(json.dumps(vector, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
