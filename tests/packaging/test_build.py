"""`make package`: what is in the packages, that two builds are the same bytes, and what their checkers say."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from oci_hook import __version__
from tests.packaging.conftest import ROOT, Packages, build, copy_sources, run

PRIVATE = "usr/lib/scz-smm"
MODULES = ("programs", "dependencies", "staging", "libraries", "build_package")
DOC = "usr/share/doc/scz-smm"
SCRIPTS = sorted(
    path
    for path in (ROOT / "packaging").rglob("*")
    if path.is_file() and path.read_bytes()[:9] in (b"#!/bin/sh", b"#! /bin/s") and "__pycache__" not in path.parts
)
#: Where what is taken as it is lies on a host.
TAKEN = {
    "config/logrotate.d": "etc/logrotate.d",
    "config/sysusers.d": "usr/lib/sysusers.d",
    "config/tmpfiles.d": "usr/lib/tmpfiles.d",
    "config/apparmor.d": "etc/apparmor.d",
    "config/selinux": "usr/share/selinux/packages/scz-smm",
    "config/kubernetes": f"{DOC}/examples/kubernetes",
    "config/systemd": "usr/lib/systemd/system",
    "config/hooks.d": "usr/share/containers/oci/hooks.d",
    "build/completions/bash": "usr/share/bash-completion/completions",
    "build/completions/zsh": "usr/share/zsh/vendor-completions",
    "build/completions/fish": "usr/share/fish/vendor_completions.d",
}


@pytest.fixture(scope="module")
def builder() -> Iterator[SimpleNamespace]:
    """What packaging/build_package.py is made of; its folder, whose name is a library's, is its programs' own path."""
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        modules = [importlib.import_module(name) for name in MODULES]
        yield SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})
    finally:
        sys.path.remove(str(ROOT / "packaging"))


@pytest.fixture(scope="module")
def files(packages: Packages) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """The deb's members by path."""
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", packages.deb], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = {}
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            found[member.name.removeprefix("./").rstrip("/")] = (member, stream.read() if stream else b"")
    return found


def field(packages: Packages, name: str) -> str:
    return run("dpkg-deb", "--field", packages.deb, name).strip()


# --- what is in it ---


def test_names_and_version(packages: Packages) -> None:
    arch = run("dpkg", "--print-architecture").strip()
    assert packages.deb.name == f"scz-smm_{__version__}_{arch}.deb"
    assert packages.rpm.name == f"scz-smm_{__version__}_{arch}.rpm"
    assert field(packages, "Version") == f"{__version__}-1"
    assert run("rpm", "-qp", "--queryformat", "%{VERSION}-%{RELEASE}", packages.rpm) == f"{__version__}-1"


def test_every_file_is_roots_of_one_time_and_writable_by_root_alone(
    packages: Packages, files: dict[str, tuple[tarfile.TarInfo, bytes]]
) -> None:
    for path, (member, _) in files.items():
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "root", "root"), path
        assert member.mtime == packages.epoch, path
        assert member.isfile() or member.isdir(), path
        assert member.mode & 0o7022 == 0, path
    programs = {path for path, (member, _) in files.items() if member.isfile() and member.mode & 0o111}
    scripts = {f"{PRIVATE}/maintain", "usr/share/python3/runtime.d/scz-smm.rtupdate"}
    assert programs == {"usr/bin/sczctl", "usr/bin/scz-nri", *scripts}


