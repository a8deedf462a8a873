"""What an owner's folder keeps of devices that have another TPM, another AK or counter, or another name by now.

    former/devices/<name>.<id>.json                      the record as it was
    former/grants/<model>/<version>/<name>.<id>.grant    copies of grants that the name's record reaches no more

Nothing is granted by them. They say which TPMs were revoked, how far their counters have to count, and which grants
would stay open though their name is another's. Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Final

from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.bundle.model import VERSION
from oci_hook.errors import DeviceInvalid, GrantInvalid, GrantRefused, KeyInvalid
from oci_hook.owner.folder import OwnerFolder
from oci_hook.trust import NAME

_ID_DIGITS: Final = 16
_PLACE: Final = NAME + rf"\.[0-9a-f]{{{_ID_DIGITS}}}"
_REMEDY: Final = "put it back from a backup of the owner's folder"


def _id(*parts: bytes) -> str:
    return hashlib.sha256(b"\x00".join(parts)).hexdigest()[:_ID_DIGITS]


def _record_parts(record: DeviceRecord) -> tuple[str, ...]:
    keys = (record.ek_sha256.encode(), record.ak.name, record.srk.name, record.counter.name)
    return "former", "devices", f"{record.device}.{_id(*keys)}.json"


def _grant_parts(grant: Grant) -> tuple[str, ...]:
    name = f"{grant.device_name}.{_id(grant.ak_name, grant.srk_name, grant.counter.name)}.grant"
    return "former", "grants", grant.model.name, grant.model.version, name


class FormerRecords(OwnerFolder):
    """The records of one owner's folder that were set aside."""

    def save_device(self, record: DeviceRecord) -> None:
        """Keep a record that is to be replaced or renamed; the same keys again replace it (FileUnreadable)."""
        self._save(_record_parts(record), format_device_record(record), replace=True)

    def devices(self, *, strict: bool = True) -> tuple[DeviceRecord, ...]:
        """The records that were set aside, sorted by name.

        Args:
            strict: A damaged one is refused; otherwise it is left out.

        Raises:
            DeviceInvalid: A damaged one, by its name.
            FileUnreadable: The system said no.
        """
        found = []
        for place in self._names(("former", "devices"), suffix=".json", pattern=_PLACE):
            try:
                data = self._load(("former", "devices", f"{place}.json"), DeviceInvalid, _REMEDY)
                found.append(parse_device_record(data))
            except DeviceInvalid as cause:
                if strict:
                    raise DeviceInvalid(f"former/devices/{place}.json: {cause.message}", remedy=_REMEDY) from cause
        return tuple(found)

    def save_grant(self, grant: Grant, compact: bytes) -> None:
        """Keep a copy of a grant whose place will be another's (FileUnreadable)."""
        self._save(_grant_parts(grant), compact, replace=True)

    def remove_grant(self, grant: Grant) -> None:
        """Forget a grant that was revoked (FileUnreadable)."""
        self._remove(self.folder.joinpath(*_grant_parts(grant)))

    def grants(self, *, strict: bool = True) -> tuple[Grant, ...]:
        """The grants that were set aside, verified as this owner's own; a damaged one is refused or left out.

        Raises:
            GrantInvalid, GrantRefused: A damaged one; the message names its file.
            KeyInvalid: Not an owner's folder.
        """
        found = []
        for name in self._names(("former", "grants"), suffix="", pattern=NAME):
            for version in self._names(("former", "grants", name), suffix="", pattern=VERSION):
                parts = "former", "grants", name, version
                for place in self._names(parts, suffix=".grant", pattern=_PLACE):
                    with suppress(*(() if strict else (GrantInvalid, GrantRefused, KeyInvalid))):
                        found.append(self._grant((*parts, f"{place}.grant")))
        return tuple(found)

    def _grant(self, parts: tuple[str, ...]) -> Grant:
        try:
            grant = verify_grant_signature(
                parse_grant(self._load(parts, GrantInvalid, _REMEDY)), owner=self._load_owner()
            )
        except (GrantInvalid, GrantRefused) as cause:
            raise type(cause)(f"{'/'.join(parts)}: {cause.message}", remedy=_REMEDY) from cause
        if _grant_parts(grant) != parts:
            raise GrantInvalid(f"{'/'.join(parts)} is another grant's copy", remedy=_REMEDY)
        return grant
