"""`sczctl keygen`, `grant`, `inspect`, `verify`, `boot-policy sign`, `list --grants`: the model owner's commands."""

from __future__ import annotations

import base64
import json
import os
import pty
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.measurement import Measurement, format_measurement
from oci_hook.bundle.layout import open_layout
from oci_hook.errors import (
    BootPolicyInvalid,
    BundleInvalid,
    BundleMismatch,
    DeviceInvalid,
    DeviceNotEnrolled,
    EvidenceRefused,
    FileUnreadable,
    KeyInvalid,
    OutputExists,
    OwnerUntrusted,
)
from oci_hook.owner.keyring import open_keyring
from oci_hook.owner.records import OwnerRecords
from tests.bundles import blob_path
from tests.commands import FILES, Household, done, flip_bit, misused, refused, sczctl, snapshot
from tests.devices import measured

KEY_FILES = ("manifest.key", "boot-policy.key", "recovery.key")
SIGNER = Path(__file__).parents[1] / "fixtures" / "pcr-signature" / "pcr.pem"


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


# --- keygen -----------------------------------------------------------------------------------------------------------


def passphrase_file(folder: Path, text: str = "correct horse\n") -> Path:
    path = folder / "passphrase"
    path.write_text(text)
    return path


def test_keygen_encrypts_the_keys_with_the_passphrase_of_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    made = done(sczctl("keygen", "--keys", keys, "--name", "acme", "--passphrase-file", passphrase_file(tmp_path)))
    assert "owner acme, id " in made.out
    assert str(keys / "owner.json") in made.out
    assert "NOT encrypted" not in made.err
    assert keys.stat().st_mode & 0o777 == 0o700
    for name in KEY_FILES:
        path = keys / name
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises((TypeError, ValueError)):
            load_pem_private_key(path.read_bytes(), None)
    assert open_keyring(keys, lambda: "correct horse").owner.name == "acme"  # without the line's end
    with pytest.raises(KeyInvalid):
        open_keyring(keys, lambda: "correct horse\n")


def test_keygen_without_a_passphrase_says_so(tmp_path: Path) -> None:
    made = done(sczctl("keygen", "--keys", tmp_path / "keys", "--name", "acme", "--no-passphrase"))
    assert "NOT encrypted" in made.err
    for name in KEY_FILES:
        load_pem_private_key((tmp_path / "keys" / name).read_bytes(), None)


