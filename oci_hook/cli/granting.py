"""`sczctl grant`: a model's content key for one device, or for many at once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.broker_options import broker_document, broker_options
from oci_hook.cli.completion import complete_devices, complete_files, complete_packed
from oci_hook.cli.lease import WantedLease, lease_in_words, lease_options, warn_of_hours_alone
from oci_hook.cli.options import (
    JSON,
    KEYS,
    PASSPHRASE_FILE,
    model_of,
    name_of,
    names_of,
    passphrase_source,
    show_progress,
    verify_new_output,
    verify_one_of,
    write_output,
)
from oci_hook.cli.wanted_devices import WantedDevices
from oci_hook.errors import KeyInvalid

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.bundle.grant import Grant
    from oci_hook.owner.broker_shares import OwnersBroker
    from oci_hook.owner.grant_batch import MakeGrant
    from oci_hook.owner.records import OwnerRecords


@click.command()
@click.argument("model", metavar="NAME:VERSION", callback=model_of, shell_complete=complete_packed)
@KEYS
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    callback=names_of,
    shell_complete=complete_devices,
    help="The device, as it was enrolled.",
)
@click.option("--class", "device_class", metavar="NAME", callback=name_of, help="All devices of this class.")
@click.option("--all-devices", "everyone", is_flag=True, help="Every enrolled device.")
@click.option(
    "--devices-from", "file", type=click.Path(dir_okay=False), help="The devices that this file names, one a line."
)
@click.option("--missing", is_flag=True, help="Leave out devices that have a grant which opens this version already.")
@click.option(
    "--maximum",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="NUMBER",
    default=None,
    help="Opens while the device's counter is at most this; default: its value at enrolment.",
)
@lease_options
@broker_options(renewing=False)
@click.option(
    "-o",
    "--output",
    metavar="FILE|FOLDER",
    required=True,
    shell_complete=complete_files,
    help="File to write, or folder for several; nothing is overwritten.",
)
@PASSPHRASE_FILE
@JSON
def grant(
    model: tuple[str, str],
    keys: str,
    devices: tuple[str, ...],
    device_class: str | None,
    everyone: bool,
    file: str | None,
    missing: bool,
    maximum: int | None,
    lease_boots: int | None,
    lease_hours: int | None,
    lease_from: str | None,
    output: str,
    passphrase_file: str | None,
    as_json: bool,
    broker: OwnersBroker | None,
) -> None:
    """Wrap a model's content key for the TPM of one device, or of each of many.

    For one --device the output is the grant; otherwise it is a folder with DEVICE.jwt for each. The folder appears
    whole or not at all: if one of the devices cannot be granted, none is. A revoked device is left out, unless it is
    named. After a kill, run it again without --missing.

    With a lease it opens for so many boots, or hours of powered-on time, and no longer: a bound for what is stolen, or
    for a revocation that is withheld. Without --lease-boots a lease can be stretched by cutting the power.

    With --broker, a start needs a second share of the key, which OpenBao or Vault gives against the container's token.
    It is encrypted there now, with your token of the environment's BAO_TOKEN or VAULT_TOKEN, or of --broker-token-file.
    """
    wanted = WantedDevices(devices, device_class, everyone, file, missing)
    lease = WantedLease.of_options(lease_boots, lease_hours, lease_from)
    _grant(keys, model, wanted, lease, maximum, output, passphrase_file, broker, as_json)


def _grant(
    keys: str,
    model: tuple[str, str],
    wanted: WantedDevices,
    lease: WantedLease,
    maximum: int | None,
    output: str,
    passphrase_file: str | None,
    broker: OwnersBroker | None,
    as_json: bool,
) -> None:
    from oci_hook.owner.broker_shares import shares_for, verify_share_wanted
    from oci_hook.owner.grant_batch import load_devices, without_grant
    from oci_hook.owner.granting import make_grant
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.owner.revoking import verify_allowed

    records, (name, version) = OwnerRecords(Path(keys)), model
    packed = [":".join(found) for found in records.content_keys()]
    verify_one_of("packed version", f"{name}:{version}", packed, KeyInvalid, remedy="`sczctl pack` it; check --keys")
    chosen, content = wanted.load(records), records.load_content_key(name, version)
    verify_allowed(records, content.model)
    verify_share_wanted(content, given=broker is not None)
    verify_new_output(output)
    if lease.request is not None and len(chosen) != 1:
        raise click.UsageError("--lease-from is of one device: give --device, once")
    chosen = [lease.counted(each) for each in chosen]
    if wanted.missing:
        kept, line = records.grants_of(name, version), records.load_line(name)
        chosen = without_grant(chosen, kept, content, maximum, line)
        if not chosen:
            _show([], output, as_json)
            return
    for each in chosen:
        lease.lease(each)  # whatever is missing for it is said now
    warn_of_hours_alone(lease.boots, lease.hours)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    asked = partial(make_grant, keyring, content, maximum=maximum, created=int(time.time()), random=secrets.token_bytes)
    count = len(chosen)
    shares = iter(shares_for([broker] * count, keyring.owner, [content] * count, secrets.token_bytes))
    with records.locked():
        # A person was waited for, and a broker: what was read before may have been changed by others.
        chosen = [lease.counted(each) for each in load_devices(records, [each.device for each in chosen])]
        if records.load_content_key(name, version) != content:
            raise KeyInvalid(f"{name}:{version} was packed again meanwhile", remedy="run it again")
        verify_allowed(records, content.model)
        line = records.load_line(name)

        def make(device: DeviceRecord) -> tuple[Grant, bytes]:
            epoch = line.epoch(device.device_class)
            return asked(device, share=next(shares), epoch=epoch, lease=lease.lease(device))

        write = _write_one if wanted.is_one else _write_many
        write(records, chosen, make, output, as_json)


def _write_one(
    records: OwnerRecords, chosen: Sequence[DeviceRecord], make: MakeGrant, output: str, as_json: bool
) -> None:
    from oci_hook.owner.revoking import remember_grant

    made, compact = make(chosen[0])
    remember_grant(records, chosen[0], made, compact)  # first: what nobody remembers cannot be revoked
    write_output(output, compact)
    _show(made, output, as_json)


def _write_many(
    records: OwnerRecords, chosen: Sequence[DeviceRecord], make: MakeGrant, output: str, as_json: bool
) -> None:
    from oci_hook.owner.grant_batch import make_grants, save_grants
    from oci_hook.owner.revoking import remember_device

    with show_progress("granting", len(chosen)) as progress:
        grants = make_grants(chosen, make, progress)
    for device, (made, _) in zip(chosen, grants, strict=True):
        remember_device(records, device, made)
    with show_progress("writing", 2 * len(chosen)) as progress:
        save_grants(records, grants, Path(output), progress)
    _show([each for each, _ in grants], output, as_json)


def _show(granted: Grant | Sequence[Grant], output: str, as_json: bool) -> None:
    """One grant, or a list of any number."""
    if isinstance(granted, Sequence):
        if as_json:
            print_json([_row(each) for each in granted])
        elif granted:
            model = granted[0].model
            click.echo(f"granted {model.name}:{model.version} to {len(granted)} device(s), in {output}")
        else:
            click.echo("each of them has a grant already: nothing was written", err=True)
        return
    row = _row(granted)
    if as_json:
        print_json(row)
        return
    click.echo(
        f"granted {row['model']} to {row['device']} (class {row['class']}, "
        f"while its counter is at most {row['counter_maximum']}{lease_in_words(granted.lease)})"
    )


def _row(grant: Grant) -> dict[str, Any]:
    granted = {"model": f"{grant.model.name}:{grant.model.version}", "device": grant.device_name}
    said: dict[str, Any] = {
        "class": grant.device_class,
        "manifest": grant.manifest_digest,
        "counter_maximum": grant.counter.maximum,
    }
    said["lease"] = grant.lease.document() if grant.lease else None
    return {**granted, **said, **broker_document(grant)}


COMMANDS = {"grant": grant}
