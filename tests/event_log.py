"""Reads a TCG event log of a crypto-agile TPM and replays it; for the tests, which compare that with the TPM's PCRs.

Specification: TCG PC Client Platform Firmware Profile, 10 ("Event Logging"): TCG_PCClientPCREvent, then TCG_PCR_EVENT2.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

SHA256 = 0x000B
_SIZES = {0x0004: 20, SHA256: 32, 0x000C: 48, 0x000D: 64}
_NO_ACTION = 3


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement: where, of what kind, its SHA-256 digest, and what the firmware says that it was."""

    pcr: int
    kind: int
    digest: bytes
    data: bytes


def parse_event_log(log: bytes) -> Iterator[Event]:
    """The events after the first, which is the header that says what the others look like."""
    (header_bytes,) = struct.unpack_from("<I", log, 28)
    if not log[32:].startswith(b"Spec ID Event03\0"):
        raise ValueError("the log is none of a crypto-agile TPM")
    place = 32 + header_bytes
    while place < len(log):
        pcr, kind, count = struct.unpack_from("<III", log, place)
        place += 12
        digests = {}
        for _ in range(count):
            (algorithm,) = struct.unpack_from("<H", log, place)
            digests[algorithm] = log[place + 2 : place + 2 + _SIZES[algorithm]]
            place += 2 + _SIZES[algorithm]
        (size,) = struct.unpack_from("<I", log, place)
        yield Event(pcr, kind, digests[SHA256], log[place + 4 : place + 4 + size])
        place += 4 + size


def replay(log: bytes) -> dict[int, bytes]:
    """The values that the PCRs of the SHA-256 bank have, if the log is whole and no other measurement was made."""
    values: dict[int, bytes] = {}
    for event in parse_event_log(log):
        if event.kind != _NO_ACTION:
            values[event.pcr] = hashlib.sha256(values.get(event.pcr, bytes(32)) + event.digest).digest()
    return values
