"""What a host makes in its TPM at an enrolment: SRK, AK and a counter for the owner; each only if it is not there.

It decides what to make and where; `tpm` does it. The hook never comes here: creating a primary can take seconds.
Specification: docs/specification.md, "Enrolment", handles; TCG TPM v2.0 Provisioning Guidance, 7.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Final, Protocol

from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.key_checks import COUNTER_ATTRIBUTES, counter_indices, verify_counter, verify_srk
from oci_hook.attestation.structures import NvPublic, Public
from oci_hook.errors import DeviceInvalid, TpmFailed

SRK_HANDLES: Final = range(0x81000001, 0x81000021)  # the first is TCG's; the others if a stranger's key lies there
AK_HANDLES: Final = range(0x81010100, 0x81010120)


class ProvisioningTpm(Protocol):
    """What provisioning asks of a TPM."""

    def persistent_name(self, handle: int) -> bytes | None:
        """The Name of what lies at a persistent handle."""

    def read_public(self, handle: int) -> Public:
        """The public area of what lies at a persistent handle."""

    def create_srk(self, handles: Iterable[int]) -> tuple[int, Public]:
        """Create the storage primary and persist it at the first free handle, or find it at one."""

    def create_ak(self, handles: Iterable[int]) -> tuple[int, Public]:
        """Create the attestation primary and persist it at the first free handle, or find it at one."""

    def serialise(self, handle: int, expected_name: bytes) -> bytes:
        """The serialised form of a persistent key."""

    def nv_public(self, index: int) -> NvPublic | None:
        """The public area of an NV index, None if there is none."""

    def define_counter(self, index: int) -> None:
        """Define a counter."""

    def write_counter(self, index: int) -> NvPublic:
        """Increment a counter for the first time: only then it has a value, and its final Name."""


def provision(tpm: ProvisioningTpm, owner_id: str, known: HostDevice | None) -> HostDevice:
    """Make, or find again, what an enrolment with this owner needs.

    Args:
        tpm: The TPM, under its lock.
        owner_id: For whom the counter is.
        known: What this host remembers of an earlier enrolment.

    Returns:
        What the host shall remember.

    Raises:
        TpmFailed: No free handle or index is left, or the TPM cannot make a key.
    """
    srk_handle, srk, serialised = _srk(tpm, known)
    ak_handle, ak = _ak(tpm, known)
    device = HostDevice(
        srk_handle=srk_handle,
        srk=srk,
        srk_serialised=serialised,
        ak_handle=ak_handle,
        ak=ak,
        counters=MappingProxyType(dict(known.counters) if known is not None else {}),
    )
    return device.with_counter(owner_id, _counter(tpm, owner_id, device))


def _srk(tpm: ProvisioningTpm, known: HostDevice | None) -> tuple[int, Public, bytes]:
    if known is not None and tpm.persistent_name(known.srk_handle) == known.srk.name:
        return known.srk_handle, known.srk, known.srk_serialised
    handle = SRK_HANDLES[0]
    srk = _fitting_srk(tpm, handle)
    if srk is None:
        handle, srk = tpm.create_srk(SRK_HANDLES)
    return handle, srk, tpm.serialise(handle, srk.name)


def _fitting_srk(tpm: ProvisioningTpm, handle: int) -> Public | None:
    """The storage root key that the distribution or another program made, if an owner would accept it."""
    if tpm.persistent_name(handle) is None:
        return None
    try:
        srk = tpm.read_public(handle)
        verify_srk(srk, error=DeviceInvalid)
    except DeviceInvalid:
        return None
    return srk


def _ak(tpm: ProvisioningTpm, known: HostDevice | None) -> tuple[int, Public]:
    if known is not None and tpm.persistent_name(known.ak_handle) == known.ak.name:
        return known.ak_handle, known.ak
    return tpm.create_ak(AK_HANDLES)


def _counter(tpm: ProvisioningTpm, owner_id: str, device: HostDevice) -> NvPublic:
    others = {counter.index for owner, counter in device.counters.items() if owner != owner_id}
    for index in counter_indices(owner_id):
        if index in others:  # two owners whose ids begin alike: each has a counter of its own
            continue
        try:
            found = tpm.nv_public(index)
            if found is None:
                tpm.define_counter(index)
            # The second: an earlier enrolment ended between the definition and the first write.
            if found is None or found.attributes == COUNTER_ATTRIBUTES:
                found = tpm.write_counter(index)
            verify_counter(found, owner_id, error=DeviceInvalid)
        except DeviceInvalid:  # a stranger's index
            continue
        return found
    raise TpmFailed(
        "no NV index is free for the owner's counter",
        remedy="`tpm2_getcap handles-nv-index` shows them; remove one that is of no use",
    )
