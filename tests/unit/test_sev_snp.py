"""attestation.sev_snp: a real report, and reports of our own of each version and product; all else is refused."""

from __future__ import annotations

from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.sev_snp import REPORT_BYTES, Tcb, parse_report, parse_tcb, verify_report_signature
from oci_hook.key_errors import TeeRefused
from tests.sev_snp import CHIP, MEASUREMENT, OFFSETS, REAL, REAL_DATA, REAL_REPORT, Maker, ec_key, of, signature

MILAN = Maker()
KEY = ec_key("chip").public_key()


def real_key() -> ec.EllipticCurvePublicKey:
    with pytest.warns(match="serial number"):  # AMD's; the library's warning is what `sev_snp_chain` silences
        return cast(ec.EllipticCurvePublicKey, x509.load_der_x509_certificate(REAL["vcek"]).public_key())


def refused(data: bytes, match: str) -> None:
    with pytest.raises(TeeRefused, match=match):
        parse_report(data, error=TeeRefused)


def test_a_real_report() -> None:
    report = parse_report(REAL_REPORT, error=TeeRefused)
    assert (report.version, report.guest_svn, report.policy, report.vmpl) == (2, 0, 0xB0000, 0)
    assert (report.signing_key, report.product, report.report_data) == ("vcek", None, REAL_DATA)
    assert report.measurement.hex().startswith("b07af9620f3b839b")
    assert report.chip_id is not None
    assert report.chip_id.hex().startswith("3ac3fe21e13fb099")
    assert (report.may_debug, report.may_migrate) == (True, False)
    assert len(set(report.tcbs)) == 1
    assert parse_tcb(report.tcbs[0], "milan", error=TeeRefused) == Tcb(0, 2, 0, 5, 0x44)
    verify_report_signature(report, real_key(), error=TeeRefused)


def test_each_bit_of_a_real_report_counts() -> None:
    key, accepted = real_key(), []
    for bit in range(8 * REPORT_BYTES):
        changed = bytearray(REAL_REPORT)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            verify_report_signature(parse_report(bytes(changed), error=TeeRefused), key, error=TeeRefused)
            accepted.append(bit)
        except TeeRefused:
            pass
    assert accepted == []


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_each_version_and_product(version: int, product: str) -> None:
    maker = of(product)
    report = parse_report(maker.report(bytes(range(64)), version=version), error=TeeRefused)
    assert (report.version, report.product) == (version, product.lower() if version > 2 else None)
    assert (report.report_data, report.measurement, report.chip_id) == (bytes(range(64)), MEASUREMENT, maker.chip)
    assert not report.may_debug
    assert not report.may_migrate
    verify_report_signature(report, KEY, error=TeeRefused)
    expected = Tcb(1, 4, 2, 22, 213) if product == "Turin" else Tcb(0, 4, 1, 22, 213)
    product_of: Any = product.lower()
    assert {parse_tcb(raw, product_of, error=TeeRefused) for raw in report.tcbs} == {expected}


def test_the_four_patch_levels_are_told_apart() -> None:
    levels = {name: bytes([number] * 2).ljust(8, b"\0") for number, name in enumerate(("reported", "current"), 1)}
    levels |= {name: bytes([number] * 2).ljust(8, b"\0") for number, name in enumerate(("committed", "launch"), 3)}
    report = parse_report(MILAN.report(**levels), error=TeeRefused)
    assert [raw[0] for raw in report.tcbs] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 0x29F, 0x2A0, REPORT_BYTES - 1, REPORT_BYTES + 1, 4096, 1 << 20])
def test_another_size(size: int) -> None:
    refused(REAL_REPORT[:size].ljust(size, b"\0"), f"{size} bytes, not 1184")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"version": 0}, "version 0 is not known"),
    ({"version": 1}, "version 1 is not known"),
    ({"version": 6, "cpuid": b"\x19\1\1"}, "version 6 is not known"),
    ({"version": 0xFFFFFFFF}, "is not known"),
    ({"policy": 0}, "guest policy"),
    ({"policy": 0x10000}, "guest policy"),
    ({"policy": 0x20000 | 1 << 26}, "guest policy"),
    ({"policy": 0x20000 | 1 << 63}, "guest policy"),
    ({"vmpl": 4}, "VMPL 4"),
    ({"vmpl": 0xFFFFFFFF}, "VMPL 4294967295"),
    ({"algorithm": 0}, "signature algorithm 0"),
    ({"algorithm": 2}, "signature algorithm 2"),
    ({"platform": 1 << 6}, "platform information"),
    ({"platform": 1 << 8}, "platform information"),
    ({"key_info": 7 << 2}, "neither a VCEK nor a VLEK"),
    ({"key_info": 2 << 2}, "neither a VCEK nor a VLEK"),
    ({"key_info": 1 << 5}, "neither a VCEK nor a VLEK"),
    ({"cpuid": b"\x18\1\1"}, "processor family 0x18"),
    ({"cpuid": b"\x19\x20\1"}, "model 0x20"),
    ({"cpuid": b"\x1a\x12\1"}, "model 0x12"),
    ({"reserved": 1}, "reserved byte"),
    ({"reserved_2": 1}, "reserved byte"),
    ({"reserved_3": 1}, "reserved byte"),
    ({"reserved_4": 1}, "reserved byte"),
    ({"reserved_5": 1}, "reserved byte"),
    ({"mitigations": 1}, "reserved byte"),  # version 3 has none
]


