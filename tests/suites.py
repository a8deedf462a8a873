"""Runtimes and engines of other Debian suites, runnable on this machine: `program("sid", "runc")`.

They come from the machine's own Debian mirror, which apt says, with the machine's proxies and Debian's keys, but into
an apt state of their own: nothing is installed, nothing of the machine's apt changes. The packages and what they depend
on are unpacked below build/suites; a program that is linked dynamically is copied and given the suite's own dynamic
loader and libraries (patchelf), so that it also runs where the C library is older. It remains the suite's binary under
its own name: /proc/PID/exe of a running one ends in `/runc`, `/crun`, `/runsc`.

If the machine itself is of the suite and has the program, that one is it. What was unpacked serves for a day, and is
made anew if the folder was moved. What a suite does not have today is `NotInSuite`; all that fails is `SuiteError`.
Needs apt, a Debian mirror, dpkg, patchelf.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SUITES = ("trixie", "sid")
#: The package of each program.
PACKAGES = {
    "runc": "runc",
    "kustomize": "kustomize",
    "crun": "crun",
    "runsc": "runsc",
    "containerd": "containerd",
    "ctr": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "dockerd": "docker.io",
    "docker": "docker-cli",
}

_FOLDER = Path(__file__).resolve().parent.parent / "build" / "suites"
_KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DAY_SECONDS = 86_400
_APT_SECONDS = 300
_QUICK_SECONDS = 60
_APT_FORMAT = "$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)"


class SuiteError(RuntimeError):
    """The suite could not be reached, or one of its programs could not be made to run here."""


class NotInSuite(SuiteError):
    """The suite has no such package today, or none that can be installed."""


def program(suite: str, name: str) -> Path:
    """The absolute path of a suite's program, runnable by root on this machine.

    Args:
        suite: One of `SUITES`.
        name: One of `PACKAGES`.

    Raises:
        NotInSuite: The suite does not have it today.
        SuiteError: It could not be fetched or made to run.
    """
    if suite not in SUITES or name not in PACKAGES:
        raise ValueError(f"{suite}/{name} is not offered here")
    own = shutil.which(name, path=_PATH) if suite == machine_suite() else None
    return Path(own) if own else _Suite(suite).program(name)


def version(path: Path) -> str:
    """The first line of what a program says of its version; it runs, then.

    Raises:
        SuiteError: It does not.
    """
    option = "-v" if path.name.startswith("containerd-shim") else "--version"
    said = _run([str(path), option], seconds=_QUICK_SECONDS).strip()
    if not said:
        raise SuiteError(f"{path} {option} said nothing")
    return said.splitlines()[0]


def package_version(suite: str, name: str) -> str:
    """The version of the package that `program` took a program from.

    Raises:
        SuiteError: As `program`.
    """
    path, package = program(suite, name), PACKAGES[name]
    if not path.is_relative_to(_FOLDER):
        return _run(["dpkg-query", "--show", "--showformat=${Version}", package], seconds=_QUICK_SECONDS).strip()
    return _Suite(suite).ready_mark(package).read_text().splitlines()[1]


@functools.cache
def machine_suite() -> str:
    """The code name of the Debian that this machine runs; empty if it does not say."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip().strip('"')
    return ""


@functools.cache
def mirror() -> str:
    """The URI of the machine's own Debian archive: where the suite that it runs comes from."""
    suites = {machine_suite(), "stable", "testing", "unstable", "sid"} - {""}
    for line in _run(["apt-get", "indextargets", "--format", _APT_FORMAT], seconds=_QUICK_SECONDS).splitlines():
        kind, component, release, uri = line.split(maxsplit=3)
        if (kind, component) == ("Packages", "main") and release in suites:
            return uri
    raise SuiteError("apt on this machine knows no Debian archive: no suite can be had")


