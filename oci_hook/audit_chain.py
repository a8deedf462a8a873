"""The audit log as it is read: lines, the chain over them, and the files that it was rotated into.

A file that was rotated away lies beside the log, under the log's name with something after it (`audit.jsonl.1`,
`audit.jsonl-20260101.gz`, `audit.jsonl.000000000117`); which comes first is told by their first records, not by their
names. The oldest may have been removed: then the chain begins with the `continued` record of the first that is there,
and nothing here says what came before it. Nothing is written. Format: docs/specification.md, "Audit record".
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

from oci_hook.documents import parse_object
from oci_hook.errors import AuditFailed, AuditRefused

LINE_LIMIT_BYTES = 16 << 10
FILE_LIMIT_BYTES = 4 << 30
"""Of one file, decompressed."""
MAX_FILES = 4096
EMPTY_HEAD = hashlib.sha256(b"").digest()
_ROTATED = re.compile(r"[.-][0-9A-Za-z_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of the chain.

    Attributes:
        sequence: The last record's number; 0 before the first.
        seconds: The last record's time since 1970.
        digest: SHA-256 of the last line, 32 bytes.
    """

    sequence: int
    seconds: float
    digest: bytes


@dataclass(frozen=True, slots=True)
class Verified:
    """A record, and the SHA-256 of its line."""

    record: dict[str, Any]
    digest: bytes


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds, as the log carries it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line (without its line feed) into its members.

    Raises:
        AuditRefused: It is not a record of ours.
    """
    record = parse_object(line, limit_bytes=LINE_LIMIT_BYTES, what="audit record", error=AuditRefused)
    if type(record.get("seq")) is not int or not isinstance(record.get("prev"), str):
        raise AuditRefused("an audit record has no sequence number or no link")
    try:
        datetime.fromisoformat(record["time"])
    except (KeyError, ValueError, TypeError) as cause:
        raise AuditRefused("an audit record has no time") from cause
    return record


def head_of(line: bytes) -> AuditHead:
    """The chain's end after a line; an empty one: before the first.

    Raises:
        AuditRefused: It is not a record of ours.
    """
    if not line:
        return AuditHead(0, 0.0, EMPTY_HEAD)
    record = parse_line(line)
    return AuditHead(record["seq"], datetime.fromisoformat(record["time"]).timestamp(), hashlib.sha256(line).digest())


@dataclass(frozen=True, slots=True)
class _File:
    """An open file of the log; `first` is its first record's number, 0 if it has none."""

    path: str
    stream: IO[bytes]
    first: int


