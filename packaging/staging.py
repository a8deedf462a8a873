"""Where each file of the packages lies on a host, and how it gets there from the sources."""

from __future__ import annotations

import gzip
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from programs import PackageError

PRIVATE = "usr/lib/scz-smm"
DOC = "usr/share/doc/scz-smm"
MAINTAINER = "The SCZ-SMM project <security@scz-smm.example>"


@dataclass(frozen=True)
class Tree:
    """What is taken as it is: a file, or every file below a folder of the sources.

    Attributes:
        kind: nFPM's: "" for a plain file, "config|noreplace" for one that the administrator changes.
        only: The packager that takes it; "": both.
        compress: With gzip, as man pages are.
    """

    source: str
    target: str
    kind: str = ""
    only: str = ""
    compress: bool = False


CONFIG = "config|noreplace"
TREES = (
    Tree("config/config.toml", "etc/scz-smm/config.toml", CONFIG),
    Tree("config/hooks.d", "usr/share/containers/oci/hooks.d"),
    Tree("config/systemd", "usr/lib/systemd/system"),
    Tree("config/logrotate.d", "etc/logrotate.d", CONFIG),
    Tree("config/sysusers.d", "usr/lib/sysusers.d"),
    Tree("config/tmpfiles.d", "usr/lib/tmpfiles.d"),
    Tree("config/apparmor.d", "etc/apparmor.d", CONFIG),
    Tree("config/selinux", "usr/share/selinux/packages/scz-smm"),
    Tree("config/kubernetes", f"{DOC}/examples/kubernetes"),
    Tree("config/cdi", f"{DOC}/examples/cdi"),
    Tree("config/containerd", f"{DOC}/examples/containerd"),
    Tree("config/containers.conf.d", f"{DOC}/examples/containers.conf.d"),
    Tree("config/crio", f"{DOC}/examples/crio"),
    Tree("config/docker", f"{DOC}/examples/docker"),
    Tree("config/guest", f"{DOC}/examples/guest"),
    Tree("config/podman", f"{DOC}/examples/podman"),
    Tree("build/man", "usr/share/man", compress=True),
    Tree("build/completions/bash", "usr/share/bash-completion/completions"),
    Tree("build/completions/fish", "usr/share/fish/vendor_completions.d"),
    Tree("build/completions/zsh", "usr/share/zsh/vendor-completions", only="deb"),
    Tree("build/completions/zsh", "usr/share/zsh/site-functions", only="rpm"),
    Tree("README.md", f"{DOC}/README.md"),
    Tree("SECURITY.md", f"{DOC}/SECURITY.md"),
    Tree("docs", f"{DOC}/docs"),
    Tree("packaging/sczctl", "usr/bin/sczctl"),
    Tree("packaging/scz-nri", "usr/bin/scz-nri"),
    Tree("packaging/maintain", f"{PRIVATE}/maintain"),
    Tree("packaging/deb/rtupdate", "usr/share/python3/runtime.d/scz-smm.rtupdate", only="deb"),
    Tree("packaging/deb/lintian-overrides", "usr/share/lintian/overrides/scz-smm", only="deb"),
    Tree("packaging/copyright", f"{DOC}/copyright", only="deb"),
    Tree("packaging/copyright", "usr/share/licenses/scz-smm/COPYRIGHT", "license", only="rpm"),
    Tree("LICENSE", "usr/share/licenses/scz-smm/LICENSE", "license", only="rpm"),
)
PROGRAMS = (
    "usr/bin/sczctl",
    "usr/bin/scz-nri",
    f"{PRIVATE}/maintain",
    "usr/share/python3/runtime.d/scz-smm.rtupdate",
)
#: Sources of what lies elsewhere in the package.
LEFT_OUT = ("docs/man/", "__pycache__/")


@dataclass(frozen=True)
class Entry:
    """One file of the package: where it lies below `root`, and what nFPM is told of it."""

    path: str
    kind: str = ""
    only: str = ""


def stage(source: Path, dependencies: Path, root: Path, *, version: str, seconds: int) -> list[Entry]:
    """Put every file where it will lie on a host; returns them in order.

    Raises:
        PackageError: Something is missing in the sources.
    """
    shutil.rmtree(root, ignore_errors=True)
    entries = [_place(root, tree, relative, path) for tree in TREES for relative, path in _files_of(source, tree)]
    for folder, base in ((source / "oci_hook", source), (dependencies, dependencies)):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                entries.append(_copy(root, path, f"{PRIVATE}/{path.relative_to(base)}"))
    changelog = root / DOC / "changelog.gz"
    _write(changelog, _gzipped((source / "CHANGELOG.md").read_bytes()))
    _write(changelog.with_name("changelog.Debian.gz"), _gzipped(debian_changelog(version, seconds)))
    entries += [Entry(f"{DOC}/changelog.gz"), Entry(f"{DOC}/changelog.Debian.gz", only="deb")]
    for path in sorted(root.rglob("*"), reverse=True):
        path.chmod(0o755 if path.is_dir() or str(path.relative_to(root)) in PROGRAMS else 0o644)
        os.utime(path, (seconds, seconds))
    return sorted(entries, key=lambda entry: entry.path)


def _files_of(source: Path, tree: Tree) -> list[tuple[str, Path]]:
    """The files of a tree with their names below it."""
    place = source / tree.source
    if place.is_file():
        return [("", place)]
    found = [
        (str(path.relative_to(place)), path)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not str(path.relative_to(source)).startswith(LEFT_OUT)
    ]
    if not found:
        raise PackageError(f"{tree.source} is missing or empty")
    return found


def _place(root: Path, tree: Tree, relative: str, path: Path) -> Entry:
    target = os.path.join(tree.target, relative) if relative else tree.target
    data = path.read_bytes()
    if tree.compress:
        target, data = f"{target}.gz", _gzipped(data)
    if target.startswith(DOC) and target.endswith(".md"):
        data = relinked(data)
    _write(root / target, data)
    return Entry(target, tree.kind, tree.only)


def relinked(text: bytes) -> bytes:
    """A document's links to what lies beside the documents in the sources, and elsewhere on a host."""
    for tree in TREES:
        if tree.source.startswith("config/"):
            for up in ("", "../"):
                text = text.replace(f"]({up}{tree.source}".encode(), f"](/{tree.target}".encode())
    return text.replace(b"](LICENSE)", b"](https://www.apache.org/licenses/LICENSE-2.0)")


def _copy(root: Path, path: Path, target: str) -> Entry:
    _write(root / target, path.read_bytes())
    return Entry(target)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def debian_changelog(version: str, seconds: int) -> bytes:
    """One entry, which leads to the other changelog."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(seconds))
    text = f"scz-smm ({version}-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {MAINTAINER}  {date}\n"
    return text.encode()
