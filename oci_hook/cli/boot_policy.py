"""`sczctl boot-policy`: which boot states of a device class may open a model line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from oci_hook.cli.options import CLASS, KEYS, OUTPUT, PASSPHRASE_FILE, passphrase_source, read_input, write_output
from oci_hook.config import load_config
from oci_hook.errors import BootPolicyInvalid, DeviceInvalid
from oci_hook.store import Store


@click.group("boot-policy")
def boot_policy() -> None:
    """Measure a host's boot state, and sign the states that may open a model."""


@boot_policy.command()
@click.option("--device", required=True, help="This device's name, as it was enrolled.")
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

    config = load_config(config_file)
    host, now = Store(config.store_directory).load_device(), int(time.time())
    make_private_directory(config.runtime_directory)
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")
    with open_tpm(config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds) as tpm:
        evidence = tpm.quote(host, sorted(MEASURED_PCRS), measurement_qualifying_data(device, now))
    write_output(output, format_measurement(Measurement(device, now, evidence)))
    click.echo(f"measurement of {device} in {output}")


def _selected(text: str) -> list[int]:
    try:
        pcrs = sorted({int(part) for part in text.split(",")})
    except ValueError as cause:
        raise BootPolicyInvalid("--pcr is a list of numbers: 4,7,8,9") from cause
    if not pcrs or pcrs[0] < 0 or pcrs[-1] > 15:
        raise BootPolicyInvalid("--pcr: PCRs 0 to 15 can be signed")
    return pcrs


@boot_policy.command()
@KEYS
@click.option("--model", required=True, help="The model line (its name); all its versions.")
@CLASS
@click.option("--device", "devices", multiple=True, help="Approve the state that this device was enrolled in.")
@click.option(
    "--measured",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Approve the state of a measurement (`sczctl boot-policy measure`) by an enrolled device.",
)
@click.option("--pcr", "pcr_list", required=True, help="PCRs that count, for example 4,7,8,9 (GRUB) or 7,11,12 (UKI).")
@OUTPUT
@PASSPHRASE_FILE
def sign(
    keys: str,
    model: str,
    device_class: str,
    devices: tuple[str, ...],
    measured: tuple[str, ...],
    pcr_list: str,
    output: str,
    passphrase_file: str | None,
) -> None:
    """OWNER: sign the approved states; the policy must cover kernel, initrd and command line."""
    from oci_hook.attestation.boot_policy import sign_boot_policy
    from oci_hook.attestation.device_record import parse_device_record
    from oci_hook.attestation.measurement import parse_measurement, verify_measurement
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords

    if not devices and not measured:
        raise click.UsageError("say which states: --device or --measured")
    records, pcrs = OwnerRecords(Path(keys)), _selected(pcr_list)
    states = [parse_device_record(records.load_device(device)).pcrs for device in devices]
    for path in measured:
        measurement = parse_measurement(read_input(path, DeviceInvalid))
        record = parse_device_record(records.load_device(measurement.device))
        states.append(verify_measurement(measurement, ak=record.ak).pcrs)
    forms = list({tuple(state[pcr] for pcr in pcrs): {pcr: state[pcr] for pcr in pcrs} for state in states}.values())
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    document = sign_boot_policy(
        forms,
        owner_id=keyring.owner.owner_id,
        model_name=model,
        device_class=device_class,
        created=int(time.time()),
        key=keyring.boot_policy_key,
    )
    write_output(output, document)
    click.echo(f"boot policy for {model}, device class {device_class}: {len(forms)} approved state(s), PCRs {pcr_list}")


COMMANDS = {"boot-policy": boot_policy}
