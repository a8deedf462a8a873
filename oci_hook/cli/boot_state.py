"""`sczctl boot-policy log`: what a boot measured, and whether that explains what a TPM quoted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_files
from oci_hook.cli.options import JSON, read_input, write_output
from oci_hook.config import Config, load_config
from oci_hook.errors import DeviceInvalid, SczError

if TYPE_CHECKING:
    from oci_hook.attestation.event_log import EventLog
    from oci_hook.attestation.explanation import Explained

_BY_LINUX = frozenset({10})  # IMA: no firmware's log has it
KEYS_OR_HOST = click.option(
    "--keys",
    type=click.Path(file_okay=False),
    help="The owner's folder, whose device records verify measurements; default: this host's own enrolment.",
)


def load_log(config_file: str, path: str | None) -> EventLog:
    """The log of a file, or this host's own."""
    from oci_hook.attestation.event_log import parse_event_log
    from oci_hook.attestation.log_files import load_event_log

    return parse_event_log(load_event_log(path or load_config(config_file).tpm_event_log))


def verified_state(config_file: str, keys: str | None, path: str) -> tuple[str, dict[int, bytes]]:
    """Device and PCR values of a measurement, verified by the device's record or by this host's enrolment."""
    from oci_hook.attestation.device_record import parse_device_record
    from oci_hook.attestation.measurement import parse_measurement, verify_measurement
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.store import Store

    measurement = parse_measurement(read_input(path, DeviceInvalid))
    if keys:
        ak = parse_device_record(OwnerRecords(Path(keys)).load_device(measurement.device)).ak
    else:
        ak = Store(load_config(config_file).store_directory).load_device().ak
    return measurement.device, dict(verify_measurement(measurement, ak=ak).pcrs)


def keep_log(config: Config, output: str | None) -> None:
    """Keep a copy of this boot's log in the store, if there is a log, and write it to a file if one is named.

    Raises:
        EventLogInvalid, FileUnreadable, OutputExists: A file is named, and there is no log, or it cannot be written.
    """
    from oci_hook.attestation.event_log import parse_event_log
    from oci_hook.attestation.log_files import keep_event_log, load_event_log

    with contextlib.nullcontext() if output else contextlib.suppress(SczError):
        data = load_event_log(config.tpm_event_log)
        parse_event_log(data)
        with contextlib.suppress(SczError):  # a guest's store may be read-only
            keep_event_log(config.store_directory, data)
        if output:
            write_output(output, data)


@click.command()
@click.argument("log_file", metavar="[LOG]", required=False, shell_complete=complete_files)
@click.option(
    "--measurement",
    type=click.Path(dir_okay=False),
    help="Say of each PCR whether the log explains what this measurement's quote has.",
)
@KEYS_OR_HOST
@JSON
@click.pass_obj
def log(config_file: str, log_file: str | None, measurement: str | None, keys: str | None, as_json: bool) -> int:
    """HOST or OWNER: show what a boot measured, event by event.

    LOG is a file that `boot-policy measure --event-log` wrote; without it: this host's own. Each event's data is shown
    with what its digest was computed anew from; what is marked "claimed" only stands beside the digest.

    With --measurement the exit code is 1 if the log does not explain a PCR that it measures into (but for PCR 10,
    which Linux goes on with).
    """
    from oci_hook.attestation.event_log import replay
    from oci_hook.attestation.explanation import explain_values
    from oci_hook.attestation.reference_values import reference_values

    found = load_log(config_file, log_file)
    values = replay(found)
    told: tuple[Explained, ...] = ()
    if measurement:
        told = explain_values(found, verified_state(config_file, keys, measurement)[1])
    unexplained = [each.pcr for each in told if not each.is_explained and each.pcr in values.keys() - _BY_LINUX]
    reference = dataclasses.asdict(reference_values(found))
    if as_json:
        document = {"events": _events(found), "pcrs": {str(pcr): value.hex() for pcr, value in values.items()}}
        explained = {str(e.pcr): {"explained": e.is_explained, "phases": e.phases, "words": e.words} for e in told}
        print_json({**document, "reference_values": reference, "measurement": explained if measurement else None})
        return 1 if unexplained else 0
    for event in sorted(_events(found), key=lambda each: (each["pcr"], each["event"])):
        mark = "" if event["proven_by"] else " (claimed)"
        click.echo(printable(f"PCR {event['pcr']:<2} {event['event']:>4}  {event['words']}{mark}"))
        click.echo(f"             sha256:{event['digest']}")
    reference["unified_image"] = (reference["unified_image"],) if reference["unified_image"] else None
    for name, value in reference.items():
        click.echo(printable(f"{name.replace('_', ' ')}: {_shown(value)}"))
    for each in told:
        click.echo(f"PCR {each.pcr}: {each.words if each.pcr in values else _unlogged(each)}")
    return 1 if unexplained else 0


def _events(found: EventLog) -> list[dict[str, Any]]:
    from oci_hook.attestation.event_words import EVENT_TYPES, Proof, describe, prove, type_name

    listed = []
    for event in found.events:
        if event.is_measured:
            proof = prove(event)
            listed.append(
                {
                    "event": event.number,
                    "pcr": event.pcr,
                    "type": type_name(event.kind),
                    "digest": event.digest.hex(),
                    "words": describe(event),
                    "proven_by": None if proof is Proof.NONE else proof.value,
                    "digest_is_of": EVENT_TYPES[event.kind][2] if event.kind in EVENT_TYPES else "unknown",
                }
            )
    return listed


def _unlogged(told: Explained) -> str:
    return "nothing was measured" if told.is_explained else "measured after the firmware's log ended"


def _shown(value: object) -> str:
    if value is None:
        return "not told by the log"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {digest}" for name, digest in value.items()) or "none"
    if isinstance(value, tuple):
        return "; ".join(" ".join(each) if isinstance(each, tuple) else str(each) for each in value) or "none"
    return str(value)


COMMANDS = {"log": log}
