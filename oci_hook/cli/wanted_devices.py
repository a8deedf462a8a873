"""Which devices a command of an owner's means: one, several, a class, all, or those of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from oci_hook.cli.options import read_input, verify_one_of
from oci_hook.errors import DeviceInvalid
from oci_hook.trust import NAME, NAME_LIMIT

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.owner.records import OwnerRecords

_ENROLL = "`sczctl enroll` it; check --keys"


@dataclass(frozen=True)
class WantedDevices:
    """Which devices a command means, by exactly one way."""

    devices: Sequence[str]
    device_class: str | None
    everyone: bool
    file: str | None
    missing: bool

    def __post_init__(self) -> None:
        ways = (bool(self.devices), self.device_class is not None, self.everyone, self.file is not None)
        if sum(ways) != 1:
            raise click.UsageError("say for whom, in one way: --device, --class, --all-devices or --devices-from")
        if len(set(self.devices)) != len(self.devices):
            raise click.UsageError("a --device is named twice")

    @property
    def is_one(self) -> bool:
        """Whether the output is a grant's file; otherwise it is a folder."""
        return len(self.devices) == 1 and not self.missing

    def load(self, records: OwnerRecords) -> list[DeviceRecord]:
        """Their records (DeviceInvalid: one is not enrolled, or damaged)."""
        from oci_hook.owner.grant_batch import load_devices

        enrolled = records.devices()
        names = self.devices if self.file is None else _names_in(self.file)
        known = set(enrolled)
        for name in names:
            if name not in known:
                verify_one_of("enrolled device", name, enrolled, DeviceInvalid, remedy=_ENROLL)
        found = load_devices(records, names or enrolled)
        if self.device_class is not None:
            found = [each for each in found if each.device_class == self.device_class]
        if not found:
            which = f"of class {self.device_class}" if self.device_class is not None else "at all"
            raise DeviceInvalid(f"there is no enrolled device {which}", remedy="`sczctl enroll` one; check --keys")
        return self._without_revoked(found, named=bool(names))

    def _without_revoked(self, found: list[DeviceRecord], *, named: bool) -> list[DeviceRecord]:
        """One revoked device must not stand in the way of a fleet; who names one is told."""
        revoked = [each.device for each in found if each.revoked is not None]
        if not revoked:
            return found
        if named or len(revoked) == len(found):
            raise DeviceInvalid(
                f"the device {revoked[0]} was revoked",
                remedy="leave it out; or `sczctl enroll` it anew, with --unrevoke at `accept`, if it is to have models "
                "again",
            )
        click.echo(f"left out, as they were revoked: {', '.join(revoked)}", err=True)
        return [each for each in found if each.revoked is None]


def _names_in(path: str) -> list[str]:
    """The device names of a file: one a line; empty lines, and what follows `#`, say nothing."""
    from oci_hook.attestation.ek_list import ENTRY_LIMIT
    from oci_hook.documents import shown

    lines = read_input(path, DeviceInvalid).decode("utf-8", "replace").split("\n")
    names = [name for line in lines if (name := line.partition("#")[0].strip(" \t\r"))]
    remedy = "give a file with a device's name a line"
    for name in names:
        if len(name) > NAME_LIMIT or not re.fullmatch(NAME, name):
            raise DeviceInvalid(f"{path}: {shown(name)} is not a device's name", remedy=remedy)
    if not 0 < len(names) <= ENTRY_LIMIT or len(set(names)) != len(names):
        problem = "names nobody" if not names else "names a device twice, or more than 10000"
        raise DeviceInvalid(f"{path} {problem}", remedy=remedy)
    return names
