"""`sczctl trust`: the owners whose models and the issuers whose tokens this host accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oci_hook.cli import print_json
from oci_hook.cli.completion import complete_trusted
from oci_hook.cli.options import DRY_RUN, JSON, name_of, read_input
from oci_hook.config import load_config
from oci_hook.documents import canonical, parse_object
from oci_hook.errors import OutputExists, SczError, TrustInvalid
from oci_hook.trust import ISSUER_LIMIT_BYTES, Owner, parse_issuer, parse_owner
from oci_hook.trust_folder import Trust

T = TypeVar("T")

_REPLACE = click.option("--replace", is_flag=True, help="Replace what is trusted under this name.")


@click.group()
def trust() -> None:
    """Add, list and remove trusted model owners and token issuers."""


@trust.group()
def add() -> None:
    """Trust an owner or an issuer from now on."""


def _known(load: Callable[[str], T], name: str) -> T | None:
    """What is trusted under that name; None if there is nothing, or it is damaged and may be replaced."""
    try:
        return load(name)
    except SczError:
        return None


def _thumbprints(owner: Owner) -> list[str]:
    return [key.thumbprint for key in (owner.manifest_key, owner.boot_policy_key, owner.recovery_key)]


def _verify_same(what: str, known: list[str], given: list[str]) -> None:
    """Check that a name that is trusted does not change its meaning unseen."""
    if known != given:
        raise OutputExists(
            f"{what} is trusted here already, and is another: {' '.join(known)}",
            remedy="make sure that it may change, then give --replace",
        )


@add.command("owner")
@click.argument("file", type=click.Path(dir_okay=False))
@_REPLACE
@DRY_RUN
@click.pass_obj
def add_owner(config_file: str, file: str, replace: bool, dry_run: bool) -> None:
    """Trust a model's owner, by the owner.json that was published.

    Compare the id that is printed with what the owner tells you by another way: whoever signs with that key decides
    which models this host will open.
    """
    document = read_input(file, TrustInvalid)
    owner, trusted = parse_owner(document), Trust(load_config(config_file).trust_directory)
    known = _known(trusted.load_owner, owner.name)
    if known is not None and not replace:
        _verify_same(f"an owner {owner.name}", _thumbprints(known), _thumbprints(owner))
    path = trusted.path("owners", owner.name) if dry_run else trusted.add("owners", owner.name, document)
    click.echo(f"{'would trust' if dry_run else 'trusted'} owner {owner.name} ({owner.owner_id}) in {path}")


@add.command("issuer")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--name", metavar="NAME", callback=name_of, help="With a plain JWK set: name of the issuer here.")
@click.option("--issuer", metavar="URL", help="With a plain JWK set: the `iss` claim of the issuer's tokens.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["kubernetes", "spiffe", "oidc"]),
    help="With a plain JWK set: how the issuer's tokens name a workload.",
)
@_REPLACE
@DRY_RUN
@click.pass_obj
def add_issuer(
    config_file: str, file: str, name: str | None, issuer: str | None, kind: str | None, replace: bool, dry_run: bool
) -> None:
    """Trust an issuer of identity tokens, or renew its keys.

    FILE is an issuer's file (`sczctl token init` makes one), or a JWK set such as the API server serves under
    /openid/v1/jwks; then --name, --issuer and --type say the rest.
    """
    data = _issuer_document(file, name, issuer, kind)
    found, trusted = parse_issuer(data), Trust(load_config(config_file).trust_directory)
    known = _known(trusted.load_issuer, found.name)
    if known is not None and not replace:
        _verify_same(f"an issuer {found.name}", [known.issuer, known.kind], [found.issuer, found.kind])
    path = trusted.path("issuers", found.name) if dry_run else trusted.add("issuers", found.name, data)
    click.echo(
        f"{'would trust' if dry_run else 'trusted'} issuer {found.name} "
        f"({found.issuer}, {found.kind}, {len(found.keys)} keys) in {path}"
    )


def _issuer_document(file: str, name: str | None, issuer: str | None, kind: str | None) -> bytes:
    data = read_input(file, TrustInvalid)
    document = parse_object(data, limit_bytes=ISSUER_LIMIT_BYTES, what=file, error=TrustInvalid)
    given = (name, issuer, kind)
    if given == (None, None, None):
        if "keys" in document and "schema" not in document:
            raise click.UsageError(f"{file} is a plain JWK set: give --name, --issuer and --type")
        return data
    if None in given:
        raise click.UsageError("--name, --issuer and --type go together")
    if "schema" in document:
        raise click.UsageError(f"{file} is an issuer's file, which says --name, --issuer and --type itself")
    jwks = {"keys": document.get("keys")}  # RFC 7517, section 5: other members do not matter
    return canonical({"schema": "scz-smm/issuer/v1", "name": name, "issuer": issuer, "type": kind, "jwks": jwks})


@trust.command("list")
@JSON
@click.pass_obj
def list_trust(config_file: str, as_json: bool) -> None:
    """Show whom this host trusts."""
    trusted = Trust(load_config(config_file).trust_directory)
    owners = [{"name": owner.name, "id": owner.owner_id} for owner in trusted.owners()]
    issuers: list[dict[str, Any]] = [
        {"name": i.name, "issuer": i.issuer, "type": i.kind, "keys": [key.thumbprint for key in i.keys]}
        for i in trusted.issuers()
    ]
    if as_json:
        print_json({"owners": owners, "issuers": issuers})
        return
    if not owners and not issuers:
        click.echo("nobody is trusted yet", err=True)
    for found in owners:
        click.echo(f"owner   {found['name']:<20} {found['id']}")
    for entry in issuers:
        click.echo(f"issuer  {entry['name']:<20} {entry['issuer']} ({entry['type']}, {len(entry['keys'])} keys)")


@trust.command("rm")
@click.argument("kind", type=click.Choice(["owner", "issuer"]))
@click.argument("name", shell_complete=complete_trusted)
@DRY_RUN
@click.pass_obj
def remove_trust(config_file: str, kind: str, name: str, dry_run: bool) -> None:
    """Trust an owner or issuer no longer.

    Running containers keep what they have.
    """
    if "/" in name or name.startswith("."):
        raise TrustInvalid(f"{name} is not a name", remedy="`sczctl trust list` shows the names")
    trusted = Trust(load_config(config_file).trust_directory)
    trusted.verify_known(f"{kind}s", name)
    if not dry_run:
        trusted.remove(f"{kind}s", name)
    click.echo(f"{'would remove' if dry_run else 'removed'} {kind} {name}")


COMMANDS = {"trust": trust}
