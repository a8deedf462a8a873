"""Unified kernel images for the tests: the distribution's systemd-stub with sections of our own, joined by objcopy."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.guest_image import STUB, image_end

# In the order of the stub's measurement. The kernel is none: nobody starts these images.
SECTIONS = {
    ".linux": b"MZ of no kernel\n" * 1000,
    ".osrel": b"ID=tests\nVERSION_ID=1\n",
    ".cmdline": b"root=/dev/vda1 ro quiet\0",
    ".initrd": b"070701 of no initrd\n" * 500,
    ".pcrpkey": b"-----BEGIN PUBLIC KEY-----\n",
}


def write_unified_image(path: Path, sections: Mapping[str, bytes]) -> Path:
    """Write an image with these sections behind the stub's own."""
    words, place = ["objcopy"], image_end(STUB.read_bytes())
    parts = []
    for name, contents in sections.items():
        part = path.with_name(f"{path.name}{name}.part")
        part.write_bytes(contents)
        parts.append(part)
        words += ["--add-section", f"{name}={part}", "--set-section-flags", f"{name}=data,readonly"]
        words += ["--change-section-vma", f"{name}={place:#x}"]
        place += -(-len(contents) // 0x10000) * 0x10000
    subprocess.run([*words, STUB, path], check=True)
    for part in parts:
        part.unlink()
    return path
