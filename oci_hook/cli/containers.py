"""`sczctl ps`: which running containers hold which models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import click
import psutil

from oci_hook.audit import format_time
from oci_hook.cli import print_json, printable
from oci_hook.cli.options import JSON
from oci_hook.config import load_config
from oci_hook.records import ContainerRecord, ContainerRecords

_HEADINGS = ("CONTAINER", "MODEL", "OWNER", "MANIFEST", "SINCE", "MIB", "RUNTIME", "PID", "PATH", "IDENTITY")


def _row(record: ContainerRecord, taken: Sequence[int | None]) -> dict[str, Any]:
    """The record, what its models take now, and what its process is doing; the process may end at any time."""
    row = dataclasses.asdict(record)
    models = [
        {
            "model": model,
            "manifest": record.manifests[index],
            "path": record.destinations[index],
            "owner": record.held[index].owner if index < len(record.held) else None,
            "memory_bytes": taken[index] if index < len(taken) else None,
        }
        for index, model in enumerate(record.models)
        if not record.is_released(index)
    ]
    row["holds"] = models
    row["memory_bytes"] = sum(model["memory_bytes"] or 0 for model in models)
    try:
        process = psutil.Process(record.pid)
        return {**row, "command": process.name(), "user": process.username()}
    except psutil.Error:
        return {**row, "command": None, "user": None}


@click.command()
@JSON
@click.pass_obj
def ps(config_file: str, as_json: bool) -> None:
    """Show the running containers that hold a model: which, whose, since when, where, for whom.

    MIB is what the model's file system takes now; `-`: it is not mounted there any more, or cannot be seen. PID is the
    container's process (under gVisor its sandbox).
    """
    from oci_hook.delivery.resident import memory_bytes

    records = ContainerRecords(load_config(config_file).runtime_directory).live()
    rows = [_row(record, taken or ()) for record, taken in zip(records, memory_bytes(records), strict=True)]
    rows = [row for row in rows if row["holds"]]
    if as_json:
        print_json(rows)
        return
    table = [_HEADINGS, *(_cells(row, model) for row in rows for model in row["holds"])]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS) - 1)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        click.echo("  ".join([*cells, line[-1]]))


def _cells(row: dict[str, Any], model: dict[str, Any]) -> tuple[str, ...]:
    taken = model["memory_bytes"]
    cells = (
        row["container_id"][:12],
        model["model"],
        (model["owner"] or "?")[:8],
        model["manifest"].removeprefix("sha256:")[:8],
        format_time(row["seconds"])[:19] + "Z",
        "-" if taken is None else f"{taken / 2**20:.1f}",
        row["runtime"],
        str(row["pid"]),
        model["path"],
        f"{row['subject']} ({row['issuer']})",
    )
    return tuple(printable(cell) for cell in cells)


COMMANDS = {"ps": ps}
