"""attestation.measurement: a host's measured state, quoted; read as written; who measured what, when."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings

from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.measurement import (
    Measurement,
    format_measurement,
    measurement_qualifying_data,
    parse_measurement,
    verify_measurement,
)
from oci_hook.errors import DeviceInvalid, EvidenceRefused
from tests.attestation_vectors import hostile, public_of, t, value_or_ours

KEY, OTHER_KEY = t.p256(), t.p256()
AK = t.ecc_public(KEY, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
DEVICE, CREATED = "edge-1", 1_767_960_000
EXTRA = hashlib.sha256(b"scz-smm/measurement/v1\0edge-1\0" + CREATED.to_bytes(8, "big")).digest()


def values(count: int = 16) -> dict[int, bytes]:
    return {pcr: hashlib.sha256(b"booted %d" % pcr).digest() for pcr in range(count)}


def measurement(pcrs: dict[int, bytes] | None = None, key=KEY, selected: bytes | None = None, **changes) -> Measurement:
    pcrs = values() if pcrs is None else pcrs
    base = {"signer": t.qualified_name(AK), "extra_data": EXTRA}
    attest = t.attest(t.ST_QUOTE, t.quote_info(pcrs, selected), **{**base, **changes})
    return Measurement(DEVICE, CREATED, Evidence(attest, t.signed(key, attest), pcrs))


GOOD = measurement()
DOCUMENT = format_measurement(GOOD)


def test_qualifying_data_is_the_specification_s() -> None:
    assert measurement_qualifying_data(DEVICE, CREATED) == EXTRA


def test_good() -> None:
    assert parse_measurement(DOCUMENT) == GOOD
    assert verify_measurement(parse_measurement(DOCUMENT), ak=public_of(AK)) == GOOD.evidence


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (dataclasses.replace(GOOD, device="edge-2"), "another occasion"),
        (dataclasses.replace(GOOD, created=CREATED + 1), "another occasion"),
        (measurement(key=OTHER_KEY), "not by the enrolled attestation key"),
        (measurement(magic=0), "magic"),
        (measurement(signer=t.object_name(AK)), "names another key"),
        (measurement(values(15)), "selects other PCRs"),
        (measurement(values(17)), "selects other PCRs"),
        (measurement(selected=t.selections(t.selection(range(16), t.SHA1))), "SHA-256 bank"),
        (
            dataclasses.replace(GOOD, evidence=dataclasses.replace(GOOD.evidence, pcrs=values(15))),
            "at hand are of other",
        ),
        (
            dataclasses.replace(GOOD, evidence=dataclasses.replace(GOOD.evidence, pcrs={**values(), 9: bytes(32)})),
            "not those that the TPM quoted",
        ),
    ],
)
def test_refused(made: Measurement, says: str) -> None:
    with pytest.raises(EvidenceRefused, match=says):
        verify_measurement(parse_measurement(format_measurement(made)), ak=public_of(AK))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "scz-smm/enroll-answer/v1"},
        {"device": "../edge"},
        {"created": -1},
        {"created": 1.5},
        {"attest": ""},
        {"signature": "*"},
        {"pcrs": {}},
        {"pcrs": {"24": "11" * 32}},
        {"pcrs": {"4": "11" * 20}},
        {"note": "hello"},
    ],
)
def test_malformed(changes: dict[str, object]) -> None:
    with pytest.raises(DeviceInvalid):
        parse_measurement(json.dumps({**json.loads(DOCUMENT), **changes}).encode())


@settings(max_examples=300, deadline=None)
@given(hostile(DOCUMENT))
def test_fuzz(data: bytes) -> None:
    made = value_or_ours(parse_measurement, data)
    if made is not None:
        evidence = value_or_ours(lambda _: verify_measurement(made, ak=public_of(AK)), data)
        assert evidence is None or made == GOOD
