"""configfs-tsm: how a confidential guest asks its hardware for an attestation report (Linux 6.7).

One directory for each report, made and removed here, so that nobody else writes to it; its generation, which counts
writes, tells if somebody did all the same. It waits for as long as the hardware takes: deadlines are the caller's.
Source: Linux, Documentation/ABI/testing/configfs-tsm-report; drivers/virt/coco/guest/report.c.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from oci_hook.key_errors import TeeUnavailable

BLOB_LIMIT_BYTES: Final = 64 << 10
_TEXT_LIMIT_BYTES: Final = 4096
_PROVIDER = re.compile(r"[a-z0-9_]{1,32}")
_NUMBER = re.compile(r"[0-9]{1,20}")
_OURS = re.compile(r"scz-smm-([0-9]{1,20})-([0-9]{1,10})-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class TsmReport:
    """A report: the name of its format, `outblob`, and `auxblob`, which may be empty."""

    provider: str
    report: bytes
    auxiliary: bytes


@contextmanager
def report_directory(base: str) -> Iterator[str]:
    """A directory for one report; it goes with the block, and after SIGKILL with the next `sweep_reports`.

    Its name carries who made it: whoever may hang in it must be who made it (`sweep_reports`).

    Args:
        base: `/sys/kernel/config/tsm/report`.

    Raises:
        TeeUnavailable: It cannot be made: no configfs, no hardware, no right.
    """
    path = os.path.join(base, f"scz-smm-{_pid_namespace()}-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        os.mkdir(path, 0o700)
    except OSError as cause:
        raise TeeUnavailable(f"{base}: no report can be asked for: {cause.strerror}") from cause
    try:
        yield path
    finally:
        with suppress(OSError):
            os.rmdir(path)


def _pid_namespace() -> int:
    """Numbers of processes mean something within it alone."""
    return os.stat("/proc/self/ns/pid").st_ino


def sweep_reports(base: str) -> None:
    """Remove what processes of ours that were killed have left.

    Not of one that hangs in a read of it, as rmdir(2) would wait for that read.
    """
    space = _pid_namespace()
    with suppress(OSError):
        for name in os.listdir(base):
            found = _OURS.fullmatch(name)
            if found and int(found[1]) == space and not os.path.exists(f"/proc/{found[2]}"):
                with suppress(OSError):
                    os.rmdir(os.path.join(base, name))


def read_report(directory: str, data: bytes) -> TsmReport:
    """Ask for a report over 64 bytes, at the lowest privilege level that this kernel may use, and read it.

    Args:
        directory: Of `report_directory`, new.
        data: 64 bytes.

    Raises:
        TeeUnavailable: It cannot be had, is too large, or somebody wrote to the directory meanwhile.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return _read(fd, data)
        finally:
            os.close(fd)
    except OSError as cause:
        raise TeeUnavailable(f"configfs-tsm: {cause.filename or 'the report'}: {cause.strerror}") from cause


def _read(fd: int, data: bytes) -> TsmReport:
    provider = _text(fd, "provider", _PROVIDER)
    before = int(_text(fd, "generation", _NUMBER))
    writes = 1
    with suppress(FileNotFoundError):  # a hardware without levels
        _write(fd, "privlevel", _text(fd, "privlevel_floor", _NUMBER).encode())
        writes += 1
    _write(fd, "inblob", data)
    report = _attribute(fd, "outblob", BLOB_LIMIT_BYTES)
    try:
        auxiliary = _attribute(fd, "auxblob", BLOB_LIMIT_BYTES)
    except FileNotFoundError:
        auxiliary = b""
    after = int(_text(fd, "generation", _NUMBER))
    if after != before + writes:  # also a write that the kernel took and forgot: it says so nowhere else
        raise TeeUnavailable(f"configfs-tsm: {after - before} writes to the report's directory, {writes} are ours")
    if not report:
        raise TeeUnavailable("configfs-tsm: the report is empty")
    return TsmReport(provider, report, auxiliary)


def _write(directory_fd: int, name: str, data: bytes) -> None:
    """In one piece; a binary attribute takes it when it is closed."""
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        if os.write(fd, data) != len(data):
            raise TeeUnavailable(f"configfs-tsm: {name} took a part of what was written")
    finally:
        os.close(fd)


def _attribute(directory_fd: int, name: str, limit_bytes: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        data = bytearray()
        while chunk := os.read(fd, limit_bytes + 1 - len(data)):
            data += chunk
            if len(data) > limit_bytes:
                raise TeeUnavailable(f"configfs-tsm: {name} is larger than {limit_bytes} bytes")
        return bytes(data)
    finally:
        os.close(fd)


def _text(directory_fd: int, name: str, pattern: re.Pattern[str]) -> str:
    text = _attribute(directory_fd, name, _TEXT_LIMIT_BYTES).decode("ascii", "replace").rstrip("\n")
    if not pattern.fullmatch(text):
        raise TeeUnavailable(f"configfs-tsm: {name} is {text[:64]!a}")
    return text
