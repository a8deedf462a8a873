"""The hot path: from encrypted files to plaintext in detached memory file systems, with flat memory.

Runs in a forked writer that is in the container's memory control group and ends when it is done. The segments of all
files of all models are one list that the threads take from, so neither a large file nor ten thousand small ones leave
a core idle. A segment is read into a reused buffer and decrypted straight into the mapped file where huge pages back
it (large files on tmpfs), else into a second reused buffer and written: what `facts/performance.md` measured as best.
AES-GCM and the reads run without Python's lock.

Every segment is authenticated; the first that is not ends it all, and the caller drops the mounts, which nobody could
reach. Nothing is made read-only or visible here. Formats: docs/specification.md, "Encrypted file".
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oci_hook.bundle.layout import Layout
from oci_hook.bundle.manifest import MODEL_DOCUMENT, FileEntry, Manifest
from oci_hook.bundle.segments import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    ContentKey,
    FilePlan,
    Segment,
    associated_data,
    plan_decryption,
)
from oci_hook.documents import shown
from oci_hook.errors import DecryptionRefused, FileUnreadable
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import PAGE_BYTES, DetachedMount

_HUGE_PAGE_BYTES = 1 << 21
_WORKERS_LIMIT = 4
_FILE_MODE, _DIRECTORY_MODE = 0o444, 0o555


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


@dataclass(frozen=True, slots=True)
class Target:
    """A model, and the empty file system that it goes to."""

    model: ModelDelivery
    mount: DetachedMount


@dataclass(frozen=True, slots=True)
class FillOptions:
    """How to fill.

    Attributes:
        uid: Host uid of the container's root, which owns all.
        gid: Host gid of the container's root.
        workers: Threads; None: a thread for each core that we may use, at most 4.
        drop_cache: Whether the kernel is to forget the encrypted files when they were read: in a group with a limit
            they would count.
    """

    uid: int
    gid: int
    workers: int | None
    drop_cache: bool


class _Buffers:
    """A thread's own two segments: what was read, and (without huge pages) what was decrypted."""

    def __init__(self) -> None:
        self.sealed = memoryview(bytearray(SEGMENT_BYTES))
        self._plain: memoryview | None = None

    def plain(self, length: int) -> memoryview:
        if self._plain is None:
            self._plain = memoryview(bytearray(SEGMENT_BYTES))
        return self._plain[:length]


class _File:
    """One file of one model: opened by the first thread that takes a segment of it, closed by the last."""

    def __init__(self, target: Target, entry: FileEntry, options: FillOptions) -> None:
        self._target = target
        self._entry = entry
        self._options = options
        self._lock = threading.Lock()
        self._open: ExitStack | None = None
        self.segments = -(-entry.layer_size // SEGMENT_BYTES)
        self._left = self.segments

    def process(self, index: int, buffers: _Buffers) -> int:
        """Decrypt one segment; how many bytes of plaintext it had."""
        with self._lock:
            if self._open is None:
                with ExitStack() as stack:
                    self._start(stack)
                    self._open = stack.pop_all()
        segment = self._plan.segment(index)
        sealed = buffers.sealed[: segment.length_ciphertext]
        self._read(sealed, segment.offset_ciphertext)
        self._decrypt(index, segment, sealed, buffers)
        with self._lock:
            self._left -= 1
            if not self._left:
                self._finish(self._open)
        return segment.length_plaintext

    def _start(self, stack: ExitStack) -> None:
        model, entry = self._target.model, self._entry
        self._source = model.layout.open_blob(entry.layer_digest)
        stack.callback(os.close, self._source)
        with suppress(OSError):  # a hint
            os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        header = bytearray(HEADER_BYTES)
        self._read(memoryview(header), 0)
        self._plan: FilePlan = plan_decryption(
            bytes(header),
            content_key=model.content_key,
            associated_data=associated_data(model.manifest.model, entry.path),
            ciphertext_bytes=entry.layer_size,
            plaintext_bytes=entry.size,
        )
        self._cipher = AESGCM(self._plan.file_key)
        self._file = create_file(self._target.mount, entry.path, self._options)
        stack.callback(os.close, self._file)
        # The final size first: huge=within_size looks at it when a page is first touched.
        os.ftruncate(self._file, entry.size)
        self._mapped: memoryview | None = None
        if self._target.mount.huge and entry.size >= _HUGE_PAGE_BYTES:
            mapping = mmap.mmap(self._file, entry.size)
            stack.callback(mapping.close)
            self._mapped = memoryview(mapping)
            stack.callback(self._mapped.release)

    def _finish(self, opened: ExitStack) -> None:
        os.fchmod(self._file, _FILE_MODE)
        if self._options.drop_cache:
            with suppress(OSError):  # a hint
                os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_DONTNEED)
        opened.close()

    def _read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._source, [buffer[done:]], offset + done)
            except OSError as cause:
                raise FileUnreadable(f"the layer of {shown(self._entry.path)}: {cause.strerror}") from cause
            if not count:
                raise FileUnreadable(f"the layer of {shown(self._entry.path)} ends early")
            done += count

    def _decrypt(self, index: int, segment: Segment, sealed: memoryview, buffers: _Buffers) -> None:
        start, length = segment.offset_plaintext, segment.length_plaintext
        try:
            if self._mapped is not None:
                with self._mapped[start : start + length] as plain:
                    self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
                return
            plain = buffers.plain(length)
            self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
        except InvalidTag as cause:
            raise DecryptionRefused(
                f"{self._target.model.manifest.model.name}: segment {index} of {self.segments} of "
                f"{shown(self._entry.path)} does not authenticate"
            ) from cause
        write_all(self._file, plain, start)


