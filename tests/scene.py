"""A whole scene for the demo and the integration tests: an owner, a host with a software TPM, and podman.

Every step is a `sczctl` command in a process of its own, as its user would type it. Everything lies below one folder,
also what would be below /etc, /var and /run on a real host, so that nothing of the machine's own is touched. The TPM is
swtpm: it keeps its promises to whoever cannot read its state directory, which is why it is a stand-in and not a TPM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.engines import Podman
from tests.software_tpm import SoftwareTpm

SUBJECT = "system:serviceaccount:shop:recommender"
ISSUER = "https://host.example/scz"
AUDIENCE = "scz-smm"
TOKEN_PATH = "/var/run/secrets/scz-smm/token"
SCZCTL = [os.path.join(os.path.dirname(sys.executable), "sczctl")]

COVERED = "4,7,8,9"


class Scene:
    """The scene below `directory`; a context manager that ends the TPM and the containers that it started.

    Args:
        directory: Empty, root's own, with a short path (a socket lies in it).
        say: Called with each line that a person should see.
    """

    def __init__(self, directory: Path, *, say: Callable[[str], None] = lambda _line: None) -> None:
        self.directory = directory
        self.say = say
        self.host, self.owner, self.usb = (directory / name for name in ("host", "owner", "usb"))
        self.config = self.host / "config.toml"
        self.hooks = self.host / "hooks.d"
        self.runtime_directory = self.host / "run"
        self.audit = self.host / "audit.jsonl"
        self.image = ""
        self.store = self.host / "store"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        with contextlib.ExitStack() as stack:
            for folder in (self.host, self.owner, self.usb, self.hooks):
                folder.mkdir(mode=0o755)
            self.tpm = stack.enter_context(SoftwareTpm(self.directory / "tpm"))
            self.podman = stack.enter_context(Podman(self.directory / "podman", hooks_directories=[self.hooks]))
            self._stack = stack.pop_all()
        self.write_config()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write_config(self, **changes: str) -> None:
        """Write the host's configuration; `changes` are whole `[section]` texts that are appended."""
        lines = [
            'engine = "podman"',
            f'[tpm]\ntcti = "{self.tpm.tcti}"\ntimeout_seconds = 60',
            f'[paths]\nstore = "{self.store}"\ntrust = "{self.host}/trust"\nruntime = "{self.runtime_directory}"',
            f'audit = "{self.audit}"',
            *changes.values(),
        ]
        self.config.write_text("\n".join(lines) + "\n")

    def sczctl(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command as a person would; a failure raises with what it said."""
        words = [str(argument) for argument in arguments]
        self.say("$ sczctl " + shlex.join(word.replace(f"{self.directory}/", "") for word in words))
        done = subprocess.run(
            [*SCZCTL, "--config", str(self.config), *words], capture_output=True, text=True, timeout=300, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"sczctl {shlex.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        for line in done.stdout.strip().splitlines() if check else ():
            self.say("  " + line)
        return done

    # --- the steps ---

    def keygen(self) -> None:
        """The owner makes keys and a folder with the manufacturers' roots whose TPMs are accepted."""
        self.sczctl("keygen", "--keys", self.owner / "keys", "--name", "acme", "--no-passphrase")
        roots = self.owner / "ek-roots"
        roots.mkdir()
        for certificate in self.tpm.ca_certificates:
            (roots / Path(certificate).name).write_bytes(Path(certificate).read_bytes())

    def enrol(self, device: str = "edge-1") -> None:
        """Four files between the host and the owner."""
        keys, usb, roots = self.owner / "keys", self.usb, self.owner / "ek-roots"
        self.sczctl("enroll", "request", "--owner", keys / "owner.json", "--device", device, "-o", usb / "request.json")
        self.sczctl(
            "enroll",
            "challenge",
            usb / "request.json",
            "--keys",
            keys,
            "--ek-roots",
            roots,
            "-o",
            usb / "challenge.json",
        )
        self.sczctl("enroll", "answer", usb / "challenge.json", "-o", usb / "answer.json")
        self.sczctl("enroll", "accept", usb / "answer.json", "--keys", keys, "--ek-roots", roots)

    def pack(self, source: Path, *, name: str, version: str = "1", extra: Sequence[str] = ()) -> Path:
        """The owner packs a folder; returns the folder that travels to the host."""
        out = self.usb / f"{name}-{version}"
        out.mkdir()
        self.sczctl(
            "pack",
            source,
            "-o",
            out / "bundle",
            "--keys",
            self.owner / "keys",
            "--name",
            name,
            "--version",
            version,
            "--issuer",
            ISSUER,
            "--audience",
            AUDIENCE,
            "--subject",
            SUBJECT,
            *extra,
        )
        return out

    def grant(self, out: Path, *, name: str, version: str = "1", device: str = "edge-1") -> None:
        """The owner grants the version to the device and signs a boot policy from the device's enrolment."""
        self.sczctl(
            "boot-policy",
            "sign",
            "--keys",
            self.owner / "keys",
            "--model",
            name,
            "--device",
            device,
            "--pcr",
            COVERED,
            "-o",
            out / "boot-policy.json",
        )
        self.sczctl(
            "grant", f"{name}:{version}", "--keys", self.owner / "keys", "--device", device, "-o", out / "grant.jwt"
        )

    def trust(self) -> None:
        """The operator trusts the owner and makes the host's own token issuer."""
        self.sczctl("trust", "add", "owner", self.owner / "keys" / "owner.json")
        self.sczctl("token", "init", "--issuer", ISSUER, "-o", self.host / "issuer.json")
        self.sczctl("trust", "add", "issuer", self.host / "issuer.json")

    def add(self, out: Path) -> None:
        """The operator puts what travelled into the store."""
        self.sczctl("add", out)

    def install(self) -> None:
        """The operator makes podman call the hook."""
        self.sczctl("install", "--engine", "podman", "--hooks-dir", self.hooks)

    def prepare(self, source: Path, *, name: str, version: str = "1", extra: Sequence[str] = ()) -> Path:
        """Everything up to a container's start; returns the folder that travelled."""
        self.tpm.measure_boot()
        self.keygen()
        self.enrol()
        out = self.pack(source, name=name, version=version, extra=extra)
        self.grant(out, name=name, version=version)
        self.trust()
        self.add(out)
        self.install()
        return out

    def token(self, name: str = "token", *, subject: str = SUBJECT, ttl_seconds: int = 600) -> Path:
        """Issue a token; returns its file."""
        path = self.host / name
        self.sczctl(
            "token",
            "issue",
            "--subject",
            subject,
            "--audience",
            AUDIENCE,
            "--ttl",
            str(ttl_seconds),
            "-o",
            path,
            "--force",
        )
        return path

    def run(
        self,
        image: str,
        command: Sequence[str],
        *,
        model: str,
        token: Path | None,
        runtime: str = "runc",
        annotations: Mapping[str, str] = {},
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """`podman run --rm` with our annotations; returns what it did."""
        words = ["--rm", "--annotation", f"smm.scz/model={model}"]
        for key, value in annotations.items():
            words += ["--annotation", self._annotation(f"{key}={value}")]
        if token is not None:
            words += ["--volume", f"{token}:{TOKEN_PATH}:ro"]
        return self.podman.run([*words, *options, image, *command], runtime=runtime, check=False)

    def _annotation(self, text: str) -> str:
        """podman before 5 reads a line of CSV there."""
        if '"' not in text or int(self.podman.call("--version").stdout.split()[-1].split(".")[0]) >= 5:
            return text
        return '"' + text.replace('"', '""') + '"'

    def why(self) -> dict[str, object]:
        """What `sczctl why --json` says of the last refusal."""
        done = self.sczctl("why", "--json", check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def forget_refusals(self) -> None:
        """So that `why` cannot answer with an older one."""
        for path in (self.runtime_directory / "last").glob("*.json"):
            path.unlink()
