"""What a revocation changes, planned from an owner's records; made without keys, and nothing is changed.

Specification: docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from oci_hook.attestation.device_record import COUNTER_LIMIT, DeviceRecord
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.model import GENERATION_HIGH, ModelId
from oci_hook.errors import DeviceInvalid, KeyInvalid
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.grant_batch import load_device
from oci_hook.owner.granting import STEP_LIMIT
from oci_hook.owner.lines import Line
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from oci_hook.owner.tpms import ByCounter, CounterKey, TpmKey, counter_keys, keys_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be revoked.

    Attributes:
        versions: Name and version of models.
        below: Names of model lines and the lowest generation that stays.
        devices: Names of devices, with all that they were granted.
        boot_policies: Names of model lines and device classes, whose boot states so far are withdrawn.
        without_renewal: Grants that would need a broker's share are locked and not made anew.
    """

    versions: tuple[tuple[str, str], ...] = ()
    below: tuple[tuple[str, int], ...] = ()
    devices: tuple[str, ...] = ()
    boot_policies: tuple[tuple[str, str], ...] = ()
    without_renewal: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What changes for one device.

    Attributes:
        record: With the counter's new value.
        locked: What the device loses.
        renewed: What is granted anew.
        not_renewed: What stays allowed, but opens no more until somebody grants it again.
        doubled: Further copies of what is renewed, under another name that the TPM had or as an earlier grant.
    """

    record: DeviceRecord
    locked: tuple[Grant, ...]
    renewed: tuple[Grant, ...]
    not_renewed: tuple[Grant, ...] = ()
    doubled: tuple[Grant, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a revocation changes.

    Attributes:
        lines: Model lines as they shall be, by name.
        devices: Each device that is concerned and gets a list.
        out_of_reach: The names of devices that would be concerned, but would not count so far.
        marked: Their records, if they are marked as revoked.
        former: Records that were set aside, and are marked as revoked.
        strange: Copies of grants that should be locked, and hang on a TPM or counter of which there is no record.
        unread: The names of devices whose damaged records were left out.
    """

    lines: dict[str, Line]
    devices: tuple[DevicePlan, ...]
    out_of_reach: tuple[str, ...] = ()
    marked: tuple[DeviceRecord, ...] = ()
    former: tuple[DeviceRecord, ...] = ()
    strange: tuple[Grant, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def grants(self) -> int:
        """How many grants are made anew."""
        return sum(len(device.renewed) for device in self.devices)


def plan_revocation(records: OwnerRecords, wanted: Wanted, *, now: int) -> Plan:
    """See what a revocation would change; nothing is.

    Which grants a record's counter locks is told by TPM and counter (`tpms`), never by name.

    Args:
        records: The owner's.
        wanted: What is to be revoked.
        now: Seconds since 1970.

    Raises:
        KeyInvalid: A version that was never packed.
        DeviceInvalid: A device that was never enrolled, or whose record is damaged or not its own.
        GrantInvalid, GrantRefused: A copy of a grant is damaged.
    """
    # Where devices alone are named, whatever is damaged of others is left out: it must not stand in the way.
    alone = wanted == Wanted(devices=wanted.devices)
    keys = () if alone else records.content_keys()
    contents = {each.manifest_digest: each for each in (records.load_content_key(*key) for key in keys)}
    known = _load(records, wanted, strict=not alone)
    before = {line.model: line for line in records.lines()}
    lines = dict(before) if alone else _lines(records, wanted, dict(before), known.copies)
    revoked, again = _revoked(known, wanted), _again(before, wanted)
    copies, highest = ByCounter(known.copies), _highest(known)
    plans, out_of_reach, marked = [], [], []
    for name, record in known.devices.items():
        if alone and name not in revoked:
            continue
        own = copies.of(record)
        whole = name in revoked or record.revoked is not None
        locked = [grant for grant in own if whole or not _line(lines, grant.model.name).allows(grant.model)]
        withdrawn = any((grant.model.name, grant.device_class) in wanted.boot_policies for grant in own)
        if not (locked or withdrawn or again or name in revoked):
            continue
        kept = replace(record, revoked=now if name in revoked else record.revoked)
        try:
            raised = _counted_up(kept, max(highest[key] for key in counter_keys(kept)))
        except DeviceInvalid:
            out_of_reach.append(name)
            marked += [kept] if name in revoked else []
            continue
        highest.update(dict.fromkeys(counter_keys(raised), raised.counter_value))
        plans.append(_device_plan(raised, own, locked, contents, wanted))
    marked_keys = frozenset[TpmKey]().union(*(keys_of(known.devices[name]) for name in revoked))
    former = [each for each in known.former if each.revoked is None and keys_of(each) & marked_keys]
    return Plan(
        lines={name: line for name, line in lines.items() if line != before.get(name)},
        devices=tuple(plans),
        out_of_reach=tuple(out_of_reach),
        marked=tuple(marked),
        former=tuple(replace(each, revoked=now) for each in former),
        strange=_strange(known, wanted, None if alone else lines),
        unread=known.unread,
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """What an owner's folder has: records by name, those set aside, all copies of grants, and names left out."""

    devices: dict[str, DeviceRecord]
    former: tuple[DeviceRecord, ...]
    copies: tuple[Grant, ...]
    unread: tuple[str, ...]


def _load(records: OwnerRecords, wanted: Wanted, *, strict: bool) -> _Known:
    enrolled, former = records.devices(), FormerRecords(records.folder)
    if unknown := set(wanted.devices) - set(enrolled):
        raise DeviceInvalid(f"there is no enrolled device {min(unknown)}", remedy="check --keys and the device's name")
    copies = (*records.grants(None if strict else set(wanted.devices)), *former.grants(strict=strict))
    devices, unread = dict[str, DeviceRecord](), []
    for name in enrolled:
        try:
            devices[name] = load_device(records, name)
        except DeviceInvalid:
            if strict or name in wanted.devices:
                raise
            unread.append(name)
    return _Known(devices, former.devices(strict=strict), copies, tuple(unread))


def _revoked(known: _Known, wanted: Wanted) -> set[str]:
    """The names of the devices that shall be revoked: those that are named, and others of the same TPMs."""
    keys = frozenset[TpmKey]().union(*(keys_of(known.devices[name]) for name in wanted.devices))
    return {name for name, record in known.devices.items() if keys & keys_of(record)}


def _highest(known: _Known) -> dict[CounterKey, int]:
    """For each counter, the highest value that it is to have, and that a grant on it opens at: under any name."""
    found: dict[CounterKey, int] = {}
    values: list[tuple[DeviceRecord | Grant, int]] = [(grant, grant.counter.maximum) for grant in known.copies]
    for record in (*known.devices.values(), *known.former):
        values.append((record, max(record.counter_value, record.highest_maximum or 0)))
    for each, value in values:
        for key in counter_keys(each):
            found[key] = max(value, found.get(key, 0))
    return found


def _device_plan(
    record: DeviceRecord,
    own: Sequence[Grant],
    locked: Sequence[Grant],
    contents: Mapping[str, ContentKeyRecord],
    wanted: Wanted,
) -> DevicePlan:
    """Sort a device's grants; `own` hang on its counter, `locked` are those of them that are revoked."""
    stay: dict[tuple[str, str], Grant] = {}
    allowed = [grant for grant in own if grant not in locked and grant.manifest_digest in contents]
    for grant in sorted(allowed, key=lambda each: (each.device_name == record.device, each.created)):
        # Of an earlier AK or SRK: it is locked, but that the device shall have it as it is now nobody said.
        if (grant.ak_name, grant.srk_name) == (record.ak.name, record.srk.name):
            stay[grant.model.name, grant.model.version] = grant
    renewed, left = list[Grant](), list[Grant]()
    for grant in own:
        if grant is stay.get((grant.model.name, grant.model.version)):
            (left if wanted.without_renewal and contents[grant.manifest_digest].broker else renewed).append(grant)
    doubled = [
        grant for grant in allowed if (kept := stay.get((grant.model.name, grant.model.version))) and kept != grant
    ]
    # What was packed again, or whose key is gone, cannot be granted anew: it is locked with the rest.
    lost = [*locked, *(grant for grant in own if grant not in (*locked, *renewed, *left, *doubled))]
    return DevicePlan(record, tuple(lost), tuple(renewed), tuple(left), tuple(doubled))


def _strange(known: _Known, wanted: Wanted, lines: Mapping[str, Line] | None) -> tuple[Grant, ...]:
    """The copies that should be locked, and that no record reaches."""
    devices = ByCounter(known.devices.values())
    found = []
    for grant in known.copies:
        withdrawn = (grant.model.name, grant.device_class) in wanted.boot_policies
        allowed = lines is None or lines.get(grant.model.name, Line(grant.model.name)).allows(grant.model)
        if (withdrawn or not allowed or grant.device_name in wanted.devices) and not devices.of(grant):
            found.append(grant)
    return tuple(found)


def _again(before: dict[str, Line], wanted: Wanted) -> bool:
    """Whether something was revoked before, and shall be again: no record tells any longer whose grants it locks."""
    versions = any(version in _line(before, name).revoked for name, version in wanted.versions)
    return versions or any(1 < lowest <= _line(before, name).lowest_generation for name, lowest in wanted.below)


def _line(lines: dict[str, Line], name: str) -> Line:
    return lines.get(name, Line(name))


def _lines(records: OwnerRecords, wanted: Wanted, lines: dict[str, Line], copies: Iterable[Grant]) -> dict[str, Line]:
    packed = {records.load_content_key(name, version).model for name, version in records.content_keys()}
    packed |= {grant.model for grant in copies}  # whose key is gone, and can be recovered
    for name, version in wanted.versions:
        if (name, version) not in {(model.name, model.version) for model in packed}:
            raise KeyInvalid(
                f"{name}:{version} was never packed", remedy="check --keys and the model's name and version"
            )
        lines[name] = _line(lines, name).without(version)
    for name, lowest in wanted.below:
        lines[name] = _line(lines, name).from_generation(lowest)
    for name, device_class in wanted.boot_policies:
        lines[name] = _line(lines, name).with_next_epoch(device_class)
    # Where everything up to a generation is revoked the hook can tell it as well, by its list: not by grants alone.
    for name, line in lines.items():
        lines[name] = line.from_generation(_lowest(line, [model for model in packed if model.name == name]))
    return lines


def _lowest(line: Line, packed: Iterable[ModelId]) -> int:
    """The lowest generation that stays, if no revoked version would stay with it."""
    lowest = line.lowest_generation
    for model in sorted(packed, key=lambda each: (each.generation, each.version in line.revoked)):
        if model.generation >= lowest and model.version not in line.revoked:
            return lowest
        lowest = max(lowest, min(model.generation + 1, GENERATION_HIGH))
    return lowest


def _counted_up(record: DeviceRecord, highest: int) -> DeviceRecord:
    """The record with the counter's next value: above `highest`, up to which grants to the device open."""
    value = highest + 1
    # Nobody but the device's TPM says how far it counted: a list that is too far ahead could never be applied.
    certified = record.counter_value if record.certified is None else record.certified
    if value > min(COUNTER_LIMIT, certified + STEP_LIMIT):
        raise DeviceInvalid(
            f"the counter of {record.device} would have to go to {value}: at the last enrolment it was at {certified}, "
            f"and counting is limited to {STEP_LIMIT} further",
            remedy="let the device apply its last folder (`sczctl add`), `sczctl enroll` it again, and revoke then",
        )
    return replace(record, counter_value=value, highest_maximum=value, certified=certified)
