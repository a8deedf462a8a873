"""Writing an OCI image layout so that it is there whole or not at all.

Blobs are hashed while they are written, everything is synced, `index.json` comes last, then the folder is renamed into
its place: what is left by `kill -9` has no index and another name. What the blobs hold is the caller's business.
Specification: docs/specification.md, "Model bundle".
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from oci_hook.bundle.files import CREATE, NewFolder, closing, create_file, write_all
from oci_hook.bundle.image import (
    BLOBS,
    IMAGE_MANIFEST_LIMIT_BYTES,
    INDEX_FILE,
    LAYOUT_DOCUMENT,
    LAYOUT_FILE,
    Descriptor,
    Layer,
    image_manifest_document,
    index_document,
)
from oci_hook.errors import SourceInvalid
from oci_hook.trusted_file import sync_directory


class BlobWriter:
    """A blob under way: hashed while it is written."""

    __slots__ = ("_descriptor", "_digest", "_size")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._digest.update(data)
        write_all(self._descriptor, data)
        self._size += len(data)

    @property
    def descriptor(self) -> Descriptor:
        """Digest and size of what was written so far."""
        return Descriptor(f"sha256:{self._digest.hexdigest()}", self._size)


class LayoutWriter:
    """Builds a layout; use it with `with`, and call `commit` last. Without `commit` nothing stays.

    Args:
        output: Where the layout shall be; its parent exists, it does not.

    Raises:
        OutputExists: On entering, or in `commit` if somebody else was faster.
        OSError: As the system gives it; the caller says what it means.
    """

    def __init__(self, output: Path) -> None:
        self._folder = NewFolder(output)

    def __enter__(self) -> Self:
        self._folder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.__exit__(kind, value, trace)

    @contextmanager
    def blob(self) -> Iterator[BlobWriter]:
        """A blob to be written piece by piece; at the end of the `with` it is synced and gets its name."""
        path, blobs = self._folder.partial / "blob", self._folder.partial.joinpath(*BLOBS)
        blobs.mkdir(parents=True, exist_ok=True)
        with closing(os.open(path, CREATE, 0o644)) as descriptor:
            blob = BlobWriter(descriptor)
            yield blob
            os.fsync(descriptor)
        os.rename(path, blobs / blob.descriptor.digest.removeprefix("sha256:"))

    def add_blob(self, data: bytes) -> Descriptor:
        """Write a small blob at once."""
        with self.blob() as blob:
            blob.write(data)
        return blob.descriptor

    def commit(
        self,
        config: Descriptor,
        layers: Sequence[Layer],
        version: str,
        annotations: Mapping[str, str] = MappingProxyType({}),
    ) -> Descriptor:
        """Write the image manifest and the index, and put the layout in its place.

        Args:
            config: The signed manifest's blob, written before.
            layers: The encrypted files' blobs, written before, in the manifest's order.
            version: The tag in `index.json`.
            annotations: Of the image manifest.

        Returns:
            The image manifest's descriptor.

        Raises:
            OutputExists: Something appeared at the output meanwhile.
            SourceInvalid: The image manifest would be too large.
        """
        document = image_manifest_document(config, layers, annotations)
        if len(document) > IMAGE_MANIFEST_LIMIT_BYTES:
            raise SourceInvalid(f"the image manifest would be larger than {IMAGE_MANIFEST_LIMIT_BYTES} bytes")
        image = self.add_blob(document)
        partial = self._folder.partial
        blobs = partial / BLOBS[0]
        sync_directory(str(partial.joinpath(*BLOBS)))
        sync_directory(str(blobs))
        create_file(partial / LAYOUT_FILE, LAYOUT_DOCUMENT, mode=0o644)
        create_file(partial / INDEX_FILE, index_document(image, version), mode=0o644)
        self._folder.publish(mode=stat.S_IMODE(blobs.stat().st_mode))  # 0777 as the umask narrowed it
        return image
