"""`sczctl boot-policy log`, `predict` and `diff`, and a predicted state that is signed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from oci_hook.attestation import explanation
from oci_hook.attestation.boot_policy import parse_boot_policy, pcrs_document, verify_boot_policy
from oci_hook.attestation.event_log import LIMIT_BYTES, EventLog, parse_event_log, replay
from oci_hook.attestation.log_files import keep_event_log, kept_event_logs
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.cli.checks.boot import what_differs, why_refused
from oci_hook.config import load_config
from oci_hook.documents import canonical
from oci_hook.errors import BootPolicyInvalid, DeviceInvalid, FileUnreadable, KeyInvalid, OutputExists
from oci_hook.key_errors import EventLogInvalid
from tests.boot_images import SECTIONS, write_unified_image
from tests.boot_logs import boot_unified, older_form, part_of
from tests.commands import Household, done, misused, refused, sczctl, snapshot
from tests.devices import measured
from tests.guest_image import STUB

GRUB = Path(__file__).parents[1] / "fixtures/boots/shim-grub.bin"
OLD = SECTIONS | {".linux": STUB.read_bytes()}
NEW = OLD | {".cmdline": b"root=/dev/vda2\0"}
LOADER = STUB.with_name("systemd-bootx64.efi").read_bytes()


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def boots(house: Household) -> dict[str, Path]:
    """Images, and the logs of their boots."""
    found = {}
    for name, sections in (("old", OLD), ("new", NEW)):
        found[name] = write_unified_image(house.usb / f"{name}.efi", sections)
        found[f"{name} log"] = house.usb / f"{name}.log"
        found[f"{name} log"].write_bytes(boot_unified(found[name].read_bytes(), sections, loader=LOADER))
    return found


def prediction(path: Path, pcrs: dict[int, bytes], device: str = "edge-1") -> Path:
    path.write_bytes(
        canonical({"schema": "scz-smm/prediction/v1", "device": device, "created": 1, "pcrs": pcrs_document(pcrs)})
    )
    return path


# --- log --------------------------------------------------------------------------------------------------------------


def test_a_log_in_words(house: Household) -> None:
    shown = done(house.ctl("boot-policy", "log", GRUB)).out
    assert "PCR 7     4  variable of secure boot: SecureBoot, 1 bytes\n" in shown
    assert "PCR 4    29  boot program \\EFI\\BOOT\\grubx64.efi (claimed)\n" in shown
    assert "secure boot: on\n" in shown
    assert "sbat level: sbat,1,2025021800" in shown
    lines = [line for line in shown.splitlines() if line.startswith("PCR ")]
    assert lines == sorted(lines, key=lambda line: (int(line.split()[1]), int(line.split()[2])))
    assert len(lines) == 51


def test_a_log_as_json(house: Household) -> None:
    found = done(house.ctl("boot-policy", "log", GRUB, "--json")).json
    (event,) = [event for event in found["events"] if event["event"] == 44]
    assert (event["pcr"], event["type"], event["proven_by"]) == (4, "EV_EFI_BOOT_SERVICES_APPLICATION", None)
    assert event["digest_is_of"] == "the image"
    assert found["pcrs"]["4"] == replay(parse_event_log(GRUB.read_bytes()))[4].hex()
    assert found["reference_values"]["secure_boot"] is True
    assert found["measurement"] is None


def test_this_hosts_own_log_is_where_the_configuration_says(house: Household) -> None:
    with house.config.open("a") as file:
        file.write(f'[tpm]\nevent_log = "{GRUB}"\n')
    assert "grubx64.efi" in done(house.ctl("boot-policy", "log")).out


def test_logs_that_are_none(house: Household, tmp_path: Path) -> None:
    path = tmp_path / "log"
    refused(house.ctl("boot-policy", "log", path), FileUnreadable.code)
    path.write_bytes(b"")
    refused(house.ctl("boot-policy", "log", path), EventLogInvalid.code, "empty")
    path.write_bytes(bytes(LIMIT_BYTES + 1))
    refused(house.ctl("boot-policy", "log", path), EventLogInvalid.code, "larger")
    refused(house.ctl("boot-policy", "log", tmp_path), EventLogInvalid.code, "not a regular file")
    path.write_bytes(older_form(parse_event_log(GRUB.read_bytes())))
    refused(house.ctl("boot-policy", "log", path), EventLogInvalid.code, "no SHA-256", "SHA-256 bank")
    os.mkfifo(tmp_path / "fifo")
    refused(house.ctl("boot-policy", "log", tmp_path / "fifo"), EventLogInvalid.code)


def test_a_kernel_without_a_log_is_told_what_mends_it(house: Household) -> None:
    missing = "/sys/kernel/security/tpm9/binary_bios_measurements"
    refused(house.ctl("boot-policy", "log", missing), EventLogInvalid.code, "firmware handed", "securityfs")


def test_a_hostile_log_is_no_terminal(house: Household, tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = GRUB.read_bytes()
    path.write_bytes(data.replace(b"grub_cmd: set default=0", b"grub_cmd: \x1b[2Jefault=\n0"))
    assert path.read_bytes() != data
    shown = done(house.ctl("boot-policy", "log", path)).out
    assert "\x1b" not in shown


def test_a_measurement_that_nobody_quoted_explains_nothing(house: Household, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(b"{}")
    refused(house.ctl("boot-policy", "log", GRUB, "--measurement", path, "--keys", house.keys), DeviceInvalid.code)


# --- predict ----------------------------------------------------------------------------------------------------------


def test_a_prediction_is_the_other_boots_log(house: Household, boots: dict[str, Path]) -> None:
    out = house.usb / "predicted.json"
    words = ["boot-policy", "predict", boots["old log"], "--uki", boots["new"], "--device", "edge-1", "-o", out]
    shown = done(house.ctl(*words)).out
    expected = {str(p): v.hex() for p, v in replay(parse_event_log(boots["new log"].read_bytes())).items()}
    assert json.loads(out.read_bytes())["pcrs"] == expected
    assert "changed: PCR 4 (boot loader), PCR 9" in shown
    assert f"PCR 11 will be {expected['11']}" in shown
    again = done(house.ctl(*words[:5], "--json")).json
    assert (again["pcrs"], again["changed"], again["unknown"]) == (expected, [4, 9, 11], {})
    refused(house.ctl(*words), OutputExists.code)


def test_every_component_can_be_named(house: Household, tmp_path: Path) -> None:
    loader, initrd = tmp_path / "loader.efi", tmp_path / "initrd"
    loader.write_bytes(LOADER)
    initrd.write_bytes(b"initrd")
    words = ["--shim", loader, "--boot-loader", loader, "--kernel", loader, "--initrd", initrd, "--cmdline", "quiet"]
    words += ["--text", "set timeout=0", "set timeout=1", "--replace", f"34={initrd}"]
    log = tmp_path / "log"
    log.write_bytes(part_of(parse_event_log(GRUB.read_bytes()), lambda event: b": menuentry" not in event.data))
    found = done(house.ctl("boot-policy", "predict", log, *words, "--json")).json
    assert found["changed"] == [4, 8, 9]
    assert [each["event"] for each in found["replaced"]] == [23, 29, 34, 35, 41, 42, 43, 44, 45, 48]
    (timeout,) = [each for each in found["replaced"] if each["event"] == 35]
    assert timeout["after"] == hashlib.sha256(b"set timeout=1").hexdigest()
    with_menu = done(house.ctl("boot-policy", "predict", GRUB, *words, "--json")).json
    assert (with_menu["changed"], list(with_menu["unknown"])) == ([4, 9], ["8"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what will be replaced"),
        (["--text", "x"], "2 arguments"),
        (["--replace", "5="], "EVENT=FILE"),
        (["--replace", "x=y"], "EVENT=FILE"),
        (["--replace", "1234567=y"], "EVENT=FILE"),
        (["--replace", "²=y"], "EVENT=FILE"),
        (["--uki", "x", "-o", "new"], "--device NAME"),
        (["--uki", "x", "--device", "A B"], "--device"),
        (["--cmdline", "quiet \udcff"], "not UTF-8"),
        (["--text", "\udcff", "x"], "not UTF-8"),
        (["--text", "a", "b", "--text", "vmlinuz", "\udcff"], "not UTF-8"),
    ],
)
def test_predict_is_told_what_it_needs(house: Household, words: list[str], said: str, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    misused(house.ctl("boot-policy", "predict", GRUB, *words), said)
    assert not (tmp_path / "new").exists()


def test_components_that_cannot_be_used_leave_no_file(house: Household, tmp_path: Path) -> None:
    out, script = tmp_path / "out", tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\n" * 50)
    words = ["boot-policy", "predict", GRUB, "--device", "edge-1", "-o", out]
    refused(house.ctl(*words, "--uki", tmp_path / "missing"), FileUnreadable.code)
    refused(house.ctl(*words, "--kernel", script), EventLogInvalid.code, "no program for UEFI")
    refused(house.ctl(*words, "--replace", f"500={script}"), EventLogInvalid.code, "no event 500")
    assert not out.exists()


# --- sign --predicted -------------------------------------------------------------------------------------------------


def test_a_predicted_state_is_signed_beside_the_running_one(house: Household) -> None:
    house.enrolled()
    state = prediction(house.usb / "predicted.json", measured({4: b"\4" * 32}))
    words = ["boot-policy", "sign", "--keys", house.keys, "--model", "minilm", "--pcr", "4,8,9"]
    signed = done(sczctl(*words, "--device", "edge-1", "--predicted", state, "-o", house.usb / "policy.json", "--json"))
    assert signed.json["states"] == 2
    policy = verify_boot_policy(
        parse_boot_policy((house.usb / "policy.json").read_bytes()),
        owner=house.owner,
        model_name="minilm",
        device_class="default",
    )
    assert [form.pcrs[4] for form in policy.forms] == [measured()[4], b"\4" * 32]
    kept = house.keys / "boot-policies/minilm/default.json"
    assert kept.read_bytes() == (house.usb / "policy.json").read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_prediction_that_tells_too_little_or_is_of_nobody_is_not_signed(house: Household) -> None:
    house.enrolled()
    words = ["boot-policy", "sign", "--keys", house.keys, "--model", "minilm", "--pcr", "4,8,9"]
    words += ["-o", house.usb / "policy.json", "--predicted"]
    few = {pcr: value for pcr, value in measured().items() if pcr != 9}
    refused(sczctl(*words, prediction(house.usb / "few", few)), BootPolicyInvalid.code, "does not tell PCR 9")
    refused(sczctl(*words, prediction(house.usb / "other", measured(), "edge-9")), DeviceInvalid.code, "edge-9")
    (house.usb / "none").write_bytes(b'{"schema":"scz-smm/prediction/v1"}')
    refused(sczctl(*words, house.usb / "none"), EventLogInvalid.code)
    assert not (house.usb / "policy.json").exists()
    assert not (house.keys / "boot-policies").exists()


# --- diff -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(house: Household) -> Household:
    """Two devices of one class, a third of another; one model granted to all, and a second to the first."""
    house.prepared()
    house.enrolled("edge-2")
    house.enrolled("lab-1", device_class="labs")
    two = house.pack("two", name="other")
    for model, device in (("minilm:1", "edge-2"), ("minilm:1", "lab-1"), ("other:1", "edge-1")):
        house.grant(two, model=model, device=device, file=f"{model}-{device}.jwt")
    return house


def test_diff_tells_the_owner_which_models_a_state_locks_on_which_device(fleet: Household) -> None:
    state = prediction(fleet.usb / "next", measured({4: b"\4" * 32, 1: b"\1" * 32}))
    before = snapshot(fleet.keys, fleet.usb)
    found = sczctl("boot-policy", "diff", state, "--keys", fleet.keys, "--json")
    assert found.code == 1
    rows = {(row["model"], row["device"]): row for row in found.json["models"]}
    assert set(rows) == {("minilm:1", "edge-1"), ("other:1", "edge-1")}
    assert rows["minilm:1", "edge-1"]["differing"] == [4]
    assert rows["minilm:1", "edge-1"]["words"] == "LOCKED: not approved: PCR 4 (boot loader)"
    assert "no boot policy for other" in rows["other:1", "edge-1"]["words"]
    assert found.json["locked"] == 2
    whole = sczctl("boot-policy", "diff", state, "--keys", fleet.keys, "--whole-class", "--json")
    assert {(row["model"], row["device"]) for row in whole.json["models"]} == set(rows) | {("minilm:1", "edge-2")}
    assert snapshot(fleet.keys, fleet.usb) == before


def test_diff_of_a_state_that_is_approved(fleet: Household) -> None:
    done(sczctl(*fleet.sign_words(fleet.usb / "other.json", model="other")))
    state = prediction(fleet.usb / "now", measured({1: b"\1" * 32}))
    shown = done(sczctl("boot-policy", "diff", state, "--keys", fleet.keys)).out
    assert shown == "minilm:1 on edge-1: opens\nother:1 on edge-1: opens\n2 grant(s) looked at, 0 would be locked\n"


def test_what_the_state_does_not_tell_counts_as_locked(fleet: Household) -> None:
    state = prediction(fleet.usb / "next", {pcr: value for pcr, value in measured().items() if pcr != 8})
    found = sczctl("boot-policy", "diff", state, "--keys", fleet.keys)
    assert found.code == 1
    assert "minilm:1 on edge-1: LOCKED: cannot be told: PCR 8" in found.out


def test_a_policy_that_is_not_sent_yet_stands_in(fleet: Household) -> None:
    changed = measured({4: b"\4" * 32})
    state = prediction(fleet.usb / "next", changed)
    out = fleet.usb / "next-policy.json"
    words = [*fleet.sign_words(out), "--predicted", state]
    kept = fleet.keys / "boot-policies/minilm/default.json"
    before = kept.read_bytes()
    done(sczctl(*words))
    kept.write_bytes(before)
    assert sczctl("boot-policy", "diff", state, "--keys", fleet.keys, "--json").json["models"][0]["opens"] is False
    given = sczctl("boot-policy", "diff", state, "--keys", fleet.keys, "--boot-policy", out, "--json")
    assert given.json["models"][0]["opens"] is True


def test_a_policy_of_somebody_else_in_the_folder_opens_nothing(fleet: Household, tmp_path: Path) -> None:
    other = Household(tmp_path / "other")
    other.enrolled()
    forged = tmp_path / "forged.json"
    done(sczctl(*other.sign_words(forged)))
    document = json.loads(forged.read_bytes()) | {"owner": fleet.owner.owner_id}
    (fleet.keys / "boot-policies/minilm/default.json").write_bytes(canonical(document))
    state = prediction(fleet.usb / "now", measured())
    found = sczctl("boot-policy", "diff", state, "--keys", fleet.keys, "--json").json["models"][0]
    assert (found["opens"], "not signed by the owner" in found["words"]) == (False, True)


def test_diff_over_the_store_of_a_host(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    now = prediction(house.usb / "now", measured())
    assert done(house.ctl("boot-policy", "diff", now)).out.startswith("minilm:1 on edge-1: opens\n")
    after = prediction(house.usb / "next", measured({9: b"\t" * 32}))
    found = house.ctl("boot-policy", "diff", after, "--json")
    assert (found.code, found.json["models"][0]["differing"]) == (1, [9])
    (policy,) = (house.store_folder / "boot-policies").rglob("*.json")
    policy.unlink()
    found = house.ctl("boot-policy", "diff", now, "--json")
    assert (found.code, "no boot policy" in found.json["models"][0]["words"]) == (1, True)
    done(house.ctl("trust", "rm", "owner", "acme"))
    assert house.ctl("boot-policy", "diff", now, "--json").code == 1


def signed_by_another_key(house: Household, value: bytes) -> tuple[Path, Path]:
    """A signer's public key, and a file of its signature of PCR 11."""
    key, policy = rsa.generate_private_key(65537, 2048), policy_pcr(ZERO_DIGEST, {11: value})
    signature = base64.b64encode(key.sign(policy, padding.PKCS1v15(), hashes.SHA256())).decode()
    pem, file = house.usb / "pcr.pem", house.usb / "signatures.json"
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    pem.write_bytes(key.public_key().public_bytes(*public))
    file.write_text(json.dumps({"sha256": [{"pcrs": [11], "pol": policy.hex(), "sig": signature}]}))
    return pem, file


