"""Looks for a model's plaintext where it must not be: files, writable layers, swap. Used by the demo and the tests.

Every search is to be run where it must succeed as well, else it proves nothing: `Swap.control` puts a marker of its own
through an ordinary tmpfs into the swap file and finds it there.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MARKER_BYTES = 48
_CHUNK_BYTES = 8 << 20
_MADV_PAGEOUT = 21  # Linux 5.4, asm-generic/mman-common.h
_SWAP_BYTES = 256 << 20


def marker_of(path: Path) -> bytes:
    """Bytes from the middle of a file that occur nowhere by chance: at least 24 different values among 48."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in range(size // 2, size - MARKER_BYTES, 4096):
            file.seek(offset)
            found = file.read(MARKER_BYTES)
            if len(set(found)) >= 24:
                return found
    raise ValueError(f"{path} has no bytes to recognise it by")


def contains(path: Path, marker: bytes) -> bool:
    """Whether a file on a disk holds the marker; read in chunks, without its holes, not kept in the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        end = 0
        while (start := _next_data(file.fileno(), end)) is not None:
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start)
            tail, left = b"", end - start
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                if marker in tail + chunk:
                    return True
                tail, left = chunk[-len(marker) :], left - len(chunk)
            if left:  # cut off meanwhile
                return False
    return False


def _next_data(descriptor: int, offset: int) -> int | None:
    """Where the next data begin; None at the end (lseek(2), ENXIO)."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as cause:
        if cause.errno != errno.ENXIO:
            raise
        return None


def files_below(*folders: Path) -> Iterator[Path]:
    """Regular files below the folders, each once; links and other file systems' entries are not entered twice."""
    for folder in folders:
        for parent, names, files in os.walk(folder):
            names[:] = [
                name for name in names if not os.path.ismount(os.path.join(parent, name)) or parent == str(folder)
            ]
            for name in files:
                path = Path(parent) / name
                try:
                    if stat.S_ISREG(path.lstat().st_mode):
                        yield path
                except OSError:
                    continue  # it went away meanwhile


def search(marker: bytes, *folders: Path, but_not: Path | None = None, since: float = 0.0) -> tuple[int, list[Path]]:
    """Search all files below the folders; returns how many were searched, and those that hold the marker.

    Args:
        marker: What to look for.
        folders: Where.
        but_not: A folder that holds it by right, wherever it lies.
        since: Seconds of the wall clock: a file whose inode has not changed since (st_ctime, which no program can set)
            was there before, as another checkout's copy of the model is.
    """
    searched, found = 0, []
    for path in files_below(*folders):
        if but_not is not None and path.is_relative_to(but_not):
            continue
        try:
            if path.lstat().st_ctime < since:
                continue
            searched += 1
            if contains(path, marker):
                found.append(path)
        except OSError:
            continue
    return searched, found


def page_out(path: Path) -> None:
    """Ask the kernel to write a mapped file's pages to swap, as it would under memory pressure (madvise(2))."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for offset in range(0, len(mapped), mmap.PAGESIZE):
            mapped[offset]
        mapped.madvise(_MADV_PAGEOUT)


class Swap:
    """A swap file that is on while the context lasts.

    Args:
        directory: On a disk's file system that can hold a swap file.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / "swapfile"
        self._tmpfs = directory / "ordinary-tmpfs"

    def __enter__(self) -> Swap:
        with self.file.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for _ in range(_SWAP_BYTES // _CHUNK_BYTES):
                file.write(bytes(_CHUNK_BYTES))
            os.fsync(file.fileno())
        subprocess.run(["mkswap", str(self.file)], check=True, capture_output=True)
        subprocess.run(["swapon", "--priority", "32000", str(self.file)], check=True, capture_output=True)
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["swapoff", str(self.file)], check=True, capture_output=True)
        self.file.unlink()

    def holds(self, marker: bytes) -> bool:
        """Whether the marker is in the swap file on the disk."""
        os.sync()
        return contains(self.file, marker)

    def control(self) -> bool:
        """The control: a marker in an ordinary tmpfs, paged out, is found in the swap file."""
        marker = secrets.token_bytes(MARKER_BYTES)
        self._tmpfs.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self._tmpfs)], check=True)
        try:
            victim = self._tmpfs / "victim"
            victim.write_bytes(marker * 1024)
            for _ in range(20):
                page_out(victim)
                if self.holds(marker):
                    return True
                time.sleep(0.25)
            return False
        finally:
            subprocess.run(["umount", str(self._tmpfs)], check=True)
            self._tmpfs.rmdir()
