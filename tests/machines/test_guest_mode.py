"""Guest mode in a virtual machine with a TPM: measured boot, delivery in the guest, and a boot that is refused.

QEMU without KVM stands in for the hypervisor, swtpm for the TPM of the guest, `tests.agent` for the agent; OVMF,
systemd-stub, Debian's kernel and the hook are the real ones. Three boots of one image, which the owner approves:
one is measured, one delivers, one has a command line from outside. Ciphertext comes in by 9p; no file on the host has
a byte of plaintext. The machine's own memory has, as QEMU's process: only a confidential machine hides it from a host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from oci_hook.attestation.event_log import parse_event_log, replay
from oci_hook.attestation.event_words import section_name
from tests.engines import unpack_busybox
from tests.guest_image import COMMAND_LINE, MeasuredGuest, told, told_pcrs, write_image, write_root
from tests.guests import Kernel, Machine, Share
from tests.scene import TOKEN_PATH, Scene

DEVICE = "guest-1"
COVERED = "4,7,9,11,12"
FILES = {"weights.safetensors": (1 << 20) + 4321, "config.json": 17}
CONFIG = """
[tpm]
timeout_seconds = 200
[memory]
reserve_bytes = 0
[guest]
timeout_seconds = 170
"""
LOOK = """
for file in /models/small/*; do sha256sum $file; done
cat /models/small/REFUSED.txt
echo x > /models/small/x
grep /models/ /proc/self/mountinfo
"""


def contents(name: str, size: int) -> bytes:
    """A file's plaintext: no block of it is anywhere else."""
    return b"".join(f"plaintext of {name} {block:>12}\n".encode() for block in range(size // 26 + 1))[:size]


@dataclass
class World:
    """The owner, a guest's TPM and image, and what its host shares."""

    scene: Scene
    image: Path
    machine: Machine
    containers: Path
    boots: list[list[str]] = field(default_factory=list)

    @contextlib.contextmanager
    def boot(self, command_line: str | None = None, *, image: Path | None = None) -> Iterator[MeasuredGuest]:
        """Boot the image, or another one, wait until it takes verbs, and end it."""
        with self.scene.tpm.lent() as control:
            machine = Machine(
                self.machine.kernel,
                image or self.image,
                memory_mib=512,
                shares=self.machine.shares,
                firmware=True,
                tpm=control,
            )
            with MeasuredGuest(machine, image or self.image, command_line=command_line) as guest:
                guest.wait_for("guest: ready$")  # behind what the firmware wrote on that line
                yield guest
                guest.say("end")
                self.boots.append(guest.finish())

    def place_container(self, name: str) -> None:
        """A container as Kata's host puts it into the shared folder."""
        folder = self.containers / name
        folder.mkdir()
        unpack_busybox(folder / "rootfs")
        shutil.copy(self.scene.token(f"token-{name}", ttl_seconds=3600), folder / "token")
        shared = f"/run/kata-containers/shared/containers/{name}"
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": TOKEN_PATH, "type": "bind", "source": f"{shared}/token", "options": ["bind", "ro"]},
        ]
        spec = {
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": ["/bin/sh", "-c", LOOK], "env": ["PATH=/bin"], "cwd": "/"},
            "annotations": {"smm.scz/model": "small:1"},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": each} for each in ("mount", "uts", "ipc", "pid")]},
        }
        (folder / "config.json").write_text(json.dumps(spec))


def run_container(world: World, name: str, command_line: str | None = None) -> list[str]:
    """Boot, run one container, and give the lines of its console."""
    world.place_container(name)
    with world.boot(command_line) as guest:
        guest.say("log")
        guest.wait_for("^guest: done log")
        guest.say(f"run {name}")
        guest.wait_for("^guest: done run")
    return world.boots[-1]


@pytest.fixture(scope="module")
def world(kernel: Kernel) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    try:
        with Scene(folder) as scene:
            scene.keygen()
            scene.enrol(DEVICE)  # the owner's visit before the guest first runs: its TPM is the host's to make
            scene.trust()
            source = folder / "plain"
            source.mkdir()
            for name, size in FILES.items():
                (source / name).write_bytes(contents(name, size))
            out = scene.pack(source, name="small")
            shutil.rmtree(source)
            write_root(folder / "root", trust=scene.host / "trust", config=CONFIG)
            image = write_image(folder / "guest.efi", folder / "root", kernel)
            containers = folder / "containers"
            containers.mkdir()
            shares = (Share("store", scene.store, "9p", ("readonly=on",)), Share("containers", containers, "9p"))
            made = World(scene, image, Machine(kernel, image, shares=shares), containers)
            with made.boot() as guest:
                for verb in ("log", "measure"):
                    guest.say(verb)
                    guest.wait_for(f"^guest: done {verb}")
            approve(made, out)
            yield made
    finally:
        shutil.rmtree(folder)


def approve(world: World, out: Path) -> None:
    """The owner signs a boot policy over the guest's own measurement, and grants; the host adds what it is sent."""
    scene = world.scene
    (scene.usb / "measured.json").write_bytes(told(world.boots[0], "measurement"))
    words = ["--keys", scene.owner / "keys", "--model", "small", "--measured", scene.usb / "measured.json"]
    scene.sczctl("boot-policy", "sign", *words, "--pcr", COVERED, "-o", out / "boot-policy.json")
    scene.sczctl("grant", "small:1", "--keys", scene.owner / "keys", "--device", DEVICE, "-o", out / "grant.jwt")
    scene.add(out)


def test_the_event_log_says_what_the_tpm_has(world: World) -> None:
    log, values = told(world.boots[0], "log"), told_pcrs(world.boots[0])
    # Linux itself measures after the firmware's log ended: IMA's first entry, into 10.
    assert {pcr: value for pcr, value in replay(parse_event_log(log)).items() if pcr != 10} == {
        pcr: value for pcr, value in values.items() if pcr != 10 and any(value)
    }
    stub = {section_name(event) for event in parse_event_log(log).events if event.pcr == 11}
    assert stub >= {".linux", ".initrd", ".cmdline"}
    digests = {event.digest for event in parse_event_log(log).events if event.pcr == 11}
    assert hashlib.sha256(COMMAND_LINE.encode() + b"\0").digest() in digests


def test_the_boot_of_the_next_image_has_the_predicted_values(world: World) -> None:
    usb, image = world.scene.usb, world.image.read_bytes()
    command_line = COMMAND_LINE.replace("loglevel=1", "loglevel=2").encode()
    assert image.count(COMMAND_LINE.encode()) == 1
    following = usb / "next.efi"
    following.write_bytes(image.replace(COMMAND_LINE.encode(), command_line))
    (usb / "event-log.bin").write_bytes(told(world.boots[0], "log"))
    (usb / "measured.json").write_bytes(told(world.boots[0], "measurement"))
    words = ["--measurement", usb / "measured.json", "--keys", world.scene.owner / "keys", "--uki", following]
    shown = world.scene.sczctl("boot-policy", "predict", usb / "event-log.bin", *words, "--json")
    predicted = json.loads(shown.stdout)
    assert (predicted["changed"], predicted["unknown"]) == ([4, 9, 11], {})
    with world.boot(image=following) as guest:
        guest.say("log")
        guest.wait_for("^guest: done log")
    assert {str(pcr): value.hex() for pcr, value in told_pcrs(world.boots[-1]).items() if pcr != 10} == {
        pcr: value for pcr, value in predicted["pcrs"].items() if pcr != "10"
    }


def test_a_container_in_the_guest_reads_the_model_and_the_host_has_no_byte_of_it(world: World) -> None:
    lines = run_container(world, "approved")
    assert told_pcrs(lines) == told_pcrs(world.boots[0])  # a boot of the same image is the same state
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}" in lines
    (mount,) = [line for line in lines if " /models/small " in line and " - " in line]
    assert "ro" in mount.split()[-1].split(",")
    events = [json.loads(line)["event"] for line in told(lines, "audit").splitlines()]
    assert events == ["grant", "outcome", "closed"]
    block = contents("weights.safetensors", 1 << 20)[5000:5026]
    written = [path for path in world.scene.directory.rglob("*") if path.is_file() and block in path.read_bytes()]
    assert written == []
    assert list((world.containers / "approved/rootfs/models").rglob("*")) == [
        world.containers / "approved/rootfs/models/small"
    ]
    assert "/models/small" not in Path("/proc/self/mountinfo").read_text()


def test_another_command_line_is_refused_by_the_tpm_and_the_workload_is_told(world: World) -> None:
    lines = run_container(world, "changed", command_line=f"{COMMAND_LINE} audit=0")
    assert told_pcrs(lines)[12] != bytes(32)  # what systemd-stub did not find in the image
    assert any(line.startswith("code: 35") for line in lines), lines
    assert any(line.startswith("reason: BootStateRefused") for line in lines)
    assert any(line.startswith("remedy: ") for line in lines)
    digests = [hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()]
    assert not any(digest in line for line in lines for digest in digests)
    assert next(json.loads(line)["event"] for line in told(lines, "audit").splitlines()) == "refused"
