"""What an owner's folder holds beside the keys: content keys, model lines, devices, waiting challenges, grants.

Files of mode 0600, each there whole or not at all. Device records and challenges are kept as the bytes that
`attestation.enrolment` reads and writes. Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oci_hook.bundle.grant import Grant
from oci_hook.bundle.model import VERSION, ModelId, parse_model_id
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object, shown
from oci_hook.errors import DeviceInvalid, GrantInvalid, GrantRefused, KeyInvalid, OutputExists, SczError
from oci_hook.owner.folder import RECORD_LIMIT_BYTES, OwnerFolder, checked_name
from oci_hook.owner.grant_copies import verify_copy, verify_owned
from oci_hook.owner.lines import Line, format_line, parse_line
from oci_hook.owner.parallel import map_chunks
from oci_hook.owner.staged import save_together
from oci_hook.trust import NAME

_SCHEMA = "scz-smm/content-key/v1"
_NO_SUCH_KEY = "`sczctl pack` makes a version's key; check --keys and the model's name and version"
_NO_SUCH_DEVICE = "`sczctl enroll` enrols a device; check --keys and the device's name"


@dataclass(frozen=True, slots=True)
class ContentKeyRecord:
    """A model version's content key, sealed to the owner's recovery key, and the digests of its bundle.

    `broker`: its access policy asks for a broker's share in every grant.
    """

    model: ModelId
    manifest_digest: str
    image_digest: str
    sealed_key: bytes
    broker: bool = False


def _version(value: str, error: type[SczError]) -> str:
    if not re.fullmatch(VERSION, value):
        raise error(f"{shown(value)} is not a version")
    return value


def _grant_parts(grant: Grant) -> tuple[str, ...]:
    return "grants", grant.model.name, grant.model.version, f"{grant.device_name}.grant"


class OwnerRecords(OwnerFolder):
    """The records of one owner's folder, as `keyring.create_keyring` made it."""

    # --- content keys ---

    def verify_new_version(self, name: str, version: str) -> None:
        """Check, before packing, that no content key of this version would be in the way.

        Raises:
            OutputExists: There is one; a version is packed once.
            KeyInvalid: Not a name or version.
        """
        path = self.folder.joinpath(*self._content_key_parts(name, version))
        if os.path.lexists(path):
            raise OutputExists(
                f"{name}:{version} was packed before: {shown(path)}",
                remedy="give another version; to pack this one again, remove that file: its bundles open no more",
            )

    def save_content_key(self, record: ContentKeyRecord) -> None:
        """Keep a content key.

        Raises:
            OutputExists: This version has one; without it the bundle that it opens would be lost.
            FileUnreadable: The system said no.
        """
        data = canonical(
            {
                "schema": _SCHEMA,
                "model": record.model.document(),
                "manifest": record.manifest_digest,
                "image": record.image_digest,
                "sealed_key": encode_base64url(record.sealed_key),
                **({"broker": True} if record.broker else {}),
            }
        )
        self._save(self._content_key_parts(record.model.name, record.model.version), data, replace=False)

    def load_content_key(self, name: str, version: str) -> ContentKeyRecord:
        """A version's content key, still sealed.

        Raises:
            KeyInvalid: There is none, or it is malformed.
            FileUnreadable: The system said no.
        """
        data = self._load(self._content_key_parts(name, version), KeyInvalid, _NO_SUCH_KEY)
        try:
            record = _parse_content_key(data)
        except KeyInvalid as cause:
            raise KeyInvalid(f"{name}:{version}: {cause.message}", remedy=cause.advice) from cause
        if (record.model.name, record.model.version) != (name, version):
            raise KeyInvalid(f"the content key of {name}:{version} is another model's")
        return record

    def content_keys(self) -> tuple[tuple[str, str], ...]:
        """Name and version of every model that was packed, sorted."""
        return tuple(
            (name, version)
            for name in self._names(("models",), suffix="", pattern=NAME)
            for version in self._names(("models", name), suffix=".json", pattern=VERSION)
        )

    def _content_key_parts(self, name: str, version: str) -> tuple[str, ...]:
        return "models", checked_name(name, KeyInvalid), f"{_version(version, KeyInvalid)}.json"

    # --- model lines ---

    def load_line(self, name: str) -> Line:
        """What was revoked of a model line; nothing, if that was never said.

        Raises:
            KeyInvalid: Not a name, or the record is malformed.
            FileUnreadable: The system said no.
        """
        if not os.path.lexists(self.folder / "lines" / f"{checked_name(name, KeyInvalid)}.json"):
            return Line(name)
        try:
            line = parse_line(self._load(("lines", f"{name}.json"), KeyInvalid, KeyInvalid.remedy))
        except KeyInvalid as cause:
            raise KeyInvalid(f"{name}: {cause.message}", remedy=cause.advice) from cause
        if line.model != name:
            raise KeyInvalid(f"the record of the model line {name} is that of {line.model}")
        return line

    def save_line(self, line: Line) -> None:
        """Keep what was revoked of a model line (FileUnreadable)."""
        self._save(("lines", f"{checked_name(line.model, KeyInvalid)}.json"), format_line(line), replace=True)

    def lines(self) -> tuple[Line, ...]:
        """Every model line of which something was revoked, sorted by name (KeyInvalid, FileUnreadable)."""
        return tuple(self.load_line(name) for name in self._names(("lines",), suffix=".json", pattern=NAME))

    # --- devices ---

    def save_device(self, name: str, data: bytes) -> None:
        """Keep a device's record; a device that enrols again replaces its own.

        Raises:
            DeviceInvalid: Not a device's name.
            FileUnreadable: The system said no.
        """
        self._save(("devices", f"{checked_name(name, DeviceInvalid)}.json"), data, replace=True)

    def load_device(self, name: str) -> bytes:
        """A device's record, at most 1 MiB.

        Raises:
            DeviceInvalid: There is none.
            FileUnreadable: The system said no.
        """
        return self._load(("devices", f"{checked_name(name, DeviceInvalid)}.json"), DeviceInvalid, _NO_SUCH_DEVICE)

    def devices(self) -> tuple[str, ...]:
        """The names of the enrolled devices, sorted."""
        return self._names(("devices",), suffix=".json", pattern=NAME)

    def remove_device(self, name: str) -> None:
        """Take a device's record away, once it was set aside (`former`; FileUnreadable)."""
        self._remove(self.folder / "devices" / f"{checked_name(name, DeviceInvalid)}.json")

    # --- challenges that wait for an answer ---

    def save_pending(self, device: str, data: bytes) -> None:
        """Keep what the answer to a challenge will be checked with; a newer challenge replaces an older one."""
        self._save(("pending", f"{checked_name(device, DeviceInvalid)}.json"), data, replace=True)

    def load_pending(self, device: str) -> bytes:
        """What a device's challenge left.

        Raises:
            DeviceInvalid: No challenge waits for this device.
        """
        remedy = "begin again: `sczctl enroll challenge REQUEST`"
        return self._load(("pending", f"{checked_name(device, DeviceInvalid)}.json"), DeviceInvalid, remedy)

    def remove_pending(self, device: str) -> None:
        """A challenge is answered once.

        Raises:
            FileUnreadable: The system said no.
        """
        self._remove(self.folder / "pending" / f"{checked_name(device, DeviceInvalid)}.json")

    # --- grants that were given ---

    def save_grant(self, grant: Grant, compact: bytes) -> None:
        """Keep a copy of a grant, for `sczctl list --grants`; a newer one for the device replaces it.

        Raises:
            FileUnreadable: The system said no.
        """
        self._save(_grant_parts(grant), compact, replace=True)

    def save_grants(
        self, made: Sequence[tuple[Grant, bytes]], writers: Executor, progress: Callable[[int], object]
    ) -> None:
        """Keep copies of many grants: all are written and synced before the first is renamed into its place.

        Args:
            made: At most one for each version and device.
            writers: In which the files are written side by side.
            progress: Called with the number of files written so far.

        Raises:
            FileUnreadable: The system said no; none was kept.
        """
        files = [(self.folder.joinpath(*_grant_parts(grant)), compact) for grant, compact in made]
        save_together(self.folder, files, writers, progress)

    def grants_of(self, name: str, version: str) -> dict[str, Grant]:
        """The grants of one version that were kept, by device; the owner's, but one may lie in another's place."""
        owner = self._load_owner()
        devices = self._names(("grants", name, version), suffix=".grant", pattern=NAME)
        places = {device: (name, version, device) for device in devices}
        return {device: verify_owned(self._copy(place), owner, place) for device, place in places.items()}

    def remove_grant(self, grant: Grant) -> None:
        """Forget a grant that was revoked, unless its place is another one's by now (FileUnreadable)."""
        place = grant.model.name, grant.model.version, grant.device_name
        with suppress(GrantInvalid, GrantRefused, KeyInvalid):
            if verify_copy(self._copy(place), self._load_owner(), place) == grant:
                self._remove(self.folder.joinpath(*_grant_parts(grant)))

    def copies_of(self, device: str) -> tuple[tuple[Grant, bytes], ...]:
        """The grants to one device that were kept, with their bytes; damaged ones are left out (FileUnreadable)."""
        owner, found = self._load_owner(), []
        for name in self._names(("grants",), suffix="", pattern=NAME):
            for version in self._names(("grants", name), suffix="", pattern=VERSION):
                if os.path.lexists(self.folder / "grants" / name / version / f"{device}.grant"):
                    with suppress(GrantInvalid, GrantRefused, KeyInvalid):
                        data = self._copy((name, version, device))
                        found.append((verify_copy(data, owner, (name, version, device)), data))
        return tuple(found)

    def grants(self, strict: Collection[str] | None = None) -> tuple[Grant, ...]:
        """Every grant that was kept, verified as this owner's own, sorted by model, version and device.

        Args:
            strict: What is damaged is refused of these devices, and left out of all others, so that it is in nobody's
                way; None: it is refused of all.

        Raises:
            GrantInvalid, GrantRefused: A file there is not that grant, or not this owner's; the message names it.
            KeyInvalid: Not an owner's folder.
        """
        self._load_owner()
        places = [
            (name, version, device)
            for name in self._names(("grants",), suffix="", pattern=NAME)
            for version in self._names(("grants", name), suffix="", pattern=VERSION)
            for device in self._names(("grants", name, version), suffix=".grant", pattern=NAME)
        ]
        found = map_chunks(partial(_verified_grants, self.folder, strict), places)
        return tuple(grant for grant in found if grant is not None)

    def _copy(self, place: tuple[str, str, str]) -> bytes:
        return self._load(("grants", *place[:2], f"{place[2]}.grant"), KeyInvalid, KeyInvalid.remedy)


def _verified_grants(
    folder: Path, strict: Collection[str] | None, places: Sequence[tuple[str, str, str]]
) -> list[Grant | None]:
    """The grants by model, version and device, None for one that is left out; also in a worker (`parallel`)."""
    records = OwnerRecords(folder)
    owner, found = records._load_owner(), list[Grant | None]()
    for place in places:
        try:
            found.append(verify_copy(records._copy(place), owner, place))
        except (GrantInvalid, GrantRefused, KeyInvalid):
            if strict is None or place[2] in strict:
                raise
            found.append(None)
    return found


def _parse_content_key(data: bytes) -> ContentKeyRecord:
    what = "content key"
    fields = Fields(
        parse_object(data, limit_bytes=RECORD_LIMIT_BYTES, what=what, error=KeyInvalid), what=what, error=KeyInvalid
    )
    fields.literal("schema", _SCHEMA)
    record = ContentKeyRecord(
        model=parse_model_id(fields.fields("model")),
        manifest_digest=fields.digest("manifest"),
        image_digest=fields.digest("image"),
        sealed_key=fields.base64url("sealed_key", low=1, high=1024),
        broker=fields.boolean("broker") if fields.has("broker") else False,
    )
    fields.finish()
    return record
