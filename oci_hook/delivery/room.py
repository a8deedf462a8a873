"""A model on its way to a container, and the room that it takes of a memory file system. Pure.

Specification: docs/specification.md, "Manifest"; Documentation/filesystems/tmpfs.rst on `size` and `nr_inodes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from oci_hook.bundle.layout import Layout
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.segments import ContentKey
from oci_hook.linux.mounts import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class ModelDelivery:
    """One model for one container.

    Attributes:
        slot: Which of the container's models it is, as its annotation names it.
        destination: Absolute path in the container.
        manifest: Verified.
        layout: The bundle, open, and checked against the manifest.
        content_key: From the release.
        document: The bytes of `model.json`.
    """

    slot: str
    destination: str
    manifest: Manifest
    layout: Layout
    content_key: ContentKey
    document: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Room:
    """What a model takes of a memory file system: bytes in whole pages, and inodes with the root's."""

    size_bytes: int
    inodes: int


def measure_room(sizes: Iterable[int], paths: Iterable[str]) -> Room:
    """The room that files of these sizes (bytes) take, in the directories of these relative paths.

    Huge pages take no more: with `huge=within_size` only what lies wholly within a file is backed by them.
    """
    counted, pages = 0, 0
    for size in sizes:
        counted += 1
        pages += -(-size // PAGE_BYTES)
    return Room(pages * PAGE_BYTES, counted + len(directories_of(paths)) + 1)


def model_room(model: ModelDelivery) -> Room:
    """The room that a model takes, with its `model.json`."""
    files = model.manifest.files
    return measure_room((len(model.document), *(entry.size for entry in files)), (entry.path for entry in files))


def directories_of(paths: Iterable[str]) -> list[str]:
    """Every directory that these relative paths lie in, parents first."""
    found: set[str] = set()
    for path in paths:
        parts = path.split("/")[:-1]
        found.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return sorted(found)
