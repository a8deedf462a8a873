"""A TPM is known again by its EK, AK or SRK: one name, one AK, one counter; what is replaced is set aside.

The hosts are made in software, with EK certificates: every check of an enrolment is made, but TPM2_ActivateCredential.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.attestation.ek_chain import parse_ca_certificates
from oci_hook.attestation.enrolment_documents import parse_answer, parse_request
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, GrantInvalid
from oci_hook.owner.enrolling import Enroller, Vouchers
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.records import OwnerRecords
from tests.attestation_vectors import builder, t
from tests.commands import Household, crashed, done, refused, sczctl, snapshot

NOW = datetime.now(UTC)


class Fleet:
    """An owner, and TPMs that ask for names."""

    def __init__(self, directory: Path) -> None:
        self.house = Household(directory)
        self.records = OwnerRecords(self.house.keys)
        self._root = t.Authority("EK root")
        self.house.pack()
        self.house.pack("two", version="2")

    def tpm(self, *, like: Any = None, **parts: Any) -> Any:
        """A TPM with keys of its own; or the one that it is like, which made some of them anew."""
        key = t.p256()
        made = type(builder().enrolments.device())(self.house.owner.owner_id, key, self._root.ek_certificate(key))
        for name in ("ek", "ek_certificate", "ak", "ak_key", "srk", "srk_key", "counter") if like else ():
            setattr(made, name, getattr(like, name))
        for name, value in parts.items():
            setattr(made, name, value)
        return made

    def with_other_ak(self, tpm: Any) -> Any:
        other = self.tpm()
        return self.tpm(like=tpm, ak=other.ak, ak_key=other.ak_key)

    def with_other_counter(self, tpm: Any) -> Any:
        return self.tpm(like=tpm, counter=t.nv_public(tpm.first_index + 1))

    def with_other_ek(self, tpm: Any) -> Any:
        other = self.tpm()
        return self.tpm(like=tpm, ek=other.ek, ek_certificate=other.ek_certificate)

    def enrol(self, tpm: Any, name: str, *, value: int = 5, **how: bool) -> tuple[DeviceRecord, str]:
        """Both halves of an enrolment, as `sczctl enroll run` makes them."""
        tpm.name = name
        enroller = Enroller(
            self.records,
            owner_id=self.house.owner.owner_id,
            vouchers=Vouchers(parse_ca_certificates([self._root.pem.encode()]), None),
            random=lambda _size: tpm.secret,
            **{"replace": False, **how},
        )
        challenged = enroller.challenge(parse_request(tpm.request().encode()), now=NOW)
        certify = tpm.counter_certify(value=value.to_bytes(8, "big"))
        answer = parse_answer(tpm.answer({"counter_certify": certify}).encode())
        return enroller.accept(answer, challenged.pending, now=NOW, device_class=None)

    def refused(self, tpm: Any, name: str, *words: str, **how: bool) -> None:
        """An enrolment that is refused, and changes nothing."""
        before = snapshot(self.house.keys)
        with pytest.raises(EnrolmentRefused) as caught:
            self.enrol(tpm, name, **how)
        for word in words:
            assert word in f"{caught.value.message}; {caught.value.advice}"
        assert snapshot(self.house.keys) == before

    def record(self, name: str) -> DeviceRecord:
        return parse_device_record(self.records.load_device(name))

    def grant(self, name: str, version: str = "1", *more: object) -> None:
        file = f"{name}-{version}-{len(list(self.house.usb.iterdir()))}.jwt"
        words = ("grant", f"minilm:{version}", "--keys", self.house.keys, "--device", name)
        done(sczctl(*words, "-o", self.house.usb / file, *more))

    def revoke(self, *words: object, out: str) -> Any:
        return sczctl("revoke", "--keys", self.house.keys, *words, "-o", self.house.usb / out, "--json")

    @property
    def former(self) -> FormerRecords:
        return FormerRecords(self.house.keys)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_known_tpm_keeps_its_ak_and_its_counter(fleet: Fleet) -> None:
    """Every grant of before would stay open, as no list of the new record counts the old counter up."""
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    assert fleet.enrol(tpm, "edge-1", value=6)[1] == "known device"
    fleet.refused(fleet.with_other_ak(tpm), "edge-1", "another attestation key", "--replace")
    fleet.refused(fleet.with_other_counter(tpm), "edge-1", "another counter", "--replace")
    cleared = fleet.tpm(like=tpm, srk=fleet.tpm().srk)  # TPM2_Clear makes another SRK, and nothing else
    assert fleet.enrol(cleared, "edge-1", value=7)[1] == "known device"


def test_a_counter_that_is_replaced_all_the_same_leaves_its_grants_out_of_reach(fleet: Fleet) -> None:
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    fleet.grant("edge-1")
    changed = fleet.with_other_counter(tpm)
    record, state = fleet.enrol(changed, "edge-1", replace=True)
    assert (state, record.counter.index) == ("replaced device", tpm.first_index + 1)
    (former,) = fleet.former.devices()
    assert (former.device, former.counter.index) == ("edge-1", tpm.first_index)
    assert [grant.counter.index for grant in fleet.former.grants()] == [tpm.first_index]
    fleet.grant("edge-1")  # the copy of the older grant is not replaced by it
    listed = sczctl("list", "--grants", "--keys", fleet.house.keys)
    assert [line.endswith("  set aside") for line in done(listed).out.splitlines()] == [False, True]
    said = fleet.revoke("--model", "minilm:1", out="r")
    assert (said.code, "minilm:1 to edge-1 stays open" in said.err) == (1, True)
    assert said.json["without_record"][0]["counter"] == hex(tpm.first_index)
    assert [row["locked"] for row in said.json["devices"]] == [["minilm:1"]]
    # The counter is there again: its grants are reached.
    record, _ = fleet.enrol(tpm, "edge-1", replace=True, value=5)
    said = done(fleet.revoke("--model", "minilm:1", out="again")).json
    assert [(row["device"], row["locked"]) for row in said["devices"]] == [("edge-1", ["minilm:1"])]
    assert fleet.former.grants() == ()


def test_another_ak_forgets_neither_a_revocation_nor_a_grant(fleet: Fleet) -> None:
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    fleet.grant("edge-1", "1", "--maximum", 50)
    fleet.grant("edge-1", "1")
    done(fleet.revoke("--boot-policy", "minilm:default", out="waits"))
    record, state = fleet.enrol(fleet.with_other_ak(tpm), "edge-1", replace=True)
    assert (state, record.counter_value, record.certified) == ("replaced device", 51, 5)
    said = done(fleet.revoke("--model", "minilm:1", out="r")).json
    assert [(row["counter"], row["locked"]) for row in said["devices"]] == [(52, ["minilm:1"])]


def test_a_certified_tpm_has_one_name_unless_it_is_renamed(fleet: Fleet) -> None:
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    for same in (tpm, fleet.with_other_ek(tpm), fleet.with_other_ak(fleet.with_other_ek(tpm))):
        fleet.refused(same, "edge-2", "enrolled as edge-1", "--replace")
    fleet.grant("edge-1", "1", "--maximum", 50)
    fleet.grant("edge-1", "1")
    record, state = fleet.enrol(tpm, "warehouse-1", replace=True)
    assert (state, record.highest_maximum, fleet.records.devices()) == ("renamed device", 50, ("warehouse-1",))
    said = done(fleet.revoke("--model", "minilm:1", out="r")).json
    assert [(row["device"], row["counter"], row["locked"]) for row in said["devices"]] == [
        ("warehouse-1", 51, ["minilm:1"])
    ]


def test_a_revoked_tpm_is_known_again_after_its_name_went_to_another(fleet: Fleet) -> None:
    stolen, new = fleet.tpm(), fleet.tpm()
    fleet.enrol(stolen, "edge-1")
    done(fleet.revoke("--device", "edge-1", out="r"))
    assert fleet.enrol(new, "edge-1", replace=True)[0].revoked is None
    for how in ({}, {"replace": True}):
        fleet.refused(stolen, "edge-9", "was revoked as edge-1", "--unrevoke", **how)
        fleet.refused(fleet.with_other_ek(stolen), "edge-9", "was revoked as edge-1", **how)
    fleet.refused(stolen, "edge-1", "was revoked as edge-1", replace=True)
    record, state = fleet.enrol(stolen, "edge-9", unrevoke=True)
    assert (state, record.revoked, record.counter_value) == ("unrevoked device", None, 6)
    assert [each.revoked for each in fleet.former.devices()] == [None]
    assert fleet.enrol(stolen, "edge-9")[1] == "known device"
    assert fleet.record("edge-1").srk.name != record.srk.name


def test_a_replaced_tpm_that_was_not_revoked_is_revoked_with_the_name_that_it_has(fleet: Fleet) -> None:
    """Its earlier AK is as good as its own: the record that was set aside is marked, too."""
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    changed = fleet.with_other_ak(tpm)
    fleet.enrol(changed, "edge-1", replace=True)
    done(fleet.revoke("--device", "edge-1", out="r"))
    assert [each.revoked is not None for each in fleet.former.devices()] == [True]
    cleared = fleet.tpm(like=fleet.with_other_ek(tpm), srk=fleet.tpm().srk)
    fleet.refused(cleared, "edge-9", "was revoked as edge-1")


def test_the_other_ek_with_another_ak_is_the_same_tpm_by_its_srk(fleet: Fleet) -> None:
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    done(fleet.revoke("--device", "edge-1", out="r"))
    disguised = fleet.with_other_ak(fleet.with_other_ek(tpm))
    fleet.refused(disguised, "edge-9", "was revoked as edge-1")
    record, state = fleet.enrol(disguised, "edge-1", replace=True)
    assert (state, record.revoked is not None) == ("known device", True)


def test_two_names_of_one_revoked_tpm_become_one(fleet: Fleet) -> None:
    """As earlier versions left them: `--replace --unrevoke` keeps the one that is asked for."""
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    text = fleet.records.load_device("edge-1").replace(b'"edge-1"', b'"edge-2"')
    fleet.records.save_device("edge-2", text)
    done(fleet.revoke("--device", "edge-1", out="r"))
    assert fleet.record("edge-2").revoked is not None
    fleet.refused(tpm, "edge-1", "was revoked as edge-2")
    fleet.refused(tpm, "edge-1", "enrolled as edge-2", unrevoke=True)
    record, state = fleet.enrol(tpm, "edge-1", replace=True, unrevoke=True)
    assert (state, record.revoked, fleet.records.devices()) == ("unrevoked device", None, ("edge-1",))
    assert fleet.enrol(tpm, "edge-1")[1] == "known device"


def test_copies_that_another_tpm_left_under_a_name_are_set_aside(fleet: Fleet) -> None:
    """Somebody took the record away: a grant to the name would else replace the copy of a grant that still opens."""
    fleet.enrol(fleet.tpm(), "edge-1")
    fleet.grant("edge-1")
    (fleet.house.keys / "devices" / "edge-1.json").unlink()
    assert fleet.enrol(fleet.tpm(), "edge-1")[1] == "new device"
    fleet.grant("edge-1")
    assert len(fleet.former.grants()) == 1
    said = fleet.revoke("--device", "edge-1", out="r")
    assert (said.code, len(said.json["without_record"])) == (1, 1)


def test_a_kill_while_a_record_is_replaced_forgets_no_grant_and_no_record(fleet: Fleet) -> None:
    """The record of before is set aside before the new one is there, and so is each copy of a grant."""
    tpm = fleet.tpm()
    index = tpm.first_index
    fleet.enrol(tpm, "edge-1")
    fleet.grant("edge-1", "1")
    fleet.grant("edge-1", "2")
    good = {path: path.read_bytes() for path in fleet.house.keys.rglob("*") if path.is_file()}
    changed, step = fleet.with_other_counter(tpm), 0
    while True:
        step += 1
        shutil.rmtree(fleet.house.keys / "former", ignore_errors=True)
        for path, data in good.items():
            path.write_bytes(data)
        was_killed = crashed(lambda: fleet.enrol(changed, "edge-1", replace=True), step)
        records = [fleet.record("edge-1"), *fleet.former.devices()]
        assert index in {each.counter.index for each in records}
        grants = {
            (each.model.version, each.counter.index) for each in (*fleet.records.grants(), *fleet.former.grants())
        }
        assert grants == {("1", index), ("2", index)}
        if not was_killed:
            break
    assert step > 5
    assert {each.counter.index for each in fleet.records.grants()} == set()
    assert fleet.record("edge-1").counter.index == index + 1


def test_what_was_set_aside_and_is_damaged_is_refused_by_its_name(fleet: Fleet) -> None:
    """Whether a TPM was revoked, and what is out of reach, could not be told; a stolen device can be revoked."""
    tpm = fleet.tpm()
    fleet.enrol(tpm, "edge-1")
    fleet.grant("edge-1")
    fleet.enrol(fleet.with_other_counter(tpm), "edge-1", replace=True)
    (copy,) = (fleet.house.keys / "former" / "grants").glob("*/*/*")
    good = copy.read_bytes()
    copy.write_bytes(b"")
    words = ("revoke", "--keys", fleet.house.keys, "-o", fleet.house.usb / "no", "--model", "minilm:1")
    refused(sczctl(*words), GrantInvalid.code, "former/grants/minilm/1/edge-1.", "backup")
    copy.write_bytes(good)
    moved = copy.with_name(f"edge-1.{'0' * 16}.grant")
    copy.rename(moved)
    refused(sczctl(*words), GrantInvalid.code, "another grant's copy")
    moved.unlink()
    (record,) = (fleet.house.keys / "former" / "devices").iterdir()
    record.write_bytes(b"{}")
    refused(sczctl(*words), DeviceInvalid.code, "former/devices/edge-1.")
    assert done(fleet.revoke("--device", "edge-1", out="r")).json["devices"][0]["device"] == "edge-1"
