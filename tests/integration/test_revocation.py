"""Revocation and leases the whole way: owner, files, host, software TPM, podman. Every step is a `sczctl` command.

What was revoked is refused offline, each kind by its own code; a list or a store that was put back is noticed by the
counter; whatever kills the applying half-way, the host has the old state whole or refuses. Each test has model lines of
its own: the counter of the scene's device only counts up, and what stays allowed is granted anew each time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.attestation.tpm import open_tpm
from oci_hook.errors import DeviceInvalid, DeviceNotEnrolled, EvidenceRefused
from oci_hook.key_errors import GenerationRefused, RevocationsMissing
from oci_hook.owner.records import OwnerRecords
from oci_hook.revoked import load_list, verify_in_force
from oci_hook.store import Store
from oci_hook.trust_folder import Trust
from tests.commands import Done, crashed, done, sczctl, snapshot
from tests.integration.conftest import contents
from tests.integration.test_start import refused, start
from tests.scene import COVERED, SCZCTL, Scene

FILES = {"weights.bin": 70_000, "config.json": 17}


class Household:
    """A scene whose owner can pack version upon version."""

    def __init__(self, scene: Scene, source: Path) -> None:
        self.scene, self.source, self.made = scene, source, 0
        self.keys = scene.owner / "keys"

    def version(self, name: str, version: str, generation: int) -> Path:
        """Pack, grant, sign, add; returns what travelled."""
        out = self.scene.pack(self.source, name=name, version=version, extra=("--generation", str(generation)))
        self.scene.grant(out, name=name, version=version)
        self.scene.add(out)
        return out

    def revoke(self, *words: str) -> Path:
        """The folder for the device."""
        self.made += 1
        out = self.scene.usb / f"revoked-{self.made}"
        self.scene.sczctl("revoke", "--keys", self.keys, *words, "-o", out)
        return out / "edge-1"

    def ctl(self, *words: object) -> Done:
        return sczctl("--config", self.scene.config, *words)

    @property
    def store(self) -> Store:
        return Store(str(self.scene.store))

    def counter(self) -> int:
        (counter,) = self.store.load_device().counters.values()
        with open_tpm(self.scene.tpm.tcti, self.scene.host / "tpm.lock", timeout_seconds=10) as tpm:
            return tpm.read_counter(counter.index)

    def is_in_force(self) -> bool:
        """Whether the hook would find the list that the counter asks for, or none and the enrolment's value."""
        (owner,) = Trust(str(self.scene.host / "trust")).owners()
        (enrolled,) = self.store.load_device().counter_values.values()
        try:
            verify_in_force(load_list(self.store, owner), self.counter(), enrolled)
        except RevocationsMissing:
            return False
        return True

    def sign(self, name: str, out: Path) -> None:
        words = ("--keys", self.keys, "--model", name, "--device", "edge-1", "--pcr", COVERED)
        self.scene.sczctl("boot-policy", "sign", *words, "-o", out)


@pytest.fixture(scope="module")
def household(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Household]:
    source = tmp_path_factory.mktemp("small")
    for name, size in FILES.items():
        (source / name).write_bytes(contents(name, size))
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    try:
        with Scene(folder) as scene:
            scene.prepare(source, name="first")
            scene.image = scene.podman.busybox_image()
            yield Household(scene, source)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def token(household: Household) -> Path:
    return household.scene.token()


def opens(household: Household, token: Path, model: str) -> None:
    attempt = start(household.scene, token, model=model)
    assert attempt.returncode == 0, attempt
    assert attempt.ran


def test_an_old_version_an_old_grant_and_the_rest(household: Household, token: Path) -> None:
    scene = household.scene
    old, new = household.version("cat", "1", 1), household.version("cat", "2", 2)
    other = household.version("dog", "1", 1)
    for model in ("cat:1", "cat:2", "dog:1"):
        opens(household, token, model)
    before = household.counter()
    folder = household.revoke("--model", "cat:1")
    assert sorted(path.name for path in folder.iterdir())[-1] == "revocations.jwt"
    assert not (folder / "cat@1.jwt").exists()
    opens(household, token, "cat:1")  # nothing was applied: the operator withholds it, and only a lease bounds that
    scene.add(folder)
    assert household.counter() == before + 1
    refused(scene, "GenerationRefused", token, model="cat:1")
    for model in ("cat:2", "dog:1", "first:1"):
        opens(household, token, model)
    # The old grants, put back with everything that came with them: the TPM refuses, list or no list.
    for out, model in ((new, "cat:2"), (other, "dog:1")):
        done(household.ctl("add", "--replace", out / "grant.jwt"))
        refused(scene, "Revoked", token, model=model)
    scene.add(folder)  # the same again mends it: the grants in it are newer
    opens(household, token, "cat:2")
    # Who edits the list out of the hook's way meets the same answer for the old version.
    path = Path(household.store.revocations_path(load_owner_id(household)))
    kept = path.read_bytes()
    path.unlink()
    refused(scene, "RevocationsMissing", token, model="cat:1")
    path.write_bytes(kept)
    done(household.ctl("add", "--replace", old / "grant.jwt"))
    refused(scene, "GenerationRefused", token, model="cat:1")
    failed = scene.sczctl(
        "grant", "cat:1", "--keys", household.keys, "--device", "edge-1", "-o", scene.usb / "no.jwt", check=False
    )
    assert failed.returncode == GenerationRefused.code


