"""What is proven for a container, given to others: `sczctl evidence` and `sczctl appraise`, with tpm2-tools as witness.

A real start (podman, hook, swtpm) leaves its evidence; another party checks it with the device's record, the boot
policy and a copy of the audit log. `tpm2_checkquote` reads the same files and has to agree on every flipped byte.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jose import jwt

from oci_hook.attestation.kept_evidence import LIMIT_BYTES
from oci_hook.audit import AuditLog
from tests.integration.test_release import shell
from tests.scene import Scene


@pytest.fixture(scope="module")
def folder(scene: Scene) -> Iterator[Path]:
    """What `sczctl evidence` wrote for a running container, with a copy of the audit log beside it."""
    away = scene.owner / "away"
    away.mkdir()
    with shell(scene, token="evidence-token") as container:
        done = scene.sczctl("evidence", container.id, "-o", away / "evidence", "--json")
        said = json.loads(done.stdout)
        assert said["container"] == container.id
        assert [each["diagnosis"]["error"] for each in said["models"]] == [None]
        (kept,) = (scene.runtime_directory / "evidence").iterdir()
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        (away / "id").write_text(container.id)
        assert scene.sczctl("evidence", container.id[:12], "-o", away / "evidence", check=False).returncode == 26
    assert list((scene.runtime_directory / "evidence").iterdir()) == []  # it went with the container
    shutil.copy(scene.audit, away / "audit.jsonl")
    yield away
    shutil.rmtree(away)


def appraise(scene: Scene, evidence: Path, *words: str | Path, who: str = "owner") -> tuple[int, dict[str, Any], str]:
    """`sczctl appraise --json`: its exit code, what it says, and its errors."""
    keys, policy = scene.owner / "keys", scene.usb / "small-1" / "boot-policy.json"
    whose: list[str | Path] = ["--keys", keys]
    if who == "auditor":
        whose = ["--owner", keys / "owner.json", "--device-record", keys / "devices" / "edge-1.json"]
    done = scene.sczctl("appraise", evidence, *whose, "--boot-policy", policy, "--json", *words, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def checkquote(folder: Path, **changed: Path) -> bool:
    """Whether tpm2_checkquote accepts a quote's files; `changed` stands in for some of them."""
    files = {name: folder / f"quote.{name}" for name in ("msg", "sig", "pcrs")}
    key = changed.pop("key", folder / "ak.pem")
    files |= changed
    command = ["tpm2_checkquote", "-u", key, "-m", files["msg"], "-s", files["sig"], "-f", files["pcrs"]]
    command += ["-g", "sha256", "-q", (folder / "qualifying-data.hex").read_text().strip()]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "TSS2_LOG": "all+none"}, capture_output=True, timeout=20, check=False
    )
    return done.returncode == 0


def test_tpm2_checkquote_accepts_the_files(folder: Path) -> None:
    quote = folder / "evidence" / "1"
    assert checkquote(quote)
    assert checkquote(quote, key=quote / "ak.tss")


@pytest.mark.parametrize("name", ["msg", "sig"])
def test_tpm2_checkquote_and_we_refuse_each_flipped_byte(scene: Scene, folder: Path, tmp_path: Path, name: str) -> None:
    from oci_hook.attestation.boot_policy import parse_boot_policy
    from oci_hook.attestation.device_record import parse_device_record
    from oci_hook.attestation.evidence_appraisal import References, appraise_kept
    from oci_hook.attestation.kept_evidence import parse_evidence
    from oci_hook.documents import canonical, encode_base64url
    from oci_hook.trust import parse_owner

    keys, member = scene.owner / "keys", {"msg": "attest", "sig": "signature"}[name]
    document = json.loads((folder / "evidence" / "evidence.json").read_bytes())
    record = parse_device_record((keys / "devices" / "edge-1.json").read_bytes())
    policy = parse_boot_policy((scene.usb / "small-1" / "boot-policy.json").read_bytes())
    references = References(record.ak, parse_owner((keys / "owner.json").read_bytes()), (policy,))

    def ours(data: bytes) -> bool:
        start = {**document["starts"][0], member: encode_base64url(data)}
        (found,) = appraise_kept(parse_evidence(canonical({**document, "starts": [start]})), references, None)
        return found.error is None

    good = (folder / "evidence" / "1" / f"quote.{name}").read_bytes()
    assert ours(good)
    for place in range(len(good)):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        (tmp_path / "flipped").write_bytes(data)
        assert not ours(bytes(data)), place
        assert not checkquote(folder / "evidence" / "1", **{name: tmp_path / "flipped"}), place


def test_tpm2_checkquote_refuses_other_values_and_another_occasion(folder: Path, tmp_path: Path) -> None:
    quote = folder / "evidence" / "1"
    values = (quote / "quote.pcrs").read_bytes()
    for offset in (142 + 66 * number + place for number in range(4) for place in range(0, 32, 5)):  # of four values
        data = bytearray(values)
        data[offset] ^= 1
        (tmp_path / "pcrs").write_bytes(data)
        assert not checkquote(quote, pcrs=tmp_path / "pcrs"), offset
    shutil.copytree(quote, tmp_path / "other")
    (tmp_path / "other" / "qualifying-data.hex").write_text("00" * 32)
    assert not checkquote(tmp_path / "other")