def create_file(mount: DetachedMount, path: str, options: FillOptions) -> int:
    """Make an empty file that must not be there yet; mode 0600 until it is complete."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd = syscalls.openat2(
        mount.fd, path, flags, resolve=syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS, mode=0o600
    )
    os.fchown(fd, options.uid, options.gid)
    return fd


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite(2) to the end."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class _Work:
    """The list of segments, and what was done of it."""

    def __init__(self, files: Sequence[_File], progress: Callable[[int], None]) -> None:
        self._left: Iterator[tuple[_File, int]] = ((file, index) for file in files for index in range(file.segments))
        self._lock = threading.Lock()
        self._progress = progress
        self._stopped = False
        self.done_bytes = 0

    def run(self) -> None:
        """Take segments until none is left, or a thread has failed. Runs in every thread."""
        buffers = _Buffers()
        complete = False
        try:
            while not self._stopped:
                with self._lock:
                    following = next(self._left, None)
                if following is None:
                    break
                file, index = following
                count = file.process(index, buffers)
                with self._lock:
                    self.done_bytes += count
                    self._progress(self.done_bytes)
            complete = True
        finally:
            if not complete:
                self._stopped = True


def fill(targets: Sequence[Target], options: FillOptions, progress: Callable[[int], None]) -> int:
    """Decrypt every file of every model, and set owners and modes.

    All descriptors and mappings of a file are closed when it is complete; after an error the process is to end.

    Args:
        targets: The models and their empty file systems.
        options: How.
        progress: Called with the bytes of plaintext done so far, under a lock.

    Returns:
        The bytes of plaintext.

    Raises:
        DecryptionRefused: A segment does not authenticate, or a file has not the form.
        FileUnreadable: A layer cannot be read.
        BundleInvalid: A layer is missing.
        BundleMismatch: A layer has another size.
        SystemCallFailed: The memory file system refuses.
    """
    with syscalls.failing("the model cannot be written to memory"):
        for target in targets:
            _create_skeleton(target, options)
        files = [_File(target, entry, options) for target in targets for entry in target.model.manifest.files]
        work = _Work(files, progress)
        _run(work, min(options.workers or default_workers(), sum(file.segments for file in files)))
        for target in targets:
            _finish_directories(target, options)
    return work.done_bytes


def default_workers() -> int:
    """A thread for each core that this process may use, at most 4."""
    return min(len(os.sched_getaffinity(0)), _WORKERS_LIMIT)


def _run(work: _Work, workers: int) -> None:
    with ThreadPoolExecutor(max(1, workers - 1)) as others:
        running = []
        for _ in range(workers - 1):
            # The container's pids.max may forbid a thread; the work is done by those that there are.
            with suppress(RuntimeError):
                running.append(others.submit(work.run))
        work.run()
    for one in running:
        one.result()


def _create_skeleton(target: Target, options: FillOptions) -> None:
    """The directories and `model.json`."""
    for path in directories_of(entry.path for entry in target.model.manifest.files):
        os.mkdir(path, 0o700, dir_fd=target.mount.fd)
    fd = create_file(target.mount, MODEL_DOCUMENT, options)
    try:
        write_all(fd, memoryview(target.model.document), 0)
        os.fchmod(fd, _FILE_MODE)
    finally:
        os.close(fd)


def _finish_directories(target: Target, options: FillOptions) -> None:
    for path in (*reversed(directories_of(entry.path for entry in target.model.manifest.files)), "."):
        os.chown(path, options.uid, options.gid, dir_fd=target.mount.fd)
        os.chmod(path, _DIRECTORY_MODE, dir_fd=target.mount.fd)
