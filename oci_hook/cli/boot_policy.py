"""`sczctl boot-policy`: which boot states of a device class may open a model line."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json
from oci_hook.cli.completion import complete_devices, complete_model_lines
from oci_hook.cli.options import (
    JSON,
    KEYS,
    OUTPUT,
    PASSPHRASE_FILE,
    name_of,
    names_of,
    passphrase_source,
    read_input,
    verify_new_output,
    verify_one_of,
    write_output,
)
from oci_hook.config import load_config
from oci_hook.errors import BootPolicyInvalid, DeviceInvalid
from oci_hook.store import Store

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.owner.records import OwnerRecords


@click.group("boot-policy")
def boot_policy() -> None:
    """Measure boot states, and sign those that may open a model."""


@boot_policy.command()
@click.option(
    "--device", metavar="NAME", required=True, callback=name_of, help="This device's name, as it was enrolled."
)
@OUTPUT
@click.pass_obj
def measure(config_file: str, device: str, output: str) -> None:
    """HOST: let the TPM quote PCRs 0 to 15 for the owner."""
    from oci_hook.attestation.measurement import (
        MEASURED_PCRS,
        Measurement,
        format_measurement,
        measurement_qualifying_data,
    )
    from oci_hook.attestation.tpm import open_tpm
    from oci_hook.trusted_file import make_private_directory

    verify_new_output(output)
    config = load_config(config_file)
    host, now = Store(config.store_directory).load_device(), int(time.time())
    make_private_directory(config.runtime_directory)
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")
    with open_tpm(config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds) as tpm:
        evidence = tpm.quote(host, sorted(MEASURED_PCRS), measurement_qualifying_data(device, now))
    write_output(output, format_measurement(Measurement(device, now, evidence)))
    click.echo(f"measurement of {device} in {output}")


def _selected(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    numbers = {str(number): number for number in range(16)}
    parts = text.replace(" ", "").split(",")
    if not all(part in numbers for part in parts):
        raise click.BadParameter("give PCRs from 0 to 15, as in 4,7,8,9")
    return sorted({numbers[part] for part in parts})


def _device(records: OwnerRecords, name: str) -> DeviceRecord:
    from oci_hook.attestation.device_record import parse_device_record

    verify_one_of("enrolled device", name, records.devices(), DeviceInvalid, remedy="`sczctl enroll` it; check --keys")
    return parse_device_record(records.load_device(name))


def _states(
    records: OwnerRecords, devices: tuple[str, ...], measured: tuple[str, ...]
) -> tuple[list[Mapping[int, bytes]], set[str]]:
    """The PCR values to approve, and the classes of the devices that have them."""
    from oci_hook.attestation.measurement import parse_measurement, verify_measurement

    found = [_device(records, name) for name in devices]
    states = [record.pcrs for record in found]
    for path in measured:
        measurement = parse_measurement(read_input(path, DeviceInvalid))
        found.append(_device(records, measurement.device))
        states.append(verify_measurement(measurement, ak=found[-1].ak).pcrs)
    return states, {record.device_class for record in found}


def _verify_forms(forms: list[dict[int, bytes]]) -> None:
    from oci_hook.attestation.boot_policy import verify_coverage

    for form in forms:
        try:
            verify_coverage(form, BootPolicyInvalid)
        except BootPolicyInvalid as cause:
            raise BootPolicyInvalid(
                cause.message,
                remedy="give --pcr 4,8,9 or 11,12 and more; measure a machine that booted what it will run",
            ) from cause


@boot_policy.command()
@KEYS
@click.option(
    "--model",
    metavar="NAME",
    required=True,
    callback=name_of,
    shell_complete=complete_model_lines,
    help="The model line (its name); all its versions.",
)
@click.option(
    "--class",
    "device_class",
    metavar="NAME",
    callback=name_of,
    help="The device class; default: that of the devices that are named.",
)
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    callback=names_of,
    shell_complete=complete_devices,
    help="Approve the state that this device was enrolled in; repeat it for more.",
)
@click.option(
    "--measured",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Approve the state of a measurement (`sczctl boot-policy measure`) by an enrolled device; repeat it for more.",
)
@click.option(
    "--pcr",
    "pcrs",
    required=True,
    callback=_selected,
    metavar="LIST",
    help="PCRs that count, for example 4,7,8,9 (GRUB) or 7,11,12 (UKI).",
)
@OUTPUT
@PASSPHRASE_FILE
@JSON
def sign(
    keys: str,
    model: str,
    device_class: str | None,
    devices: tuple[str, ...],
    measured: tuple[str, ...],
    pcrs: list[int],
    output: str,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """OWNER: sign the boot states that may open a model.

    The policy must cover kernel, initrd and command line.
    All states that --device and --measured name stand beside each other: a host may be in any one of them.
    """
    from oci_hook.attestation.boot_policy import sign_boot_policy
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords

    if not devices and not measured:
        raise click.UsageError("say which states: --device or --measured")
    verify_new_output(output)
    records = OwnerRecords(Path(keys))
    states, classes = _states(records, devices, measured)
    if device_class is None and len(classes) > 1:
        raise click.UsageError(f"the devices are of several classes ({', '.join(sorted(classes))}): give --class")
    signed_class = device_class or classes.pop()
    forms = list({tuple(state[pcr] for pcr in pcrs): {pcr: state[pcr] for pcr in pcrs} for state in states}.values())
    _verify_forms(forms)  # before a person is asked for the passphrase
    epoch = records.load_line(model).epoch(signed_class)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    document = sign_boot_policy(
        forms,
        owner_id=keyring.owner.owner_id,
        model_name=model,
        device_class=signed_class,
        created=int(time.time()),
        key=keyring.boot_policy_key,
        epoch=epoch,
    )
    write_output(output, document)
    if as_json:
        print_json({"model": model, "class": signed_class, "pcrs": pcrs, "states": len(forms), "epoch": epoch})
        return
    listed = ",".join(str(pcr) for pcr in pcrs)
    click.echo(f"boot policy for {model}, device class {signed_class}: {len(forms)} approved state(s), PCRs {listed}")


COMMANDS = {"boot-policy": boot_policy}
