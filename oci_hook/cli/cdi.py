"""`sczctl cdi`: models as devices of the Container Device Interface, for engines that read it."""

from __future__ import annotations

import json
import os

import click

from oci_hook.cli import print_json
from oci_hook.cli.completion import complete_files, complete_models
from oci_hook.cli.options import DRY_RUN, JSON, hook_timeout
from oci_hook.config import load_config
from oci_hook.engines.cdi import DEFAULT_FILE, KIND, device_file, installed_devices, model_device
from oci_hook.engines.placing import carry_out
from oci_hook.engines.plan import Change, HostFiles, Plan
from oci_hook.errors import ModelUnknown, OutputExists
from oci_hook.invocation import ENGINES
from oci_hook.oci.annotations import parse_requests
from oci_hook.store import Store

_OUTPUT = click.option(
    "-o",
    "--output",
    metavar="FILE",
    shell_complete=complete_files,
    default=DEFAULT_FILE,
    show_default=True,
    help="The file; engines read all of /etc/cdi and /run/cdi, or what their configuration says.",
)


@click.group()
def cdi() -> None:
    """Offer models as devices of the Container Device Interface.

    A container gets one by `podman --device smm.scz/model=NAME`, or by a pod's annotation under cdi.k8s.io/.
    """


@cdi.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_models)
@click.option("--all", "all_models", is_flag=True, help="Every model in this host's store.")
@_OUTPUT
@click.option(
    "--engine", type=click.Choice(ENGINES), help="Who will read the file; default: as the configuration says."
)
@click.option(
    "--path", metavar="PATH", help="Where the model goes in the container (one MODEL only). [default: /models/NAME]"
)
@click.option("--name", metavar="NAME", help="The device's name (one MODEL only). [default: the MODEL as given]")
@hook_timeout()
@DRY_RUN
@JSON
@click.pass_obj
def generate(
    config_file: str,
    models: tuple[str, ...],
    all_models: bool,
    output: str,
    engine: str | None,
    path: str | None,
    name: str | None,
    timeout_seconds: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a CDI file with one device a model.

    MODEL is what the annotation smm.scz/model takes: name, name:version, name@sha256:… or rootfs:/path. A file that
    this command wrote before is replaced. `-o -` prints it.
    """
    if bool(models) == all_models:
        raise click.UsageError("give MODELs or --all")
    if (path is not None or name is not None) and len(models) != 1:
        raise click.UsageError("--path and --name go with one MODEL")
    models = _known(config_file, models)
    devices = [model_device(model, name=name, path=path) for model in models]
    data = device_file(devices, config_file=config_file, engine=engine, timeout_seconds=timeout_seconds)
    if output == "-":
        click.echo(data.decode(), nl=False)
        return
    output = os.path.abspath(output)
    files = HostFiles()
    _verify_ours(output, files)
    if not dry_run:
        carry_out(Plan((Change(output, data),)), files)
    if as_json:
        listed = [f"{KIND}={device.name}" for device in devices]
        print_json({"dry_run": dry_run, "file": output, "devices": listed, "document": json.loads(data)})
        return
    click.echo(f"{'would write' if dry_run else 'wrote'} {output}")
    if dry_run:
        click.echo(data.decode(), nl=False)
    for device in devices:
        click.echo(f"device {KIND}={device.name}")


def _known(config_file: str, models: tuple[str, ...]) -> tuple[str, ...]:
    """The models to offer, each of which the store has.

    Raises:
        ModelUnknown: One is not there, or, with --all, none is.
    """
    store = Store(load_config(config_file).store_directory)
    if not models:
        models = tuple(f"{name}:{version}" for name, version in store.names())
        if not models:
            raise ModelUnknown("no model is in the store", remedy="`sczctl add` one")
        return models
    for model in models:
        reference = parse_requests({"smm.scz/model": model, "smm.scz/path": "/models/any"}).models[0].reference
        if reference.rootfs_path is None:
            store.resolve(reference)
    return models


def _verify_ours(path: str, files: HostFiles) -> None:
    if files.exists(path) and installed_devices(path, files) is None:
        raise OutputExists(f"{path} is not a file that `sczctl cdi generate` wrote", remedy="give another -o FILE")


@cdi.command()
@_OUTPUT
@DRY_RUN
@JSON
def rm(output: str, dry_run: bool, as_json: bool) -> None:
    """Remove the file that `sczctl cdi generate` wrote."""
    path, files = os.path.abspath(output), HostFiles()
    _verify_ours(path, files)
    found = files.exists(path)
    if found and not dry_run:
        carry_out(Plan((Change(path, None),)), files)
    if as_json:
        print_json({"dry_run": dry_run, "files": [path] if found else []})
    elif found:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    else:
        click.echo(f"nothing of ours is at {path}", err=True)


COMMANDS = {"cdi": cdi}
