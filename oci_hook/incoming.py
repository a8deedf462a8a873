"""Incoming: what lies below the paths that `sczctl add` was given, sorted by kind. Nothing of it is verified.

A stick is hostile: how deep, how many and how large is bounded before anything is believed. `intake` verifies.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from oci_hook.bundle.layout import LAYOUT_FILE, open_layout
from oci_hook.bundle.revocations import parse_revocations
from oci_hook.errors import BundleInvalid, FileUnreadable
from oci_hook.key_errors import RevocationsMissing
from oci_hook.trusted_file import load_file

DOCUMENT_BYTES = 1 << 20
_DOCUMENTS_BYTES = 32 << 20
_OBJECT_BYTES = 1 << 10  # so that a million empty files are too many as well
_MAX_ENTRIES = 1000


@dataclass(slots=True)
class Incoming:
    """What was found below the given paths, sorted by kind; nothing of it is verified."""

    bundles: list[str] = field(default_factory=list)
    grants: list[bytes] = field(default_factory=list)
    boot_policies: list[bytes] = field(default_factory=list)
    revocations: list[bytes] = field(default_factory=list)
    size_bytes: int = field(default=0, compare=False)


def collect(paths: Iterable[str]) -> Incoming:
    """Sort files and folders by what they are: a folder with `oci-layout` is a bundle, any other is looked into.

    Raises:
        FileUnreadable: A path is absent or cannot be read.
        BundleInvalid: A folder holds too much to be what was meant, a file is none of ours, or there is nothing.
    """
    incoming = Incoming()
    for path in paths:
        _collect(path, incoming, depth=0)
    if incoming == Incoming():
        raise BundleInvalid("there is no bundle, grant or boot policy to add", remedy="name their folder or files")
    return incoming


def _list_for(path: str, data: bytes, incoming: Incoming) -> list[bytes]:
    """Where a document belongs: its type, which it says itself, tells the two kinds of JWS apart."""
    if path.endswith(".json"):
        return incoming.boot_policies
    with contextlib.suppress(RevocationsMissing):  # whoever verifies a grant says what is wrong with it
        parse_revocations(data)
        return incoming.revocations
    return incoming.grants


def measure(incoming: Incoming, *, copied: bool) -> int:
    """The bytes that an intake will report as done at its end: each layer is copied (or not), then verified."""
    total = 0
    for path in incoming.bundles:
        with open_layout(path) as layout:
            total += (1 + copied) * sum(layer.size for layer in layout.layers)
    return total


def _collect(path: str, incoming: Incoming, depth: int) -> None:
    try:
        mode = os.stat(path).st_mode if depth == 0 else os.lstat(path).st_mode
        entries = sorted(os.listdir(path)) if stat.S_ISDIR(mode) else []
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    if LAYOUT_FILE in entries:
        incoming.bundles.append(path)
    elif stat.S_ISDIR(mode):
        if depth > 1 or len(entries) > _MAX_ENTRIES:
            raise BundleInvalid(f"{path} is not a folder with a bundle, a grant and a boot policy")
        for entry in entries:
            if entry.startswith("."):
                continue  # what a killed `sczctl pack` left, or a desktop's
            _collect(os.path.join(path, entry), incoming, depth + 1)
    elif path.endswith((".jwt", ".json")):
        data = load_file(path, limit_bytes=DOCUMENT_BYTES, error=BundleInvalid)
        _list_for(path, data, incoming).append(data)
        incoming.size_bytes += len(data) + _OBJECT_BYTES
        if incoming.size_bytes > _DOCUMENTS_BYTES:
            raise BundleInvalid(f"more than {_DOCUMENTS_BYTES >> 20} MiB of grants and boot policies at once")
    else:
        raise BundleInvalid(
            f"{path} is neither a bundle's folder, a grant (.jwt) nor a boot policy (.json)",
            remedy="name the files to add, or take it out of the folder",
        )
