"""The model owner's commands but for packing and boot policies: keygen, grant, inspect, verify."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json
from oci_hook.cli.completion import complete_devices, complete_packed
from oci_hook.cli.lease import lease_in_words, lease_options, leased
from oci_hook.cli.options import (
    JSON,
    KEYS,
    OUTPUT,
    PASSPHRASE_FILE,
    is_model,
    known_model,
    model_of,
    name_of,
    passphrase_source,
    read_input,
    show_progress,
    verify_new_output,
    verify_one_of,
    write_output,
)
from oci_hook.config import load_config
from oci_hook.errors import BundleInvalid, DeviceInvalid, KeyInvalid, TrustInvalid
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
    required=True,
    callback=name_of,
    help="The owner's name: lower-case letters and digits, with . _ - between them.",
)
@PASSPHRASE_FILE
@click.option("--no-passphrase", is_flag=True, help="Leave the private keys unencrypted, for another vault to guard.")
def keygen(keys: str, name: str, passphrase_file: str | None, no_passphrase: bool) -> None:
    """Make an owner's folder of keys, under a passphrase.

    The keys are for manifests, boot policies and recovery. Publish owner.json of it; guard the rest. Without this
    folder no device can ever be granted your models again.
    """
    from oci_hook.owner.keyring import create_keyring

    if no_passphrase and passphrase_file:
        raise click.UsageError("--passphrase-file and --no-passphrase exclude each other")
    verify_new_output(keys)
    passphrase = None if no_passphrase else passphrase_source(passphrase_file, confirm=True)()
    owner = create_keyring(Path(keys), name, passphrase)
    if no_passphrase:
        click.echo("the private keys are NOT encrypted", err=True)
    click.echo(f"owner {name}, id {owner.owner_id}; give {os.path.join(keys, 'owner.json')} to the hosts' operators")


@click.command()
@click.argument("model", metavar="NAME:VERSION", callback=model_of, shell_complete=complete_packed)
@KEYS
@click.option(
    "--device",
    metavar="NAME",
    required=True,
    callback=name_of,
    shell_complete=complete_devices,
    help="The device, as it was enrolled.",
)
@click.option(
    "--maximum",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="NUMBER",
    default=None,
    help="Opens while the device's counter is at most this; default: its value at enrolment.",
)
@lease_options
@OUTPUT
@PASSPHRASE_FILE
@JSON
def grant(
    model: tuple[str, str],
    keys: str,
    device: str,
    maximum: int | None,
    lease_boots: int | None,
    lease_hours: int | None,
    lease_from: str | None,
    output: str,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """Wrap a model's content key for one device's TPM.

    With a lease it opens for so many boots, or hours of powered-on time, and no longer: a bound for what is stolen, or
    for a revocation that is withheld. Without --lease-boots a lease can be stretched by cutting the power.
    """
    from oci_hook.attestation.device_record import parse_device_record
    from oci_hook.owner.granting import make_grant
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.owner.revoking import remember_grant, verify_allowed

    name, version = model
    records = OwnerRecords(Path(keys))
    packed = [":".join(found) for found in records.content_keys()]
    verify_one_of("packed version", f"{name}:{version}", packed, KeyInvalid, remedy="`sczctl pack` it; check --keys")
    verify_one_of(
        "enrolled device", device, records.devices(), DeviceInvalid, remedy="`sczctl enroll` it; check --keys"
    )
    verify_new_output(output)
    record, content = parse_device_record(records.load_device(device)), records.load_content_key(name, version)
    verify_allowed(records, content.model)
    record, lease = leased(record, boots=lease_boots, hours=lease_hours, request_file=lease_from)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    made, compact = make_grant(
        keyring,
        content,
        record,
        maximum=maximum,
        created=int(time.time()),
        random=secrets.token_bytes,
        epoch=records.load_line(name).epoch(record.device_class),
        lease=lease,
    )
    remember_grant(records, record, made, compact)  # first: what nobody remembers cannot be revoked
    write_output(output, compact)
    if as_json:
        granted = {"model": f"{name}:{version}", "device": device, "class": record.device_class}
        bounds = {"counter_maximum": made.counter.maximum, "lease": lease.document() if lease else None}
        print_json({**granted, "manifest": made.manifest_digest, **bounds})
        return
    click.echo(
        f"granted {name}:{version} to {device} (class {record.device_class}, "
        f"while its counter is at most {made.counter.maximum}{lease_in_words(lease)})"
    )


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


COMMANDS = {"keygen": keygen, "grant": grant, "inspect": inspect, "verify": verify}
