"""What a host remembers of its own enrolment: `device.json` in its store.

Pure. It pins the SRK: the TPM's sessions are salted to the key that was serialised here at enrolment, not to whatever
answers on the bus today. It holds no secret. Specification: docs/specification.md, "Enrolment", handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from oci_hook.attestation.device_record import COUNTER_LIMIT, counter_document, take_counter, take_public
from oci_hook.attestation.structures import NvPublic, Public
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object, shown
from oci_hook.errors import DeviceInvalid

SCHEMA: Final = "scz-smm/host-device/v1"
LIMIT_BYTES: Final = 1 << 20
OWNERS_LIMIT: Final = 64
_SERIALISED_LIMIT_BYTES: Final = 4096
_TIME_LIMIT: Final = 1 << 40
_PERSISTENT: Final = (0x81000000, 0x817FFFFF)
_OWNER_ID: Final = r"[A-Za-z0-9_-]{43}"


@dataclass(frozen=True, slots=True)
class AskedAgain:
    """An enrolment that was asked for again, of which the host is never told whether the owner accepted it.

    Attributes:
        value: The counter's then.
        after: When the newest grant was made that the host had of that owner, by the owner's clock, in seconds since
            1970; 0: it had none. A newer one, up to that value of the counter or further, shows that it was accepted.
    """

    value: int
    after: int


@dataclass(frozen=True, slots=True)
class HostDevice:
    """This host's keys in its TPM, and for each owner (by id) the NV counter.

    `srk_serialised` is tpm2-tss's form of the SRK (ESYS_TR_Serialize): handle, Name and public area. `counter_values`
    has each counter's value at its enrolment; not those of owners with whom an earlier version enrolled. `asked_again`
    has what would take such a value's place.
    """

    srk_handle: int
    srk: Public
    srk_serialised: bytes
    ak_handle: int
    ak: Public
    counters: Mapping[str, NvPublic]
    counter_values: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    asked_again: Mapping[str, AskedAgain] = field(default_factory=lambda: MappingProxyType({}))

    def with_counter(
        self, owner_id: str, counter: NvPublic, value: int | None = None, asked: AskedAgain | None = None
    ) -> HostDevice:
        """The same device with an owner's counter set; its value at the enrolment, if known; what was asked since."""
        values = {owner: known for owner, known in self.counter_values.items() if owner != owner_id}
        waiting = {owner: known for owner, known in self.asked_again.items() if owner != owner_id}
        if value is not None:
            values[owner_id] = value
        if asked is not None:
            waiting[owner_id] = asked
        return replace(
            self,
            counters=MappingProxyType({**self.counters, owner_id: counter}),
            counter_values=MappingProxyType(values),
            asked_again=MappingProxyType(waiting),
        )

    def granted(self, owner_id: str, *, maximum: int, created: int) -> HostDevice:
        """The same device, after a verified grant of an owner's came: it may show that an enrolment was accepted.

        Args:
            owner_id: The owner's.
            maximum: The highest value of the counter at which the grant opens.
            created: When it was made, in seconds since 1970.
        """
        asked = self.asked_again.get(owner_id)
        if asked is None or maximum < asked.value or created <= asked.after:
            return self
        return self.with_counter(owner_id, self.counters[owner_id], asked.value)


def format_host_device(device: HostDevice) -> bytes:
    """The bytes of `device.json`."""
    return canonical(
        {
            "schema": SCHEMA,
            "srk": {
                "handle": device.srk_handle,
                "public": encode_base64url(device.srk.marshalled),
                "serialised": encode_base64url(device.srk_serialised),
            },
            "ak": {"handle": device.ak_handle, "public": encode_base64url(device.ak.marshalled)},
            "counters": {owner_id: _counter_document(device, owner_id) for owner_id in device.counters},
        }
    )


def _counter_document(device: HostDevice, owner_id: str) -> dict[str, object]:
    document = counter_document(device.counters[owner_id])
    value, asked = device.counter_values.get(owner_id), device.asked_again.get(owner_id)
    if value is not None:
        document["value"] = value
    if asked is not None:
        document["asked"] = {"value": asked.value, "after": asked.after}
    return document


def parse_host_device(data: bytes) -> HostDevice:
    """Parse `device.json`.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="device.json", error=DeviceInvalid)
    fields = Fields(document, what="device.json", error=DeviceInvalid)
    fields.literal("schema", SCHEMA)
    srk, ak = fields.fields("srk"), fields.fields("ak")
    counters, values, asked = _counters(fields.take("counters"))
    device = HostDevice(
        srk_handle=_handle(srk),
        srk=take_public(srk, "public"),
        srk_serialised=srk.base64url("serialised", low=1, high=_SERIALISED_LIMIT_BYTES),
        ak_handle=_handle(ak),
        ak=take_public(ak, "public"),
        counters=counters,
        counter_values=values,
        asked_again=asked,
    )
    for part in (srk, ak, fields):
        part.finish()
    return device


def _handle(fields: Fields) -> int:
    return fields.integer("handle", low=_PERSISTENT[0], high=_PERSISTENT[1])


def _counters(value: object) -> tuple[Mapping[str, NvPublic], Mapping[str, int], Mapping[str, AskedAgain]]:
    if not isinstance(value, dict) or len(value) > OWNERS_LIMIT:
        raise DeviceInvalid(f"device.json: counters is not an object of at most {OWNERS_LIMIT} owners")
    found, values, waiting = dict[str, NvPublic](), dict[str, int](), dict[str, AskedAgain]()
    for owner_id, counter in value.items():
        Fields({"owner": owner_id}, what="device.json: counters", error=DeviceInvalid).string(
            "owner", pattern=_OWNER_ID
        )
        part = Fields(counter, what=f"device.json: {shown(owner_id)}", error=DeviceInvalid)
        found[owner_id] = take_counter(part)
        if part.has("value"):
            values[owner_id] = part.integer("value", low=0, high=COUNTER_LIMIT)
        if part.has("asked"):
            asked = part.fields("asked")
            value_then = asked.integer("value", low=0, high=COUNTER_LIMIT)
            waiting[owner_id] = AskedAgain(value_then, asked.integer("after", low=0, high=_TIME_LIMIT))
            asked.finish()
        part.finish()
    return MappingProxyType(found), MappingProxyType(values), MappingProxyType(waiting)
