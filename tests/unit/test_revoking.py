"""`sczctl revoke` on the owner's side: what it plans, writes and remembers, and that nothing half of it is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
from oci_hook.attestation.policy import policy_ref
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.bundle.revocations import LINES_LIMIT, Revocations, parse_revocations, verify_revocations
from oci_hook.errors import DeviceInvalid, GrantInvalid, KeyInvalid, OutputExists
from oci_hook.key_errors import GenerationRefused
from oci_hook.lease import Lease
from oci_hook.owner.lines import Line, format_line, parse_line
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.revoking import enrolled_again
from tests.attestation_vectors import hostile, value_or_ours
from tests.commands import Household, crashed, done, misused, refused, sczctl, snapshot
from tests.devices import make_device


@pytest.fixture
def house(tmp_path: Path) -> Household:
    """Two versions of minilm and one of whisper, granted to two devices of two classes."""
    made = Household(tmp_path)
    made.enrolled("edge-1", counter_value=3)
    made.enrolled("edge-2", counter_value=7, device_class="kiosk")
    for name, version, generation in (("minilm", "1", 1), ("minilm", "2", 2), ("whisper", "1", 4)):
        out = made.usb / f"{name}-{version}"
        out.mkdir()
        done(sczctl(*made.pack_words(out / "bundle", name=name, version=version), "--generation", generation))
        for device in ("edge-1", "edge-2"):
            made.grant(out, model=f"{name}:{version}", device=device, file=f"{device}.jwt")
    return made


def revoke(house: Household, *words: object, out: str = "revoked") -> Any:
    return done(sczctl("revoke", "--keys", house.keys, *words, "-o", house.usb / out, "--json")).json


def list_of(house: Household, device: str, out: str = "revoked") -> Revocations:
    compact = (house.usb / out / device / "revocations.jwt").read_bytes()
    return verify_revocations(parse_revocations(compact), owner=house.owner)


def grants_of(house: Household, device: str, out: str = "revoked") -> dict[str, Grant]:
    """The fresh grants in a device's folder by file name, each verified and opened as the device would."""
    found = {}
    for path in (house.usb / out / device).glob("*@*.jwt"):
        grant = verify_grant_signature(parse_grant(path.read_bytes()), owner=house.owner)
        assert len(house.devices[device].unseal(grant.sealed.public, grant.sealed.duplicate, grant.sealed.seed)) == 32
        found[path.name] = grant
    return found


def record_of(house: Household, device: str) -> DeviceRecord:
    return parse_device_record(OwnerRecords(house.keys).load_device(device))


def kept(house: Household) -> list[str]:
    return [f"{g.model.name}:{g.model.version} {g.device_name}" for g in OwnerRecords(house.keys).grants()]


