"""One encrypted file to its place in a memory file system: authenticated, decrypted, with its owner and mode.

A file of one segment is read at once, decrypted and written; nothing of it is in its place before it authenticated. A
larger file is worked at by several threads, segment by segment: a segment is read into the thread's own buffer, so that
nobody changes it under the cipher, and decrypted straight into the mapped file where huge pages back it, else into a
second buffer and written. What is read is dropped from the page cache behind, if the caller wants that.

Who works at what is `delivery.fill`'s. Formats: docs/specification.md, "Encrypted file"; tmpfs(5), posix_fadvise(2).
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oci_hook.bundle.manifest import FileEntry
from oci_hook.bundle.segments import HEADER_BYTES, SEGMENT_BYTES, FilePlan, associated_data, plan_decryption
from oci_hook.delivery.room import ModelDelivery
from oci_hook.documents import shown
from oci_hook.errors import DecryptionRefused, FileUnreadable, SczError
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import DetachedMount

WINDOW_BYTES = 16 << 20
"""The page cache behind is dropped in steps of this."""
_OVERLAP_BYTES = 4 << 20  # the kernel keeps a page that lies only partly in what is dropped: the next step takes it
_HUGE_PAGE_BYTES = 1 << 21
_BLOCK_BYTES = 512  # of st_blocks
_FILE_MODE = 0o444
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS


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
        workers: Threads; None: as many as the cores that we may use, within a limit.
        drop_cache: Whether the kernel is to forget the encrypted files as they are read (`memory.keeps_cache`).
    """

    uid: int
    gid: int
    workers: int | None
    drop_cache: bool


class Workplace:
    """What one thread has for itself: two buffers of a segment, and the directory in which it last made a file."""

    def __init__(self, options: FillOptions) -> None:
        self.options = options
        self.sealed = memoryview(bytearray(SEGMENT_BYTES))
        self._plain: memoryview | None = None
        self._chown = (options.uid, options.gid) != (os.geteuid(), os.getegid())
        self._directory: tuple[DetachedMount, str, int] | None = None

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave_directory()

    def plain(self, length: int) -> memoryview:
        """The first `length` bytes of the second buffer, which is made when it is first needed."""
        if self._plain is None:
            self._plain = memoryview(bytearray(SEGMENT_BYTES))
        return self._plain[:length]

    def create_file(self, mount: DetachedMount, path: str) -> int:
        """Make an empty file that must not be there yet, in a directory that is; mode 0600 until `complete_file`."""
        folder, _, name = path.rpartition("/")
        if self._directory is None or self._directory[:2] != (mount, folder):
            self._leave_directory()
            flags = os.O_PATH | os.O_DIRECTORY
            self._directory = mount, folder, syscalls.openat2(mount.fd, folder or ".", flags, resolve=_BENEATH)
        # O_EXCL follows no link, and a name without a slash leads nowhere else.
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._directory[2])

    def complete_file(self, fd: int) -> None:
        """Give a file its owner and its mode."""
        if self._chown:
            os.fchown(fd, self.options.uid, self.options.gid)
        os.fchmod(fd, _FILE_MODE)

    def _leave_directory(self) -> None:
        if self._directory is not None:
            os.close(self._directory[2])
            self._directory = None


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite(2) to the end."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _read(source: int, buffer: memoryview, offset: int, entry: FileEntry) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(source, [buffer[done:] if done else buffer], offset + done)
        except OSError as cause:
            raise FileUnreadable(f"the layer of {shown(entry.path)}: {cause.strerror}") from cause
        if not count:
            raise FileUnreadable(f"the layer of {shown(entry.path)} ends early")
        done += count


def _plan(model: ModelDelivery, entry: FileEntry, header: memoryview) -> FilePlan:
    return plan_decryption(
        bytes(header),
        content_key=model.content_key,
        associated_data=associated_data(model.manifest.model, entry.path),
        ciphertext_bytes=entry.layer_size,
        plaintext_bytes=entry.size,
    )


def _refusal(model: ModelDelivery, entry: FileEntry, index: int, plan: FilePlan) -> DecryptionRefused:
    return DecryptionRefused(
        f"{model.manifest.model.name}: segment {index} of {plan.segments} of {shown(entry.path)} does not authenticate"
    )


def _forget(source: int, start: int, end: int) -> None:
    """Have the kernel drop what it has cached of a file, from `start` to `end` in bytes; 0: its end."""
    with suppress(OSError):  # a hint
        os.posix_fadvise(source, start, end - start if end else 0, os.POSIX_FADV_DONTNEED)


def place_small(target: Target, entry: FileEntry, workplace: Workplace) -> int:
    """Decrypt a file of one segment, whole.

    Args:
        target: Its model, and where it goes.
        entry: A file whose `layer_size` is at most `SEGMENT_BYTES`.
        workplace: The thread's own.

    Returns:
        The bytes of plaintext.
    """
    model = target.model
    sealed = workplace.sealed[: entry.layer_size]
    source = model.layout.open_blob(entry.layer_digest)
    try:
        _read(source, sealed, 0, entry)
        if workplace.options.drop_cache:
            _forget(source, 0, 0)
    finally:
        os.close(source)
    plan = _plan(model, entry, sealed[:HEADER_BYTES])
    plain = workplace.plain(entry.size)
    try:
        AESGCM(plan.file_key).decrypt_into(plan.segment(0).nonce, sealed[HEADER_BYTES:], None, plain)
    except InvalidTag as cause:
        raise _refusal(model, entry, 0, plan) from cause
    fd = workplace.create_file(target.mount, entry.path)
    try:
        write_all(fd, plain, 0)
        workplace.complete_file(fd)
    finally:
        os.close(fd)
    return entry.size


