"""`sczctl metrics`: what node_exporter's textfile collector reads."""

from __future__ import annotations

import grp
import os

import click

from oci_hook import __version__
from oci_hook.audit import AuditLog
from oci_hook.cli import print_json
from oci_hook.cli.options import JSON
from oci_hook.config import load_config
from oci_hook.errors import FileUnreadable
from oci_hook.locks import lock_file
from oci_hook.metrics import Resident, expose, load_counters, save_counters, state_path, update
from oci_hook.records import ContainerRecords
from oci_hook.store import Store
from oci_hook.trusted_file import replace_file

_LOCK_SECONDS = 30.0


def _group_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int:
    if value is None:
        return -1
    try:
        return grp.getgrnam(value).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {value!r}") from None


@click.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="Write this file, whole or not at all, and replace it."
)
@click.option("--group", metavar="NAME", callback=_group_of, help="The file's group, which may read it.")
@JSON
@click.pass_obj
def metrics(config_file: str, output: str | None, group: int, as_json: bool) -> None:
    """Print metrics for Prometheus, or write them for node_exporter's textfile collector.

    Starts, refusals, seconds and bytes are counted from the audit log; with --output, what was counted is kept beside
    the log, so that counters go on when old files of the log are removed. Without it nothing is changed.
    """
    config = load_config(config_file)
    log = AuditLog(config.audit_file)
    store_models = len(Store(config.store_directory).names())
    resident = _resident(config.runtime_directory)
    if output is None:
        counters = load_counters(config.audit_file)
        update(counters, log)
    else:
        if not os.path.isdir(os.path.dirname(config.audit_file)):
            raise FileUnreadable(
                f"{os.path.dirname(config.audit_file)} does not exist: nothing was ever started here",
                remedy=f"install -d -m 0700 {os.path.dirname(config.audit_file)}",
            )
        lock = state_path(config.audit_file) + ".lock"
        with lock_file(lock, timeout_seconds=_LOCK_SECONDS, error=FileUnreadable):
            counters = load_counters(config.audit_file)
            update(counters, log)
            save_counters(config.audit_file, counters)
            text = expose(counters, resident, store_models=store_models, version=__version__)
            replace_file(os.path.abspath(output), text.encode(), mode=0o640, group=group)
    if as_json:
        total = {"starts": counters.starts, "refusals": counters.refusals, "bytes": counters.size_bytes}
        print_json({**total, "resident": len(resident), "sequence": counters.sequence, "output": output})
    elif output is None:
        click.echo(expose(counters, resident, store_models=store_models, version=__version__), nl=False)


def _resident(runtime_directory: str) -> list[Resident]:
    from oci_hook.delivery.resident import memory_bytes

    found: dict[object, Resident] = {}  # a copy that containers share is in memory once
    records = [record for record in ContainerRecords(runtime_directory).live() if record.delivered]
    for record, seen in zip(records, memory_bytes(records), strict=True):
        taken = seen or ()
        for index, model in enumerate(record.models):
            if record.is_released(index):
                continue
            held = record.held[index] if index < len(record.held) else None
            copy = (held.fsid, held.device) if held is not None and held.fsid else (record, index)
            size_bytes = (taken[index] if index < len(taken) else None) or 0
            if copy not in found or found[copy].size_bytes < size_bytes:
                found[copy] = Resident(model, size_bytes)
    return list(found.values())


COMMANDS = {"metrics": metrics}
