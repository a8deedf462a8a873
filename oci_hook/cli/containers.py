"""`sczctl ps`: which running containers hold which models."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import psutil

from oci_hook.audit import format_time
from oci_hook.cli import print_json
from oci_hook.config import load_config
from oci_hook.records import ContainerRecord, ContainerRecords


def _row(record: ContainerRecord) -> dict[str, Any]:
    """The record, and what its process is doing; the process may end at any time."""
    row = dataclasses.asdict(record)
    try:
        process = psutil.Process(record.pid)
        return {**row, "command": process.name(), "user": process.username()}
    except psutil.Error:
        return {**row, "command": None, "user": None}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def ps(config_file: str, as_json: bool) -> None:
    """Show the running containers that hold a model, since when, for whom, and how much memory the models take."""
    rows = [_row(record) for record in ContainerRecords(load_config(config_file).runtime_directory).live()]
    if as_json:
        print_json(rows)
        return
    click.echo(f"{'CONTAINER':<14}{'MODELS':<28}{'SINCE':<22}{'MIB':>8}  {'PID':<8}{'COMMAND':<16}IDENTITY")
    for row in rows:
        models, since = ", ".join(row["models"]), format_time(row["seconds"])[:19] + "Z"
        click.echo(
            f"{row['container_id'][:12]:<14}{models:<28}{since:<22}{row['size_bytes'] / 2**20:>8.1f}  "
            f"{row['pid']:<8}{row['command'] or '?':<16}{row['subject']}"
        )


COMMANDS = {"ps": ps}
