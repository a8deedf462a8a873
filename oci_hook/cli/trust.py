"""`sczctl trust`: the owners whose models and the issuers whose tokens this host accepts."""

from __future__ import annotations

from typing import Any

import click

from oci_hook.cli import print_json
from oci_hook.config import load_config
from oci_hook.documents import canonical, parse_object
from oci_hook.errors import TrustInvalid
from oci_hook.store import Trust
from oci_hook.trust import parse_issuer, parse_owner
from oci_hook.trusted_file import load_file

_LIMIT_BYTES = 256 << 10


@click.group()
def trust() -> None:
    """Add, list and remove trusted model owners and token issuers."""


@trust.group()
def add() -> None:
    """Trust an owner or an issuer from now on."""


@add.command("owner")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def add_owner(config_file: str, file: str) -> None:
    """Trust a model's owner, by the owner.json that the owner published.

    Compare the id that is printed with what the owner tells you by another way: whoever signs with that key decides
    which models this host will open.
    """
    document = load_file(file, limit_bytes=_LIMIT_BYTES, error=TrustInvalid)
    owner = parse_owner(document)
    path = Trust(load_config(config_file).trust_directory).add("owners", owner.name, document)
    click.echo(f"trusted owner {owner.name} ({owner.owner_id}) in {path}")


@add.command("issuer")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--name", help="Name of the issuer here; needed with --issuer.")
@click.option("--issuer", help="The `iss` claim, if FILE is a plain JWK set.")
@click.option("--type", "kind", type=click.Choice(["kubernetes", "spiffe", "oidc"]), help="With --issuer.")
@click.pass_obj
def add_issuer(config_file: str, file: str, name: str | None, issuer: str | None, kind: str | None) -> None:
    """Trust an issuer of identity tokens.

    FILE is an issuer's file (`sczctl token init` makes one), or a JWK set such as the API server serves under
    /openid/v1/jwks; then --name, --issuer and --type say the rest.
    """
    data = load_file(file, limit_bytes=_LIMIT_BYTES, error=TrustInvalid)
    if (given := (name, issuer, kind)) != (None, None, None):
        if None in given:
            raise click.UsageError("--name, --issuer and --type go together")
        keys = parse_object(data, limit_bytes=_LIMIT_BYTES, what=file, error=TrustInvalid)
        data = canonical(
            {
                "schema": "scz-smm/issuer/v1",
                "name": name,
                "issuer": issuer,
                "type": kind,
                "jwks": {"keys": keys.get("keys")},
            }
        )
    found = parse_issuer(data)
    path = Trust(load_config(config_file).trust_directory).add("issuers", found.name, data)
    click.echo(f"trusted issuer {found.name} ({found.issuer}, {found.kind}, {len(found.keys)} keys) in {path}")


@trust.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    for found in owners:
        click.echo(f"owner   {found['name']:<20} {found['id']}")
    for entry in issuers:
        click.echo(f"issuer  {entry['name']:<20} {entry['issuer']} ({entry['type']}, {len(entry['keys'])} keys)")


@trust.command("rm")
@click.argument("kind", type=click.Choice(["owner", "issuer"]))
@click.argument("name")
@click.pass_obj
def remove_trust(config_file: str, kind: str, name: str) -> None:
    """Trust an owner or issuer no longer; running containers keep what they have."""
    if "/" in name or name.startswith("."):
        raise TrustInvalid(f"{name} is not a name")
    Trust(load_config(config_file).trust_directory).remove(f"{kind}s", name)
    click.echo(f"removed {kind} {name}")


COMMANDS = {"trust": trust}
