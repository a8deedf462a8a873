"""`sczctl enroll` with real software TPMs: four files, and a name that another TPM cannot take."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.attestation.device_record import format_device_record
from oci_hook.attestation.enrolment_documents import parse_request
from oci_hook.attestation.tpm import open_tpm
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.bundle.grant import parse_grant, verify_grant_signature
from oci_hook.config import load_config
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, FileUnreadable, KeyInvalid, Revoked
from oci_hook.owner.records import OwnerRecords
from oci_hook.store import Store
from tests.commands import Done, done, flip_bit, sczctl, snapshot
from tests.enrolments import Enrolment, enrolment_in_a_folder, listed


@pytest.fixture
def enrolment() -> Iterator[Enrolment]:
    with enrolment_in_a_folder() as made:
        yield made


def test_another_tpm_cannot_take_a_name(enrolment: Enrolment) -> None:
    first, _ = enrolment.host("first")
    shown, challenge = enrolment.challenge(enrolment.request(first, "edge-1"))
    assert "new device edge-1" in done(shown).out
    done(enrolment.finish(first, challenge, "--class", "kiosk"))
    known = enrolment.record("edge-1")

    second, _ = enrolment.host("second")
    request = enrolment.request(second, "edge-1")
    refused, challenge = enrolment.challenge(request)
    assert refused.code == EnrolmentRefused.code
    assert "another TPM" in refused.err
    assert not challenge.exists()
    assert not (enrolment.house.keys / "pending" / "edge-1.json").exists()

    # Neither by a challenge that was made while the name was free.
    request = enrolment.request(second, "edge-2")
    _, challenge = enrolment.challenge(request)
    (enrolment.house.keys / "devices" / "edge-1.json").unlink()
    known = replace(known, device="edge-2")
    OwnerRecords(enrolment.house.keys).save_device("edge-2", format_device_record(known))
    refused = enrolment.finish(second, challenge)
    assert refused.code == EnrolmentRefused.code
    assert enrolment.record("edge-2") == known

    replaced = done(enrolment.finish(second, challenge, "--replace"))
    assert "replaced device edge-2" in replaced.out
    assert enrolment.record("edge-2").ek_sha256 != known.ek_sha256


def enrol(enrolment: Enrolment, config: Path, name: str, *more: str) -> Done:
    """All four files; the owner's answer, or its refusal of the request."""
    tried, challenge = enrolment.challenge(enrolment.request(config, name))
    return tried if tried.code else enrolment.finish(config, challenge, *more)


def revoked(enrolment: Enrolment, name: str, folder: str) -> int | None:
    keys = enrolment.house.keys
    done(sczctl("revoke", "--keys", keys, "--device", name, "-o", enrolment.house.usb / folder))
    return enrolment.record(name).revoked


def test_a_revoked_tpm_does_not_come_back_by_another_name(enrolment: Enrolment) -> None:
    config, _ = enrolment.host("only")
    done(enrol(enrolment, config, "edge-1"))
    renaming = ("--replace",)
    tried, _ = enrolment.challenge(enrolment.request(config, "edge-8"))
    assert (tried.code, "enrolled as edge-1" in tried.err) == (EnrolmentRefused.code, True)
    _, early = enrolment.challenge(enrolment.request(config, "edge-8"), *renaming)  # answered after the revocation
    assert revoked(enrolment, "edge-1", "r")
    late = enrolment.finish(config, early, "--unrevoke", *renaming)
    assert (late.code, "was revoked as edge-1" in late.err) == (EnrolmentRefused.code, True)
    before = snapshot(enrolment.house.keys)
    for more in ((), ("--replace",)):
        tried, _ = enrolment.challenge(enrolment.request(config, "edge-9"), *more)
        assert (tried.code, "was revoked as edge-1" in tried.err) == (EnrolmentRefused.code, True)
    assert snapshot(enrolment.house.keys) == before
    assert OwnerRecords(enrolment.house.keys).devices() == ("edge-1",)
    # Nor if its EK was known by another digest, as that of a list: its AK is the same.
    record = replace(enrolment.record("edge-1"), ek_sha256="0" * 64, vouched="list")
    OwnerRecords(enrolment.house.keys).save_device("edge-1", format_device_record(record))
    tried, _ = enrolment.challenge(enrolment.request(config, "edge-9"))
    assert (tried.code, "was revoked as edge-1" in tried.err) == (EnrolmentRefused.code, True)


