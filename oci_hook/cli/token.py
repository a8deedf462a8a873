"""`sczctl token`: identity tokens for hosts without Kubernetes, from an issuer that is this host's own.

Such a token says what the host's administrator says: a model's owner who does not want to rely on that pins the keys
of another issuer in the access policy (docs/threat-model.md).
"""

from __future__ import annotations

import os
import secrets
import time

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from oci_hook.cli.options import name_of, verify_new_output, write_output
from oci_hook.config import load_config
from oci_hook.documents import canonical
from oci_hook.errors import KeyInvalid, OutputExists, TrustInvalid
from oci_hook.jws import parse_jwk, public_jwk, sign_token
from oci_hook.trust import parse_issuer
from oci_hook.trusted_file import load_root_file, make_private_directory, replace_file


@click.group()
def token() -> None:
    """Issue identity tokens where there is no Kubernetes."""


def _key_path(config_file: str) -> str:
    return os.path.join(load_config(config_file).store_directory, "issuer", "issuer.key")


def _document_path(config_file: str) -> str:
    return os.path.join(os.path.dirname(_key_path(config_file)), "issuer.json")


def _load_key(path: str) -> ec.EllipticCurvePrivateKey:
    remedy = f"remove {path}, make an issuer anew (`sczctl token init`) and trust it"
    try:
        key = load_pem_private_key(load_root_file(path, limit_bytes=8 << 10, error=KeyInvalid), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        raise KeyInvalid(f"{path} is not a private key", remedy=remedy) from cause
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyInvalid(f"{path} is not an EC key", remedy=remedy)
    return key


@token.command()
@click.option("--issuer", metavar="URL", required=True, help="The `iss` claim, for example https://host.example/scz.")
@click.option(
    "--name",
    metavar="NAME",
    default="local",
    show_default=True,
    callback=name_of,
    help="Name of the issuer in the trust folder.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Also write the issuer's public file here.")
@click.pass_obj
def init(config_file: str, issuer: str, name: str, output: str | None) -> None:
    """Make this host's own issuer of tokens.

    That is a key (ES256), which stays here, and the public file for `sczctl trust add issuer`.
    """
    path = _key_path(config_file)
    if os.path.lexists(path):
        raise OutputExists(
            f"{path} exists: this host has an issuer already",
            remedy=f"its public file is {_document_path(config_file)}",
        )
    if output:
        verify_new_output(output)
    key = ec.generate_private_key(ec.SECP256R1())
    jwk = public_jwk(key.public_key())
    kid = parse_jwk(jwk, error=TrustInvalid).thumbprint
    document = canonical(
        {
            "schema": "scz-smm/issuer/v1",
            "name": name,
            "issuer": issuer,
            "type": "oidc",
            "jwks": {"keys": [{**jwk, "kid": kid, "alg": "ES256", "use": "sig"}]},
        }
    )
    parse_issuer(document)
    make_private_directory(os.path.dirname(os.path.dirname(path)))
    make_private_directory(os.path.dirname(path))
    replace_file(_document_path(config_file), document, mode=0o644)
    replace_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    if output:
        write_output(output, document)
    public = output or _document_path(config_file)
    click.echo(f"issuer {issuer} with key {kid}; trust it with: sczctl trust add issuer {public}")


@token.command()
@click.option(
    "--subject", metavar="SUBJECT", required=True, help="The workload, as the model's access policy names it."
)
@click.option("--audience", metavar="AUDIENCE", default="scz-smm", show_default=True, help="The `aud` claim.")
@click.option(
    "--ttl",
    "ttl_seconds",
    type=click.IntRange(30, 31_622_400),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="How long it is valid; the model's access policy sets a limit.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="File to write, mode 0600.")
@click.option("--force", is_flag=True, help="Replace a file that exists (renewal).")
@click.pass_obj
def issue(config_file: str, subject: str, audience: str, ttl_seconds: int, output: str, force: bool) -> None:
    """Issue a token for one container.

    Mount its file into the container. A token is bound to the first container that uses it while that one lives: issue
    one for each.
    """
    path = _key_path(config_file)
    if not os.path.lexists(path):
        raise KeyInvalid("this host has no issuer", remedy="run `sczctl token init --issuer URL`")
    if os.path.lexists(output) and not force:
        raise OutputExists(f"{output} exists", remedy="give --force to renew it in place")
    key = _load_key(path)
    issuer = parse_issuer(load_root_file(_document_path(config_file), limit_bytes=256 << 10, error=TrustInvalid))
    now = int(time.time())
    claims = {
        "iss": issuer.issuer,
        "sub": subject,
        "aud": [audience],
        "iat": now,
        "nbf": now,
        "exp": now + ttl_seconds,
        "jti": secrets.token_hex(16),
    }
    kid = issuer.keys[0].kid or issuer.keys[0].thumbprint
    replace_file(os.path.abspath(output), sign_token(claims, kid=kid, key=key, algorithm="ES256"), mode=0o600)
    click.echo(f"token for {subject}, valid {ttl_seconds} s, in {output}")


COMMANDS = {"token": token}
