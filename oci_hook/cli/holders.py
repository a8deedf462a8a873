"""Who still holds on this host what was revoked: said by `sczctl add` and `sczctl revoke --applied`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.config import load_config
from oci_hook.store import Store
from oci_hook.trust_folder import Trust

if TYPE_CHECKING:
    from oci_hook.revoked import Holder


def holders(config_file: str) -> list[Holder]:
    """Who holds what was revoked on this host."""
    from oci_hook.records import ContainerRecords
    from oci_hook.revoked import live_holders

    config = load_config(config_file)
    owners = Trust(config.trust_directory).owners()
    return live_holders(Store(config.store_directory), owners, ContainerRecords(config.runtime_directory).live())


def holders_document(found: Sequence[Holder]) -> list[dict[str, Any]]:
    """For `--json`, of `add` as well."""
    return [
        {"container": each.container_id, "pid": each.pid, "model": each.model, "owner": each.owner_id}
        | {"reason": each.reason}
        for each in found
    ]


def show_holders(found: Sequence[Holder], as_json: bool) -> None:
    """One line a container and model."""
    if as_json:
        print_json(holders_document(found))
        return
    for each in found:
        click.echo(printable(f"still held: {each.model} by container {each.container_id} ({each.reason})"))
    if found:
        click.echo("end these containers, or take the model away: `sczctl release CONTAINER`", err=True)
    else:
        click.echo("no running container holds what was revoked", err=True)
