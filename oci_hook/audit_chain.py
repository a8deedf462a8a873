"""The audit log's lines, and the chain over them: what a record is, and whether each follows the one before.

Which files the log consists of, and in what order: `audit_files`. Nothing is written. Format: docs/specification.md,
"Audit record".
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

from oci_hook.documents import parse_object
from oci_hook.errors import AuditFailed, AuditRefused

LINE_LIMIT_BYTES = 16 << 10
FILE_LIMIT_BYTES = 4 << 30
"""Of one file, decompressed."""
EMPTY_HEAD = hashlib.sha256(b"").digest()


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


def seconds_of(time: str) -> float:
    """A record's time, in seconds since 1970.

    Raises:
        ValueError, TypeError, OverflowError: It is none, has no zone, or is too early to be one.
    """
    moment = datetime.fromisoformat(time)
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return moment.timestamp()


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line (without its line feed) into its members.

    Raises:
        AuditRefused: It is not a record of ours.
    """
    record = parse_object(line, limit_bytes=LINE_LIMIT_BYTES, what="audit record", error=AuditRefused)
    if type(record.get("seq")) is not int or not isinstance(record.get("prev"), str):
        raise AuditRefused("an audit record has no sequence number or no link")
    try:
        seconds_of(record["time"])
    except (KeyError, ValueError, TypeError, OverflowError) as cause:
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
    return AuditHead(record["seq"], seconds_of(record["time"]), hashlib.sha256(line).digest())


def lines_of(stream: IO[bytes], path: str) -> Iterator[bytes]:
    """Each line of a file with its line feed; bounded, whatever a compressed file becomes.

    Raises:
        AuditRefused: It is longer than a record or a file can be, or not what gzip wrote.
        AuditFailed: It cannot be read.
    """
    total = 0
    try:
        while line := stream.readline(LINE_LIMIT_BYTES + 2):
            total += len(line)
            if total > FILE_LIMIT_BYTES:
                raise AuditRefused(f"{path} is larger than {FILE_LIMIT_BYTES} bytes", remedy=_restore(path))
            yield line
    except (EOFError, zlib.error) as cause:
        raise AuditRefused(f"{path} is not whole: {cause}", remedy=_restore(path)) from cause
    except OSError as cause:
        if cause.strerror is None:  # gzip's own
            raise AuditRefused(f"{path} is not whole: {cause}", remedy=_restore(path)) from cause
        raise AuditFailed(f"{path}: {cause.strerror}") from cause


def _restore(path: str) -> str:
    return f"restore {path} from a backup, or move it and the older files out of the folder, and keep them"


def first_sequence(stream: IO[bytes], path: str, *, may_be_torn: bool = False) -> int:
    """The number of a file's first record, 0 if it has none; the file is at its beginning again.

    Args:
        stream: The file.
        path: Its name in messages.
        may_be_torn: An only line that a crash left without its line feed is no record.

    Raises:
        AuditRefused: Its first line is no record.
        AuditFailed: It cannot be read.
    """
    line = next(lines_of(stream, path), b"")
    stream.seek(0)
    if not line or (may_be_torn and not line.endswith(b"\n")):
        return 0
    try:
        return int(parse_line(line.rstrip(b"\n"))["seq"])
    except AuditRefused as cause:
        raise AuditRefused(f"line 1 of {path} is not a record", remedy=_restore(path)) from cause


def end_of(stream: IO[bytes], path: str) -> AuditHead:
    """The chain's end after the last whole line of a file.

    Raises:
        AuditRefused: It is not whole, or its last line is no record.
        AuditFailed: It cannot be read.
    """
    if not path.endswith(".gz"):
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4 * LINE_LIMIT_BYTES))
    last = b""
    for line in lines_of(stream, path):
        if line.endswith(b"\n"):
            last = line[:-1]
    stream.seek(0)
    try:
        return head_of(last)
    except AuditRefused as cause:
        raise AuditRefused(f"the last line of {path} is not a record", remedy=_restore(path)) from cause


class Chain:
    """The chain's state from line to line.

    Args:
        after: The end of what came before and is not read; None: what is read begins with the oldest record.
    """

    def __init__(self, after: AuditHead | None) -> None:
        self._previous = after.digest if after is not None else None
        self._sequence = after.sequence if after is not None else 0

    def records(self, stream: IO[bytes], path: str, *, last: bool) -> Iterator[Verified]:
        """The records of one file; only the last file may end in a line that a crash tore.

        Raises:
            AuditRefused: The chain is broken; the message names file and line.
            AuditFailed: The file cannot be read.
        """
        torn_number, raw = 0, b""
        for number, raw in enumerate(lines_of(stream, path), 1):
            line = raw.rstrip(b"\n")
            try:
                record = parse_line(line)
            except AuditRefused:
                if torn_number:
                    raise AuditRefused(f"line {torn_number} of {path} is not a record") from None
                torn_number, self._previous = number, hashlib.sha256(line).digest()
                continue  # only a `recovered` record that names these bytes excuses them
            if torn_number and (record.get("event"), record.get("torn")) != ("recovered", _hex(self._previous)):
                raise AuditRefused(f"line {torn_number} of {path} is not a record")
            torn_number = 0
            self._verify_link(record, path, number)
            self._previous, self._sequence = hashlib.sha256(line).digest(), record["seq"]
            yield Verified(record, self._previous)
        if torn_number and not (last and not raw.endswith(b"\n")):
            raise AuditRefused(f"line {torn_number} of {path} is not a record")

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