def test_our_modules_and_the_locked_dependencies_lie_side_by_side(
    files: dict[str, tuple[tarfile.TarInfo, bytes]],
) -> None:
    for path in sorted((ROOT / "oci_hook").rglob("*.py")):
        assert files[f"{PRIVATE}/{path.relative_to(ROOT)}"][1] == path.read_bytes()
    locked = dict(re.findall(r"^(\S+)==(\S+) ", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    carried = {path.split("/")[3] for path in files if path.startswith(f"{PRIVATE}/") and ".dist-info/" in path}
    names = (name.removesuffix(".dist-info").rsplit("-", 1) for name in carried)
    assert {name.replace("_", "-"): version for name, version in names} == locked
    assert not [path for path in files if "__pycache__" in path]


def test_a_backend_for_each_python_and_one_of_everything_else(
    builder: SimpleNamespace, files: dict[str, tuple[tarfile.TarInfo, bytes]]
) -> None:
    compiled = [path for path in files if path.endswith(".so")]
    backends = {path.split("cpython-")[1].split("-")[0] for path in compiled if "_cffi_backend" in path}
    assert backends == {version.replace(".", "") for version in builder.PYTHONS}
    assert all(".abi3." in path for path in compiled if "_cffi_backend" not in path)


def test_no_file_tells_where_it_was_built(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    places = (f"{ROOT}/build/package".encode(), b"/tmp/pip-")
    assert [path for path, (_, data) in files.items() if any(place in data for place in places)] == []


def test_what_is_active_and_what_is_an_example(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    for stage in ("prestart", "poststop"):
        name = f"scz-smm-{stage}.json"
        assert files[f"usr/share/containers/oci/hooks.d/{name}"][1] == (ROOT / "config/hooks.d" / name).read_bytes()
    inactive = ("etc/containerd", "etc/docker", "etc/crio", "etc/cdi", "etc/containers", "usr/local")
    assert [path for path in files if path.startswith(inactive)] == []
    for example in ("docker/daemon.json", "cdi/scz-smm.json", "containerd/2.x/50-scz-smm.toml"):
        assert files[f"{DOC}/examples/{example}"][1] == (ROOT / "config" / example).read_bytes()


def test_links_in_the_documents_lead_somewhere(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    folders = {str(parent) for path in files for parent in Path(path).parents}
    seen = 0
    for path, (_, data) in files.items():
        if not (path.startswith(DOC) and path.endswith(".md")):
            continue
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", data.decode()):
            if not re.match(r"[a-z]+:", link):
                target = os.path.normpath(os.path.join("/", os.path.dirname(path), link)).lstrip("/")
                assert target in files or target in folders, (path, link)
                seen += 1
    assert seen > 30


@pytest.mark.parametrize("source", TAKEN)
def test_what_is_taken_as_it_is(
    files: dict[str, tuple[tarfile.TarInfo, bytes]], packages: Packages, source: str
) -> None:
    there = {
        f"{TAKEN[source]}/{path.relative_to(ROOT / source)}": path.read_bytes()
        for path in (ROOT / source).rglob("*")
        if path.is_file()
    }
    assert {path: data for path, (_, data) in files.items() if path in there} == there
    conffiles = set(run("dpkg-deb", "--info", packages.deb, "conffiles").split())
    assert {f"/{path}" for path in there if path.startswith("etc/")} <= conffiles


def test_the_configuration_is_the_administrators(packages: Packages) -> None:
    assert "/etc/scz-smm/config.toml" in run("dpkg-deb", "--info", packages.deb, "conffiles").split()
    assert "/etc/scz-smm/config.toml" in run("rpm", "-qp", "--configfiles", packages.rpm).split()


def test_man_pages_are_compressed(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    pages = {path.name: path.read_bytes() for path in (ROOT / "build/man").rglob("*") if path.is_file()}
    found = {Path(path).stem: gzip.decompress(data) for path, (_, data) in files.items() if "/man/man" in path and data}
    assert found == pages


def test_the_copyright_file_names_every_dependency(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    patterns = re.findall(r" ?(usr/lib/scz-smm/[^*\s]+)", files[f"{DOC}/copyright"][1].decode())
    ours = (f"{PRIVATE}/oci_hook", f"{PRIVATE}/maintain")
    carried = [path for path, (member, _) in files.items() if path.startswith(f"{PRIVATE}/") and member.isfile()]
    assert [path for path in carried if not path.startswith((*patterns, *ours))] == []


def test_the_dependencies_are_those_of_the_compiled_modules(packages: Packages) -> None:
    depends = field(packages, "Depends").split(", ")
    assert {"python3 (>= 3.11)", "python3 (<< 3.15)"} <= set(depends)
    assert "libtss2-esys-3.0.2-0t64 | libtss2-esys-3.0.2-0" in depends
    assert "libtss2-tcti-device0t64 | libtss2-tcti-device0" in depends
    (libc,) = (word for word in depends if word.startswith("libc6 "))
    assert re.fullmatch(r"libc6 \(>= 2\.\d+\)", libc)
    requires = run("rpm", "-qp", "--requires", packages.rpm).splitlines()
    assert f"libc.so.6(GLIBC_{libc[10:-1]})(64bit)" in requires
    assert {"python3 >= 3.11", "libtss2-esys.so.0()(64bit)", "libtss2-tcti-device.so.0()(64bit)"} <= set(requires)


def test_the_rpm_has_the_same_files_in_its_own_places(
    packages: Packages, files: dict[str, tuple[tarfile.TarInfo, bytes]]
) -> None:
    listed = {path.lstrip("/") for path in run("rpm", "-qlp", packages.rpm).splitlines()}
    only_deb = {path for path in files if files[path][0].isfile()} - listed
    debian = ("usr/share/lintian/", "usr/share/python3/", f"{DOC}/copyright", f"{DOC}/changelog.Debian.gz")
    assert [path for path in only_deb if not path.startswith((*debian, "usr/share/zsh/"))] == []
    assert {"usr/share/licenses/scz-smm/LICENSE", "usr/share/licenses/scz-smm/COPYRIGHT"} <= listed


# --- the same bytes ---


def test_a_build_from_another_folder_gives_the_same_bytes(packages: Packages, tmp_path: Path) -> None:
    deb, rpm = build(copy_sources(tmp_path / "elsewhere"), epoch=packages.epoch)
    assert deb.parent != packages.deb.parent
    assert deb.read_bytes() == packages.deb.read_bytes()
    assert rpm.read_bytes() == packages.rpm.read_bytes()


# --- the checkers ---


def test_lintian_is_content(packages: Packages) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--tag-display-limit=0", "--fail-on=none", packages.deb],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == []


def test_rpmlint_is_content(packages: Packages) -> None:
    done = subprocess.run(
        ["rpmlint", "--config", ROOT / "packaging/rpm/rpmlint.toml", packages.rpm],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("scz-smm")]
    assert "1 packages" in done.stdout
    assert said == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_is_content(script: Path) -> None:
    assert run("shellcheck", "--shell=sh", script) == ""


def test_there_are_scripts_to_check() -> None:
    names = {"preinst", "postinst", "prerm", "postrm", "pre", "post", "preun", "postun", "maintain", "rtupdate"}
    assert names <= {path.name for path in SCRIPTS}


# --- what the builder refuses ---


def test_a_library_that_no_package_is_named_for(builder: SimpleNamespace, tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("int main(void) { return 0; }")
    run("gcc", "-shared", "-Wl,--no-as-needed", "-lm", "-lcrypt", "-o", tmp_path / "x.so", source)
    with pytest.raises(builder.PackageError, match=r"libcrypt\.so"):
        builder.library_needs(tmp_path)


def test_wheels_that_disagree(builder: SimpleNamespace, tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr("same.py", text)
    target = tmp_path / "target"
    target.mkdir()
    builder.unpack_wheel(tmp_path / "a.whl", target)
    builder.unpack_wheel(tmp_path / "a.whl", target)
    with pytest.raises(builder.PackageError, match=r"same\.py differs"):
        builder.unpack_wheel(tmp_path / "b.whl", target)


def test_sources_without_a_part(builder: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "config/hooks.d").mkdir(parents=True)
    with pytest.raises(builder.PackageError, match=r"config/config\.toml is missing"):
        builder.stage(tmp_path, tmp_path, tmp_path / "root", version="1", seconds=1)


def test_sources_without_a_time(builder: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    with pytest.raises(builder.PackageError, match="SOURCE_DATE_EPOCH"):
        builder.source_seconds(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "17")
    assert builder.source_seconds(tmp_path) == 17


def test_every_locked_project_has_its_block(builder: SimpleNamespace) -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = builder.lock_blocks(text)
    assert set(blocks) == set(re.findall(r"^(\S+)==", text, re.MULTILINE))
    assert all("--hash=sha256:" in block for block in blocks.values())
    assert sum(block.count("--hash=") for block in blocks.values()) == text.count("--hash=")


def test_nfpm_is_told_every_file_by_name(packages: Packages) -> None:
    told = json.loads((ROOT / "build/package/nfpm.json").read_text())
    assert {content.get("type", "") for content in told["contents"]} <= {
        "",
        "dir",
        "doc",
        "license",
        "config|noreplace",
    }
    assert all("mtime" in content["file_info"] for content in told["contents"])