class _Suite:
    """One suite's apt state, unpacked packages and programs below build/suites/SUITE."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.folder = _FOLDER / suite
        self.root, self.programs = self.folder / "root", self.folder / "bin"

    def ready_mark(self, package: str) -> Path:
        """It is there when the package is; where it was unpacked, and its version."""
        return self.folder / "ready" / package

    def program(self, name: str) -> Path:
        """Unpack the program's package if it is not there."""
        package = PACKAGES[name]
        with self._locked():
            self._forget_the_old()
            if not self.ready_mark(package).exists():
                self._update()
                found = self._fetch(package)
                for one in [one for one, owner in PACKAGES.items() if owner == package]:
                    self._make_runnable(one)
                self.ready_mark(package).write_text(f"{self.folder}\n{found}\n")
        path = self.programs / name
        if not path.exists():
            raise NotInSuite(f"{self.suite}'s package {package} has no {name}")
        return path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with (_FOLDER / f"{self.suite}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held while others fetch, which is bounded
            yield

    def _forget_the_old(self) -> None:
        """Start from nothing if what is there was made yesterday, or for another place."""
        made = self.folder / "made"
        if made.exists():
            place, seconds = made.read_text().splitlines()
            if place == str(self.folder) and 0 <= time.time() - float(seconds) < _DAY_SECONDS:
                return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        for part in ("lists/partial", "archives/partial", "parts", "ready", "root", "bin"):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "status").touch()
        keyring = next((path for path in _KEYRINGS if os.path.exists(path)), None)
        lines = ["Types: deb", f"URIs: {mirror()}", f"Suites: {self.suite}", "Components: main"]
        lines += [f"Signed-By: {keyring}"] if keyring else []
        (self.folder / "suite.sources").write_text("\n".join(lines) + "\n")
        made.write_text(f"{self.folder}\n{time.time()}\n")

    def _apt(self, tool: str, *arguments: str) -> str:
        options = {
            "Dir::State": self.folder,
            "Dir::State::lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder,
            "Dir::Cache::archives": self.folder / "archives",
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "Dir::Etc::sourcelist": self.folder / "suite.sources",
            "Dir::Etc::sourceparts": self.folder / "parts",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Sandbox::User": "root",  # apt's own user may not enter this folder
            "APT::Install-Recommends": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            "Acquire::Languages": "none",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return _run([tool, *words, *arguments], seconds=_APT_SECONDS)

    def _update(self) -> None:
        """Read the suite's package lists once; a mirror that could not be reached is an error, not an absence."""
        if not any((self.folder / "ready").iterdir()):
            self._apt("apt-get", "update", "-q", "--error-on=any")

    def _fetch(self, package: str) -> str:
        """Unpack a package and what it depends on, the C library with it; returns the package's version."""
        policy = self._apt("apt-cache", "policy", package)
        candidate = next((line.split()[1] for line in policy.splitlines() if line.startswith("  Candidate:")), "(none)")
        if candidate == "(none)":
            raise NotInSuite(f"{self.suite} has no package {package} today")
        try:
            self._apt("apt-get", "install", "--simulate", "-qq", package)
        except SuiteError as cause:
            raise NotInSuite(f"{self.suite}'s {package} {candidate} cannot be installed today: {cause}") from cause
        try:
            self._apt("apt-get", "install", "--download-only", "-yqq", package)
        except SuiteError:  # sid moves several times a day, and what it had is gone from the mirror then
            self._apt("apt-get", "update", "-q", "--error-on=any")
            self._apt("apt-get", "install", "--download-only", "-yqq", package)
        for archive in sorted((self.folder / "archives").glob("*.deb")):
            _run(["dpkg", "--extract", str(archive), str(self.root)], seconds=_QUICK_SECONDS)
            archive.unlink()
        return candidate

    def _make_runnable(self, name: str) -> None:
        """A copy of an unpacked program that uses the suite's own loader and libraries, if it uses any."""
        found = [path for path in (self.root / "usr/bin" / name, self.root / "usr/sbin" / name) if path.is_file()]
        if not found:
            return
        copy = self.programs / f".{name}"
        shutil.copy(found[0].resolve(), copy)
        copy.chmod(0o755)
        loader = _loader(copy)
        if loader is not None:
            (own,) = list(self.root.glob(f"usr/lib/*/{loader}"))
            # DT_RPATH, not RUNPATH: it holds for the libraries' own libraries as well.
            options = ["--set-interpreter", str(own), "--force-rpath", "--set-rpath", str(own.parent)]
            _run(["patchelf", *options, str(copy)], seconds=_QUICK_SECONDS)
        copy.rename(self.programs / name)


def _loader(path: Path) -> str | None:
    """The file name of a program's dynamic loader; None if it is linked statically."""
    command = ["patchelf", "--print-interpreter", str(path)]
    try:
        done = subprocess.run(command, env={"PATH": _PATH}, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError as cause:
        raise SuiteError("patchelf is not installed: packaging/prepare-host tests") from cause
    return Path(done.stdout.strip()).name if done.returncode == 0 else None


def _run(command: Sequence[str], *, seconds: float) -> str:
    """Run a program with the machine's proxies and no other environment; returns its standard output."""
    proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    environment = {"PATH": _PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **proxies}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
        )
    except FileNotFoundError as cause:
        raise SuiteError(f"{command[0]} is not installed") from cause
    except subprocess.TimeoutExpired as cause:
        raise SuiteError(f"{command[0]}: no end after {seconds} s") from cause
    if done.returncode != 0:
        raise SuiteError(f"{' '.join(command[:1])}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
