"""Files that only root can have written, and files that we write so that they are whole or absent.

A configuration that another user can change would let that user choose the trusted owners, so every component of the
path to it must belong to root and be writable by root alone (a sticky directory of root's counts: nobody else can
rename root's entries there). Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import stat
import time
from collections.abc import Iterator

from oci_hook.errors import FileUnreadable, SczError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")
_OLD_SECONDS = 600.0
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def _give_back(path: str) -> str:
    name = shlex.quote(path)
    return f"see that nothing in it is a stranger's (`ls -la {name}`), then `chown root: {name} && chmod go-w {name}`"


def verify_root_alone(found: os.stat_result, path: str, error: type[SczError], remedy: str | None = None) -> None:
    """Check that only root can have written a file, or can make or rename a directory's entries.

    Args:
        found: Of the file or directory, from its descriptor.
        path: For the message.
        error: What to raise if others could.
        remedy: What mends it; default: a look, and giving it back to root.
    """
    is_directory = stat.S_ISDIR(found.st_mode)
    if is_directory:
        remedy = remedy or _give_back(path)
    if found.st_uid != 0:
        advice = remedy or f"look at what it says, then `chown root: {shlex.quote(path)}`"
        raise error(f"{path} belongs to uid {found.st_uid}, not to root", remedy=advice)
    if found.st_mode & 0o022 and not (is_directory and found.st_mode & stat.S_ISVTX):
        advice = remedy or f"look at what it says, then `chmod go-w {shlex.quote(path)}`"
        mode = stat.S_IMODE(found.st_mode)
        raise error(f"{path} is writable by others than root (mode {mode:04o})", remedy=advice)


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int | None, path: str) -> Iterator[int]:
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def verify_secret(found: os.stat_result, path: str, error: type[SczError]) -> None:
    """Refuse a file that its group or others may read or write (the class `error`): it holds a secret."""
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o066:
        raise error(
            f"{path} may be read or written by others than its owner (mode {mode:04o})",
            remedy=f"who had it meanwhile? make a new one in its place; if nobody: `chmod 600 {shlex.quote(path)}`",
        )


def load_root_file(
    path: str, *, limit_bytes: int, error: type[SczError], remedy: str | None = None, is_secret: bool = False
) -> bytes:
    """Read a file that only root can have written.

    Args:
        path: Absolute; symbolic links in it are resolved first, and the resolved path is what is checked.
        limit_bytes: A larger file is refused.
        error: What to raise if the file is not root's alone, not a regular file, or too large.
        remedy: What mends a file that others could have written; default: a look, and giving it back to root.
        is_secret: Refuse a file that others may read, too (`verify_secret`).

    Raises:
        FileUnreadable: The file is absent or cannot be read.
    """
    if not os.path.isabs(path):
        raise error(f"{path} is not an absolute path")
    parts = os.path.realpath(path).split("/")[1:]
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_opened("/", _READ | os.O_DIRECTORY, None, "/"))
        verify_root_alone(os.fstat(directory), "/", error)
        seen = ""
        for part in parts[:-1]:
            seen += f"/{part}"
            directory = stack.enter_context(_opened(part, _READ | os.O_DIRECTORY, directory, seen))
            verify_root_alone(os.fstat(directory), seen, error)
        descriptor = stack.enter_context(_opened(parts[-1], _READ, directory, path))
        verify_root_alone(os.fstat(descriptor), path, error, remedy)
        if is_secret:
            verify_secret(os.fstat(descriptor), path, error)
        return read_regular(descriptor, path, limit_bytes=limit_bytes, error=error)


def read_regular(descriptor: int, path: str, *, limit_bytes: int, error: type[SczError]) -> bytes:
    """Read a whole regular file of at most `limit_bytes` from a descriptor; `path` is for messages."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a regular file")
    chunks, left = [], limit_bytes + 1
    try:
        while left > 0 and (chunk := os.read(descriptor, min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    if left <= 0:
        raise error(f"{path} is larger than {limit_bytes} bytes")
    return b"".join(chunks)


def load_file(path: str, *, limit_bytes: int, error: type[SczError], is_secret: bool = False) -> bytes:
    """Read a regular file of anybody's, at most `limit_bytes` long; a link at the end of the path is not followed.

    With `is_secret` it may be nobody else's (`verify_secret`).
    """
    with _opened(path, _READ, None, path) as descriptor:
        if is_secret:
            verify_secret(os.fstat(descriptor), path, error)
        return read_regular(descriptor, path, limit_bytes=limit_bytes, error=error)


def replace_file(path: str, data: bytes, *, mode: int = 0o600, group: int = -1, sync: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one whole: temporary sibling, fsync, rename.

    Args:
        path: Of the file.
        data: Its contents.
        mode: Its mode.
        group: Its group's id; -1: this process's.
        sync: Whether it has to survive a power cut; if not, it is still whole or absent for whoever reads it.

    Raises:
        FileUnreadable: A system call failed; nothing of the new file is left.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchown(file.fileno(), -1, group)
                os.fchmod(file.fileno(), mode)
                if sync:
                    os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if sync:
            sync_directory(directory or ".")
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause


def remove_half_written(directory: str, *, nobody_writes: bool = False) -> None:
    """Remove what writers that were killed inside `replace_file` left.

    Args:
        directory: Where they wrote.
        nobody_writes: The caller holds the writers' lock. Otherwise only what is so old that nobody writes it still.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            if _TEMPORARY.fullmatch(entry.name) and (
                nobody_writes or time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD_SECONDS
            ):
                os.unlink(entry.path)


def sync_directory(path: str) -> None:
    """Make what was renamed into a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_directory(path: str) -> None:
    """Make a directory, and those above it, with mode 0700; one that exists must be root's (or ours) and private.

    Raises:
        FileUnreadable: It cannot be made, or others could write into it.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    is_directory = stat.S_ISDIR(found.st_mode)
    if not is_directory or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        remedy = _give_back(path) if is_directory else f"remove {path}"
        raise FileUnreadable(f"{path} is not a directory that we alone can write", remedy=remedy)
