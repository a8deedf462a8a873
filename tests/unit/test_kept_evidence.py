"""`attestation.kept_evidence` and its appraisal: the document is strict, and every part that is swapped is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.admission import _pcr_signature
from oci_hook.attestation.boot_policy import (
    parse_boot_policy,
    sign_boot_policy,
    verify_boot_policy,
    with_host_signatures,
)
from oci_hook.attestation.evidence import Evidence, TeeReport
from oci_hook.attestation.evidence_appraisal import StartAppraisal, appraise_kept
from oci_hook.attestation.kept_evidence import (
    LIMIT_BYTES,
    STARTS_LIMIT,
    TEE_LIMIT_BYTES,
    KeptEvidence,
    StartEvidence,
    format_evidence,
    parse_evidence,
)
from oci_hook.attestation.pcr_signature import SignedPcrs, UnverifiedPcrSignature, fingerprint, load_signer_pem
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.results import result_of
from oci_hook.audit_chain import EMPTY_HEAD, Verified
from oci_hook.errors import BootPolicyRefused, BootStateRefused, EvidenceRefused, Revoked, SczError
from oci_hook.key_errors import EvidenceInvalid, GenerationRefused
from tests.attestation_vectors import hostile, public_of, value_or_ours
from tests.kept import APPROVED, CLASS, CONTAINER, HEAD, MANIFEST, MODEL, Witness, make_witness


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return make_witness(tmp_path_factory.mktemp("witness"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return make_witness(tmp_path_factory.mktemp("other"), "rival")


def one(kept: KeptEvidence, witness: Witness, log: list[Verified] | None = None, **changes: Any) -> StartAppraisal:
    (found,) = appraise_kept(kept, witness.references(**changes), log)
    return found


def refused(appraisal: StartAppraisal, error: type[SczError]) -> str:
    assert type(appraisal.error) is error, appraisal
    return appraisal.error.message


REPORT = TeeReport("sev_guest", b"report", b"table")


def in_a_guest(start: StartEvidence, report: TeeReport = REPORT) -> StartEvidence:
    """The same start with a TEE's report."""
    return replace(start, quote=replace(start.quote, tee=report))


def bare(kept: KeptEvidence) -> Evidence:
    """The quote alone of a document's first start."""
    return replace(kept.starts[0].quote, tee=None)


# --- the document -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(witness: Witness) -> None:
    kept = witness.kept(witness.start(1), witness.start(2, remote="keylime", pcr_signature=b"s" * 256))
    assert parse_evidence(format_evidence(kept)) == kept
    assert not re.search(rb"remote|pcr_signature|tee", format_evidence(witness.kept()))
    reported = witness.kept(in_a_guest(witness.start()))
    assert parse_evidence(format_evidence(reported)) == reported
    assert parse_evidence(format_evidence(reported)).starts[0].quote.digest == reported.starts[0].quote.digest


def test_a_report_that_is_too_large_is_not_kept(witness: Witness) -> None:
    for large in (TeeReport("x", b"r" * (TEE_LIMIT_BYTES + 1), b""), TeeReport("x", b"r", bytes(TEE_LIMIT_BYTES + 1))):
        kept = witness.kept(in_a_guest(witness.start(), large))
        assert parse_evidence(format_evidence(kept)) == witness.kept(replace(kept.starts[0], quote=bare(kept)))


def test_later_models_stand_behind_earlier_ones(witness: Witness) -> None:
    first, second = witness.kept(witness.start(1)), witness.kept(witness.start(2))
    assert first.joined(second).starts == (*first.starts, *second.starts)