def test_keygen_asks_nobody_where_there_is_no_terminal(tmp_path: Path) -> None:
    refused(sczctl("keygen", "--keys", tmp_path / "keys", "--name", "acme"), KeyInvalid.code, "--passphrase-file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "\n", "x" * 1024, "x" * 2000])
def test_keygen_refuses_a_passphrase_that_is_none(tmp_path: Path, text: str) -> None:
    path = passphrase_file(tmp_path, text)
    words = ["keygen", "--keys", tmp_path / "keys", "--name", "acme", "--passphrase-file", path]
    refused(sczctl(*words), KeyInvalid.code)
    assert list(tmp_path.iterdir()) == [path]


def test_keygen_refuses_what_contradicts_itself_or_is_in_the_way(tmp_path: Path) -> None:
    path = passphrase_file(tmp_path)
    words: list[str | Path] = ["keygen", "--keys", tmp_path / "keys", "--name", "acme"]
    misused(sczctl(*words, "--no-passphrase", "--passphrase-file", path), "exclude each other")
    misused(sczctl("keygen", "--keys", tmp_path / "keys", "--name", "Acme Inc"), "is not a name")
    refused(sczctl(*words, "--passphrase-file", tmp_path / "absent"), FileUnreadable.code, "absent")
    assert list(tmp_path.iterdir()) == [path]
    nowhere = tmp_path / "absent" / "keys"
    refused(sczctl("keygen", "--keys", nowhere, "--name", "acme"), FileUnreadable.code, "mkdir -p")
    done(sczctl(*words, "--no-passphrase"))
    before = snapshot(tmp_path)
    refused(sczctl(*words, "--no-passphrase"), OutputExists.code)  # keys are never overwritten
    assert snapshot(tmp_path) == before


def on_a_terminal(words: list[str], answers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Run a command on a terminal of its own; after each expected text, type an answer."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored below a shell's background job
        os.execv(sys.executable, [sys.executable, "-c", "from oci_hook.cli import main; main()", *words])
    shown, waiting = b"", b""
    deadline = time.monotonic() + 30
    for expected, answer in [*answers, (b"\0", b"")]:
        while expected not in waiting and time.monotonic() < deadline:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # EIO: the other side has gone
                break
            shown, waiting = shown + piece, waiting + piece
        waiting = b""
        if answer:
            os.write(terminal, answer)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown


def test_a_person_is_asked_twice_and_the_passphrase_is_not_shown(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    words = ["keygen", "--keys", str(keys), "--name", "acme"]
    code, shown = on_a_terminal(words, [(b"Passphrase", b"hunter2 x\n"), (b"Repeat", b"hunter2 x\n")])
    assert code == 0, shown
    assert b"hunter2" not in shown
    assert open_keyring(keys, lambda: "hunter2 x").owner.name == "acme"


def test_pack_and_add_show_a_person_how_far_they_are(house: Household) -> None:
    (house.source / "large").write_bytes(bytes(8 << 20))
    house.trust()
    for words, label in (
        (house.pack_words(house.usb / "bundle"), b"packing"),
        (["--config", house.config, "add", house.usb / "bundle"], b"verifying"),
    ):
        code, shown = on_a_terminal([str(word) for word in words], [])
        assert code == 0, shown
        assert label in shown
        assert b"100%" in shown
        assert shown.count(b"%") > 2  # more than its beginning and its end


def test_a_person_who_gives_up_leaves_nothing(tmp_path: Path) -> None:
    words = ["keygen", "--keys", str(tmp_path / "keys"), "--name", "acme"]
    code, shown = on_a_terminal(words, [(b"Passphrase", b"\x03")])
    assert code == 130, shown
    assert b"Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_commands_open_the_keys_with_the_passphrase_and_not_without(house: Household, tmp_path: Path) -> None:
    keys, path = tmp_path / "locked", passphrase_file(tmp_path)
    done(sczctl("keygen", "--keys", keys, "--name", "acme", "--passphrase-file", path))
    words = [*house.pack_words(house.usb / "b"), "--keys", keys]
    before = snapshot(keys)
    refused(sczctl(*words), KeyInvalid.code, "no terminal")
    refused(sczctl(*words, "--passphrase-file", passphrase_file(house.host, "wrong")), KeyInvalid.code, "passphrase")
    assert snapshot(keys) == before
    assert list(house.usb.iterdir()) == []
    done(sczctl(*words, "--passphrase-file", path))


def test_keys_that_others_may_read_are_not_used(house: Household) -> None:
    (house.keys / "recovery.key").chmod(0o640)
    refused(sczctl(*house.pack_words(house.usb / "b")), KeyInvalid.code, "may be read by others", "chmod 600")
    assert list(house.usb.iterdir()) == []


# --- grant ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(house: Household) -> Path:
    house.enrolled(counter_value=2)
    return house.pack()


def grant_words(house: Household, out: Path, *, model: str = "minilm:1", device: str = "edge-1") -> list[str | Path]:
    return ["grant", model, "--keys", house.keys, "--device", device, "-o", out / "grant.jwt"]


def test_grant_writes_the_grant_and_remembers_it(house: Household, out: Path) -> None:
    granted = done(sczctl(*grant_words(house, out)))
    assert granted.out == "granted minilm:1 to edge-1 (class default, while its counter is at most 2)\n"
    assert (house.keys / "grants" / "minilm" / "1" / "edge-1.grant").read_bytes() == (out / "grant.jwt").read_bytes()
    again = done(sczctl(*grant_words(house, out)[:-1], out / "second.jwt", "--maximum", "9", "--json"))
    assert again.json["counter_maximum"] == 9
    assert again.json["model"] == "minilm:1"
    (row,) = done(sczctl("list", "--grants", "--keys", house.keys, "--json")).json
    assert (row["model"], row["device"], row["class"], row["counter_maximum"]) == ("minilm:1", "edge-1", "default", 9)
    assert "edge-1" in done(sczctl("list", "--grants", "--keys", house.keys)).out


def test_list_grants_of_nobody(house: Household) -> None:
    shown = done(sczctl("list", "--grants", "--keys", house.keys))
    assert (shown.out, "nothing was granted" in shown.err) == ("", True)
    assert done(sczctl("list", "--grants", "--keys", house.keys, "--json")).json == []
    misused(sczctl("list", "--grants"), "go together")
    misused(sczctl("list", "--keys", house.keys), "go together")
    refused(sczctl("list", "--grants", "--keys", house.source), KeyInvalid.code)


@pytest.mark.parametrize(
    ("model", "device", "code", "words"),
    [
        ("minilm", "edge-1", 2, ["has no version", "'minilm:1'"]),
        ("Minilm:1", "edge-1", 2, ["is not a name"]),
        ("minilm:", "edge-1", 2, ["is not a version"]),
        ("../x:1", "edge-1", 2, ["is not a name"]),
        ("minilm:1", "../edge-1", 2, ["is not a name"]),
        ("minilm:2", "edge-1", 24, ["minilm:2", "there is minilm:1"]),
        ("other:1", "edge-1", 24, ["other:1", "there is minilm:1"]),
        ("minilm:1", "edge-9", 22, ["edge-9", "there is edge-1"]),
    ],
)
def test_grant_of_what_is_not_there(
    house: Household, out: Path, model: str, device: str, code: int, words: list[str]
) -> None:
    before = snapshot(house.keys, house.usb)
    tried = sczctl(*grant_words(house, out, model=model, device=device))
    (misused if code == 2 else lambda *given: refused(given[0], code, *given[1:]))(tried, *words)
    assert snapshot(house.keys, house.usb) == before


@pytest.mark.parametrize("maximum", ["-1", "x", "9223372036854775808", "1" * 40])
def test_a_maximum_that_is_no_counter_value(house: Household, out: Path, maximum: str) -> None:
    before = snapshot(house.keys, house.usb)
    misused(sczctl(*grant_words(house, out), "--maximum", maximum), "--maximum")
    assert snapshot(house.keys, house.usb) == before


def test_a_maximum_that_the_device_has_passed(house: Household, out: Path) -> None:
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*grant_words(house, out), "--maximum", "1"), DeviceInvalid.code, "is 2")
    assert snapshot(house.keys, house.usb) == before


def test_grant_overwrites_nothing(house: Household, out: Path) -> None:
    (out / "grant.jwt").write_bytes(b"precious")
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*grant_words(house, out)), OutputExists.code, "grant.jwt")
    nowhere = grant_words(house, out / "absent")
    refused(sczctl(*nowhere), FileUnreadable.code, f"mkdir -p {out / 'absent'}")
    assert snapshot(house.keys, house.usb) == before