class _OpenFile:
    """One large file while segments of it are being decrypted."""

    def __init__(self, target: Target, entry: FileEntry, workplace: Workplace) -> None:
        self._model, self._entry = target.model, entry
        # A file has one writer at a time in the kernel, and who waits for it there spins.
        self._writing = threading.Lock()
        with ExitStack() as stack:
            self.source = target.model.layout.open_blob(entry.layer_digest)
            stack.callback(os.close, self.source)
            with suppress(OSError):  # the kernel reads further ahead; asking for each range (WILLNEED) was not faster
                os.posix_fadvise(self.source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            header = memoryview(bytearray(HEADER_BYTES))
            _read(self.source, header, 0, entry)
            self.plan = _plan(target.model, entry, header)
            self._cipher = AESGCM(self.plan.file_key)
            self._file = workplace.create_file(target.mount, entry.path)
            stack.callback(os.close, self._file)
            # The final size first: huge=within_size looks at it when a page is first touched.
            os.ftruncate(self._file, entry.size)
            self._mapped = self._map(stack) if target.mount.huge and entry.size >= _HUGE_PAGE_BYTES else None
            self._descriptors = stack.pop_all()

    def _map(self, stack: ExitStack) -> memoryview | None:
        """The file, mapped, if its first byte gets a huge page: what the kernel gives, not what it promises.

        None also where it cannot be mapped: a limit of address space or of locked memory ends no start.
        """
        try:
            mapping = mmap.mmap(self._file, self._entry.size)
        except OSError:
            return None
        mapping[0] = 0
        if os.fstat(self._file).st_blocks * _BLOCK_BYTES < _HUGE_PAGE_BYTES:
            mapping.close()
            return None
        stack.callback(mapping.close)
        mapped = memoryview(mapping)
        stack.callback(mapped.release)
        return mapped

    def decrypt(self, index: int, workplace: Workplace) -> int:
        """Decrypt one segment; how many bytes of plaintext it had. In any thread, in any order."""
        segment = self.plan.segment(index)
        start, length = segment.offset_plaintext, segment.length_plaintext
        sealed = workplace.sealed[: segment.length_ciphertext]
        _read(self.source, sealed, segment.offset_ciphertext, self._entry)
        try:
            if self._mapped is not None:
                with self._mapped[start : start + length] as plain:
                    self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
            else:
                plain = workplace.plain(length)
                self._cipher.decrypt_into(segment.nonce, sealed, None, plain)
                with self._writing:
                    write_all(self._file, plain, start)
        except InvalidTag as cause:
            raise _refusal(self._model, self._entry, index, self.plan) from cause
        return length

    def complete(self, workplace: Workplace) -> None:
        """The file is whole: give it its owner and mode and close all of it."""
        workplace.complete_file(self._file)
        if workplace.options.drop_cache:
            _forget(self.source, 0, 0)
        self._descriptors.close()


class LargeFile:
    """A file of several segments: opened by the first thread that takes one of them, closed by the last.

    If it cannot be opened, that is what every thread meets that takes one: a second try would find the file there.
    """

    __slots__ = ("_active", "_dropped", "_entry", "_failure", "_left", "_lock", "_opened", "_target", "segments")

    def __init__(self, target: Target, entry: FileEntry) -> None:
        self._target, self._entry = target, entry
        self._lock = threading.Lock()
        self._opened: _OpenFile | None = None
        self._failure: SczError | OSError | None = None
        self.segments = self._left = -(-entry.layer_size // SEGMENT_BYTES)
        self._active: set[int] = set()
        self._dropped = 0

    def decrypt(self, run: range, workplace: Workplace) -> int:
        """Decrypt a run of segments; how many bytes of plaintext it had. Runs are to be taken in the file's order."""
        with self._lock:
            opened = self._opened or self._open(workplace)
            self._active.add(run.start)
        count = sum(opened.decrypt(index, workplace) for index in run)
        with self._lock:
            self._active.discard(run.start)
            self._left -= len(run)
            if not self._left:
                opened.complete(workplace)
                self._opened = None  # ten thousand ciphers would not be flat memory
            elif workplace.options.drop_cache:
                self._drop_behind(opened, run.stop)
        return count

    def _open(self, workplace: Workplace) -> _OpenFile:
        if self._failure is not None:
            raise self._failure
        try:
            self._opened = _OpenFile(self._target, self._entry, workplace)
        except (SczError, OSError) as failure:
            self._failure = failure
            raise
        return self._opened

    def _drop_behind(self, opened: _OpenFile, stop: int) -> None:
        """Drop what all threads have behind them; a run that was taken and not begun is read from the disk again."""
        done = min(self._active, default=stop) * SEGMENT_BYTES
        if done - self._dropped >= WINDOW_BYTES:
            _forget(opened.source, max(0, self._dropped - _OVERLAP_BYTES), done)
            self._dropped = done