def test_the_most_that_is_kept_can_be_read(witness: Witness) -> None:
    every = {pcr: bytes([pcr + 1]) * 32 for pcr in range(24)}
    largest = witness.start(1, pcrs=every, model_name="m" * 64, model_version="v" * 64, device_name="d" * 64)
    report = TeeReport("p" * 32, b"r" * TEE_LIMIT_BYTES, b"c" * TEE_LIMIT_BYTES)
    largest = in_a_guest(replace(largest, pcr_signature=b"s" * 512), report)
    kept = KeptEvidence("c" * 1024, (largest,) * STARTS_LIMIT)
    assert len(format_evidence(kept)) < LIMIT_BYTES
    assert len(parse_evidence(format_evidence(kept)).starts) == STARTS_LIMIT
    assert len(kept.joined(kept).starts) == STARTS_LIMIT


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema="scz-smm/evidence/v2"),
        lambda d: d.update(starts=[]),
        lambda d: d.update(starts=d["starts"] * 65),
        lambda d: d.update(container=""),
        lambda d: d.update(container="a\nb"),
        lambda d: d.update(more=1),
        lambda d: d["starts"][0].update(more=1),
        lambda d: d["starts"][0]["model"].update(more=1),
        lambda d: d["starts"][0].update(nonce="00" * 31),
        lambda d: d["starts"][0].update(audit_head="00" * 33),
        lambda d: d["starts"][0].update(manifest="ab" * 32),
        lambda d: d["starts"][0].update(attest="A" * 8000),
        lambda d: d["starts"][0].update(remote="other"),
        lambda d: d["starts"][0].update(pcr_signature=""),
        lambda d: d["starts"][0].update(pcr_signature="A" * 700),
        lambda d: d["starts"][0].update(tee={"provider": "p", "report": "", "certificates": ""}),
        lambda d: d["starts"][0].update(tee={"provider": "P", "report": "AA", "certificates": ""}),
        lambda d: d["starts"][0].update(tee={"provider": "p", "report": "AA"}),
        lambda d: d["starts"][0].update(tee={"provider": "p", "report": "AA", "certificates": "", "more": 1}),
        lambda d: d["starts"][0].update(tee={"provider": "p", "report": "AAAA" * 6000, "certificates": ""}),
        lambda d: d["starts"][0].update(pcrs={"24": "00" * 32}),
        lambda d: d["starts"][0].pop("form"),
    ],
)
def test_a_document_of_another_form_is_refused(witness: Witness, change: Callable[[Any], object]) -> None:
    document = json.loads(format_evidence(witness.kept()))
    change(document)
    with pytest.raises(EvidenceInvalid):
        parse_evidence(json.dumps(document).encode())


def test_oversized_and_duplicate_keys_are_refused(witness: Witness) -> None:
    good = format_evidence(witness.kept())
    with pytest.raises(EvidenceInvalid, match="larger than"):
        parse_evidence(good + b" " * LIMIT_BYTES)
    with pytest.raises(EvidenceInvalid, match="duplicate key"):
        parse_evidence(good.replace(b'"nonce":', b'"nonce":"00","nonce":', 1))


def test_fuzz_a_document_is_read_or_refused(witness: Witness) -> None:
    good = format_evidence(witness.kept())

    @settings(max_examples=300, deadline=None)
    @given(hostile(good))
    def run(data: bytes) -> None:
        found = value_or_ours(parse_evidence, data)
        assert found is None or parse_evidence(format_evidence(found)) == found

    run()


# --- the appraisal ----------------------------------------------------------------------------------------------------


def test_good_evidence_is_accepted_and_says_why(witness: Witness) -> None:
    found = one(witness.kept(), witness, container_id=CONTAINER, manifest_digest=MANIFEST)
    assert found.error is None
    said = " / ".join(found.shown)
    assert "enrolled device edge-1's" in said
    assert "name and class (default) are those of the owner's record" in said
    assert "one nonce, token, container, manifest and audit log" in said
    assert "PCR 9 (kernel and initrd, as GRUB read them)" in said
    assert any("audit log" in each for each in found.unchecked)


