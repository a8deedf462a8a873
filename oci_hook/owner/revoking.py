"""Revoking: what an owner no longer allows, planned from the records, then written as one folder for each device.

A plan is made without keys and changes nothing. Carrying it out raises the records first: whatever ends it half-way,
nothing that was to be revoked can be granted again, and the next revocation counts from the raised values. A folder
holds the signed list and fresh grants for all that stays allowed; `sczctl add` on the device applies it.
Specification: docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from oci_hook.attestation.device_record import COUNTER_LIMIT, DeviceRecord, format_device_record, parse_device_record
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.model import GENERATION_HIGH, ModelId
from oci_hook.bundle.revocations import Revocations, sign_revocations
from oci_hook.errors import DeviceInvalid, FileUnreadable, KeyInvalid, OutputExists
from oci_hook.key_errors import GenerationRefused
from oci_hook.owner.broker_shares import OwnersBroker, shares_for
from oci_hook.owner.granting import STEP_LIMIT, make_grant
from oci_hook.owner.keyring import Keyring
from oci_hook.owner.lines import Line
from oci_hook.owner.records import OwnerRecords
from oci_hook.trusted_file import replace_file

LIST_FILE = "revocations.jwt"


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
    """What a revocation changes: model lines as they shall be, by name, and each device that is concerned."""

    lines: dict[str, Line]
    devices: tuple[DevicePlan, ...]

    @property
    def grants(self) -> int:
        """How many grants are made anew."""
        return sum(len(device.renewed) for device in self.devices)


def verify_allowed(records: OwnerRecords, model: ModelId) -> None:
    """Refuse to grant what was revoked.

    Raises:
        GenerationRefused: The version, or its generation, was revoked.
    """
    line = records.load_line(model.name)
    if not line.allows(model):
        raise GenerationRefused(
            f"{model.name}:{model.version} (generation {model.generation}) was revoked",
            remedy="grant a later version: `sczctl pack` with a higher --generation",
        )


def remember_grant(records: OwnerRecords, record: DeviceRecord, grant: Grant, compact: bytes) -> None:
    """Keep a grant, and of its device the highest value at which any grant opens, which a revocation goes beyond.

    Args:
        records: The owner's.
        record: Of the grant's device, as it shall be kept.
        grant: What was made.
        compact: Its bytes.

    Raises:
        FileUnreadable: The system said no.
    """
    remember_device(records, record, grant)
    records.save_grant(grant, compact)


def remember_device(records: OwnerRecords, record: DeviceRecord, grant: Grant) -> None:
    """The first half of `remember_grant`: only what a revocation would not know from the counter's value is written."""
    highest = max(record.highest_maximum or 0, grant.counter.maximum)
    if highest > record.counter_value:
        record = replace(record, highest_maximum=highest)
    data = format_device_record(record)
    if data != records.load_device(record.device):
        records.save_device(record.device, data)


def plan_revocation(records: OwnerRecords, wanted: Wanted, *, now: int) -> Plan:
    """See what a revocation would change; nothing is.

    Args:
        records: The owner's.
        wanted: What is to be revoked.
        now: Seconds since 1970.

    Raises:
        KeyInvalid: A version that was never packed.
        DeviceInvalid: A device that was never enrolled, or whose counter would have too far to go.
    """
    before = {line.model: line for line in records.lines()}
    lines = _lines(records, wanted, dict(before))
    unknown = set(wanted.devices) - set(records.devices())
    if unknown:
        raise DeviceInvalid(f"there is no enrolled device {min(unknown)}", remedy="check --keys and the device's name")
    granted: dict[str, list[Grant]] = {name: [] for name in records.devices()}
    for grant in records.grants():
        granted.setdefault(grant.device_name, []).append(grant)
    plans = []
    manifests = {records.load_content_key(name, version).manifest_digest for name, version in records.content_keys()}
    for name in records.devices():
        record = parse_device_record(records.load_device(name))
        whole = name in wanted.devices or record.revoked is not None
        # Grants to keys that the device had before it was enrolled again open no more; nothing is to be renewed.
        own = [grant for grant in granted[name] if (grant.ak_name, grant.srk_name) == (record.ak.name, record.srk.name)]
        locked = [grant for grant in own if whole or not _line(lines, grant.model.name).allows(grant.model)]
        withdrawn = any((grant.model.name, grant.device_class) in wanted.boot_policies for grant in own)
        if locked or withdrawn or name in wanted.devices:
            raised = replace(_counted_up(record, own), revoked=now if name in wanted.devices else record.revoked)
            # What was packed again, or whose key is gone, cannot be granted anew: it is locked with the rest.
            locked += [grant for grant in own if grant not in locked and grant.manifest_digest not in manifests]
            renewed = tuple(grant for grant in own if grant not in locked)
            plans.append(DevicePlan(raised, tuple(locked), renewed))
    return Plan({name: line for name, line in lines.items() if line != before.get(name)}, tuple(plans))


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
    if value > min(COUNTER_LIMIT, record.counter_value + STEP_LIMIT):
        raise DeviceInvalid(
            f"{record.device} was given a grant that opens up to {highest}, its counter is at {record.counter_value}: "
            f"counting is limited to {STEP_LIMIT}",
            remedy="let the device make a new counter: delete its index, `sczctl enroll` it again, and grant anew",
        )
    return replace(record, counter_value=value, highest_maximum=value)


