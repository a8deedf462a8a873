"""Makes the image of the demo's workload from this machine's own files, without any registry.

A root file system of the system's Python, its standard library, the shared libraries that `ldd` names, and numpy and
safetensors from the virtual environment that runs this. About 100 MB; no shell, no secret, no model. The virtual
environment has to stand on the system's Python (`python3 -m venv`), as the Makefile's does.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from tests.engines import Podman

IMAGE = "localhost/scz-workload:demo"

_PACKAGES = ("numpy", "numpy.libs", "safetensors")
_FOLDERS_LEFT_OUT = {"tests", "test", "f2py", "include", "distutils", "idlelib", "ensurepip", "tkinter", "turtledemo"}
_FOLDERS_LEFT_OUT |= {"lib2to3", "pydoc_data", "site-packages", "dist-packages"}
_SUFFIXES_LEFT_OUT = (".a", ".pyi", ".h", ".c", ".pyx", ".pxd", ".opt-1.pyc", ".opt-2.pyc")
_EMPTY_FOLDERS = ("dev", "etc", "models", "proc", "root", "run", "sys", "tmp")


def workload_image(podman: Podman) -> str:
    """Import the workload's image, a few seconds; arguments of a container go to workload.py. Returns the tag."""
    if podman.call("image", "exists", IMAGE, check=False).returncode == 0:
        return IMAGE
    entry = f'ENTRYPOINT ["{_python()}", "/workload/workload.py"]'
    return podman.import_image(write_root, IMAGE, changes=[entry, "ENV LC_ALL=C.UTF-8", "WORKDIR /workload"])


def write_root(stream: IO[bytes]) -> None:
    """Write the root file system as a tar archive."""
    site = Path(sysconfig.get_path("platlib"))
    library = Path(sysconfig.get_path("stdlib"))
    files = {path: path for path in (_python(), *_pruned(library))}
    for package in _PACKAGES:
        files |= {path: Path("/workload") / path.relative_to(site) for path in _pruned(site / package)}
    files[Path(__file__).with_name("workload.py")] = Path("/workload/workload.py")
    binaries = [path for path in files if path == _python() or ".so" in path.name]
    files |= {path: path for path in _shared_libraries(binaries)}
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for name in _EMPTY_FOLDERS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)
        for link in ("bin", "lib", "lib64", "sbin"):  # as the system has them since /usr was merged
            if (Path("/") / link).is_symlink():
                entry = tarfile.TarInfo(link)
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(f"/{link}")
                archive.addfile(entry)
        for source, place in files.items():
            _add(archive, source, place)


def _python() -> Path:
    """The interpreter itself, beneath every symbolic link."""
    return Path(sys.executable).resolve()


def _pruned(folder: Path) -> Iterator[Path]:
    """The files below a folder that running programs need."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _FOLDERS_LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if not name.endswith(_SUFFIXES_LEFT_OUT):
                yield Path(parent) / name


def _shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """What the dynamic linker would load for these, the linker included, beyond what lies beside them."""
    listed = subprocess.run(
        ["/usr/bin/ldd", *map(str, binaries)], env={"LC_ALL": "C"}, capture_output=True, text=True, check=True
    )
    found = {Path(name) for name in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed.stdout, re.MULTILINE)}
    packages = Path(sysconfig.get_path("platlib"))
    # the folder's own path, not the links to it: an archive's entry below a link would need the link first
    return {path.parent.resolve() / path.name for path in found if not path.is_relative_to(packages)}


def _add(archive: tarfile.TarFile, source: Path, place: Path) -> None:
    content = source.read_bytes()  # through links: an image has no use for Debian's
    entry = tarfile.TarInfo(str(place).lstrip("/"))
    entry.size, entry.mode = len(content), 0o755 if os.access(source, os.X_OK) else 0o644
    # bytecode is valid for one time of its source, in whole seconds
    entry.mtime = int(source.stat().st_mtime)
    archive.addfile(entry, io.BytesIO(content))
