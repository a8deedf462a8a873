"""The hot path: from encrypted files to plaintext in detached memory file systems, with flat memory.

Runs in a forked writer that is in the container's memory control group and ends when it is done. The segments of all
files of all models are one list that the threads take from, so neither a large file nor ten thousand small ones leave
a core idle. A segment is read into a reused buffer and decrypted straight into the mapped file where huge pages back
it (large files on tmpfs), else into a second reused buffer and written (docs/design.md, "Hot path", has the numbers).
AES-GCM and the reads run without Python's lock.

Every segment is authenticated; the first that is not ends it all, and the caller drops the mounts, which nobody could
reach. Nothing is made read-only or visible here. Formats: docs/specification.md, "Encrypted file".
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oci_hook.bundle.manifest import MODEL_DOCUMENT, FileEntry
from oci_hook.bundle.segments import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    FilePlan,
    associated_data,
    plan_decryption,
)
from oci_hook.delivery.room import ModelDelivery, directories_of
from oci_hook.documents import shown
from oci_hook.errors import DecryptionRefused, FileUnreadable
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import DetachedMount

_HUGE_PAGE_BYTES = 1 << 21
_WORKERS_LIMIT = 2  # what was measured; more cores are for a benchmark to judge
_THREAD_BYTES = 1 << 22  # below this a second thread costs more than it gains: opening files holds Python's lock
_RUN_SEGMENTS = 2  # taken at once: two threads at neighbouring segments wait for the same huge page to be cleared
_FILE_MODE, _DIRECTORY_MODE = 0o444, 0o555


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
        """The first `length` bytes of the second buffer, which is made when it is first needed."""
        if self._plain is None:
            self._plain = memoryview(bytearray(SEGMENT_BYTES))
        return self._plain[:length]


class _OpenFile:
    """One file while segments of it are being decrypted."""

    def __init__(self, target: Target, entry: FileEntry, options: FillOptions) -> None:
        self._model, self._entry, self._options = target.model, entry, options
        with ExitStack() as stack:
            self._source = target.model.layout.open_blob(entry.layer_digest)
            stack.callback(os.close, self._source)
            with suppress(OSError):  # a hint
                os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self.plan = self._make_plan()
            self._cipher = AESGCM(self.plan.file_key)
            self._file = create_file(target.mount, entry.path, options)
            stack.callback(os.close, self._file)
            # The final size first: huge=within_size looks at it when a page is first touched.
            os.ftruncate(self._file, entry.size)
            self._mapped: memoryview | None = None
            if target.mount.huge and entry.size >= _HUGE_PAGE_BYTES:
                mapping = mmap.mmap(self._file, entry.size)
                stack.callback(mapping.close)
                self._mapped = memoryview(mapping)
                stack.callback(self._mapped.release)
            self._descriptors = stack.pop_all()

    def _make_plan(self) -> FilePlan:
        header = bytearray(HEADER_BYTES)
        self._read(memoryview(header), 0)
        return plan_decryption(
            bytes(header),
            content_key=self._model.content_key,
            associated_data=associated_data(self._model.manifest.model, self._entry.path),
            ciphertext_bytes=self._entry.layer_size,
            plaintext_bytes=self._entry.size,
        )

    def decrypt(self, index: int, buffers: _Buffers) -> int:
        """Decrypt one segment; how many bytes of plaintext it had. In any thread, in any order."""
        segment = self.plan.segment(index)
        start, length = segment.offset_plaintext, segment.length_plaintext
        sealed = buffers.sealed[: segment.length_ciphertext]
        self._read(sealed, segment.offset_ciphertext)
        try:
            if self._mapped is not None:
                with self._mapped[start : start + length] as plain:
                    self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
            else:
                plain = buffers.plain(length)
                self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
                write_all(self._file, plain, start)
        except InvalidTag as cause:
            raise DecryptionRefused(
                f"{self._model.manifest.model.name}: segment {index} of {self.plan.segments} of "
                f"{shown(self._entry.path)} does not authenticate"
            ) from cause
        return length

    def complete(self) -> None:
        """The file is whole: give it its mode and close all of it."""
        os.fchmod(self._file, _FILE_MODE)
        if self._options.drop_cache:
            with suppress(OSError):  # a hint
                os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_DONTNEED)
        self._descriptors.close()

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


class _File:
    """One file on the list: opened by the first thread that takes a segment of it, closed by the last."""

    __slots__ = ("_entry", "_left", "_lock", "_opened", "_options", "_target", "segments")

    def __init__(self, target: Target, entry: FileEntry, options: FillOptions) -> None:
        self._target, self._entry, self._options = target, entry, options
        self._lock = threading.Lock()
        self._opened: _OpenFile | None = None
        self.segments = self._left = -(-entry.layer_size // SEGMENT_BYTES)

    def decrypt(self, index: int, buffers: _Buffers) -> int:
        """Decrypt one segment; how many bytes of plaintext it had."""
        with self._lock:
            if self._opened is None:
                self._opened = _OpenFile(self._target, self._entry, self._options)
            opened = self._opened
        count = opened.decrypt(index, buffers)
        with self._lock:
            self._left -= 1
            if not self._left:
                opened.complete()
                self._opened = None  # ten thousand ciphers would not be flat memory
        return count


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
        self._left: Iterator[tuple[_File, range]] = (
            (file, range(start, min(start + _RUN_SEGMENTS, file.segments)))
            for file in files
            for start in range(0, file.segments, _RUN_SEGMENTS)
        )
        self._lock = threading.Lock()
        self._progress = progress
        self._stopped = False
        self.done_bytes = 0

    def run(self) -> None:
        """Take segments until none is left, or a thread has failed. Runs in every thread."""
        buffers = _Buffers()
        complete = False
        try:
            while (following := self._next()) is not None:
                file, segments = following
                for index in segments:
                    count = file.decrypt(index, buffers)
                    with self._lock:
                        self.done_bytes += count
                        self._progress(self.done_bytes)
            complete = True
        finally:
            if not complete:
                self._stopped = True

    def _next(self) -> tuple[_File, range] | None:
        with self._lock:
            return None if self._stopped else next(self._left, None)


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
        total = sum(entry.size for target in targets for entry in target.model.manifest.files)
        _run(work, min(options.workers or default_workers(), 1 + total // _THREAD_BYTES))
        for target in targets:
            _finish_directories(target, options)
    return work.done_bytes


def default_workers() -> int:
    """A thread for each core that this process may use, at most 2."""
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
