"""Updates of a host's firmware and system, and lost records: what locks a model, and what opens it again.

One scene whose host boots unified kernel images, signed for systemd by systemd-measure; starts are podman's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from oci_hook.errors import KeyInvalid
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import refused, start, tpm_handles
from tests.pcr_signer import IMAGE, UPDATE, PcrSigner, boot_image
from tests.registry import skopeo
from tests.scene import Scene


class Machine:
    """A scene, the signer of its operating system, and where systemd has the signatures."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.signer = PcrSigner(scene.directory / "signer")
        self.file = scene.host / "tpm2-pcr-signature.json"
        self.vault = scene.directory / "vault"

    def boot(
        self, image: Mapping[str, str], *, signed: Mapping[str, str] | None, changes: Mapping[int, str] | None = None
    ) -> None:
        """Boot an image, with the signatures of an image beside it; None: there are none."""
        boot_image(self.scene.tpm, image, changes=changes)
        self.file.unlink(missing_ok=True)
        if signed is not None:
            self.file.write_bytes(self.signer.sign(self.scene.tpm, signed))

    def sign(self, *words: str | Path, output: str) -> Path:
        """A boot policy by the owner, in a folder of its own."""
        folder = self.scene.usb / output
        folder.mkdir()
        keys = ("--keys", self.scene.owner / "keys")
        self.scene.sczctl("boot-policy", "sign", *keys, "--model", "small", *words, "-o", folder / "boot-policy.json")
        return folder


@pytest.fixture(scope="module")
def machine(model_source: Path) -> Iterator[Machine]:
    """Everything but the boot policy is in its place."""
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        with Scene(folder) as scene:
            made = Machine(scene)
            scene.write_config(boot=f'[boot]\npcr_signature = "{made.file}"')
            made.boot(IMAGE, signed=IMAGE)
            scene.keygen()
            scene.sczctl("keygen", "--recovery-only", "--keys", made.vault, "--name", "vault", "--no-passphrase")
            scene.sczctl("keygen", "--keys", scene.owner / "keys", "--recovery-key", made.vault / "recovery.json")
            scene.enrol()
            out = scene.pack(model_source, name="small")
            keys = ("--keys", scene.owner / "keys", "--device", "edge-1")
            scene.sczctl("grant", "small:1", *keys, "-o", out / "grant.jwt")
            words = ("--device", "edge-1", "--pcr", "7,11,12,14", "--pcr-key", made.signer.public)
            shutil.copy(made.sign(*words, output="first") / "boot-policy.json", out)
            scene.trust()
            scene.add(out)
            scene.install()
            scene.image = scene.podman.busybox_image()
            yield made
    finally:
        shutil.rmtree(folder)


def grants(machine: Machine) -> dict[str, bytes]:
    found = {str(path): path.read_bytes() for path in (machine.scene.store / "grants").glob("*.jwt")}
    assert len(found) == 1
    return found


def test_an_update_of_the_system_needs_no_owner_and_an_unsigned_one_is_refused(machine: Machine) -> None:
    scene = machine.scene
    assert start(scene, scene.token()).returncode == 0
    machine.boot(UPDATE, signed=UPDATE)
    attempt = start(scene, scene.token())
    assert (attempt.returncode, attempt.ran) == (0, True), attempt.stderr
    checks = json.loads(scene.sczctl("doctor", "--json", check=False).stdout)
    assert "that this boot state meets" in json.dumps(checks)
    machine.boot({**UPDATE, "linux": "kernel of an attacker"}, signed=UPDATE)
    refused(scene, "BootStateRefused", scene.token())
    message = str(scene.why()["message"])
    assert "nobody whom the form names signed the value of PCR 11 (unified kernel image)" in message
    assert f"{machine.file}: 4 signature(s) by the form's key, none of them for this value" in message
    assert "ukify --pcr-private-key" in str(scene.why()["remedy"])
    machine.boot(UPDATE, signed=None)
    refused(scene, "BootStateRefused", scene.token())
    assert f"there is no {machine.file}" in str(scene.why()["message"])
    assert tpm_handles(scene) == ""


def test_a_firmware_update_locks_the_model_until_the_owner_signs_the_new_state(machine: Machine) -> None:
    scene, firmware = machine.scene, {7: "secure boot on, keys of 2026"}
    before = grants(machine)
    machine.boot(UPDATE, signed=UPDATE, changes=firmware)
    refused(scene, "BootStateRefused", scene.token())
    assert "PCR 7 (secure boot and its keys)" in str(scene.why()["message"])
    measured = scene.usb / "measured.json"
    scene.sczctl("boot-policy", "measure", "--device", "edge-1", "-o", measured)
    words = ("--device", "edge-1", "--measured", measured, "--pcr", "7,11,12,14", "--pcr-key", machine.signer.public)
    scene.add(machine.sign(*words, output="second"))
    attempt = start(scene, scene.token())
    assert (attempt.returncode, attempt.ran) == (0, True), attempt.stderr
    machine.boot(IMAGE, signed=IMAGE)  # back to the old firmware, whose state is still approved
    assert start(scene, scene.token()).returncode == 0
    assert grants(machine) == before


def test_lost_records_come_back_from_a_bundle_that_travelled(machine: Machine) -> None:
    """The owner's records of the version are gone, and the host's grant; the keys are there, and the offline one."""
    scene, keys = machine.scene, machine.scene.owner / "keys"
    machine.boot(IMAGE, signed=IMAGE)
    shutil.rmtree(keys / "models")
    (grant,) = (scene.store / "grants").glob("*.jwt")
    grant.unlink()
    refused(scene, "GrantMissing", scene.token())
    out = scene.usb / "again"
    out.mkdir()
    skopeo("copy", f"oci:{scene.usb / 'small-1' / 'bundle'}:1", f"oci:{out}/bundle:1")
    words = ("grant", "small:1", "--keys", keys, "--device", "edge-1", "-o", out / "grant.jwt")
    assert scene.sczctl(*words, check=False).returncode == KeyInvalid.code
    scene.sczctl("recover", out / "bundle", "--recovery-key", machine.vault / "recovery.key", "--keys", keys)
    scene.sczctl(*words)
    scene.add(out)
    names = " ".join(f"/models/small/{name}" for name in FILES)
    attempt = start(scene, scene.token(), command=f"sha256sum {names}")
    assert (attempt.returncode, attempt.ran) == (0, True), attempt.stderr
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in attempt.stdout


def test_a_lost_folder_leaves_the_files_themselves(machine: Machine) -> None:
    scene = machine.scene
    key, owner = machine.vault / "recovery.key", scene.owner / "keys" / "owner.json"
    words = ("--recovery-key", key, "--owner", owner, "-o", scene.usb / "plain")
    scene.sczctl("recover", scene.usb / "small-1" / "bundle", *words)
    for name, size in FILES.items():
        assert (scene.usb / "plain" / name).read_bytes() == contents(name, size)
