"""`sczctl boot-policy`: which boot states of a device class may open a model line."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from oci_hook.cli import boot_diff, boot_predict, boot_sign, boot_state
from oci_hook.cli.completion import complete_files
from oci_hook.cli.options import (
    OUTPUT,
    name_of,
    verify_new_output,
    write_output,
)
from oci_hook.config import load_config
from oci_hook.store import Store

if TYPE_CHECKING:
    pass


@click.group("boot-policy")
def boot_policy() -> None:
    """Measure boot states, and sign those that may open a model."""


@boot_policy.command()
@click.option(
    "--device", metavar="NAME", required=True, callback=name_of, help="This device's name, as it was enrolled."
)
@OUTPUT
@click.option(
    "--event-log",
    "log_output",
    metavar="FILE",
    shell_complete=complete_files,
    help="Also write the log of what this boot measured there, for `boot-policy log`, `predict` and `diff`.",
)
@click.pass_obj
def measure(config_file: str, device: str, output: str, log_output: str | None) -> None:
    """HOST: let the TPM quote PCRs 0 to 15 for the owner.

    A copy of the boot's event log, where there is one, stays in the store: it tells later what was measured otherwise.
    """
    from oci_hook.attestation.measurement import (
        MEASURED_PCRS,
        Measurement,
        format_measurement,
        measurement_qualifying_data,
    )
    from oci_hook.attestation.tpm import open_tpm
    from oci_hook.trusted_file import make_private_directory

    verify_new_output(output)
    if log_output is not None:
        verify_new_output(log_output)
    config = load_config(config_file)
    host, now = Store(config.store_directory).load_device(), int(time.time())
    make_private_directory(config.runtime_directory)
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")
    with open_tpm(config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds) as tpm:
        evidence = tpm.quote(host, sorted(MEASURED_PCRS), measurement_qualifying_data(device, now))
    boot_state.keep_log(config, log_output)
    write_output(output, format_measurement(Measurement(device, now, evidence)))
    click.echo(f"measurement of {device} in {output}")


for _module in (boot_sign, boot_state, boot_predict, boot_diff):
    for _command in _module.COMMANDS.values():
        boot_policy.add_command(_command)
COMMANDS = {"boot-policy": boot_policy}