@pytest.mark.parametrize(("changes", "match"), REFUSED)
def test_refused(changes: dict[str, Any], match: str) -> None:
    version = changes.get("version", 3)
    refused(MILAN.report(**{**changes, "version": version}), match)


def test_a_version_2_report_says_nothing_of_the_processor() -> None:
    refused(MILAN.report(version=2, cpuid=b"\x19\1\1"), "reserved byte")


def test_mitigations_since_version_5() -> None:
    assert parse_report(MILAN.report(version=5, mitigations=b"\xff" * 16), error=TeeRefused).version == 5


def test_a_masked_chip() -> None:
    for key_info in (0, 2):  # MASK_CHIP_KEY is another switch: of the key, which then signs nothing
        assert parse_report(MILAN.report(key_info=key_info, chip_id=bytes(64)), error=TeeRefused).chip_id is None
        assert parse_report(MILAN.report(key_info=key_info), error=TeeRefused).chip_id == CHIP


@pytest.mark.parametrize("offset", [0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48, 0x2E8 + 71, 0x330, REPORT_BYTES - 1])
def test_what_is_beyond_the_curve_in_the_signature(offset: int) -> None:
    changed = bytearray(MILAN.report())
    changed[offset] = 1
    refused(bytes(changed), "longer than the curve's|reserved byte")


@pytest.mark.parametrize("numbers", [(0, 0), (0, 1), (1, 0), ((1 << 384) - 1, (1 << 384) - 1)])
def test_degenerate_signatures(numbers: tuple[int, int]) -> None:
    body = MILAN.report(sign=False)[:0x2A0]
    signed = b"".join(number.to_bytes(72, "little") for number in numbers).ljust(0x200, b"\0")
    with pytest.raises(TeeRefused, match="not signed by the key"):
        verify_report_signature(parse_report(body + signed, error=TeeRefused), KEY, error=TeeRefused)


def test_a_signature_in_the_other_byte_order_or_by_another_key() -> None:
    report = MILAN.report()
    turned = report[:0x2A0] + report[0x2A0:0x2D0][::-1] + bytes(24) + report[0x2E8:0x318][::-1] + bytes(24)
    for changed in (turned.ljust(REPORT_BYTES, b"\0"), report[:0x2A0] + signature(ec_key("other"), report[:0x2A0])):
        with pytest.raises(TeeRefused, match="not signed by the key"):
            verify_report_signature(parse_report(changed, error=TeeRefused), KEY, error=TeeRefused)


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_reserved_patch_levels(product: Any) -> None:
    places = range(4, 7) if product == "turin" else range(2, 6)
    for place in range(8):
        raw = bytes(place) + b"\1" + bytes(7 - place)
        if place in places:
            with pytest.raises(TeeRefused, match="reserved byte of a TCB version"):
                parse_tcb(raw, product, error=TeeRefused)
        else:
            assert sum(getattr(parse_tcb(raw, product, error=TeeRefused), name) for name in Tcb.__slots__) == 1


@settings(deadline=None)
@given(st.sampled_from(sorted(OFFSETS)), st.binary(min_size=152, max_size=152), st.integers(2, 5))
def test_any_value_of_any_field(field: str, data: bytes, version: int) -> None:
    value = data[: OFFSETS[field][1]]
    try:
        fields: dict[str, Any] = {"version": version, field: value}
        report = parse_report(MILAN.report(sign=False, **fields), error=TeeRefused)
    except TeeRefused:
        return
    assert report.vmpl <= 3
    assert report.version in (2, 3, 4, 5)


@given(st.binary(max_size=REPORT_BYTES + 8))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(TeeRefused):
        parse_report(data, error=TeeRefused)
