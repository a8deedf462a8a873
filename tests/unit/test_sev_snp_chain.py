"""attestation.sev_snp_chain: the real chain of a chip, chains of our own, and the hypervisor's table."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.sev_snp import parse_report
from oci_hook.attestation.sev_snp_chain import Endorsement, Role, parse_table, verify_endorsement
from oci_hook.key_errors import TeeRefused
from tests.sev_snp import (
    CHIP,
    GUIDS,
    NOW,
    REAL,
    REAL_REPORT,
    REAL_ROOT,
    Maker,
    certificate,
    entry,
    extensions,
    ia5,
    integer,
    of,
    rsa_key,
    table,
)

MILAN = Maker()
VLEK = replace(MILAN, kind="vlek")


def verify(
    chain: Mapping[str, bytes],
    report: bytes,
    *,
    roots: tuple[bytes, ...] = (),
    providers: tuple[str, ...] = (),
    now: datetime = NOW,
) -> Endorsement:
    return verify_endorsement(
        cast(Mapping[Role, bytes], chain),
        parse_report(report, error=TeeRefused),
        roots=roots or (MILAN.root,),
        vlek_providers=providers,
        now=now,
        error=TeeRefused,
    )


def refused(chain: Mapping[str, bytes], match: str, *, report: bytes | None = None, **how: Any) -> None:
    with pytest.raises(TeeRefused, match=match):
        verify(chain, report or MILAN.report(), **how)


def test_the_real_chain() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the hook's stderr is the engine's
        found = verify(REAL, REAL_REPORT, roots=(REAL_ROOT,))
    assert (found.kind, found.product, found.root) == ("vcek", "milan", REAL_ROOT)
    assert str(found.tcb) == "fmc=0 bootloader=2 tee=0 snp=5 microcode=68"


def test_each_byte_of_the_real_chain_counts() -> None:
    accepted = []
    for role, der in REAL.items():
        for place in range(len(der)):
            changed = der[:place] + bytes([der[place] ^ 1 << place % 8]) + der[place + 1 :]
            try:
                verify({**REAL, role: changed}, REAL_REPORT, roots=(REAL_ROOT,))
                accepted.append((role, place))
            except TeeRefused:
                pass
    assert accepted == []


@pytest.mark.parametrize("role", ["ark", "ask", "vcek"])
def test_truncated_extended_and_oversized(role: str) -> None:
    for der in (b"", REAL[role][:-1], REAL[role] + b"\0", b"0" * (16 << 10), b"0" * ((16 << 10) + 1)):
        refused({**REAL, role: der}, "malformed|larger than", report=REAL_REPORT, roots=(REAL_ROOT,))


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_chains_of_each_product(product: str, kind: str) -> None:
    maker = replace(of(product), kind=kind)
    for version in (2, 3, 5):
        found = verify(maker.chain(), maker.report(version=version), providers=("cloud-1",))
        assert (found.kind, found.product, found.root) == (kind, product.lower(), MILAN.root)
        assert found.tcb.microcode == 213
        assert found.tcb.fmc == (product == "Turin")


def test_a_root_that_is_not_pinned() -> None:
    refused(MILAN.chain(), f"root's key {MILAN.root.hex()} is none", roots=(REAL_ROOT,))
    refused(REAL, "is none that the model's owner accepts", report=REAL_REPORT)
    # A root of the attacker's under AMD's name, and a pinned root that did not sign the rest.
    other = certificate("ARK-Milan", "ARK-Milan", rsa_key("other").public_key(), rsa_key("other"), ca=-1)
    refused({**MILAN.chain(), "ark": other}, "is none that the model's owner accepts")
    refused({**MILAN.chain(), "ark": REAL["ark"]}, "ask is not (issued|signed) by the one above", roots=(REAL_ROOT,))


def test_in_another_order() -> None:
    chain = MILAN.chain()
    ark, ask, vcek = (chain[role] for role in ("ark", "ask", "vcek"))
    for roles in ({"ark": ask, "ask": ark}, {"ask": vcek, "vcek": ask}, {"ask": ark}, {"vcek": ask}, {"ask": vcek}):
        refused({**chain, **roles}, "SEV-SNP certificates: ")


def test_a_self_signature_that_is_none() -> None:
    ark = certificate("ARK-Milan", "ARK-Milan", rsa_key("ark").public_key(), rsa_key("other"), ca=-1)
    refused({**MILAN.chain(), "ark": ark}, "ark is not signed by the one above")


@pytest.mark.parametrize("role", ["ark", "ask"])
@pytest.mark.parametrize("changes", [{"ca": None}, {"may_sign": False}])
def test_who_may_not_sign(role: str, changes: dict[str, Any]) -> None:
    made = getattr(MILAN, role)(**changes)
    refused({**MILAN.chain(), role: made}, f"{role} (may not sign|does not say that it is an authority)")


def test_a_root_that_may_not_have_an_authority_below() -> None:
    refused({**MILAN.chain(), "ark": MILAN.ark(ca=0)}, "ark may not sign")


@pytest.mark.parametrize(
    "changes",
    [
        {"pss": padding.PSS(padding.MGF1(hashes.SHA384()), salt_length=32)},
        {"pss": padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=48)},
        {"pss": None},
        {"pss": padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32), "hash_": hashes.SHA256()},
        {"pss": padding.PSS(padding.MGF1(hashes.SHA512()), salt_length=48), "hash_": hashes.SHA512()},
    ],
)
@pytest.mark.parametrize("role", ["ark", "ask", "leaf"])
def test_other_algorithms(role: str, changes: dict[str, Any]) -> None:
    made = getattr(MILAN, role)(**changes)
    refused({**MILAN.chain(), role.replace("leaf", "vcek"): made}, "is not (signed|issued) by the one above")


def test_a_short_key_of_an_authority() -> None:
    small = rsa_key("small", 2048)
    ask = certificate("SEV-Milan", "ARK-Milan", small.public_key(), rsa_key("ark"), ca=0)
    refused({**MILAN.chain(), "ask": ask, "vcek": MILAN.leaf(signer=small)}, "not an RSA key of 4096 bits")


def test_a_chip_s_key_on_another_curve_or_of_rsa() -> None:
    for key in (ec.generate_private_key(ec.SECP256R1()).public_key(), rsa_key("small", 2048).public_key()):
        refused({**MILAN.chain(), "vcek": MILAN.leaf(public_key=key)}, "is not on P-384")


@pytest.mark.parametrize("role", ["ark", "ask", "leaf"])
def test_dates(role: str) -> None:
    past = (NOW - timedelta(days=20), NOW - timedelta(seconds=1))
    future = (NOW + timedelta(seconds=1), NOW + timedelta(days=20))
    named = role.replace("leaf", "vcek")
    for dates in (past, future):
        refused({**MILAN.chain(), named: getattr(MILAN, role)(dates=dates)}, f"{named} is not in its dates")
    for dates in ((NOW, future[1]), (past[0], NOW)):
        verify({**MILAN.chain(), named: getattr(MILAN, role)(dates=dates)}, MILAN.report())


def test_the_real_chain_at_other_times() -> None:
    for now in (datetime(2026, 8, 28, tzinfo=UTC), datetime(2033, 8, 29, tzinfo=UTC)):
        refused(REAL, "vcek is not in its dates", report=REAL_REPORT, roots=(REAL_ROOT,), now=now)


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("leaf", {"subject": "SEV-VLEK"}),
        ("leaf", {"subject": "SEV-VCEK\0"}),
        ("leaf", {"amd": {**extensions("Genoa"), "4": CHIP}}),
        ("leaf", {"amd": {**extensions("Milan"), "2": ia5("Rome-B0")}}),
        ("leaf", {"amd": {**extensions("Milan"), "2": ia5("milan")}}),
    ],
)
def test_names_that_do_not_fit(role: str, changes: dict[str, Any]) -> None:
    refused({**MILAN.chain(), "vcek": getattr(MILAN, role)(**changes)}, "are no chain of a vcek")


def test_a_product_s_name_without_its_stepping() -> None:
    turin = of("Turin")
    amd = {**extensions("Turin", hwid=turin.chip), "2": ia5("Turin")}  # as AMD writes it
    assert verify({**turin.chain(), "vcek": turin.leaf(amd=amd)}, turin.report()).product == "turin"


def test_a_chain_of_another_product_than_the_report() -> None:
    refused(MILAN.chain(), "they are of milan, the report of genoa", report=of("Genoa").report())


def test_vleks_need_the_owner_s_word_and_an_intermediate_of_their_own() -> None:
    report = VLEK.report()
    for providers in ((), ("cloud-2",), ("cloud-",), ("CLOUD-1",)):
        refused(VLEK.chain(), "the VLEK of 'cloud-1' is none", report=report, providers=providers)
    refused({**VLEK.chain(), "ask": MILAN.ask()}, "not issued by the one above", report=report, providers=("cloud-1",))
    # What signed a cloud's keys cannot sign a chip's, whatever that chip's certificate says.
    forged = replace(VLEK, kind="vlek").leaf(subject="SEV-VCEK", amd=extensions("Milan"))
    refused({"ark": VLEK.ark(), "ask": VLEK.ask(), "vcek": forged}, "are no chain of a vcek")
    for key_info in (4, 4 | 2):
        masked = VLEK.report(key_info=key_info, chip_id=bytes(64))
        assert verify(VLEK.chain(), masked, providers=("cloud-1",)).kind == "vlek"


@pytest.mark.parametrize("oid", ["3.1", "3.2", "3.3", "3.8"])
@pytest.mark.parametrize("product", ["Milan", "Turin"])
def test_other_patch_levels_than_the_report_s(oid: str, product: str) -> None:
    maker = of(product)
    amd = {**extensions(product, hwid=maker.chip), oid: integer(99)}
    refused({**maker.chain(), "vcek": maker.leaf(amd=amd)}, "for other patch levels", report=maker.report())


def test_a_chip_s_number_that_is_masked_or_another() -> None:
    for key_info in (0, 2):
        masked = MILAN.report(key_info=key_info, chip_id=bytes(64))
        refused(MILAN.chain(), "masks the chip's number", report=masked)
    refused(MILAN.chain(), "another chip's", report=MILAN.report(chip_id=bytes(63) + b"\1"))
    turin = of("Turin")
    refused(turin.chain(), "another chip's", report=turin.report(chip_id=turin.chip[:63] + b"\1"))
    refused(turin.chain(), "another chip's", report=turin.report(chip_id=b"\xff" + turin.chip[1:]))


@pytest.mark.parametrize("oid", sorted(extensions("Turin")))
def test_an_extension_that_is_missing_or_malformed(oid: str) -> None:
    turin = of("Turin")
    good = extensions("Turin", hwid=turin.chip)
    malformed = (b"", b"\2\1", b"\2\1\xff", b"\2\2\0\1", b"\x16\x7f\x41", b"\x16\0", b"\x0c\1A", good[oid] + b"\0")
    for bad in (None, *malformed):
        amd = {key: value for key, value in good.items() if key != oid} | ({} if bad is None else {oid: bad})
        if oid == "1" or (bad is None and oid in ("3.5", "3.6", "3.7")):
            verify({**turin.chain(), "vcek": turin.leaf(amd=amd)}, turin.report())  # nothing rests on them
        else:
            refused({**turin.chain(), "vcek": turin.leaf(amd=amd)}, "SEV-SNP certificates: ", report=turin.report())


@pytest.mark.parametrize("oid", ["3.4", "3.5", "3.6", "3.7"])
def test_a_reserved_patch_level(oid: str) -> None:
    leaf = MILAN.leaf(amd={**extensions("Milan"), oid: integer(1)})
    refused({**MILAN.chain(), "vcek": leaf}, "reserved patch level")


# --- the table --------------------------------------------------------------------------------------------------------

CHAIN = {"vcek": b"V" * 1300, "ask": b"S" * 1600, "ark": b"R" * 1600}


def table_refused(data: bytes, match: str = "certificate table") -> None:
    with pytest.raises(TeeRefused, match=match):
        parse_table(data, error=TeeRefused)


def test_a_table() -> None:
    assert parse_table(table(CHAIN), error=TeeRefused) == CHAIN
    assert parse_table(table(CHAIN, gap=7), error=TeeRefused) == CHAIN
    assert parse_table(table({**CHAIN, "crl": b"L" * 500}), error=TeeRefused) == CHAIN
    assert parse_table(table({}), error=TeeRefused) == {}
    assert parse_table(b"", error=TeeRefused) == {}
    assert parse_table(bytes(24), error=TeeRefused) == {}


def lines(*entries: tuple[str, int, int], size: int = 4096) -> bytes:
    return b"".join(entry(UUID(GUIDS[role]).bytes, *where) for role, *where in entries).ljust(size, b"\0")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\1", "no end"),
        (bytes(23), "no end"),
        (table(CHAIN)[:24], "no end"),
        (table(CHAIN)[:72], "no end"),
        (table(CHAIN)[:96], "lies outside"),
        (table(CHAIN)[:4000], "lies outside"),
        (lines(("ark", 0, 10)), "in the header"),
        (lines(("ark", 47, 10)), "in the header"),
        (lines(("ark", 100, 3997)), "lies outside"),
        (lines(("ark", 4097, 0)), "lies outside"),
        (lines(("ark", 0xFFFFFFFF, 0xFFFFFFFF)), "lies outside"),
        (lines(("ark", 100, 0xFFFFFFFF)), "lies outside"),
        (lines(("ark", 100, 10), ("ask", 109, 10)), "in another entry"),
        (lines(("ark", 100, 10), ("ask", 100, 10)), "in another entry"),
        (lines(("ark", 200, 10), ("ask", 100, 101)), "in another entry"),
        (lines(("ark", 100, 10), ("ark", 110, 10)), "two entries"),
        (lines(("crl", 100, 10), ("crl", 110, 10)), "two entries"),
        (lines(("ark", 100, 0)), "of 0 bytes"),
        (lines(("ark", 100, 16385), size=32768), "of 16385 bytes"),
        (lines(*[("ark", 1000, 1)] * 17), "more than 16"),
        (bytes((64 << 10) + 1), "more than 65536"),
    ],
)
def test_tables_that_are_refused(data: bytes, match: str) -> None:
    table_refused(data, match)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(GUIDS)), st.integers(0, 5000), st.integers(0, 5000)), max_size=5).map(
        lambda entries: lines(*entries)
    )
    | st.binary(max_size=300)
)
def test_any_table(data: bytes) -> None:
    try:
        found = parse_table(data, error=TeeRefused)
    except TeeRefused:
        return
    assert sum(len(der) for der in found.values()) + 24 * (len(found) + 1) <= max(len(data), 24)
    for der in found.values():
        assert der in data


def test_the_key_of_an_entry_is_its_guid_as_it_is_written() -> None:
    guid = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
    assert struct.unpack_from("<16sII", table({"vcek": b"V"})) == (guid, 48, 1)
