"""An owner and hosts with software TPMs, for tests of enrolments; and many more devices that are made in software."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.attestation.ek_list import EkList, ek_digest
from oci_hook.attestation.enrolment_documents import parse_answer, parse_request
from oci_hook.owner.enrolling import Enroller, Vouchers
from oci_hook.owner.records import OwnerRecords
from tests.attestation_vectors import GENERATOR, t
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

    def host(self, name: str, *, certified: bool = True) -> tuple[Path, SoftwareTpm]:
        """A host's configuration, and its TPM, accepted by the owner if it has a certificate."""
        folder = self.directory / name
        folder.mkdir()
        tpm = self.stack.enter_context(SoftwareTpm(folder / "tpm", certified=certified))
        tpm.measure_boot()
        for number, certificate in enumerate(tpm.ca_certificates if certified else ()):
            shutil.copy(certificate, self.roots / f"{name}-{number}.pem")
        config = folder / "config.toml"
        paths = "\n".join(f'{key} = "{folder}/{key}"' for key in ("store", "trust", "runtime"))
        config.write_text(f'[tpm]\ntcti = "{tpm.tcti}"\n[paths]\n{paths}\naudit = "{folder}/log/audit.jsonl"\n')
        return config, tpm

    def request(self, config: Path, device: str, *more: str) -> Path:
        output = config.with_name("request.json")
        output.unlink(missing_ok=True)
        words = ("--owner", self.house.keys / "owner.json", "--device", device, "-o", output, *more)
        done(sczctl("--config", config, "enroll", "request", *words))
        return output

    def vouched(self, ek_list: Path | None) -> list[str | Path]:
        return ["--ek-roots", self.roots] if ek_list is None else ["--ek-list", ek_list]

    def challenge(self, request: Path, *more: str, ek_list: Path | None = None) -> tuple[Done, Path]:
        output = request.with_name("challenge.json")
        output.unlink(missing_ok=True)
        words = ("enroll", "challenge", request, "--keys", self.house.keys, "-o", output, *self.vouched(ek_list))
        return sczctl(*words, *more), output

    def answer(self, config: Path, challenge: Path, output: Path) -> Path:
        output.unlink(missing_ok=True)
        done(sczctl("--config", config, "enroll", "answer", challenge, "-o", output))
        return output

    def finish(self, config: Path, challenge: Path, *more: str, ek_list: Path | None = None) -> Done:
        answer = self.answer(config, challenge, config.with_name("answer.json"))
        return sczctl("enroll", "accept", answer, "--keys", self.house.keys, *self.vouched(ek_list), *more)

    def ek_line(self, config: Path, device: str) -> str:
        return done(sczctl("--config", config, "enroll", "ek", "--device", device)).out

    def record(self, device: str) -> DeviceRecord:
        return parse_device_record(OwnerRecords(self.house.keys).load_device(device))


@contextlib.contextmanager
def enrolment_in_a_folder() -> Iterator[Enrolment]:
    """An `Enrolment` whose folder and TPMs are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="scz-enroll.", dir="/var/tmp"))
    made = Enrolment(folder)
    try:
        with made.stack:
            yield made
    finally:
        shutil.rmtree(folder)


def listed(folder: Path, *lines: str) -> Path:
    """A list of EKs with these lines."""
    path = folder / "eks.txt"
    path.write_text("# read off the machines\n\n" + "".join(lines))
    return path


def enrol_in_software(house: Household, names: list[str], *, device_class: str) -> dict[str, Any]:
    """Enrol devices whose keys are made in software: all nine checks are passed, only TPM2_ActivateCredential is not.

    Returns:
        The private halves of their storage root keys, by name.
    """
    device_type = inspect.getmodule(GENERATOR.Enrolments).Device  # type: ignore[union-attr]
    made = {}
    for name in names:
        made[name] = device_type(house.owner.owner_id, t.p256(), b"")
        made[name].name = name
    requests = {}
    for name, device in made.items():
        document = device.request().replace('"ek_certificate":"",', "")
        device.request = lambda document=document: document
        requests[name] = parse_request(document.encode())
    secret = bytes(range(32))
    vouchers = Vouchers(None, EkList({ek_digest(each.ek): name for name, each in requests.items()}))
    enroller = Enroller(
        OwnerRecords(house.keys),
        owner_id=house.owner.owner_id,
        vouchers=vouchers,
        replace=False,
        random=lambda _size: secret,
    )
    now = datetime.now(UTC)
    with enroller.together():
        for name, device in made.items():
            device.secret = secret
            challenged = enroller.challenge(requests[name], now=now)
            answer = parse_answer(device.answer({}).encode())
            enroller.accept(answer, challenged.pending, now=now, device_class=device_class)
    return {name: device.srk_key for name, device in made.items()}
