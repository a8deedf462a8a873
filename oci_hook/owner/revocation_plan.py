"""What a revocation changes, planned from an owner's records; made without keys, and nothing is changed.

Specification: docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from oci_hook.attestation.device_record import COUNTER_LIMIT, DeviceRecord
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.model import GENERATION_HIGH, ModelId
from oci_hook.errors import DeviceInvalid, KeyInvalid
from oci_hook.owner.grant_batch import load_device
from oci_hook.owner.granting import STEP_LIMIT
from oci_hook.owner.lines import Line
from oci_hook.owner.records import OwnerRecords


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be revoked.

    Attributes:
        versions: Name and version of models.
        below: Names of model lines and the lowest generation that stays.
        devices: Names of devices, with all that they were granted.
        boot_policies: Names of model lines and device classes, whose boot states so far are withdrawn.
    """

    versions: tuple[tuple[str, str], ...] = ()
    below: tuple[tuple[str, int], ...] = ()
    devices: tuple[str, ...] = ()
    boot_policies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What changes for one device: its record with the counter's new value, what it loses, what is granted anew."""

    record: DeviceRecord
    locked: tuple[Grant, ...]
    renewed: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a revocation changes: model lines as they shall be, by name, and each device that is concerned.

    `out_of_reach` has the names of devices that would be concerned, but would not count so far.
    """

    lines: dict[str, Line]
    devices: tuple[DevicePlan, ...]
    out_of_reach: tuple[str, ...] = ()

    @property
    def grants(self) -> int:
        """How many grants are made anew."""
        return sum(len(device.renewed) for device in self.devices)


def plan_revocation(records: OwnerRecords, wanted: Wanted, *, now: int) -> Plan:
    """See what a revocation would change; nothing is.

    Args:
        records: The owner's.
        wanted: What is to be revoked.
        now: Seconds since 1970.

    Raises:
        KeyInvalid: A version that was never packed.
        DeviceInvalid: A device that was never enrolled, that is named and out of reach, or whose record is not its own.
        GrantInvalid, GrantRefused: A copy of a grant is damaged.
    """
    # Where devices alone are named no other record is read: a damaged one must not stand in the way.
    alone = wanted == Wanted(devices=wanted.devices)
    before = {line.model: line for line in records.lines()}
    lines = dict(before) if alone else _lines(records, wanted, dict(before))
    enrolled = records.devices()
    if unknown := set(wanted.devices) - set(enrolled):
        raise DeviceInvalid(f"there is no enrolled device {min(unknown)}", remedy="check --keys and the device's name")
    names = sorted(set(wanted.devices)) if alone else enrolled
    granted: dict[str, list[Grant]] = {name: [] for name in names}
    for grant in records.grants(set(names) if alone else None):
        granted.setdefault(grant.device_name, []).append(grant)
    keys = () if alone else records.content_keys()
    manifests = {records.load_content_key(name, version).manifest_digest for name, version in keys}
    again = _again(before, wanted)
    plans, out_of_reach = [], []
    for name in names:
        record = load_device(records, name)
        # Grants to keys that the device had before it was enrolled again open no more; nothing is to be renewed.
        own = [grant for grant in granted[name] if (grant.ak_name, grant.srk_name) == (record.ak.name, record.srk.name)]
        whole = name in wanted.devices or record.revoked is not None
        locked = [grant for grant in own if whole or not _line(lines, grant.model.name).allows(grant.model)]
        withdrawn = any((grant.model.name, grant.device_class) in wanted.boot_policies for grant in own)
        if not (locked or withdrawn or again or name in wanted.devices):
            continue
        try:
            raised = _counted_up(record, own)
        except DeviceInvalid:
            if name in wanted.devices:
                raise
            out_of_reach.append(name)
            continue
        # What was packed again, or whose key is gone, cannot be granted anew: it is locked with the rest.
        locked += [grant for grant in own if grant not in locked and grant.manifest_digest not in manifests]
        renewed = tuple(grant for grant in own if grant not in locked)
        raised = replace(raised, revoked=now if name in wanted.devices else record.revoked)
        plans.append(DevicePlan(raised, tuple(locked), renewed))
    changed = {name: line for name, line in lines.items() if line != before.get(name)}
    return Plan(changed, tuple(plans), tuple(out_of_reach))


def _again(before: dict[str, Line], wanted: Wanted) -> bool:
    """Whether something was revoked before, and shall be again: no record tells any longer whose grants it locks."""
    versions = any(version in _line(before, name).revoked for name, version in wanted.versions)
    return versions or any(1 < lowest <= _line(before, name).lowest_generation for name, lowest in wanted.below)


def _line(lines: dict[str, Line], name: str) -> Line:
    return lines.get(name, Line(name))


def _lines(records: OwnerRecords, wanted: Wanted, lines: dict[str, Line]) -> dict[str, Line]:
    packed = [records.load_content_key(name, version).model for name, version in records.content_keys()]
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


def _counted_up(record: DeviceRecord, own: Iterable[Grant]) -> DeviceRecord:
    """The record with the counter's next value: above what any grant to the device opens at."""
    highest = max([record.counter_value, record.highest_maximum or 0, *(grant.counter.maximum for grant in own)])
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
