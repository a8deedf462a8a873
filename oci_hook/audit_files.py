"""The files that the audit log was rotated into: which they are, which comes first, which of them is the newest.

A file that was rotated away lies beside the log, under the name that `sczctl audit rotate` or logrotate makes of the
log's name: `audit.jsonl.000000000117`, `audit.jsonl.1`, `audit.jsonl-20260131`, each with or without `.gz`. Whatever
else lies there (a backup, a checksum) is none of the log's. The order is told by the first records, not by the names.
The oldest may have been removed: then the chain begins with the `continued` record of the first that is there, and
nothing here says what came before it. Nothing is written. Format: docs/specification.md, "Audit record".
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import IO

from oci_hook.audit_chain import AuditHead, Chain, Verified, end_of, first_sequence, lines_of
from oci_hook.errors import AuditFailed, AuditRefused

MAX_FILES = 4096
_ATTEMPTS = 64
_ROTATED = re.compile(r"(?:\.([0-9]{1,20})|-([0-9]{4,20}(?:-[0-9]{1,12}){0,5}))(?:\.gz)?")
_SEQUENCE_DIGITS, _COUNT_DIGITS = 12, 5
"""Of a name by `sczctl audit rotate` at least; of logrotate's count at most. What is between them is a date."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the log.

    Attributes:
        path: Its path.
        modified: When it was written last, nanoseconds since 1970.
        stream: The file, open; None if it could not be opened.
        first: Its first record's number; 0 if it has none, or none that can be read.
        trouble: Why it cannot be read.
    """

    path: str
    modified: int
    stream: IO[bytes] | None = None
    first: int = 0
    trouble: AuditRefused | AuditFailed | None = None

    @property
    def open_stream(self) -> IO[bytes]:
        """The file, which has no trouble."""
        if self.stream is None:
            raise RuntimeError(f"{self.path} is not open")
        return self.stream


def _names(path: str) -> list[str]:
    """Of what lies beside the log under its name with something after it; unsorted, without the log."""
    directory, base = os.path.split(path)
    try:
        return [name for name in os.listdir(directory) if name.startswith(base) and name != base]
    except FileNotFoundError:
        return []
    except OSError as cause:
        raise AuditFailed(f"{directory}: {cause.strerror}") from cause


def foreign_paths(path: str) -> list[str]:
    """What lies beside the log under its name and is none of its files.

    Raises:
        AuditFailed: The directory cannot be read.
    """
    directory, base = os.path.split(path)
    found = sorted(name for name in _names(path) if not _ROTATED.fullmatch(name[len(base) :]))
    return [os.path.join(directory, name) for name in found]


def _listed(path: str) -> dict[str, tuple[int, int, int]]:
    """Device, inode and modification time of the log and of each file that it was rotated into, the log first.

    Raises:
        AuditFailed: The directory cannot be read, or has too many of them.
    """
    directory, base = os.path.split(path)
    names = sorted(name for name in _names(path) if _ROTATED.fullmatch(name[len(base) :]))
    if len(names) > MAX_FILES:
        raise AuditFailed(f"{directory} has more than {MAX_FILES} files of the audit log")
    found = {}
    for each in (path, *(os.path.join(directory, name) for name in names)):
        with suppress(FileNotFoundError):
            status = os.lstat(each)
            found[each] = (status.st_dev, status.st_ino, status.st_mtime_ns)
    return found


def _same(one: dict[str, tuple[int, int, int]], other: dict[str, tuple[int, int, int]]) -> bool:
    return {path: each[:2] for path, each in one.items()} == {path: each[:2] for path, each in other.items()}


def _open(path: str) -> IO[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AuditFailed(f"{path} is not a regular file")
    file = os.fdopen(descriptor, "rb")
    if path.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    return file


def _look(path: str, modified: int, stack: ExitStack, *, is_log: bool) -> _File:
    """Open a file and read its first line; what is wrong with it is part of the answer.

    Raises:
        FileNotFoundError: It was renamed.
    """
    try:
        stream = stack.enter_context(_open(path))
        return _File(path, modified, stream, first_sequence(stream, path, may_be_torn=is_log))
    except FileNotFoundError:
        raise
    except OSError as cause:
        return _File(path, modified, trouble=AuditFailed(f"{path}: {cause.strerror}"))
    except (AuditFailed, AuditRefused) as cause:
        return _File(path, modified, trouble=cause)


def read_end(path: str) -> AuditHead:
    """The chain's end after the last whole line of a file, which may be compressed.

    Raises:
        AuditRefused: It is not whole, or its last line is no record.
        AuditFailed: It cannot be read.
        OSError: It cannot be opened.
    """
    with _open(path) as stream:
        return end_of(stream, path)


# --- which is older ---------------------------------------------------------------------------------------------------


def _age(log: str, path: str) -> tuple[str, int]:
    """What a rotated file's name says of its age: a kind of name, and a number that grows with time within the kind."""
    match = _ROTATED.fullmatch(os.path.basename(path)[len(os.path.basename(log)) :])
    if match is None:
        raise RuntimeError(f"{path} is none of the log's")
    number, date = match.groups()
    if number is None:
        return f"date {len(date)}", int(date.replace("-", ""))
    if len(number) >= _SEQUENCE_DIGITS:
        return "sequence", int(number)
    return ("count", -int(number)) if len(number) <= _COUNT_DIGITS else (f"date {len(number)}", int(number))


