"""The model owner's commands but for packing, granting and boot policies: keygen, inspect, verify."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import (
    JSON,
    PASSPHRASE_FILE,
    is_model,
    known_model,
    name_of,
    passphrase_source,
    read_input,
    show_progress,
    verify_new_output,
)
from oci_hook.config import load_config
from oci_hook.errors import BundleInvalid, TrustInvalid
from oci_hook.store import Store
from oci_hook.trust_folder import Trust

if TYPE_CHECKING:
    from oci_hook.bundle.layout import Layout
    from oci_hook.trust import Owner


@click.command()
@click.option("--keys", metavar="DIRECTORY", required=True, help="Folder to make.")
@click.option(
    "--name",
    metavar="NAME",
    callback=name_of,
    help="The owner's name, or the recovery key's: lower-case letters and digits, with . _ - between them.",
)
@click.option("--recovery-only", is_flag=True, help="Make an offline recovery key and no owner; keep it elsewhere.")
@click.option(
    "--recovery-key",
    type=click.Path(dir_okay=False),
    help="Name the offline recovery key (recovery.json) for what is packed; without --name: of an owner who is there.",
)
@PASSPHRASE_FILE
@click.option("--no-passphrase", is_flag=True, help="Leave the private keys unencrypted, for another vault to guard.")
def keygen(
    keys: str,
    name: str | None,
    recovery_only: bool,
    recovery_key: str | None,
    passphrase_file: str | None,
    no_passphrase: bool,
) -> None:
    """Make an owner's folder of keys, under a passphrase.

    The keys are for manifests, boot policies and recovery. Publish owner.json of it; guard the rest. Without this
    folder no device can ever be granted your models again, unless they were packed with a --recovery-key.
    """
    from oci_hook.cli.recover import load_public_key, make_recovery_key, name_recovery_key
    from oci_hook.owner.keyring import create_keyring

    if (no_passphrase and passphrase_file) or (recovery_only and recovery_key):
        raise click.UsageError("--passphrase-file and --no-passphrase, --recovery-only and -key, exclude each other")
    recipient = load_public_key(recovery_key) if recovery_key else None
    if recipient is not None and name is None:
        name_recovery_key(keys, recipient, passphrase_source(passphrase_file))
        return
    if name is None:
        raise click.UsageError("Missing option '--name'.")
    verify_new_output(keys)
    passphrase = None if no_passphrase else passphrase_source(passphrase_file, confirm=True)()
    if no_passphrase:
        click.echo("the private keys are NOT encrypted", err=True)
    if recovery_only:
        make_recovery_key(keys, name, passphrase)
        return
    owner = create_keyring(Path(keys), name, passphrase)
    if recipient is not None:
        name_recovery_key(keys, recipient, lambda: passphrase or "")
    click.echo(f"owner {name}, id {owner.owner_id}; give {os.path.join(keys, 'owner.json')} to the hosts' operators")


@click.command()
@click.argument("path", metavar="PATH|NAME:VERSION", type=click.Path())
@JSON
@click.pass_obj
def inspect(config_file: str, path: str, as_json: bool) -> None:
    """Show what a bundle, grant or boot policy says.

    PATH is a bundle's folder or a file; NAME:VERSION is a model in this host's store. Nothing is verified: `sczctl
    verify` and `sczctl add` do that.
    """
    from oci_hook.cli.inspection import describe, describe_bundle, lines

    if os.path.lexists(path) or not is_model(path):
        document = describe(path)
    else:
        store = Store(load_config(config_file).store_directory)
        with store.open_model(known_model(store, path)) as layout:
            document = describe_bundle(layout)
    if as_json:
        print_json(document)
        return
    click.echo("unverified:")
    for line in lines(document):
        click.echo(f"  {line}")


@click.command()
@click.argument("bundle", metavar="FOLDER|NAME:VERSION", type=click.Path(file_okay=False))
@click.option("--owner", "owner_file", type=click.Path(dir_okay=False), help="With a folder: the owner's owner.json.")
@click.option(
    "--keys", type=click.Path(file_okay=False), help="Your own folder: decrypt and authenticate every file, too."
)
@PASSPHRASE_FILE
@JSON
@click.pass_obj
def verify(
    config_file: str,
    bundle: str,
    owner_file: str | None,
    keys: str | None,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """Verify that a bundle is what its owner signed.

    That is its manifest's signature and every layer's digest; with --keys also that every file decrypts. FOLDER is a
    bundle, and --owner says who must have signed it. NAME:VERSION is a model in this host's store, signed by an owner
    whom this host trusts.
    """
    from oci_hook.bundle.layout import verify_digests
    from oci_hook.owner.granting import verify_decryption
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.provenance import verified_manifest

    opened, owners = _to_verify(config_file, bundle, owner_file)
    with opened as layout:
        manifest, owner = verified_manifest(layout, owners)
        total = sum(file.layer_size for file in manifest.files)
        keyring = open_keyring(Path(keys), passphrase_source(passphrase_file)) if keys is not None else None
        with show_progress("verifying", total) as progress:
            verify_digests(layout, manifest, progress)
        if keyring is not None:
            with show_progress("decrypting", sum(file.size for file in manifest.files)) as progress:
                verify_decryption(keyring, layout, manifest, progress)
    model = manifest.model
    if as_json:
        digests = {"image": layout.image_digest, "manifest": manifest.digest}
        verified = {"owner": owner.owner_id, "files": len(manifest.files), "decrypted": keyring is not None}
        print_json({**model.document(), **digests, **verified})
        return
    decrypted = " and decrypt" if keyring is not None else ""
    click.echo(
        f"{model.name}:{model.version} is signed by {owner.name}; "
        f"its {len(manifest.files)} files are what was signed{decrypted}"
    )


def _to_verify(config_file: str, bundle: str, owner_file: str | None) -> tuple[Layout, Sequence[Owner]]:
    """The bundle that is meant, and who may have signed it."""
    from oci_hook.bundle.layout import open_layout
    from oci_hook.trust import parse_owner

    if owner_file is not None:
        owner = parse_owner(read_input(owner_file, TrustInvalid))
        if not os.path.isdir(bundle):
            raise BundleInvalid(f"{bundle} is not a folder")
        return open_layout(bundle), [owner]
    if not is_model(bundle):
        raise click.UsageError("give --owner FILE with a bundle's folder, or the NAME:VERSION of a model in the store")
    config = load_config(config_file)
    store = Store(config.store_directory)
    return store.open_model(known_model(store, bundle)), Trust(config.trust_directory).owners()


COMMANDS = {"keygen": keygen, "inspect": inspect, "verify": verify}