def rotated_paths(path: str) -> list[str]:
    """The files that the log at `path` was rotated into, in no order; of one that is being compressed, the original.

    Raises:
        AuditFailed: The directory cannot be read, or has too many of them.
    """
    directory, base = os.path.split(path)
    try:
        names = set(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as cause:
        raise AuditFailed(f"{directory}: {cause.strerror}") from cause
    found = {name for name in names if name.startswith(base) and _ROTATED.fullmatch(name[len(base) :])}
    found = {name for name in found if not (name.endswith(".gz") and name[:-3] in found)}
    if len(found) > MAX_FILES:
        raise AuditFailed(f"{directory} has more than {MAX_FILES} files of the audit log")
    return [os.path.join(directory, name) for name in sorted(found)]


def _open(path: str) -> IO[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if path.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    return file


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    """Each line with its line feed; bounded, whatever a compressed file becomes.

    Raises:
        AuditRefused: It is longer than a record or a file can be, or not what gzip wrote.
        AuditFailed: It cannot be read.
    """
    total = 0
    try:
        while line := file.readline(LINE_LIMIT_BYTES + 2):
            total += len(line)
            if total > FILE_LIMIT_BYTES:
                raise AuditRefused(f"{path} is larger than {FILE_LIMIT_BYTES} bytes")
            yield line
    except (EOFError, zlib.error) as cause:
        raise AuditRefused(f"{path} is not whole: {cause}") from cause
    except OSError as cause:
        if cause.strerror is None:  # gzip's own
            raise AuditRefused(f"{path} is not whole: {cause}") from cause
        raise AuditFailed(f"{path}: {cause.strerror}") from cause


def _first_sequence(path: str) -> int:
    with _open(path) as file:
        line = next(_lines(file, path), b"").rstrip(b"\n")
    try:
        return int(parse_line(line)["seq"]) if line else 0
    except AuditRefused as cause:
        raise AuditRefused(f"line 1 of {path} is not a record") from cause


def newest_rotated(path: str) -> str | None:
    """The file that the log was rotated into last; None if there is none with a record.

    Raises:
        AuditRefused: One of them is no log.
        AuditFailed: They cannot be read.
    """
    found = []
    for each in rotated_paths(path):
        try:
            found.append((_first_sequence(each), each))
        except FileNotFoundError:
            continue  # renamed meanwhile: the caller, who holds the log's lock, finds that when it opens one
        except OSError as cause:
            raise AuditFailed(f"{each}: {cause.strerror}") from cause
    return max((each for each in found if each[0]), default=(0, None))[1]


def last_line(path: str) -> bytes:
    """The last whole line of a file, which may be compressed.

    Raises:
        AuditRefused: It is not whole.
        AuditFailed: It cannot be read.
        OSError: It cannot be opened.
    """
    last = b""
    with _open(path) as file:
        for line in _lines(file, path):
            if line.endswith(b"\n"):
                last = line[:-1]
    return last


def read_chain(path: str, *, after: int = 0) -> Iterator[Verified]:
    """All records in order, across the files of the log, each verified against the one before.

    Args:
        path: Of the log.
        after: Files with no record of a higher number are not read.

    Raises:
        AuditRefused: The chain is broken; the message names file and line.
        AuditFailed: The log cannot be read.
    """
    with ExitStack() as stack:
        try:
            files = _opened(path, after, stack)
        except OSError as cause:
            raise AuditFailed(f"{path}: {cause.strerror}") from cause
        chain = _Chain()
        for file in files:
            yield from chain.records(file, last=file is files[-1])


def _opened(path: str, after: int, stack: ExitStack) -> list[_File]:
    """The files in the chain's order: opened together, as logrotate may rename them while they are read."""
    for _ in range(8):
        with ExitStack() as attempt:
            try:
                files, seen = [], set()
                for name in [*rotated_paths(path), path]:
                    if name == path and not os.path.lexists(path):
                        continue
                    stream = attempt.enter_context(_open(name))
                    found = os.fstat(stream.fileno())
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        files.append(_File(name, stream, 0))
            except FileNotFoundError:
                continue  # renamed meanwhile
            stack.enter_context(attempt.pop_all())
            break
    else:
        raise AuditFailed(f"{path} is being rotated again and again")
    ordered = []
    for file in files:
        line = next(_lines(file.stream, file.path), b"")
        file.stream.seek(0)
        try:
            torn = file.path == path and not line.endswith(b"\n")  # by a crash, if this is its only line
            first = int(parse_line(line.rstrip(b"\n"))["seq"]) if line and not torn else 0
        except AuditRefused as cause:
            raise AuditRefused(f"line 1 of {file.path} is not a record") from cause
        if first or file.path == path:
            ordered.append(_File(file.path, file.stream, first or 1 << 62))  # the log itself may have none yet
    ordered.sort(key=lambda file: file.first)
    begin = max((index for index, file in enumerate(ordered) if file.first <= after + 1), default=0)
    return ordered[begin:]


class _Chain:
    """The chain's state from line to line."""

    def __init__(self) -> None:
        self._previous: bytes | None = None
        self._sequence = 0

    def records(self, file: _File, *, last: bool) -> Iterator[Verified]:
        """The records of one file; only the last file may end in a line that a crash tore."""
        torn_number, raw = 0, b""
        for number, raw in enumerate(_lines(file.stream, file.path), 1):
            line = raw.rstrip(b"\n")
            try:
                record = parse_line(line)
            except AuditRefused:
                if torn_number:
                    raise AuditRefused(f"line {torn_number} of {file.path} is not a record") from None
                torn_number, self._previous = number, hashlib.sha256(line).digest()
                continue  # only a `recovered` record that names these bytes excuses them
            if torn_number and (record.get("event"), record.get("torn")) != ("recovered", _hex(self._previous)):
                raise AuditRefused(f"line {torn_number} of {file.path} is not a record")
            torn_number = 0
            self._verify_link(record, file.path, number)
            self._previous, self._sequence = hashlib.sha256(line).digest(), record["seq"]
            yield Verified(record, self._previous)
        if torn_number and not (last and not raw.endswith(b"\n")):
            raise AuditRefused(f"line {torn_number} of {file.path} is not a record")

    def _verify_link(self, record: dict[str, Any], path: str, number: int) -> None:
        if self._previous is None:
            # The oldest that is there: the very first, or one that says that others went before it.
            begins = record["seq"] == 1 and record["prev"] == EMPTY_HEAD.hex()
            if not begins and (record["seq"] < 2 or record.get("event") != "continued"):
                raise AuditRefused(f"line {number} of {path} is not the first of a log")
        elif record["prev"] != self._previous.hex() or record["seq"] != self._sequence + 1:
            raise AuditRefused(f"line {number} of {path} does not follow the line before it")


def _hex(digest: bytes | None) -> str:
    return digest.hex() if digest is not None else ""