def _is_older(log: str, bad: _File, good: _File) -> bool:
    """Whether a file that cannot be read cannot be what follows a good one: by its records, its name, or its time."""
    if good.path == log or bad.path == f"{good.path}.gz":  # being compressed
        return True
    if bad.first and good.first != bad.first:
        return bad.first < good.first
    (bad_kind, bad_age), (good_kind, good_age) = _age(log, bad.path), _age(log, good.path)
    return bad_age < good_age if bad_kind == good_kind else bad.modified < good.modified


def newest_rotated(path: str) -> str | None:
    """The file that the log was rotated into last, by its last record; None if there is none with a record.

    A file that cannot be read does not matter if another one is newer for sure. Of files that begin with the same
    record (a copy of an earlier moment), and of those that overlap, the one with the highest last record counts;
    whether they agree is found by who reads the chain.

    Raises:
        AuditRefused: The one that may be the newest is damaged.
        AuditFailed: It cannot be read.
    """
    for _ in range(_ATTEMPTS):
        listed, files = _listed(path), []
        with suppress(FileNotFoundError):
            for name, (*_, modified) in listed.items():
                if name != path:
                    with ExitStack() as stack:
                        files.append(_look(name, modified, stack, is_log=False))
            if _same(listed, _listed(path)):
                return _newest(path, files)
    raise AuditFailed(f"{path} is being rotated again and again")


def _newest(log: str, files: list[_File]) -> str | None:
    """Of files that were looked at; each that overlaps another is read to its end, but for old compressed ones."""
    good, bad = [file for file in files if file.first], [file for file in files if file.trouble is not None]
    highest = max((file.first for file in good), default=0)
    candidates = [file for file in good if file.first == highest or not file.path.endswith(".gz")]
    ends: list[tuple[int, float, str]] = []
    for file in candidates if len(candidates) > 1 else ():
        try:
            end = read_end(file.path)
            ends.append((max(end.sequence, file.first), end.seconds, file.path))
        except (AuditFailed, AuditRefused) as cause:
            good.remove(file)
            bad.append(replace(file, trouble=cause))
    for file in bad:
        if file.trouble is not None and not any(_is_older(log, file, other) for other in good):
            raise unusable(file.path, file.trouble)
    return max(ends)[2] if ends else candidates[0].path if candidates else None


def unusable(path: str, cause: AuditRefused | AuditFailed) -> AuditRefused | AuditFailed:
    """The same error, of a file that a new log would go on from, with the way out."""
    return type(cause)(
        f"a new audit log goes on where {path} ends, and that cannot be read: {cause.message}",
        remedy=f"restore {path} from a backup; or move it out of the folder and keep it: the log then goes on from "
        "the newest file that is left, without its records",
    )


# --- the chain across them --------------------------------------------------------------------------------------------