@pytest.mark.parametrize("damage", ["device", "key"])
def test_grant_from_damaged_records(house: Household, out: Path, damage: str) -> None:
    path = house.keys / ("devices/edge-1.json" if damage == "device" else "models/minilm/1.json")
    path.write_bytes(b"{}")
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*grant_words(house, out)), 22 if damage == "device" else 24)
    assert snapshot(house.keys, house.usb) == before


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_a_bundle_says(house: Household, out: Path) -> None:
    document = done(sczctl("inspect", "--json", out / "bundle")).json
    assert document["kind"] == "bundle"
    assert document["owner"] == house.owner.owner_id
    assert document["model"] == {"name": "minilm", "version": "1", "generation": 1}
    assert [file["path"] for file in document["files"]] == sorted(FILES)
    assert document["image"] != document["manifest"]
    text = done(sczctl("inspect", out / "bundle")).out
    assert text.startswith("unverified:\n  kind: bundle\n")
    assert "path: weights/model.bin" in text


def test_inspect_shows_what_a_grant_says_and_not_the_wrapped_key(house: Household, out: Path) -> None:
    grant = house.grant(out)
    wrapped = json.loads(base64.urlsafe_b64decode(grant.read_bytes().split(b".")[1] + b"=="))["wrapped_key"]
    shown = done(sczctl("inspect", "--json", grant))
    assert (shown.json["kind"], shown.json["device"]["name"]) == ("grant", "edge-1")
    text = done(sczctl("inspect", grant)).out
    assert "name: edge-1" in text
    for output in (shown.out, text):
        assert wrapped not in output
        assert "wrapped_key" not in output


def test_inspect_shows_what_a_boot_policy_says(house: Household, out: Path) -> None:
    done(sczctl(*house.sign_words(out / "policy.json")))
    shown = done(sczctl("inspect", "--json", out / "policy.json")).json
    assert (shown["kind"], shown["model"], shown["class"]) == ("boot policy", "minilm", "default")
    assert sorted(shown["forms"][0]["pcrs"]) == ["4", "7", "8", "9"]
    assert "created: 20" in done(sczctl("inspect", out / "policy.json")).out


