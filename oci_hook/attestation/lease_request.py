"""A lease request: what `sczctl lease request` sends to the owner, who counts a new lease from it.

Pure. The AK of the enrolled device quotes PCRs 0 to 15, and the quote carries what the TPM counts: resets and time with
power. Keeping a request back gains nothing: a lease that is counted from an older one ends earlier. A request that is
older than what the owner knows, or not of these days, is refused all the same: it would not be what the owner means to
grant. Specification: docs/specification.md, "Lease request"; TPM 2.0 Library, Part 2, 10.11 (TPMS_CLOCK_INFO); ADR 19.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

from oci_hook.attestation.attest import parse_attest
from oci_hook.attestation.boot_policy import pcrs_document
from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.evidence import Evidence, verify_quote
from oci_hook.attestation.measurement import MEASURED_PCRS, parse_evidence
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.errors import DeviceInvalid, EvidenceRefused
from oci_hook.lease import CLOCK_LIMIT, RESETS_LIMIT, Lease
from oci_hook.trust import NAME, NAME_LIMIT

SCHEMA: Final = "scz-smm/lease-request/v1"
LIMIT_BYTES: Final = 1 << 20
FRESH_SECONDS: Final = 86_400
_TIME_LIMIT: Final = 1 << 40
_HOUR_MS: Final = 3_600_000
_AGAIN: Final = "let the device make a new one: `sczctl lease request`"


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A request, unverified until `verify_lease_request`; `created` in seconds since 1970, by the host's clock."""

    device: str
    created: int
    evidence: Evidence


def lease_qualifying_data(device: str, created: int) -> bytes:
    """The qualifying data of a request's quote; 32 bytes. `created`: seconds since 1970."""
    parts = (SCHEMA.encode(), device.encode(), created.to_bytes(8, "big"))
    return hashlib.sha256(b"\x00".join(parts)).digest()


def format_lease_request(request: LeaseRequest) -> bytes:
    """The document's bytes."""
    evidence = request.evidence
    quote = {"attest": encode_base64url(evidence.attest), "signature": encode_base64url(evidence.signature)}
    head = {"schema": SCHEMA, "device": request.device, "created": request.created}
    return canonical({**head, **quote, "pcrs": pcrs_document(evidence.pcrs)})


def parse_lease_request(data: bytes) -> LeaseRequest:
    """Parse a request.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="lease request", error=DeviceInvalid)
    fields = Fields(document, what="lease request", error=DeviceInvalid)
    fields.literal("schema", SCHEMA)
    request = LeaseRequest(
        device=fields.string("device", pattern=NAME, limit=NAME_LIMIT),
        created=fields.integer("created", low=0, high=_TIME_LIMIT),
        evidence=parse_evidence(fields),
    )
    fields.finish()
    return request


def verify_lease_request(request: LeaseRequest, record: DeviceRecord, *, now: int) -> DeviceRecord:
    """Verify that the device's TPM counted this, and not before what is known of it.

    Args:
        request: From `parse_lease_request`.
        record: Of the device that the lease is for.
        now: Seconds since 1970.

    Returns:
        The record with the TPM's resets and powered-on time of the request.

    Raises:
        EvidenceRefused: Another device's, not signed by its AK, not of these days, or older than one that was used.
    """
    # 1. It is by this device, about this moment.
    if request.device != record.device:
        raise EvidenceRefused(
            f"the lease request is by the device {request.device}, not {record.device}", remedy=_AGAIN
        )
    extra_data = lease_qualifying_data(request.device, request.created)
    verify_quote(
        request.evidence, ak=record.ak, extra_data=extra_data, selections=[MEASURED_PCRS], error=EvidenceRefused
    )
    # 2. It is of these days, by both clocks.
    if abs(now - request.created) > FRESH_SECONDS:
        raise EvidenceRefused(f"the lease request was made {abs(now - request.created)} s from now", remedy=_AGAIN)
    # 3. It is not older than what was used before. Within one boot the clock runs forward only; a boot without an
    #    orderly shutdown may set it back (its `safe` flag is then off), but counts as a boot.
    attest = parse_attest(request.evidence.attest, error=EvidenceRefused)
    known = (record.resets or 0, record.clock_ms or 0)
    if (attest.reset_count, attest.clock) < known:
        raise EvidenceRefused("the lease request is older than the last one of this device", remedy=_AGAIN)
    return replace(record, resets=attest.reset_count, clock_ms=attest.clock)


def lease_from(record: DeviceRecord, *, boots: int | None, hours: int | None) -> Lease | None:
    """The lease that ends so many boots, and so many hours of powered-on time, after what is known of the device.

    Args:
        record: With its TPM's resets and clock.
        boots: Further boots; 0: this one alone. None: any number.
        hours: Hours of powered-on time. None: any number.

    Returns:
        None if neither is bounded.

    Raises:
        DeviceInvalid: The record, of an earlier version, has no such count; or the lease would end beyond what a TPM
            can count.
    """
    if boots is None and hours is None:
        return None
    if record.resets is None or record.clock_ms is None:
        raise DeviceInvalid(
            f"what the TPM of {record.device} counts is not known: it was enrolled by an earlier version",
            remedy="give --lease-from FILE, of `sczctl lease request` on the device",
        )
    resets = None if boots is None else record.resets + boots
    clock_ms = None if hours is None else record.clock_ms + hours * _HOUR_MS
    if (resets or 0) > RESETS_LIMIT or (clock_ms or 0) > CLOCK_LIMIT:
        raise DeviceInvalid("the lease would end beyond what a TPM can count", remedy="give a shorter one")
    return Lease(resets, clock_ms)
