"""What `sczctl inspect` shows of a bundle, a grant or a boot policy: their words, unverified."""

from __future__ import annotations

import os
from typing import Any

from oci_hook.bundle.grant import GRANT_LIMIT_BYTES, GRANT_TYP
from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_TYP
from oci_hook.documents import parse_object
from oci_hook.errors import BundleInvalid, GrantInvalid
from oci_hook.jws import parse_document
from oci_hook.trusted_file import load_file

_DOCUMENT_BYTES = 1 << 20


def describe(path: str) -> dict[str, Any]:
    """The document behind a path, with its kind and digests.

    Raises:
        InputError: It is none of the three, or malformed.
    """
    if os.path.isdir(path):
        return _bundle(path)
    data = load_file(path, limit_bytes=_DOCUMENT_BYTES, error=BundleInvalid)
    if data[:1] == b"{":
        return {"kind": "document", **parse_object(data, limit_bytes=_DOCUMENT_BYTES, what=path, error=BundleInvalid)}
    jws = parse_document(data, typ=GRANT_TYP, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=GrantInvalid)
    payload = parse_object(jws.unverified_payload, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=GrantInvalid)
    payload.pop("wrapped_key", None)
    return {"kind": "grant", "owner": jws.unverified_header["kid"], **payload}


def _bundle(path: str) -> dict[str, Any]:
    with open_layout(path) as layout:
        jws = parse_document(
            layout.config_blob,
            typ=MANIFEST_TYP,
            limit_bytes=MANIFEST_LIMIT_BYTES,
            what="manifest",
            error=BundleInvalid,
        )
        payload = parse_object(
            jws.unverified_payload, limit_bytes=MANIFEST_LIMIT_BYTES, what="manifest", error=BundleInvalid
        )
        return {
            "kind": "bundle",
            "image": layout.image_digest,
            "manifest_digest": layout.manifest_digest,
            "owner": jws.unverified_header["kid"],
            **payload,
        }