def test_inspect_is_no_terminal_for_hostile_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    hostile = "\x1b[2J\x9b31m\u202e\nowner: acme"
    path.write_text(
        json.dumps({"schema": hostile, hostile: [hostile, {hostile: [], "created": 10**19}], "kind": "grant"})
    )
    for words in (["inspect", path], ["inspect", "--json", path]):
        shown = done(sczctl(*words))
        assert all(character == "\n" or 32 <= ord(character) < 127 for character in shown.out)
        assert not [line for line in shown.out.splitlines() if line.strip().startswith("owner: acme")]
    assert done(sczctl("inspect", "--json", path)).json["kind"] == "document"


@pytest.mark.parametrize("contents", [b"", b"x", b"a.b.c", b"{", b"[]", b"\xff\xfe", b"-----BEGIN PRIVATE KEY-----\nx"])
def test_inspect_of_something_else(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x").write_bytes(contents)
    tried = sczctl("inspect", tmp_path / "x")
    refused(tried, tried.code)
    assert tried.code in (15, 16)


def test_inspect_of_nothing(tmp_path: Path) -> None:
    refused(sczctl("inspect", tmp_path / "absent"), FileUnreadable.code, "absent")
    refused(sczctl("inspect", tmp_path), 15)
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    refused(sczctl("inspect", tmp_path / "large"), 15, "larger than")


# --- verify -----------------------------------------------------------------------------------------------------------


def verify_words(house: Household, out: Path, *more: str | Path) -> list[str | Path]:
    return ["verify", out / "bundle", "--owner", house.keys / "owner.json", *more]


def layer(out: Path, number: int = 0) -> Path:
    with open_layout(out / "bundle") as layout:
        return out / "bundle" / blob_path(layout.layers[number].digest)


def test_verify_of_a_good_bundle(house: Household, out: Path) -> None:
    assert done(sczctl(*verify_words(house, out))).out == (
        "minilm:1 is signed by acme; its 2 files are what was signed\n"
    )
    decrypted = done(sczctl(*verify_words(house, out, "--keys", house.keys)))
    assert decrypted.out.endswith("what was signed and decrypt\n")
    assert "decrypting" in decrypted.err
    shown = done(sczctl(*verify_words(house, out, "--keys", house.keys, "--json"))).json
    assert (shown["name"], shown["files"], shown["decrypted"]) == ("minilm", 2, True)
    assert shown["owner"] == house.owner.owner_id


def test_verify_finds_a_flipped_bit_and_a_swapped_layer(house: Household, out: Path) -> None:
    flip_bit(layer(out))
    refused(sczctl(*verify_words(house, out)), BundleMismatch.code, "does not hash")
    flip_bit(layer(out))
    done(sczctl(*verify_words(house, out)))
    one, two = layer(out, 0), layer(out, 1)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(sczctl(*verify_words(house, out)), BundleMismatch.code)
    one.unlink()
    refused(sczctl(*verify_words(house, out)), BundleInvalid.code)


def test_verify_against_another_owner(house: Household, out: Path, tmp_path: Path) -> None:
    other = Household(tmp_path / "other", name="evil")
    refused(sczctl("verify", out / "bundle", "--owner", other.keys / "owner.json"), OwnerUntrusted.code)
    refused(sczctl(*verify_words(house, out, "--keys", other.keys)), KeyInvalid.code)
    refused(sczctl(*verify_words(house, out, "--keys", tmp_path / "absent")), KeyInvalid.code, "absent")


def test_verify_of_what_is_no_bundle(house: Household, tmp_path: Path) -> None:
    words = ["--owner", house.keys / "owner.json"]
    refused(sczctl("verify", tmp_path / "absent", *words), 15, "not a folder")
    refused(sczctl("verify", house.source, *words), 15)
    misused(sczctl("verify", house.config, *words), "is a file")
    refused(sczctl("verify", house.source, "--owner", house.config), 20)


# --- boot-policy sign -------------------------------------------------------------------------------------------------


def sign(house: Household, *words: str | Path, output: str = "policy.json") -> list[str | Path]:
    return ["boot-policy", "sign", "--keys", house.keys, "--model", "minilm", "-o", house.usb / output, *words]


def test_sign_approves_the_states_of_the_devices(house: Household) -> None:
    house.enrolled("edge-1")
    house.enrolled("edge-2", pcrs=measured({8: b"\x08" * 32}))
    house.enrolled("edge-3", pcrs=measured({1: b"\x01" * 32}))  # PCR 1 does not count: the same state
    devices = ["--device", "edge-1", "--device", "edge-2", "--device", "edge-3"]
    signed = done(sczctl(*sign(house, *devices, "--pcr", "9, 8,4,7,4")))
    assert signed.out == "boot policy for minilm, device class default: 2 approved state(s), PCRs 4,7,8,9\n"
    unverified = parse_boot_policy((house.usb / "policy.json").read_bytes())
    policy = verify_boot_policy(unverified, owner=house.owner, model_name="minilm", device_class="default")
    assert [set(form.pcrs) for form in policy.forms] == [{4, 7, 8, 9}] * 2
    assert policy.forms[1].pcrs[8] == b"\x08" * 32
    again = done(sczctl(*sign(house, *devices, "--pcr", "11,12", "--json", output="uki.json")))
    assert again.json == {"model": "minilm", "class": "default", "pcrs": [11, 12], "states": 1, "epoch": 0}


def test_sign_takes_the_key_of_a_systems_signer_for_pcr_11(house: Household) -> None:
    house.enrolled("edge-1")
    pem = SIGNER
    pkfp = json.loads(pem.with_name("tpm2-pcr-signature.json").read_bytes())["sha256"][0]["pkfp"]
    words = ["--device", "edge-1", "--pcr", "7,12", "--pcr-key", pem]
    signed = done(sczctl(*sign(house, *words)))
    assert "1 approved state(s), PCRs 7,12\n" in signed.out
    assert f"PCR 11 as signed by the key that systemd calls {pkfp} (pkfp)" in signed.out
    (form,) = parse_boot_policy((house.usb / "policy.json").read_bytes()).unverified_forms
    assert (set(form.pcrs), form.selection) == ({7, 12}, {7, 11, 12})
    both = done(sczctl(*sign(house, *words, "--also-measured", "--json", output="both.json")))
    assert both.json == {
        "model": "minilm",
        "class": "default",
        "pcrs": [7, 12],
        "states": 2,
        "epoch": 0,
        "signed_pcrs": [11],
        "pkfp": pkfp,
    }
    forms = parse_boot_policy((house.usb / "both.json").read_bytes()).unverified_forms
    assert [(set(form.pcrs), form.signed is None) for form in forms] == [({7, 11, 12}, True), ({7, 12}, False)]


def test_sign_refuses_a_signers_key_that_is_none_and_what_it_leaves_uncovered(house: Household) -> None:
    house.enrolled("edge-1")
    pem = SIGNER
    refused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "7,11", "--pcr-key", pem)), 17, "cover neither")
    refused(
        sczctl(*sign(house, "--device", "edge-1", "--pcr", "12", "--pcr-key", house.config)), 24, "not a public key"
    )
    refused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "12", "--pcr-key", house.usb / "absent")), 68)
    misused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "11,12", "--also-measured")), "needs --pcr-key")
    assert not (house.usb / "policy.json").exists()


