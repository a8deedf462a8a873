"""A disk of a file's own: a loop device with ext4, whose page cache can be looked at and which can fail. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.models import MIB, PackedModel


@dataclass(frozen=True)
class Disk:
    """A mounted disk.

    Attributes:
        image: The file that it is made of.
        folder: Where it is mounted.
    """

    image: Path
    folder: Path

    def move(self, model: PackedModel) -> PackedModel:
        """A model whose bundle is on this disk, written and in no page cache but for what was asked for."""
        bundle = self.folder / model.bundle.name
        subprocess.run(["cp", "-a", model.bundle, bundle], check=True)
        os.sync()
        return PackedModel(bundle, model.key, model.files)

    def fail(self, layer: Path, kept_bytes: int) -> None:
        """From now on reading `layer` is EIO behind its first bytes; small files that were read stay readable.

        Args:
            layer: A file on this disk.
            kept_bytes: What of it can be read still.
        """
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        for path in self.folder.rglob("*"):
            if path.is_file() and path != layer:
                path.read_bytes()
        forget(layer)
        with layer.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            file.read(kept_bytes)
        os.truncate(self.image, 0)


def forget(path: Path) -> None:
    """Have the kernel drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache, by the kernel's word."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", path]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextmanager
def open_disk(folder: Path, size_bytes: int = 128 * MIB) -> Iterator[Disk]:
    """A new disk, mounted at `folder`/disk until the block ends."""
    disk = Disk(folder / "disk.image", folder / "disk")
    disk.image.touch()
    os.truncate(disk.image, size_bytes)
    disk.folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.image], check=True)
    subprocess.run(["mount", "-o", "loop", disk.image, disk.folder], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk.folder], check=True)
        disk.image.unlink()
