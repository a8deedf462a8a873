"""The hot path: from encrypted files to plaintext in detached memory file systems, with flat memory.

Runs in a forked writer that is in the container's memory control group and ends when it is done. All files of all
models are one list of work that the threads take from, so neither a large file nor ten thousand small ones leave a core
idle: a piece is a run of segments of a large file, or a batch of small files. What is done with a piece is
`delivery.place`'s, where AES-GCM and the reads run without Python's lock (docs/design.md, "Hot path", has the numbers).

Every segment is authenticated; the first that is not ends it all, and the caller drops the mounts, which nobody could
reach. Nothing is made read-only or visible here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from oci_hook.bundle.manifest import MODEL_DOCUMENT, FileEntry
from oci_hook.bundle.segments import SEGMENT_BYTES
from oci_hook.delivery.cores import usable_cores
from oci_hook.delivery.place import FillOptions, LargeFile, Target, Workplace, place_small, write_all
from oci_hook.delivery.room import directories_of
from oci_hook.linux import syscalls

__all__ = ["FillOptions", "Target", "default_workers", "fill"]

_WORKERS_LIMIT = 4  # two were measured; more than four would wait for Python's lock, and crowd out the node's others
_THREAD_BYTES = 1 << 22  # of large files; below this a second thread costs more than it gains
_RUN_SEGMENTS = 2  # taken at once: two threads at neighbouring segments wait for the same huge page to be cleared
_BATCH_FILES = 64
_DIRECTORY_MODE = 0o555

_Piece = Callable[[Workplace], int]


def _is_large(entry: FileEntry) -> bool:
    return entry.layer_size > SEGMENT_BYTES


def _large_pieces(targets: Sequence[Target]) -> Iterator[_Piece]:
    for target in targets:
        for entry in filter(_is_large, target.model.manifest.files):
            file = LargeFile(target, entry)
            for start in range(0, file.segments, _RUN_SEGMENTS):
                yield _run_of(file, range(start, min(start + _RUN_SEGMENTS, file.segments)))


def _run_of(file: LargeFile, run: range) -> _Piece:
    return lambda workplace: file.decrypt(run, workplace)


def _small_pieces(targets: Sequence[Target]) -> Iterator[_Piece]:
    for target in targets:
        batch: list[FileEntry] = []
        size = 0
        for entry in target.model.manifest.files:
            if _is_large(entry):
                continue
            batch.append(entry)
            size += entry.layer_size
            if len(batch) == _BATCH_FILES or size >= SEGMENT_BYTES:
                yield _batch_of(target, batch)
                batch, size = [], 0
        if batch:
            yield _batch_of(target, batch)


def _batch_of(target: Target, batch: Sequence[FileEntry]) -> _Piece:
    return lambda workplace: sum(place_small(target, entry, workplace) for entry in batch)


class _Work:
    """What is left to do, and how much is done."""

    def __init__(self, targets: Sequence[Target], progress: Callable[[int], None]) -> None:
        self._large, self._small = _large_pieces(targets), _small_pieces(targets)
        self._lock = threading.Lock()
        self._progress = progress
        self._stopped = False
        self.done_bytes = 0

    def run(self, options: FillOptions, *, small_first: bool) -> None:
        """Take pieces until none is left, or a thread has failed. Runs in every thread.

        Args:
            options: How to fill.
            small_first: For one thread alone: small files hold Python's lock most of the time, so one thread goes
                through them while the others are inside the cipher.
        """
        complete = False
        try:
            with Workplace(options) as workplace:
                while (piece := self._next(small_first)) is not None:
                    count = piece(workplace)
                    with self._lock:
                        self.done_bytes += count
                        self._progress(self.done_bytes)
            complete = True
        finally:
            if not complete:
                self._stopped = True

    def _next(self, small_first: bool) -> _Piece | None:
        first, second = (self._small, self._large) if small_first else (self._large, self._small)
        with self._lock:
            if self._stopped:
                return None
            return next(first, None) or next(second, None)


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
        work = _Work(targets, progress)
        large = sum(entry.size for target in targets for entry in target.model.manifest.files if _is_large(entry))
        worth = 1 + large // _THREAD_BYTES
        _run(work, options, 1 if worth == 1 else min(options.workers or default_workers(), worth))
        for target in targets:
            _finish_directories(target, options)
    return work.done_bytes


def default_workers() -> int:
    """A thread for each core that this process may use, at most 4."""
    return min(usable_cores(), _WORKERS_LIMIT)


def _run(work: _Work, options: FillOptions, workers: int) -> None:
    with ThreadPoolExecutor(max(1, workers - 1)) as others:
        running = []
        for _ in range(workers - 1):
            # The container's pids.max may forbid a thread; the work is done by those that there are.
            with suppress(RuntimeError):
                running.append(others.submit(work.run, options, small_first=False))
        work.run(options, small_first=True)
    for one in running:
        one.result()


def _create_skeleton(target: Target, options: FillOptions) -> None:
    """The directories and `model.json`."""
    for path in directories_of(entry.path for entry in target.model.manifest.files):
        os.mkdir(path, 0o700, dir_fd=target.mount.fd)
    with Workplace(options) as workplace:
        fd = workplace.create_file(target.mount, MODEL_DOCUMENT)
        try:
            write_all(fd, memoryview(target.model.document), 0)
            workplace.complete_file(fd)
        finally:
            os.close(fd)


def _finish_directories(target: Target, options: FillOptions) -> None:
    for path in (*reversed(directories_of(entry.path for entry in target.model.manifest.files)), "."):
        os.chown(path, options.uid, options.gid, dir_fd=target.mount.fd)
        os.chmod(path, _DIRECTORY_MODE, dir_fd=target.mount.fd)