def test_diff_knows_the_signatures_of_pcr_11(house: Household) -> None:
    value = b"\x77" * 32
    out, (pem, file) = house.prepared(), signed_by_another_key(house, value)
    nested = ["--model", "minilm", "--device", "edge-1", "--pcr", "7,12", "--pcr-key", pem]
    done(sczctl("boot-policy", "sign", "--keys", house.keys, *nested, "-o", out / "nested.json"))
    (out / "boot-policy.json").unlink()
    done(house.ctl("add", out))
    state = prediction(house.usb / "next", measured({11: value}))
    other = prediction(house.usb / "other", measured({11: b"\x66" * 32}))
    given = ["--pcr-signature", file]
    for words in (["--keys", house.keys], []):
        diff = ["boot-policy", "diff", state, *words]
        locked = house.ctl(*diff, "--json")
        assert (locked.code, locked.json["models"][0]["differing"]) == (1, [11])
        assert "no signature by the form's key" in locked.json["models"][0]["words"]
        assert done(house.ctl(*diff, *given)).out.startswith("minilm:1 on edge-1: opens\n")
        unsigned = house.ctl("boot-policy", "diff", other, *words, *given)
        assert (unsigned.code, "1 signature(s) by the form's key, none of them" in unsigned.out) == (1, True)
    file.chmod(0o600)
    house.config.write_text(house.config.read_text() + f'[boot]\npcr_signature = "{file}"\n')
    assert house.ctl("boot-policy", "diff", state).code == 0  # this host's own file
    file.write_bytes(b"x")
    refused(sczctl("boot-policy", "diff", state, "--keys", house.keys, *given), BootPolicyInvalid.code)