def read_chain(path: str, *, after: int = 0) -> Iterator[Verified]:
    """All records in order, across the files of the log, each verified against the one before.

    Args:
        path: Of the log.
        after: Files with no record of a higher number are not read; the first that is read must follow the last that
            is not.

    Raises:
        AuditRefused: The chain is broken; the message names file and line.
        AuditFailed: The log cannot be read.
    """
    with ExitStack() as stack:
        skipped, groups = _arranged(path, _opened(path, stack), after)
        before = _longest(path, skipped) if skipped else None
        chain = Chain(end_of(before.open_stream, before.path) if before else None)
        for group in groups:
            file = _longest(path, group)
            yield from chain.records(file.open_stream, file.path, last=group is groups[-1])


def _opened(path: str, stack: ExitStack) -> list[_File]:
    """The files, opened together, as logrotate may rename them while they are read; each once, whatever its names."""
    for _ in range(_ATTEMPTS):
        listed, files, seen = _listed(path), [], set()
        with suppress(FileNotFoundError), ExitStack() as attempt:
            for name, (*inode, modified) in listed.items():
                if tuple(inode) not in seen:
                    seen.add(tuple(inode))
                    files.append(_look(name, modified, attempt, is_log=name == path))
            if _same(listed, _listed(path)):
                stack.enter_context(attempt.pop_all())
                return files
    raise AuditFailed(f"{path} is being rotated again and again")


def _arranged(path: str, files: list[_File], after: int) -> tuple[list[_File], list[list[_File]]]:
    """The last file that need not be read, and those that must, in the chain's order; copies of one together."""
    groups: dict[int, list[_File]] = {}
    for file in files:
        if file.trouble is None and (file.first or file.path == path):
            groups.setdefault(file.first or 1 << 62, []).append(file)  # the log itself may have no record yet
    order = sorted(groups)
    begin = max((index for index, first in enumerate(order) if first <= after + 1), default=0)
    for file in files:
        if file.trouble is not None:
            begun = groups[order[begin]] if order and 1 < order[begin] <= after + 1 else []
            copied = any(file.path == f"{other.path}.gz" for each in groups.values() for other in each)
            if not copied and not any(_is_older(path, file, other) for other in begun):
                raise file.trouble
    return groups[order[begin - 1]] if begin else [], [groups[first] for first in order[begin:]]


def _longest(path: str, group: list[_File]) -> _File:
    """Of files that begin with the same record the one that has them all; the others are copies of its beginning.

    Raises:
        AuditRefused: They differ; or one has records that the log itself lacks.
        AuditFailed: One cannot be read.
    """
    longest, *others = sorted(group, key=lambda file: (file.path != path, file.path.endswith(".gz"), file.path))
    originals = {f"{file.path}.gz" for file in group}
    for other in others:
        if _goes_on(longest, other, being_compressed=other.path in originals):
            if longest.path == path:
                raise AuditRefused(f"{other.path} has records that {path} lacks: the log was cut or exchanged")
            longest = other
    return longest


def _goes_on(one: _File, other: _File, *, being_compressed: bool) -> bool:
    """Whether another file has all lines of one, and more.

    Raises:
        AuditRefused: They differ, or one is damaged.
        AuditFailed: One cannot be read.
    """
    lines, others = lines_of(one.open_stream, one.path), lines_of(other.open_stream, other.path)
    try:
        for number in count(1):
            line = next(lines, b"")
            try:
                copy = next(others, b"")
            except AuditRefused:
                if being_compressed:
                    return False
                raise
            if not copy.endswith(b"\n") and line.startswith(copy):
                return False
            if not line.endswith(b"\n") and copy.startswith(line):
                return True
            if line != copy:
                raise AuditRefused(
                    f"line {number} of {other.path} is not that of {one.path}, which begins with the same record",
                    remedy="find out which of the two is the log's; move the other out of the folder, and keep it",
                )
    finally:
        one.open_stream.seek(0)
        other.open_stream.seek(0)
    raise RuntimeError("unreachable")


__all__ = ["foreign_paths", "newest_rotated", "read_chain", "read_end", "unusable"]