def test_a_version_is_revoked_on_every_device(house: Household) -> None:
    said = revoke(house, "--model", "minilm:1")
    assert {row["device"]: (row["counter"], row["locked"], row["granted"]) for row in said["devices"]} == {
        "edge-1": (4, ["minilm:1"], ["minilm:2", "whisper:1"]),
        "edge-2": (8, ["minilm:1"], ["minilm:2", "whisper:1"]),
    }
    for device, value in (("edge-1", 4), ("edge-2", 8)):
        found = list_of(house, device)
        record = record_of(house, device)
        assert (found.value, found.lines) == (value, (("minilm", 2),))
        assert (found.device_name, found.ak_name) == (device, record.ak.name)
        assert (found.counter_index, found.counter_name) == (record.counter.index, record.counter.name)
        assert record.counter_value == value
        grants = grants_of(house, device)
        assert sorted(grants) == ["minilm@2.jwt", "whisper@1.jwt"]
        assert {grant.counter.maximum for grant in grants.values()} == {value}
    assert kept(house) == ["minilm:2 edge-1", "minilm:2 edge-2", "whisper:1 edge-1", "whisper:1 edge-2"]
    words = ("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "-o", house.usb / "no.jwt")
    refused(sczctl(*words), GenerationRefused.code, "--generation")
    assert not (house.usb / "no.jwt").exists()


def test_a_version_between_others_takes_no_generation_along(house: Household) -> None:
    revoke(house, "--model", "minilm:2")
    assert list_of(house, "edge-1").lines == ()  # minilm:1 stays: the grants alone lock minilm:2
    assert sorted(grants_of(house, "edge-1")) == ["minilm@1.jwt", "whisper@1.jwt"]
    revoke(house, "--model", "minilm:1", out="again")
    assert list_of(house, "edge-1", "again").lines == (("minilm", 3),)


def test_generations_devices_and_boot_policies(house: Household) -> None:
    revoke(house, "--below-generation", "minilm:2", "--below-generation", "whisper:5", out="a")
    assert list_of(house, "edge-1", "a").lines == (("minilm", 2), ("whisper", 5))
    assert sorted(grants_of(house, "edge-1", "a")) == ["minilm@2.jwt"]
    said = revoke(house, "--device", "edge-2", out="b")
    assert [row["device"] for row in said["devices"]] == ["edge-2"]
    assert grants_of(house, "edge-2", "b") == {}
    assert list_of(house, "edge-2", "b").value == 9
    assert record_of(house, "edge-2").revoked is not None
    revoke(house, "--boot-policy", "minilm:default", out="c")
    (grant,) = grants_of(house, "edge-1", "c").values()
    assert grant.policy_ref == policy_ref("minilm", "default", 1)
    done(sczctl(*house.sign_words(house.usb / "policy.json")))
    unverified = parse_boot_policy((house.usb / "policy.json").read_bytes())
    policy = verify_boot_policy(unverified, owner=house.owner, model_name="minilm", device_class="default")
    assert (policy.epoch, policy.policy_ref) == (1, grant.policy_ref)
    out = house.grant(house.usb, model="minilm:2", device="edge-1", file="new.jwt")
    assert verify_grant_signature(parse_grant(out.read_bytes()), owner=house.owner).policy_ref == grant.policy_ref
    words = ("grant", "minilm:2", "--keys", house.keys, "--device", "edge-2", "-o", house.usb / "no.jwt")
    refused(sczctl(*words), DeviceInvalid.code, "was revoked")


def test_a_grant_that_was_given_ahead_is_counted_beyond(house: Household) -> None:
    ahead = ("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "-o")
    done(sczctl(*ahead, house.usb / "ahead.jwt", "--maximum", 40))
    done(sczctl(*ahead, house.usb / "usual.jwt"))  # the copy of the grant that is kept is this one's
    revoke(house, "--model", "minilm:1")
    assert list_of(house, "edge-1").value == 41
    refused(sczctl(*ahead[:1], "minilm:2", *ahead[2:], house.usb / "far.jwt", "--maximum", 3 + 1000), 22, "below 1003")


def test_a_lease_stays_what_it_was(house: Household) -> None:
    record = replace(record_of(house, "edge-1"), resets=5, clock_ms=1000)
    OwnerRecords(house.keys).save_device("edge-1", format_device_record(record))
    words = ("grant", "minilm:2", "--keys", house.keys, "--device", "edge-1", "-o", house.usb / "leased.jwt")
    said = done(sczctl(*words, "--lease-boots", 2, "--lease-hours", 1))
    assert "leased up to boot 7 and 1.0 h" in said.out
    revoke(house, "--model", "minilm:1")
    assert grants_of(house, "edge-1")["minilm@2.jwt"].lease == Lease(7, 3_601_000)
    assert grants_of(house, "edge-1")["whisper@1.jwt"].lease is None


def test_a_dry_run_says_the_same_and_changes_nothing(house: Household) -> None:
    before = snapshot(house.keys, house.usb)
    words = ("revoke", "--keys", house.keys, "--model", "minilm:1", "--boot-policy", "whisper:kiosk")
    planned = done(sczctl(*words, "--dry-run", "--json")).json
    assert "would be locked: minilm:1" in done(sczctl(*words, "--dry-run")).out
    assert snapshot(house.keys, house.usb) == before
    made = done(sczctl(*words, "-o", house.usb / "out", "--json")).json
    assert (planned.pop("dry_run"), planned.pop("output")) == (True, None)
    assert (made.pop("dry_run"), made.pop("output")) == (False, str(house.usb / "out"))
    assert made == planned


def test_what_cannot_be_revoked_changes_nothing(house: Household) -> None:
    before = snapshot(house.keys, house.usb)
    keys, out = ("--keys", house.keys), ("-o", house.usb / "out")
    refused(sczctl("revoke", *keys, *out, "--model", "minilm:9"), KeyInvalid.code, "never packed")
    refused(sczctl("revoke", *keys, *out, "--device", "edge-9"), DeviceInvalid.code, "edge-9")
    refused(sczctl("revoke", *keys, "-o", house.keys, "--model", "minilm:1"), OutputExists.code)
    refused(sczctl("revoke", "--keys", house.usb, *out, "--model", "minilm:1"), KeyInvalid.code)
    misused(sczctl("revoke", *keys, *out), "--below-generation")
    misused(sczctl("revoke", *out, "--model", "minilm:1"), "--keys")
    misused(sczctl("revoke", *keys, "--model", "minilm:1"), "--dry-run")
    misused(sczctl("revoke", *keys, "--applied"), "stands alone")
    for wrong in ("minilm", "minilm:0", "minilm:-1", "minilm:x", "minilm:1e3", f"minilm:{1 << 63}", "Min:1", ":1"):
        misused(sczctl("revoke", *keys, *out, "--below-generation", wrong))
    for wrong in ("minilm", "minilm:", ":default", "minilm:De", "../x:default"):
        misused(sczctl("revoke", *keys, *out, "--boot-policy", wrong))
    assert snapshot(house.keys, house.usb) == before


def test_what_no_device_has_needs_nothing_applied(house: Household) -> None:
    out = house.usb / "new"
    out.mkdir()
    done(sczctl(*house.pack_words(out / "bundle", name="minilm", version="3"), "--generation", 3))
    said = done(sczctl("revoke", "--keys", house.keys, "--model", "minilm:3", "-o", house.usb / "out"))
    assert "nothing to apply" in said.err
    assert OwnerRecords(house.keys).load_line("minilm").revoked == ("3",)


def test_a_kill_at_any_step_leaves_nothing_that_could_be_granted_again(house: Household) -> None:
    """The folder is whole or not there; what was to be revoked cannot be granted once it is; the same call ends it."""
    step, folders = 0, []
    words = ("revoke", "--keys", house.keys, "--model", "minilm:1")
    while True:
        step += 1
        out = house.usb / f"out-{step}"
        if not crashed(lambda out=out: sczctl(*words, "-o", out), step):  # type: ignore[misc]
            break
        if out.exists():
            folders.append(out.name)
            for device in ("edge-1", "edge-2"):
                assert len(grants_of(house, device, out.name)) == 2
                assert list_of(house, device, out.name).value <= record_of(house, device).counter_value
            assert (
                not OwnerRecords(house.keys)
                .load_line("minilm")
                .allows(OwnerRecords(house.keys).load_content_key("minilm", "1").model)
            )
        for device in ("edge-1", "edge-2"):
            assert record_of(house, device).counter_value >= (3 if device == "edge-1" else 7)
    assert folders  # it was killed after the folder was there, too: when the records' copies were brought up to date
    revoke(house, "--device", "edge-1", out="last")
    values = [list_of(house, "edge-1", name).value for name in [*folders, "last"]]
    assert values == sorted(set(values))


# --- what is damaged, or out of reach ---------------------------------------------------------------------------------


def test_a_damaged_record_does_not_keep_another_device_from_being_revoked(house: Household) -> None:
    path = house.keys / "devices" / "edge-2.json"
    path.write_bytes(path.read_bytes()[:-5])
    copy = house.keys / "grants" / "minilm" / "1" / "edge-2.grant"
    copy.write_bytes(b"")
    keys = house.keys / "models" / "whisper" / "1.json"
    keys.write_bytes(b"{}")
    said = revoke(house, "--device", "edge-1")
    assert [(row["device"], len(row["locked"])) for row in said["devices"]] == [("edge-1", 3)]
    assert record_of(house, "edge-1").revoked is not None
    words = ("revoke", "--keys", house.keys, "-o", house.usb / "no", "--model", "minilm:2")
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*words), KeyInvalid.code, "whisper:1")
    keys.unlink()
    refused(sczctl(*words), GrantInvalid.code, "minilm:1 to edge-2", "grants/minilm/1/edge-2.grant")
    copy.unlink()
    refused(sczctl(*words), DeviceInvalid.code, "edge-2")
    assert snapshot(house.keys, house.usb) == {
        name: what for name, what in before.items() if name not in (str(copy), str(keys))
    }


