"""attestation.tee: the nine checks of a TEE's report, its place in the evidence, and in the appraisal of a quote."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from oci_hook.attestation.appraisal import appraise_evidence
from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.evidence import Evidence, TeeReport, tee_report_data
from oci_hook.attestation.tee import AppraisedTee, TeeExpectation, appraise_tee
from oci_hook.errors import BundleInvalid, EvidenceRefused, SczError
from oci_hook.key_errors import TeeRefused, TeeUnavailable
from oci_hook.tee_policy import parse_tee_policy
from tests.attestation_vectors import public_of, t
from tests.sev_snp import (
    MEASUREMENT,
    NOW,
    REAL,
    REAL_DATA,
    REAL_REPORT,
    REAL_ROOT,
    TCB,
    Maker,
    ec_key,
    of,
    policy_document,
    signature,
    table,
)

MILAN = Maker()
DATA = bytes(range(64))
REAL_MEASUREMENT = REAL_REPORT[0x90:0xC0].hex()


def expectation(maker: Maker = MILAN, *, kept: Any = None, **changes: Any) -> TeeExpectation:
    policy = parse_tee_policy(policy_document(maker, **changes), error=BundleInvalid)
    return TeeExpectation(policy, kept or {}, NOW)


def evidence(maker: Maker = MILAN, **changes: Any) -> TeeReport:
    return TeeReport("sev_guest", maker.report(DATA, **changes), table(maker.chain()))


def appraise(report: TeeReport | None, expected: TeeExpectation | None = None, data: bytes = DATA) -> AppraisedTee:
    return appraise_tee(report, expected_data=data, expectation=expected or expectation())


def refused(report: TeeReport | None, match: str, error: type[SczError] = TeeRefused, **how: Any) -> None:
    with pytest.raises(error, match=match):
        appraise(report, **how)


def test_a_real_report() -> None:
    policy = {"measurements": [REAL_MEASUREMENT], "roots": [REAL_ROOT.hex()], "allow": ["debug"]}
    report = TeeReport("sev_guest", REAL_REPORT, table(REAL))
    found = appraise(report, expectation(**policy), REAL_DATA)
    assert (found.kind, found.product, found.signing_key) == ("sev-snp", "milan", "vcek")
    assert found.measurement.hex() == REAL_MEASUREMENT
    # Its guest may be debugged, so without the owner's word it is refused.
    del policy["allow"]
    refused(report, "permits its host debug", expected=expectation(**policy), data=REAL_DATA)


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_accepted(product: str, kind: str) -> None:
    maker = replace(of(product), kind=kind)
    found = appraise(evidence(maker), expectation(maker))
    assert (found.product, found.signing_key, found.measurement) == (product.lower(), kind, MEASUREMENT)


def test_no_report_or_one_of_another_kind() -> None:
    refused(None, "gives no report of a TEE", TeeUnavailable)
    refused(replace(evidence(), provider="tdx_guest"), "reports here are of tdx_guest", TeeUnavailable)


def test_each_byte_of_the_report_counts() -> None:
    good, accepted = evidence(), []
    for place in range(len(good.report)):
        changed = bytearray(good.report)
        changed[place] ^= 1 << place % 8
        try:
            appraise(replace(good, report=bytes(changed)))
            accepted.append(place)
        except (TeeRefused, TeeUnavailable):
            pass
    assert accepted == []


def test_certificates_from_the_table_and_from_the_store() -> None:
    chain = MILAN.chain()
    report = evidence()
    kept: Any = dict(chain)
    for held in range(4):
        table_has = {role: der for place, (role, der) in enumerate(chain.items()) if place < held}
        appraise(replace(report, certificates=table(table_has)), expectation(kept=kept))
    appraise(replace(report, certificates=b""), expectation(kept=kept))
    # A table comes first, and a false one in it is not mended.
    wrong = table({"ask": chain["ark"]})
    refused(replace(report, certificates=wrong), "SEV-SNP certificates", expected=expectation(kept=kept))


@pytest.mark.parametrize("role", ["ark", "ask", "vcek"])
def test_a_certificate_that_nobody_has(role: str) -> None:
    chain = {name: der for name, der in MILAN.chain().items() if name != role}
    refused(replace(evidence(), certificates=table(chain)), f"has the certificates {role}", TeeUnavailable)


def test_a_report_of_a_vlek_needs_a_vlek_s_certificate() -> None:
    vlek = replace(MILAN, kind="vlek")
    report = replace(evidence(vlek), certificates=table(MILAN.chain()))
    refused(report, "has the certificates vlek", TeeUnavailable, expected=expectation(vlek))


def test_without_the_owner_s_word_no_vlek() -> None:
    vlek = replace(MILAN, kind="vlek")
    refused(evidence(vlek), "the VLEK of 'cloud-1' is none", expected=expectation())


def test_a_root_of_the_guest_s_own() -> None:
    refused(evidence(), "is none that the model's owner accepts", expected=expectation(roots=[REAL_ROOT.hex()]))


def test_signed_by_another_key_than_the_certificate_s() -> None:
    body = MILAN.report(DATA)[:0x2A0]
    refused(replace(evidence(), report=body + signature(ec_key("other"), body)), "not signed by the key")


def test_another_occasion() -> None:
    for data in (bytes(64), DATA[:63] + b"\0", DATA[32:] + DATA[:32]):
        refused(evidence(), "made for another occasion", data=data)


def test_another_measurement() -> None:
    report = evidence(measurement=b"\1" * 48)
    refused(report, f"measurement {'01' * 48} is none")
    appraise(report, expectation(measurements=["02" * 48, "01" * 48]))


@pytest.mark.parametrize(("bit", "name"), [(19, "debug"), (18, "migration")])
def test_what_the_guest_permits_its_host(bit: int, name: str) -> None:
    report = evidence(policy=0x30000 | 1 << bit)
    refused(report, f"permits its host {name}")
    appraise(report, expectation(allow=[name]))
    other = {"debug": "migration", "migration": "debug"}[name]
    refused(report, f"permits its host {name}", expected=expectation(allow=[other]))


@pytest.mark.parametrize("vmpl", [1, 2, 3])
def test_who_asked(vmpl: int) -> None:
    refused(evidence(vmpl=vmpl), f"VMPL {vmpl} asked")
    refused(evidence(vmpl=vmpl), f"VMPL {vmpl} asked", expected=expectation(vmpl=vmpl - 1))
    appraise(evidence(vmpl=vmpl), expectation(vmpl=vmpl))


LEVELS = {"bootloader": (4, 0), "tee": (1, 1), "snp": (22, 6), "microcode": (213, 7)}


@pytest.mark.parametrize("level", LEVELS)
def test_patch_levels(level: str) -> None:
    has, place = LEVELS[level]
    appraise(evidence(), expectation(minimum_tcb={"milan": {level: has}}))
    expected = expectation(minimum_tcb={"milan": {level: has + 1}})
    refused(evidence(), f"the reported patch levels .*{level} {has} < {has + 1}", expected=expected)
    # The certificate binds the reported ones alone; the host may run, or have launched, something older.
    low = TCB[:place] + bytes([has - 1]) + TCB[place + 1 :]
    for which in ("current", "committed", "launch"):
        expected = expectation(minimum_tcb={"milan": {level: has}})
        refused(evidence(**{which: low}), f"the {which} patch levels are below", expected=expected)
        appraise(evidence(**{which: low}))


def test_patch_levels_are_by_product() -> None:
    turin = of("Turin")
    refused(evidence(turin), "none for turin", expected=expectation(turin, minimum_tcb={"milan": {"snp": 0}}))
    appraise(evidence(turin), expectation(turin, minimum_tcb={"milan": {"snp": 99}, "turin": {"fmc": 1, "snp": 22}}))
    expected = expectation(turin, minimum_tcb={"turin": {"fmc": 2}})
    refused(evidence(turin), "fmc 1 < 2", expected=expected)


def test_tables_that_lie() -> None:
    for certificates in (b"\1", b"\1" * 4096, bytes((64 << 10) + 1), table(MILAN.chain())[:-5000]):
        refused(replace(evidence(), certificates=certificates), "certificate table")


# --- in the evidence --------------------------------------------------------------------------------------------------

EXTRA = hashlib.sha256(b"occasion").digest()
KEY = t.p256()
AK = t.ecc_public(KEY, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
PCRS = {4: b"\4" * 32, 8: b"\x08" * 32, 9: b"\x09" * 32}


def quoted() -> Evidence:
    attest = t.attest(t.ST_QUOTE, t.quote_info(PCRS, None), signer=t.qualified_name(AK), extra_data=EXTRA)
    return Evidence(attest, t.signed(KEY, attest), PCRS)


def with_report(quote: Evidence, data: bytes | None = None) -> Evidence:
    data = tee_report_data(EXTRA, quote.quote_digest) if data is None else data
    return replace(quote, tee=TeeReport("sev_guest", MILAN.report(data), table(MILAN.chain())))


def appraised(found: Evidence, tee: TeeExpectation | None) -> Any:
    form = BootForm(PCRS, bytes(32), bytes(32), bytes(32))
    policy = BootPolicy("owner", "model", "default", 0, (form,), bytes(32))
    return appraise_evidence(found, ak=public_of(AK), expected_extra_data=EXTRA, boot_policy=policy, tee=tee)


def test_report_data_is_the_quote_s_data_and_the_quote() -> None:
    assert tee_report_data(EXTRA, b"q" * 32) == EXTRA + b"q" * 32
    for parts in ((EXTRA, b""), (EXTRA[:31], b"q" * 33), (EXTRA + b"q" * 32, b"")):
        with pytest.raises(ValueError):
            tee_report_data(*parts)


def test_the_digest_covers_the_report() -> None:
    quote = quoted()
    full = with_report(quote)
    assert full.tee is not None
    assert quote.digest == quote.quote_digest == full.quote_digest
    parts = (b"sev_guest", full.tee.report, full.tee.certificates)
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert full.digest == hashlib.sha256(b"scz-smm/evidence/v1 tee\0" + quote.quote_digest + framed).digest()
    others = {
        replace(full, tee=replace(full.tee, **change)).digest
        for change in ({"provider": "x"}, {"report": b"x"}, {"certificates": b""})
    }
    assert len(others | {full.digest, quote.digest, replace(full, signature=b"x").digest}) == 6


def test_in_an_appraisal() -> None:
    quote = quoted()
    full = with_report(quote)
    found = appraised(full, expectation())
    assert (found.tee.kind, found.evidence_digest) == ("sev-snp", full.digest)
    assert appraised(full, None).tee is None
    assert appraised(quote, None).evidence_digest == quote.digest
    with pytest.raises(TeeUnavailable):
        appraised(quote, expectation())
    # A report of another quote of the same start, or beside a quote that is none.
    for data in (EXTRA + bytes(32), EXTRA + quoted().quote_digest, bytes(32) + quote.quote_digest):
        with pytest.raises(TeeRefused, match="another occasion"):
            appraised(with_report(quote, data), expectation())
    with pytest.raises(EvidenceRefused):
        appraised(replace(full, signature=quoted().attest), expectation())
