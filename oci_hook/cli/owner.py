"""The model owner's commands: keygen, pack, grant, inspect, verify."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import (
    KEYS,
    OUTPUT,
    PASSPHRASE_FILE,
    passphrase_source,
    read_input,
    show_progress,
    write_output,
)
from oci_hook.documents import parse_object
from oci_hook.errors import BundleInvalid, SourceInvalid, TrustInvalid
from oci_hook.trusted_file import load_file

_FIELDS_BYTES = 64 << 10
_POLICY_BYTES = 256 << 10


@click.command()
@click.option("--keys", type=click.Path(file_okay=False), required=True, help="Folder to make.")
@click.option("--name", required=True, help="The owner's name: lower-case letters, digits and . _ - between them.")
@PASSPHRASE_FILE
@click.option("--no-passphrase", is_flag=True, help="Leave the private keys unencrypted, for another vault to guard.")
def keygen(keys: str, name: str, passphrase_file: str | None, no_passphrase: bool) -> None:
    """Make an owner's folder: keys for manifests, boot policies and recovery, under a passphrase.

    Publish owner.json of it; guard the rest. Without this folder no device can ever be granted your models again.
    """
    from oci_hook.owner.keyring import create_keyring

    if no_passphrase and passphrase_file:
        raise click.UsageError("--passphrase-file and --no-passphrase exclude each other")
    passphrase = None if no_passphrase else passphrase_source(passphrase_file, confirm=True)()
    owner = create_keyring(Path(keys), name, passphrase)
    if no_passphrase:
        click.echo("the private keys are NOT encrypted", err=True)
    click.echo(f"owner {name}, id {owner.owner_id}; give {os.path.join(keys, 'owner.json')} to the hosts' operators")


def _access_document(
    access_file: str | None,
    issuer: str | None,
    audience: str,
    subjects: tuple[str, ...],
    keys: tuple[str, ...],
    token_age_seconds: int,
) -> dict[str, Any]:
    """The access policy: the owner's file, or one identity from the options."""
    if access_file is not None:
        if issuer or subjects:
            raise click.UsageError("--access and --issuer/--subject exclude each other")
        data = load_file(access_file, limit_bytes=_POLICY_BYTES, error=SourceInvalid)
        return parse_object(data, limit_bytes=_POLICY_BYTES, what="access policy", error=SourceInvalid)
    if not issuer or not subjects:
        raise click.UsageError("say who may use the model: --access FILE, or --issuer and --subject")
    identity: dict[str, Any] = {"issuer": issuer, "audience": audience, "subjects": sorted(subjects)}
    if keys:
        identity["keys"] = sorted(keys)
    return {"identities": [identity], "token_age_seconds": token_age_seconds, "share": False}


