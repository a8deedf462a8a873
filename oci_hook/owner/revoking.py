"""Revoking: what `revocation_plan` planned, carried out: the owner's records, then one folder for each device.

The records are raised first: whatever ends it half-way, nothing that was to be revoked can be granted again, and the
next revocation counts from the raised values. A folder holds the signed list and fresh grants for all that stays
allowed; `sczctl add` on the device applies it. What reads a record and writes it holds the folder's lock.
Specification: docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from oci_hook.attestation.device_record import DeviceRecord, format_device_record
from oci_hook.bundle.broker_share import BrokerShare
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.revocations import Revocations, sign_revocations
from oci_hook.errors import DeviceInvalid, FileUnreadable, GrantInvalid, OutputExists
from oci_hook.key_errors import BrokerRefused, BrokerUnavailable, GenerationRefused
from oci_hook.owner.broker_shares import EncryptedShare, RenewingBroker, shares_for
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.granting import make_grant
from oci_hook.owner.keyring import Keyring
from oci_hook.owner.lines import Line
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from oci_hook.owner.revocation_plan import Plan, Wanted, plan_revocation
from oci_hook.trusted_file import replace_file

LIST_FILE = "revocations.jwt"


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


ShareKey = tuple[str, ModelId, str, BrokerShare | None]


def _needed_shares(records: OwnerRecords, plan: Plan) -> dict[ShareKey, ContentKeyRecord]:
    """The renewed grants that need a broker's share."""
    found = {}
    for name, old in ((device.record.device, grant) for device in plan.devices for grant in device.renewed):
        content = records.load_content_key(old.model.name, old.model.version)
        if content.broker:
            found[name, old.model, old.manifest_digest, old.broker] = content
    return found


def revoke(
    keyring: Keyring,
    records: OwnerRecords,
    wanted: Wanted,
    plan: Plan,
    folder: Path,
    *,
    created: int,
    random: Callable[[int], bytes],
    broker: RenewingBroker | None = None,
    progress: Callable[[int], object] = lambda _done: None,
) -> Plan:
    """Raise the records, then write a folder for each device: the list, and grants for all that stays allowed.

    Args:
        keyring: The owner's, opened.
        records: The owner's.
        wanted: What is to be revoked.
        plan: From `plan_revocation`; it is made again under the lock, as it was made before a person was waited for.
        folder: New; it gets a folder for each device, named after it. It is there whole or not at all.
        created: Seconds since 1970.
        random: As `os.urandom`.
        broker: Encrypts the shares of grants that need one; asked before anything is changed.
        progress: Called with the number of grants made so far.

    Returns:
        The plan that was carried out.

    Raises:
        FileUnreadable: The system said no.
        DeviceInvalid: Somebody else changed meanwhile what needs a broker's share. Nothing was changed.
        GrantInvalid: A grant that is made anew needs a broker's share, and no broker is given. Nothing was changed.
        BrokerRefused, BrokerUnavailable: The broker encrypts no shares. Nothing was changed.
    """
    needed = _needed_shares(records, plan)
    with _lockable_without_broker():
        brokers = [broker.like(share) if broker is not None else None for _, _, _, share in needed]
        shares = dict(zip(needed, shares_for(brokers, keyring.owner, list(needed.values()), random), strict=True))
    with records.locked():
        latest = plan_revocation(records, wanted, now=created)
        if set(_needed_shares(records, latest)) != set(needed):
            raise DeviceInvalid("the owner's records were changed meanwhile", remedy="run it again")
        make = partial(make_grant, keyring, maximum=None, created=created, random=random)
        _carry_out(keyring, records, latest, folder, make=make, shares=shares, created=created, progress=progress)
    return latest


@contextmanager
def _lockable_without_broker() -> Iterator[None]:
    """No broker keeps an owner from revoking: the refusals inside say how."""
    try:
        yield
    except (GrantInvalid, BrokerRefused, BrokerUnavailable) as cause:
        remedy = f"{cause.advice}; or lock now, and grant those versions later: `sczctl revoke --without-renewal`"
        raise type(cause)(cause.message, remedy=remedy) from cause


def _carry_out(
    keyring: Keyring,
    records: OwnerRecords,
    plan: Plan,
    folder: Path,
    *,
    make: Callable[..., tuple[Grant, bytes]],
    shares: Mapping[ShareKey, EncryptedShare | None],
    created: int,
    progress: Callable[[int], object],
) -> None:
    lines = {line.model: line for line in records.lines()} | plan.lines
    restricted = tuple(sorted((n, line.lowest_generation) for n, line in lines.items() if line.lowest_generation > 1))
    # All is signed before anything is raised: what cannot be signed has changed nothing.
    made: list[tuple[Grant, bytes]] = []
    documents: dict[str, dict[str, bytes]] = {}
    for device in plan.devices:
        files = documents[device.record.device] = {}
        signed = sign_revocations(_list(keyring, device.record, created, restricted), key=keyring.manifest_key)
        for old in device.renewed:
            content = records.load_content_key(old.model.name, old.model.version)
            share = shares.get((device.record.device, old.model, old.manifest_digest, old.broker))
            epoch = lines.get(old.model.name, Line(old.model.name)).epoch(device.record.device_class)
            made.append(make(content, device.record, share=share, epoch=epoch, lease=old.lease))
            files[f"{old.model.name}@{old.model.version}.jwt"] = made[-1][1]
            progress(len(made))
        files[LIST_FILE] = signed
    for line in plan.lines.values():
        records.save_line(line)
    for record in (*(device.record for device in plan.devices), *plan.marked):
        records.save_device(record.device, format_device_record(record))
    former = FormerRecords(records.folder)
    for record in plan.former:
        former.save_device(record)
    with new_folder(folder) as unfinished:
        for name, files in documents.items():
            (unfinished / name).mkdir(mode=0o755)
            for file, data in files.items():
                replace_file(str(unfinished / name / file), data, mode=0o644)
    for grant, compact in made:
        records.save_grant(grant, compact)
    for lost in (grant for device in plan.devices for grant in (*device.locked, *device.doubled)):
        records.remove_grant(lost)
        former.remove_grant(lost)


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
    """The record of a TPM that was enrolled before: what the owner revoked since is not forgotten.

    Args:
        record: Of the new enrolment.
        known: Of an earlier one of the same TPM, under this name or another, if there was one.
        forget: The owner said that this TPM may have models again.
    """
    if known is None:
        return record
    # The same counter of the same TPM: its Name alone is the same on many, and either key may be another by now.
    same_key = known.ak.name == record.ak.name or known.srk.name == record.srk.name
    if known.counter.name == record.counter.name and same_key:
        # A revocation that waits to be applied: the certified value is behind the owner's.
        counted = record.counter_value if record.certified is None else record.certified
        value = max(record.counter_value, known.counter_value)
        highest = max(
            (each for each in (record.highest_maximum, known.highest_maximum) if each is not None), default=None
        )
        certified = counted if value > counted else None
        record = replace(record, counter_value=value, highest_maximum=highest, certified=certified)
    if forget:
        return record
    return replace(record, revoked=record.revoked if known.revoked is None else known.revoked)