def load_owner_id(household: Household) -> str:
    (owner,) = Trust(str(household.scene.host / "trust")).owners()
    return owner.owner_id


def test_generations_below(household: Household, token: Path) -> None:
    for version, generation in (("1", 1), ("2", 2), ("3", 5)):
        household.version("owl", version, generation)
    planned = json.loads(
        household.scene.sczctl(
            "revoke", "--keys", household.keys, "--below-generation", "owl:5", "--dry-run", "--json"
        ).stdout
    )
    (device,) = planned["devices"]
    assert sorted(device["locked"]) == ["owl:1", "owl:2"]
    assert planned["dry_run"]
    assert device["counter"] == household.counter() + 1
    household.scene.add(household.revoke("--below-generation", "owl:5"))
    for version in ("1", "2"):
        refused(household.scene, "GenerationRefused", token, model=f"owl:{version}")
    opens(household, token, "owl:3")


def test_an_old_boot_policy_is_refused_once_its_epoch_is_over(household: Household, token: Path) -> None:
    scene = household.scene
    out = household.version("fox", "1", 1)
    opens(household, token, "fox:1")
    folder = household.revoke("--boot-policy", "fox:default")
    scene.add(folder)
    refused(scene, "BootPolicyRefused", token, model="fox:1")  # the fresh grant is of the new epoch
    done(household.ctl("add", "--replace", out / "grant.jwt"))
    refused(scene, "Revoked", token, model="fox:1")  # the old policy and the old grant fit each other: the counter
    scene.add(folder)
    household.sign("fox", folder / "boot-policy.json")
    scene.add(folder)
    opens(household, token, "fox:1")
    done(household.ctl("add", "--replace", out / "boot-policy.json"))
    refused(scene, "BootPolicyRefused", token, model="fox:1")
    scene.add(folder / "boot-policy.json")
    opens(household, token, "fox:1")
    opens(household, token, "first:1")


def test_lists_and_stores_that_were_put_back(household: Household, token: Path) -> None:
    scene = household.scene
    household.version("elk", "1", 1)
    household.version("elk", "2", 2)
    household.version("elk", "3", 3)
    first = household.revoke("--model", "elk:1")
    scene.add(first)
    path = Path(household.store.revocations_path(load_owner_id(household)))
    earlier = path.read_bytes()
    saved = household.scene.directory / "saved-store"
    shutil.copytree(scene.store, saved)
    second = household.revoke("--model", "elk:2")
    scene.add(second)
    opens(household, token, "elk:3")
    value = household.counter()
    # An older list is not applied again, and the same is.
    before = snapshot(scene.store)
    failed = scene.sczctl("add", first, check=False)
    assert failed.returncode == RevocationsMissing.code
    assert snapshot(scene.store) == before
    scene.add(second)
    assert household.counter() == value
    # The list put back, damaged, gone: each is noticed before a key is asked for.
    latest = path.read_bytes()
    for data in (earlier, latest[:-4] + b"AAAA", b"", None):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        refused(scene, "RevocationsMissing", token, model="elk:3")
        refused(scene, "RevocationsMissing", token, model="first:1")
    # The whole store put back, as from a backup: what the list revoked is not even reached.
    shutil.rmtree(scene.store)
    shutil.copytree(saved, scene.store)
    for model in ("elk:2", "elk:3"):
        refused(scene, "RevocationsMissing", token, model=model)
    scene.add(second)
    refused(scene, "GenerationRefused", token, model="elk:2")
    opens(household, token, "elk:3")


