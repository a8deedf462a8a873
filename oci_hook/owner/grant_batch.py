"""Grants for many devices at once: all of them, or none.

In one process: a grant takes one or two milliseconds, so that workers would save a second of a thousand devices' two,
and each would hold the owner's keys. What takes longer is the disk, which many threads keep busy side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.attestation.policy import policy_ref
from oci_hook.bundle.files import NewFolder, create_file
from oci_hook.bundle.grant import Grant
from oci_hook.documents import shown
from oci_hook.errors import DeviceInvalid, FileUnreadable
from oci_hook.lease import Lease
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.lines import Line
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords

DEVICE_LIMIT = 10_000
GRANT_SUFFIX = ".jwt"
_WRITERS = 16  # the file system commits what waits together in one go

MakeGrant = Callable[[DeviceRecord], tuple[Grant, bytes]]  # `granting.make_grant`, with all but the device given


def load_devices(records: OwnerRecords, names: Sequence[str]) -> list[DeviceRecord]:
    """The records of some devices, in that order.

    Raises:
        DeviceInvalid: One is missing or damaged, by its name; or more than 10 000 are asked for.
        FileUnreadable: The system said no.
    """
    if len(names) > DEVICE_LIMIT:
        raise DeviceInvalid(f"these are more than {DEVICE_LIMIT} devices", remedy="grant by class, or by shorter lists")
    return [load_device(records, name) for name in names]


def load_device(records: OwnerRecords, name: str) -> DeviceRecord:
    """One device's record, which is that device's.

    Raises:
        DeviceInvalid: Missing, damaged or another device's, by its name.
        FileUnreadable: The system said no.
    """
    data = records.load_device(name)
    remedy = (
        f"put devices/{name}.json back from a backup; without one, move it away, enrol {name} again, and revoke again "
        "what was revoked of it: until then its grants are out of reach"
    )
    try:
        record = parse_device_record(data)
    except DeviceInvalid as cause:
        raise DeviceInvalid(f"device {name}: {cause.message}", remedy=remedy) from cause
    if record.device != name:
        raise DeviceInvalid(f"the record of {name} is that of {record.device}", remedy=remedy)
    return record


def has_grant(
    kept: Grant | None, device: DeviceRecord, content: ContentKeyRecord, maximum: int | None, line: Line
) -> bool:
    """Whether a grant that was kept still opens this version on this device, as it is enrolled now.

    Args:
        kept: Verified as the owner's; None: there is none.
        device: The device's record.
        content: The version's.
        maximum: The counter's value up to which it has to open; None: the value at the enrolment.
        line: The model line's, with the epoch that its boot policies are in.
    """
    if kept is None:
        return False
    enrolled = (device.device, device.device_class, device.ak.name, device.srk.name, device.counter.name)
    granted = (kept.device_name, kept.device_class, kept.ak_name, kept.srk_name, kept.counter.name)
    limit = device.counter_value if maximum is None else maximum
    if kept.policy_ref != policy_ref(content.model.name, device.device_class, line.epoch(device.device_class)):
        return False
    if kept.lease is not None and not _is_running(kept.lease, device):
        return False
    same_version = (kept.model, kept.manifest_digest) == (content.model, content.manifest_digest)
    return same_version and granted == enrolled and kept.counter.maximum >= limit


def _is_running(lease: Lease, device: DeviceRecord) -> bool:
    """Whether a lease has not ended, by what is known of what the device's TPM counts."""
    bounds = ((lease.resets, device.resets), (lease.clock_ms, device.clock_ms))
    return all(bound is None or counted is None or counted <= bound for bound, counted in bounds)


def without_grant(
    devices: Sequence[DeviceRecord],
    kept: Mapping[str, Grant],
    content: ContentKeyRecord,
    maximum: int | None,
    line: Line,
) -> list[DeviceRecord]:
    """Those devices that have no grant (`has_grant`) among the kept ones, which are by device."""
    return [each for each in devices if not has_grant(kept.get(each.device), each, content, maximum, line)]


def make_grants(
    devices: Sequence[DeviceRecord], make: MakeGrant, progress: Callable[[int], object]
) -> list[tuple[Grant, bytes]]:
    """Make a grant for each device; nothing is written.

    Args:
        devices: Each once.
        make: Makes one.
        progress: Called with the number of devices done so far.

    Raises:
        SczError: As `make` raises it, with the device's name.
    """
    made = []
    for number, device in enumerate(devices, 1):
        made.append(make(device))
        progress(number)
    return made


def save_grants(
    records: OwnerRecords, made: Sequence[tuple[Grant, bytes]], output: Path, progress: Callable[[int], object]
) -> None:
    """Write the grants into a new folder, `<device>.jwt` each, and keep copies of them in the owner's folder.

    The folder appears last, whole or not at all. A kill before leaves at most copies: those say that a device may have
    been granted what never left. Half a file is nowhere.

    Args:
        records: The owner's.
        made: Grants of one version, one a device.
        output: Its parent exists, it does not.
        progress: Called with the number of files written so far, of twice as many as there are grants.

    Raises:
        OutputExists: The folder is there.
        FileUnreadable: The system said no; there is no folder.
    """
    try:
        with NewFolder(output) as new, ThreadPoolExecutor(_WRITERS) as writers:
            write = partial(_write, new.partial)
            for number, _ in enumerate(writers.map(write, made), 1):
                progress(number)
            records.save_grants(made, writers, lambda done: progress(len(made) + done))
            new.publish(mode=0o755)
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or output)}: {cause.strerror}") from cause


def _write(folder: Path, made: tuple[Grant, bytes]) -> None:
    grant, compact = made
    create_file(folder / f"{grant.device_name}{GRANT_SUFFIX}", compact, mode=0o644)


def load_grants(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Who can open what: one row a grant, as `sczctl list --grants` prints it; last those that were set aside.

    Raises:
        GrantInvalid, GrantRefused: A file there is not a grant of this owner's.
        KeyInvalid: Not an owner's folder.
    """
    folder = Path(folder)
    kept = [(grant, False) for grant in OwnerRecords(folder).grants()]
    return [
        {
            "model": f"{grant.model.name}:{grant.model.version}",
            "device": grant.device_name,
            "class": grant.device_class,
            "manifest": grant.manifest_digest,
            "created": grant.created,
            "counter_maximum": grant.counter.maximum,
            "lease": grant.lease.document() if grant.lease else None,
            "set_aside": is_set_aside,
        }
        for grant, is_set_aside in (*kept, *((grant, True) for grant in FormerRecords(folder).grants()))
    ]
