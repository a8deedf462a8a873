"""The event log of a measured boot: what firmware and boot loader say that they measured, and where it leads.

Pure. A log is hostile until its replay gives PCR values that a TPM quoted, and even then only its digests are proven:
neither an event's type nor its data is covered. `event_words` says of which data the digest is. What Linux itself
measures afterwards (IMA in PCR 10, systemd's phases in PCR 11) is in no firmware's log.
Specification: TCG PC Client Platform Firmware Profile 1.06, chapter 10; TCG EFI Protocol 1.0 for the older form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from oci_hook.key_errors import EventLogInvalid

LIMIT_BYTES: Final = 4 << 20
EVENTS_LIMIT: Final = 20_000
_ALGORITHMS_LIMIT: Final = 8
_PCR_COUNT: Final = 24

SHA1: Final = 0x0004
SHA256: Final = 0x000B
_DIGEST_BYTES: Final = {SHA1: 20, SHA256: 32, 0x000C: 48, 0x000D: 64, 0x0012: 32, 0x0027: 32, 0x0028: 48, 0x0029: 64}

EV_NO_ACTION: Final = 0x3
_SPEC_ID: Final = b"Spec ID Event03\x00"
_STARTUP_LOCALITY: Final = b"StartupLocality\x00"
_LOCALITIES: Final = frozenset({0, 3, 4})


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a log.

    Attributes:
        number: Its place in the log, from 0: the first entry is the log's own header.
        pcr: 0 to 23; 0xFFFFFFFF for some that are measured nowhere.
        kind: The event type (TCG, 10.4.1), which no digest covers.
        digests: By algorithm (TPM_ALG_ID).
        data: What is said to have been measured, or only its name.
    """

    number: int
    pcr: int
    kind: int
    digests: Mapping[int, bytes]
    data: bytes

    @property
    def is_measured(self) -> bool:
        """Whether it was extended into its PCR."""
        return self.kind != EV_NO_ACTION

    @property
    def digest(self) -> bytes:
        """What the PCR of the SHA-256 bank was extended with; 32 bytes.

        Raises:
            EventLogInvalid: The log has no SHA-256 bank.
        """
        if SHA256 not in self.digests:
            raise EventLogInvalid(
                "the log has no SHA-256 digests (one of the older form has SHA-1 alone)",
                remedy="turn the SHA-256 bank on in the firmware's settings (not SHA-1 alone), and boot anew",
            )
        return self.digests[SHA256]


@dataclass(frozen=True, slots=True)
class EventLog:
    """A log as parsed.

    Attributes:
        algorithms: TPM_ALG_IDs of the banks in it. SHA-1 alone: of the older form, if `is_crypto_agile` is false.
        is_crypto_agile: Whether it begins with "Spec ID Event03".
        startup_locality: What PCR 0 began with: 0, 3 or 4 (TPM2_Startup's, or 4 after an H-CRTM).
        events: In the order of measurement, without the header.
    """

    algorithms: tuple[int, ...]
    is_crypto_agile: bool
    startup_locality: int
    events: tuple[Event, ...]