def test_a_list_for_another_device_or_too_far_ahead(household: Household) -> None:
    scene = household.scene
    folder = household.revoke("--boot-policy", "first:default")
    value, before = household.counter(), snapshot(scene.store)
    device = household.store.path("device.json")
    mine = Path(device).read_bytes()
    document = json.loads(mine)
    (counter,) = document["counters"].values()
    document["counters"] = {"A" * 43: counter}
    Path(device).write_bytes(json.dumps(document).encode())
    assert scene.sczctl("add", folder, check=False).returncode == DeviceNotEnrolled.code
    Path(device).write_bytes(mine)
    assert snapshot(scene.store) == before
    assert household.counter() == value
    household.sign("first", folder / "boot-policy.json")
    scene.add(folder)


def test_whoever_holds_what_was_revoked_is_named(household: Household, token: Path) -> None:
    scene = household.scene
    household.version("hen", "1", 1)
    held = scene.token("held")
    words = ["--detach", "--name", "holder"]
    started = scene.run(scene.image, ["sleep", "300"], model="hen:1", token=held, options=words)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        assert json.loads(scene.sczctl("revoke", "--applied", "--json").stdout) == []
        folder = household.revoke("--model", "hen:1")
        said = json.loads(scene.sczctl("add", "--json", folder).stdout)
        (holder,) = said["held"]
        assert (holder["container"], holder["model"], holder["reason"]) == (container, "hen:1", "revoked grant")
        assert json.loads(scene.sczctl("revoke", "--applied", "--json").stdout) == said["held"]
        assert "still held: hen:1" in scene.sczctl("revoke", "--applied").stdout
        alive = scene.podman.call("exec", "holder", "cat", "/models/hen/config.json")
        assert alive.returncode == 0  # a mounted copy goes on: that is why it is named
    finally:
        scene.podman.call("rm", "-f", "-t", "0", "holder")
    assert json.loads(scene.sczctl("revoke", "--applied", "--json").stdout) == []


def test_a_kill_at_any_step_leaves_the_old_state_or_one_that_refuses(household: Household, token: Path) -> None:
    scene = household.scene
    household.version("bee", "1", 1)
    household.version("bee", "2", 2)
    folder = household.revoke("--model", "bee:1")
    value, phases, step = household.counter(), list[int](), 0
    grant = Path(household.store.grant_path(household.store.load_model("bee", "1").manifest_digest))
    while True:
        step += 1
        killed = crashed(lambda: done(household.ctl("add", folder)), step)
        if not killed:
            break
        counted = household.counter() - value
        phases.append(1 if not household.is_in_force() else 2 * counted)
        assert grant.exists()  # what was revoked stays in its place, as everything does, until the operator removes it
    # The old state, then one that refuses, then the new one.
    assert phases == sorted(phases)
    assert set(phases) == {0, 1, 2}
    assert household.is_in_force()
    assert household.counter() == value + 1
    refused(scene, "GenerationRefused", token, model="bee:1")
    opens(household, token, "bee:2")


