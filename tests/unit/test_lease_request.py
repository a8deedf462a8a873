"""attestation.lease_request: only the device's AK, about these days, and never back in what the TPM counts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.lease_request import (
    FRESH_SECONDS,
    LeaseRequest,
    format_lease_request,
    lease_from,
    lease_qualifying_data,
    parse_lease_request,
    verify_lease_request,
)
from oci_hook.attestation.policy import pcr_selection
from oci_hook.attestation.structures import ALG_ECDSA, ALG_SHA256, tpm2b
from oci_hook.errors import DeviceInvalid, EvidenceRefused
from oci_hook.lease import CLOCK_LIMIT, RESETS_LIMIT, Lease
from tests.attestation_vectors import hostile, public_of, value_or_ours
from tests.devices import ENROLLED, make_device, measured

NOW = ENROLLED + 1000
HOUR_MS = 3_600_000


@cache
def known() -> tuple[DeviceRecord, ec.EllipticCurvePrivateKey]:
    """A record whose AK this test holds, as no TPM would let it."""
    record = make_device("A" * 43).record
    key = ec.generate_private_key(ec.SECP256R1())
    numbers = key.public_key().public_numbers()
    point = tpm2b(numbers.x.to_bytes(32, "big")) + tpm2b(numbers.y.to_bytes(32, "big"))
    ak = public_of(record.ak.raw[: -len(point)] + point)
    return replace(record, ak=ak, resets=5, clock_ms=10 * HOUR_MS), key


def quoted(
    *, resets: int, clock: int, device: str = "edge-1", created: int = NOW, safe: int = 1, key: object = None
) -> LeaseRequest:
    record, own = known()
    signer = key if isinstance(key, ec.EllipticCurvePrivateKey) else own
    values = measured()
    attest = bytes.fromhex("ff5443478018") + tpm2b(record.ak.qualified_name_in_endorsement)
    attest += tpm2b(lease_qualifying_data(device, created))
    attest += clock.to_bytes(8, "big") + resets.to_bytes(4, "big") + bytes(4) + bytes([safe]) + bytes(8)
    attest += pcr_selection(values) + tpm2b(pcr_digest(values))
    r, s = decode_dss_signature(signer.sign(attest, ec.ECDSA(hashes.SHA256())))
    signature = ALG_ECDSA.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
    signature += tpm2b(r.to_bytes(32, "big")) + tpm2b(s.to_bytes(32, "big"))
    return LeaseRequest(device, created, Evidence(attest, signature, values))


def verified(request: LeaseRequest, *, now: int = NOW) -> DeviceRecord:
    return verify_lease_request(parse_lease_request(format_lease_request(request)), known()[0], now=now)


@pytest.mark.parametrize(
    ("resets", "clock"), [(5, 10 * HOUR_MS), (5, 11 * HOUR_MS), (6, 0), (6, 12 * HOUR_MS), (RESETS_LIMIT, CLOCK_LIMIT)]
)
def test_a_request_moves_what_is_known_forward(resets: int, clock: int) -> None:
    record = verified(quoted(resets=resets, clock=clock, safe=clock % 2))
    assert (record.resets, record.clock_ms) == (resets, clock)
    assert replace(record, resets=5, clock_ms=10 * HOUR_MS) == known()[0]
    assert parse_device_record(format_device_record(record)) == record


@pytest.mark.parametrize(("resets", "clock"), [(5, 10 * HOUR_MS - 1), (4, 99 * HOUR_MS), (0, 0)])
def test_an_older_request_is_refused(resets: int, clock: int) -> None:
    with pytest.raises(EvidenceRefused, match="older"):
        verified(quoted(resets=resets, clock=clock))


@pytest.mark.parametrize("away", [FRESH_SECONDS + 1, -FRESH_SECONDS - 1, 10**9])
def test_a_request_of_another_day_is_refused(away: int) -> None:
    request = quoted(resets=6, clock=0)
    assert verified(request, now=NOW + max(-FRESH_SECONDS, min(away, FRESH_SECONDS))).resets == 6
    with pytest.raises(EvidenceRefused, match="from now"):
        verified(request, now=NOW + away)


def test_another_device_s_request_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match="device edge-2, not edge-1"):
        verified(quoted(resets=6, clock=0, device="edge-2"))
    with pytest.raises(EvidenceRefused, match="extraData"):  # renamed on the way
        verified(replace(quoted(resets=6, clock=0, device="edge-2"), device="edge-1"))
    with pytest.raises(EvidenceRefused, match="not by the enrolled"):
        verified(quoted(resets=6, clock=0, key=ec.generate_private_key(ec.SECP256R1())))


def test_every_bit_of_the_quote_counts() -> None:
    good = quoted(resets=6, clock=7)
    for place in range(len(good.evidence.attest)):
        flipped = bytearray(good.evidence.attest)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(EvidenceRefused):
            verified(replace(good, evidence=replace(good.evidence, attest=bytes(flipped))))
    for change in ({"created": NOW + 1}, {"evidence": replace(good.evidence, pcrs=measured({4: b"\x01" * 32}))}):
        with pytest.raises(EvidenceRefused):
            verified(replace(good, **change))  # type: ignore[arg-type]


def test_a_measurement_is_no_lease_request() -> None:
    label = hashlib.sha256(b"scz-smm/measurement/v1\0edge-1\0" + NOW.to_bytes(8, "big")).digest()
    assert label != lease_qualifying_data("edge-1", NOW)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_comes_is_read_or_refused(data: st.DataObject) -> None:
    found = value_or_ours(parse_lease_request, data.draw(hostile(format_lease_request(quoted(resets=6, clock=7)))))
    assert found is None or parse_lease_request(format_lease_request(found)) == found


# --- the lease --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boots", "hours", "lease"),
    [
        (None, None, None),
        (0, None, Lease(resets=5)),
        (3, None, Lease(resets=8)),
        (None, 24, Lease(clock_ms=34 * HOUR_MS)),
        (1, 1, Lease(6, 11 * HOUR_MS)),
    ],
)
def test_a_lease_ends_so_much_later(boots: int | None, hours: int | None, lease: Lease | None) -> None:
    assert lease_from(known()[0], boots=boots, hours=hours) == lease


def test_a_lease_needs_to_know_where_it_begins() -> None:
    blank = replace(known()[0], resets=None, clock_ms=None)
    assert parse_device_record(format_device_record(blank)) == blank
    assert lease_from(blank, boots=None, hours=None) is None
    with pytest.raises(DeviceInvalid, match="not known") as caught:
        lease_from(blank, boots=1, hours=None)
    assert "--lease-from" in caught.value.advice
    for late in ({"resets": RESETS_LIMIT}, {"clock_ms": CLOCK_LIMIT}):
        with pytest.raises(DeviceInvalid, match="beyond"):
            lease_from(replace(known()[0], **late), boots=1, hours=1)  # type: ignore[arg-type]
