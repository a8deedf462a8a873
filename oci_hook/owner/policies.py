"""The boot policies that an owner signed last: a copy for each model line and device class, for `boot-policy diff`.

    boot-policies/<model>/<class>.json        below the owner's folder, mode 0600

Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from oci_hook.attestation.boot_policy import LIMIT_BYTES, BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.bundle.files import closing, open_beneath, read_bounded, refusal
from oci_hook.documents import shown
from oci_hook.errors import BootPolicyInvalid, BootPolicyRefused, FileUnreadable, KeyInvalid
from oci_hook.trust import Owner, parse_owner
from oci_hook.trusted_file import replace_file

_FOLDER: Final = "boot-policies"


def save_boot_policy(folder: Path, model_name: str, device_class: str, document: bytes) -> None:
    """Keep a copy of a boot policy that was signed; it replaces the one before, as on the devices.

    Args:
        folder: The owner's.
        model_name: A name, checked.
        device_class: A name, checked.
        document: As `sign_boot_policy` made it.

    Raises:
        FileUnreadable: The system said no.
    """
    place = folder / _FOLDER / model_name
    try:
        for each in (folder / _FOLDER, place):
            each.mkdir(mode=0o700, exist_ok=True)
    except OSError as cause:
        raise FileUnreadable(f"{shown(place)}: {cause.strerror}") from cause
    replace_file(str(place / f"{device_class}.json"), document, mode=0o600)


def load_owner(folder: Path) -> Owner:
    """The owner whose folder it is (KeyInvalid)."""
    return parse_owner(_read(folder, ("owner.json",), KeyInvalid))


def load_boot_policy(folder: Path, owner: Owner, model_name: str, device_class: str) -> BootPolicy:
    """The copy of a boot policy, verified as this owner's own.

    Raises:
        BootPolicyInvalid: There is none, or it is malformed.
        BootPolicyRefused: It is not this owner's, or another line's.
    """
    try:
        data = _read(folder, (_FOLDER, model_name, f"{device_class}.json"), BootPolicyInvalid)
    except (BootPolicyInvalid, FileUnreadable) as cause:
        raise BootPolicyRefused(
            f"no boot policy for {model_name} and device class {device_class} is in the owner's folder",
            remedy="sign it anew with this version of sczctl, or give --boot-policy FILE",
        ) from cause
    return verify_boot_policy(parse_boot_policy(data), owner=owner, model_name=model_name, device_class=device_class)


def _read(folder: Path, parts: tuple[str, ...], error: type[KeyInvalid] | type[BootPolicyInvalid]) -> bytes:
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as cause:
        raise refusal(cause, f"the owner's folder {shown(folder)}", KeyInvalid) from cause
    with closing(directory), closing(open_beneath(directory, parts, error=error)) as descriptor:
        return read_bounded(descriptor, LIMIT_BYTES, shown("/".join(parts)), error=error)
