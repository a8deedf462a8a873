"""What happened, for journald: one entry a decision, in its native protocol, with fields to search by.

    journalctl SCZ_EVENT=refused SCZ_CODE=35
    journalctl MESSAGE_ID=8710b05e21da47bc9330e544b3b436a9

Nothing waits for the journal, and nothing fails without it: the audit log is the record (`audit`). systemd, "Native
Journal Protocol". Standard library only.
"""

from __future__ import annotations

import contextlib
import re
import socket

SOCKET = "/run/systemd/journal/socket"
MESSAGE_IDS = {
    "grant": "3021a237f4bb4b2ca865171226462906",
    "outcome": "ec1ce6b3509548778441575f6414210d",
    "refused": "8710b05e21da47bc9330e544b3b436a9",
    "released": "063b545be1ed4b6a9406f31377d9c566",
    "closed": "5631d5aad75e445f9bd3cf22e3a4f0e2",
    "killed": "11195ebae61b4606bcf1246870dfe455",
}
_LONGEST = 4096
_KEY = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def entry(fields: dict[str, str]) -> bytes:
    """An entry's bytes: a value with a line feed goes with its length, so that it cannot make a field of its own.

    Raises:
        ValueError: A name is none that journald takes.
    """
    parts = []
    for name, value in fields.items():
        if not _KEY.fullmatch(name):
            raise ValueError(f"{name!r} is not a field of the journal")
        data = value[:_LONGEST].encode("utf-8", "replace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


def tell(event: str, message: str, *, priority: int = 6, identifier: str = "scz-hook", **fields: str | int) -> None:
    """Send one entry, if a journal is there and takes it at once.

    Args:
        event: One of `MESSAGE_IDS`.
        message: For people, one line.
        priority: As of syslog(3): 3 an error, 6 informational.
        identifier: Who says so.
        fields: `container`, `model`, `subject`, `code`, `reason`, …: they become SCZ_CONTAINER and so on.
    """
    whole = {
        "MESSAGE": message.replace("\n", " "),
        "MESSAGE_ID": MESSAGE_IDS[event],
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": identifier,
        "SCZ_EVENT": event,
        **{f"SCZ_{name.upper()}": str(value) for name, value in fields.items()},
    }
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal,
    ):
        journal.setblocking(False)
        journal.sendto(entry(whole), SOCKET)
