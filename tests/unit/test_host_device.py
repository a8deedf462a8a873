"""attestation.host_device: device.json is read as it was written, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from oci_hook.attestation.host_device import AskedAgain, HostDevice, format_host_device, parse_host_device
from oci_hook.attestation.structures import parse_nv_public
from oci_hook.errors import DeviceInvalid
from tests.attestation_vectors import hostile, public_of, t, value_or_ours

OWNERS = ["A" * 43, "b-_" + "9" * 40]


def counter(index: int):
    return parse_nv_public(t.tpm2b(t.nv_public(index)), what="a counter", error=DeviceInvalid)


DEVICE = HostDevice(
    srk_handle=0x81000001,
    srk=public_of(t.ecc_public(t.p256(), t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)),
    srk_serialised=b"serialised",
    ak_handle=0x81010100,
    ak=public_of(t.ecc_public(t.p256(), t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)),
    counters={},
).with_counter(OWNERS[0], counter(0x01800001))
GOOD = format_host_device(DEVICE)


def changed(*path: str, value: Any) -> bytes:
    document = json.loads(GOOD)
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    return json.dumps(document).encode()


def test_what_is_written_is_read() -> None:
    assert parse_host_device(GOOD) == DEVICE
    none = HostDevice(DEVICE.srk_handle, DEVICE.srk, b"x", DEVICE.ak_handle, DEVICE.ak, {})
    assert parse_host_device(format_host_device(none)) == none


def test_a_counter_is_added_or_replaced_beside_the_others() -> None:
    two = DEVICE.with_counter(OWNERS[1], counter(0x01800002))
    assert set(DEVICE.counters) == {OWNERS[0]}
    assert set(two.counters) == set(OWNERS)
    replaced = two.with_counter(OWNERS[0], counter(0x01800003))
    assert replaced.counters[OWNERS[0]].index == 0x01800003
    assert replaced.counters[OWNERS[1]] == two.counters[OWNERS[1]]
    assert parse_host_device(format_host_device(replaced)) == replaced
    with pytest.raises(TypeError):
        replaced.counters[OWNERS[0]] = counter(1)  # type: ignore[index]


def test_an_enrolment_counts_once_a_later_grant_shows_that_it_was_accepted() -> None:
    asked = DEVICE.with_counter(OWNERS[0], counter(0x01800001), 2, AskedAgain(5, 100)).with_counter(
        OWNERS[1], counter(0x01800002), 7
    )
    assert parse_host_device(format_host_device(asked)) == asked
    assert b"asked" not in format_host_device(asked.with_counter(OWNERS[0], counter(0x01800001), 2))
    for owner, maximum, created in ((OWNERS[0], 4, 101), (OWNERS[0], 5, 100), (OWNERS[1], 9, 101), ("C" * 43, 9, 101)):
        assert asked.granted(owner, maximum=maximum, created=created) == asked
    for maximum in (5, 6):
        accepted = asked.granted(OWNERS[0], maximum=maximum, created=101)
        assert dict(accepted.counter_values) == {OWNERS[0]: 5, OWNERS[1]: 7}
        assert dict(accepted.asked_again) == {}
        assert accepted.counters == asked.counters


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        GOOD[:-1],
        GOOD + b"{}",
        changed("schema", value="scz-smm/device/v1"),
        changed("more", value=1),
        changed("srk", value=[]),
        changed("srk", "handle", value=0x80FFFFFF),
        changed("srk", "handle", value=0x81800000),
        changed("ak", "handle", value="0x81010100"),
        changed("ak", "handle", value=True),
        changed("ak", "more", value=1),
        changed("srk", "serialised", value=""),
        changed("srk", "serialised", value="A" * 8192),
        changed("srk", "public", value="AAAA"),
        changed("ak", "public", value="not base64url!"),
        changed("counters", value=[]),
        changed("counters", OWNERS[0], "asked", value=[]),
        changed("counters", OWNERS[0], "asked", value={"value": 1}),
        changed("counters", OWNERS[0], "asked", value={"value": -1, "after": 0}),
        changed("counters", OWNERS[0], "asked", value={"value": 1, "after": 1 << 41}),
        changed("counters", OWNERS[0], "asked", value={"value": 1, "after": 0, "more": 1}),
        changed("counters", value={"A" * 42: json.loads(GOOD)["counters"][OWNERS[0]]}),
        changed("counters", value={"../" + "A" * 40: json.loads(GOOD)["counters"][OWNERS[0]]}),
        changed("counters", value={OWNERS[0]: None}),
        changed("counters", OWNERS[0], "index", value=0x01800002),
        changed("counters", OWNERS[0], "more", value=1),
        changed("counters", value={f"{n:043}": json.loads(GOOD)["counters"][OWNERS[0]] for n in range(65)}),
        GOOD.replace(b'"schema"', b'"schema":"x","schema"'),
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(DeviceInvalid):
        parse_host_device(data)


@settings(max_examples=300, deadline=None)
@given(hostile(GOOD))
def test_fuzz(data: bytes) -> None:
    device = value_or_ours(parse_host_device, data)
    if device is not None:
        assert parse_host_device(format_host_device(device)) == device
