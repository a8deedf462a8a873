"""The owner's record of an enrolled device, `devices/<device>.json`.

Pure. Whatever stands in it was verified at the enrolment; the record is as trustworthy as the owner's folder.
Specification: docs/specification.md, "Enrolment", document 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from oci_hook.attestation.boot_policy import parse_pcrs, pcrs_document
from oci_hook.attestation.structures import (
    STRUCTURE_LIMIT_BYTES,
    NvPublic,
    Public,
    parse_nv_public,
    parse_public,
)
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.errors import DeviceInvalid
from oci_hook.lease import CLOCK_LIMIT, RESETS_LIMIT
from oci_hook.trust import NAME, NAME_LIMIT

SCHEMA: Final = "scz-smm/device/v1"
LIMIT_BYTES: Final = 1 << 20
COUNTER_LIMIT: Final = (1 << 63) - 1
COUNT_LIMIT: Final = 1024  # a revocation counts by one or a few; more in one go would wear the TPM's memory out
_TIME_LIMIT: Final = 1 << 40

Vouched = Literal["certificate", "list"]


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """An enrolled device: its keys, its counter, and its PCRs at the enrolment.

    Attributes:
        ek_sha256: Of the EK's certificate (DER), or of the EK itself as the owner's list has it (SubjectPublicKeyInfo).
        counter_value: The counter's value at the enrolment, raised by each revocation since.
        certified: Its value at the enrolment, if it was raised since; None: `counter_value`.
        vouched: By what the EK is a TPM's.
        highest_maximum: Of any grant that was given to the device, if that is above `counter_value`; None: of none.
        resets: The TPM's `resetCount`, certified at the enrolment or by a later lease request; None: not known.
        clock_ms: The TPM's `clock` then, in milliseconds of powered-on time.
        revoked: When the owner revoked the whole device, in seconds since 1970; None: not.
    """

    device: str
    device_class: str
    enrolled: int
    ek_sha256: str
    ek_subject: str
    ak: Public
    srk: Public
    counter: NvPublic
    counter_value: int
    pcrs: Mapping[int, bytes]
    vouched: Vouched = "certificate"
    highest_maximum: int | None = None
    resets: int | None = None
    clock_ms: int | None = None
    revoked: int | None = None
    certified: int | None = None


def format_device_record(record: DeviceRecord) -> bytes:
    """The record's bytes; what is None is left out, as by earlier versions."""
    counter = {**counter_document(record.counter), "value": record.counter_value}
    if record.highest_maximum is not None:
        counter["granted"] = record.highest_maximum
    if record.certified is not None:
        counter["certified"] = record.certified
    more: dict[str, object] = {} if record.vouched == "certificate" else {"vouched": record.vouched}
    if record.revoked is not None:
        more["revoked"] = record.revoked
    if record.resets is not None and record.clock_ms is not None:
        more["clock"] = {"resets": record.resets, "ms": record.clock_ms}
    return canonical(
        {
            "schema": SCHEMA,
            "device": record.device,
            "class": record.device_class,
            "enrolled": record.enrolled,
            "ek_sha256": record.ek_sha256,
            "ek_subject": record.ek_subject,
            "ak_public": encode_base64url(record.ak.marshalled),
            "srk_public": encode_base64url(record.srk.marshalled),
            "counter": counter,
            "pcrs": pcrs_document(record.pcrs),
            **more,
        }
    )


def parse_device_record(data: bytes) -> DeviceRecord:
    """Parse a device's record.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="device record", error=DeviceInvalid)
    fields = Fields(document, what="device record", error=DeviceInvalid)
    fields.literal("schema", SCHEMA)
    counter = fields.fields("counter")
    clock = fields.fields("clock") if fields.has("clock") else None
    record = DeviceRecord(
        device=fields.string("device", pattern=NAME, limit=NAME_LIMIT),
        device_class=fields.string("class", pattern=NAME, limit=NAME_LIMIT),
        enrolled=fields.integer("enrolled", low=0, high=_TIME_LIMIT),
        ek_sha256=fields.string("ek_sha256", pattern=r"[0-9a-f]{64}"),
        ek_subject=fields.string("ek_subject", limit=256),
        ak=take_public(fields, "ak_public"),
        srk=take_public(fields, "srk_public"),
        counter=take_counter(counter),
        counter_value=counter.integer("value", low=0, high=COUNTER_LIMIT),
        pcrs=parse_pcrs(fields, "pcrs", error=DeviceInvalid),
        vouched=_take_vouched(fields),
        highest_maximum=_optional_value(counter, "granted"),
        certified=_optional_value(counter, "certified"),
        resets=None if clock is None else clock.integer("resets", low=0, high=RESETS_LIMIT),
        clock_ms=None if clock is None else clock.integer("ms", low=0, high=CLOCK_LIMIT),
        revoked=fields.integer("revoked", low=0, high=_TIME_LIMIT) if fields.has("revoked") else None,
    )
    if clock is not None:
        clock.finish()
    counter.finish()
    fields.finish()
    return record


def _optional_value(counter: Fields, name: str) -> int | None:
    return counter.integer(name, low=0, high=COUNTER_LIMIT) if counter.has(name) else None


def _take_vouched(fields: Fields) -> Vouched:
    """Absent in the records of those that have a certificate, which earlier versions read."""
    if not fields.has("vouched"):
        return "certificate"
    fields.literal("vouched", "list")
    return "list"


def take_public(fields: Fields, name: str) -> Public:
    """A required TPM2B_PUBLIC in base64url (DeviceInvalid)."""
    data = fields.base64url(name, low=1, high=STRUCTURE_LIMIT_BYTES)
    return parse_public(data, what=name, error=DeviceInvalid)


def take_counter(fields: Fields) -> NvPublic:
    """The required `index` and `public` of a counter, which must agree (DeviceInvalid)."""
    index = fields.integer("index", low=0, high=0xFFFFFFFF)
    data = fields.base64url("public", low=1, high=STRUCTURE_LIMIT_BYTES)
    counter = parse_nv_public(data, what="the counter's public area", error=DeviceInvalid)
    if counter.index != index:
        raise DeviceInvalid("the counter's index is not that of its public area")
    return counter


def counter_document(counter: NvPublic) -> dict[str, object]:
    """A counter as our JSON documents carry it."""
    return {"index": counter.index, "public": encode_base64url(counter.marshalled)}
