"""`sczctl tee`: what it shows of a guest, that its proposal accepts that guest's next report, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from oci_hook.attestation.evidence import TeeReport
from oci_hook.attestation.tee import TeeExpectation, appraise_tee
from oci_hook.errors import BundleInvalid
from oci_hook.tee_policy import parse_tee_policy
from tests.commands import Household, done, misused, refused, snapshot
from tests.sev_snp import CHIP, MEASUREMENT, NOW, TCB, Maker, extensions, ia5, of, table
from tests.tsm import behaviour_of, stand_in

MILAN = Maker()
DATA = bytes(range(64))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Household:
    made = Household(tmp_path_factory.mktemp("house"))
    (made.host / "tsm").mkdir()
    made.config.write_text(made.config.read_text() + f'tsm = "{made.host}/tsm"\n')
    return made


@contextmanager
def guest(house: Household, maker: Maker = MILAN, *, chain: Any = None, **changes: Any) -> Iterator[None]:
    behaviour = {**behaviour_of(maker, **changes.pop("report", {})), **changes}
    behaviour.setdefault("auxblob", table(chain or maker.chain()).hex())
    with stand_in(house.host / "tsm", behaviour) as names:
        yield
        assert names() == []


@pytest.mark.parametrize("product", ["Milan", "Turin"])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_its_proposal_accepts_the_guest_s_reports(house: Household, product: str, kind: str) -> None:
    maker = replace(of(product), kind=kind)
    with guest(house, maker):
        before = snapshot(house.host / "store")
        shown = json.loads(done(house.ctl("tee", "--json")).out)
        assert snapshot(house.host / "store") == before
    policy = parse_tee_policy(shown["tee"], error=BundleInvalid)
    assert policy.minimum_tcb[product.lower()]["snp"] == 22
    assert policy.allow == ()
    report = TeeReport("sev_guest", maker.report(DATA), table(maker.chain()))
    found = appraise_tee(report, expected_data=DATA, expectation=TeeExpectation(policy, {}, NOW))
    assert (found.product, shown["signed_by"], shown["root"]) == (product.lower(), kind, MILAN.root.hex())
    assert shown["provider"] == ("cloud-1" if kind == "vlek" else None)


def test_what_a_person_sees(house: Household) -> None:
    low = bytes([3]) + TCB[1:]
    with guest(house, report={"policy": 0xB0000, "vmpl": 1, "launch": low}):
        shown = done(house.ctl("tee")).out
        proposal = json.loads(done(house.ctl("tee", "--json")).out)["tee"]
    for line in (
        "product: milan",
        "signed_by: vcek",
        f"root: {MILAN.root.hex()}",
        f"measurement: {MEASUREMENT.hex()}",
        "vmpl: 1",
        "may_debug: True",
        f"chip: {CHIP.hex()}",
        "tcb launch: bootloader=3 tee=1 snp=22 microcode=213",
    ):
        assert f"{line}\n" in shown
    assert (proposal["allow"], proposal["vmpl"]) == (["debug"], 1)
    assert proposal["minimum_tcb"]["milan"]["bootloader"] == 3


def test_a_hostile_name_of_a_cloud(house: Household) -> None:
    vlek = replace(MILAN, kind="vlek")
    amd = {**extensions("Milan", csp="x"), "5": ia5("a\x1b[31m\nroot: 00")}
    with guest(house, vlek, chain={**vlek.chain(), "vlek": vlek.leaf(amd=amd)}):
        assert "provider: a?[31m?root: 00\n" in done(house.ctl("tee")).out


def test_refused(house: Household) -> None:
    other = Maker().chain() | {"vcek": MILAN.leaf(amd={**extensions("Milan"), "4": bytes(64)})}
    with guest(house, mkdir=6):
        refused(house.ctl("tee"), 75, "no report can be asked for")
    with guest(house, provider="tdx_guest", outblob="00" * 1184):
        refused(house.ctl("tee"), 75, "tdx_guest")
    with guest(house, auxblob=""):
        refused(house.ctl("tee"), 75, "has the certificates")
    with guest(house, chain=other):
        refused(house.ctl("tee", "--json"), 59, "another chip's")
    with guest(house, outblob=MILAN.report().hex()):
        refused(house.ctl("tee"), 59, "another occasion")
    with guest(house, chain={**MILAN.chain(), "ark": b"0" * 100}):
        refused(house.ctl("tee"), 59, "malformed")
    (house.host / "tsm").rename(house.host / "gone")
    refused(house.ctl("tee"), 75, "no report can be asked for")
    (house.host / "gone").rename(house.host / "tsm")
    misused(house.ctl("tee", "word"))


def test_certificates_that_are_kept(house: Household) -> None:
    folder = house.store_folder / "tee"
    folder.mkdir(parents=True)
    for role, der in MILAN.chain().items():
        (folder / f"{role}.der").write_bytes(der)
    with guest(house, auxblob=None):
        assert json.loads(done(house.ctl("tee", "--json")).out)["product"] == "milan"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
