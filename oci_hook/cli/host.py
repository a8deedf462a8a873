"""`sczctl add`, `list` and `rm`: the models in this host's store."""

from __future__ import annotations

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import show_progress
from oci_hook.config import load_config
from oci_hook.errors import DeviceNotEnrolled, ModelUnknown
from oci_hook.store import Store, Trust


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--replace", is_flag=True, help="Replace a model of the same name and version that has other contents.")
@click.option("--dry-run", is_flag=True, help="Say what would be added, unverified, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def add(config_file: str, paths: tuple[str, ...], replace: bool, dry_run: bool, as_json: bool) -> None:
    """Verify bundles, grants and boot policies, then put them into the store.

    PATHS are files, bundles, or folders of them. Signatures and every layer's digest are verified on a private copy
    first; if anything fails, nothing is added.
    """
    from oci_hook.intake import Intake, collect

    config = load_config(config_file)
    store, owners = Store(config.store_directory), Trust(config.trust_directory).owners()
    incoming = collect(paths)
    if dry_run:
        click.echo(
            f"would verify and add {len(incoming.bundles)} bundles, {len(incoming.grants)} grants, "
            f"{len(incoming.boot_policies)} boot policies"
        )
        return
    try:
        device = store.load_device()
    except DeviceNotEnrolled:
        device = None
    intake = Intake(store, owners, device)
    with show_progress("verifying", intake.measure(incoming)) as progress:
        taken = intake.take(incoming, progress, replace=replace)
    if as_json:
        print_json(
            {
                "models": [{"name": m.name, "version": m.version, "image": m.image_digest} for m in taken.models],
                "grants": [grant.manifest_digest for grant in taken.grants],
                "boot_policies": [f"{policy.model_name}@{policy.device_class}" for policy in taken.boot_policies],
            }
        )
        return
    for model in taken.models:
        click.echo(f"added model {model.name}:{model.version} ({model.image_digest[:19]}…)")
    for grant in taken.grants:
        click.echo(f"added grant for {grant.model.name}:{grant.model.version} to {grant.device_name}")
    for policy in taken.boot_policies:
        click.echo(f"added boot policy for {policy.model_name}, device class {policy.device_class}")


@click.command("list")
@click.option("--grants", is_flag=True, help="The owner's view: which devices were granted what (needs --keys).")
@click.option("--keys", type=click.Path(file_okay=False), help="The owner's folder, with --grants.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_models(config_file: str, grants: bool, keys: str | None, as_json: bool) -> None:
    """Show the models in this host's store, or, with --grants, who can open what."""
    if grants:
        if keys is None:
            raise click.UsageError("--grants needs --keys")
        _list_grants(keys, as_json)
        return
    store = Store(load_config(config_file).store_directory)
    rows = [
        {
            "name": m.name,
            "version": m.version,
            "image": m.image_digest,
            "manifest": m.manifest_digest,
            "owner": m.owner_id,
            "granted": store.has_grant(m.manifest_digest),
        }
        for m in store.models()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['name']}:{row['version']}  {str(row['image'])[:19]}…  {'granted' if row['granted'] else 'no grant'}"
        )


def _list_grants(keys: str, as_json: bool) -> None:
    from oci_hook.owner.keyring import load_grants

    rows = load_grants(keys)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['model']:<32} {row['device']:<24} {row['created']}")


@click.command()
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and change nothing.")
@click.pass_obj
def rm(config_file: str, model: str, dry_run: bool) -> None:
    """Remove MODEL (name:version), its grant and its bundle from the store; containers that run keep it."""
    name, _, version = model.partition(":")
    store = Store(load_config(config_file).store_directory)
    found = [m for m in store.models() if (m.name, m.version) == (name, version)]
    if not found:
        raise ModelUnknown(f"{model} is not in the store; give name:version")
    if not dry_run:
        store.remove(found[0])
    click.echo(f"{'would remove' if dry_run else 'removed'} {model}")


COMMANDS = {"add": add, "list": list_models, "rm": rm}
