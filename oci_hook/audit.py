"""The audit log: one JSON line a decision, each line chained to the one before by its SHA-256.

The chain shows that lines were changed or removed in the middle; that the end was cut shows only against a head that
somebody else kept, such as the one inside a quote (docs/threat-model.md). A record never holds a key, a token or a
nonce. Format: docs/specification.md, "Audit record".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from oci_hook.documents import canonical, parse_object
from oci_hook.errors import AuditFailed, AuditRefused, FileUnreadable
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import make_private_directory

_LINE_LIMIT_BYTES = 16 << 10
_LOCK_SECONDS = 10.0
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


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds, as the log carries it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line (without its line feed) into its members.

    Raises:
        AuditRefused: It is not a record of ours.
    """
    record = parse_object(line, limit_bytes=_LINE_LIMIT_BYTES, what="audit record", error=AuditRefused)
    if type(record.get("seq")) is not int or not isinstance(record.get("prev"), str):
        raise AuditRefused("an audit record has no sequence number or no link")
    try:
        datetime.fromisoformat(record["time"])
    except (KeyError, ValueError, TypeError) as cause:
        raise AuditRefused("an audit record has no time") from cause
    return record


class AuditLog:
    """Appends to and verifies the log at `path`; safe between processes (flock), whole after a crash.

    Args:
        path: Absolute path of the log; it is made, mode 0600, by the first record.
        clock: Seconds since 1970; read after the lock is held, so that records of different processes are in order.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            make_private_directory(os.path.dirname(self._path))
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o600)
            try:
                self._verify_ours(descriptor)
                lock_descriptor(descriptor, what=self._path, timeout_seconds=_LOCK_SECONDS, error=AuditFailed)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as cause:
            raise AuditFailed(f"{self._path}: {cause.strerror}") from cause
        except FileUnreadable as cause:
            raise AuditFailed(cause.message) from cause

    def _verify_ours(self, descriptor: int) -> None:
        """Whoever else could write the log could cut it, set the clock's floor, and hold its lock."""
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise AuditFailed(f"{self._path} is not a regular file that we alone can write")

    def _tail(self, descriptor: int) -> tuple[bytes, bytes]:
        """The last whole line, and the bytes after it that a crash left without a line feed."""
        size = os.fstat(descriptor).st_size
        start = max(0, size - 4 * _LINE_LIMIT_BYTES)
        *lines, torn = os.pread(descriptor, size - start, start).split(b"\n")
        if not lines and start:
            raise AuditRefused(f"{self._path} ends in a line that is not a record")
        return (lines[-1] if lines else b""), torn

    def _head_of(self, line: bytes) -> AuditHead:
        if not line:
            return AuditHead(0, 0.0, EMPTY_HEAD)
        record = parse_line(line)
        seconds = datetime.fromisoformat(record["time"]).timestamp()
        return AuditHead(record["seq"], seconds, hashlib.sha256(line).digest())

    def head(self) -> AuditHead:
        """The end of the chain now.

        Raises:
            AuditRefused: The last line is not a record.
            AuditFailed: The log cannot be read.
        """
        with self._locked() as descriptor:
            line, _ = self._tail(descriptor)
            return self._head_of(line)

    def append(self, event: str, **members: str | int | None) -> AuditHead:
        """Append one record and sync it to the disk; members that are None are left out.

        A clock behind the last record does not move the log's time back: the record takes the last time and says
        under `clock` what the clock said.

        Raises:
            AuditFailed: The record is not on the disk; nothing of it is in the log.
            AuditRefused: The log's last line is not a record.
        """
        with self._locked() as descriptor:
            line, torn = self._tail(descriptor)
            head = self._head_of(line)
            lines = b""
            if torn:
                lines, head = self._mended(head, torn)
            record, head = self._record(head, event, {k: v for k, v in members.items() if v is not None})
            self._write(descriptor, lines + record)
            return head

    def _mended(self, head: AuditHead, torn: bytes) -> tuple[bytes, AuditHead]:
        """End a torn line and chain over it; a line that lacks nothing but its line feed is a record."""
        try:
            return b"\n", self._head_of(torn)
        except AuditRefused:
            digest = hashlib.sha256(torn).digest()
            record, head = self._record(
                AuditHead(head.sequence, head.seconds, digest), "recovered", {"torn": digest.hex()}
            )
            return b"\n" + record, head

    def _record(self, head: AuditHead, event: str, members: dict[str, str | int]) -> tuple[bytes, AuditHead]:
        now = self._clock()
        seconds = max(now, head.seconds)
        record: dict[str, str | int] = {
            **members,
            "event": event,
            "seq": head.sequence + 1,
            "time": format_time(seconds),
            "prev": head.digest.hex(),
        }
        if seconds != now:
            record["clock"] = format_time(now)
        line = canonical(record)
        if len(line) > _LINE_LIMIT_BYTES:
            raise AuditFailed("the audit record is too long")
        return line + b"\n", AuditHead(head.sequence + 1, seconds, hashlib.sha256(line).digest())

    def _write(self, descriptor: int, data: bytes) -> None:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) != len(data):
                raise AuditFailed(f"{self._path}: no space left for a whole record")
            os.fsync(descriptor)
        except (OSError, AuditFailed):
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)  # our own unfinished record, under the lock
            raise

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order, each verified against the one before.

        Raises:
            AuditRefused: The chain is broken; the message names the line.
            AuditFailed: The log cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                yield from self._verified(file)
        except FileNotFoundError:
            return
        except OSError as cause:
            raise AuditFailed(f"{self._path}: {cause.strerror}") from cause

    def _verified(self, lines: Any) -> Iterator[dict[str, Any]]:
        previous, sequence, torn_number = EMPTY_HEAD, 0, 0
        for number, raw in enumerate(lines, 1):
            line = raw.rstrip(b"\n")
            try:
                record = parse_line(line)
            except AuditRefused:
                if torn_number:
                    raise AuditRefused(f"line {torn_number} of {self._path} is not a record") from None
                torn_number, previous = number, hashlib.sha256(line).digest()
                continue  # only a `recovered` record that names these bytes excuses them
            if torn_number and (record.get("event"), record.get("torn")) != ("recovered", previous.hex()):
                raise AuditRefused(f"line {torn_number} of {self._path} is not a record")
            torn_number = 0
            if record["prev"] != previous.hex() or record["seq"] != sequence + 1:
                raise AuditRefused(f"line {number} of {self._path} does not follow the line before it")
            previous, sequence = hashlib.sha256(line).digest(), sequence + 1
            yield record
        if torn_number and not raw.endswith(b"\n"):
            return  # a crash tore the last line; the next record will say so
        if torn_number:
            raise AuditRefused(f"line {torn_number} of {self._path} is not a record")


def text_line(record: dict[str, Any]) -> str:
    """One record for a person to read."""
    shown = {k: v for k, v in record.items() if k not in ("seq", "time", "event", "prev")}
    members = json.dumps(shown, sort_keys=True, ensure_ascii=False)
    return f"{record['seq']:>6} {record['time']} {record.get('event', '?')!s:<9} {members}"
