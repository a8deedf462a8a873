"""What this host keeps of its enrolments, `device.json`: who changes it holds the store's lock from reading to writing.

An enrolment is asked for here and accepted elsewhere; a grant that comes later is the only sign of it. The TPM's part
is the caller's. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from oci_hook.attestation.host_device import HostDevice, format_host_device
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.errors import DeviceNotEnrolled, SczError
from oci_hook.placement import locked
from oci_hook.store import Store, entries
from oci_hook.trust import Owner

T = TypeVar("T")


def ask_for_enrolment(
    store: Store, owner: Owner, provision: Callable[[HostDevice | None, int], tuple[HostDevice, T]]
) -> T:
    """Keep a device as the TPM provisions it for an owner, with what it has for others.

    Args:
        store: This host's.
        owner: Who is asked.
        provision: Given the device so far (None: there is none) and `newest_grant`, gives the device as it shall be
            kept, and what the caller wants. It may take the TPM's lock: whoever holds that waits for none of the store.

    Raises:
        FileUnreadable: `device.json` cannot be written.
        SczError: As `provision` raises it; nothing was written.
    """
    with locked(store):
        try:
            known = store.load_device()
        except DeviceNotEnrolled:
            known = None
        device, result = provision(known, newest_grant(store, owner))
        store.save_device(format_host_device(device))
    return result


def newest_grant(store: Store, owner: Owner) -> int:
    """When the newest grant of an owner's in the store was made, in seconds since 1970; 0: there is none.

    Raises:
        FileUnreadable: The store cannot be read.
    """
    newest = 0
    for name in entries(store.path("grants")):
        with suppress(SczError):  # another owner's, or damaged
            data = store.load_grant(f"sha256:{name.removesuffix('.jwt')}")
            newest = max(newest, verify_grant_signature(parse_grant(data), owner=owner).created)
    return newest


def remember_granted(store: Store, grants: Iterable[Grant]) -> None:
    """See in verified grants for this host that an enrolment which it asked for was accepted: nothing else tells it.

    Raises:
        FileUnreadable: `device.json` cannot be written.
    """
    with locked(store):
        device = before = store.load_device()
        for grant in grants:
            counter = device.counters.get(grant.owner_id)
            if counter is None or counter.name != grant.counter.name:
                continue
            device = device.granted(grant.owner_id, maximum=grant.counter.maximum, created=grant.created)
        if device != before:
            store.save_device(format_host_device(device))
