"""`sczctl lease`, and the options of `grant` that bound it: a renewal needs one file from the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import JSON, OUTPUT, GroupInOrder, name_of, read_input, verify_new_output, write_output
from oci_hook.config import load_config
from oci_hook.errors import DeviceInvalid
from oci_hook.store import Store

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.attestation.lease_request import LeaseRequest
    from oci_hook.lease import Lease

_BOOTS = click.option(
    "--lease-boots",
    type=click.IntRange(0, 1_000_000),
    metavar="NUMBER",
    help="Opens until the device was booted so many times more; 0: in its present boot alone.",
)
_HOURS = click.option(
    "--lease-hours",
    type=click.IntRange(1, 1_000_000),
    metavar="NUMBER",
    help="Opens until the device's TPM had power for so many hours more; give --lease-boots as well.",
)
_FROM = click.option(
    "--lease-from",
    type=click.Path(dir_okay=False),
    help="Count the lease from this file of `sczctl lease request`; default: from the device's enrolment.",
)


def lease_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that grants."""
    return _BOOTS(_HOURS(_FROM(command)))


@dataclass(frozen=True)
class WantedLease:
    """What those options mean for a device; `now` in seconds since 1970."""

    boots: int | None
    hours: int | None
    request: LeaseRequest | None
    now: int

    @classmethod
    def of_options(cls, boots: int | None, hours: int | None, request_file: str | None) -> WantedLease:
        """The options' sum (DeviceInvalid: the request cannot be read)."""
        from oci_hook.attestation.lease_request import parse_lease_request

        if request_file is not None and boots is None and hours is None:
            raise click.UsageError("--lease-from goes with --lease-boots, --lease-hours or both")
        read = None if request_file is None else parse_lease_request(read_input(request_file, DeviceInvalid))
        return cls(boots, hours, read, int(time.time()))

    def counted(self, record: DeviceRecord) -> DeviceRecord:
        """The device's record, with what the request says that its TPM counts (EvidenceRefused: it is none of this)."""
        from oci_hook.attestation.lease_request import verify_lease_request

        return record if self.request is None else verify_lease_request(self.request, record, now=self.now)

    def lease(self, record: DeviceRecord) -> Lease | None:
        """The lease from what is `counted` (DeviceInvalid: nothing is known of what the TPM counts)."""
        from oci_hook.attestation.lease_request import lease_from

        return lease_from(record, boots=self.boots, hours=self.hours)


def warn_of_hours_alone(boots: int | None, hours: int | None) -> None:
    """Say once what such a lease does not bound."""
    if hours is not None and boots is None:
        click.echo("a lease of hours alone is stretched by cutting the power: give --lease-boots as well", err=True)


def lease_in_words(lease: Lease | None) -> str:
    """For a person: empty without a lease."""
    bounds = []
    if lease is not None and lease.resets is not None:
        bounds.append(f"boot {lease.resets}")
    if lease is not None and lease.clock_ms is not None:
        bounds.append(f"{lease.clock_ms / 3_600_000:.1f} h of powered-on time")
    return f", leased up to {' and '.join(bounds)} of its TPM" if bounds else ""


@click.group(cls=GroupInOrder)
def lease() -> None:
    """Ask for a new lease of a model.

    A grant with a lease opens for so many boots, or hours of powered-on time, as its owner gave it; the device's TPM
    counts. A new one is a new grant: `sczctl grant --lease-from`.
    """


@lease.command()
@click.option(
    "--device", metavar="NAME", required=True, callback=name_of, help="This device's name, as it was enrolled."
)
@OUTPUT
@JSON
@click.pass_obj
def request(config_file: str, device: str, output: str, as_json: bool) -> None:
    """HOST: let the TPM tell the owner what it has counted.

    One file for all models of the owner. It is good for a day, and until the owner has seen a later one.
    """
    from oci_hook.attestation.attest import parse_attest
    from oci_hook.attestation.lease_request import LeaseRequest, format_lease_request, lease_qualifying_data
    from oci_hook.attestation.measurement import MEASURED_PCRS
    from oci_hook.attestation.tpm import open_tpm
    from oci_hook.trusted_file import make_private_directory

    verify_new_output(output)
    config = load_config(config_file)
    host, now = Store(config.store_directory).load_device(), int(time.time())
    make_private_directory(config.runtime_directory)
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")
    with open_tpm(config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds) as tpm:
        evidence = tpm.quote(host, sorted(MEASURED_PCRS), lease_qualifying_data(device, now))
    write_output(output, format_lease_request(LeaseRequest(device, now, evidence)))
    counted = parse_attest(evidence.attest, error=DeviceInvalid)
    if as_json:
        said = {"resets": counted.reset_count, "clock_ms": counted.clock, "clock_safe": counted.safe}
        print_json({"device": device, "created": now, **said})
        return
    click.echo(
        f"lease request of {device} in {output}: boot {counted.reset_count}, "
        f"{counted.clock / 3_600_000:.1f} h of powered-on time"
    )
    click.echo(f"next, the owner: sczctl grant NAME:VERSION --device {device} --lease-from {output} --lease-boots …")


COMMANDS = {"lease": lease}