def test_a_revoked_device_stays_so_until_that_is_said(enrolment: Enrolment) -> None:
    config, _ = enrolment.host("only")
    done(enrol(enrolment, config, "edge-1"))
    when = revoked(enrolment, "edge-1", "r")
    for more in ((), ("--replace",)):
        said = done(enrol(enrolment, config, "edge-1", *more))
        assert "known device edge-1" in said.out
        assert "it stays revoked" in said.out
        assert enrolment.record("edge-1").revoked == when
    requests, answers = (enrolment.directory / name for name in ("requests", "answers"))
    for folder in (requests, answers):
        folder.mkdir()
    shutil.copy(enrolment.request(config, "edge-1"), requests / "a.json")
    words = ("--keys", enrolment.house.keys, "--ek-roots", enrolment.roots, "--replace")
    done(sczctl("enroll", "challenge", requests, *words, "-o", enrolment.directory / "challenges"))
    enrolment.answer(config, enrolment.directory / "challenges" / "edge-1.json", answers / "a.json")
    (row,) = done(sczctl("enroll", "accept", answers, *words, "--json")).json
    assert (row["state"], row["revoked"]) == ("known device", when)
    # As its own successor, whose EK was known by another digest, it stays so, too.
    record = replace(enrolment.record("edge-1"), ek_sha256="0" * 64, vouched="list")
    OwnerRecords(enrolment.house.keys).save_device("edge-1", format_device_record(record))
    tried, challenge = enrolment.challenge(enrolment.request(config, "edge-1"), "--replace")
    assert "known device edge-1" in done(tried).out
    assert "it stays revoked" in done(enrolment.finish(config, challenge, "--replace")).out
    said = done(enrol(enrolment, config, "edge-1", "--replace", "--unrevoke"))
    assert "unrevoked device edge-1" in said.out
    assert "stays revoked" not in said.out
    assert enrolment.record("edge-1").revoked is None
    assert enrolment.record("edge-1").counter_value == 2  # the revocation still waits to be applied


def test_the_same_tpm_enrols_again_and_keeps_its_class(enrolment: Enrolment) -> None:
    config, tpm = enrolment.host("only")
    _, challenge = enrolment.challenge(enrolment.request(config, "edge-1"))
    done(enrolment.finish(config, challenge, "--class", "kiosk"))
    before = enrolment.record("edge-1")
    tpm.extend(9, "another kernel")
    shown, challenge = enrolment.challenge(enrolment.request(config, "edge-1"))
    assert "known device edge-1" in done(shown).out
    done(enrolment.finish(config, challenge))
    after = enrolment.record("edge-1")
    assert (after.ak.name, after.srk.name, after.counter.name) == (before.ak.name, before.srk.name, before.counter.name)
    assert after.device_class == "kiosk"
    assert after.pcrs[9] != before.pcrs[9]
    assert {pcr: value for pcr, value in after.pcrs.items() if pcr != 9} == {
        pcr: value for pcr, value in before.pcrs.items() if pcr != 9
    }


# --- one TPM, one name, one counter -----------------------------------------------------------------------------------


def opened(enrolment: Enrolment, config: Path, out: Path, grant: Path) -> int:
    """Let the TPM open a grant, whatever the host's files say by now; the secret's bytes."""
    owner = enrolment.house.owner
    granted = verify_grant_signature(parse_grant(grant.read_bytes()), owner=owner)
    unverified = parse_boot_policy((out / "policy.json").read_bytes())
    policy = verify_boot_policy(unverified, owner=owner, model_name="minilm", device_class="default")
    counter = granted.counter
    asked = Unsealing(
        granted.sealed, policy.forms[0], owner.boot_policy_key, granted.policy_ref, counter.index, counter.maximum, None
    )
    settings = load_config(str(config))
    with open_tpm(settings.tpm_tcti, str(config.with_name("lock")), timeout_seconds=10) as tpm:
        return len(tpm.unseal(Store(settings.store_directory).load_device(), asked))


