"""`sczctl sweep`: remove what containers left behind whose end nobody told."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.options import DRY_RUN, JSON
from oci_hook.config import load_config
from oci_hook.records import ContainerRecords

if TYPE_CHECKING:
    from oci_hook.delivery.host_mounts import Removed

_LOCK_SECONDS = 60.0


@click.command()
@DRY_RUN
@JSON
@click.pass_obj
def sweep(config_file: str, dry_run: bool, as_json: bool) -> int:
    """Remove models mounted on the host's side, and records, of containers that are gone.

    Every start does the same. The timer scz-smm-sweep.timer does it at boot and every few minutes, for the container
    after which none starts. The exit code is 1 if something could not be removed.
    """
    from oci_hook.host import close_ended, sweep_host_mounts

    config = load_config(config_file)
    directory = config.runtime_directory
    mounts = _stale_mounts(directory) if dry_run else sweep_host_mounts(config)
    ended = ContainerRecords(directory).sweep(dry_run=True) if dry_run else close_ended(config)
    records = [record.container_id for record in ended]
    if as_json:
        print_json({"dry_run": dry_run, "mounts": [dataclasses.asdict(each) for each in mounts], "records": records})
    else:
        _show(mounts, records, "would remove" if dry_run else "removed")
    return 1 if any(each.left for each in mounts) else 0


def _stale_mounts(directory: str) -> list[Removed]:
    """What a sweep would look for; whether it is still mounted there is not looked at."""
    from oci_hook.delivery.host_mounts import Removed
    from oci_hook.delivery.host_records import HostRecords

    records = HostRecords(directory)
    if not records.exist():
        return []
    with records.locked(timeout_seconds=_LOCK_SECONDS):
        found, unreadable = records.all()
    stale = [
        Removed(record.container_id, record.bundle, tuple(mount.path for mount in record.mounts), ())
        for record in found
        if record.is_stale()
    ]
    return [*stale, Removed("", "", (), unreadable)] if unreadable else stale


def _show(mounts: list[Removed], records: list[str], verb: str) -> None:
    for each in mounts:
        container = f" of container {each.container_id}" if each.container_id else ""
        for path in each.paths:
            click.echo(printable(f"{verb} {path}{container}"))
        for reason in each.left:
            click.echo(printable(f"left: {reason}{container}"), err=True)
    for name in records:
        click.echo(printable(f"{verb} the record of container {name}"))
    if not mounts and not records:
        click.echo("nothing is left behind", err=True)


COMMANDS = {"sweep": sweep}