def test_a_record_or_grant_under_another_name_is_refused(house: Household) -> None:
    """Else the revocation of one device, or its highest maximum, would be the other's."""
    one, other = (house.keys / "devices" / f"edge-{number}.json" for number in (1, 2))
    good = other.read_bytes()
    other.write_bytes(one.read_bytes())
    before = snapshot(house.keys, house.usb)
    for wanted in (("--device", "edge-2"), ("--model", "minilm:1")):
        words = ("revoke", "--keys", house.keys, "-o", house.usb / "no", *wanted)
        refused(sczctl(*words), DeviceInvalid.code, "the record of edge-2 is that of edge-1")
    assert snapshot(house.keys, house.usb) == before
    other.write_bytes(good)
    copies = house.keys / "grants" / "minilm" / "1"
    (copies / "edge-2.grant").write_bytes((copies / "edge-1.grant").read_bytes())
    before = snapshot(house.keys, house.usb)
    words = ("revoke", "--keys", house.keys, "-o", house.usb / "no", "--device", "edge-2")
    refused(sczctl(*words), GrantInvalid.code, "minilm:1 to edge-2 is that of minilm:1 to edge-1")
    assert snapshot(house.keys, house.usb) == before


def test_no_list_is_written_that_a_device_could_not_count_to(house: Household) -> None:
    """However often it is revoked without a word from the device: its counter was certified once."""
    ahead = ("grant", "minilm:2", "--keys", house.keys, "--device", "edge-1", "-o")
    done(sczctl(*ahead, house.usb / "ahead.jwt", "--maximum", 3 + 999))
    revoke(house, "--boot-policy", "minilm:default", out="far")
    assert (list_of(house, "edge-1", "far").value, record_of(house, "edge-1").certified) == (1003, 3)
    refused(sczctl(*ahead, house.usb / "no.jwt", "--maximum", 1004), DeviceInvalid.code, "below 1004")
    done(sczctl(*ahead, house.usb / "usual.jwt"))
    words = ("revoke", "--keys", house.keys, "--model", "minilm:1")
    partly = sczctl(*words, "-o", house.usb / "others")  # the others are not left as they were
    assert (partly.code, "edge-1 is left out" in partly.err) == (1, True)
    assert [path.name for path in (house.usb / "others").iterdir()] == ["edge-2"]
    assert record_of(house, "edge-1").counter_value == 1003
    # The device applied the folder, and was enrolled again: its counter is certified as 1003.
    again = enrolled_again(
        replace(record_of(house, "edge-1"), certified=None), record_of(house, "edge-1"), forget=False
    )
    OwnerRecords(house.keys).save_device("edge-1", format_device_record(again))
    said = revoke(house, "--model", "minilm:1", out="near")
    assert [(row["device"], row["counter"]) for row in said["devices"]] == [("edge-1", 1004), ("edge-2", 9)]
    assert said["out_of_reach"] == []


