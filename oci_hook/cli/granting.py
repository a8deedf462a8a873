"""`sczctl grant`: a model's content key for one device, or for many at once."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.broker_options import broker_document, broker_options
from oci_hook.cli.completion import complete_devices, complete_files, complete_packed
from oci_hook.cli.options import (
    JSON,
    KEYS,
    PASSPHRASE_FILE,
    model_of,
    name_of,
    names_of,
    passphrase_source,
    read_input,
    show_progress,
    verify_new_output,
    verify_one_of,
    write_output,
)
from oci_hook.errors import DeviceInvalid, KeyInvalid
from oci_hook.trust import NAME, NAME_LIMIT

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.bundle.grant import Grant
    from oci_hook.owner.broker_shares import EncryptedShare, OwnersBroker
    from oci_hook.owner.keyring import Keyring
    from oci_hook.owner.records import ContentKeyRecord, OwnerRecords

_ENROLL = "`sczctl enroll` it; check --keys"


@dataclass(frozen=True)
class _Wanted:
    """Which devices a command means, by exactly one way."""

    devices: Sequence[str]
    device_class: str | None
    everyone: bool
    file: str | None
    missing: bool

    def __post_init__(self) -> None:
        ways = (bool(self.devices), self.device_class is not None, self.everyone, self.file is not None)
        if sum(ways) != 1:
            raise click.UsageError("say for whom, in one way: --device, --class, --all-devices or --devices-from")
        if len(set(self.devices)) != len(self.devices):
            raise click.UsageError("a --device is named twice")

    @property
    def is_one(self) -> bool:
        """Whether the output is a grant's file; otherwise it is a folder."""
        return len(self.devices) == 1 and not self.missing

    def load(self, records: OwnerRecords) -> list[DeviceRecord]:
        """Their records (DeviceInvalid: one is not enrolled, or damaged)."""
        from oci_hook.owner.grant_batch import load_devices

        enrolled = records.devices()
        names = self.devices if self.file is None else _names_in(self.file)
        known = set(enrolled)
        for name in names:
            if name not in known:
                verify_one_of("enrolled device", name, enrolled, DeviceInvalid, remedy=_ENROLL)
        found = load_devices(records, names or enrolled)
        if self.device_class is not None:
            found = [each for each in found if each.device_class == self.device_class]
        if not found:
            which = f"of class {self.device_class}" if self.device_class is not None else "at all"
            raise DeviceInvalid(f"there is no enrolled device {which}", remedy="`sczctl enroll` one; check --keys")
        return found


def _names_in(path: str) -> list[str]:
    """The device names of a file: one a line; empty lines, and what follows `#`, say nothing."""
    from oci_hook.attestation.ek_list import ENTRY_LIMIT
    from oci_hook.documents import shown

    lines = read_input(path, DeviceInvalid).decode("utf-8", "replace").split("\n")
    names = [name for line in lines if (name := line.partition("#")[0].strip(" \t\r"))]
    remedy = "give a file with a device's name a line"
    for name in names:
        if len(name) > NAME_LIMIT or not re.fullmatch(NAME, name):
            raise DeviceInvalid(f"{path}: {shown(name)} is not a device's name", remedy=remedy)
    if not 0 < len(names) <= ENTRY_LIMIT or len(set(names)) != len(names):
        problem = "names nobody" if not names else "names a device twice, or more than 10000"
        raise DeviceInvalid(f"{path} {problem}", remedy=remedy)
    return names


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
@broker_options
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
    output: str,
    passphrase_file: str | None,
    as_json: bool,
    broker: OwnersBroker | None,
) -> None:
    """Wrap a model's content key for the TPM of one device, or of each of many.

    For one --device the output is the grant; otherwise it is a folder with DEVICE.jwt for each. The folder appears
    whole or not at all: if one of the devices cannot be granted, none is. After a kill, run it again without
    --missing.

    With --broker, a start needs a second share of the key, which OpenBao or Vault gives against the container's token.
    It is encrypted there now, with your token of the environment's BAO_TOKEN or VAULT_TOKEN, or of --broker-token-file.
    """
    from oci_hook.owner.broker_shares import verify_share_wanted
    from oci_hook.owner.grant_batch import make_grants, save_grants, without_grant
    from oci_hook.owner.granting import make_grant
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords

    wanted, (name, version) = _Wanted(devices, device_class, everyone, file, missing), model
    records = OwnerRecords(Path(keys))
    packed = [":".join(found) for found in records.content_keys()]
    verify_one_of("packed version", f"{name}:{version}", packed, KeyInvalid, remedy="`sczctl pack` it; check --keys")
    chosen, content = wanted.load(records), records.load_content_key(name, version)
    verify_share_wanted(content, given=broker is not None)
    verify_new_output(output)
    if missing:
        chosen = without_grant(chosen, records.grants_of(name, version), content, maximum)
        if not chosen:
            _show([], output, as_json)
            return
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    asked = partial(make_grant, keyring, content, maximum=maximum, created=int(time.time()), random=secrets.token_bytes)
    shares = iter(_shares(broker, keyring, content, len(chosen)))

    def make(device: DeviceRecord) -> tuple[Grant, bytes]:
        return asked(device, share=next(shares))

    if wanted.is_one:
        made, compact = make(chosen[0])
        write_output(output, compact)
        records.save_grant(made, compact)
        _show(made, output, as_json)
        return
    with show_progress("granting", len(chosen)) as progress:
        grants = make_grants(chosen, make, progress)
    with show_progress("writing", 2 * len(chosen)) as progress:
        save_grants(records, grants, Path(output), progress)
    _show([each for each, _ in grants], output, as_json)


def _shares(
    broker: OwnersBroker | None, keyring: Keyring, content: ContentKeyRecord, count: int
) -> Sequence[EncryptedShare | None]:
    """A share of the broker's for each grant."""
    return (
        [None] * count if broker is None else broker.encrypt_shares(keyring.owner, content, count, secrets.token_bytes)
    )


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
        f"while its counter is at most {row['counter_maximum']})"
    )


def _row(grant: Grant) -> dict[str, Any]:
    granted = {"model": f"{grant.model.name}:{grant.model.version}", "device": grant.device_name}
    said = {"class": grant.device_class, "manifest": grant.manifest_digest, "counter_maximum": grant.counter.maximum}
    return {**granted, **said, **broker_document(grant)}


COMMANDS = {"grant": grant}
