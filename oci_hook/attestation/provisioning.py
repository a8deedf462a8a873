"""What a host makes in its TPM at an enrolment: SRK, AK and a counter for the owner; each only if it is not there.

It decides what to make and where; the commands are `tpm`'s, which mixes this in. The hook never comes here: creating a
primary key can take seconds. Specification: docs/specification.md, "Enrolment", handles; TCG TPM v2.0 Provisioning
Guidance, 7.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Final, Literal, Protocol

from oci_hook.attestation.host_device import AskedAgain, HostDevice
from oci_hook.attestation.key_checks import COUNTER_ATTRIBUTES, counter_indices, verify_counter, verify_srk
from oci_hook.attestation.structures import Handle, NvPublic, Public
from oci_hook.errors import DeviceInvalid, TpmFailed

SRK_HANDLES: Final = range(0x81000001, 0x81000021)  # the first is TCG's; the others if a stranger's key lies there
AK_HANDLES: Final = range(0x81010100, 0x81010120)


class ProvisioningCommands(Protocol):
    """What provisioning asks of a TPM, and the provisioning."""

    def _find(self, handle: int) -> Handle | None: ...

    def _name(self, handle: Handle) -> bytes: ...

    def _read_public(self, handle: Handle) -> Public: ...

    def _serialise(self, handle: Handle) -> bytes: ...

    def _create_primary(self, kind: Literal["srk", "ak"], handles: ExitStack) -> tuple[Handle, Public]: ...

    def _make_persistent(self, primary: Handle, place: int) -> None: ...

    def _nv_read_public(self, index: Handle) -> NvPublic: ...

    def _nv_define_counter(self, index: int) -> None: ...

    def increment_counter(self, index: int) -> int: ...

    def read_counter(self, index: int) -> int: ...

    def provision(self, owner_id: str, known: HostDevice | None, *, newest_grant: int = 0) -> HostDevice:
        """Make, or find again, what an enrolment with this owner needs.

        The counter's value at the enrolment stays that of the one that was accepted: asking is not enrolling. Of keys
        or a counter that were not there before, it is the value now.

        Args:
            owner_id: For whom the counter is.
            known: What this host remembers of an earlier enrolment.
            newest_grant: When the newest grant was made that it has of that owner, in seconds since 1970; 0: none.

        Returns:
            What the host shall remember.

        Raises:
            TpmFailed: No free handle or index is left, or the TPM cannot make a key.
        """
        srk_handle, srk, serialised = self._srk(known)
        ak_handle, ak = self._ak(known)
        device = HostDevice(srk_handle, srk, serialised, ak_handle, ak, MappingProxyType({}))
        if known is not None:
            counters, values, asked = known.counters, known.counter_values, known.asked_again
            device = replace(device, counters=counters, counter_values=values, asked_again=asked)
        counter = self._counter(owner_id, device)
        value = self.read_counter(counter.index)
        enrolled = _enrolled_value(known, device, owner_id, counter)
        if enrolled in (None, value):
            return device.with_counter(owner_id, counter, value)
        return device.with_counter(owner_id, counter, enrolled, AskedAgain(value, newest_grant))

    def _holds(self, handle: int, name: bytes) -> bool:
        found = self._find(handle)
        return found is not None and self._name(found) == name

    def _srk(self, known: HostDevice | None) -> tuple[int, Public, bytes]:
        if known is not None and self._holds(known.srk_handle, known.srk.name):
            return known.srk_handle, known.srk, known.srk_serialised
        found = self._find(SRK_HANDLES[0])
        if found is not None:  # the distribution or another program made it; an owner accepts it if it is of the kind
            try:
                srk = self._read_public(found)
                verify_srk(srk, error=DeviceInvalid)
                return SRK_HANDLES[0], srk, self._serialise(found)
            except DeviceInvalid:
                pass
        place, srk, handle = self._persisted("srk", SRK_HANDLES)
        return place, srk, self._serialise(handle)

    def _ak(self, known: HostDevice | None) -> tuple[int, Public]:
        if known is not None and self._holds(known.ak_handle, known.ak.name):
            return known.ak_handle, known.ak
        place, ak, _ = self._persisted("ak", AK_HANDLES)
        return place, ak

    def _persisted(self, kind: Literal["srk", "ak"], places: Iterable[int]) -> tuple[int, Public, Handle]:
        """Create a primary key and persist it at the first free handle, or find it at one."""
        with ExitStack() as handles:
            primary, public = self._create_primary(kind, handles)
            for place in places:
                found = self._find(place)
                if found is None:
                    self._make_persistent(primary, place)
                    found = self._find(place)
                if found is not None and self._name(found) == public.name:
                    return place, public, found
        raise TpmFailed(
            "no persistent handle is free", remedy="`tpm2_getcap handles-persistent` shows them; remove one of no use"
        )

    def _counter(self, owner_id: str, device: HostDevice) -> NvPublic:
        others = {counter.index for owner, counter in device.counters.items() if owner != owner_id}
        for index in counter_indices(owner_id):
            if index in others:  # two owners whose ids begin alike: each has a counter of its own
                continue
            try:
                counter = self._written_counter(index)
                verify_counter(counter, owner_id, error=DeviceInvalid)
            except DeviceInvalid:  # a stranger's index
                continue
            return counter
        raise TpmFailed(
            "no NV index is free for the owner's counter",
            remedy="`tpm2_getcap handles-nv-index` shows them; remove one of no use",
        )

    def _written_counter(self, index: int) -> NvPublic:
        """What lies at an index; a new counter, written once, if nothing does: only then it has its final Name."""
        if self._find(index) is None:
            self._nv_define_counter(index)
        counter = self.nv_public(index)
        if counter.attributes == COUNTER_ATTRIBUTES:  # new, or an earlier enrolment ended before the first write
            self.increment_counter(index)
            counter = self.nv_public(index)
        return counter

    def nv_public(self, index: int) -> NvPublic:
        """The public area of an NV index.

        Raises:
            DeviceInvalid: There is none, or it is of an unknown kind.
        """
        found = self._find(index)
        if found is None:
            raise DeviceInvalid(f"the TPM has no NV index {index:#x}")
        return self._nv_read_public(found)


def _enrolled_value(known: HostDevice | None, device: HostDevice, owner_id: str, counter: NvPublic) -> int | None:
    """The counter's value at the enrolment, if it was with these keys and this counter; None: not so, or not known."""
    if known is None or (known.srk.name, known.ak.name) != (device.srk.name, device.ak.name):
        return None
    before = known.counters.get(owner_id)
    return known.counter_values.get(owner_id) if before is not None and before.name == counter.name else None