def test_the_owner_and_an_auditor_accept_it(scene: Scene, folder: Path) -> None:
    log, container = folder / "audit.jsonl", (folder / "id").read_text()
    token = folder / "token"  # as it may lie there: the hook reads it without the line feed at its end
    token.write_bytes((scene.host / "evidence-token").read_bytes().removesuffix(b"\n") + b"\n")
    words = ("--audit-log", log, "--container", container, "--token", token)
    code, said, _ = appraise(scene, folder / "evidence", *words, "--device", "edge-1")
    assert (code, said["container"], said["of_other_owners"]) == (0, container, 0)
    (model,) = said["models"]
    assert (model["model"], model["accepted"]) == ("small:1", True)
    assert model["not_looked_at"] == ["the time of it is the host's word: its clock's"]
    assert model["shown"][0] == "the attestation key is the enrolled device edge-1's"
    code, said, _ = appraise(scene, folder / "evidence" / "evidence.json", *words, who="auditor")
    assert code == 0
    assert "host's word" in said["models"][0]["not_looked_at"][0]


def test_the_host_s_own_result_is_a_diagnosis(scene: Scene, folder: Path) -> None:
    compact = (folder / "evidence" / "ear.jwt").read_text().strip()
    public = json.loads((folder / "evidence" / "ear.jwk").read_text())
    claims = jwt.decode(compact, public, algorithms=["ES256"])
    assert claims["scz-smm.kind"] == "diagnosis"
    assert claims["submods"]["small:1"]["ear.status"] == "affirming"
    key = scene.store / "ear" / "ear.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    done = scene.sczctl("appraise", "--ear", folder / "evidence" / "ear.jwt", "--key", folder / "evidence" / "ear.jwk")
    assert "diagnosis, of the host about itself" in done.stdout


def test_an_auditor_s_result_is_signed_and_checked(scene: Scene, folder: Path) -> None:
    result, key = folder / "result.jwt", folder / "auditor.key"
    assert appraise(scene, folder / "evidence", "-o", result, "--sign-key", key)[0] == 0
    ear = ("appraise", "--ear", result, "--json")
    said = json.loads(scene.sczctl(*ear, "--key", f"{key}.jwk").stdout)
    assert (said["kind"], [each["status"] for each in said["submodules"]]) == ("appraisal", ["affirming"])
    assert scene.sczctl(*ear, "--key", folder / "evidence" / "ear.jwk", check=False).returncode == 36
    assert scene.sczctl(*ear, check=False).returncode == 2
    with changed(result) as path:
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        assert scene.sczctl(*ear, "--key", f"{key}.jwk", check=False).returncode in (29, 36)


@contextlib.contextmanager
def changed(path: Path) -> Iterator[Path]:
    """A file that may be changed inside the block."""
    before = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(before)


def test_evidence_of_another_occasion_is_refused(scene: Scene, folder: Path, tmp_path: Path) -> None:
    with shell(scene, token="another-token") as container:
        other = Path(tmp_path / "other")
        scene.sczctl("evidence", container.id, "-o", other)
    log = tmp_path / "audit.jsonl"
    shutil.copy(scene.audit, log)
    wanted, token = (folder / "id").read_text(), scene.host / "evidence-token"
    assert appraise(scene, other, "--audit-log", log)[0] == 0
    for words in (("--container", wanted), ("--token", token), ("--manifest", "sha256:" + "0" * 64)):
        assert appraise(scene, other, *words)[0] == 36
    assert appraise(scene, other, "--audit-log", folder / "audit.jsonl")[0] == 36  # it ends before that start
    # One start's quote beside another's parts, and the other way round.
    mine, theirs = (json.loads((each / "evidence.json").read_bytes()) for each in (folder / "evidence", other))
    for part in ("nonce", "token_hash", "audit_head", "attest"):
        mixed = {**mine, "starts": [{**mine["starts"][0], part: theirs["starts"][0][part]}]}
        (tmp_path / "mixed.json").write_text(json.dumps(mixed))
        code, said, _ = appraise(scene, tmp_path / "mixed.json")
        assert (code, said["models"][0]["accepted"]) == (36, False), part
    (tmp_path / "mixed.json").write_text(json.dumps({**mine, "container": theirs["container"]}))
    assert appraise(scene, tmp_path / "mixed.json")[0] == 36


def test_a_cut_or_changed_audit_log_is_noticed(scene: Scene, folder: Path, tmp_path: Path) -> None:
    lines = (folder / "audit.jsonl").read_bytes().splitlines(keepends=True)
    log = tmp_path / "audit.jsonl"
    log.write_bytes(b"".join(lines[:-1]).replace(b'"event":"grant"', b'"event":"outcome"'))
    assert appraise(scene, folder / "evidence", "--audit-log", log)[0] == 54
    (granted,) = [n for n, line in enumerate(lines) if b'"grant"' in line and (folder / "id").read_bytes() in line]
    log.write_bytes(b"".join(lines[:granted]))
    assert appraise(scene, folder / "evidence", "--audit-log", log)[0] == 36
    assert len(list(AuditLog(str(folder / "audit.jsonl")).records())) == len(lines)


def test_hostile_documents_are_refused(scene: Scene, folder: Path, tmp_path: Path) -> None:
    good, path = (folder / "evidence" / "evidence.json").read_bytes(), tmp_path / "e.json"
    for data in (b"", b"{}", good + b" " * LIMIT_BYTES, good.replace(b'"nonce"', b'"nonce":"","nonce"', 1), good[:-9]):
        path.write_bytes(data)
        code, said, error = appraise(scene, path)
        assert (code, said) == (29, {})
        assert "EvidenceInvalid" in error
    for words in ((), ("--keys", scene.owner / "keys", "--boot-policy", tmp_path / "none", "--sign-key", "x")):
        assert scene.sczctl("appraise", folder / "evidence", *words, check=False).returncode == 2
    assert scene.sczctl("appraise", check=False).returncode == 2


def test_who_is_not_there_has_no_evidence(scene: Scene) -> None:
    done = scene.sczctl("evidence", "c0ffee", check=False)
    assert done.returncode == 1
    assert "no running container" in done.stderr
