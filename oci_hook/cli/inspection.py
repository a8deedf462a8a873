"""What `sczctl inspect` shows of a bundle, a grant or a boot policy: their words, unverified."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from oci_hook.access_policy import TIME_HIGH
from oci_hook.audit import format_time
from oci_hook.bundle.grant import GRANT_LIMIT_BYTES, GRANT_TYP
from oci_hook.bundle.layout import Layout, open_layout
from oci_hook.bundle.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_TYP
from oci_hook.bundle.revocations import parse_revocations
from oci_hook.documents import parse_object
from oci_hook.errors import BundleInvalid, GrantInvalid
from oci_hook.jws import parse_document
from oci_hook.key_errors import RevocationsMissing
from oci_hook.owner.recovery import load_recovery_copy
from oci_hook.trusted_file import load_file

_DOCUMENT_BYTES = 1 << 20
_TIMES = frozenset({"created", "enrolled", "not_before", "not_after"})
_KINDS = {
    "scz-smm/boot-policy/v1": "boot policy",
    "scz-smm/owner/v1": "owner",
    "scz-smm/issuer/v1": "issuer",
    "scz-smm/device/v1": "device record",
    "scz-smm/measurement/v1": "measurement",
    "scz-smm/evidence/v1": "evidence",
    "scz-smm/lease-request/v1": "lease request",
    "scz-smm/line/v1": "model line",
}


def describe(path: str) -> dict[str, Any]:
    """The document behind a path, with its kind and digests.

    Raises:
        InputError: It is none of the three, or malformed.
    """
    if os.path.isdir(path):
        with open_layout(path) as layout:
            return describe_bundle(layout)
    data = load_file(path, limit_bytes=_DOCUMENT_BYTES, error=BundleInvalid)
    if data.lstrip()[:1] == b"{":
        document = parse_object(data, limit_bytes=_DOCUMENT_BYTES, what=path, error=BundleInvalid)
        return _headed(document, kind=_KINDS.get(str(document.get("schema")), "document"))
    if data.count(b".") != 2:  # three parts are a JWS, and of those grants and lists of revocations are files
        raise BundleInvalid(f"{path} is neither a bundle's folder, a grant nor a JSON document")
    with contextlib.suppress(RevocationsMissing):
        found = parse_revocations(data)
        payload = parse_object(found.unverified_payload, limit_bytes=_DOCUMENT_BYTES, what=path, error=BundleInvalid)
        return _headed(payload, kind="list of revocations", owner=found.owner_id)
    jws = parse_document(data, typ=GRANT_TYP, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=GrantInvalid)
    payload = parse_object(jws.unverified_payload, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=GrantInvalid)
    payload.pop("wrapped_key", None)
    return _headed(payload, kind="grant", owner=jws.unverified_header["kid"])


def _headed(document: dict[str, Any], **first: object) -> dict[str, Any]:
    """The document with members of ours at its head; it cannot say another thing in their place."""
    return {**first, **{key: value for key, value in document.items() if key not in first}}


def describe_bundle(layout: Layout) -> dict[str, Any]:
    """What the manifest of an open bundle says, with its kind and digests.

    Raises:
        BundleInvalid: It is malformed.
    """
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
    copy = load_recovery_copy(layout)
    recoverable = {} if copy is None else {"recovery_key": copy[0]}
    return _headed(
        payload,
        **recoverable,
        kind="bundle",
        image=layout.image_digest,
        manifest=layout.manifest_digest,
        owner=jws.unverified_header["kid"],
    )


def lines(value: object, indent: str = "") -> Iterator[str]:
    """A document for a person: a line a value, indented by depth; hostile strings are escaped as JSON escapes them."""
    if isinstance(value, dict):
        for key, part in value.items():
            label = f"{indent}{_text(key)}:"
            if key in _TIMES and type(part) is int and 0 <= part <= TIME_HIGH:
                yield f"{label} {format_time(part)}"
            else:
                yield from _named(label, part, indent)
    elif isinstance(value, list):
        for part in value:
            yield from _named(f"{indent}-", part, indent)


def _named(label: str, part: object, indent: str) -> Iterator[str]:
    if isinstance(part, dict | list) and part:
        yield label
        yield from lines(part, indent + "  ")
    else:
        yield f"{label} {_text(part)}"


def _text(value: object) -> str:
    """JSON's ASCII spelling, without its quotation marks where the text is plain."""
    spelled = json.dumps(value)
    return value if isinstance(value, str) and spelled == f'"{value}"' and value.isprintable() else spelled
