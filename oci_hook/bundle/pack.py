"""Packing: a folder of files becomes an encrypted, signed bundle.

The folder is walked without following links, twice: what changed in between is refused. Each file is read once,
encrypted, hashed and written with flat memory. The content key comes from the caller and is stored by the caller.
Specification: docs/specification.md, "Encrypted file", "Model bundle", "Manifest".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import AccessPolicy
from oci_hook.bundle.files import closing, open_beneath, read_chunk, refusal
from oci_hook.bundle.image import Layer, layer_media_type
from oci_hook.bundle.manifest import FILES_LIMIT, MODEL_DOCUMENT, FileEntry, compact_digest, sign_manifest
from oci_hook.bundle.model import ModelId, verify_path
from oci_hook.bundle.segments import (
    FILE_LIMIT_BYTES,
    PREFIX_BYTES,
    SALT_BYTES,
    ContentKey,
    associated_data,
    ciphertext_size,
    encrypt_stream,
)
from oci_hook.bundle.writer import LayoutWriter
from oci_hook.disk_space import Need, block_bytes, verify_room
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, SourceInvalid

_STAND_IN = FileEntry("file", 0, "sha256:" + 64 * "0", ciphertext_size(0))
_DOCUMENTS = (4096, 4096, 4096, 4096)  # manifest, image manifest, index and layout file of a model of few files
_REMEDY = "free {size} on {mount} (`df -h {mount}`), or give -o on another disk"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source folder as it was when the folder was walked."""

    path: str
    size: int
    modified_ns: int
    inode: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PackedBundle:
    """What was packed: digests, number of files, and the sum of their sizes (plaintext)."""

    image_digest: str
    manifest_digest: str
    files: int
    bytes: int


def scan_source(source: Path) -> tuple[SourceFile, ...]:
    """List a source folder, sorted by path; the sum of the sizes is what `pack` counts to.

    Raises:
        SourceInvalid: Not a folder; no file, or more than 10,000; a link or special file; a name that a manifest cannot
            carry; a file named `model.json` at the top.
        FileUnreadable: The system said no.
    """
    with closing(_open_source(source)) as folder:
        return _scan(folder)


def bundle_need(files: Iterable[SourceFile], folder: Path) -> Need:
    """The room that the bundle of these files takes in `folder`, which exists (OSError)."""
    sizes = [ciphertext_size(file.size) for file in files]
    return Need.of([*sizes, *_DOCUMENTS], block_bytes(str(folder)), _REMEDY)


def pack(
    source: Path,
    output: Path,
    *,
    model: ModelId,
    access: AccessPolicy,
    fields: Mapping[str, Any],
    created: int,
    owner_id: str,
    key: ec.EllipticCurvePrivateKey,
    content_key: ContentKey,
    random: Callable[[int], bytes],
    progress: Callable[[int], object],
    annotate: Callable[[str], Mapping[str, str]] = lambda _manifest_digest: {},
) -> PackedBundle:
    """Pack a folder into a bundle.

    Args:
        source: A folder of regular files. It may be named through a link; nothing in it may be one. Folders that hold
            no file are not packed.
        output: The bundle's folder; its parent exists, it does not.
        model: What it is called.
        access: Who may have it.
        fields: The owner's free object.
        created: Seconds since 1970.
        owner_id: The thumbprint of `key`.
        key: The owner's manifest key.
        content_key: This model version's own key.
        random: Gives so many random bytes, as `os.urandom` does.
        progress: Called with the bytes of plaintext done so far.
        annotate: Asked once, with the manifest digest, for the image manifest's annotations.

    Raises:
        OutputExists: Nothing is overwritten.
        SourceInvalid: As for `scan_source`; a file that changed meanwhile; an output inside the source; fields that a
            manifest cannot carry.
        KeyInvalid: The key is not the owner's.
        FileUnreadable: The system said no; the disk has no room.
    """
    try:
        with closing(_open_source(source)) as folder:
            found = _scan(folder)
            if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
                raise SourceInvalid("the output lies inside the source")
            # What cannot be signed, or has no room, is refused now, not after hours of encrypting.
            sign_manifest(model, [_STAND_IN], access, fields, created, owner_id=owner_id, key=key)
            verify_room(str(output.parent), bundle_need(found, output.parent))
            with LayoutWriter(output) as writer:
                packer = _Packer(folder, writer, model, content_key, random, progress)
                layers, entries = zip(*(packer.add(file) for file in found), strict=True)
                if _scan(folder) != found:
                    raise SourceInvalid("the source folder changed while it was packed")
                compact = sign_manifest(model, entries, access, fields, created, owner_id=owner_id, key=key)
                annotations = annotate(compact_digest(compact))
                image = writer.commit(writer.add_blob(compact), layers, model.version, annotations)
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or output)}: {cause.strerror}") from cause
    return PackedBundle(image.digest, compact_digest(compact), len(entries), sum(entry.size for entry in entries))


