"""`sczctl doctor`: what this host has, which way each engine takes, what is missing and the command that mends it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.engine_checks import check_cdi_models, check_engines, check_runtimes
from oci_hook.cli.engines import absolute
from oci_hook.cli.host_checks import (
    Check,
    check_audit,
    check_configuration,
    check_kernel,
    check_memory,
    check_models,
    check_tpm,
    check_trust,
    load_enrolment,
)
from oci_hook.cli.options import JSON
from oci_hook.engines.plan import HostFiles


@click.command()
@click.option(
    "--root",
    type=click.Path(file_okay=False),
    default="/",
    callback=absolute,
    help="Look for runtimes and engines below this directory, that of an image being built: one whose programs you "
    "would run, as each is asked for its version.",
)
@JSON
@click.pass_obj
def doctor(config_file: str, root: str, as_json: bool) -> int:
    """Look whether this host can start containers with models, and say what mends it.

    Nothing is changed. The exit code is 0 if nothing is missing, else 1; a warning alone does not count.
    """
    checks: list[Check] = []
    for check in _all_checks(config_file, HostFiles(root)):
        checks.append(check)
        if not as_json:
            _show(check)
    missing = [check for check in checks if check.status == "missing"]
    if as_json:
        print_json({"ok": not missing, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        click.echo(f"{len(missing)} missing" if missing else "nothing is missing")
    return 1 if missing else 0


def _all_checks(config_file: str, files: HostFiles) -> Iterator[Check]:
    if os.geteuid() != 0:
        yield Check("user", "missing", "not root: much of this cannot be seen", "sudo sczctl doctor")
    config, checks = check_configuration(config_file)
    yield from checks
    yield from check_kernel()
    yield from check_memory(config)
    device, checks = load_enrolment(config)
    yield from checks
    pcrs, checks = check_tpm(config, device)
    yield from checks
    owners, checks = check_trust(config)
    yield from checks
    yield from check_models(config, owners, device, pcrs)
    yield from check_audit(config)
    yield from check_runtimes(files)
    yield from check_engines(config_file, files)
    yield from check_cdi_models(config.store_directory, files)


def _show(check: Check) -> None:
    line = printable(f"{check.status:<8} {check.name}: {check.message}")
    click.echo(f"{line}\n         mend: {printable(check.remedy)}" if check.remedy else line)


COMMANDS = {"doctor": doctor}