@click.command()
@click.argument("source", type=click.Path(file_okay=False))
@click.option("-o", "--output", type=click.Path(file_okay=False), required=True, help="Bundle to make (an OCI layout).")
@KEYS
@click.option("--name", required=True, help="The model's name.")
@click.option("--version", required=True, help="Its version, an OCI tag; each version is packed once.")
@click.option(
    "--generation", type=click.IntRange(1), default=1, show_default=True, help="The owner's count, for revocation."
)
@click.option("--access", "access_file", type=click.Path(dir_okay=False), help="The access policy (JSON).")
@click.option("--issuer", help="Instead of --access: the issuer whose tokens are accepted,")
@click.option("--audience", default="scz-smm", show_default=True, help="  for this audience,")
@click.option("--subject", "subjects", multiple=True, help="  of this workload (repeat for more),")
@click.option("--issuer-key", "issuer_keys", multiple=True, help="  signed by a key of this RFC 7638 thumbprint.")
@click.option(
    "--token-age", "token_age_seconds", type=int, default=3600, show_default=True, help="  at most so old (s)."
)
@click.option(
    "--fields",
    "fields_file",
    type=click.Path(dir_okay=False),
    help="Free fields of the model (JSON): framework, licence, privacy method and its parameters.",
)
@PASSPHRASE_FILE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pack(
    source: str,
    output: str,
    keys: str,
    name: str,
    version: str,
    generation: int,
    access_file: str | None,
    issuer: str | None,
    audience: str,
    subjects: tuple[str, ...],
    issuer_keys: tuple[str, ...],
    token_age_seconds: int,
    fields_file: str | None,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """Encrypt the folder SOURCE into a bundle, under a key of this version's own, and sign its manifest."""
    from oci_hook.access_policy import parse_access_policy
    from oci_hook.bundle.model import ModelId
    from oci_hook.bundle.pack import pack as pack_bundle
    from oci_hook.bundle.pack import scan_source
    from oci_hook.bundle.segments import ContentKey
    from oci_hook.owner.keyring import open_keyring, seal_content_key
    from oci_hook.owner.records import ContentKeyRecord, OwnerRecords

    document = _access_document(access_file, issuer, audience, subjects, issuer_keys, token_age_seconds)
    access = parse_access_policy(document, error=SourceInvalid)
    fields: dict[str, Any] = {}
    if fields_file is not None:
        data = load_file(fields_file, limit_bytes=_FIELDS_BYTES, error=SourceInvalid)
        fields = parse_object(data, limit_bytes=_FIELDS_BYTES, what="model fields", error=SourceInvalid)
    records = OwnerRecords(Path(keys))
    records.verify_new_version(name, version)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    model, content_key = ModelId(name, version, generation), ContentKey(secrets.token_bytes(32))
    total = sum(file.size for file in scan_source(Path(source)))
    with show_progress("packing", total) as progress:
        packed = pack_bundle(
            Path(source),
            Path(output),
            model=model,
            access=access,
            fields=fields,
            created=int(time.time()),
            owner_id=keyring.owner.owner_id,
            key=keyring.manifest_key,
            content_key=content_key,
            random=secrets.token_bytes,
            progress=progress,
        )
    sealed = seal_content_key(content_key, manifest_digest=packed.manifest_digest, owner=keyring.owner)
    records.save_content_key(ContentKeyRecord(model, packed.manifest_digest, packed.image_digest, sealed))
    if as_json:
        print_json(
            {
                "name": name,
                "version": version,
                "generation": generation,
                "image": packed.image_digest,
                "manifest": packed.manifest_digest,
                "files": packed.files,
                "bytes": packed.bytes,
            }
        )
    else:
        click.echo(
            f"packed {name}:{version}: {packed.files} files, {packed.bytes} bytes, image {packed.image_digest[:19]}…"
        )


@click.command()
@click.argument("model")
@KEYS
@click.option("--device", required=True, help="The device, as it was enrolled.")
@click.option(
    "--maximum",
    type=click.IntRange(0),
    default=None,
    help="Opens while the device's counter is at most this; default: its value at enrolment.",
)
@OUTPUT
@PASSPHRASE_FILE
def grant(model: str, keys: str, device: str, maximum: int | None, output: str, passphrase_file: str | None) -> None:
    """Wrap MODEL's content key (name:version) for one device's TPM."""
    from oci_hook.attestation.device_record import parse_device_record
    from oci_hook.owner.granting import make_grant
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.records import OwnerRecords

    name, _, version = model.partition(":")
    records = OwnerRecords(Path(keys))
    record, content = parse_device_record(records.load_device(device)), records.load_content_key(name, version)
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    made, compact = make_grant(
        keyring, content, record, maximum=maximum, created=int(time.time()), random=secrets.token_bytes
    )
    write_output(output, compact)
    records.save_grant(made, compact)
    click.echo(
        f"granted {name}:{version} to {device} (class {record.device_class}, "
        f"while its counter is at most {made.counter.maximum})"
    )


@click.command()
@click.argument("path", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, as_json: bool) -> None:
    """Show what a bundle, grant or boot policy says. Nothing is verified: `sczctl verify` does that."""
    from oci_hook.cli.inspection import describe

    document = describe(path)
    if as_json:
        print_json(document)
        return
    click.echo("unverified:")
    for key, value in document.items():
        click.echo(f"  {key}: {value}")


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False))
@click.option("--owner", "owner_file", type=click.Path(dir_okay=False), required=True, help="The owner's owner.json.")
@click.option(
    "--keys", type=click.Path(file_okay=False), help="Your own folder: decrypt and authenticate every file, too."
)
@PASSPHRASE_FILE
def verify(bundle: str, owner_file: str, keys: str | None, passphrase_file: str | None) -> None:
    """Verify a bundle's signature and every layer's digest; with --keys also that every file decrypts."""
    from oci_hook.bundle.layout import open_layout, verify_digests
    from oci_hook.owner.granting import verify_decryption
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.provenance import verified_manifest
    from oci_hook.trust import parse_owner

    owner = parse_owner(read_input(owner_file, TrustInvalid))
    if not os.path.isdir(bundle):
        raise BundleInvalid(f"{bundle} is not a folder")
    with open_layout(bundle) as layout:
        manifest, _ = verified_manifest(layout, [owner])
        total = sum(file.layer_size for file in manifest.files)
        with show_progress("verifying", total) as progress:
            verify_digests(layout, manifest, progress)
        if keys is not None:
            keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
            with show_progress("decrypting", sum(file.size for file in manifest.files)) as progress:
                verify_decryption(keyring, layout, manifest, progress)
    decrypted = " and decrypt" if keys else ""
    click.echo(
        f"{manifest.model.name}:{manifest.model.version} is signed by {owner.name}; "
        f"its {len(manifest.files)} files are what was signed{decrypted}"
    )


COMMANDS = {"keygen": keygen, "pack": pack, "grant": grant, "inspect": inspect, "verify": verify}