class _Packer:
    """Encrypts file after file into one layout."""

    def __init__(
        self,
        folder: int,
        writer: LayoutWriter,
        model: ModelId,
        content_key: ContentKey,
        random: Callable[[int], bytes],
        progress: Callable[[int], object],
    ) -> None:
        self._folder, self._writer, self._model = folder, writer, model
        self._content_key, self._random, self._progress = content_key, random, progress
        self._done = 0

    def add(self, file: SourceFile) -> tuple[Layer, FileEntry]:
        """Encrypt one file; its layer and its line in the manifest."""
        with (
            closing(open_beneath(self._folder, file.path.split("/"), error=SourceInvalid)) as descriptor,
            self._writer.blob() as blob,
        ):
            _verify_unchanged(file, os.fstat(descriptor))

            def read(size_bytes: int) -> bytes:
                piece = read_chunk(descriptor, size_bytes, shown(file.path))
                if piece:
                    self._done += len(piece)
                    self._progress(self._done)
                return piece

            encrypt_stream(
                read,
                blob.write,
                content_key=self._content_key,
                associated_data=associated_data(self._model, file.path),
                salt=self._random(SALT_BYTES),
                nonce_prefix=self._random(PREFIX_BYTES),
                plaintext_bytes=file.size,
            )
            _verify_unchanged(file, os.fstat(descriptor))
        sealed = blob.descriptor
        return (
            Layer(sealed.digest, sealed.size, file.path, layer_media_type(file.path)),
            FileEntry(file.path, file.size, sealed.digest, sealed.size),
        )


def _open_source(source: Path) -> int:
    try:
        return os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as cause:
        raise refusal(cause, f"the source {shown(source)}", SourceInvalid) from cause


def _scan(folder: int) -> tuple[SourceFile, ...]:
    found: list[SourceFile] = []
    try:
        _walk(folder, "", found)
    except OSError as cause:
        raise refusal(cause, "the source folder", SourceInvalid) from cause
    if not found:
        raise SourceInvalid("the source folder has no files")
    found.sort(key=lambda file: file.path)
    if any(file.path == MODEL_DOCUMENT or file.path.startswith(f"{MODEL_DOCUMENT}/") for file in found):
        raise SourceInvalid(f"the source has a {MODEL_DOCUMENT}, a name that is taken on delivery: rename it")
    return tuple(found)


def _walk(folder: int, prefix: str, found: list[SourceFile]) -> None:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = verify_path(prefix + name, error=SourceInvalid)
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            with closing(os.open(name, _FOLDER, dir_fd=folder)) as inner:
                _walk(inner, f"{path}/", found)
        elif stat.S_ISREG(status.st_mode):
            if status.st_size > FILE_LIMIT_BYTES or len(found) == FILES_LIMIT:
                raise SourceInvalid(f"the source has more than {FILES_LIMIT} files, or {shown(path)} is too large")
            found.append(SourceFile(path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)))
        else:
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
            raise SourceInvalid(f"{shown(path)} is {kind}")


def _verify_unchanged(file: SourceFile, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)) != (
        file.size,
        file.modified_ns,
        file.inode,
    ):
        raise SourceInvalid(f"{shown(file.path)} changed while it was packed")
