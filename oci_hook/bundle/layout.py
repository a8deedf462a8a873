"""The OCI image layout of a bundle: opening it in a hostile folder, and checking it against the manifest.

Every file is opened beneath one directory descriptor, without following links, and must be a regular file of a bounded
size. Nothing here is trusted before `verify_bundle`, and no byte of a layer before `verify_digests` (the store's check)
or decryption. Writing is `writer`'s. Specification: docs/specification.md, "Model bundle"; OCI image-spec 1.1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from oci_hook.bundle.files import (
    CHUNK_BYTES,
    closing,
    open_beneath,
    open_folder,
    open_regular,
    read_bounded,
    read_chunk,
    refusal,
)
from oci_hook.bundle.image import (
    BLOBS,
    INDEX_FILE,
    INDEX_LIMIT_BYTES,
    LAYOUT_FILE,
    Descriptor,
    Layer,
    parse_image_manifest,
    parse_index,
    parse_layout_file,
)
from oci_hook.bundle.manifest import Manifest, compact_digest
from oci_hook.bundle.writer import LayoutWriter
from oci_hook.documents import shown
from oci_hook.errors import BundleInvalid, BundleMismatch, StoreInvalid
from oci_hook.trusted_file import verify_root_alone

__all__ = [
    "BLOBS",
    "INDEX_FILE",
    "LAYOUT_FILE",
    "Layer",
    "Layout",
    "LayoutWriter",
    "open_layout",
    "verify_bundle",
    "verify_digests",
]


class Layout:
    """An opened bundle. Its index, image manifest and config blob were read and hash to their digests; that is all.

    Attributes:
        image_digest: The image manifest's digest.
        version_tag: What `index.json` calls it, if anything; unsigned, and a registry's user may choose another.
        manifest_digest: The config blob's digest.
        config_blob: The signed manifest's compact bytes, not yet verified.
        layers: In the image manifest's order.
    """

    __slots__ = (
        "_blobs",
        "_directory",
        "_remedy",
        "_root_alone",
        "_sizes",
        "config_blob",
        "image_digest",
        "layers",
        "manifest_digest",
        "version_tag",
    )

    def __init__(self, directory: int, *, root_alone: bool = False, remedy: str | None = None) -> None:
        """Read the bundle in `directory`, a descriptor that the layout owns from now on; as `open_layout` says."""
        self._directory, self._blobs = directory, -1
        self._root_alone, self._remedy = root_alone, remedy
        self._sizes: dict[str, int] = {}
        try:
            with self._mended():
                self._verify_folders()
                self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        parse_layout_file(self._read(LAYOUT_FILE))
        image, self.version_tag = parse_index(self._read(INDEX_FILE))
        # Held, so that each of ten thousand layers is one step away.
        try:
            self._blobs = open_folder(self._directory, BLOBS)
        except OSError as cause:
            raise refusal(cause, shown("/".join(BLOBS)), BundleInvalid) from cause
        self._verify_alone(os.fstat(self._blobs), BLOBS)
        self.image_digest = image.digest
        config, self.layers = parse_image_manifest(self._read_blob(image))
        self.manifest_digest = config.digest
        self.config_blob = self._read_blob(config)
        for layer in self.layers:
            if self._sizes.setdefault(layer.digest, layer.size) != layer.size:
                raise BundleInvalid("image manifest: one digest has two sizes")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the directories; blobs that were opened stay open."""
        for descriptor in (self._blobs, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._blobs = self._directory = -1

    def open_blob(self, digest: str) -> int:
        """Open a blob that the image manifest names.

        Args:
            digest: Of a layer, the config blob or the image manifest.

        Returns:
            A descriptor, O_RDONLY and O_CLOEXEC, of a regular file that had the promised size when it was opened; the
            caller closes it. Its contents are unchecked.

        Raises:
            BundleInvalid: Nothing names it, or it is missing, a link, or not a regular file.
            BundleMismatch: It has another size.
            FileUnreadable: The system said no.
        """
        size = self._sizes.get(digest)
        if size is None:
            raise BundleInvalid(f"the image manifest does not name {shown(digest)}")
        with self._mended():
            parts = (*BLOBS, digest.removeprefix("sha256:"))
            what = shown("/".join(parts))
            try:
                descriptor = open_regular(self._blobs, parts[-1], what, error=BundleInvalid)
            except OSError as cause:
                raise refusal(cause, what, BundleInvalid) from cause
            found = os.fstat(descriptor)
            try:
                self._verify_alone(found, parts)
                if found.st_size != size:
                    raise BundleMismatch(f"the blob {digest} has {found.st_size} bytes instead of {size}")
            except (BundleMismatch, StoreInvalid):
                os.close(descriptor)
                raise
            return descriptor

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """What is wrong with the bundle is told with what mends this one."""
        try:
            yield
        except (BundleInvalid, BundleMismatch, StoreInvalid) as error:
            error.advice = self._remedy or error.advice
            raise

    def _open(self, parts: tuple[str, ...]) -> int:
        descriptor = open_beneath(self._directory, parts, error=BundleInvalid)
        try:
            self._verify_alone(os.fstat(descriptor), parts)
        except StoreInvalid:
            os.close(descriptor)
            raise
        return descriptor

    def _verify_folders(self) -> None:
        """From the top: what is root's alone cannot be exchanged while the next one is looked at."""
        self._verify_alone(os.fstat(self._directory), ())
        for depth in range(1, len(BLOBS) + 1) if self._root_alone else ():
            with suppress(OSError):  # it will be missed when it is opened
                found = os.stat("/".join(BLOBS[:depth]), dir_fd=self._directory, follow_symlinks=False)
                self._verify_alone(found, BLOBS[:depth])

    def _verify_alone(self, found: os.stat_result, parts: tuple[str, ...]) -> None:
        if self._root_alone:
            verify_root_alone(found, "/".join(parts) or "the bundle's folder", StoreInvalid)

    def _read(self, name: str) -> bytes:
        with closing(self._open((name,))) as descriptor:
            return read_bounded(descriptor, INDEX_LIMIT_BYTES, name, error=BundleInvalid)

    def _read_blob(self, blob: Descriptor) -> bytes:
        if self._sizes.setdefault(blob.digest, blob.size) != blob.size:
            raise BundleInvalid("image manifest: one digest has two sizes")
        with closing(self.open_blob(blob.digest)) as descriptor:
            data = read_bounded(descriptor, blob.size, f"the blob {blob.digest}", error=BundleMismatch)
        if compact_digest(data) != blob.digest:
            raise BundleMismatch(f"the blob {blob.digest} does not hash to its name")
        return data


def open_layout(folder: str | os.PathLike[str] | int, *, root_alone: bool = False, remedy: str | None = None) -> Layout:
    """Open a bundle and read its small parts.

    Args:
        folder: A path, which may be a link to a folder, or a directory descriptor, which stays the caller's.
        root_alone: Refuse folders and files that others than root could have written: for the store's.
        remedy: What mends this bundle, if something is missing from it, or of another size.

    Returns:
        The layout; close it, or use it with `with`.

    Raises:
        BundleInvalid: Not a bundle, malformed, or too large.
        BundleMismatch: A blob is not what its digest or size says.
        StoreInvalid: With `root_alone`: others could have written it.
        FileUnreadable: The system said no.
    """
    try:
        # Beneath the folder no link is followed; the folder itself is the caller's word.
        directory = os.dup(folder) if isinstance(folder, int) else os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as cause:
        problem = refusal(cause, f"the bundle {shown(folder)}", BundleInvalid)
        problem.advice = remedy or problem.advice
        raise problem from cause
    return Layout(directory, root_alone=root_alone, remedy=remedy)


def verify_bundle(layout: Layout, manifest: Manifest) -> None:
    """Check that a layout carries exactly what its owner signed: this manifest, these layers, in this order.

    Raises:
        BundleMismatch: The check that failed.
    """
    # 1. The manifest that was verified is this layout's own.
    if layout.manifest_digest != manifest.digest:
        raise BundleMismatch("the verified manifest is not this bundle's config blob")
    # 2. As many layers as files: none missing, none slipped in.
    if len(layout.layers) != len(manifest.files):
        raise BundleMismatch(f"the bundle has {len(layout.layers)} layers, its owner signed {len(manifest.files)}")
    # 3. Each in its place, under its path, with its digest and size.
    for layer, entry in zip(layout.layers, manifest.files, strict=True):
        if (layer.path, layer.digest, layer.size) != (entry.path, entry.layer_digest, entry.layer_size):
            raise BundleMismatch(f"the layer in the place of {shown(entry.path)} is not the one that its owner signed")


def verify_digests(layout: Layout, manifest: Manifest, progress: Callable[[int], object]) -> None:
    """Check the SHA-256 of every layer that the owner signed, with flat memory.

    Args:
        layout: Checked by `verify_bundle`.
        manifest: The verified manifest.
        progress: Called with the bytes done so far, out of the sum of the layers' sizes.

    Raises:
        BundleInvalid: A layer is missing, a link or not a regular file.
        BundleMismatch: A layer has another digest or size.
        FileUnreadable: The system said no.
    """
    done = 0
    for entry in manifest.files:
        digest, left = hashlib.sha256(), entry.layer_size
        with closing(layout.open_blob(entry.layer_digest)) as descriptor:
            # One byte more than there should be is asked for: a file that grows meanwhile is not followed.
            while chunk := read_chunk(descriptor, min(CHUNK_BYTES, left + 1), entry.layer_digest):
                digest.update(chunk)
                left -= len(chunk)
                done += len(chunk)
                if left < 0:
                    break
                progress(done)
        if left != 0 or f"sha256:{digest.hexdigest()}" != entry.layer_digest:
            raise BundleMismatch(f"the layer of {shown(entry.path)} does not hash to the digest that its owner signed")