def test_a_kill_in_the_middle_of_the_count(household: Household, token: Path) -> None:
    """A grant that was given far ahead makes the count long enough to be hit by a signal."""
    scene = household.scene
    household.version("ant", "1", 1)
    household.version("ant", "2", 2)
    value = household.counter()
    ahead = ["--maximum", str(value + 900), "-o", str(scene.usb / "ahead.jwt")]
    scene.sczctl("grant", "ant:1", "--keys", household.keys, "--device", "edge-1", *ahead)
    scene.add(scene.usb / "ahead.jwt")
    folder = household.revoke("--model", "ant:1")
    hit = 0
    while hit < 3:
        process = subprocess.Popen(
            [*SCZCTL, "--config", str(scene.config), "add", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        at = household.counter()
        while process.poll() is None and household.counter() <= at + 20 * (at > value):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
        ended = process.wait()
        if ended == 0:
            break
        hit += 1
        assert value <= household.counter() <= value + 901
        if household.counter() < value + 901:
            refused(scene, "RevocationsMissing", token, model="ant:2")
    assert hit
    scene.add(folder)
    assert household.counter() == value + 901
    refused(scene, "GenerationRefused", token, model="ant:1")
    opens(household, token, "ant:2")
    far = scene.sczctl(
        "grant", "ant:2", "--keys", household.keys, "--device", "edge-1", "--maximum", str(value + 1901), "-o",
        scene.usb / "far.jwt", check=False,
    )  # fmt: skip
    assert far.returncode == DeviceInvalid.code  # no revocation could count beyond it


def test_a_lease_and_its_renewal(household: Household, token: Path) -> None:
    scene = household.scene
    household.version("bat", "1", 1)
    words = ("bat:1", "--keys", household.keys, "--device", "edge-1")

    def grant(name: str, *more: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return scene.sczctl("grant", *words, "-o", scene.usb / name, *[str(each) for each in more], check=check)

    def request(name: str) -> Path:
        scene.sczctl("lease", "request", "--device", "edge-1", "-o", scene.usb / name)
        return scene.usb / name

    def reboot() -> None:
        scene.tpm.restart()
        scene.tpm.measure_boot()

    grant("one-boot.jwt", "--lease-boots", 1, "--lease-hours", 1000)
    scene.add(scene.usb / "one-boot.jwt")
    opens(household, token, "bat:1")
    first = request("first.json")
    reboot()
    opens(household, token, "bat:1")
    reboot()
    refused(scene, "LeaseExpired", token, model="bat:1")
    reboot()
    refused(scene, "LeaseExpired", token, model="bat:1")
    opens(household, token, "first:1")  # another grant, without a lease
    # A renewal, counted from what the TPM says now; an older request is refused afterwards.
    second = request("second.json")
    said = json.loads(grant("renewed.jwt", "--lease-from", second, "--lease-boots", 0, "--json").stdout)
    assert said["lease"].keys() == {"resets"}
    scene.add(scene.usb / "renewed.jwt")
    opens(household, token, "bat:1")
    older = grant("older.jwt", "--lease-from", first, "--lease-boots", 9, check=False)
    assert older.returncode == EvidenceRefused.code
    assert not (scene.usb / "older.jwt").exists()
    changed = json.loads(second.read_bytes())
    changed["created"] += 1
    (scene.usb / "changed.json").write_text(json.dumps(changed))
    assert grant("no.jwt", "--lease-from", scene.usb / "changed.json", "--lease-boots", 9, check=False).returncode == 36
    assert grant("no.jwt", "--lease-from", second, check=False).returncode == 2
    # A revocation keeps the lease of what it grants anew.
    household.version("bug", "1", 1)
    scene.add(household.revoke("--model", "bug:1"))
    opens(household, token, "bat:1")
    reboot()
    refused(scene, "LeaseExpired", token, model="bat:1")


def test_a_deleted_counter_and_one_made_anew(household: Household, token: Path) -> None:
    """What the TPM's owner authorisation can do to the counter: nothing opens that was revoked."""
    scene = household.scene
    (counter,) = household.store.load_device().counters.values()
    environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": scene.tpm.tcti, "TSS2_LOG": "all+none"}

    def tool(*command: str) -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=20)

    opens(household, token, "first:1")
    value = household.counter()
    tool("tpm2_nvundefine", "-C", "o", hex(counter.index))
    refused(scene, "KeyRefused", token, model="first:1")
    attributes = "nt=counter|authread|authwrite|ownerread|ownerwrite|no_da"
    tool("tpm2_nvdefine", hex(counter.index), "-C", "o", "-s", "8", "-a", attributes)
    refused(scene, "Revoked", token, model="first:1")  # never written
    tool("tpm2_nvincrement", "-C", "o", hex(counter.index))
    assert household.counter() > value  # it resumes higher
    refused(scene, "RevocationsMissing", token, model="first:1")
    # Enrolled again, the owner counts on from there.
    scene.sczctl("enroll", "request", "--owner", household.keys / "owner.json", "--device", "edge-1", "-o",
                 scene.usb / "again.json")  # fmt: skip
    words = ("--keys", household.keys, "--ek-roots", scene.owner / "ek-roots")
    scene.sczctl("enroll", "challenge", scene.usb / "again.json", *words, "-o", scene.usb / "challenge-2.json")
    scene.sczctl("enroll", "answer", scene.usb / "challenge-2.json", "-o", scene.usb / "answer-2.json")
    scene.sczctl("enroll", "accept", scene.usb / "answer-2.json", *words)
    # The host is not told that it was accepted; a grant that was made after it asked shows it.
    refused(scene, "RevocationsMissing", token, model="first:1")
    scene.sczctl(
        "grant", "first:1", "--keys", household.keys, "--device", "edge-1", "-o", scene.usb / "first-again.jwt"
    )
    scene.add(scene.usb / "first-again.jwt")
    opens(household, token, "first:1")


def test_a_revoked_device_gets_nothing(household: Household, token: Path) -> None:
    """Last: the scene's device."""
    scene = household.scene
    folder = household.revoke("--device", "edge-1")
    assert [path.name for path in folder.iterdir()] == ["revocations.jwt"]
    scene.add(folder)
    refused(scene, "Revoked", token, model="first:1")
    words = ("grant", "first:1", "--keys", household.keys, "--device", "edge-1")
    assert scene.sczctl(*words, "-o", scene.usb / "never.jwt", check=False).returncode == DeviceInvalid.code
    assert not (scene.usb / "never.jwt").exists()
    assert not any(grant.device_name == "edge-1" for grant in OwnerRecords(household.keys).grants())
