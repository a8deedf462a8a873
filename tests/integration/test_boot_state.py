"""A boot that was predicted: two states signed together, the machine boots the next one, and the model still opens.

A software TPM is extended with the event logs of two boots, which systemd-stub's images and a model of the firmware
make; everything else is what a person would type. A third boot, which nobody approved, is refused and explained.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.attestation.event_log import parse_event_log
from oci_hook.errors import BootPolicyInvalid, BootStateRefused
from oci_hook.key_errors import EventLogInvalid
from tests.boot_images import SECTIONS, write_unified_image
from tests.boot_logs import boot_unified
from tests.guest_image import STUB
from tests.scene import Scene

LOADER = STUB.with_name("systemd-bootx64.efi")
COVERED = "4,7,9,11,12"
DEVICE = "edge-1"
OLD = SECTIONS | {".linux": STUB.read_bytes()}
NEW = OLD | {".initrd": b"another initrd", ".cmdline": b"root=/dev/vda2 rw\0"}
EVIL = NEW | {".cmdline": b"root=/dev/vda2 rw init=/bin/sh\0"}
PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")


@dataclass
class Machine:
    """A scene whose TPM has booted an image."""

    scene: Scene
    log: Path

    def image(self, name: str, sections: dict[str, bytes]) -> Path:
        return write_unified_image(self.scene.usb / f"{name}.efi", sections)

    def boot(self, image: Path, sections: dict[str, bytes]) -> bytes:
        """Extend the TPM as the boot would, systemd's phases after it; the log is where the configuration says."""
        data = boot_unified(image.read_bytes(), sections, loader=LOADER.read_bytes())
        for event in parse_event_log(data).events:
            self.scene.tpm.extend_digest(event.pcr, event.digest)
        for phase in PHASES:
            self.scene.tpm.extend(11, phase)
        self.log.write_bytes(data)
        return data

    def state(self, path: Path, *words: str | Path, code: int = 0) -> dict[str, object]:
        """`sczctl boot-policy diff --json`."""
        done = self.scene.sczctl("boot-policy", "diff", path, "--json", *words, check=False)
        assert done.returncode == code, done.stderr
        return dict(json.loads(done.stdout))

    def quoted(self) -> dict[int, str]:
        """PCRs as tpm2-tools read them."""
        words = ["tpm2_pcrread", "-T", self.scene.tpm.tcti, "sha256:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return {int(pcr): value.lower() for pcr, value in re.findall(r"(\d+) *: 0x([0-9A-Fa-f]{64})", said)}


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="scz-boot.", dir="/var/tmp"))
    try:
        with Scene(folder) as scene:
            log = scene.host / "event-log"
            scene.config.write_text(scene.config.read_text().replace("[tpm]\n", f'[tpm]\nevent_log = "{log}"\n'))
            yield Machine(scene, log)
    finally:
        shutil.rmtree(folder)


def opens(scene: Scene) -> int:
    """The exit code of a start, up to the key: `sczctl doctor` says the same of the state, the TPM enforces it."""
    done = scene.sczctl("doctor", "--json", check=False)
    (check,) = [each for each in json.loads(done.stdout)["checks"] if each["name"] == "model small:1"]
    return 0 if check["status"] == "ok" else BootStateRefused.code


def test_a_predicted_boot_opens_the_model_and_another_is_refused_and_explained(machine: Machine) -> None:
    scene, usb, keys = machine.scene, machine.scene.usb, machine.scene.owner / "keys"
    images = {name: machine.image(name, s) for name, s in (("old", OLD), ("new", NEW), ("evil", EVIL))}
    machine.boot(images["old"], OLD)
    scene.keygen()
    scene.enrol(DEVICE)
    source = scene.owner / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w" * 100_000)
    out = scene.pack(source, name="small")
    scene.sczctl("grant", "small:1", "--keys", keys, "--device", DEVICE, "-o", out / "grant.jwt")

    # The host measures; its log explains the quote, also to the owner, who has nothing but the two files.
    measured, log = usb / "measured.json", usb / "event-log.bin"
    scene.sczctl("boot-policy", "measure", "--device", DEVICE, "-o", measured, "--event-log", log)
    shown = scene.sczctl("boot-policy", "log", log, "--measurement", measured, "--keys", keys, "--json")
    told = json.loads(shown.stdout)["measurement"]
    assert all(each["explained"] for pcr, each in told.items())
    assert told["11"]["phases"] == 4
    shown = scene.sczctl("boot-policy", "log", "--measurement", measured)
    assert "PCR 11: explained, with systemd's phases up to ready" in shown.stdout

    # The owner predicts the next boot, sees what it would lock, and signs the running and the next state together.
    words = ["boot-policy", "sign", "--keys", keys, "--model", "small", "--pcr", COVERED]
    scene.sczctl(*words, "--measured", measured, "-o", usb / "running.json")
    predicted = usb / "predicted.json"
    given = ["--measurement", measured, "--keys", keys, "--uki", images["new"], "-o", predicted]
    shown = scene.sczctl("boot-policy", "predict", log, *given)
    assert "changed: PCR 4 (boot loader), PCR 9 (kernel and initrd, as GRUB read them), PCR 11" in shown.stdout
    assert machine.state(measured, "--keys", keys)["locked"] == 0
    found = machine.state(predicted, "--keys", keys, code=1)
    assert found["models"] == [
        {
            "model": "small:1",
            "device": DEVICE,
            "opens": False,
            "differing": [4, 9, 11],
            "untold": [],
            "words": "LOCKED: not approved: PCR 4 (boot loader), PCR 9 (kernel and initrd, as GRUB read them), "
            "PCR 11 (unified kernel image)",
        }
    ]
    scene.sczctl(*words, "--measured", measured, "--predicted", predicted, "-o", out / "boot-policy.json")
    assert machine.state(predicted, "--keys", keys)["locked"] == 0
    scene.trust()
    scene.add(out)
    assert machine.state(predicted)["locked"] == 0  # the same over the host's store
    assert machine.state(predicted, "--boot-policy", usb / "running.json", code=1)["locked"] == 1
    assert opens(scene) == 0

    # The next boot has the very values that were predicted, and the model opens under them.
    scene.tpm.restart()
    machine.boot(images["new"], NEW)
    assert {int(pcr): value for pcr, value in json.loads(predicted.read_text())["pcrs"].items()} == machine.quoted()
    scene.sczctl("boot-policy", "measure", "--device", DEVICE, "-o", usb / "measured-2.json")
    assert machine.state(usb / "measured-2.json", "--keys", keys)["locked"] == 0
    assert opens(scene) == 0

    # A third one, with another command line inside the image, is not approved: what differs is said.
    scene.tpm.restart()
    machine.boot(images["evil"], EVIL)
    assert opens(scene) == BootStateRefused.code
    said = scene.sczctl("doctor", check=False).stdout
    assert "PCR 11: unified kernel image: contents of section .cmdline: sha256:" in said
    assert "PCR 4: unified kernel image, boot program \\EFI\\Linux\\image.efi: sha256:" in said


