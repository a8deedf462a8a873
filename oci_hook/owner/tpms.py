"""Which TPM a record or a grant is of, whatever the name: by EK, AK and SRK; and what the TPM's counter locks.

A name is the owner's word. What a TPM enforces hangs on its SRK and its counter, and one TPM can make several AKs and
EKs. So a record and a grant, or two records, are of one TPM if they have one of these keys in common. A counter is told
by its Name and the TPM: its Name alone is the same on every TPM where the index was free. Pure, but for
`KnownTpms.load`. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.bundle.grant import Grant
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.grant_batch import load_device
from oci_hook.owner.records import OwnerRecords

TpmKey = tuple[str, str | bytes]
CounterKey = tuple[bytes, bytes]


def tpm_keys(vouched: str, ek_sha256: str, ak_name: bytes, srk_name: bytes) -> frozenset[TpmKey]:
    """By what a TPM is known again: one of these in common, and it is the same."""
    return frozenset({(f"EK by {vouched}", ek_sha256), ("AK", ak_name), ("SRK", srk_name)})


def keys_of(record: DeviceRecord) -> frozenset[TpmKey]:
    """`tpm_keys` of a record."""
    return tpm_keys(record.vouched, record.ek_sha256, record.ak.name, record.srk.name)


def counter_keys(each: DeviceRecord | Grant) -> tuple[CounterKey, CounterKey]:
    """The counter that locks a grant, or that a record counts up: its Name, with SRK and with AK.

    A record reaches a grant if one is the same. The AK alone is, after TPM2_Clear; the SRK alone, with another AK.
    """
    if isinstance(each, Grant):
        return (each.srk_name, each.counter.name), (each.ak_name, each.counter.name)
    return (each.srk.name, each.counter.name), (each.ak.name, each.counter.name)


T = TypeVar("T", bound=DeviceRecord | Grant)


class ByCounter(Generic[T]):
    """Records or grants by the counter that they hang on."""

    def __init__(self, items: Iterable[T]) -> None:
        self._by_key: dict[CounterKey, list[T]] = {}
        for item in items:
            for key in set(counter_keys(item)):
                self._by_key.setdefault(key, []).append(item)

    def of(self, each: DeviceRecord | Grant) -> list[T]:
        """Those that hang on the same counter as `each`, each once, in their order."""
        by_srk, by_ak = counter_keys(each)
        found = self._by_key.get(by_srk, [])
        known = {id(item) for item in found}
        return [*found, *(item for item in self._by_key.get(by_ak, []) if id(item) not in known)]


class KnownTpms:
    """The devices that an owner enrolled, by name and by their TPMs' keys.

    Attributes:
        devices: The records by name.
    """

    def __init__(self, devices: Iterable[DeviceRecord], former: Iterable[DeviceRecord]) -> None:
        self.devices = dict[str, DeviceRecord]()
        self._names = dict[TpmKey, set[str]]()
        self._former = dict[TpmKey, list[DeviceRecord]]()
        for record in devices:
            self.put(record)
        for record in former:
            self.put_former(record)

    @classmethod
    def load(cls, records: OwnerRecords, former: FormerRecords) -> KnownTpms:
        """All that an owner's folder has (DeviceInvalid: one is damaged; FileUnreadable)."""
        return cls((load_device(records, name) for name in records.devices()), former.devices())

    def put(self, record: DeviceRecord) -> None:
        """A record was kept."""
        self.devices[record.device] = record
        for key in keys_of(record):
            self._names.setdefault(key, set()).add(record.device)

    def put_former(self, record: DeviceRecord) -> None:
        """A record was set aside, or one that was is another by now."""
        for key in keys_of(record):
            others = [each for each in self._former.get(key, []) if not is_of_one_place(each, record)]
            self._former[key] = [*others, record]

    def same(self, keys: frozenset[TpmKey]) -> list[DeviceRecord]:
        """The records of the TPM with one of these keys, sorted by name."""
        names = {name for key in keys for name in self._names.get(key, ())}
        found = (self.devices[name] for name in sorted(names) if name in self.devices)
        return [record for record in found if keys & keys_of(record)]

    def former(self, keys: frozenset[TpmKey]) -> list[DeviceRecord]:
        """The records that were set aside of the TPM with one of these keys."""
        found = {id(record): record for key in keys for record in self._former.get(key, ())}
        return list(found.values())


def is_of_one_place(one: DeviceRecord, other: DeviceRecord) -> bool:
    """Whether two records are of one name and agree in all keys and the counter."""
    return (one.device, one.counter.name, keys_of(one)) == (other.device, other.counter.name, keys_of(other))
