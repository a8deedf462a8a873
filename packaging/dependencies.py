"""The run-time dependencies that packages carry: downloaded by requirements.lock, checked by hash, put side by side.

tpm2-pytss, which PyPI has as source, is built; all else is carried byte for byte (docs/adr/0010-packages.md).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from programs import PackageError, run

#: For each of them its own `_cffi_backend` is carried; all else that is compiled has the stable ABI.
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
BEFORE_PYTHON = "3.15"


def collect_dependencies(source: Path, work: Path) -> Path:
    """Download what requirements.lock pins, build tpm2-pytss, and put all of it into one folder.

    Raises:
        PackageError: Two wheels have different files of one name.
    """
    downloads, wheels, target = work / "downloads", work / "wheels", work / "dependencies"
    for folder in (downloads, wheels, target):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    blocks = lock_blocks((source / "requirements.lock").read_text())
    sdist = work / "sdist.lock"
    sdist.write_text(blocks["tpm2-pytss"])
    rest = work / "wheels.lock"
    rest.write_text("".join(text for name, text in blocks.items() if name != "tpm2-pytss"))
    checked = ("download", "--no-deps", "--require-hashes", "--dest")
    pip(*checked, str(downloads), "--no-build-isolation", "--no-binary=:all:", "-r", str(sdist))
    for version in PYTHONS:
        pip(*checked, str(wheels), "--only-binary=:all:", "--python-version", version, "-r", str(rest))
    (archive,) = downloads.iterdir()
    build_wheel(archive, work / "unpacked", wheels)
    for wheel in sorted(wheels.iterdir()):
        unpack_wheel(wheel, target)
    return target


def lock_blocks(text: str) -> dict[str, str]:
    """A lock's entries by project: the pinned line with its hashes."""
    blocks = re.findall(r"^((\S+)==\S+ \\\n(?: +--hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {name: block for block, name in blocks}


def build_wheel(archive: Path, folder: Path, wheels: Path) -> None:
    """Build a source archive, stripped: debugging information would tell where it was built."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run(["/usr/bin/tar", "--extract", "--no-same-owner", f"--file={archive}", f"--directory={folder}"])
    (place,) = folder.iterdir()
    flags = f"{os.environ.get('CFLAGS', '')} -g0 -ffile-prefix-map={place.resolve()}=."
    offline = ("--no-index", "--no-deps", "--no-cache-dir", "--no-build-isolation")
    directory = ("--wheel-dir", str(wheels.resolve()))
    pip("wheel", *offline, *directory, ".", cwd=place, CFLAGS=flags.strip(), LDFLAGS="-Wl,--strip-all")


def unpack_wheel(wheel: Path, target: Path) -> None:
    """Put a wheel's modules into the folder; what pip would only need to install or remove it stays out."""
    with zipfile.ZipFile(wheel) as packed:
        for info in packed.infolist():
            parts = Path(info.filename).parts
            if info.is_dir() or parts[0].endswith(".data") or _is_pips(parts):
                continue
            path, data = target / info.filename, packed.read(info)
            if path.exists() and path.read_bytes() != data:
                raise PackageError(f"{wheel.name}: {info.filename} differs from that of another wheel")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _is_pips(parts: tuple[str, ...]) -> bool:
    return parts[0].endswith(".dist-info") and parts[-1] in (
        "RECORD",
        "WHEEL",
        "INSTALLER",
        "top_level.txt",
        "zip-safe",
    )


def pip(*words: str, cwd: Path | None = None, **environment: str) -> None:
    """Run the virtual environment's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet", *words]
    run(command, cwd=cwd, environment=environment)