def test_diff_knows_which_boot_states_were_withdrawn(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    state = prediction(house.usb / "now", measured())
    words = ["--keys", house.keys]
    done(sczctl("revoke", *words, "--boot-policy", "minilm:default", "-o", house.usb / "revoked"))
    found = sczctl("boot-policy", "diff", state, *words)
    assert (found.code, "of epoch 0, the grant is not" in found.out) == (1, True)
    assert house.ctl("boot-policy", "diff", state).code == 0  # the host has both as they were
    done(house.ctl("add", house.usb / "revoked/edge-1/minilm@1.jwt"))
    assert "of epoch 0, the grant is not" in house.ctl("boot-policy", "diff", state).out
    done(sczctl(*house.sign_words(house.usb / "again.json")))
    assert sczctl("boot-policy", "diff", state, *words).code == 0
    given = ["--boot-policy", house.usb / "again.json"]
    assert house.ctl("boot-policy", "diff", state, *given).code == 0


def test_diff_of_nothing(house: Household, tmp_path: Path) -> None:
    house.enrolled()
    state = prediction(house.usb / "now", measured())
    assert done(sczctl("boot-policy", "diff", state, "--keys", house.keys)).out == "no grant for edge-1 is here\n"
    misused(house.ctl("boot-policy", "diff", state, "--whole-class"), "--keys")
    refused(sczctl("boot-policy", "diff", state, "--keys", tmp_path / "nobody"), KeyInvalid.code)
    (house.usb / "x").write_bytes(b"x")
    refused(sczctl("boot-policy", "diff", house.usb / "x", "--keys", house.keys), DeviceInvalid.code)


# --- kept logs, and what they say -------------------------------------------------------------------------------------


def test_eight_logs_are_kept_and_what_is_damaged_is_passed_over(house: Household) -> None:
    data = GRUB.read_bytes()
    store = str(house.store_folder)
    house.store_folder.mkdir(mode=0o700)
    assert list(kept_event_logs(store)) == []
    for number in range(10):
        keep_event_log(store, data[:-1] + bytes([number]))
        path = max((house.store_folder / "boot-logs").iterdir(), key=lambda each: each.stat().st_mtime_ns)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    logs = list(kept_event_logs(store))
    assert [log.events[-1].data[-1] for log in logs] == [9, 8, 7, 6, 5, 4, 3, 2]
    newest, second, *_rest = sorted((house.store_folder / "boot-logs").iterdir(), key=lambda p: -p.stat().st_mtime_ns)
    newest.write_bytes(b"damaged")
    second.chmod(0o666)
    os.utime(newest, ns=(20 * 10**9, 20 * 10**9))
    assert [log.events[-1].data[-1] for log in kept_event_logs(store)] == [7, 6, 5, 4, 3, 2]


def test_what_differs_needs_a_kept_log_that_leads_to_the_approved_value(
    house: Household, boots: dict[str, Path]
) -> None:
    with house.config.open("a") as file:
        file.write(f'[tpm]\nevent_log = "{boots["new log"]}"\n')
    house.store_folder.mkdir(mode=0o700)
    config = load_config(str(house.config))
    old, new = (replay(parse_event_log(boots[f"{name} log"].read_bytes())) for name in ("old", "new"))
    approved = {pcr: {old[pcr]} for pcr in (4, 11)}
    assert what_differs(config, approved, new) == []  # no log of the approved boot
    keep_event_log(config.store_directory, boots["old log"].read_bytes())
    lines = what_differs(config, approved, new)
    assert [line.split(": sha256")[0] for line in lines] == [
        "PCR 4: unified kernel image, boot program \\EFI\\Linux\\image.efi",
        "PCR 11: unified kernel image: contents of section .cmdline",
    ]
    assert what_differs(config, approved, new | {11: b"\x0b" * 32}) == lines[:1]  # this boot's log is not the TPM's
    assert what_differs(config, {4: {b"\4" * 32}}, new) == []  # not the approved value's log
    boots["new log"].write_bytes(b"no log")
    assert what_differs(config, approved, new) == []


def test_a_log_is_replayed_once_however_many_values_are_approved(
    house: Household, boots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's log is written by its hypervisor: what looking at it takes must not be multiplied by forms and PCRs."""
    with house.config.open("a") as file:
        file.write(f'[tpm]\nevent_log = "{boots["new log"]}"\n')
    house.store_folder.mkdir(mode=0o700)
    config = load_config(str(house.config))
    data = boots["old log"].read_bytes()
    old = replay(parse_event_log(data))
    keep_event_log(config.store_directory, data)
    keep_event_log(config.store_directory, GRUB.read_bytes())
    replayed = list[EventLog]()

    def counted(log: EventLog) -> dict[int, bytes]:
        replayed.append(log)
        return replay(log)

    monkeypatch.setattr(explanation, "replay", counted)
    others = {hashlib.sha256(bytes([number])).digest() for number in range(32)}
    approved = dict.fromkeys(range(8), others)
    assert what_differs(config, approved, None) == []
    assert len(replayed) == 2
    lines = what_differs(config, {**approved, 4: {*others, old[4]}, 11: {*others, old[11]}}, None)
    assert [line.split(":")[0] for line in lines] == ["PCR 4", "PCR 11"]
    assert len(replayed) == 4


def test_a_refusal_is_explained_by_the_stores_policies_alone(house: Household, boots: dict[str, Path]) -> None:
    with house.config.open("a") as file:
        file.write(f'[tpm]\nevent_log = "{boots["new log"]}"\n')
    old = replay(parse_event_log(boots["old log"].read_bytes()))
    house.is_device(house.enrolled(pcrs=measured(old)))
    house.trust()
    out = house.pack()
    house.grant(out)
    words = [
        "boot-policy",
        "sign",
        "--keys",
        house.keys,
        "--model",
        "minilm",
        "--device",
        "edge-1",
        "--pcr",
        "4,9,11,12",
    ]
    done(sczctl(*words, "--pcr", "4,9,11,12", "-o", out / "boot-policy.json"))
    done(house.ctl("add", out))
    config = load_config(str(house.config))
    keep_event_log(config.store_directory, boots["old log"].read_bytes())
    message = "not as in the nearest approved boot state: PCR 4 (boot loader), PCR 11 (unified kernel image)"
    lines = why_refused(config, message)
    assert len(lines) == 2
    assert "section .cmdline" in lines[1]
    assert why_refused(config, "the quote does not say") == []
    done(house.ctl("trust", "rm", "owner", "acme"))
    assert why_refused(config, message) == []
