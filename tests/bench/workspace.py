"""Where a run keeps its files, how much fits, and that nothing stays.

All files lie below one folder, which the run holds locked: a later run takes away what one that was killed left there.
Memory file systems have no path and end with the process. What is decrypted goes nowhere else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from oci_hook.delivery.memory import load_available_memory
from oci_hook.linux import mounts
from oci_hook.linux.mounts import MemoryFilesystem
from tests.bench.noise import control
from tests.bench.rows import Control, sized
from tests.models import PackedModel, TestOwner

GIB = 1 << 30
_PREFIX = "sczbench."
_CHUNK_BYTES = 1 << 22


@dataclass
class Workspace:
    """One run of the benchmarks.

    Attributes:
        folder: Root's own, with a short path.
        rounds: Of each row.
        sizes: Bytes of the models, for how cost grows; the largest is also measured for memory.
        containers: How many are started at once, one after another.
        size: Bytes of the model that most rows use.
        crowd_size: Bytes of the model of those.
        say: Tells a person what happens now.
        memory_spare_bytes: Of memory, what has to be left.
        disk_spare_bytes: The same of the disk.
        file_bytes: A model's files are at most this large, as those of large models are.
    """

    folder: Path
    rounds: int
    sizes: tuple[int, ...]
    containers: tuple[int, ...]
    size: int
    crowd_size: int
    say: Callable[[str], None]
    memory_spare_bytes: int = 3 * GIB // 2
    disk_spare_bytes: int = 2 * GIB
    file_bytes: int = GIB
    controls: list[Control] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = TestOwner(self.folder)

    def look_at_the_machine(self) -> None:
        """One more control."""
        self.controls.append(control())

    def lacking(self, *, memory_bytes: int = 0, disk_bytes: int = 0) -> str:
        """Why something of that size is left out; empty if it fits."""
        free, room = available_memory(), shutil.disk_usage(self.folder).free
        return lack("memory", memory_bytes, self.memory_spare_bytes, free) or lack(
            "disk", disk_bytes, self.disk_spare_bytes, room
        )

    def plain_folder(self, size_bytes: int) -> Path:
        """A model of that size in plaintext: files of at most `file_bytes`, as shards are.

        Beyond one file they are names of the same one: a copy of the folder is a copy of each, but it takes the page
        cache once, and so a model of 8 GiB fits beside its encrypted form.
        """
        folder = self.folder / f"plain-{size_bytes}"
        if folder.is_dir():
            return folder
        self.say(f"writing a model of {sized(size_bytes)}")
        part = self.folder / f"plain-{size_bytes}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a benchmark that failed
        part.mkdir()
        left, number, whole = size_bytes, 0, None
        while left or not number:
            path, count = part / f"weights-{number:02}", min(left, self.file_bytes)
            if whole is not None and count == self.file_bytes:
                os.link(whole, path)
            else:
                _write_noise(path, count)
            whole = path if count == self.file_bytes else whole
            left, number = left - count, number + 1
        part.rename(folder)
        return folder

    def packed(self, size_bytes: int) -> PackedModel:
        """The model of that size, packed by its owner; on the disk, and in the page cache as far as that goes."""
        known: dict[int, PackedModel] = self.__dict__.setdefault("_packed", {})
        if size_bytes not in known:
            source = self.plain_folder(size_bytes)
            self.say(f"packing {sized(size_bytes)}")
            known[size_bytes] = self.owner.pack_folder(f"model-{size_bytes}", source)
            os.sync()  # what is not on the disk yet would be written while something is timed
        return known[size_bytes]

    def forget(self, size_bytes: int) -> None:
        """The model of that size is not needed any more."""
        known: dict[int, PackedModel] = self.__dict__.get("_packed", {})
        if size_bytes in known:
            shutil.rmtree(known.pop(size_bytes).bundle)
        shutil.rmtree(self.folder / f"plain-{size_bytes}", ignore_errors=True)


def _write_noise(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        while size_bytes:
            file.write(os.urandom(min(size_bytes, _CHUNK_BYTES)))
            size_bytes -= min(size_bytes, _CHUNK_BYTES)


def lack(of: str, needed_bytes: int, spare_bytes: int, free_bytes: int) -> str:
    """What to say where so much does not fit; empty if it does."""
    if needed_bytes + spare_bytes <= free_bytes:
        return ""
    needed, spare, free = (value / GIB for value in (needed_bytes, spare_bytes, free_bytes))
    return f"needs {needed:.2f} GiB of {of} and {spare:.2f} to spare; {free:.2f} free"


def available_memory() -> int:
    """Bytes that new programs can have, by the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def touch_memory(size_bytes: int) -> None:
    """Take four times as much memory, write into it and give it back at once; less if there is less.

    A hypervisor takes free memory back from its guest after a few seconds, whole huge pages first. Whoever takes it
    next pays for the host's faults: more than ten times what is to be measured. So nobody pays. Four times, as the
    kernel does not give out first what was given back last.
    """
    size_bytes = max(size_bytes, min(4 * size_bytes, load_available_memory() - size_bytes - 2 * GIB))
    with mounts.create_memory_filesystem(size_bytes + mounts.PAGE_BYTES, 2, MemoryFilesystem.TMPFS) as mount:
        descriptor = os.open("touched", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=mount.fd)
        try:
            os.ftruncate(descriptor, size_bytes)
            with mmap.mmap(descriptor, size_bytes) as mapping:
                for place in range(0, size_bytes, mounts.PAGE_BYTES):
                    mapping[place] = 0
        finally:
            os.close(descriptor)


def warm(folder: Path) -> None:
    """Read every file below, so that none is read from the disk while something is timed.

    Twice: what was read once goes first when memory is short, and the baseline's files were read before.
    """
    buffer = bytearray(_CHUNK_BYTES)
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        for _ in range(2):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def progress(line: str) -> None:
    """To stderr, with the time that has passed."""
    print(f"[{time.monotonic() - _BEGAN:5.0f} s] {line}", file=sys.stderr, flush=True)


_BEGAN = time.monotonic()


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder that goes at the end, however that comes: only SIGKILL leaves it, to the next run."""
    _sweep(parent)
    lock = None
    while lock is None:  # another run that began just now may have taken it for a dead one's
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _lock(folder)
    try:
        folder.chmod(0o711)  # root of a user namespace has to get through to its root file system
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Take away the folders of runs that were killed: our own ones that nobody has locked."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = _lock(folder)
            if lock is None:
                continue
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A folder's own descriptor, locked; None if another has locked it or taken it away.

    Anybody may make names in /var/tmp: no link is followed, and nothing but a folder is opened.

    Raises:
        OSError: It is no folder, or may not be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileNotFoundError, BlockingIOError), ExitStack() as stack:
        lock = os.open(folder, flags)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have gone between the two calls, and the lock be one of a folder without a name.
        if os.path.samestat(os.fstat(lock), folder.stat(follow_symlinks=False)):
            stack.pop_all()
            return lock
    return None