def test_sign_takes_the_class_of_the_devices(house: Household) -> None:
    house.enrolled("edge-1", device_class="shops")
    house.enrolled("edge-2", device_class="labs")
    words = ["--device", "edge-1", "--pcr", "4,8,9"]
    assert "device class shops" in done(sczctl(*sign(house, *words))).out
    misused(sczctl(*sign(house, *words, "--device", "edge-2", output="x")), "several classes (labs, shops)")
    assert not (house.usb / "x").exists()
    given = done(sczctl(*sign(house, *words, "--device", "edge-2", "--class", "labs", output="x")))
    assert "device class labs" in given.out


@pytest.mark.parametrize(
    ("pcrs", "changes", "word"),
    [
        ("7", {}, "cover"),
        ("4,8", {}, "cover"),
        ("4,9", {}, "cover"),
        ("0,1,2,3,4,5,6,7", {}, "cover"),
        ("11", {}, "cover"),
        ("12,7", {}, "cover"),
        ("4,8,9", {9: bytes(32)}, "PCR 9 has never been measured"),
        ("4,7,8,9", {7: bytes(32)}, "PCR 7 has never been measured"),
        ("11,12", {11: b"\xff" * 32}, "PCR 11 has never been measured"),
    ],
)
def test_sign_refuses_what_tells_no_system_from_another(
    house: Household, pcrs: str, changes: dict[int, bytes], word: str
) -> None:
    house.enrolled(pcrs=measured(changes))
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*sign(house, "--device", "edge-1", "--pcr", pcrs)), BootPolicyInvalid.code, word, "--pcr")
    assert snapshot(house.keys, house.usb) == before