class _Reader:
    """Takes little-endian fields off a log; what is not there is refused."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def left(self) -> int:
        return len(self._data) - self._place

    def take(self, size: int) -> bytes:
        if size > self.left():
            raise EventLogInvalid(f"the log ends inside an event, at byte {self._place}")
        self._place += size
        return self._data[self._place - size : self._place]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


def parse_event_log(data: bytes) -> EventLog:
    """Parse a log of either form.

    Args:
        data: As /sys/kernel/security/tpm0/binary_bios_measurements has it; at most 4 MiB.

    Raises:
        EventLogInvalid: Too large, empty, truncated, an unknown algorithm, a PCR that does not exist, more than 20,000
            events, or two different startup localities.
    """
    if len(data) > LIMIT_BYTES:
        raise EventLogInvalid(f"the log is larger than {LIMIT_BYTES} bytes")
    if not data:
        raise EventLogInvalid("the log is empty: the firmware handed none to the system")
    reader = _Reader(data)
    first = _sha1_event(reader, 0)
    is_crypto_agile = first.kind == EV_NO_ACTION and first.data.startswith(_SPEC_ID)
    sizes = _spec_id(first.data) if is_crypto_agile else {SHA1: 20}
    events = [] if is_crypto_agile else [first]
    while reader.left():
        number = len(events) + is_crypto_agile
        if number >= EVENTS_LIMIT:
            raise EventLogInvalid(f"the log has more than {EVENTS_LIMIT} events")
        events.append(_agile_event(reader, number, sizes) if is_crypto_agile else _sha1_event(reader, number))
    return EventLog(tuple(sizes), is_crypto_agile, _startup_locality(events), tuple(events))


def _place(reader: _Reader, number: int) -> tuple[int, int]:
    pcr, kind = reader.number(4), reader.number(4)
    if pcr >= _PCR_COUNT and kind != EV_NO_ACTION:
        raise EventLogInvalid(f"event {number} is for PCR {pcr}, which there is not")
    return pcr, kind


def _sha1_event(reader: _Reader, number: int) -> Event:
    """TCG_PCClientPCREvent: the header, and every event of the older form."""
    pcr, kind = _place(reader, number)
    digest = reader.take(20)
    return Event(number, pcr, kind, MappingProxyType({SHA1: digest}), reader.take(reader.number(4)))


def _agile_event(reader: _Reader, number: int, sizes: Mapping[int, int]) -> Event:
    """TCG_PCR_EVENT2, with one digest for each bank of the header (10.2.2)."""
    pcr, kind = _place(reader, number)
    if reader.number(4) != len(sizes):
        raise EventLogInvalid(f"event {number} has not one digest for each bank")
    digests: dict[int, bytes] = {}
    for _ in sizes:
        algorithm = reader.number(2)
        if algorithm not in sizes or algorithm in digests:
            raise EventLogInvalid(f"event {number} has a digest of algorithm {algorithm:#06x}, unknown or twice")
        digests[algorithm] = reader.take(sizes[algorithm])
    return Event(number, pcr, kind, MappingProxyType(digests), reader.take(reader.number(4)))


def _spec_id(data: bytes) -> dict[int, int]:
    """Digest sizes by algorithm, of TCG_EfiSpecIDEventStruct (10.4.5.1)."""
    reader = _Reader(data)
    reader.take(len(_SPEC_ID) + 4 + 4)  # signature; platform class; version, errata and the size of a UINTN
    count = reader.number(4)
    if not 0 < count <= _ALGORITHMS_LIMIT:
        raise EventLogInvalid(f"the log's header names {count} algorithms, not 1 to {_ALGORITHMS_LIMIT}")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, size = reader.number(2), reader.number(2)
        if _DIGEST_BYTES.get(algorithm) != size or algorithm in sizes:
            raise EventLogInvalid(f"the log's header has algorithm {algorithm:#06x} of {size} bytes, unknown or twice")
        sizes[algorithm] = size
    reader.take(reader.number(1))  # the vendor's own
    if reader.left():
        raise EventLogInvalid("the log's header has bytes after its end")
    return sizes


def _startup_locality(events: list[Event]) -> int:
    """What PCR 0 began with (10.4.5.3); the replay shows whether it is true."""
    said = {
        event.data[len(_STARTUP_LOCALITY)]
        for event in events
        if event.kind == EV_NO_ACTION
        and event.pcr == 0
        and len(event.data) == len(_STARTUP_LOCALITY) + 1
        and event.data.startswith(_STARTUP_LOCALITY)
    }
    if len(said) > 1 or not said <= _LOCALITIES:
        raise EventLogInvalid("the log names a startup locality that there is not, or two of them")
    return said.pop() if said else 0


def initial_value(pcr: int, startup_locality: int = 0) -> bytes:
    """A PCR's value of the SHA-256 bank after a reset of the platform; 32 bytes."""
    if 17 <= pcr <= 22:
        return b"\xff" * 32
    return (startup_locality if pcr == 0 else 0).to_bytes(32, "big")


def extend(value: bytes, digest: bytes) -> bytes:
    """The value of a PCR of the SHA-256 bank after an extend."""
    return hashlib.sha256(value + digest).digest()


def replay(log: EventLog) -> dict[int, bytes]:
    """The values of the SHA-256 bank that a log leads to: of the PCRs that it measures into, and of no other.

    Raises:
        EventLogInvalid: It has no SHA-256 digests.
    """
    values: dict[int, bytes] = {}
    for event in log.events:
        if event.is_measured:
            value = values.get(event.pcr) or initial_value(event.pcr, log.startup_locality)
            values[event.pcr] = extend(value, event.digest)
    return dict(sorted(values.items()))
