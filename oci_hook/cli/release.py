"""`sczctl release`: take a model away from a running container that needs its files no more."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from oci_hook.audit import AuditLog
from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_containers
from oci_hook.cli.options import DRY_RUN, JSON, container_of
from oci_hook.config import load_config
from oci_hook.delivery.reclaim import Reclaimed, reclaim
from oci_hook.documents import shown
from oci_hook.errors import EngineUnsupported
from oci_hook.journal import tell
from oci_hook.records import ContainerRecord, ContainerRecords

_BUSY, _LATER, _UNKNOWN = 3, 4, 5
_SHOWN = 32
_WORDS = {
    "released": "released; its memory is free",
    "detached": "taken from the container's sight; its memory comes back when its last user is gone",
    "busy": "still used; nothing was changed (--lazy takes it away all the same)",
    "covered": "another mount lies over it or in it; nothing was changed (unmount that first, in the container)",
    "absent": "not mounted there any more: the container has unmounted it itself; its memory is free",
    "unknown": "the container has unmounted it itself; nobody is seen who keeps its memory, nor that it is free",
    "shared": "taken from this container; its memory stays, as other containers have the same copy: {names}",
    "would-release": "would be released",
    "would-unshare": "would be taken from this container; its memory would stay, as others have the copy: {names}",
    "would-detach": "would be taken from the container's sight; its memory would come back with its last user",
}
_UNMOUNTED = "the container has unmounted it itself; its memory comes back when its last user is gone"
_GVISOR = "nothing was changed: gVisor keeps open what its container has opened once; its memory comes back at its end"


@click.command()
@click.argument("container", callback=container_of, shell_complete=complete_containers)
@click.argument("model", required=False)
@click.option(
    "--lazy", "--force", is_flag=True, help="Also if it is used: its memory then comes back with its last user."
)
@DRY_RUN
@JSON
@click.pass_obj
def release(config_file: str, container: str, model: str | None, lazy: bool, dry_run: bool, as_json: bool) -> int:
    """Unmount a model in a running container and give its memory back; the container goes on.

    For an application that has loaded the model, to a GPU say. CONTAINER is an id or its beginning, MODEL a name,
    name:version or path; without it, all of the container's models. What is mounted there is unmounted only if it is
    our mount. A model that is used (an open file, a mapping, a working directory, a copy of the mount) stays, and its
    users are listed. The container gets the model anew when it is started again. gVisor keeps open what its container
    has opened once: there only a model that nobody has read can be released, and none in a pod's container. The memory
    of a copy that other containers have, too, stays until the last of them has it no more.

    Exit codes: 0 the memory is free, 1 no such container or model, 3 a model stays mounted, 4 a model is gone from
    sight (with --lazy, shared, or unmounted by the container itself), and its memory comes back later, 5 the container
    has unmounted a model itself, and whether its memory is free cannot be told.
    """
    config = load_config(config_file)
    records = ContainerRecords(config.runtime_directory)
    found = [record for record in records.live() if record.delivered and record.container_id.startswith(container)]
    exact = [record for record in found if record.container_id == container]
    found = exact or found
    if not found:
        click.echo(f"no running container {printable(container)} holds a model; `sczctl ps` lists them", err=True)
        return 1
    if len(found) > 1:
        names = ", ".join(f"{record.container_id} ({record.bundle})" for record in found[:8])
        raise click.UsageError(printable(f"{container} may be any of {names}"))
    record = found[0]
    chosen = _choose(record, model)
    if not chosen:
        what = f"no model {printable(model)}" if model else "no model any more"
        click.echo(f"container {printable(record.container_id)} holds {what}", err=True)
        return 1
    others = [other for other in records.live() if other != record]
    results = []
    for index in chosen:
        result = reclaim(record, record.held[index], others=others, lazy=lazy, dry_run=dry_run)
        results.append((index, result))
        if _is_done(result, lazy=lazy) and not dry_run:
            _audit(AuditLog(config.audit_file), record, index, result)  # first: what is marked is never looked at again
            records.mark_released(record, record.held[index])
        if not as_json:
            _show(record, index, result)
    if as_json:
        print_json(
            {"container": record.container_id, "dry_run": dry_run, "models": [_row(record, *r) for r in results]}
        )
    states = {result.state for _, result in results}
    if states & {"busy", "covered"}:
        return _BUSY
    if "unknown" in states:
        return _UNKNOWN
    return _LATER if states & {"detached", "shared", "would-detach", "would-unshare"} else 0


def _is_done(result: Reclaimed, *, lazy: bool) -> bool:
    """Whether it was taken away, or is gone; what the container unmounted and keeps stays in `ps` without --lazy."""
    if result.state == "detached":
        return lazy or bool(result.path)
    return result.state in ("released", "absent", "shared")


def _choose(record: ContainerRecord, model: str | None) -> list[int]:
    """The places in the record of what is meant."""
    if len(record.held) != len(record.models):
        raise EngineUnsupported(
            "the container was started by an earlier version, which did not write down where its mounts are",
            remedy="start the container again",
        )
    return [
        index
        for index, name in enumerate(record.models)
        if not record.is_released(index)
        and (model is None or model in (name, name.partition(":")[0], record.destinations[index]))
    ]


def _audit(log: AuditLog, record: ContainerRecord, index: int, result: Reclaimed) -> None:
    name, _, version = record.models[index].partition(":")
    log.append(
        "released",
        container=record.container_id,
        model=name,
        version=version,
        manifest=record.manifests[index],
        bytes=record.held[index].size_bytes,
        state=result.state,
    )
    tell(
        "released",
        f"container {shown(record.container_id, 64)}: {record.models[index]} {result.state}",
        identifier="sczctl",
        container=record.container_id,
        model=record.models[index],
        state=result.state,
    )


def _row(record: ContainerRecord, index: int, result: Reclaimed) -> dict[str, Any]:
    return {
        "model": record.models[index],
        "manifest": record.manifests[index],
        "destination": record.destinations[index],
        **dataclasses.asdict(result),
    }


def _show(record: ContainerRecord, index: int, result: Reclaimed) -> None:
    where = record.destinations[index]
    moved = f" (now at {result.path})" if result.path and not result.path.endswith(where) else ""
    words = _GVISOR if result.state == "busy" and record.runtime == "runsc" else _WORDS[result.state]
    if result.state == "detached" and not result.path:
        words = _UNMOUNTED
    names = ", ".join(name[:12] for name in result.shared_with[:_SHOWN])
    click.echo(printable(f"{record.models[index]} at {where}{moved}: {words.format(names=names)}"))
    for use in result.uses[:_SHOWN]:
        click.echo(printable(f"  {use.pid} {use.command}: {use.what} {use.path}"))
    if len(result.uses) > _SHOWN:
        click.echo(f"  and {len(result.uses) - _SHOWN} more (--json shows all)")


COMMANDS = {"release": release}
