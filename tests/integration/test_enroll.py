"""`sczctl enroll` with real software TPMs: four files, and a name that another TPM cannot take."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.errors import EnrolmentRefused
from oci_hook.owner.records import OwnerRecords
from tests.commands import Done, Household, done, sczctl
from tests.software_tpm import SoftwareTpm


class Enrolment:
    """An owner, and hosts with software TPMs whose CAs the owner accepts."""

    def __init__(self, directory: Path) -> None:
        self.house = Household(directory / "house")
        self.directory = directory
        self.roots = directory / "roots"
        self.roots.mkdir()
        self.stack = contextlib.ExitStack()

    def host(self, name: str) -> tuple[Path, SoftwareTpm]:
        """A host's configuration, and its TPM, accepted by the owner."""
        folder = self.directory / name
        folder.mkdir()
        tpm = self.stack.enter_context(SoftwareTpm(folder / "tpm"))
        tpm.measure_boot()
        for number, certificate in enumerate(tpm.ca_certificates):
            shutil.copy(certificate, self.roots / f"{name}-{number}.pem")
        config = folder / "config.toml"
        paths = "\n".join(f'{key} = "{folder}/{key}"' for key in ("store", "trust", "runtime"))
        config.write_text(f'[tpm]\ntcti = "{tpm.tcti}"\n[paths]\n{paths}\naudit = "{folder}/log/audit.jsonl"\n')
        return config, tpm

    def request(self, config: Path, device: str) -> Path:
        output = config.with_name("request.json")
        output.unlink(missing_ok=True)
        owner = self.house.keys / "owner.json"
        done(sczctl("--config", config, "enroll", "request", "--owner", owner, "--device", device, "-o", output))
        return output

    def challenge(self, request: Path, *more: str) -> tuple[Done, Path]:
        output = request.with_name("challenge.json")
        output.unlink(missing_ok=True)
        words = ("enroll", "challenge", request, "--keys", self.house.keys, "--ek-roots", self.roots, "-o", output)
        return sczctl(*words, *more), output

    def finish(self, config: Path, challenge: Path, *more: str) -> Done:
        answer = config.with_name("answer.json")
        answer.unlink(missing_ok=True)
        done(sczctl("--config", config, "enroll", "answer", challenge, "-o", answer))
        words = ("enroll", "accept", answer, "--keys", self.house.keys, "--ek-roots", self.roots)
        return sczctl(*words, *more)

    def record(self, device: str) -> DeviceRecord:
        return parse_device_record(OwnerRecords(self.house.keys).load_device(device))


@pytest.fixture
def enrolment() -> Iterator[Enrolment]:
    folder = Path(tempfile.mkdtemp(prefix="scz-enroll.", dir="/var/tmp"))
    made = Enrolment(folder)
    try:
        with made.stack:
            yield made
    finally:
        shutil.rmtree(folder)


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
    (enrolment.house.keys / "devices" / "edge-1.json").rename(enrolment.house.keys / "devices" / "edge-2.json")
    refused = enrolment.finish(second, challenge)
    assert refused.code == EnrolmentRefused.code
    assert enrolment.record("edge-2") == known

    replaced = done(enrolment.finish(second, challenge, "--replace"))
    assert "replaced device edge-2" in replaced.out
    assert enrolment.record("edge-2").ek_sha256 != known.ek_sha256


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
