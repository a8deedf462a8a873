"""The packages, built once, and two fresh Debian systems, made meanwhile; nothing is kept for the next run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook import __version__
from tests.fresh_root import FreshRoot
from tests.suites import machine_suite

ROOT = Path(__file__).resolve().parents[2]
#: A deb that was built on bookworm runs on both; one that was built later needs what that suite has.
SUITES = ("bookworm", "trixie") if machine_suite() == "bookworm" else (machine_suite(),)
TOOLS = ROOT / "build/package/venv/bin"
OLDER = "0.0.9"


@dataclass(frozen=True)
class Packages:
    """The two packages, and the deb of the version before: the same tree, but for what `older_sources` changes."""

    deb: Path
    rpm: Path
    older_deb: Path
    older_rpm: Path
    epoch: int


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program of this machine; what it printed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_sources(folder: Path) -> Path:
    """The checkout as it is now, without anything that was built."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources: Path, *options: str | Path, epoch: int) -> tuple[Path, Path]:
    """Build the packages from other sources; the deb and the rpm."""
    program = sources / "packaging/build_package.py"
    printed = run(TOOLS / "python", program, *options, cwd=sources, SOURCE_DATE_EPOCH=str(epoch))
    deb, rpm = (Path(line.rpartition(" (")[0]) for line in printed.splitlines())
    return deb, rpm


def older_sources(folder: Path) -> Path:
    """The sources as an earlier version might have had them: its number, a module and a line of configuration more."""
    sources = copy_sources(folder)
    (sources / "oci_hook/__init__.py").write_text(f'"""The version before."""\n\n__version__ = "{OLDER}"\n')
    config = sources / "config/config.toml"
    config.write_text(config.read_text() + "# A line that the next version does not have.\n")
    (sources / "oci_hook/gone.py").write_text('"""A module that the next version does not have."""\n')
    return sources


def _packages() -> Packages:
    run("make", "package")
    epoch = int(run("git", "log", "-1", "--format=%ct"))
    found = {path.suffix: path for path in (ROOT / "dist").glob(f"scz-smm_{version()}_*")}
    with tempfile.TemporaryDirectory(prefix="scz-older.", dir="/var/tmp") as folder:
        output = ROOT / "build/package/older"
        options = ("--dependencies", ROOT / "build/package/dependencies", "--output", output)
        older = build(older_sources(Path(folder)), *options, epoch=epoch - 86_400)
    return Packages(found[".deb"], found[".rpm"], *older, epoch)


def version() -> str:
    """The version of the sources."""
    return __version__


def _prepare(suite: str, folder: Path) -> FreshRoot:
    return FreshRoot(suite, folder).make()


@pytest.fixture(scope="session")
def _making() -> Iterator[tuple[Future[Packages], dict[str, Future[FreshRoot]]]]:
    place = Path(tempfile.mkdtemp(prefix="scz-roots.", dir="/var/tmp"))
    with ThreadPoolExecutor(3) as pool:
        roots = {suite: pool.submit(_prepare, suite, place / suite) for suite in SUITES}
        yield pool.submit(_packages), roots
    subprocess.run(["rm", "-rf", "--one-file-system", str(place)], check=True)


@pytest.fixture(scope="session")
def packages(_making: tuple[Future[Packages], dict[str, Future[FreshRoot]]]) -> Packages:
    """Both packages, built by `make package`."""
    return _making[0].result()


@pytest.fixture(scope="session", params=SUITES)
def root(
    request: pytest.FixtureRequest, _making: tuple[Future[Packages], dict[str, Future[FreshRoot]]]
) -> Iterator[FreshRoot]:
    """A fresh system, entered; each suite's in its turn."""
    with _making[1][request.param].result() as entered:
        entered.apt("update")
        yield entered


@pytest.fixture(scope="module")
def clean(root: FreshRoot) -> FreshRoot:
    """The system without the package and what it left, whatever an earlier module did to it, and however it ended."""
    if root.call("dpkg-query", "--show", "scz-smm", check=False).returncode == 0:
        root.call("apt-get", "-yq", "purge", "scz-smm")
    traces = (f"/{place}/scz-smm" for place in ("etc", "var/lib", "var/log", "run", "usr/lib", "usr/local/libexec"))
    root.call("rm", "-rf", "--one-file-system", *traces)
    return root