def carry_out(
    keyring: Keyring,
    records: OwnerRecords,
    plan: Plan,
    folder: Path,
    *,
    created: int,
    random: Callable[[int], bytes],
    broker: OwnersBroker | None = None,
    progress: Callable[[int], object] = lambda _done: None,
) -> None:
    """Raise the records, then write a folder for each device: the list, and grants for all that stays allowed.

    Args:
        keyring: The owner's, opened.
        records: The owner's.
        plan: From `plan_revocation`.
        folder: New; it gets a folder for each device, named after it. It is there whole or not at all.
        created: Seconds since 1970.
        random: As `os.urandom`.
        broker: Encrypts the shares of grants that need one; asked before anything is changed.
        progress: Called with the number of grants made so far.

    Raises:
        FileUnreadable: The system said no.
        GrantInvalid: A grant that is made anew needs a broker's share, and no broker is given.
        BrokerRefused, BrokerUnavailable: The broker encrypts no shares. Nothing was changed.
    """
    renewals = [old.model for device in plan.devices for old in device.renewed]
    contents = {(each.name, each.version): records.load_content_key(each.name, each.version) for each in renewals}
    wanted = [contents[each.name, each.version] for each in renewals]
    shares = iter(shares_for(broker, keyring.owner, wanted, random))
    for line in plan.lines.values():
        records.save_line(line)
    for device in plan.devices:
        records.save_device(device.record.device, format_device_record(device.record))
    lines = tuple((line.model, line.lowest_generation) for line in records.lines() if line.lowest_generation > 1)
    renewed, make = [], partial(make_grant, keyring, maximum=None, created=created, random=random)
    with new_folder(folder) as unfinished:
        for device in plan.devices:
            target = unfinished / device.record.device
            target.mkdir(mode=0o755)
            for old in device.renewed:
                content, share = contents[old.model.name, old.model.version], next(shares)
                epoch = records.load_line(old.model.name).epoch(device.record.device_class)
                made = make(content, device.record, share=share, epoch=epoch, lease=old.lease)
                replace_file(str(target / f"{old.model.name}@{old.model.version}.jwt"), made[1], mode=0o644)
                renewed.append(made)
                progress(len(renewed))
            signed = sign_revocations(_list(keyring, device.record, created, lines), key=keyring.manifest_key)
            replace_file(str(target / LIST_FILE), signed, mode=0o644)
    for grant, compact in renewed:
        records.save_grant(grant, compact)
    for lost in (grant for device in plan.devices for grant in device.locked):
        records.remove_grant(lost)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside where a new one shall be, which takes its place at the end of the block.

    Raises:
        OutputExists: There is something already.
        FileUnreadable: The system said no.
    """
    unfinished = folder.absolute().with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(mode=0o755)
        yield unfinished
        if os.path.lexists(folder):
            raise OutputExists(f"{folder} exists")
        os.rename(unfinished, folder)
    except OSError as cause:
        raise FileUnreadable(f"{cause.filename or folder}: {cause.strerror}") from cause
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _list(keyring: Keyring, record: DeviceRecord, created: int, lines: tuple[tuple[str, int], ...]) -> Revocations:
    return Revocations(
        owner_id=keyring.owner.owner_id,
        device_name=record.device,
        ak_name=record.ak.name,
        counter_index=record.counter.index,
        counter_name=record.counter.name,
        value=record.counter_value,
        created=created,
        lines=lines,
    )


def enrolled_again(record: DeviceRecord, known: DeviceRecord | None, *, forget: bool) -> DeviceRecord:
    """The record of a device that was enrolled before: what the owner revoked since is not forgotten.

    Args:
        record: Of the new enrolment.
        known: Of the earlier one, if there was one.
        forget: The owner said to begin anew with this device (`--replace`).
    """
    if known is None:
        return record
    if known.counter.name == record.counter.name and known.ak.name == record.ak.name:
        # A revocation that waits to be applied: the certified value is behind the owner's.
        value = max(record.counter_value, known.counter_value)
        record = replace(record, counter_value=value, highest_maximum=known.highest_maximum)
    return record if forget else replace(record, revoked=known.revoked)
