"""Files beneath a directory descriptor, opened without following links; and files written so that they stay.

A folder that is read may be hostile, and change meanwhile: what is not a regular file is the caller's error
(malformed), what the system refuses is `FileUnreadable` (could not tell). What is written is there whole or not at all:
a temporary sibling, synced, and one rename. open(2), rename(2), fsync(2).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, OutputExists, SczError
from oci_hook.trusted_file import sync_directory

CHUNK_BYTES = 2**20
_MALFORMED = frozenset({errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG})
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should a FIFO take the file's place after the look at it, opening it must not wait for a writer.
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end of a `with`."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def refusal(cause: OSError, what: str, error: type[SczError]) -> SczError:
    """What an `OSError` means: `error` if something else stands at the path, `FileUnreadable` otherwise."""
    problem = f"{what}: {os.strerror(cause.errno) if cause.errno else cause}"
    if cause.errno == errno.ELOOP:
        problem = f"{what} is a symbolic link"
    return error(problem) if cause.errno in _MALFORMED else FileUnreadable(problem)


def open_beneath(directory: int, parts: Sequence[str], *, error: type[SczError]) -> int:
    """Open a regular file beneath a directory; no part may be a link.

    Args:
        directory: A directory descriptor.
        parts: The folders and the file's name, none of them `.`, `..`, empty or with a slash.
        error: What to raise if it is missing, a link, or anything but a regular file.

    Returns:
        A descriptor, O_RDONLY and O_CLOEXEC; the caller closes it.

    Raises:
        SczError: The class `error`.
        FileUnreadable: The system said no.
    """
    what = shown("/".join(parts))
    try:
        folder = open_folder(directory, parts[:-1])
        try:
            return open_regular(folder, parts[-1], what, error=error)
        finally:
            os.close(folder)
    except OSError as cause:
        raise refusal(cause, what, error) from cause


def open_folder(directory: int, parts: Sequence[str]) -> int:
    """Open a folder beneath a directory, O_PATH and O_CLOEXEC; no part may be a link. The caller closes it.

    Raises:
        OSError: As open(2) gives it.
    """
    folder = os.dup(directory)
    for part in parts:
        try:
            following = os.open(part, _DIRECTORY, dir_fd=folder)
        finally:
            os.close(folder)
        folder = following
    return folder


def open_regular(folder: int, name: str, what: str, *, error: type[SczError]) -> int:
    """Open a regular file in a folder that is open.

    Args:
        folder: A directory descriptor.
        name: Without a slash, and neither `.` nor `..`.
        what: Names the file in messages.
        error: What to raise if it is a link, or anything but a regular file.

    Returns:
        A descriptor, O_RDONLY and O_CLOEXEC; the caller closes it.

    Raises:
        SczError: The class `error`.
        OSError: As open(2) gives it.
    """
    # Looked at before it is opened, as opening a device can have an effect, and after: that is what counts.
    _require_regular(os.stat(name, dir_fd=folder, follow_symlinks=False), what, error)
    descriptor = os.open(name, _FILE, dir_fd=folder)
    try:
        _require_regular(os.fstat(descriptor), what, error)
    except SczError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(status: os.stat_result, what: str, error: type[SczError]) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise error(f"{what} is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{what} is not a regular file")


def read_chunk(descriptor: int, size_bytes: int, what: str) -> bytes:
    """Read at most `size_bytes`; nothing at the end.

    Raises:
        FileUnreadable: The system said no.
    """
    try:
        return os.read(descriptor, size_bytes)
    except OSError as cause:
        raise FileUnreadable(f"{what}: {cause.strerror}") from cause


def read_bounded(descriptor: int, limit_bytes: int, what: str, *, error: type[SczError]) -> bytes:
    """Read a file to its end.

    Raises:
        SczError: The class `error`: it has more than `limit_bytes`.
        FileUnreadable: The system said no.
    """
    data = bytearray()
    while chunk := read_chunk(descriptor, min(CHUNK_BYTES, limit_bytes + 1 - len(data)), what):
        data += chunk
        if len(data) > limit_bytes:
            raise error(f"{what} is larger than {limit_bytes} bytes")
    return bytes(data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`.

    Raises:
        OSError: As write(2) gives it.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def create_file(path: Path, data: bytes, *, mode: int) -> None:
    """Write and sync a new file; its directory is the caller's to sync.

    Raises:
        OSError: As the system gives it; also if something is there.
    """
    with closing(os.open(path, CREATE, mode)) as descriptor:
        write_all(descriptor, data)
        os.fsync(descriptor)


def save_new_file(path: Path, data: bytes, *, mode: int) -> None:
    """Put a file in its place whole, synced, where nothing was.

    Args:
        path: Its folder exists.
        data: All of it.
        mode: Its permissions, narrowed by the umask.

    Raises:
        OutputExists: Something is there.
        FileUnreadable: The system said no.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
            partial = Path(folder, path.name)
            create_file(partial, data, mode=mode)
            os.link(partial, path)  # unlike rename(2), it never replaces
        sync_directory(str(path.parent))
    except FileExistsError as cause:
        raise OutputExists(f"{shown(path)} already exists") from cause
    except OSError as cause:
        raise FileUnreadable(f"{shown(path)}: {cause.strerror}") from cause


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back, in this thread, what ends a command, for as long as it would leave something half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unfinished_folders(output: Path) -> list[Path]:
    """What `NewFolder` has beside a folder that it makes: a run that goes on, or one that was killed.

    Raises:
        FileUnreadable: The folder around it cannot be read.
    """
    path = Path(os.path.abspath(output))
    try:
        names = sorted(os.listdir(path.parent))
    except OSError as cause:
        raise FileUnreadable(f"{shown(path.parent)}: {cause.strerror}") from cause
    return [path.with_name(name) for name in names if name.startswith(_partial_prefix(path))]


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


class NewFolder:
    """A folder that appears whole or not at all; use it with `with`, and call `publish` last.

    What is written goes into `.<name>.partial-XXXX` beside it, mode 0700. Without `publish`, or on any exception
    (SIGINT is one), that is removed; after `kill -9` it stays, and only `unfinished_folders` looks for it.

    Args:
        output: Where the folder shall be; its parent exists, it does not.

    Raises:
        OutputExists: On entering, or in `publish` if somebody else was faster.
        OSError: As the system gives it; the caller says what it means.
    """

    def __init__(self, output: Path) -> None:
        self._output = Path(os.path.abspath(output))
        self._partial: Path | None = None

    def __enter__(self) -> Self:
        if os.path.lexists(self._output):
            raise OutputExists(f"{shown(self._output)} already exists")
        self._partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(self._output), dir=self._output.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._partial is not None:
            # An error on the way out would hide the one that is being reported.
            with uninterrupted():
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    @property
    def partial(self) -> Path:
        """The temporary folder, to be filled."""
        if self._partial is None:
            raise RuntimeError("the folder is not open, or already published")
        return self._partial

    def publish(self, *, mode: int) -> None:
        """Sync the folder itself and put it in its place; what it holds was synced by the caller.

        Raises:
            OutputExists: Something appeared there meanwhile.
        """
        partial = self.partial
        partial.chmod(mode)
        sync_directory(str(partial))
        try:
            if os.path.lexists(self._output):  # rename(2) would replace an empty folder
                raise OutputExists(f"{shown(self._output)} appeared meanwhile")
            os.rename(partial, self._output)
        except OSError as cause:
            if cause.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise OutputExists(f"{shown(self._output)} appeared meanwhile") from cause
            raise
        self._partial = None
        sync_directory(str(self._output.parent))