@pytest.mark.parametrize(
    "pcrs", ["", "x", "4,8,", "16", "4,8,9,23", "-1", "4;8", "²", "4,8,9,999999999999999999999999"]
)
def test_pcrs_that_are_none(house: Household, pcrs: str) -> None:
    house.enrolled()
    misused(sczctl(*sign(house, "--device", "edge-1", "--pcr", pcrs)), "--pcr")
    assert list(house.usb.iterdir()) == []


def test_sign_needs_a_state(house: Household) -> None:
    misused(sczctl(*sign(house, "--pcr", "4,8,9")), "--device, --measured or --predicted")
    refused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "4,8,9")), DeviceInvalid.code, "there are none")
    house.enrolled()
    refused(sczctl(*sign(house, "--device", "edge-2", "--pcr", "4,8,9")), DeviceInvalid.code, "there is edge-1")
    misused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "4,8,9", "--model", "Big")), "--model")
    misused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "4,8,9", "--class", "a b")), "--class")
    assert list(house.usb.iterdir()) == []


def test_a_measurement_that_the_device_did_not_quote(house: Household) -> None:
    house.enrolled()
    path = house.usb / "measured.json"
    path.write_bytes(format_measurement(Measurement("edge-1", 1, Evidence(b"x", b"y", measured()))))
    before = snapshot(house.keys, house.usb)
    refused(sczctl(*sign(house, "--measured", path, "--pcr", "4,8,9")), EvidenceRefused.code)
    path.write_bytes(b"{}")
    refused(sczctl(*sign(house, "--measured", path, "--pcr", "4,8,9")), DeviceInvalid.code)
    path.write_bytes(format_measurement(Measurement("edge-7", 1, Evidence(b"x", b"y", measured()))))
    refused(sczctl(*sign(house, "--measured", path, "--pcr", "4,8,9")), DeviceInvalid.code, "edge-7")
    path.unlink()
    before.pop(str(path))
    assert snapshot(house.keys, house.usb) == before


def test_sign_overwrites_nothing(house: Household) -> None:
    house.enrolled()
    (house.usb / "policy.json").write_bytes(b"precious")
    refused(sczctl(*sign(house, "--device", "edge-1", "--pcr", "4,8,9")), OutputExists.code)
    assert (house.usb / "policy.json").read_bytes() == b"precious"


# --- enroll: what is refused before any TPM is asked ------------------------------------------------------------------


def test_enrolment_commands_look_before_they_work(house: Household) -> None:
    taken = house.usb / "taken"
    taken.write_bytes(b"precious")
    OwnerRecords(house.keys).save_pending("edge-1", b"an older challenge")
    roots = house.usb / "roots"
    roots.mkdir()
    before = snapshot(house.keys, house.host, house.usb)
    for words in (
        ["enroll", "request", "--owner", house.keys / "owner.json", "--device", "edge-1", "-o", taken],
        ["enroll", "challenge", taken, "--keys", house.keys, "--ek-roots", roots, "-o", taken],
        ["enroll", "answer", taken, "-o", taken],
        ["boot-policy", "measure", "--device", "edge-1", "-o", taken],
    ):
        refused(house.ctl(*words), OutputExists.code, "taken")
    new, accept = house.usb / "new", ["enroll", "accept", taken, "--keys", house.keys, "--ek-roots", roots]
    request = ["enroll", "request", "--owner", house.keys / "owner.json", "-o", new, "--device"]
    misused(house.ctl(*request, "A B"), "--device")
    misused(house.ctl(*accept, "--class", "Big"), "--class")
    challenge = ["enroll", "challenge", taken, "--keys", house.keys, "--ek-roots", roots, "-o", new]
    refused(house.ctl(*challenge), DeviceInvalid.code)
    refused(house.ctl("enroll", "answer", taken, "-o", new), DeviceInvalid.code)
    refused(house.ctl("boot-policy", "measure", "--device", "edge-1", "-o", new), DeviceNotEnrolled.code)
    refused(house.ctl(*accept), DeviceInvalid.code)
    assert snapshot(house.keys, house.host, house.usb) == before


def test_a_copy_of_the_owner_s_folder_is_the_owner(house: Household, out: Path, tmp_path: Path) -> None:
    shutil.copytree(house.keys, tmp_path / "copy")
    done(sczctl("grant", "minilm:1", "--keys", tmp_path / "copy", "--device", "edge-1", "-o", out / "grant.jwt"))
    assert not (house.keys / "grants").exists()
