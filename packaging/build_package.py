"""Builds dist/scz-smm_VERSION_ARCH.deb and .rpm with nFPM; `make package` calls it.

    build_package.py [--source DIR] [--work DIR] [--output DIR] [--dependencies DIR]

Runs in the virtual environment of requirements-build.lock and requirements-package.lock, made from the distribution's
own python3. Three steps, each into a folder of WORK: the locked run-time dependencies are downloaded, checked by hash
and put side by side (`dependencies`); all files are put where they will lie on a host (`root`); nFPM is told each of
them, with its mode and one time for all (`nfpm.json`, which is YAML). Nothing but the sources, the locks and the time
gets into a package, so that two builds are byte-identical: the time is SOURCE_DATE_EPOCH, or the last commit's.
docs/adr/0010-packages.md says why it is so. Needs git or SOURCE_DATE_EPOCH; objdump; libtss2-dev, gcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from dependencies import collect_dependencies
from libraries import deb_dependencies, library_needs, rpm_dependencies
from programs import PackageError, run
from staging import DOC, MAINTAINER, PRIVATE, PROGRAMS, Entry, stage

SUMMARY = "OCI hook that guards AI models in containers with the TPM"

DESCRIPTION = """\
An OCI hook attests the host's TPM, checks the container's identity token
and decrypts an AI model into the container's memory. The model stays
encrypted on disk and in transit; with the container the plaintext is gone.

The package carries its Python dependencies, pinned by hash, in the private
directory /usr/lib/scz-smm: python3-jose is gone from Debian 13, that of
Debian 12 has open CVEs, and the distributions' python3-cryptography is
older than tpm2-pytss needs. It uses the distribution's python3 (3.11 to
3.14), libtss2 and libc."""


def write_manual(source: Path, dependencies: Path, seconds: int) -> None:
    """The manual pages and completions, into build/ of the sources: what `make man` does, by what is carried."""
    environment = {"PYTHONPATH": f"{source}:{dependencies.resolve()}", "SOURCE_DATE_EPOCH": str(seconds)}
    for program, folder in (("manual.py", "man"), ("completions.py", "completions")):
        words = [sys.executable, "-B", str(source / "packaging" / program), str(source / "build" / folder)]
        run(words, environment=environment)


def nfpm_document(
    source: Path, root: Path, entries: list[Entry], *, version: str, arch: str, seconds: int
) -> dict[str, Any]:
    """What nFPM is told: every file by name, and nothing that depends on where or when it runs."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    needs, glibc = library_needs(root / PRIVATE)
    bundled = [f"bundled(python3dist({name})) = {number}" for name, number in _carried(root / PRIVATE)]
    return {
        "name": "scz-smm",
        "arch": arch,
        "platform": "linux",
        "version": version,
        "version_schema": "none",
        "release": "1",
        "section": "admin",
        "priority": "optional",
        "maintainer": MAINTAINER,
        "description": f"{SUMMARY}\n{DESCRIPTION}",
        "license": "Apache-2.0",
        "mtime": moment,
        "umask": 0o022,
        "contents": [
            *_folders(entries, moment),
            *(each for entry in entries for each in _contents(root, entry, moment)),
        ],
        "overrides": {
            "deb": {
                "depends": deb_dependencies(needs, glibc),
                # No more than a suggestion: on a system without it, it brings a mailer.
                "suggests": ["logrotate", "podman", "containerd", "cri-o", "docker.io", "swtpm", "tpm2-tools"],
                "scripts": _scripts(source / "packaging/deb", ("preinst", "postinst", "prerm", "postrm")),
            },
            "rpm": {
                "depends": rpm_dependencies(needs),
                "recommends": ["logrotate"],
                "provides": bundled,
                "scripts": _scripts(source / "packaging/rpm", ("pre", "post", "preun", "postun")),
            },
        },
        "deb": {"compression": "xz"},
        "rpm": {"summary": SUMMARY, "group": "System Environment/Base", "compression": "xz", "buildhost": "localhost"},
    }


