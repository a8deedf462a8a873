"""`sczctl pack`: a folder becomes an encrypted, signed bundle, and its content key is kept in the owner's folder."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import (
    JSON,
    KEYS,
    PASSPHRASE_FILE,
    name_of,
    passphrase_source,
    show_progress,
    verify_new_output,
    version_of,
)
from oci_hook.documents import parse_object
from oci_hook.errors import SourceInvalid
from oci_hook.trusted_file import load_file

if TYPE_CHECKING:
    from oci_hook.owner.keyring import Keyring

_FIELDS_BYTES = 64 << 10
_POLICY_BYTES = 256 << 10


def _json_file(path: str, limit_bytes: int, what: str) -> dict[str, Any]:
    data = load_file(path, limit_bytes=limit_bytes, error=SourceInvalid)
    return parse_object(data, limit_bytes=limit_bytes, what=f"{what} {path}", error=SourceInvalid)


def _access_document(
    access_file: str | None,
    issuer: str | None,
    audience: str,
    subjects: tuple[str, ...],
    keys: tuple[str, ...],
    token_age_seconds: int,
    share: bool,
    broker: bool,
) -> dict[str, Any]:
    """The access policy: the owner's file, or one identity from the options."""
    if access_file is not None:
        if issuer or subjects or keys or share or broker:
            raise click.UsageError("--access excludes --issuer, --subject, --issuer-key, --share and --broker")
        return _json_file(access_file, _POLICY_BYTES, "access policy")
    if not issuer or not subjects:
        raise click.UsageError("say who may use the model: --access FILE, or --issuer and --subject")
    identity: dict[str, Any] = {"issuer": issuer, "audience": audience, "subjects": sorted(subjects)}
    if keys:
        identity["keys"] = sorted(keys)
    wanted = {"broker": True} if broker else {}
    return {"identities": [identity], "token_age_seconds": token_age_seconds, "share": share, **wanted}


def _recoverable(keyring: Keyring) -> dict[str, str]:
    from oci_hook.owner.recovery import load_recipient

    recipient = load_recipient(keyring.folder, keyring.owner)
    return {} if recipient is None else {"recovery_key": recipient.key.thumbprint}


@click.command()
@click.argument("source", type=click.Path(file_okay=False))
@click.option("-o", "--output", metavar="DIRECTORY", required=True, help="Bundle to make (an OCI layout).")
@KEYS
@click.option("--name", metavar="NAME", required=True, callback=name_of, help="The model's name.")
@click.option(
    "--version",
    metavar="VERSION",
    required=True,
    callback=version_of,
    help="Its version, an OCI tag; each is packed once.",
)
@click.option(
    "--generation",
    type=click.IntRange(1, (1 << 63) - 1),
    metavar="NUMBER",
    default=1,
    show_default=True,
    help="A number to raise with each version that replaces an earlier one.",
)
@click.option("--access", "access_file", type=click.Path(dir_okay=False), help="The access policy (JSON).")
@click.option("--issuer", metavar="URL", help="Instead of --access: accept tokens of this issuer.")
@click.option(
    "--audience", metavar="AUDIENCE", default="scz-smm", show_default=True, help="With --issuer: for this audience."
)
@click.option(
    "--subject",
    "subjects",
    metavar="SUBJECT",
    multiple=True,
    help="With --issuer: of this workload; repeat it for more.",
)
@click.option(
    "--issuer-key",
    "issuer_keys",
    metavar="THUMBPRINT",
    multiple=True,
    help="With --issuer: signed by the key of this RFC 7638 thumbprint, and no other; repeat it for more.",
)
@click.option(
    "--token-age",
    "token_age_seconds",
    type=click.IntRange(60, 31_622_400),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="With --issuer: tokens that are valid for at most so long, and at most so old.",
)
@click.option(
    "--share", is_flag=True, help="With --issuer: containers of one host may have one decrypted copy in common."
)
@click.option(
    "--broker",
    is_flag=True,
    help="With --issuer: a start needs a key broker's share beside the TPM's (`sczctl grant --broker`).",
)
@click.option(
    "--fields",
    "fields_file",
    type=click.Path(dir_okay=False),
    help="Free fields of the model (JSON): framework, licence, privacy method and its parameters.",
)
@PASSPHRASE_FILE
@JSON
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
    share: bool,
    broker: bool,
    fields_file: str | None,
    passphrase_file: str | None,
    as_json: bool,
) -> None:
    """Encrypt the folder SOURCE into a signed bundle.

    Each version has a content key of its own, which stays in the owner's folder. The bundle appears whole or not at
    all. --access FILE names who may use the model; --issuer and --subject are the short way for one issuer.
    """
    from oci_hook.access_policy import parse_access_policy
    from oci_hook.bundle.model import ModelId
    from oci_hook.bundle.pack import scan_source
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.packing import pack_version
    from oci_hook.owner.records import OwnerRecords

    document = _access_document(access_file, issuer, audience, subjects, issuer_keys, token_age_seconds, share, broker)
    access = parse_access_policy(document, error=SourceInvalid)
    fields = _json_file(fields_file, _FIELDS_BYTES, "model fields") if fields_file is not None else {}
    OwnerRecords(Path(keys)).verify_new_version(name, version)
    verify_new_output(output)
    total = sum(file.size for file in scan_source(Path(source)))
    keyring = open_keyring(Path(keys), passphrase_source(passphrase_file))
    with show_progress("packing", total) as progress:
        packed = pack_version(
            keyring,
            Path(source),
            Path(output),
            model=ModelId(name, version, generation),
            access=access,
            fields=fields,
            created=int(time.time()),
            random=secrets.token_bytes,
            progress=progress,
        )
    recoverable = _recoverable(keyring)
    if as_json:
        model = {"name": name, "version": version, "generation": generation}
        digests = {"image": packed.image_digest, "manifest": packed.manifest_digest}
        print_json({**model, **digests, "files": packed.files, "bytes": packed.bytes, **recoverable})
    else:
        click.echo(
            f"packed {name}:{version}: {packed.files} files, {packed.bytes} bytes, image {packed.image_digest[:19]}…"
            f"{', with a recovery copy' if recoverable else ''}"
        )


COMMANDS = {"pack": pack}
