"""The signer of an operating system's unified kernel images: a key, and systemd-measure(1) that signs PCR 11 with it.

What a stub and systemd's boot phases measure is extended into the software TPM: each section's name with its NUL, each
section's bytes, then each phase's word. Needs systemd-measure (of Debian's package systemd) and openssl.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.software_tpm import BOOT_MEASUREMENTS, SoftwareTpm

MEASURE = "/usr/lib/systemd/systemd-measure"
PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")
IMAGE: Mapping[str, str] = {
    "linux": "kernel 6.12.1",
    "osrel": "ID=example",
    "cmdline": "ro quiet",
    "initrd": "initrd 1",
}
UPDATE: Mapping[str, str] = {**IMAGE, "linux": "kernel 6.12.2", "initrd": "initrd 2"}
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TSS2_LOG": "all+none"}


class PcrSigner:
    """A signer whose keys lie in `folder`, which is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.private, self.public = folder / "pcr.key", folder / "pcr.pem"
        self._run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", self.private)
        self._run("openssl", "pkey", "-in", self.private, "-pubout", "-out", self.public)

    def sign(self, tpm: SoftwareTpm, image: Mapping[str, str] = IMAGE, *, phases: Sequence[str] = ()) -> bytes:
        """What systemd-measure writes for an image.

        Args:
            tpm: For its trial sessions.
            image: Sections by name.
            phases: Phase paths, as `enter-initrd:leave-initrd`; none: systemd's own four.
        """
        words = []
        for name, text in image.items():
            (self.folder / name).write_text(text)
            words.append(f"--{name}={self.folder / name}")
        words += [f"--phase={phase}" for phase in phases]
        keys = (f"--private-key={self.private}", f"--public-key={self.public}")
        return self._run(MEASURE, "sign", *words, "--bank=sha256", f"--tpm2-device={tpm.tcti}", *keys)

    @staticmethod
    def _run(*words: str | Path) -> bytes:
        return subprocess.run(words, env=_ENVIRONMENT, capture_output=True, check=True, timeout=60).stdout


def boot_image(tpm: SoftwareTpm, image: Mapping[str, str] = IMAGE, *, changes: Mapping[int, str] | None = None) -> None:
    """Turn a machine off and on; it boots a unified kernel image, up to the last phase; `changes` by PCR but 11."""
    tpm.restart()
    for pcr, name in {**BOOT_MEASUREMENTS, **(changes or {})}.items():
        if pcr != 11:
            tpm.extend(pcr, name)
    for section, text in image.items():
        tpm.extend(11, f".{section}\0")
        tpm.extend(11, text)
    for phase in PHASES:
        tpm.extend(11, phase)


def changed(data: bytes, **members: Any) -> bytes:
    """A signature file whose every entry of the SHA-256 bank has these members instead."""
    document = json.loads(data)
    document["sha256"] = [{**entry, **members} for entry in document["sha256"]]
    return json.dumps(document).encode()
