"""A measurement: what `sczctl boot-policy measure` sends to the owner, who signs a boot policy from it.

Pure. The AK of the enrolled device quotes PCRs 0 to 15, so that the owner need not trust the way it came. It says which
state the machine is in, not that the state is good: that is the owner's decision.
Specification: docs/specification.md, "Measurement of a host".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.boot_policy import parse_pcrs, pcrs_document
from oci_hook.attestation.evidence import Evidence, verify_quote
from oci_hook.attestation.structures import STRUCTURE_LIMIT_BYTES, Public
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.errors import DeviceInvalid, EvidenceRefused
from oci_hook.trust import NAME, NAME_LIMIT

SCHEMA: Final = "scz-smm/measurement/v1"
LIMIT_BYTES: Final = 1 << 20
MEASURED_PCRS: Final = frozenset(range(16))
_TIME_LIMIT: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Measurement:
    """A host's measured state, unverified until `verify_measurement`."""

    device: str
    created: int
    evidence: Evidence


def measurement_qualifying_data(device: str, created: int) -> bytes:
    """The qualifying data of a measurement's quote; 32 bytes. `created`: seconds since 1970."""
    parts = (SCHEMA.encode(), device.encode(), created.to_bytes(8, "big"))
    return hashlib.sha256(b"\x00".join(parts)).digest()


def format_measurement(measurement: Measurement) -> bytes:
    """The document's bytes."""
    evidence = measurement.evidence
    return canonical(
        {
            "schema": SCHEMA,
            "device": measurement.device,
            "created": measurement.created,
            "attest": encode_base64url(evidence.attest),
            "signature": encode_base64url(evidence.signature),
            "pcrs": pcrs_document(evidence.pcrs),
        }
    )


def parse_measurement(data: bytes) -> Measurement:
    """Parse a measurement.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="measurement", error=DeviceInvalid)
    fields = Fields(document, what="measurement", error=DeviceInvalid)
    fields.literal("schema", SCHEMA)
    measurement = Measurement(
        device=fields.string("device", pattern=NAME, limit=NAME_LIMIT),
        created=fields.integer("created", low=0, high=_TIME_LIMIT),
        evidence=parse_evidence(fields),
    )
    fields.finish()
    return measurement


def parse_evidence(fields: Fields) -> Evidence:
    """Take `attest`, `signature` and `pcrs` off an object of an enrolment or a measurement (DeviceInvalid)."""
    return Evidence(
        attest=fields.base64url("attest", low=1, high=STRUCTURE_LIMIT_BYTES),
        signature=fields.base64url("signature", low=1, high=STRUCTURE_LIMIT_BYTES),
        pcrs=parse_pcrs(fields, "pcrs", error=DeviceInvalid),
    )


def verify_measurement(measurement: Measurement, *, ak: Public) -> Evidence:
    """Verify that the device's TPM quoted PCRs 0 to 15 with these values at that time.

    Args:
        measurement: From `parse_measurement`.
        ak: The attestation key of the device's record.

    Raises:
        EvidenceRefused: Another device's, another time's, other PCRs, or not signed by that key.
    """
    verify_quote(
        measurement.evidence,
        ak=ak,
        extra_data=measurement_qualifying_data(measurement.device, measurement.created),
        selections=[MEASURED_PCRS],
        error=EvidenceRefused,
    )
    return measurement.evidence
