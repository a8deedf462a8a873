"""Whether an event log explains PCR values that a TPM quoted, and what differs between two boots.

Pure. A log is believed, PCR by PCR, where its replay leads to the quoted value. Linux goes on where the firmware's log
ends: systemd extends PCR 11 with a word for each phase of the boot, which is tried; IMA's entries in PCR 10 are not.
Sources: TCG PC Client Platform Firmware Profile 1.06, chapter 10; systemd-pcrphase.service(8).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.event_log import Event, EventLog, extend, initial_value, replay
from oci_hook.attestation.event_words import describe
from oci_hook.attestation.reference_values import UNIFIED_PCR, boot_chain

PHASES: Final = ("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final")
_LINES_LIMIT: Final = 12
_COMPARED: Final = 1000  # events of one PCR
_MATCHED: Final = 1 << 16  # pairs of them: finding what two lists have in common is cubic, if somebody wants it to be


@dataclass(frozen=True, slots=True)
class Explained:
    """One PCR: whether the log leads to the value that was quoted, and with how many of systemd's phases after it."""

    pcr: int
    value: bytes
    is_explained: bool
    phases: int = 0

    @property
    def words(self) -> str:
        """For people."""
        if not self.is_explained:
            return "NOT EXPLAINED: the log leads elsewhere, or something was measured after it ended"
        if self.phases:
            return f"explained, with systemd's phases up to {PHASES[self.phases - 1]}"
        return "explained"


def with_phases(value: bytes, count: int) -> bytes:
    """The value of PCR 11 after the first `count` of systemd's phases."""
    for phase in PHASES[:count]:
        value = extend(value, hashlib.sha256(phase.encode()).digest())
    return value


def explain_values(log: EventLog, quoted: Mapping[int, bytes]) -> tuple[Explained, ...]:
    """Compare a log's replay with quoted values.

    Args:
        log: As parsed.
        quoted: Values of the SHA-256 bank that a verified quote covers.

    Raises:
        EventLogInvalid: The log has no SHA-256 digests.
    """
    values = replay(log)
    found = []
    for pcr, value in sorted(quoted.items()):
        phases = _phases(log, values, pcr, value)
        found.append(Explained(pcr, value, phases is not None, phases or 0))
    return tuple(found)


def explained_pcrs(log: EventLog, approved: Mapping[int, Collection[bytes]]) -> set[int]:
    """The PCRs in which a log leads to one of the approved values; it is replayed once, however many there are.

    Raises:
        EventLogInvalid: The log has no SHA-256 digests.
    """
    values = replay(log)
    return {pcr for pcr, wanted in approved.items() if any(_phases(log, values, pcr, v) is not None for v in wanted)}


def _phases(log: EventLog, values: Mapping[int, bytes], pcr: int, value: bytes) -> int | None:
    """With how many of systemd's phases a replay leads to a value; None: it does not."""
    ours = values.get(pcr, initial_value(pcr, log.startup_locality))
    tries = len(PHASES) if pcr == UNIFIED_PCR else 0
    return next((count for count in range(tries + 1) if with_phases(ours, count) == value), None)


def differing_events(approved: EventLog, current: EventLog, pcrs: Iterable[int]) -> list[str]:
    """What was measured otherwise in a boot than in an approved one, a line each, for people.

    Args:
        approved: A log that leads to the approved values of these PCRs.
        current: A log that leads to the values that the TPM has now.
        pcrs: Those that differ.

    Raises:
        EventLogInvalid: A log has no SHA-256 digests.
    """
    lines: list[str] = []
    roles = (_roles(approved), _roles(current))
    for pcr in pcrs:
        before, after = (
            [event for event in log.events if event.pcr == pcr and event.is_measured][:_COMPARED]
            for log in (approved, current)
        )
        for old, new in _differences([event.digest for event in before], [event.digest for event in after]):
            was = [(event, _words(event, roles[0])) for event in before[old]]
            now = [(event, _words(event, roles[1])) for event in after[new]]
            lines += _changes(pcr, was, now)
    left = len(lines) - _LINES_LIMIT
    return [*lines[:_LINES_LIMIT], f"and {left} more"] if left > 0 else lines


def _differences(before: list[bytes], after: list[bytes]) -> Iterator[tuple[slice, slice]]:
    """Where two lists differ; what is too long to be matched is compared place by place, between the common ends."""
    shorter = min(len(before), len(after))
    head = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    tail = next((n for n in range(shorter - head) if before[-1 - n] != after[-1 - n]), shorter - head)
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    if len(old) * len(new) <= _MATCHED:
        for kind, low, high, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if kind != "equal":
                yield slice(head + low, head + high), slice(head + start, head + end)
        return
    for n in range(max(len(old), len(new))):
        if old[n : n + 1] != new[n : n + 1]:
            in_old, in_new = (slice(head + min(n, size), head + min(n + 1, size)) for size in (len(old), len(new)))
            yield in_old, in_new


def _roles(log: EventLog) -> dict[int, str]:
    """What a program in PCR 4 is, by the number of its event."""
    chain = boot_chain(log)
    roles = {event.number: "boot loader" for each in chain.loaders for event in each}
    roles |= {event.number: "unified kernel image" for event in chain.unified}
    return roles | {event.number: "kernel" for event in chain.kernel}


def _words(event: Event, roles: Mapping[int, str]) -> str:
    role = roles.get(event.number)
    return f"{role}, {describe(event)}" if role else describe(event)


def _changes(pcr: int, before: list[tuple[Event, str]], after: list[tuple[Event, str]]) -> list[str]:
    changed = [
        f"PCR {pcr}: {now}: sha256:{new.digest.hex()}, approved is sha256:{old.digest.hex()}"
        + (f" ({was})" if was != now else "")
        for (old, was), (new, now) in zip(before, after, strict=False)
    ]
    missing = [f"PCR {pcr}: {was}: sha256:{old.digest.hex()} is missing" for old, was in before[len(after) :]]
    added = [f"PCR {pcr}: {now}: sha256:{new.digest.hex()} is new" for new, now in after[len(before) :]]
    return changed + missing + added
