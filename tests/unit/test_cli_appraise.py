"""`sczctl appraise`: what the owner's own records say counts, whatever the evidence calls itself; without a TPM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oci_hook.attestation.device_record import format_device_record
from oci_hook.attestation.kept_evidence import KeptEvidence, format_evidence
from oci_hook.bundle.model import ModelId
from oci_hook.errors import BootPolicyRefused, BootStateRefused, EvidenceRefused, Revoked
from oci_hook.key_errors import GenerationRefused
from oci_hook.owner.lines import Line
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from tests.commands import Done, sczctl
from tests.kept import CLASS, DEVICE, MANIFEST, MODEL, VERSION, make_witness

LAX = {pcr: bytes([pcr]) * 32 for pcr in (4, 7, 8, 9)}


class Case:
    """An owner's folder with one model and one device, and what is to be appraised."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.witness = folder, make_witness(folder)
        self.records = OwnerRecords(self.keys)
        model = ModelId(MODEL, VERSION, 1)
        self.records.save_content_key(ContentKeyRecord(model, MANIFEST, "sha256:" + "cd" * 32, b"sealed"))
        self.enrol()

    @property
    def keys(self) -> Path:
        return self.folder / "acme"

    def enrol(self, **changes: object) -> None:
        self.records.save_device(DEVICE, format_device_record(self.witness.record(**changes)))

    def policy(self, name: str, **words: object) -> Path:
        path = self.folder / name
        path.write_bytes(self.witness.policy_document(**words))  # type: ignore[arg-type]
        return path

    def appraise(self, kept: KeptEvidence | None, *policies: Path, who: str = "owner") -> Done:
        if kept is not None:
            (self.folder / "evidence.json").write_bytes(format_evidence(kept))
        whose: list[object] = ["--keys", self.keys]
        if who == "auditor":
            whose = ["--owner", self.keys / "owner.json", "--device-record", self.keys / "devices" / f"{DEVICE}.json"]
        given = [word for path in policies for word in ("--boot-policy", path)]
        return sczctl("appraise", self.folder / "evidence.json", *whose, *given, "--json")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("who", ["owner", "auditor"])
def test_a_class_that_root_wrote_into_the_evidence_opens_no_other_policy(case: Case, who: str) -> None:
    strict, labs = case.policy("strict.json"), case.policy("labs.json", device_class="labs", pcrs=LAX)
    kept = case.witness.kept(case.witness.start(pcrs=LAX))
    assert case.appraise(kept, strict, labs, who=who).code == BootStateRefused.code
    document = json.loads(format_evidence(kept))
    document["starts"][0]["class"] = "labs"
    (case.folder / "evidence.json").write_text(json.dumps(document))
    told = case.appraise(None, strict, labs, who=who)
    assert told.code == EvidenceRefused.code
    assert told.json["models"][0]["accepted"] is False
    case.enrol(device_class="labs")
    assert case.appraise(None, strict, labs, who=who).code == 0


@pytest.mark.parametrize("who", ["owner", "auditor"])
def test_a_revoked_device_s_evidence_is_refused(case: Case, who: str) -> None:
    policy = case.policy("p.json")
    assert case.appraise(case.witness.kept(), policy, who=who).code == 0
    case.enrol(revoked=1_700_000_000)
    assert case.appraise(None, policy, who=who).code == Revoked.code


@pytest.mark.parametrize("who", ["owner", "auditor"])
def test_the_order_of_boot_policies_does_not_matter(case: Case, who: str) -> None:
    old, new = case.policy("old.json"), case.policy("new.json", pcrs=LAX, epoch=1)
    kept = case.witness.kept()
    assert case.appraise(kept, old, who=who).code == 0
    assert case.appraise(kept, old, new, who=who).code == BootStateRefused.code
    assert case.appraise(kept, new, old, who=who).code == BootStateRefused.code


def test_what_the_owner_s_folder_remembers_of_a_line(case: Case) -> None:
    old, kept = case.policy("old.json"), case.witness.kept()
    case.records.save_line(Line(MODEL).with_next_epoch(CLASS))
    assert case.appraise(kept, old).code == BootPolicyRefused.code
    assert case.appraise(kept, old, case.policy("new.json", epoch=1)).code == 0
    assert case.appraise(kept, old, who="auditor").code == 0  # an auditor does not know it, and is told so
    for line in (Line(MODEL).without(VERSION), Line(MODEL).from_generation(2)):
        case.records.save_line(line)
        assert case.appraise(kept, old).code == GenerationRefused.code


def test_what_is_the_host_s_word_alone_is_said(case: Case) -> None:
    policy, kept = case.policy("p.json"), case.witness.kept()
    said = case.appraise(kept, policy).json["models"][0]["not_looked_at"]
    assert [each for each in said if "host's word" in each] == ["the time of it is the host's word: its clock's"]
    said = case.appraise(kept, policy, who="auditor").json["models"][0]["not_looked_at"]
    assert any("model's name" in each for each in said)
    assert any("whether the owner revoked" in each for each in said)