def test_what_cannot_be_signed_has_raised_nothing(house: Household) -> None:
    """A list that would have too many lines is found out before the records are changed."""
    records = OwnerRecords(house.keys)
    for number in range(LINES_LIMIT):
        path = house.keys / "lines" / f"line-{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(format_line(Line(f"line-{number}", 2)))
    before = snapshot(house.keys, house.usb)
    tried = sczctl("revoke", "--keys", house.keys, "--model", "minilm:1", "-o", house.usb / "no")
    assert (tried.code, "0 to 4096 items" in tried.err) == (76, True)
    assert snapshot(house.keys, house.usb) == before
    assert records.load_line("minilm").revoked == ()


# --- the records ------------------------------------------------------------------------------------------------------


LINE = Line("minilm", 4, ("1", "2.b"), {"default": 2, "kiosk": 1})


def test_a_line_comes_back() -> None:
    for line in (LINE, Line("minilm")):
        assert parse_line(format_line(line)) == line
    assert LINE.from_generation(2) == LINE
    assert LINE.without("1") == LINE
    assert LINE.with_next_epoch("kiosk").epoch("kiosk") == 2
    with pytest.raises(KeyInvalid, match="no further epoch"):
        Line("minilm", epochs={"default": (1 << 31) - 1}).with_next_epoch("default")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_lies_there_is_a_line_or_refused(data: st.DataObject) -> None:
    found = value_or_ours(parse_line, data.draw(hostile(format_line(LINE))))
    assert found is None or parse_line(format_line(found)) == found


