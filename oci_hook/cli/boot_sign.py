"""`sczctl boot-policy sign`: the owner signs the boot states that may open a model line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from oci_hook.errors import BootPolicyInvalid, DeviceInvalid, KeyInvalid
from oci_hook.key_errors import EventLogInvalid

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.attestation.pcr_signature import SignedPcrs
    from oci_hook.owner.records import OwnerRecords


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
    records: OwnerRecords, devices: tuple[str, ...], measured: tuple[str, ...], predicted: tuple[str, ...]
) -> tuple[list[Mapping[int, bytes]], set[str]]:
    """The PCR values to approve, and the classes of the devices that have them."""
    from oci_hook.attestation.measurement import parse_measurement, verify_measurement
    from oci_hook.attestation.prediction import parse_prediction

    found = [_device(records, name) for name in devices]
    states = [record.pcrs for record in found]
    for path in measured:
        measurement = parse_measurement(read_input(path, DeviceInvalid))
        found.append(_device(records, measurement.device))
        states.append(verify_measurement(measurement, ak=found[-1].ak).pcrs)
    for path in predicted:
        prediction = parse_prediction(read_input(path, EventLogInvalid))
        found.append(_device(records, prediction.device))
        states.append(prediction.pcrs)
    return states, {record.device_class for record in found}


def _verify_forms(forms: list[dict[int, bytes]], signed: SignedPcrs | None = None) -> None:
    from oci_hook.attestation.boot_policy import verify_coverage

    for form in forms:
        try:
            verify_coverage(form, BootPolicyInvalid, signed=signed)
        except BootPolicyInvalid as cause:
            raise BootPolicyInvalid(
                cause.message,
                remedy="give --pcr 4,8,9 or 11,12 and more; measure a machine that booted what it will run",
            ) from cause


def _forms(states: list[Mapping[int, bytes]], pcrs: set[int]) -> list[dict[int, bytes]]:
    """The values of these PCRs in each state, each combination once."""
    if untold := {pcr for pcr in pcrs for state in states if pcr not in state}:
        raise BootPolicyInvalid(f"a prediction does not tell PCR {min(untold)}", remedy="boot it, and give --measured")
    return [dict(form) for form in dict.fromkeys(tuple((pcr, state[pcr]) for pcr in sorted(pcrs)) for state in states)]


def _signer(pcr_key: str | None) -> SignedPcrs | None:
    from oci_hook.attestation.pcr_signature import SignedPcrs, load_signer_pem

    return None if pcr_key is None else SignedPcrs(load_signer_pem(read_input(pcr_key, KeyInvalid)))


def _report(signed: dict[str, Any], signer: SignedPcrs | None, *, as_json: bool) -> None:
    """Say what was signed; of a signer's key what systemd calls it, for a person to compare."""
    from oci_hook.attestation.pcr_signature import fingerprint

    by_key = {} if signer is None else {"signed_pcrs": list(signer.pcrs), "pkfp": fingerprint(signer.key).hex()}
    if as_json:
        print_json({**signed, **by_key})
        return
    listed = ",".join(str(pcr) for pcr in signed["pcrs"])
    states = f"{signed['states']} approved state(s), PCRs {listed}"
    click.echo(f"boot policy for {signed['model']}, device class {signed['class']}: {states}")
    if by_key:
        click.echo(f"PCR 11 as signed by the key that systemd calls {by_key['pkfp']} (pkfp)")


@click.command()
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
    "--predicted",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Approve a state that you predicted yourself (`sczctl boot-policy predict -o`): nobody signed it; repeat it.",
)
@click.option(
    "--pcr",
    "pcrs",
    required=True,
    callback=_selected,
    metavar="LIST",
    help="PCRs that count, for example 4,7,8,9 (GRUB) or 7,11,12 (UKI).",
)
@click.option(
    "--pcr-key",
    type=click.Path(dir_okay=False),
    help="Approve any PCR 11 that this public key signed (PEM; as in `ukify --pcr-public-key`), not a value of it.",
)
@click.option("--also-measured", is_flag=True, help="With --pcr-key: approve the measured values of PCR 11, too.")
@OUTPUT
@PASSPHRASE_FILE
@JSON
def sign(
    keys: str,
    model: str,
    device_class: str | None,
    devices: tuple[str, ...],
    measured: tuple[str, ...],
    predicted: tuple[str, ...],
    pcrs: list[int],
    pcr_key: str | None,
    also_measured: bool,
    output: str,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """OWNER: sign the boot states that may open a model.

    The policy must cover kernel, initrd and command line.
    All states that --device, --measured and --predicted name stand beside each other: a host may be in any one of them.
    With --pcr-key updates of a unified kernel image need no new policy: whoever has that key's private half decides
    which kernels may open the model, old ones included; the other PCRs stay as measured.
    """
    from oci_hook.attestation.boot_policy import sign_boot_policy
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.policies import save_boot_policy
    from oci_hook.owner.records import OwnerRecords

    if not devices and not measured and not predicted:
        raise click.UsageError("say which states: --device, --measured or --predicted")
    if also_measured and pcr_key is None:
        raise click.UsageError("--also-measured needs --pcr-key")
    verify_new_output(output)
    records = OwnerRecords(Path(keys))
    states, classes = _states(records, devices, measured, predicted)
    if device_class is None and len(classes) > 1:
        raise click.UsageError(f"the devices are of several classes ({', '.join(sorted(classes))}): give --class")
    signed_class = device_class or classes.pop()
    signer = _signer(pcr_key)
    by_key = set(signer.pcrs if signer is not None else ())
    forms = _forms(states, set(pcrs) | by_key) if signer is None or also_measured else []
    nested = _forms(states, set(pcrs) - by_key) if signer is not None else []
    _verify_forms(forms)  # before a person is asked for the passphrase
    _verify_forms(nested, signer)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    epoch = records.load_line(model).epoch(signed_class)  # after the passphrase: it may have been raised meanwhile
    document = sign_boot_policy(
        forms,
        owner_id=keyring.owner.owner_id,
        model_name=model,
        device_class=signed_class,
        created=int(time.time()),
        key=keyring.boot_policy_key,
        epoch=epoch,
        nested=[(form, signer) for form in nested if signer is not None],
    )
    write_output(output, document)
    save_boot_policy(Path(keys), model, signed_class, document)
    said = {"model": model, "class": signed_class, "pcrs": pcrs, "states": len(forms) + len(nested), "epoch": epoch}
    _report(said, signer, as_json=as_json)


COMMANDS = {"sign": sign}