def test_the_next_state_unseals_in_a_container_and_why_explains_the_one_that_does_not(machine: Machine) -> None:
    scene, usb, keys = machine.scene, machine.scene.usb, machine.scene.owner / "keys"
    images = {name: machine.image(name, s) for name, s in (("old", OLD), ("new", NEW), ("evil", EVIL))}
    machine.boot(images["old"], OLD)
    scene.keygen()
    scene.enrol(DEVICE)
    source = scene.owner / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w" * 100_000)
    out = scene.pack(source, name="small")
    scene.sczctl("grant", "small:1", "--keys", keys, "--device", DEVICE, "-o", out / "grant.jwt")
    measured, log, predicted = usb / "measured.json", usb / "event-log.bin", usb / "predicted.json"
    scene.sczctl("boot-policy", "measure", "--device", DEVICE, "-o", measured, "--event-log", log)
    words = ["--measurement", measured, "--keys", keys, "--uki", images["new"], "-o", predicted]
    scene.sczctl("boot-policy", "predict", log, *words)
    words = ["--measured", measured, "--predicted", predicted, "--pcr", COVERED, "-o", out / "boot-policy.json"]
    scene.sczctl("boot-policy", "sign", "--keys", keys, "--model", "small", *words)
    scene.trust()
    scene.add(out)
    scene.install()
    image, command = scene.podman.busybox_image(), ["sha256sum", "/models/small/weights"]

    def start() -> subprocess.CompletedProcess[str]:
        return scene.run(image, command, model="small:1", token=scene.token())

    assert start().returncode == 0
    scene.tpm.restart()
    machine.boot(images["new"], NEW)
    ran = start()
    assert ran.returncode == 0, ran.stderr
    assert "weights" in ran.stdout
    scene.tpm.restart()
    machine.boot(images["evil"], EVIL)
    refused = start()
    assert refused.returncode != 0
    assert "weights" not in refused.stdout
    why = scene.why()
    assert why["code"] == BootStateRefused.code
    assert any("contents of section .cmdline" in line for line in why["differences"])  # type: ignore[attr-defined]


def test_what_a_log_or_a_prediction_cannot_tell_is_refused(machine: Machine) -> None:
    scene, usb, keys = machine.scene, machine.scene.usb, machine.scene.owner / "keys"
    image = machine.image("old", OLD)
    machine.boot(image, OLD)
    scene.keygen()
    scene.enrol(DEVICE)
    measured, log = usb / "measured.json", usb / "event-log.bin"
    scene.sczctl("boot-policy", "measure", "--device", DEVICE, "-o", measured, "--event-log", log)
    # Another boot's log: PCR by PCR it does not explain the quote, and what it would replace cannot be told.
    other = usb / "other.bin"
    other.write_bytes(boot_unified(machine.image("new", NEW).read_bytes(), NEW, loader=LOADER.read_bytes()))
    shown = scene.sczctl("boot-policy", "log", other, "--measurement", measured, "--keys", keys, check=False)
    assert shown.returncode == 1
    assert "PCR 11: NOT EXPLAINED" in shown.stdout
    assert "PCR 7: explained" in shown.stdout
    predicted = usb / "predicted.json"
    words = [
        "boot-policy",
        "predict",
        other,
        "--measurement",
        measured,
        "--keys",
        keys,
        "--uki",
        image,
        "-o",
        predicted,
    ]
    found = json.loads(scene.sczctl(*words, "--json").stdout)
    assert set(found["unknown"]) == {"4", "9", "11"}
    assert found["changed"] == []
    words = ["boot-policy", "sign", "--keys", keys, "--model", "small", "--pcr", COVERED, "-o", usb / "policy.json"]
    refused = scene.sczctl(*words, "--predicted", predicted, check=False)
    assert refused.returncode == BootPolicyInvalid.code
    assert "does not tell PCR 4" in refused.stderr
    assert not (usb / "policy.json").exists()
    # No log, or none that is one: the measurement is made all the same, unless the log is asked for.
    machine.log.write_bytes(b"no log")
    scene.sczctl("boot-policy", "measure", "--device", DEVICE, "-o", usb / "again.json")
    done = scene.sczctl(
        "boot-policy",
        "measure",
        "--device",
        DEVICE,
        "-o",
        usb / "third.json",
        "--event-log",
        usb / "third.bin",
        check=False,
    )
    assert done.returncode == EventLogInvalid.code
    assert not (usb / "third.json").exists()
    assert not (usb / "third.bin").exists()
