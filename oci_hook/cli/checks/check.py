"""One line of `sczctl doctor`, and what several checks read with: bounded, and absent rather than an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from oci_hook.errors import FileUnreadable, SczError

Status = Literal["ok", "warn", "fail"]
_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Check:
    """One line.

    Attributes:
        name: What was looked at.
        status: `fail`: containers with models do not start, or not as they should; `warn`: they do, with less
            protection or for now.
        message: What was seen, and why it matters.
        remedy: The command or file that mends it; empty if it is ok.
        group: Which part of the host it is about.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""
    group: str = ""


def failed(name: str, error: SczError) -> Check:
    """The line for what could not be used; without root's rights, a file that cannot be read says nothing."""
    if isinstance(error, FileUnreadable) and os.geteuid() != 0:
        return Check(name, "warn", f"{error.message}: not seen without root's rights", "sudo sczctl doctor")
    return Check(name, "fail", error.message, error.advice)


def grouped(group: str, checks: Iterable[Check]) -> Iterator[Check]:
    """The checks as lines of a group."""
    for check in checks:
        yield replace(check, group=group)


def guarded(name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """What the checks say; an error of the system's that none of them foresaw is a line, too."""
    try:
        yield from checks()
    except SczError as error:
        yield failed(name, error)
    except (OSError, ValueError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        yield Check(name, "warn", f"could not be looked at: {said}", "sudo sczctl doctor")


def load_text(path: str) -> str | None:
    """The first 64 KiB of one of the kernel's files, without white space around it; None if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        parts: list[bytes] = []
        left = _LIMIT_BYTES
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", "replace").strip()


def count(number: int, what: str) -> str:
    """`1 owner`, `2 owners`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def mib(count_bytes: int) -> str:
    """A size for people, rounded up."""
    return f"{-(-count_bytes // (1 << 20))} MiB"