@pytest.mark.parametrize(
    "change", [{"epochs": []}, {"epochs": {"default": 0}}, {"epochs": {"De": 1}}, {"revoked": "1"}]
)
def test_a_damaged_line_is_refused(house: Household, change: dict[str, Any]) -> None:
    """It would allow again what was revoked: nothing is granted until it is mended."""
    revoke(house, "--model", "minilm:1")
    path = house.keys / "lines" / "minilm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = snapshot(house.keys)
    words = ("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "-o", house.usb / "no.jwt")
    refused(sczctl(*words), KeyInvalid.code)
    path.write_bytes(format_line(Line("whisper")))
    refused(sczctl(*words), KeyInvalid.code, "that of whisper")
    path.unlink()
    assert {name for name in before if name not in snapshot(house.keys)} == {str(path)}


def test_an_enrolment_again_forgets_no_revocation(house: Household) -> None:
    record = record_of(house, "edge-1")
    waiting = replace(record, counter_value=9, highest_maximum=9, revoked=77, resets=1, clock_ms=2)
    again = replace(record, counter_value=4, resets=8, clock_ms=9)
    assert enrolled_again(again, None, forget=False) == again
    kept = enrolled_again(again, waiting, forget=False)
    assert (kept.counter_value, kept.highest_maximum, kept.revoked) == (9, 9, 77)
    assert (kept.resets, kept.clock_ms, kept.certified) == (8, 9, 4)
    assert enrolled_again(replace(again, counter_value=9), kept, forget=False).certified is None  # it was applied
    assert enrolled_again(again, waiting, forget=True).revoked is None
    assert enrolled_again(again, waiting, forget=True).counter_value == 9
    other = record_of(house, "edge-2")  # another TPM's counter: nothing of the old one's value is true of it
    assert enrolled_again(other, waiting, forget=True).counter_value == other.counter_value


def test_a_list_can_be_inspected(house: Household) -> None:
    revoke(house, "--model", "minilm:1")
    shown = done(sczctl("inspect", house.usb / "revoked" / "edge-1" / "revocations.jwt", "--json")).json
    assert (shown["kind"], shown["owner"]) == ("list of revocations", house.owner.owner_id)
    assert shown["lines"] == [{"model": "minilm", "lowest_generation": 2}]
    grant = done(sczctl("inspect", house.usb / "revoked" / "edge-1" / "minilm@2.jwt", "--json")).json
    assert grant["kind"] == "grant"


def test_what_cannot_be_granted_anew_is_locked_with_the_rest(house: Household) -> None:
    """A key that is gone, or a version that was packed again, must not stand in the way of a revocation."""
    (house.keys / "models" / "whisper" / "1.json").unlink()
    out = house.usb / "packed-again"
    out.mkdir()
    done(sczctl(*house.pack_words(out / "bundle", name="whisper", version="1"), "--generation", 4))
    (house.keys / "models" / "minilm" / "2.json").unlink()
    said = revoke(house, "--model", "minilm:1")
    assert sorted(said["devices"][0]["locked"]) == ["minilm:1", "minilm:2", "whisper:1"]
    assert grants_of(house, "edge-1") == {}


def test_a_revoked_device_does_not_stand_in_the_way_either(house: Household) -> None:
    record = record_of(house, "edge-2")
    OwnerRecords(house.keys).save_device("edge-2", format_device_record(replace(record, revoked=5)))  # killed then
    said = revoke(house, "--model", "minilm:1")
    assert [(row["device"], len(row["locked"]), row["granted"] == []) for row in said["devices"]] == [
        ("edge-1", 1, False),
        ("edge-2", 3, True),
    ]
    assert record_of(house, "edge-2").revoked == 5


def test_a_lease_by_hours_alone_is_warned_of_and_seen_in_the_list(house: Household) -> None:
    words = ("grant", "minilm:2", "--keys", house.keys, "--device", "edge-1", "-o")
    refused(sczctl(*words, house.usb / "no.jwt", "--lease-boots", 1), DeviceInvalid.code, "sczctl lease request")
    misused(sczctl(*words, house.usb / "no.jwt", "--lease-from", house.usb / "absent"), "--lease-boots")
    misused(sczctl(*words, house.usb / "no.jwt", "--lease-hours", 0))
    misused(sczctl(*words, house.usb / "no.jwt", "--lease-boots", -1))
    assert not (house.usb / "no.jwt").exists()
    record = replace(record_of(house, "edge-1"), resets=5, clock_ms=1000)
    OwnerRecords(house.keys).save_device("edge-1", format_device_record(record))
    hours = done(sczctl(*words, house.usb / "hours.jwt", "--lease-hours", 2))
    assert "give --lease-boots as well" in hours.err
    both = done(sczctl(*words, house.usb / "both.jwt", "--lease-hours", 2, "--lease-boots", 0))
    assert "--lease-boots" not in both.err
    rows = done(sczctl("list", "--grants", "--keys", house.keys, "--json")).json
    leases = {(row["model"], row["device"]): row["lease"] for row in rows}
    assert leases.pop(("minilm:2", "edge-1")) == {"resets": 5, "clock_ms": 7_201_000}
    assert set(leases.values()) == {None}
    assert done(sczctl("list", "--grants", "--keys", house.keys)).out.count("  leased\n") == 1


# --- grants by TPM and counter, not by name ---------------------------------------------------------------------------


def renamed(house: Household, old: str, new: str) -> None:
    """The record of a device is taken away, and its TPM enrolled again under another name."""
    records = OwnerRecords(house.keys)
    records.save_device(new, format_device_record(replace(record_of(house, old), device=new)))
    (house.keys / "devices" / f"{old}.json").unlink()
    house.devices[new] = house.devices[old]


def test_a_tpm_with_another_name_is_locked_all_the_same(house: Household) -> None:
    """What the TPM enforces is the counter: a grant under the name of before opens as well as one under this."""
    done(
        sczctl("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "--maximum", 40, "-o", house.usb / "a")
    )
    renamed(house, "edge-1", "warehouse-1")
    house.grant(house.usb, model="minilm:2", device="warehouse-1", file="new.jwt")
    said = revoke(house, "--model", "minilm:1")
    rows = {row["device"]: (row["counter"], row["locked"], row["granted"]) for row in said["devices"]}
    assert rows["warehouse-1"] == (41, ["minilm:1"], ["minilm:2", "whisper:1"])
    assert said["without_record"] == []
    assert sorted(grants_of(house, "warehouse-1")) == ["minilm@2.jwt", "whisper@1.jwt"]
    assert [each for each in kept(house) if each.endswith("edge-1")] == ["whisper:1 edge-1"]
    again = revoke(house, "--device", "warehouse-1", out="again")
    assert sorted(again["devices"][0]["locked"]) == ["minilm:2", "whisper:1", "whisper:1"]
    assert not any(each.endswith("-1") for each in kept(house))


def test_a_grant_whose_tpm_has_no_record_is_named_as_out_of_reach(house: Household) -> None:
    (house.keys / "devices" / "edge-1.json").unlink()
    words = ("revoke", "--keys", house.keys)
    said = sczctl(*words, "--model", "minilm:1", "-o", house.usb / "a")
    assert (said.code, "the grant of minilm:1 to edge-1 stays open" in said.err) == (1, True)
    assert sorted(path.name for path in (house.usb / "a").iterdir()) == ["edge-2"]
    assert "minilm:1 edge-1" in kept(house)  # until its TPM is enrolled, and the version revoked again
    found = sczctl(*words, "--boot-policy", "minilm:default", "--dry-run", "--json")
    assert found.code == 1
    assert {(row["model"], row["device"]) for row in found.json["without_record"]} == {
        ("minilm:1", "edge-1"),
        ("minilm:2", "edge-1"),
    }
    done(sczctl(*words, "--device", "edge-2", "-o", house.usb / "b"))
    record = house.devices["edge-1"].record
    OwnerRecords(house.keys).save_device("again-1", format_device_record(replace(record, device="again-1")))
    rows = {row["device"]: row["locked"] for row in revoke(house, "--model", "minilm:1", out="c")["devices"]}
    assert (rows["again-1"], "minilm:1 edge-1" in kept(house)) == (["minilm:1"], False)


def test_another_ak_or_srk_with_the_same_counter_is_counted_beyond(house: Household) -> None:
    """An AK is in no policy, and TPM2_Clear leaves the counter's Name: older grants are locked, and not renewed."""
    done(
        sczctl("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "--maximum", 40, "-o", house.usb / "a")
    )
    before, other = record_of(house, "edge-1"), make_device(house.owner.owner_id, "other").record
    for number, changes in enumerate(({"ak": other.ak}, {"srk": other.srk})):
        changed = replace(before, highest_maximum=None, **changes)
        OwnerRecords(house.keys).save_device("edge-1", format_device_record(changed))
        words = ("revoke", "--keys", house.keys, "--model", "minilm:1", "--dry-run", "--json")
        row = done(sczctl(*words)).json["devices"][0]
        assert (row["device"], row["counter"], row["granted"]) == ("edge-1", 41, []), number
        assert sorted(row["locked"]) == ["minilm:1", "minilm:2", "whisper:1"]
    neither = replace(before, ak=other.ak, srk=other.srk)
    OwnerRecords(house.keys).save_device("edge-1", format_device_record(neither))
    found = sczctl(*words)
    assert (found.code, [row["device"] for row in found.json["without_record"]]) == (1, ["edge-1"])


def test_a_device_is_revoked_with_all_names_of_its_tpm(house: Household) -> None:
    """Two records of one TPM, as earlier versions let them be: the other name is no way to go on."""
    records, one = OwnerRecords(house.keys), record_of(house, "edge-1")
    other = make_device(house.owner.owner_id, "other").record
    alike = {
        "by-ek": {"ak": other.ak, "srk": other.srk},
        "by-ak": {"ek_sha256": "1" * 64, "srk": other.srk},
        "by-srk": {"ek_sha256": "2" * 64, "ak": make_device(house.owner.owner_id, "third").record.ak},
    }
    for name, changes in alike.items():
        records.save_device(name, format_device_record(replace(one, device=name, **changes)))
    said = revoke(house, "--device", "edge-1")
    rows = {row["device"]: row["counter"] for row in said["devices"]}
    assert rows.keys() == {"edge-1", *alike}
    assert rows["edge-1"] not in (rows["by-ak"], rows["by-srk"])  # one value, one list
    for name in alike:
        assert record_of(house, name).revoked is not None
        words = ("grant", "minilm:2", "--keys", house.keys, "--device", name, "-o", house.usb / "no.jwt")
        refused(sczctl(*words), DeviceInvalid.code, "was revoked")
    assert record_of(house, "edge-2").revoked is None


def test_a_device_out_of_reach_is_marked_as_revoked_without_a_list(house: Household) -> None:
    """It was stolen before it applied the last revocation: no list can be written, and no grant either."""
    ahead = ("grant", "minilm:2", "--keys", house.keys, "--device", "edge-1", "--maximum", 3 + 999)
    done(sczctl(*ahead, "-o", house.usb / "ahead.jwt"))
    revoke(house, "--boot-policy", "minilm:default", out="not-applied")
    words = ("revoke", "--keys", house.keys, "--device", "edge-1")
    planned = sczctl(*words, "--dry-run")
    assert (planned.code, "would be marked" in planned.err) == (1, True)
    assert record_of(house, "edge-1").revoked is None
    said = sczctl(*words, "-o", house.usb / "stolen")
    assert (said.code, "edge-1 is marked as revoked" in said.err) == (1, True)
    assert list((house.usb / "stolen").iterdir()) == []
    record = record_of(house, "edge-1")
    assert (record.revoked is not None, record.counter_value) == (True, 1003)
    many = done(sczctl("grant", "minilm:2", "--keys", house.keys, "--all-devices", "-o", house.usb / "many"))
    assert "left out, as they were revoked: edge-1" in many.err
    assert [path.name for path in (house.usb / "many").iterdir()] == ["edge-2.jwt"]


def test_a_generation_that_nobody_named_stays_though_its_key_is_gone(house: Household) -> None:
    """It can be recovered, and its grants are out there: the lowest generation is not raised above it."""
    (house.keys / "models" / "minilm" / "1.json").unlink()
    revoke(house, "--model", "minilm:2")
    assert OwnerRecords(house.keys).load_line("minilm").lowest_generation == 1
    assert list_of(house, "edge-1").lines == ()
    out = house.usb / "minilm-3"
    out.mkdir()
    done(sczctl(*house.pack_words(out / "bundle", name="minilm", version="3"), "--generation", 3))
    house.grant(out, model="minilm:3")
    (house.keys / "models" / "minilm" / "3.json").unlink()
    revoke(house, "--model", "minilm:3", out="lost")  # and such a version can be revoked, as a grant tells of it
    assert OwnerRecords(house.keys).load_line("minilm").revoked == ("2", "3")


def test_a_line_is_not_written_that_could_not_be_read_again(house: Household) -> None:
    full = Line("minilm", 1, tuple(sorted(f"old-{number}" for number in range(10_000))))
    OwnerRecords(house.keys).save_line(full)
    before = snapshot(house.keys, house.usb)
    words = ("revoke", "--keys", house.keys, "--model", "minilm:1", "-o", house.usb / "no")
    refused(sczctl(*words), KeyInvalid.code, "10000", "--below-generation minilm:")
    assert snapshot(house.keys, house.usb) == before
    assert full.without("old-1") == full
    with pytest.raises(KeyInvalid, match="1 MiB"):
        Line("minilm", 1, tuple(f"{number:064d}" for number in range(9_999))).without("x" * 64).without("y" * 64)
    with pytest.raises(KeyInvalid, match="device classes"):
        Line("minilm", epochs={f"class-{number}": 1 for number in range(10_000)}).with_next_epoch("default")
