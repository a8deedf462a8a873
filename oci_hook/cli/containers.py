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

_HEADINGS = (
    *("CONTAINER", "MODEL", "OWNER", "MANIFEST", "SINCE", "MIB", "SHARED", "CHARGED"),
    *("RUNTIME", "PID", "PATH", "IDENTITY"),
)


def _sharing(record: ContainerRecord, index: int, records: Sequence[ContainerRecord]) -> dict[str, Any]:
    """Which other containers have the same copy, and to whose control group it was charged."""
    if index >= len(record.held):
        return {"shared_with": [], "charged_to": None, "charged_to_lives": None}
    held = record.held[index]
    charged = held.filled_by or record.container_id
    return {
        "shared_with": [other.container_id for other in records if other is not record and other.has_copy(held)],
        "charged_to": charged,
        "charged_to_lives": any(each.container_id == charged for each in records),
    }


def _row(record: ContainerRecord, taken: Sequence[int | None], records: Sequence[ContainerRecord]) -> dict[str, Any]:
    """The record, what its models take now, and what its process is doing; the process may end at any time."""
    row = dataclasses.asdict(record)
    models = [
        {
            "model": model,
            "manifest": record.manifests[index],
            "path": record.destinations[index],
            "owner": record.held[index].owner if index < len(record.held) else None,
            "memory_bytes": taken[index] if index < len(taken) else None,
            **_sharing(record, index, records),
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
    container's process (under gVisor its sandbox). SHARED: how many containers have this copy, which is in memory once.
    CHARGED: the container whose start decrypted it; its control group pays, and once it has `ended` the group above.
    """
    from oci_hook.delivery.resident import memory_bytes

    records = ContainerRecords(load_config(config_file).runtime_directory).live()
    rows = [_row(record, taken or (), records) for record, taken in zip(records, memory_bytes(records), strict=True)]
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
        str(1 + len(model["shared_with"])),
        _charged(model),
        row["runtime"],
        str(row["pid"]),
        model["path"],
        f"{row['subject']} ({row['issuer']})",
    )
    return tuple(printable(cell) for cell in cells)


def _charged(model: dict[str, Any]) -> str:
    if model["charged_to"] is None:
        return "?"
    return str(model["charged_to"])[:12] if model["charged_to_lives"] else "ended"


COMMANDS = {"ps": ps}