PARTS: dict[str, Callable[[Witness, Witness], KeptEvidence]] = {
    "another nonce": lambda w, _: w.kept(w.start(1, nonce=bytes(32))),
    "another token": lambda w, _: w.kept(w.start(1, token_hash=bytes(32))),
    "another head": lambda w, _: w.kept(w.start(1, audit_head=bytes(32))),
    "another container": lambda w, _: KeptEvidence("deadbeef", (w.start(),)),
    "another manifest": lambda w, _: w.kept(w.start(1, manifest_digest="sha256:" + "cd" * 32)),
    "another start's quote": lambda w, _: w.kept(w.start(1, quote=w.start(2).quote)),
    "another container's quote": lambda w, _: w.kept(w.start(1, quote=w.start(1, container="x").quote)),
    "another device's quote": lambda w, o: w.kept(w.start(1, quote=o.start(1).quote)),
    "another device": lambda w, o: w.kept(w.start(1, quote=o.start(1).quote, ak=public_of(o.ak))),
    "another owner's": lambda w, o: w.kept(w.start(1, owner_id=o.keyring.owner.owner_id)),
    "another version": lambda w, _: w.kept(w.start(1, model_version="2")),
    "values that were not quoted": lambda w, _: w.kept(
        w.start(1, quote=replace(w.start(1).quote, pcrs={**APPROVED, 9: bytes(32)}))
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_swapped_part_is_refused(witness: Witness, other: Witness, name: str) -> None:
    message = refused(one(PARTS[name](witness, other), witness), EvidenceRefused)
    assert message.isprintable()


@pytest.mark.parametrize(
    "wanted", [{"container_id": "x"}, {"manifest_digest": "sha256:" + "0" * 64}, {"token_hash": b"x"}]
)
def test_good_evidence_about_something_else_is_refused(witness: Witness, wanted: dict[str, Any]) -> None:
    assert "about another" in refused(one(witness.kept(), witness, **wanted), EvidenceRefused)


def test_another_boot_state_is_named(witness: Witness) -> None:
    changed = witness.start(1, pcrs={**APPROVED, 8: b"x" * 32})
    assert "PCR 8" in refused(one(witness.kept(changed), witness), BootStateRefused)
    lied = witness.start(1, form_policy=bytes(32))
    assert "the one that the evidence names" in refused(one(witness.kept(lied), witness), BootStateRefused)


def test_the_boot_policy_is_the_owner_s_for_this_line_and_class(witness: Witness, other: Witness) -> None:
    for policies in ((), (other.policy(),), (witness.policy("large"),), (witness.policy(device_class="edge"),)):
        refused(one(witness.kept(), witness, boot_policies=policies), BootPolicyRefused)
    several = (witness.policy("large"), witness.policy())
    assert one(witness.kept(), witness, boot_policies=several).error is None


OTHER = {pcr: bytes([pcr]) * 32 for pcr in APPROVED}


@pytest.mark.parametrize("change", [{"device_class": "labs"}, {"device_name": "edge-2"}])
def test_the_device_s_name_and_class_are_the_record_s_not_the_host_s(witness: Witness, change: dict[str, str]) -> None:
    """Neither is in the quote: a state that is approved for another class must not pass for this device's."""
    policies = (witness.policy(pcrs=OTHER), witness.policy(device_class="labs"))
    kept = witness.kept(witness.start(**change))
    (what,) = (name.removeprefix("device_") for name in change)
    assert f"the device's {what} is" in refused(one(kept, witness, boot_policies=policies), EvidenceRefused)
    record = witness.record(**{what.replace("name", "device").replace("class", "device_class"): "labs"})
    labs = witness.kept(witness.start(device_name=record.device, device_class=record.device_class))
    policies = (witness.policy(device_class=record.device_class),)
    assert one(labs, witness, boot_policies=policies, record=record).error is None


def test_without_a_record_name_and_class_are_the_host_s_word(witness: Witness) -> None:
    found = one(witness.kept(), witness, record=None)
    assert found.error is None
    assert any("name and class are the host's word" in each for each in found.unchecked)


def test_a_revoked_device_is_refused(witness: Witness) -> None:
    found = one(witness.kept(), witness, record=witness.record(revoked=1_767_225_601))
    assert "has revoked the device edge-1" in refused(found, Revoked)
    (part,) = result_of([found], kind="appraisal", issued=1, raw_evidence=b"e").submodules
    assert (part.status, part.vector) == ("contraindicated", {"instance-identity": 96})


def test_a_withdrawn_boot_policy_is_refused_wherever_it_stands(witness: Witness) -> None:
    old, new = witness.policy(), witness.policy(pcrs=OTHER, epoch=1)
    for policies in ((old, new), (new, old)):
        assert "PCR 8" in refused(one(witness.kept(), witness, boot_policies=policies), BootStateRefused)
    again = (old, witness.policy(epoch=2), new)
    assert one(witness.kept(), witness, boot_policies=again).error is None
    epochs = {(MODEL, CLASS): 1}
    assert "withdrew" in refused(one(witness.kept(), witness, epochs=epochs), BootPolicyRefused)
    assert one(witness.kept(), witness, boot_policies=again, epochs=epochs).error is None


def test_another_owner_s_later_boot_policy_is_passed_over(witness: Witness, other: Witness) -> None:
    assert one(witness.kept(), witness, boot_policies=(other.policy(epoch=9), witness.policy())).error is None


def test_a_revoked_version_is_refused(witness: Witness) -> None:
    assert "small:1" in refused(one(witness.kept(), witness, revoked=frozenset({"small:1"})), GenerationRefused)
    found = one(witness.kept(), witness, manifests=None)
    assert found.error is None
    assert any("whether the owner revoked" in each for each in found.unchecked)


def test_the_time_is_said_to_be_the_host_s_word(witness: Witness) -> None:
    kept = witness.kept(witness.start(created=4_000_000_000))
    found = one(kept, witness)
    assert found.error is None
    assert any("time of it is the host's word" in each for each in found.unchecked)
    ear = result_of([found], kind="appraisal", issued=1, raw_evidence=format_evidence(kept))
    assert any("time of it is the host's word" in each for each in ear.submodules[0].reasons)


def test_the_model_s_name_is_the_host_s_word_without_the_owner_s_records(witness: Witness) -> None:
    renamed = witness.kept(witness.start(1, model_version="2"))
    found = one(renamed, witness, manifests=None)
    assert found.error is None
    assert any("host's word" in each for each in found.unchecked)


def test_what_a_remote_verifier_said_is_not_believed(witness: Witness) -> None:
    found = one(witness.kept(witness.start(1, remote="keylime")), witness)
    assert any("a diagnosis" in each for each in found.unchecked)


def test_a_signed_pcr_11_is_appraised_by_the_signature_that_was_kept(witness: Witness) -> None:
    key, value = rsa.generate_private_key(65537, 2048), b"\x77" * 32
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = SignedPcrs(load_signer_pem(key.public_key().public_bytes(*public)))
    fixed = {pcr: b"%02d" % pcr * 16 for pcr in (7, 12)}
    policy = parse_boot_policy(
        sign_boot_policy(
            [],
            owner_id=witness.keyring.owner.owner_id,
            model_name=MODEL,
            device_class=CLASS,
            created=1,
            key=witness.keyring.boot_policy_key,
            nested=[(fixed, signed)],
        )
    )
    (form,) = policy.unverified_forms

    def signature(pcr_11: bytes) -> bytes:
        return key.sign(policy_pcr(ZERO_DIGEST, {11: pcr_11}), padding.PKCS1v15(), hashes.SHA256())

    def appraised(kept: bytes | None, pcr_11: bytes = value) -> StartAppraisal:
        start = witness.start(pcrs={**fixed, 11: pcr_11}, form_policy=form.policy, pcr_signature=kept)
        return one(parse_evidence(format_evidence(witness.kept(start))), witness, boot_policies=(policy,))

    # The host keeps the one that it appraised by, of all that it has; none for a form of values.
    verified = verify_boot_policy(policy, owner=witness.keyring.owner, model_name=MODEL, device_class=CLASS)
    both = [(policy_pcr(ZERO_DIGEST, {11: each}), signature(each)) for each in (b"\x66" * 32, value)]
    entries = [UnverifiedPcrSignature((11,), *each) for each in both]
    (with_host_s,) = with_host_signatures(verified, entries, "the host's file").forms
    assert _pcr_signature(with_host_s, witness.start(pcrs={**fixed, 11: value}).quote) == signature(value)
    assert _pcr_signature(replace(with_host_s, signed=None), witness.start().quote) is None
    good = appraised(signature(value))
    assert good.error is None
    assert any(fingerprint(signed.key).hex() in each for each in good.shown)
    for bad in (None, signature(b"\x66" * 32), bytes(256), signature(value)[:-1]):
        assert "PCR 11" in refused(appraised(bad), BootStateRefused)
    refused(appraised(signature(value), b"\x66" * 32), BootStateRefused)


def test_a_tee_s_report_is_kept_and_said_not_to_be_appraised(witness: Witness) -> None:
    found = one(witness.kept(in_a_guest(witness.start())), witness)
    assert found.error is None
    assert any("sev_guest" in each and "not appraised" in each for each in found.unchecked)


def test_each_start_has_its_own_result(witness: Witness) -> None:
    kept = witness.kept(witness.start(1), witness.start(2, nonce=bytes(32)), witness.start(3))
    assert [each.error is None for each in appraise_kept(kept, witness.references(), None)] == [True, False, True]


def test_fuzz_no_flipped_bit_of_a_quote_is_accepted(witness: Witness) -> None:
    start = witness.start()
    quote = start.quote

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(["attest", "signature"]), st.integers(0, 10_000), st.integers(0, 7))
    def run(name: str, place: int, bit: int) -> None:
        data = bytearray(getattr(quote, name))
        data[place % len(data)] ^= 1 << bit
        changed = replace(start, quote=replace(quote, **{name: bytes(data)}))
        refused(one(witness.kept(changed), witness), EvidenceRefused)

    run()


# --- the audit log ----------------------------------------------------------------------------------------------------


def granted(start: StartEvidence, **changes: Any) -> Verified:
    record = {
        "event": "grant",
        "container": CONTAINER,
        "model": start.model_name,
        "version": start.model_version,
        "manifest": start.manifest_digest,
        "quoted": start.audit_head.hex(),
    }
    return Verified({**record, **changes}, b"g" * 32)


def test_the_audit_log_bears_it_out(witness: Witness) -> None:
    start = witness.start()
    log = [Verified({"event": "closed"}, HEAD), Verified({"event": "closed"}, b"x" * 32), granted(start)]
    found = one(witness.kept(start), witness, log)
    assert found.error is None
    assert found.unchecked == ("the time of it is the host's word: its clock's",)
    first = witness.start(1, head=EMPTY_HEAD)
    assert one(witness.kept(first), witness, [granted(first)]).error is None


@pytest.mark.parametrize(
    "changes",
    [{"event": "refuse"}, {"container": "x"}, {"model": "x"}, {"version": "2"}, {"manifest": "x"}, {"quoted": ""}],
)
def test_a_start_that_the_host_did_not_log_is_refused(witness: Witness, changes: dict[str, str]) -> None:
    start = witness.start()
    log = [Verified({"event": "closed"}, HEAD), granted(start, **changes)]
    assert "no grant" in refused(one(witness.kept(start), witness, log), EvidenceRefused)


def test_the_report_is_the_one_whose_evidence_was_logged(witness: Witness) -> None:
    start = in_a_guest(witness.start())
    log = [Verified({}, HEAD), granted(start, tee="sev-snp", evidence=start.quote.digest.hex())]
    assert one(witness.kept(start), witness, log).error is None
    another = in_a_guest(start, TeeReport("sev_guest", b"another", b"table"))
    assert "with this TEE's report" in refused(one(witness.kept(another), witness, log), EvidenceRefused)
    without = one(witness.kept(replace(start, quote=bare(witness.kept(start)))), witness, log)
    assert without.error is None
    assert any("was not kept" in each for each in without.unchecked)


def test_another_log_or_order_is_refused(witness: Witness) -> None:
    start = witness.start()
    logs: Iterator[list[Verified]] = iter(([], [granted(start)], [Verified({}, b"x" * 32), granted(start)]))
    for log in logs:
        assert "no record with the head" in refused(one(witness.kept(start), witness, log), EvidenceRefused)
    backwards = [granted(start), Verified({}, HEAD)]
    assert "no grant" in refused(one(witness.kept(start), witness, backwards), EvidenceRefused)
