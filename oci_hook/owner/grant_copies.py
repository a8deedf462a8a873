"""The copies of grants that an owner's folder keeps: each is what its name says, or refused with that name.

Pure; `records` reads them. Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.errors import GrantInvalid, GrantRefused
from oci_hook.trust import Owner


def verify_copy(data: bytes, owner: Owner, place: tuple[str, str, str]) -> Grant:
    """Verify a copy as this owner's grant of that version to that device.

    Args:
        data: Its bytes.
        owner: Whose folder it is.
        place: Model name, version and device, by which it is kept.

    Raises:
        GrantInvalid: Malformed, or another version's or device's grant.
        GrantRefused: Not this owner's.
    """
    grant = verify_owned(data, owner, place)
    if (grant.model.name, grant.model.version, grant.device_name) != place:
        what, remedy = _words(place)
        named = f"{grant.model.name}:{grant.model.version} to {grant.device_name}"
        raise GrantInvalid(f"{what} is that of {named}", remedy=remedy)
    return grant


def verify_owned(data: bytes, owner: Owner, place: tuple[str, str, str]) -> Grant:
    """As `verify_copy`, but it may be any grant of this owner's: the caller looks which (`grant_batch.has_grant`)."""
    try:
        return verify_grant_signature(parse_grant(data), owner=owner)
    except (GrantInvalid, GrantRefused) as cause:
        what, remedy = _words(place)
        raise type(cause)(f"{what}: {cause.message}", remedy=remedy) from cause


def _words(place: tuple[str, str, str]) -> tuple[str, str]:
    name, version, device = place
    remedy = (
        f"put grants/{name}/{version}/{device}.grant back from a backup; without one, move it away, and grant "
        f"{name}:{version} to {device} again: a revocation would else not reach that device"
    )
    return f"the copy of the grant of {name}:{version} to {device}", remedy
