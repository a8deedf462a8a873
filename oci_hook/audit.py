"""The audit log: one JSON line a decision, each line chained to the one before by its SHA-256.

The chain shows that lines were changed or removed in the middle; that the end was cut shows only against a head that
somebody else kept, such as the one inside a quote (docs/threat-model.md). A record never holds a key, a token or a
nonce. It may be renamed at any time, by `rotate` or by logrotate: whoever finds it absent or empty begins it with a
`continued` record that carries number, link and time over. Format: docs/specification.md, "Audit record".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

from oci_hook.audit_chain import (
    EMPTY_HEAD,
    LINE_LIMIT_BYTES,
    AuditHead,
    Verified,
    format_time,
    head_of,
    parse_line,
)
from oci_hook.audit_files import foreign_paths, newest_rotated, read_chain, read_end, unusable
from oci_hook.documents import canonical
from oci_hook.errors import AuditFailed, AuditRefused, FileUnreadable
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import make_private_directory, sync_directory

__all__ = ["EMPTY_HEAD", "EVENTS", "AuditHead", "AuditLog", "format_time", "parse_line", "text_line"]

EVENTS = ("grant", "outcome", "refused", "released", "closed", "continued", "recovered")
_LOCK_SECONDS = 10.0
_ATTEMPTS = 64


class AuditLog:
    """Appends to and verifies the log at `path`; safe between processes (flock), whole after a crash.

    Args:
        path: Absolute path of the log; it is made, mode 0600, by the first record.
        clock: Seconds since 1970; read after the lock is held, so that records of different processes are in order.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    @property
    def path(self) -> str:
        """The log's path."""
        return self._path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The log, locked and begun: its first record is there."""
        try:
            make_private_directory(os.path.dirname(self._path))
            with contextlib.ExitStack() as stack:
                descriptor = self._open_locked(self._path, stack)
                if not self._tail(descriptor)[0]:
                    self._begin(descriptor, stack)
                yield descriptor
        except OSError as cause:
            raise AuditFailed(f"{self._path}: {cause.strerror}") from cause
        except FileUnreadable as cause:
            raise AuditFailed(cause.message) from cause

    def _open_locked(self, path: str, stack: contextlib.ExitStack, *, create: int = os.O_CREAT) -> int:
        """Open and lock a file that is still at its path when the lock is held: rotation renames it."""
        flags = os.O_RDWR | create | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        for _ in range(_ATTEMPTS):
            with contextlib.ExitStack() as attempt:
                descriptor = os.open(path, flags, 0o600)
                attempt.callback(os.close, descriptor)
                self._verify_ours(descriptor, path)
                lock_descriptor(descriptor, what=path, timeout_seconds=_LOCK_SECONDS, error=AuditFailed)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
                        stack.enter_context(attempt.pop_all())
                        return descriptor
        raise AuditFailed(f"{path} is being rotated again and again")

    def _begin(self, descriptor: int, stack: contextlib.ExitStack) -> None:
        """Begin a log that has no record yet where the one that was rotated away last has ended.

        Its lock is held meanwhile, and whoever waits for it looks for the log anew: nothing is added to it any more.
        """
        for _ in range(_ATTEMPTS):
            previous = newest_rotated(self._path)
            if previous is None:
                return
            with contextlib.suppress(FileNotFoundError):  # renamed once more meanwhile
                head = self._end_of(previous, stack)
                break
        else:
            raise AuditFailed(f"{self._path} is being rotated again and again")
        os.ftruncate(descriptor, 0)  # a first line that a crash tore: nothing rests on it
        record, _ = self._record(head, "continued", {"last": head.sequence, "since": format_time(head.seconds)})
        self._write(descriptor, record)
        sync_directory(os.path.dirname(self._path))

    def _end_of(self, previous: str, stack: contextlib.ExitStack) -> AuditHead:
        """Where a rotated file ends; it stays locked, and what a crash left torn in it is mended."""
        try:
            if previous.endswith(".gz"):
                return read_end(previous)
            descriptor = self._open_locked(previous, stack, create=0)
            line, torn = self._tail(descriptor)
            head = head_of(line)
        except AuditRefused as cause:
            raise unusable(previous, cause) from cause
        if torn:
            lines, head = self._mended(head, torn)
            self._write(descriptor, lines)
        return head

    def rotate(self) -> str | None:
        """Rename the log to its name and its last record's number; a new one continues it.

        A crash between the two leaves the log absent: whoever comes next begins it. Nothing is lost at any moment.

        Returns:
            The new path; None if there is no record to rotate away.

        Raises:
            AuditFailed: It cannot be renamed; or the new one cannot be begun, and the next record will.
            AuditRefused: The log's last line is not a record.
        """
        if not os.path.lexists(self._path):
            return None
        with self._locked() as descriptor:
            line, torn = self._tail(descriptor)
            head = head_of(line)
            if torn:
                lines, head = self._mended(head, torn)
                self._write(descriptor, lines)
            if not line or parse_line(line)["event"] == "continued":
                return None
            target = f"{self._path}.{head.sequence:012}"
            if os.path.lexists(target):
                raise AuditFailed(f"{target} is there already")
            os.rename(self._path, target)
            sync_directory(os.path.dirname(self._path))
        with self._locked():
            return target

    @staticmethod
    def _verify_ours(descriptor: int, path: str) -> None:
        """Whoever else could write the log could cut it, set the clock's floor, and hold its lock."""
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise AuditFailed(f"{path} is not a regular file that we alone can write")

    def _tail(self, descriptor: int) -> tuple[bytes, bytes]:
        """The last whole line, and the bytes after it that a crash left without a line feed."""
        size = os.fstat(descriptor).st_size
        start = max(0, size - 4 * LINE_LIMIT_BYTES)
        *lines, torn = os.pread(descriptor, size - start, start).split(b"\n")
        if not lines and start:
            raise AuditRefused("the file ends in a line that is longer than a record")
        return (lines[-1] if lines else b""), torn

    def head(self) -> AuditHead:
        """The end of the chain now.

        Raises:
            AuditRefused: The last line is not a record.
            AuditFailed: The log cannot be read.
        """
        with self._locked() as descriptor:
            line, _ = self._tail(descriptor)
            return head_of(line)

    def peek(self) -> AuditHead:
        """The end of the chain as `head` would find it, its number 0 if there is none; nothing is written or made.

        Raises:
            AuditRefused: The last line is not a record, or what a new log would go on from is damaged.
            AuditFailed: The log cannot be read.
        """
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(FileNotFoundError):
                    line, _ = self._tail(self._open_locked(self._path, stack, create=0))
                    if line:
                        return head_of(line)
                previous = newest_rotated(self._path)
                return read_end(previous) if previous is not None else head_of(b"")
        except OSError as cause:
            raise AuditFailed(f"{self._path}: {cause.strerror}") from cause

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
            head = head_of(line)
            lines = b""
            if torn:
                lines, head = self._mended(head, torn)
            record, head = self._record(head, event, {k: v for k, v in members.items() if v is not None})
            self._write(descriptor, lines + record)
            return head

    def _mended(self, head: AuditHead, torn: bytes) -> tuple[bytes, AuditHead]:
        """End a torn line and chain over it; a line that lacks nothing but its line feed is a record."""
        try:
            return b"\n", head_of(torn)
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
        if len(line) > LINE_LIMIT_BYTES:
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

    def records(self, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """All records in order, across rotated files, each verified against the one before.

        Args:
            after: Files with no record of a higher number are not read.

        Raises:
            AuditRefused: The chain is broken; the message names the line.
            AuditFailed: The log cannot be read.
        """
        return (each.record for each in self.verified(after=after))

    def verified(self, *, after: int = 0) -> Iterator[Verified]:
        """`records`, each with the digest of its line."""
        return read_chain(self._path, after=after)

    def foreign(self) -> list[str]:
        """What lies beside the log under its name and is none of its files: it is not read.

        Raises:
            AuditFailed: The directory cannot be read.
        """
        return foreign_paths(self._path)


def text_line(record: dict[str, Any]) -> str:
    """One record for a person to read."""
    shown = {k: v for k, v in record.items() if k not in ("seq", "time", "event", "prev")}
    members = json.dumps(shown, sort_keys=True, ensure_ascii=False)
    return f"{record['seq']:>6} {record['time']} {record.get('event', '?')!s:<9} {members}"
