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
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRIVATE = "usr/lib/scz-smm"
DOC = "usr/share/doc/scz-smm"
#: For each of them its own `_cffi_backend` is carried; all else that is compiled has the stable ABI.
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
BEFORE_PYTHON = "3.15"
MAINTAINER = "The SCZ-SMM project <security@scz-smm.example>"
SUMMARY = "OCI hook that guards AI models in containers with the TPM"

#: Debian's names of the libraries that compiled modules of ours name: bookworm's, and since trixie the other.
DEB_LIBRARIES = {
    "libtss2-esys.so.0": "libtss2-esys-3.0.2-0t64 | libtss2-esys-3.0.2-0",
    "libtss2-fapi.so.1": "libtss2-fapi1t64 | libtss2-fapi1",
    "libtss2-mu.so.0": "libtss2-mu-4.0.1-0t64 | libtss2-mu0",
    "libtss2-policy.so.0": "libtss2-policy0t64",
    "libtss2-rc.so.0": "libtss2-rc0t64 | libtss2-rc0",
    "libtss2-tcti-spi-helper.so.0": "libtss2-tcti-spi-helper0t64",
    "libtss2-tctildr.so.0": "libtss2-tctildr0t64 | libtss2-tctildr0",
    "libgcc_s.so.1": "libgcc-s1",
}
#: No module names these: libtss2-tctildr loads them by name, for a TPM of the kernel and for swtpm.
DLOPENED = {
    "libtss2-tcti-device.so.0": "libtss2-tcti-device0t64 | libtss2-tcti-device0",
    "libtss2-tcti-swtpm.so.0": "libtss2-tcti-swtpm0t64 | libtss2-tcti-swtpm0",
}
LIBC = re.compile(r"lib(c|m|dl|rt|util|pthread)\.so\.\d+|ld-linux.*")

DESCRIPTION = """\
An OCI hook attests the host's TPM, checks the container's identity token
and decrypts an AI model into the container's memory. The model stays
encrypted on disk and in transit; with the container the plaintext is gone.

The package carries its Python dependencies, pinned by hash, in the private
directory /usr/lib/scz-smm: python3-jose is gone from Debian 13, that of
Debian 12 has open CVEs, and the distributions' python3-cryptography is
older than tpm2-pytss needs. It uses the distribution's python3 (3.11 to
3.14), libtss2 and libc."""


class PackageError(Exception):
    """The package cannot be built as it should be."""


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
    Tree("build/man", "usr/share/man", compress=True),
    Tree("build/completions/bash", "usr/share/bash-completion/completions"),
    Tree("build/completions/fish", "usr/share/fish/vendor_completions.d"),
    Tree("build/completions/zsh", "usr/share/zsh/vendor-completions", only="deb"),
    Tree("build/completions/zsh", "usr/share/zsh/site-functions", only="rpm"),
    Tree("README.md", f"{DOC}/README.md"),
    Tree("SECURITY.md", f"{DOC}/SECURITY.md"),
    Tree("docs", f"{DOC}/docs"),
    Tree("packaging/sczctl", "usr/bin/sczctl"),
    Tree("packaging/maintain", f"{PRIVATE}/maintain"),
    Tree("packaging/deb/rtupdate", "usr/share/python3/runtime.d/scz-smm.rtupdate", only="deb"),
    Tree("packaging/deb/lintian-overrides", "usr/share/lintian/overrides/scz-smm", only="deb"),
    Tree("packaging/copyright", f"{DOC}/copyright", only="deb"),
    Tree("packaging/copyright", "usr/share/licenses/scz-smm/COPYRIGHT", "license", only="rpm"),
    Tree("LICENSE", "usr/share/licenses/scz-smm/LICENSE", "license", only="rpm"),
)
PROGRAMS = ("usr/bin/sczctl", f"{PRIVATE}/maintain", "usr/share/python3/runtime.d/scz-smm.rtupdate")
#: Sources of what lies elsewhere in the package.
LEFT_OUT = ("docs/man/", "__pycache__/")


@dataclass(frozen=True)
class Entry:
    """One file of the package: where it lies below `root`, and what nFPM is told of it."""

    path: str
    kind: str = ""
    only: str = ""


# --- the dependencies -------------------------------------------------------------------------------------------------


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


def run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a program.

    Raises:
        PackageError: It failed; with what it said.
    """
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PackageError(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def write_manual(source: Path, dependencies: Path, seconds: int) -> None:
    """The manual pages and completions, into build/ of the sources: what `make man` does, by what is carried."""
    environment = {"PYTHONPATH": f"{source}:{dependencies.resolve()}", "SOURCE_DATE_EPOCH": str(seconds)}
    for program, folder in (("manual.py", "man"), ("completions.py", "completions")):
        words = [sys.executable, "-B", str(source / "packaging" / program), str(source / "build" / folder)]
        run(words, environment=environment)


# --- the files --------------------------------------------------------------------------------------------------------


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


# --- what the compiled modules need -----------------------------------------------------------------------------------


def library_needs(root: Path) -> tuple[dict[str, set[str]], str]:
    """The shared libraries that modules below the folder name, with the versions of symbols, and the newest of glibc.

    Raises:
        PackageError: A module needs a library that nobody named here.
    """
    needs: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.so")):
        text = run(["/usr/bin/objdump", "--private-headers", str(path)])
        for name in re.findall(r"^\s+NEEDED\s+(\S+)$", text, re.MULTILINE):
            if name not in DEB_LIBRARIES and not LIBC.fullmatch(name):
                raise PackageError(f"{path}: nothing says which package has {name}")
            needs.setdefault(name, set())
        for name, versions in re.findall(r"^  required from (\S+):\n((?:    .*\n)+)", text, re.MULTILINE):
            needs.setdefault(name, set()).update(line.split()[-1] for line in versions.splitlines())
    glibc = [version for versions in needs.values() for version in versions if version.startswith("GLIBC_2.")]
    newest = max(([int(part) for part in version[6:].split(".")] for version in glibc), default=[2, 34])
    return needs, ".".join(str(part) for part in newest)


def deb_dependencies(needs: dict[str, set[str]], glibc: str) -> list[str]:
    """Depends, in Debian's words."""
    named = {DEB_LIBRARIES[name] for name in needs if name in DEB_LIBRARIES} | set(DLOPENED.values())
    return [f"python3 (>= {PYTHONS[0]})", f"python3 (<< {BEFORE_PYTHON})", f"libc6 (>= {glibc})", *sorted(named)]


def rpm_dependencies(needs: dict[str, set[str]]) -> list[str]:
    """Requires, as rpm itself names libraries and the versions of their symbols."""
    symbols = [f"{name}({version})(64bit)" for name, versions in needs.items() for version in versions]
    libraries = [f"{name}()(64bit)" for name in (*needs, *DLOPENED)]
    return [
        f"python3 >= {PYTHONS[0]}",
        f"python3 < {BEFORE_PYTHON}",
        "/bin/sh",
        *sorted(word for word in (*libraries, *symbols) if not word.startswith("ld-linux")),
    ]


# --- nFPM -------------------------------------------------------------------------------------------------------------


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
