"""The list of revocations: what a model's owner no longer allows on one device, pinned by the device's counter.

Pure. The list says which generation of each model line is the lowest that may start; its `value` is what the device's
NV counter is counted up to when the list is applied. What the TPM enforces are the grants' maxima: a grant for a lower
value opens no more. Specification: docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.access_policy import TIME_HIGH
from oci_hook.bundle.manifest import sign_owned
from oci_hook.bundle.model import GENERATION_HIGH
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.jws import UnverifiedJws, parse_document, verify_compact
from oci_hook.key_errors import RevocationsMissing
from oci_hook.trust import NAME, NAME_LIMIT, Owner

REVOCATIONS_TYP: Final = "scz-smm-revocations+jwt"
REVOCATIONS_LIMIT_BYTES: Final = 1 << 20
LINES_LIMIT: Final = 4096
_SCHEMA: Final = "scz-smm/revocations/v1"
_NAME_BYTES: Final = 34  # a TPM Name: 0x000b (SHA-256) and the digest
_VALUE_HIGH: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Revocations:
    """A list, verified as its owner's by `verify_revocations`, or to be signed.

    Attributes:
        owner_id: The owner's.
        device_name: As the device was enrolled.
        ak_name: Name of its attestation key, 34 bytes.
        counter_index: NV index of the owner's counter on the device.
        counter_name: Its Name, 34 bytes.
        value: What the counter is counted up to.
        created: Seconds since 1970.
        lines: Model name and lowest generation that may start, sorted by name; other lines are not restricted.
    """

    owner_id: str
    device_name: str
    ak_name: bytes
    counter_index: int
    counter_name: bytes
    value: int
    created: int
    lines: tuple[tuple[str, int], ...]

    def lowest_generation(self, model_name: str) -> int:
        """The lowest generation of a model line that may start; 1: all may."""
        return dict(self.lines).get(model_name, 1)


@dataclass(frozen=True, slots=True)
class UnverifiedRevocations:
    """A list whose signature was not looked at: only the owner id that it claims can be read."""

    owner_id: str
    _jws: UnverifiedJws

    @property
    def unverified_payload(self) -> bytes:
        """What it says, for `sczctl inspect`."""
        return self._jws.unverified_payload


def parse_revocations(compact: bytes) -> UnverifiedRevocations:
    """Take a list's compact bytes, at most 1 MiB, apart.

    Raises:
        RevocationsMissing: Not a JWS with the list's header.
    """
    jws = parse_document(
        compact,
        typ=REVOCATIONS_TYP,
        limit_bytes=REVOCATIONS_LIMIT_BYTES,
        what="list of revocations",
        error=RevocationsMissing,
    )
    return UnverifiedRevocations(owner_id=str(jws.unverified_header["kid"]), _jws=jws)


def verify_revocations(unverified: UnverifiedRevocations, *, owner: Owner) -> Revocations:
    """Verify a list as this owner's.

    Raises:
        RevocationsMissing: Another owner's, not signed by it, or signed against the specification.
    """
    if unverified.owner_id != owner.owner_id:
        raise RevocationsMissing(f"the list of revocations is by {shown(unverified.owner_id)}, not by {owner.name}")
    payload = verify_compact(unverified._jws, owner.manifest_key, "ES256", error=RevocationsMissing)
    return _parse_payload(payload, owner.owner_id)


def _tpm_name(fields: Fields, name: str) -> bytes:
    value = fields.hexadecimal(name, low=_NAME_BYTES, high=_NAME_BYTES)
    if value[:2] != b"\x00\x0b":
        raise RevocationsMissing(f"list of revocations: {name!r} is not a Name with SHA-256")
    return value


def _line(value: object) -> tuple[str, int]:
    fields = Fields(value, what="list of revocations: a line", error=RevocationsMissing)
    line = (
        fields.string("model", pattern=NAME, limit=NAME_LIMIT),
        fields.integer("lowest_generation", low=1, high=GENERATION_HIGH),
    )
    fields.finish()
    return line


def _parse_payload(payload: bytes, owner_id: str) -> Revocations:
    what, error = "list of revocations", RevocationsMissing
    document = parse_object(payload, limit_bytes=REVOCATIONS_LIMIT_BYTES, what=what, error=error)
    fields: Fields = Fields(document, what=what, error=error)
    fields.literal("schema", _SCHEMA)
    device, counter = fields.fields("device"), fields.fields("counter")
    found = Revocations(
        owner_id=owner_id,
        device_name=device.string("name", pattern=NAME, limit=NAME_LIMIT),
        ak_name=_tpm_name(device, "ak_name"),
        counter_index=counter.integer("index", low=0x01000000, high=0x01FFFFFF),  # TPM 2.0 Part 2, section 7.2: NV
        counter_name=_tpm_name(counter, "name"),
        value=counter.integer("value", low=0, high=_VALUE_HIGH),
        created=fields.integer("created", low=0, high=TIME_HIGH),
        lines=fields.items("lines", _line, low=0, high=LINES_LIMIT),
    )
    for part in (device, counter, fields):
        part.finish()
    names = [name for name, _ in found.lines]
    if names != sorted(set(names)):
        raise error("list of revocations: its lines are not sorted by name, each there once")
    return found


def sign_revocations(revocations: Revocations, *, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a list with the owner's manifest key; its compact bytes.

    Raises:
        RevocationsMissing: Something that a reader would refuse.
        KeyInvalid: The key is not that of `revocations.owner_id`.
    """
    lines = [{"model": name, "lowest_generation": lowest} for name, lowest in revocations.lines]
    counter = {"index": revocations.counter_index, "name": revocations.counter_name.hex()}
    payload = canonical(
        {
            "schema": _SCHEMA,
            "device": {"name": revocations.device_name, "ak_name": revocations.ak_name.hex()},
            "counter": {**counter, "value": revocations.value},
            "created": revocations.created,
            "lines": lines,
        }
    )
    _parse_payload(payload, revocations.owner_id)
    return sign_owned(payload, typ=REVOCATIONS_TYP, owner_id=revocations.owner_id, key=key)
