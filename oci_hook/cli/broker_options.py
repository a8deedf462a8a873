"""The options of `sczctl grant` and `revoke` for a key broker, OpenBao or Vault; what is shown of a grant's share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from oci_hook.documents import shown
from oci_hook.errors import KeyInvalid, TrustInvalid
from oci_hook.trusted_file import load_file

if TYPE_CHECKING:
    from oci_hook.bundle.grant import Grant
    from oci_hook.owner.broker_shares import OwnersBroker, RenewingBroker

_TOKEN_VARIABLES = ("BAO_TOKEN", "VAULT_TOKEN")
_TOKEN_BYTES = 4096
_NAMES = ("address", "ca_file", "key", "role", "mount", "auth", "token_file", "seconds")
_MOUNT, _AUTH = "transit", "auth/jwt"


def _options(*, renewing: bool) -> list[Callable[..., Any]]:
    """The options; for grants that take the place of older ones what was said of those needs not be said again."""

    def named(option: str, name: str, metavar: str, what: str, default: str | None = None) -> Callable[..., Any]:
        if renewing:
            more = f"With --broker: {what}; default: as each grant had it, and with it all of them get this one."
            return click.option(option, name, metavar=metavar, help=more)
        shown_default = default is not None
        return click.option(
            option, name, metavar=metavar, default=default, show_default=shown_default, help=f"With --broker: {what}."
        )

    return [
        click.option(
            "--broker",
            "address",
            metavar="ADDRESS",
            help="For a version packed with --broker: OpenBao or Vault, https://HOST:PORT, encrypts the other share.",
        ),
        click.option(
            "--broker-ca",
            "ca_file",
            type=click.Path(dir_okay=False),
            help="With --broker: the authority that vouches for its certificate (PEM), and no other.",
        ),
        named("--broker-key", "key", "NAME", "its transit key, made with derived=true"),
        named("--broker-role", "role", "NAME", "the role with which the containers log in"),
        named("--broker-mount", "mount", "PATH", "where its transit engine is", _MOUNT),
        named("--broker-auth", "auth", "PATH", "where its JWT auth method is", _AUTH),
        click.option(
            "--broker-token-file",
            "token_file",
            type=click.Path(dir_okay=False),
            help="With --broker: your token; default: the environment's BAO_TOKEN, then VAULT_TOKEN.",
        ),
        click.option(
            "--broker-timeout",
            "seconds",
            type=click.IntRange(1, 600),
            metavar="SECONDS",
            default=30,
            show_default=True,
            help="With --broker: give up after so long.",
        ),
    ]


def broker_options(*, renewing: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options, and their sum as its argument `broker`: None without --broker.

    Args:
        renewing: The grants take the place of older ones: `broker` is a `RenewingBroker`, else an `OwnersBroker`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_broker(*arguments: Any, **options: Any) -> Any:
            found = _broker(**{name: options.pop(name) for name in _NAMES}, renewing=renewing)
            return command(*arguments, broker=found, **options)

        for option in reversed(_options(renewing=renewing)):
            with_broker = option(with_broker)
        return with_broker

    return decorate


def _broker(
    address: str | None,
    ca_file: str | None,
    key: str | None,
    role: str | None,
    mount: str | None,
    auth: str | None,
    token_file: str | None,
    seconds: int,
    *,
    renewing: bool,
) -> OwnersBroker | RenewingBroker | None:
    if address is None:
        if ca_file or key or role or token_file:
            raise click.UsageError("--broker-ca, --broker-key, --broker-role and --broker-token-file go with --broker")
        return None
    if not ca_file:
        raise click.UsageError("--broker needs --broker-ca")
    from oci_hook.https_client import AUTHORITIES_LIMIT_BYTES, parse_endpoint
    from oci_hook.openbao import AUTH_PATH, MOUNT, NAME
    from oci_hook.owner.broker_shares import OwnersBroker, RenewingBroker

    patterns = {"--broker-key": (key, NAME), "--broker-role": (role, NAME)}
    patterns |= {"--broker-mount": (mount, MOUNT), "--broker-auth": (auth, AUTH_PATH)}
    for option, (value, pattern) in patterns.items():
        if value is not None and not re.fullmatch(pattern, value):
            raise click.UsageError(f"{option}: {shown(value)} is not of the form that a grant can carry")
    if not renewing and (not key or not role):
        raise click.UsageError("--broker needs --broker-ca, --broker-key and --broker-role")
    authorities = load_file(ca_file, limit_bytes=AUTHORITIES_LIMIT_BYTES, error=TrustInvalid)
    try:
        endpoint = parse_endpoint(address, authorities, error=TrustInvalid)
    except TrustInvalid as error:
        raise click.UsageError(f"--broker: {error.message}") from error
    if not renewing and key and role:
        return OwnersBroker(endpoint, _token(token_file), key, mount or _MOUNT, auth or _AUTH, role, seconds)
    return RenewingBroker(endpoint, _token(token_file), seconds, key, mount, auth, role)


def _token(token_file: str | None) -> str:
    """The owner's token: of a file or the environment, as arguments are for everybody to see."""
    if token_file is not None:
        text = load_file(token_file, limit_bytes=_TOKEN_BYTES, error=KeyInvalid).decode("utf-8", "replace").strip()
    else:
        text = next(filter(None, (os.environ.get(name) for name in _TOKEN_VARIABLES)), "")
    if not re.fullmatch(r"[\x21-\x7e]{1,2048}", text):
        raise KeyInvalid(
            "there is no usable token for the broker",
            remedy="give --broker-token-file FILE, or set BAO_TOKEN (`export BAO_TOKEN=$(bao print token)`)",
        )
    return text


def broker_document(grant: Grant) -> dict[str, Any]:
    """What `--json` shows of a grant's share: nothing without one; the context is what a broker's policy can name."""
    if grant.broker is None:
        return {}
    import base64

    from oci_hook.bundle.broker_share import share_context

    context = base64.b64encode(share_context(grant.owner_id, grant.model)).decode()
    named = {"key": grant.broker.key, "mount": grant.broker.mount, "auth": grant.broker.auth, "role": grant.broker.role}
    return {"broker": {**named, "context": context}}
