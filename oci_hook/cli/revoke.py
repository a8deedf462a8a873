"""`sczctl revoke`: take back versions, devices and boot states; and say who still holds what was taken back."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oci_hook.bundle.model import GENERATION_HIGH
from oci_hook.cli import print_json
from oci_hook.cli.broker_options import broker_options
from oci_hook.cli.completion import complete_devices, complete_files, complete_packed
from oci_hook.cli.holders import holders, show_holders
from oci_hook.cli.options import (
    DRY_RUN,
    JSON,
    PASSPHRASE_FILE,
    model_of,
    name_of,
    names_of,
    passphrase_source,
    show_progress,
    verify_new_output,
)
from oci_hook.cli.revoke_output import plan_document, say_what_is_left, show_plan
from oci_hook.documents import shown

if TYPE_CHECKING:
    from oci_hook.owner.broker_shares import RenewingBroker


def _models(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(model_of(context, parameter, text) for text in texts)


def _generations(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    found = []
    for text in texts:
        name, _, number = text.partition(":")
        if not re.fullmatch("[1-9][0-9]{0,18}", number) or int(number) > GENERATION_HIGH:
            raise click.BadParameter(f"{shown(text)} is not NAME:NUMBER, such as minilm:4")
        name_of(context, parameter, name)
        found.append((name, int(number)))
    return tuple(found)


def _classes(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for text in texts:
        name, colon, device_class = text.partition(":")
        if not colon:
            raise click.BadParameter(f"{shown(text)} is not NAME:CLASS, such as minilm:default")
        names_of(context, parameter, (name, device_class))
        found.append((name, device_class))
    return tuple(found)


@click.command()
@click.option("--keys", type=click.Path(file_okay=False), help="The owner's folder (`sczctl keygen`).")
@click.option(
    "--model",
    "versions",
    multiple=True,
    metavar="NAME:VERSION",
    callback=_models,
    shell_complete=complete_packed,
    help="This version, on every device.",
)
@click.option(
    "--below-generation",
    "below",
    multiple=True,
    metavar="NAME:NUMBER",
    callback=_generations,
    help="Every version of the model line NAME whose generation is lower, on every device.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    callback=names_of,
    shell_complete=complete_devices,
    help="Everything that was granted to this device.",
)
@click.option(
    "--boot-policy",
    "boot_policies",
    multiple=True,
    metavar="NAME:CLASS",
    callback=_classes,
    help="Every boot state that was signed so far for the model line NAME and a device class.",
)
@click.option(
    "--without-renewal",
    is_flag=True,
    help="Lock now, without a broker: make no fresh grants that would need a share of it.",
)
@click.option("--applied", is_flag=True, help="HOST: show who holds what was revoked here, and change nothing.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    shell_complete=complete_files,
    help="Folder to make, with a folder for each device that is concerned.",
)
@broker_options(renewing=True)
@PASSPHRASE_FILE
@DRY_RUN
@JSON
@click.pass_obj
def revoke(
    config_file: str,
    keys: str | None,
    versions: tuple[tuple[str, str], ...],
    below: tuple[tuple[str, int], ...],
    devices: tuple[str, ...],
    boot_policies: tuple[tuple[str, str], ...],
    without_renewal: bool,
    applied: bool,
    output: str | None,
    passphrase_file: str | None,
    dry_run: bool,
    as_json: bool,
    broker: RenewingBroker | None,
) -> None:
    """OWNER: take back versions, devices or boot states.

    For each device that is concerned it writes a folder: a signed list of what is revoked, and fresh grants for all
    that stays allowed. `sczctl add` of that folder on the device applies it, offline, and counts the owner's counter in
    the TPM up, so that no earlier grant opens again. Until then the device has what it had: what bounds that is a lease
    (`sczctl grant --lease-boots`). A container that runs keeps its copy: `add`, and here --applied, name it.

    With --broker fresh grants of versions that were packed so get new shares, by the keys and roles that they had.
    While the broker is away, --without-renewal locks all the same; what is not granted anew is named.

    A device that would have to count further than its TPM was last certified to have counted gets no list: enrol it
    again. Nor is a grant reached whose TPM has no record. Both are named, the exit code is 1, and all else is revoked.

    After --boot-policy sign the states that stay good: `sczctl boot-policy sign`.
    """
    from oci_hook.owner.revocation_plan import Wanted

    wanted = Wanted(versions, below, devices, boot_policies, without_renewal)
    if applied:
        if keys or output or without_renewal or wanted != Wanted():
            raise click.UsageError("--applied stands alone")
        show_holders(holders(config_file), as_json)
        return
    if keys is None or (output is None and not dry_run):
        raise click.UsageError("give --keys, and -o FOLDER or --dry-run; or --applied on a host")
    if wanted == Wanted():
        raise click.UsageError("say what: --model, --below-generation, --device or --boot-policy")
    if without_renewal and broker is not None:
        raise click.UsageError("--without-renewal asks no broker: leave --broker away")
    _revoke(keys, wanted, None if dry_run else output, passphrase_file, broker, as_json)


def _revoke(
    keys: str,
    wanted: Any,
    output: str | None,
    passphrase_file: str | None,
    broker: RenewingBroker | None,
    as_json: bool,
) -> None:
    from oci_hook.owner import revoking
    from oci_hook.owner.keyring import load_owner, open_keyring
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.owner.revocation_plan import plan_revocation

    load_owner(Path(keys))
    records, now = OwnerRecords(Path(keys)), int(time.time())
    if output is not None:
        verify_new_output(output)
    plan = plan_revocation(records, wanted, now=now)
    if output is not None:
        keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
        with show_progress("granting anew", plan.grants) as progress:
            plan = revoking.revoke(
                keyring,
                records,
                wanted,
                plan,
                Path(output),
                created=now,
                random=secrets.token_bytes,
                broker=broker,
                progress=progress,
            )
    if as_json:
        print_json({"dry_run": output is None, "output": output, **plan_document(plan)})
    else:
        show_plan(plan, output)
    if say_what_is_left(plan, output):
        raise click.exceptions.Exit(1)


COMMANDS = {"revoke": revoke}