def _scripts(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """In the order of nFPM's four."""
    keys = ("preinstall", "postinstall", "preremove", "postremove")
    return {key: str(folder / name) for key, name in zip(keys, names, strict=True)}


def _folders(entries: list[Entry], moment: str) -> list[dict[str, Any]]:
    """Our own folders: rpm leaves those behind that no package names."""
    own = {
        str(parent)
        for entry in entries
        for parent in Path(entry.path).parents
        if str(parent).startswith((PRIVATE, DOC, "etc/scz-smm"))
    }
    for_rpm = {"usr/share/licenses/scz-smm"} | {
        str(parent)
        for entry in entries
        for parent in Path(entry.path).parents
        if str(parent).startswith("usr/share/selinux/packages/scz-smm")
    }
    info = {"mode": 0o755, "mtime": moment}
    return [{"dst": f"/{path}", "type": "dir", "file_info": info} for path in sorted(own)] + [
        {"dst": f"/{path}", "type": "dir", "packager": "rpm", "file_info": info} for path in sorted(for_rpm)
    ]


def _contents(root: Path, entry: Entry, moment: str) -> list[dict[str, Any]]:
    """One entry; a document has two, as only rpm is told that it is one."""
    content: dict[str, Any] = {
        "src": str(root / entry.path),
        "dst": f"/{entry.path}",
        "file_info": {
            "mode": 0o755 if entry.path in PROGRAMS else 0o644,
            "mtime": moment,
            "owner": "root",
            "group": "root",
        },
    }
    if entry.kind:
        content["type"] = entry.kind
    if entry.path.startswith((f"{DOC}/", "usr/share/man/")):
        both = [{**content, "packager": "deb"}, {**content, "packager": "rpm", "type": "doc"}]
        return [each for each in both if entry.only in ("", each["packager"])]
    return [{**content, "packager": entry.only} if entry.only else content]


def _carried(private: Path) -> list[tuple[str, str]]:
    """Name and version of each dependency, of its metadata's folder."""
    found = [path.name.removesuffix(".dist-info").rsplit("-", 1) for path in sorted(private.glob("*.dist-info"))]
    return [(name.replace("_", "-"), number) for name, number in found]


def source_seconds(source: Path) -> int:
    """The one time of all files.

    Raises:
        PackageError: Neither SOURCE_DATE_EPOCH nor a commit tells it.
    """
    named = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        return int(named or run(["git", "-C", str(source), "log", "-1", "--format=%ct"]))
    except (PackageError, ValueError) as cause:
        raise PackageError("set SOURCE_DATE_EPOCH to seconds since 1970: there is no commit to take it from") from cause


def source_version(source: Path) -> str:
    """The version as the sources say it."""
    found = re.search(r'^__version__ = "([0-9][0-9A-Za-z.~]*)"$', (source / "oci_hook/__init__.py").read_text(), re.M)
    if found is None:
        raise PackageError("oci_hook/__init__.py has no version that a package could have")
    return found[1]


def build(source: Path, work: Path, output: Path, dependencies: Path | None) -> list[Path]:
    """Build both packages; returns their paths."""
    for folder in (work, output):
        folder.mkdir(parents=True, exist_ok=True)
    seconds, version = source_seconds(source), source_version(source)
    arch = run(["/usr/bin/dpkg", "--print-architecture"]).strip()
    dependencies = dependencies or collect_dependencies(source, work)
    write_manual(source, dependencies, seconds)
    entries = stage(source, dependencies, work / "root", version=version, seconds=seconds)
    document = nfpm_document(source, work / "root", entries, version=version, arch=arch, seconds=seconds)
    settings = work / "nfpm.json"
    settings.write_text(json.dumps(document, indent=1, sort_keys=True))
    nfpm = Path(sys.executable).with_name("nfpm")
    made = []
    for packager in ("deb", "rpm"):
        path = output / f"scz-smm_{version}_{arch}.{packager}"
        path.unlink(missing_ok=True)
        words = ["package", "--config", str(settings), "--packager", packager, "--target", str(path)]
        run([str(nfpm), *words], environment={"SOURCE_DATE_EPOCH": str(seconds)})
        made.append(path)
    return made


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the deb and the rpm.")
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--source", type=Path, default=here, help="the sources (default: those of this program)")
    parser.add_argument(
        "--work", type=Path, default=here / "build/package", help="a folder for what is made on the way"
    )
    parser.add_argument("--output", type=Path, default=here / "dist", help="where the packages go")
    parser.add_argument("--dependencies", type=Path, help="a folder of dependencies that an earlier run made")
    given = parser.parse_args()
    try:
        made = build(given.source.resolve(), given.work.resolve(), given.output.resolve(), given.dependencies)
    except PackageError as wrong:
        print(f"package: {wrong}", file=sys.stderr)
        return 1
    for path in made:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
