"""`make demo`: the main job, step by step, as its three users would type it; everything is real but the TPM.

A model's owner packs a real model for one device; the device's TPM (swtpm, a software TPM: named as such everywhere)
releases the key; podman starts a container, under runc and under crun, that reads the model with the safetensors
library; then the plaintext is looked for on the host, and four containers are refused.

Run as root from the checkout. Nothing outside a temporary folder below /var/tmp and build/ is changed, and the folder
is removed at the end; --keep keeps it. Exit code 0 only if everything was as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.demo.model import model_folder
from tests.demo.plaintext import Swap, marker_of, page_out, search
from tests.demo.workload.image import workload_image
from tests.scene import TOKEN_PATH, Scene

MODEL, PATH = "minilm", "/models/minilm"
OTHER_SUBJECT = "system:serviceaccount:shop:mailer"
CHECKOUT = Path(__file__).parents[2]


class DemoError(RuntimeError):
    """Something was not as the demo says it is."""


def expect(condition: bool, what: str) -> None:
    """End the demo if something is not as it says."""
    if not condition:
        raise DemoError(what)


class Demo:
    """The steps; each prints what it does and checks what it claims."""

    def __init__(self, scene: Scene, model: Path) -> None:
        self.scene = scene
        self.model = model
        self.began = time.monotonic()
        self.began_at = time.time() - 1  # a file's time stamps are those of the last tick
        self.out = scene.usb / f"{MODEL}-1"
        self.image = ""

    def heading(self, number: int, text: str) -> None:
        """Begin a step."""
        print(f"\n{number}. {text}   [{time.monotonic() - self.began:.0f} s]", flush=True)

    def run(self) -> None:
        """All steps."""
        scene = self.scene
        self.heading(1, "A software TPM (swtpm, NOT a TPM chip), with an EK certificate by a CA of the demo's own")
        scene.tpm.measure_boot()
        print("  started; it booted nothing, so named measurements were extended into its PCRs")
        scene.keygen()
        self.heading(2, "Enrolment: four files between host and owner; a USB stick would do")
        scene.enrol()
        self.heading(3, "The owner packs, approves the boot state and grants; the operator trusts, adds and installs")
        self.pack()
        self.heading(4, "An identity token, as Kubernetes would give (a local issuer; its JWK set is on the disk)")
        token = scene.token()
        self.heading(5, "podman runs the application, which just opens files")
        self.image = workload_image(scene.podman)
        for runtime in ("runc", "crun"):
            self.run_workload(runtime, token)
        self.heading(6, "Where is the plaintext? Looked for from the host, with a swap file on")
        self.look_for_plaintext()
        self.heading(7, "Four refusals; each time the application is never started")
        self.refuse()

    def pack(self) -> None:
        scene = self.scene
        fields = scene.owner / "fields.json"
        fields.write_text(
            '{"framework": "safetensors", "licence": "Apache-2.0", '
            '"privacy": {"method": "differential privacy", "epsilon": 3.0, "delta": 1e-06}}'
        )
        scene.pack(self.model, name=MODEL, extra=("--fields", str(fields)))
        scene.grant(self.out, name=MODEL)
        scene.trust()
        scene.add(self.out)
        scene.install()

    def workload(self, runtime: str, token: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
        """Run the application."""
        words = ["--model", PATH, *command]
        return self.scene.run(self.image, words, model=f"{MODEL}:1", token=token, runtime=runtime)

    def leaves_a_trace(self, token: Path | None) -> tuple[subprocess.CompletedProcess[str], bool]:
        """Start a container whose first act is to make a file on the host; returns whether it did."""
        trace = self.scene.host / "trace"
        shutil.rmtree(trace, ignore_errors=True)
        trace.mkdir()
        python = os.path.realpath(sys.executable)
        options = ["--volume", f"{trace}:/trace", "--entrypoint", python]
        words = ["-c", "open('/trace/ran', 'w').close()"]
        done = self.scene.run(self.image, words, model=f"{MODEL}:1", token=token, options=options)
        return done, (trace / "ran").exists()

    def run_workload(self, runtime: str, token: Path) -> None:
        print(
            f"$ podman --runtime {runtime} run --rm --annotation smm.scz/model={MODEL}:1 "
            f"-v TOKEN:{TOKEN_PATH}:ro workload",
            flush=True,
        )
        done = self.workload(runtime, token)
        expect(done.returncode == 0, f"the workload under {runtime} ended with {done.returncode}: {done.stderr}")
        for line in done.stdout.splitlines():
            print(f"  {line}")
        expect("kings" in done.stdout and "queen" in done.stdout, "the weights are not the real ones")
        mount = next(line for line in done.stdout.splitlines() if line.startswith("mount: "))
        for flag in ("ro", "nosuid", "nodev", "noexec", "nosymfollow"):
            expect(flag in mount.split()[6].split(","), f"the mount lacks {flag}: {mount}")

    # --- 6 ---

    def look_for_plaintext(self) -> None:
        scene, marker = self.scene, marker_of(self.model / "model.safetensors")
        before = Path("/proc/self/mountinfo").read_text()
        folders = [scene.host, scene.usb, scene.podman.directory, Path("/run"), Path("/tmp"), Path("/dev/shm")]
        with Swap(scene.directory) as swap, self.held_container() as pid:
            inside = Path(f"/proc/{pid}/root{PATH}/model.safetensors")
            own = [line.split()[2] for line in _lines(Path(f"/proc/{pid}/mountinfo")) if line.split()[4] == PATH]
            expect(marker in inside.read_bytes(), "the container does not hold the plaintext")
            print("  the container holds it (control: found in its memory file system)")
            expect(search(marker, self.model)[1] != [], "the search does not find the owner's own copy")
            print("  the search works (control: found in the owner's own copy)")
            new = set(Path("/proc/self/mountinfo").read_text().splitlines()) - set(before.splitlines())
            expect(not any(PATH in line.split()[4] for line in new), "the model is mounted on the host")
            searched, found = search(marker, *folders, but_not=self.model, since=self.began_at)
            expect(found == [], f"plaintext on the host: {found}")
            print(f"  on no path: {searched} files of host, store, podman's layers, /run, /tmp, /dev/shm; and no mount")
            expect(swap.control(), "the control did not reach the swap file: is zswap on?")
            page_out(inside)
            expect(not swap.holds(marker), "plaintext in the swap file")
            print(
                "  not in swap, though the kernel was asked to page it out (control: an ordinary tmpfs's page is there)"
            )
        expect(PATH not in Path("/proc/self/mountinfo").read_text(), "a mount is left")
        expect(search(marker, *folders, but_not=self.model, since=self.began_at)[1] == [], "plaintext is left")
        # Other containers of this machine may have a model at that path: it is this one's file system that is gone.
        mounts = [
            found
            for found in Path("/proc").glob("[0-9]*/mountinfo")
            if any(line.split()[4] == PATH and line.split()[2] in own for line in _lines(found))
        ]
        expect(mounts == [], f"processes still hold the mount: {mounts}")
        print("  gone with the container: no process has the mount, no file has the bytes")

    @contextlib.contextmanager
    def held_container(self) -> Iterator[int]:
        """A container that holds the model while the block lasts; its pid."""
        podman = self.scene.podman
        words = [
            "--rm",
            "--interactive",
            "--annotation",
            f"smm.scz/model={MODEL}:1",
            "--name",
            "held",
            "--volume",
            f"{self.scene.token('held-token')}:{TOKEN_PATH}:ro",
            self.image,
            "--model",
            PATH,
            "--hold",
        ]
        process = podman.spawn(words)
        try:
            expect(process.stdout is not None and process.stdin is not None, "no pipes to the container")
            for line in process.stdout or ():
                if line.strip() == "holding":
                    break
            else:
                raise DemoError(f"the container did not start: {process.stderr.read() if process.stderr else ''}")
            yield int(podman.inspect("held")["State"]["Pid"])
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(60)

    # --- 7 ---

    def refuse(self) -> None:
        scene = self.scene
        expect(self.leaves_a_trace(scene.token())[1], "a container that may run leaves no trace")
        print("  (control: a container that is let in leaves a trace on the host)")
        self.refused("no token", None, 18)
        self.refused("another workload's token", scene.token("mailer", subject=OTHER_SUBJECT), 40)
        scene.tpm.extend(9, "another kernel and initrd")
        self.refused("PCR 9 has changed: another kernel was booted", scene.token(), 35)
        self.approve_new_state()
        layer = self.largest_layer()
        flip_bit(layer)
        self.refused("one bit of the bundle is flipped", scene.token(), 45)
        flip_bit(layer)

    def refused(self, what: str, token: Path | None, code: int) -> None:
        self.scene.forget_refusals()
        done, ran = self.leaves_a_trace(token)
        print(f"  {what}: podman ends with {done.returncode}")
        why = self.scene.why()
        expect(done.returncode != 0, f"{what}: the container ran")
        expect(not ran, f"{what}: the workload left a trace")
        expect(why.get("code") == code, f"{what}: sczctl why says {why}")
        print(f"    {why['reason']} ({why['code']}): {why['message']}\n    remedy: {why['remedy']}")

    def approve_new_state(self) -> None:
        """The owner signs the new state; nothing is packed or granted again."""
        scene, keys = self.scene, self.scene.owner / "keys"
        print("  the owner approves the new state, without packing or granting again:")
        scene.sczctl("boot-policy", "measure", "--device", "edge-1", "-o", scene.usb / "measured.json")
        scene.sczctl(
            "boot-policy",
            "sign",
            "--keys",
            keys,
            "--model",
            MODEL,
            "--device",
            "edge-1",
            "--measured",
            scene.usb / "measured.json",
            "--pcr",
            "4,7,8,9",
            "-o",
            scene.usb / "new-policy.json",
        )
        scene.sczctl("add", scene.usb / "new-policy.json")
        done = self.workload("crun", scene.token())
        expect(done.returncode == 0, f"the new boot policy did not let it in: {done.stderr}")
        print("  and the container runs again")

    def largest_layer(self) -> Path:
        """The encrypted weights in the host's store."""
        blobs = (path for path in (self.scene.store / "models").rglob("*") if path.is_file())
        return max(blobs, key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def _lines(path: Path) -> list[str]:
    """The lines of a file of /proc; none if the process is gone."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the demo's folder, and say where it is")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("make demo needs root: it mounts, and runs containers", file=sys.stderr)
        return 2
    print("fetching the model (83 MB, once) …", flush=True)
    model = model_folder(CHECKOUT / "build" / "model")
    folder = Path(tempfile.mkdtemp(prefix="scz-demo.", dir="/var/tmp"))
    began = time.monotonic()
    try:
        with Scene(folder, say=lambda line: print(line, flush=True)) as scene:
            Demo(scene, model).run()
    except DemoError as wrong:
        print(f"\nNOT as it should be: {wrong}", file=sys.stderr)
        return 1
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\nAll of it was as it should be, in {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
