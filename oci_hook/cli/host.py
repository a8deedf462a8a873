"""`sczctl add`, `list` and `rm`: the models in this host's store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from oci_hook.audit import format_time
from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_models
from oci_hook.cli.options import DRY_RUN, JSON, model_of, show_progress, verify_one_of
from oci_hook.config import load_config
from oci_hook.errors import DeviceNotEnrolled, ModelUnknown, SczError
from oci_hook.store import Store, StoredModel
from oci_hook.trust_folder import Trust

if TYPE_CHECKING:
    from oci_hook.intake import Taken


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--without-bundle", is_flag=True, help="Take grants for a model that images carry (rootfs:).")
@click.option("--replace", is_flag=True, help="Replace a model of the same name and version that has other contents.")
@click.option("--dry-run", is_flag=True, help="Verify everything where it is, and change nothing.")
@JSON
@click.pass_obj
def add(
    config_file: str, paths: tuple[str, ...], without_bundle: bool, replace: bool, dry_run: bool, as_json: bool
) -> None:
    """Verify what an owner sent, then put it into the store.

    PATHS are bundles, files (grants and lists of revocations end in .jwt, boot policies in .json), or folders of them.
    Signatures and every layer's digest are verified on a private copy first; if anything fails, nothing is added. A
    folder of `sczctl revoke` is given whole: its list counts the owner's counter in the TPM up, and what running
    containers still hold of it is shown. A grant of it that is of no use here is left out and named.
    """
    from oci_hook.cli.holders import holders, holders_document, show_holders
    from oci_hook.enrolled import remember_granted
    from oci_hook.incoming import collect, measure
    from oci_hook.intake import Intake
    from oci_hook.revoked import TpmCounting

    config = load_config(config_file)
    store, owners = Store(config.store_directory), Trust(config.trust_directory).owners()
    incoming = collect(paths)
    try:
        device = store.load_device()
    except DeviceNotEnrolled:
        device = None
    with show_progress("verifying", measure(incoming, copied=not dry_run)) as progress:
        intake = Intake(
            store,
            owners,
            device,
            replace=replace,
            without_bundle=without_bundle,
            progress=progress,
            counting=TpmCounting(config),
        )
        taken = intake.verify(incoming) if dry_run else intake.take(incoming)
    if taken.grants and not dry_run:
        remember_granted(store, taken.grants)
    if as_json:
        held = {"held": holders_document(holders(config_file))} if taken.revocations and not dry_run else {}
        print_json({"dry_run": dry_run, **_document(taken), **held})
        return
    done = "would add" if dry_run else "added"
    for model in taken.models:
        click.echo(f"{done} model {model.name}:{model.version} ({_image(model)})")
    for grant in taken.grants:
        click.echo(f"{done} grant for {grant.model.name}:{grant.model.version} to {grant.device_name}")
    for policy in taken.boot_policies:
        click.echo(f"{done} boot policy for {policy.model_name}, device class {policy.device_class}")
    for each in taken.revocations:
        click.echo(f"{'would apply' if dry_run else 'applied'} the revocations of {each.owner_id} up to {each.value}")
    for left in taken.left_out:
        click.echo(printable(f"left out: {left.what}: {left.message}"))
        click.echo(printable(f"  remedy: {left.remedy}"))
    if taken.revocations and not dry_run:
        show_holders(holders(config_file), as_json=False)


def _image(model: StoredModel) -> str:
    return "in images that carry it" if model.image_digest is None else f"{model.image_digest[:19]}…"


def _document(taken: Taken) -> dict[str, Any]:
    return {
        "models": [
            {"name": m.name, "version": m.version, "image": m.image_digest, "manifest": m.manifest_digest}
            for m in taken.models
        ],
        "grants": [
            {
                "model": f"{grant.model.name}:{grant.model.version}",
                "manifest": grant.manifest_digest,
                "device": grant.device_name,
            }
            for grant in taken.grants
        ],
        "boot_policies": [
            {"model": policy.model_name, "class": policy.device_class, "owner": policy.owner_id}
            for policy in taken.boot_policies
        ],
        "revocations": [{"owner": each.owner_id, "counter": each.value} for each in taken.revocations],
        "left_out": [
            {"what": left.what, "reason": left.reason, "message": left.message, "remedy": left.remedy}
            for left in taken.left_out
        ],
    }


@click.command("list")
@click.option("--grants", is_flag=True, help="The owner's view: which devices were granted what (needs --keys).")
@click.option("--keys", type=click.Path(file_okay=False), help="The owner's folder, with --grants.")
@JSON
@click.pass_obj
def list_models(config_file: str, grants: bool, keys: str | None, as_json: bool) -> None:
    """Show the models in the store, or, with --grants, who can open what."""
    if grants != (keys is not None):
        raise click.UsageError("--grants and --keys go together")
    if keys is not None:
        _list_grants(keys, as_json)
        return
    store = Store(load_config(config_file).store_directory)
    rows: list[dict[str, Any]] = []
    damaged: SczError | None = None
    for name, version in store.names():
        try:
            model = store.load_model(name, version)
            store.verify_present(model)
        except SczError as error:  # the others are shown all the same
            damaged = error
            rows.append({"name": name, "version": version, "damaged": error.message})
            continue
        digests = {"image": model.image_digest, "manifest": model.manifest_digest, "owner": model.owner_id}
        rows.append({"name": name, "version": version, **digests, "granted": store.has_grant(model.manifest_digest)})
    if as_json:
        print_json(rows)
    else:
        _show_models(rows)
    if damaged is not None:
        raise damaged


def _show_models(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("no model is in the store", err=True)
    for row in rows:
        state = "damaged" if "damaged" in row else "granted" if row["granted"] else "no grant"
        click.echo(f"{row['name'] + ':' + row['version']:<32} {(row.get('image') or '-')[:19]:<19}  {state}")


def _list_grants(keys: str, as_json: bool) -> None:
    from oci_hook.owner.grant_batch import load_grants

    rows = load_grants(keys)
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("nothing was granted", err=True)
    for row in rows:
        click.echo(
            f"{row['model']:<32} {row['device']:<24} class {row['class']:<12} "
            f"counter up to {row['counter_maximum']:<5} {format_time(float(row['created']))}"
            f"{'  leased' if row['lease'] else ''}{'  set aside' if row['set_aside'] else ''}"
        )


@click.command()
@click.argument("model", metavar="NAME:VERSION", callback=model_of, shell_complete=complete_models)
@DRY_RUN
@JSON
@click.pass_obj
def rm(config_file: str, model: tuple[str, str], dry_run: bool, as_json: bool) -> None:
    """Remove a model, its grant and its bundle from the store.

    Containers that run keep it.
    """
    from oci_hook.placement import remove

    name, version = model
    store = Store(load_config(config_file).store_directory)
    known = [":".join(found) for found in store.names()]
    verify_one_of("model", f"{name}:{version}", known, ModelUnknown, remedy="`sczctl list` shows what is in the store")
    if not dry_run:
        remove(store, name, version)
    if as_json:
        print_json({"dry_run": dry_run, "name": name, "version": version})
    else:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}:{version}")


COMMANDS = {"add": add, "list": list_models, "rm": rm}