def test_a_renamed_tpm_is_locked_by_a_revocation(enrolment: Enrolment) -> None:
    """The grant under the name of before is one for the same SRK and counter, and the TPM knows no names."""
    config, _ = enrolment.host("only")
    house = enrolment.house
    done(sczctl("--config", config, "trust", "add", "owner", house.keys / "owner.json"))
    done(enrol(enrolment, config, "edge-1"))
    out = house.pack()
    done(sczctl(*house.sign_words(out / "policy.json")))
    old = house.grant(out)
    _, challenge = enrolment.challenge(enrolment.request(config, "warehouse-1"), "--replace")
    assert "renamed device warehouse-1" in done(enrolment.finish(config, challenge, "--replace")).out
    assert OwnerRecords(house.keys).devices() == ("warehouse-1",)
    assert opened(enrolment, config, out, old) == 32
    done(sczctl("revoke", "--keys", house.keys, "--model", "minilm:1", "-o", house.usb / "r"))
    done(sczctl("--config", config, "add", house.usb / "r" / "warehouse-1"))
    with pytest.raises(Revoked):
        opened(enrolment, config, out, old)


def test_a_known_tpm_with_another_counter_is_refused_and_replaced_by_word_alone(enrolment: Enrolment) -> None:
    """Another program has taken the index; the grants that hang on the counter of before are named, not forgotten."""
    config, tpm = enrolment.host("only")
    house = enrolment.house
    done(enrol(enrolment, config, "edge-1"))
    house.grant(house.pack())
    index = hex(enrolment.record("edge-1").counter.index)
    for words in (["nvundefine", "-C", "o", index], ["nvdefine", "-C", "o", "-s", "8", index]):
        command = [f"/usr/bin/tpm2_{words[0]}", "-T", tpm.tcti, *words[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    (config.with_name("store") / "device.json").unlink()
    request, before = enrolment.request(config, "edge-1"), snapshot(house.keys)
    refused, _ = enrolment.challenge(request)
    assert (refused.code, "another counter" in refused.err) == (EnrolmentRefused.code, True)
    assert snapshot(house.keys) == before
    _, challenge = enrolment.challenge(request, "--replace")
    assert "replaced device edge-1" in done(enrolment.finish(config, challenge, "--replace")).out
    said = sczctl("revoke", "--keys", house.keys, "--model", "minilm:1", "-o", house.usb / "r")
    assert (said.code, f"counter {index}" in said.err) == (1, True)


# --- without a certificate --------------------------------------------------------------------------------------------


def test_a_tpm_without_a_certificate_is_enrolled_by_the_list_alone(enrolment: Enrolment) -> None:
    config, tpm = enrolment.host("bare", certified=False)
    line = enrolment.ek_line(config, "edge-1")
    ek_list = listed(enrolment.directory, line)
    shown = done(sczctl("--config", config, "enroll", "ek", "--device", "edge-1", "--json")).json
    assert shown == {"device": "edge-1", "ek_sha256": line.split()[0], "kind": "rsa", "certificate": False}

    request = enrolment.request(config, "edge-1")
    enrolment.host("other")  # so that the folder of roots holds one
    refused, challenge = enrolment.challenge(request)
    assert refused.code == EnrolmentRefused.code
    assert "check 1" in refused.err
    assert "no EK certificate" in refused.err
    assert not challenge.exists()
    assert not (enrolment.house.keys / "pending").exists()

    shown, challenge = enrolment.challenge(request, ek_list=ek_list)
    assert f"EK in your list, SHA-256 {line.split()[0]}" in done(shown).out
    # What was taken off the list meanwhile is not accepted any more.
    ek_list.write_text(f"{'0' * 64} edge-1\n")
    refused = enrolment.finish(config, challenge, ek_list=ek_list)
    assert (refused.code, "check 1" in refused.err) == (EnrolmentRefused.code, True)
    assert OwnerRecords(enrolment.house.keys).devices() == ()
    listed(enrolment.directory, line)
    accepted = done(enrolment.finish(config, challenge, "--json", ek_list=ek_list)).json
    assert (accepted["vouched"], accepted["ek_sha256"]) == ("list", line.split()[0])
    record = enrolment.record("edge-1")
    assert (record.vouched, record.ek_sha256) == ("list", line.split()[0])

    tpm.restart()
    tpm.measure_boot()
    assert enrolment.ek_line(config, "edge-1") == line  # made anew, the same


def test_the_hash_is_openssl_s_of_the_key_that_tpm2_tools_make(enrolment: Enrolment) -> None:
    config, tpm = enrolment.host("bare", certified=False)
    pem, context = enrolment.directory / "ek.pem", enrolment.directory / "ek.ctx"
    create = ["/usr/bin/tpm2_createek", "-T", tpm.tcti, "-c", context, "-G", "rsa", "-f", "pem", "-u", pem]
    subprocess.run(create, check=True, capture_output=True, timeout=60)
    subprocess.run(["/usr/bin/tpm2_flushcontext", "-T", tpm.tcti, "-t"], check=True, capture_output=True, timeout=60)
    convert = ["/usr/bin/openssl", "pkey", "-pubin", "-in", pem, "-outform", "DER"]
    der = subprocess.run(convert, check=True, capture_output=True, timeout=60).stdout
    assert enrolment.ek_line(config, "edge-1") == f"{hashlib.sha256(der).hexdigest()} edge-1\n"


def test_a_listed_tpm_has_one_name_and_a_name_one_tpm(enrolment: Enrolment) -> None:
    first, _ = enrolment.host("first", certified=False)
    second, _ = enrolment.host("second", certified=False)
    one, other = enrolment.ek_line(first, "edge-1"), enrolment.ek_line(second, "edge-2")
    ek_list = listed(enrolment.directory, one, other)
    # Listed for another name.
    refused, challenge = enrolment.challenge(enrolment.request(first, "edge-2"), ek_list=ek_list)
    assert (refused.code, "is in the owner's list as edge-1" in refused.err) == (EnrolmentRefused.code, True)
    assert not challenge.exists()
    _, challenge = enrolment.challenge(enrolment.request(first, "edge-1"), ek_list=ek_list)
    done(enrolment.finish(first, challenge, ek_list=ek_list))
    # The list was changed: the same TPM under a new name, and another TPM under the old one.
    ek_list = listed(enrolment.directory, one.replace("edge-1", "edge-3"), other.replace("edge-2", "edge-1"))
    refused, _ = enrolment.challenge(enrolment.request(first, "edge-3"), ek_list=ek_list)
    assert (refused.code, "enrolled as edge-1" in refused.err) == (EnrolmentRefused.code, True)
    refused, _ = enrolment.challenge(enrolment.request(second, "edge-1"), ek_list=ek_list)
    assert (refused.code, "another TPM" in refused.err) == (EnrolmentRefused.code, True)
    # Two lines of one TPM are no list.
    twice = listed(enrolment.directory, one, one.replace("edge-1", "edge-2"))
    refused, _ = enrolment.challenge(enrolment.request(first, "edge-1"), ek_list=twice)
    assert refused.code == KeyInvalid.code


def test_a_certificate_is_not_passed_over_for_the_list(enrolment: Enrolment) -> None:
    config, _ = enrolment.host("certified")
    line = enrolment.ek_line(config, "edge-1")
    ek_list = listed(enrolment.directory, line)
    refused, _ = enrolment.challenge(enrolment.request(config, "edge-1"), ek_list=ek_list)
    assert (refused.code, "no folder of EK roots" in refused.err) == (EnrolmentRefused.code, True)
    # Unless the host leaves it out, as nobody can verify it: then the list alone decides.
    request = enrolment.request(config, "edge-1", "--without-certificate")
    refused, _ = enrolment.challenge(request)
    assert refused.code == EnrolmentRefused.code
    _, challenge = enrolment.challenge(request, ek_list=ek_list)
    done(enrolment.finish(config, challenge, ek_list=ek_list))
    assert enrolment.record("edge-1").vouched == "list"


@pytest.mark.parametrize("contents", [None, b"\xff" * 64])
def test_an_index_that_the_maker_left_empty_is_no_certificate(enrolment: Enrolment, contents: bytes | None) -> None:
    config, tpm = enrolment.host("bare", certified=False)
    line = enrolment.ek_line(config, "edge-1")
    words = ["-T", tpm.tcti, "-C", "p", "-s", "64", "-a", "ppread|ppwrite|ownerread|authread|platformcreate"]
    subprocess.run(["/usr/bin/tpm2_nvdefine", *words, "0x1c00002"], check=True, capture_output=True, timeout=60)
    if contents is not None:
        write = ["/usr/bin/tpm2_nvwrite", "-T", tpm.tcti, "-C", "p", "-i", "-", "0x1c00002"]
        subprocess.run(write, input=contents, check=True, capture_output=True, timeout=60)
    assert enrolment.ek_line(config, "edge-1") == line


def test_a_listed_device_that_was_given_a_new_tpm_frees_the_old_one(enrolment: Enrolment) -> None:
    first, _ = enrolment.host("first", certified=False)
    second, _ = enrolment.host("second", certified=False)
    one, other = enrolment.ek_line(first, "edge-1"), enrolment.ek_line(second, "edge-2")
    ek_list = listed(enrolment.directory, one)
    _, challenge = enrolment.challenge(enrolment.request(first, "edge-1"), ek_list=ek_list)
    done(enrolment.finish(first, challenge, ek_list=ek_list))
    ek_list = listed(enrolment.directory, other.replace("edge-2", "edge-1"), one.replace("edge-1", "edge-2"))
    request = enrolment.request(second, "edge-1")
    refused, _ = enrolment.challenge(request, ek_list=ek_list)
    assert refused.code == EnrolmentRefused.code
    _, challenge = enrolment.challenge(request, "--replace", ek_list=ek_list)
    done(enrolment.finish(second, challenge, "--replace", ek_list=ek_list))
    _, challenge = enrolment.challenge(enrolment.request(first, "edge-2"), ek_list=ek_list)
    done(enrolment.finish(first, challenge, ek_list=ek_list))
    assert [enrolment.record(name).ek_sha256 for name in ("edge-1", "edge-2")] == [other.split()[0], one.split()[0]]


def test_the_issuer_s_certificate_lies_in_the_tpm_alone(enrolment: Enrolment) -> None:
    """As on platforms whose own authority issues EKs; here over two indices, with an empty one between."""
    config, tpm = enrolment.host("own")
    (enrolment.roots / "own-1.pem").unlink()
    refused, _ = enrolment.challenge(enrolment.request(config, "edge-1"))
    assert (refused.code, "does not chain" in refused.err) == (EnrolmentRefused.code, True)
    issuer = x509.load_pem_x509_certificate(tpm.ca_certificates[1].read_bytes()).public_bytes(Encoding.DER)
    attributes = "ppread|ppwrite|ownerread|authread|platformcreate"
    for index, piece in ((0x01C00100, issuer[:500]), (0x01C00101, None), (0x01C00102, issuer[500:] + bytes(20))):
        words = ["-T", tpm.tcti, "-C", "p", "-s", str(len(piece or b"x")), "-a", attributes, hex(index)]
        subprocess.run(["/usr/bin/tpm2_nvdefine", *words], check=True, capture_output=True, timeout=60)
        if piece is not None:
            write = ["/usr/bin/tpm2_nvwrite", "-T", tpm.tcti, "-C", "p", "-i", "-", hex(index)]
            subprocess.run(write, input=piece, check=True, capture_output=True, timeout=60)
    request = enrolment.request(config, "edge-1")
    assert parse_request(request.read_bytes()).ek_chain == (issuer,)
    _, challenge = enrolment.challenge(request)
    done(enrolment.finish(config, challenge))
    assert enrolment.record("edge-1").vouched == "certificate"


# --- a folder of them -------------------------------------------------------------------------------------------------


def test_a_stick_with_many_devices(enrolment: Enrolment) -> None:
    """Two with a certificate, one by the list, and four that are not accepted: those alone are left out."""
    stick = enrolment.directory / "stick"
    requests, challenges, answers = (stick / name for name in ("requests", "challenges", "answers"))
    for folder in (stick, requests, answers):
        folder.mkdir()
    hosts = {f"edge-{number}": enrolment.host(f"h{number}", certified=number < 3)[0] for number in (1, 2, 3)}
    ek_list = listed(enrolment.directory, enrolment.ek_line(hosts["edge-3"], "edge-3"))
    for device, config in hosts.items():
        shutil.move(enrolment.request(config, device), requests / f"{device}.json")
    (requests / "garbage.json").write_bytes(b"\x00{")
    (requests / "large.json").write_bytes(b" " * ((1 << 20) + 1))
    stranger, _ = enrolment.host("stranger", certified=False)
    shutil.move(enrolment.request(stranger, "edge-4"), requests / "stranger.json")
    (requests / "link.json").symlink_to("edge-1.json")
    (requests / "._edge-1.json").write_bytes(b"of a stick's other user")
    (requests / "notes.txt").write_text("not looked at")
    common = ("--keys", enrolment.house.keys, "--ek-roots", enrolment.roots, "--ek-list", ek_list)

    done_ = sczctl("enroll", "challenge", requests, *common, "-o", challenges, "--json")
    assert done_.code == 1
    rows = {Path(row["file"]).name: row for row in done_.json}
    assert sorted(path.name for path in challenges.iterdir()) == ["edge-1.json", "edge-2.json", "edge-3.json"]
    assert {name: row.get("vouched") for name, row in rows.items() if "error" not in row} == {
        "edge-1.json": "certificate",
        "edge-2.json": "certificate",
        "edge-3.json": "list",
    }
    codes = {name: row["error"]["code"] for name, row in rows.items() if "error" in row}
    assert codes == {"garbage.json": 22, "large.json": 22, "stranger.json": 52, "link.json": 68}
    assert {path.stem for path in (enrolment.house.keys / "pending").iterdir()} == set(hosts)

    # Once more: nothing is overwritten, and the challenges that wait go on waiting.
    before = snapshot(enrolment.house.keys, challenges)
    assert sczctl("enroll", "challenge", requests, *common, "-o", challenges).code == 1
    assert snapshot(enrolment.house.keys, challenges) == before

    for device, config in hosts.items():
        enrolment.answer(config, challenges / f"{device}.json", answers / f"{device}.json")
    flip_bit(answers / "edge-2.json")
    accepted = sczctl("enroll", "accept", answers, *common, "--class", "kiosk", "--json")
    assert accepted.code == 1
    assert [("error" in row, Path(row["file"]).stem) for row in accepted.json] == [
        (False, "edge-1"),
        (True, "edge-2"),
        (False, "edge-3"),
    ]
    assert OwnerRecords(enrolment.house.keys).devices() == ("edge-1", "edge-3")
    assert enrolment.record("edge-3").device_class == "kiosk"
    shown = sczctl("enroll", "accept", answers, *common)
    assert shown.code == 1
    assert "0 done, 3 refused" in shown.err


def test_two_requests_of_one_name_or_one_tpm_are_both_refused(enrolment: Enrolment) -> None:
    requests = enrolment.directory / "requests"
    requests.mkdir()
    first, _ = enrolment.host("first")
    second, _ = enrolment.host("second")
    shutil.move(enrolment.request(first, "edge-1"), requests / "a.json")
    shutil.move(enrolment.request(second, "edge-1"), requests / "b.json")
    words = ("enroll", "challenge", requests, "--keys", enrolment.house.keys, "--ek-roots", enrolment.roots)
    refused = sczctl(*words, "-o", enrolment.directory / "out", "--json")
    assert refused.code == 1
    assert ["2 requests are for the name" in row["error"]["message"] for row in refused.json] == [True, True]
    shutil.move(enrolment.request(first, "edge-2"), requests / "b.json")
    refused = sczctl(*words, "-o", enrolment.directory / "out", "--json")
    assert refused.code == 1
    assert ["requests have the EK" in row["error"]["message"] for row in refused.json] == [True, True]
    assert not (enrolment.house.keys / "pending").exists()
    assert list((enrolment.directory / "out").iterdir()) == []


# --- in one go --------------------------------------------------------------------------------------------------------


def far_host(folder: Path, script: str) -> list[str]:
    """A prefix that leads to another machine: a clean environment, in which `sczctl` is this script."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "sczctl"
    program.write_text(script)
    program.chmod(0o755)
    return ["env", "-i", f"PATH={programs}:/usr/bin:/bin"]


def of_config(config: Path) -> str:
    code = "from oci_hook.cli import main; main()"
    return f"#!/bin/sh\ncd /\nexec {sys.executable} -c '{code}' --config {config} \"$@\"\n"


def run_words(enrolment: Enrolment, prefix: list[str], *more: str | Path) -> tuple[str | Path, ...]:
    roots = ("--ek-roots", enrolment.roots)
    return ("enroll", "run", "--keys", enrolment.house.keys, *roots, *more, "--", *prefix)


@pytest.mark.parametrize("certified", [True, False])
def test_a_host_is_enrolled_in_one_go(enrolment: Enrolment, certified: bool) -> None:
    config, _ = enrolment.host("far", certified=certified)
    prefix, more = far_host(config.parent, of_config(config)), []
    if not certified:
        enrolment.host("near")
        more = ["--ek-list", listed(enrolment.directory, enrolment.ek_line(config, "edge-1"))]
    shown = done(sczctl(*run_words(enrolment, prefix, "--device", "edge-1", "--class", "kiosk", "--json", *more))).json
    record = enrolment.record("edge-1")
    assert (record.device_class, record.vouched) == ("kiosk", "certificate" if certified else "list")
    assert shown["ek_sha256"] == record.ek_sha256
    assert list((enrolment.house.keys / "pending").glob("*")) == []
    # The host knows what it needs; nothing else lies about.
    assert sorted(path.name for path in config.parent.iterdir()) == ["bin", "config.toml", "runtime", "store", "tpm"]
    again = done(sczctl(*run_words(enrolment, prefix, "--device", "edge-1", *more)))
    assert "enrolled known device edge-1 (class kiosk" in again.out


@pytest.mark.parametrize(
    ("script", "code", "word"),
    [
        ("exec cat /dev/zero", DeviceInvalid.code, "wrote more than"),
        ("cat /dev/zero >&2", FileUnreadable.code, "did not end within"),
        ("exec sleep 600", FileUnreadable.code, "did not end within"),
        ("exec >&-; exec sleep 600", FileUnreadable.code, "did not end within"),
        ("sleep 5 & echo x", FileUnreadable.code, "did not end within"),
        ("trap '' TERM; sleep 5; sleep 5", FileUnreadable.code, "did not end within"),
        ("echo garbage", DeviceInvalid.code, "not JSON"),
        ("", DeviceInvalid.code, "not JSON"),
        ("printf '\\033[2Jevil\\n' >&2; exit 7", FileUnreadable.code, "ended with 7: '?[2Jevil'"),
        ("kill -9 $$", FileUnreadable.code, "ended with"),
    ],
)
def test_a_far_end_that_is_malicious_or_broken(enrolment: Enrolment, script: str, code: int, word: str) -> None:
    enrolment.host("near")
    before = snapshot(enrolment.house.keys)
    prefix = far_host(enrolment.directory, f"#!/bin/sh\n{script}\n")
    tried = sczctl(*run_words(enrolment, prefix, "--device", "edge-1", "--timeout", "2"))
    assert tried.code == code, tried.err
    assert word in tried.err
    assert tried.out == ""
    assert "\033" not in tried.err
    assert snapshot(enrolment.house.keys) == before


def test_a_prefix_that_is_no_program_and_one_that_is_a_shell_s(enrolment: Enrolment) -> None:
    enrolment.host("near")
    tried = sczctl(*run_words(enrolment, ["/nonexistent/ssh", "edge-1"]))
    assert (tried.code, "cannot be started" in tried.err) == (FileUnreadable.code, True)
    sign = enrolment.directory / "sign"
    tried = sczctl(*run_words(enrolment, ["echo", f"; touch {sign}", f"$(touch {sign})"]))
    assert tried.code == DeviceInvalid.code
    assert not sign.exists()
    assert sczctl(*run_words(enrolment, [])).code == 2


def test_a_far_end_that_is_another_device(enrolment: Enrolment) -> None:
    """It asks under another name, answers for another, or is another TPM when it answers: nothing is kept."""
    first, _ = enrolment.host("first")
    second, _ = enrolment.host("second")
    honest, other = of_config(first).splitlines()[-1], of_config(second).splitlines()[-1]
    before = snapshot(enrolment.house.keys)

    renamed = honest.replace('"$@"', '"$1" "$2" --owner - --device edge-9 -o -')
    tried = sczctl(*run_words(enrolment, far_host(first.parent, f"#!/bin/sh\n{renamed}\n"), "--device", "edge-1"))
    assert (tried.code, "asks as edge-9" in tried.err) == (EnrolmentRefused.code, True)

    enrolment.request(second, "edge-1")
    switched = f'#!/bin/sh\nif [ "$2" = request ]; then {honest}; else {other}; fi\n'
    tried = sczctl(*run_words(enrolment, far_host(first.parent, switched), "--device", "edge-1"))
    assert tried.code == FileUnreadable.code  # the second TPM cannot open the challenge
    assert "ended with 52" in tried.err

    _, challenge = enrolment.challenge(enrolment.request(second, "edge-1"))
    answer = enrolment.answer(second, challenge, enrolment.directory / "answer.json")
    shutil.rmtree(enrolment.house.keys / "pending")
    replayed = f'#!/bin/sh\nif [ "$2" = request ]; then {honest}; else exec cat {answer}; fi\n'
    tried = sczctl(*run_words(enrolment, far_host(first.parent, replayed), "--device", "edge-1"))
    assert (tried.code, "check 6" in tried.err) == (EnrolmentRefused.code, True)
    assert snapshot(enrolment.house.keys) == before
