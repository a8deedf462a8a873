"""Whom a host trusts: model owners and token issuers, as their files in the trust folder name them.

Pure: bytes in, frozen values out. It neither finds the files nor decides that they are trusted; that they lie in a
folder which only root can write does. Specification: docs/specification.md, "Owner" and "Identity token"; RFC 7517.
"""

from __future__ import annotations

from dataclasses import dataclass

from oci_hook.documents import Fields, parse_object
from oci_hook.errors import TrustInvalid
from oci_hook.jws import PublicJwk, owner_jwk, parse_jwk

NAME = r"[a-z0-9]+([._-][a-z0-9]+)*"  # of models, owners, devices, device classes and issuers
NAME_LIMIT = 64
PLAIN_TEXT = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+"  # of issuers, audiences, subjects: one line
OWNER_LIMIT_BYTES = 16 * 1024
ISSUER_LIMIT_BYTES = 256 * 1024
KEYS_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Owner:
    """A model owner. `owner_id` is the manifest key's thumbprint; `document` the file's own bytes."""

    name: str
    owner_id: str
    manifest_key: PublicJwk
    boot_policy_key: PublicJwk
    recovery_key: PublicJwk
    document: bytes


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer of identity tokens. `kind` is `kubernetes`, `spiffe` or `oidc`; `issuer` is its `iss`, exactly."""

    name: str
    issuer: str
    kind: str
    keys: tuple[PublicJwk, ...]


def _key(value: object) -> PublicJwk:
    return owner_jwk(value, error=TrustInvalid)


def _issuer_key(value: object) -> PublicJwk:
    return parse_jwk(value, error=TrustInvalid)


def parse_owner(data: bytes) -> Owner:
    """Parse an `owner.json`.

    Args:
        data: The file's bytes, at most 16 KiB.

    Raises:
        TrustInvalid: Malformed, a key that is not on P-256, or one key in two roles.
    """
    fields = Fields(
        parse_object(data, limit_bytes=OWNER_LIMIT_BYTES, what="owner file", error=TrustInvalid),
        what="owner file",
        error=TrustInvalid,
    )
    fields.literal("schema", "scz-smm/owner/v1")
    name = fields.string("name", pattern=NAME, limit=NAME_LIMIT)
    manifest_key = _key(fields.take("manifest_key"))
    boot_policy_key = _key(fields.take("boot_policy_key"))
    recovery_key = _key(fields.take("recovery_key"))
    fields.finish()
    # One key in two roles: what it signs as a boot policy could be taken for something else, and the other way round.
    if len({manifest_key.thumbprint, boot_policy_key.thumbprint, recovery_key.thumbprint}) != 3:
        raise TrustInvalid("owner file: one key stands in two roles")
    return Owner(
        name=name,
        owner_id=manifest_key.thumbprint,
        manifest_key=manifest_key,
        boot_policy_key=boot_policy_key,
        recovery_key=recovery_key,
        document=data,
    )


def parse_issuer(data: bytes) -> Issuer:
    """Parse an issuer's file with its JWK set.

    Args:
        data: The file's bytes, at most 256 KiB.

    Raises:
        TrustInvalid: Malformed, no key, more than 64, a key that `parse_jwk` refuses, one key twice, or two keys of one
            type and `kid`.
    """
    fields = Fields(
        parse_object(data, limit_bytes=ISSUER_LIMIT_BYTES, what="issuer file", error=TrustInvalid),
        what="issuer file",
        error=TrustInvalid,
    )
    fields.literal("schema", "scz-smm/issuer/v1")
    name = fields.string("name", pattern=NAME, limit=NAME_LIMIT)
    issuer = fields.string("issuer", pattern=PLAIN_TEXT)
    kind = fields.string("type", pattern="kubernetes|spiffe|oidc")
    jwks = fields.fields("jwks")
    fields.finish()
    keys = jwks.items("keys", _issuer_key, low=1, high=KEYS_LIMIT)
    jwks.rest()  # RFC 7517, section 5: further members of a JWK set are ignored (SPIFFE's bundles have some)
    if len({key.thumbprint for key in keys}) != len(keys):
        raise TrustInvalid("issuer file: a key is there twice")
    # RFC 7517, section 4.5: one kid for two keys is meant for keys of different types only.
    named = [(key.kid, key.kty, key.crv) for key in keys if key.kid is not None]
    if len(set(named)) != len(named):
        raise TrustInvalid("issuer file: two keys of one type have one kid")
    return Issuer(name=name, issuer=issuer, kind=kind, keys=keys)
