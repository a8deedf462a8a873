"""`sczctl grant` for many devices: for whom, all or none, killed anywhere, and those that lack a grant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.attestation.device_record import format_device_record, parse_device_record
from oci_hook.bundle.grant import parse_grant, sign_grant, unwrap_content_key, verify_grant_signature
from oci_hook.errors import DeviceInvalid, FileUnreadable, GrantInvalid, KeyInvalid, OutputExists
from oci_hook.owner.keyring import open_content_key, open_keyring
from oci_hook.owner.records import OwnerRecords
from tests.commands import Done, Household, crashed, done, misused, refused, sczctl, snapshot
from tests.devices import make_device

DEVICES = ("edge-1", "edge-2", "edge-3", "till-1")


@pytest.fixture
def house(tmp_path: Path) -> Household:
    made = Household(tmp_path)
    for name in DEVICES:
        made.enrolled(name, device_class="tills" if name.startswith("till") else "edges", counter_value=2)
    made.pack()
    return made


def grant(house: Household, *words: object, output: str = "grants", model: str = "minilm:1") -> Done:
    return sczctl("grant", model, "--keys", house.keys, "-o", house.usb / output, *words)


def names(house: Household, output: str = "grants") -> list[str]:
    return sorted(path.name for path in (house.usb / output).iterdir())


# --- for whom ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "whom"),
    [
        (["--all-devices"], DEVICES),
        (["--class", "edges"], DEVICES[:3]),
        (["--class", "tills"], DEVICES[3:]),
        (["--device", "edge-1", "--device", "till-1"], ("edge-1", "till-1")),
    ],
)
def test_for_whom(house: Household, words: list[str], whom: tuple[str, ...]) -> None:
    rows = done(grant(house, *words, "--json")).json
    assert tuple(row["device"] for row in rows) == whom
    assert {row["counter_maximum"] for row in rows} == {2}
    assert names(house) == [f"{name}.jwt" for name in whom]
    kept = house.keys / "grants" / "minilm" / "1"
    for name in whom:
        assert (house.usb / "grants" / f"{name}.jwt").read_bytes() == (kept / f"{name}.grant").read_bytes()
        assert (kept / f"{name}.grant").stat().st_mode & 0o777 == 0o600
    assert f"to {len(whom)} device(s)" in done(grant(house, *words, output="again")).out


def test_from_a_file(house: Household, tmp_path: Path) -> None:
    path = tmp_path / "devices"
    path.write_bytes(b"# the shop\n\nedge-2 # upstairs\r\n\ttill-1\n")
    assert [row["device"] for row in done(grant(house, "--devices-from", path, "--json")).json] == ["edge-2", "till-1"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "names nobody"),
        (b"#\n", "names nobody"),
        (b"edge-1\nedge-1\n", "twice"),
        (b"Edge-1\n", "is not a device's name"),
        (b"../edge-1\n", "is not a device's name"),
        (b"edge-1 edge-2\n", "is not a device's name"),
        (b"\xff\xfe", "is not a device's name"),
        (b"x" * 65, "is not a device's name"),
        (b"edge-1\nedge-9\n", "there is no enrolled device edge-9"),
        (b"\n".join(b"d%d" % number for number in range(10_001)), "more than 10000"),
        (b"x" * ((1 << 20) + 1), "larger"),
    ],
)
def test_a_file_that_names_nobody_in_particular(house: Household, tmp_path: Path, text: bytes, word: str) -> None:
    path = tmp_path / "devices"
    path.write_bytes(text)
    before = snapshot(house.keys, house.usb)
    refused(grant(house, "--devices-from", path), DeviceInvalid.code, word)
    assert snapshot(house.keys, house.usb) == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--missing"],
        ["--all-devices", "--class", "edges"],
        ["--all-devices", "--device", "edge-1"],
        ["--class", "edges", "--devices-from", "x"],
        ["--device", "edge-1", "--device", "edge-1"],
    ],
)
def test_for_whom_is_said_once(house: Household, words: list[str]) -> None:
    misused(grant(house, *words))
    assert not (house.usb / "grants").exists()


def test_nobody_is_there(house: Household) -> None:
    refused(grant(house, "--class", "kiosks"), DeviceInvalid.code, "of class kiosks")
    refused(grant(house, "--device", "edge-1", "--device", "edge-9"), DeviceInvalid.code, "edge-9")
    for name in DEVICES:
        (house.keys / "devices" / f"{name}.json").unlink()
    refused(grant(house, "--all-devices"), DeviceInvalid.code, "no enrolled device")


def test_one_device_is_a_file_as_ever_and_a_list_of_one_a_folder(house: Household) -> None:
    assert isinstance(done(grant(house, "--device", "edge-1", "--json", output="one.jwt")).json, dict)
    assert (house.usb / "one.jwt").is_file()
    assert isinstance(done(grant(house, "--class", "tills", "--json")).json, list)


# --- all or none ------------------------------------------------------------------------------------------------------


def test_each_grant_opens_on_its_own_device_alone(house: Household) -> None:
    done(grant(house, "--all-devices"))
    keyring = open_keyring(house.keys, str)
    content = OwnerRecords(house.keys).load_content_key("minilm", "1")
    key = open_content_key(
        content.sealed_key, manifest_digest=content.manifest_digest, recovery_key=keyring.recovery_key
    )
    secrets = set()
    for name in DEVICES:
        compact = (house.usb / "grants" / f"{name}.jwt").read_bytes()
        found = verify_grant_signature(parse_grant(compact), owner=house.owner)
        sealed = (found.sealed.public, found.sealed.duplicate, found.sealed.seed)
        secret = house.devices[name].unseal(*sealed)
        assert unwrap_content_key(found.wrapped_key, secret, found.manifest_digest).value == key.value
        secrets.add(secret)
        for other in set(DEVICES) - {name}:
            with pytest.raises(ValueError, match="not for this device"):
                house.devices[other].unseal(*sealed)
    assert len(secrets) == len(DEVICES)


@pytest.mark.parametrize("damage", ["garbage", "another's", "gone"])
def test_one_damaged_record_stops_all_of_them_by_its_name(house: Household, damage: str) -> None:
    path = house.keys / "devices" / "edge-3.json"
    if damage == "garbage":
        path.write_bytes(b"{}")
    elif damage == "another's":
        path.write_bytes((house.keys / "devices" / "edge-1.json").read_bytes())
    else:
        path.unlink()
        path.symlink_to("edge-1.json")
    before = snapshot(house.keys, house.usb)
    refused(grant(house, "--all-devices"), DeviceInvalid.code, "edge-3")
    assert snapshot(house.keys, house.usb) == before


def test_one_counter_beyond_the_maximum_stops_all_of_them(house: Household) -> None:
    house.enrolled("edge-9", device_class="edges", counter_value=5)
    before = snapshot(house.keys, house.usb)
    tried = grant(house, "--all-devices", "--maximum", "4")
    assert (tried.code, "edge-9" in tried.err, tried.out) == (DeviceInvalid.code, True, "")
    assert snapshot(house.keys, house.usb) == before


def test_nothing_is_overwritten(house: Household) -> None:
    done(grant(house, "--class", "tills"))
    before = snapshot(house.keys, house.usb)
    refused(grant(house, "--all-devices"), OutputExists.code, "grants")
    refused(grant(house, "--all-devices", output="absent/grants"), FileUnreadable.code, "mkdir -p")
    refused(grant(house, "--all-devices", output="x", model="minilm:2"), KeyInvalid.code)
    assert snapshot(house.keys, house.usb) == before


def test_a_kill_anywhere_leaves_nothing_half(house: Household) -> None:
    done(grant(house, "--device", "edge-1", output="old.jwt"))
    step = 0
    while True:
        step += 1
        output = f"killed-{step}"
        if not crashed(lambda output=output: grant(house, "--all-devices", output=output), step):
            break
        if (house.usb / output).exists():
            assert names(house, output) == [f"{name}.jwt" for name in DEVICES]
        kept = {each.device_name for each in OwnerRecords(house.keys).grants()}  # every copy is whole, and a grant
        assert {"edge-1"} <= kept <= set(DEVICES)
        if (house.usb / output).exists():
            assert kept == set(DEVICES)
    assert step > 3 * len(DEVICES)
    assert names(house, output) == [f"{name}.jwt" for name in DEVICES]
    assert len(OwnerRecords(house.keys).grants()) == len(DEVICES)


def test_a_copy_that_cannot_be_kept_and_no_folder(house: Household) -> None:
    """Something stands where a copy should go."""
    (house.keys / "grants" / "minilm" / "1" / "edge-3.grant").mkdir(parents=True)
    before = snapshot(house.keys, house.usb)
    refused_ = grant(house, "--device", "edge-3", "--device", "till-1")
    assert refused_.code == FileUnreadable.code
    assert snapshot(house.keys, house.usb) == before
    assert list(house.usb.glob(".*")) == []
    assert list((house.keys / "grants" / "minilm" / "1").glob(".*")) == []


# --- those that lack one ----------------------------------------------------------------------------------------------


def missing(house: Household, *words: object, output: str) -> list[str]:
    shown = done(grant(house, "--all-devices", "--missing", "--json", *words, output=output)).json
    assert (house.usb / output).exists() == bool(shown)
    return [row["device"] for row in shown]


def test_only_those_that_lack_a_grant(house: Household) -> None:
    done(grant(house, "--class", "edges"))
    assert missing(house, output="a") == ["till-1"]
    assert missing(house, output="b") == []
    assert "nothing was written" in done(grant(house, "--all-devices", "--missing", output="b")).err
    assert missing(house, "--maximum", "3", output="c") == list(DEVICES)  # theirs would not open at 3
    assert missing(house, "--maximum", "3", output="d") == []
    # A device that has a new TPM, and one that is of another class now: their old grants open nothing.
    house.enrolled("edge-2", device_class="edges", counter_value=2)
    record = OwnerRecords(house.keys)
    moved = make_device(house.owner.owner_id, "edge-3", device_class="tills", counter_value=2).record
    record.save_device("edge-3", format_device_record(moved))
    assert missing(house, output="e") == ["edge-2", "edge-3"]
    house.pack("second", version="2")
    second = done(grant(house, "--all-devices", "--missing", "--json", output="f", model="minilm:2")).json
    assert [row["device"] for row in second] == list(DEVICES)


def test_a_kept_grant_that_is_not_the_owner_s_is_no_grant(house: Household, tmp_path: Path) -> None:
    done(grant(house, "--all-devices"))
    kept = house.keys / "grants" / "minilm" / "1"
    (kept / "edge-1.grant").write_bytes((kept / "edge-2.grant").read_bytes())
    assert missing(house, output="a") == ["edge-1"]
    head, payload, signature = (kept / "edge-1.grant").read_bytes().split(b".")
    (kept / "edge-1.grant").write_bytes(b".".join((head, payload, signature[::-1])))
    tried = grant(house, "--all-devices", "--missing", output="b")
    assert tried.code != 0
    assert not (house.usb / "b").exists()


def test_the_passphrase_is_asked_once(tmp_path: Path, house: Household) -> None:
    path = tmp_path / "passphrase"
    path.write_text("correct horse\n")
    keys = tmp_path / "locked"
    done(sczctl("keygen", "--keys", keys, "--name", "other", "--passphrase-file", path))
    words = [*house.pack_words(house.usb / "theirs"), "--keys", keys, "--passphrase-file", path]
    done(sczctl(*words))
    owner_id = json.loads(done(sczctl("inspect", "--json", house.usb / "theirs")).out)["owner"]
    for name in DEVICES:
        device = make_device(owner_id, name)
        OwnerRecords(keys).save_device(name, format_device_record(device.record))
    before = snapshot(keys)
    words = ["grant", "minilm:1", "--keys", keys, "--all-devices", "-o", house.usb / "grants"]
    refused(sczctl(*words), KeyInvalid.code, "no terminal")
    assert snapshot(keys) == before
    assert len(done(sczctl(*words, "--passphrase-file", path, "--json")).json) == len(DEVICES)


# --- leases that ended, devices that were revoked ---------------------------------------------------------------------


def counted(house: Household, name: str, **counts: int | None) -> None:
    """What the owner knows of a device by a later request."""
    records = OwnerRecords(house.keys)
    record = replace(parse_device_record(records.load_device(name)), **counts)  # type: ignore[arg-type]
    records.save_device(name, format_device_record(record))


def test_a_lease_that_ended_is_no_grant(house: Household) -> None:
    for name in DEVICES:
        counted(house, name, resets=5, clock_ms=1000)
    done(grant(house, "--all-devices", "--lease-boots", 2, "--lease-hours", 1))
    for name, resets, clock_ms in (("edge-1", 7, 3_601_000), ("edge-2", 8, 1001), ("edge-3", 6, 3_601_001)):
        counted(house, name, resets=resets, clock_ms=clock_ms)
    assert missing(house, output="a") == ["edge-2", "edge-3"]
    assert missing(house, output="b") == []  # these have no lease, and open


def test_a_grant_of_a_withdrawn_epoch_is_no_grant(house: Household) -> None:
    """No boot policy that is signed from now on opens it, though the counter still lets it pass."""
    done(grant(house, "--all-devices"))
    counted(house, "edge-2", counter_value=1002, certified=2)  # out of reach: no fresh grant is made
    tried = sczctl("revoke", "--keys", house.keys, "--boot-policy", "minilm:edges", "-o", house.usb / "revoked")
    assert (tried.code, "edge-2 is left out" in tried.err) == (1, True)
    counted(house, "edge-2", counter_value=2, certified=None)  # enrolled again, at the value that it has
    assert missing(house, output="a") == ["edge-2"]
    assert missing(house, output="b") == []


def test_a_revoked_device_does_not_stand_in_the_way_of_the_others(house: Household) -> None:
    done(grant(house, "--all-devices"))
    done(sczctl("revoke", "--keys", house.keys, "--device", "edge-2", "-o", house.usb / "revoked"))
    house.pack("second", version="2")
    for number, words in enumerate((["--all-devices"], ["--class", "edges"], ["--all-devices", "--missing"])):
        (house.keys / "grants" / "minilm" / "2" / "edge-1.grant").unlink(missing_ok=True)
        said = done(grant(house, *words, output=f"grants-{number}", model="minilm:2"))
        assert "left out, as they were revoked: edge-2" in said.err
        found = names(house, f"grants-{number}")
        assert ("edge-1.jwt" in found, "edge-2.jwt" in found) == (True, False)
    listed = house.usb / "names"
    listed.write_text("edge-1\nedge-2\n")
    for words in (["--device", "edge-1", "--device", "edge-2"], ["--devices-from", listed]):
        refused(grant(house, *words, model="minilm:2", output="no"), DeviceInvalid.code, "edge-2 was revoked")
    done(sczctl("revoke", "--keys", house.keys, "--device", "till-1", "-o", house.usb / "tills"))
    refused(grant(house, "--class", "tills", model="minilm:2", output="no"), DeviceInvalid.code, "till-1 was revoked")
    assert not (house.usb / "no").exists()


# --- a list of very many ----------------------------------------------------------------------------------------------


def test_more_grants_than_one_process_reads(house: Household) -> None:
    """It is the list that counts here: one grant to many names. A bad one among them is found, too."""
    done(grant(house, "--all-devices"))
    kept = house.keys / "grants" / "minilm" / "1"
    one = verify_grant_signature(parse_grant((kept / "edge-1.grant").read_bytes()), owner=house.owner)
    key = open_keyring(house.keys, lambda: "").manifest_key
    for number in range(1200):
        name = f"more-{number}"
        (kept / f"{name}.grant").write_bytes(sign_grant(replace(one, device_name=name), key=key))
    rows = done(sczctl("list", "--grants", "--keys", house.keys, "--json")).json
    assert len(rows) == 1204
    assert [row["device"] for row in rows] == sorted([*DEVICES, *(f"more-{number}" for number in range(1200))])
    (kept / "more-700.grant").unlink()
    (kept / "more-700.grant").write_bytes(b"x.y.z")
    refused(sczctl("list", "--grants", "--keys", house.keys), GrantInvalid.code, "more-700")
