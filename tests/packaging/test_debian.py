"""The deb in fresh systems, in the order of a host's life; each test goes on where the one before ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook import __version__
from oci_hook.errors import InstallationIncomplete
from oci_hook.invocation import Invocation
from tests.fresh_root import FreshRoot
from tests.packaging.conftest import OLDER, Packages
from tests.packaging.story import Story
from tests.runtimes import make_bundle

PRIVATE = "usr/lib/scz-smm"
HOOK = ("/usr/bin/python3", "-I", "-S", "/usr/lib/scz-smm/oci_hook/launch.py", "--config", "/etc/scz-smm/config.toml")
HOOKS = "/usr/share/containers/oci/hooks.d"
STATE, ASKING = (
    json.dumps({"ociVersion": "1.0.2", "id": "plain", "pid": 1, "bundle": "/none", "annotations": annotations})
    for annotations in ({"other": "1"}, {"smm.scz/model": "small:1"})
)
DATA = ("etc/scz-smm", "var/lib/scz-smm", "var/log/scz-smm", "run/scz-smm")
INCOMPLETE = InstallationIncomplete.code
SCRIPTS = "usr/local/libexec/scz-smm"
SHIM = f"/{SCRIPTS}/docker/scz-runc --root /run/plain"


@pytest.fixture(scope="module")
def debs(clean: FreshRoot, packages: Packages) -> dict[str, str]:
    """Paths in the system of both versions."""
    root = clean
    for name, path in (("new.deb", packages.deb), ("older.deb", packages.older_deb)):
        shutil.copy(path, root / f"root/{name}")
    return {"new": "/root/new.deb", "older": "/root/older.deb"}


@pytest.fixture(scope="module")
def story(root: FreshRoot, debs: dict[str, str]) -> Iterator[Story]:
    """The version before is installed, the TPM runs, and the administrator has named it in the configuration."""
    told = Story(root)
    told.prepare()
    root.apt("install", debs["older"])
    with told.tpm():
        yield told


def version(root: FreshRoot) -> str:
    return root.call("sczctl", "--version").stdout.split()[-1]


def bytecode(root: FreshRoot) -> set[str]:
    return {path.name.split(".")[-2] for path in (root / PRIVATE).rglob("*.pyc")}


def exists(root: FreshRoot, path: str) -> bool:
    """As the system sees it: /run is its own."""
    return root.call("test", "-e", f"/{path}", check=False).returncode == 0


def hook_refuses_and_says_why(root: FreshRoot, state: str) -> None:
    hook = root.call(*HOOK, "prestart", stdin=state, check=False)
    assert (hook.returncode, hook.stdout) == (INCOMPLETE, "")
    assert len(hook.stderr.splitlines()) == 1
    assert "apt install --reinstall scz-smm" in hook.stderr


def works(root: FreshRoot, expected: str) -> None:
    assert version(root) == expected
    assert root.call(*HOOK, "prestart", stdin=STATE).returncode == 0


# --- a minimal system ---


def test_apt_installs_it_into_a_minimal_system(root: FreshRoot, debs: dict[str, str]) -> None:
    root.apt("install", debs["new"])
    works(root, __version__)
    assert root.call("dpkg", "--verify", "scz-smm").stdout == ""
    report = json.loads(root.call("sczctl", "doctor", "--json", check=False).stdout)
    assert report
    assert "72" in root.call("sczctl", "why", "--codes").stdout
    assert root.call("sczctl", "why", str(INCOMPLETE)).stdout.count("incomplete") == 1


def test_the_sweep_is_enabled_and_nothing_is_started(root: FreshRoot) -> None:
    assert exists(root, "etc/systemd/system/timers.target.wants/scz-smm-sweep.timer")
    assert not exists(root, "run/systemd/system")


def test_group_and_directories_are_made(root: FreshRoot) -> None:
    """By the package's own shell on bookworm, which has no systemd here; on trixie a package of libtss2's brings it."""
    rules = {"sysusers.d": "# a comment\ng scz-smm -\n", "tmpfiles.d": "d /run/scz-trial 0750 root scz-smm -\n"}
    before = {folder: path.read_text() for folder in rules if (path := rules_file(root, folder)).exists()}
    sysusers = root.call("sh", "-c", "command -v systemd-sysusers", check=False).stdout != ""
    assert sysusers == (root.suite != "bookworm")
    try:
        for folder, text in rules.items():
            rules_file(root, folder).parent.mkdir(exist_ok=True)
            rules_file(root, folder).write_text(before.get(folder, "") + text)
        root.call("/usr/lib/scz-smm/maintain", "prepare")
        root.call("/usr/lib/scz-smm/maintain", "prepare")
        assert root.call("stat", "--format=%A %U %G", "/run/scz-trial").stdout == "drwxr-x--- root scz-smm\n"
    finally:
        for folder in rules:
            rules_file(root, folder).unlink()
            if folder in before:
                rules_file(root, folder).write_text(before[folder])


def rules_file(root: FreshRoot, folder: str) -> Path:
    return root / f"usr/lib/{folder}/scz-smm.conf"


def test_what_it_carries_is_what_runs(root: FreshRoot) -> None:
    script = (
        "import sys; sys.path.append('/usr/lib/scz-smm')\n"
        "import cryptography, jose.jws, psutil, click, oci_hook.attestation.tpm, tpm2_pytss._libtpm2_pytss as t\n"
        "import oci_hook.nri.connection, google.protobuf as p\n"
        "print(*{each.__file__.startswith(sys.path[-1] + '/') for each in (cryptography, jose, psutil, click, t, p)})"
    )
    assert root.call("/usr/bin/python3", "-I", "-S", "-c", script).stdout.split() == ["True"]


def test_bytecode_is_compiled_for_the_systems_python_and_by_nobody_else(root: FreshRoot) -> None:
    tag = root.call("python3", "-c", "import sys; print(sys.implementation.cache_tag)").stdout.strip()
    assert bytecode(root) == {tag}
    sources, compiled = (len(list((root / PRIVATE).rglob(pattern))) for pattern in ("*.py", "*.pyc"))
    assert sources == compiled
    root.sh("find /usr/lib/scz-smm -name __pycache__ -exec rm -r {} +")
    works(root, __version__)
    assert bytecode(root) == set()
    root.call("/usr/share/python3/runtime.d/scz-smm.rtupdate", "rtupdate", "python3.0", "python3.1")
    assert bytecode(root) == {tag}


def test_neither_the_environment_nor_the_folder_decides_what_runs(root: FreshRoot) -> None:
    root.sh(
        "mkdir -p /root/evil/oci_hook && cd /root/evil && "
        "echo 'raise SystemExit(99)' | tee oci_hook/__init__.py click.py"
    )
    environment = {"PYTHONPATH": "/root/evil", "PYTHONSTARTUP": "/root/evil/click.py", "PYTHONHOME": "/root/evil"}
    done = root.call("sh", "-c", "cd /root/evil && exec sczctl --version", environment=environment)
    assert done.stdout.split()[-1] == __version__


def test_install_finds_the_packages_own_hooks_and_leaves_them(root: FreshRoot) -> None:
    said = root.call("sczctl", "install", "--engine", "podman").stdout
    assert said.splitlines() == [
        f"already there, not changed: {HOOKS}/scz-smm-{stage}.json" for stage in ("poststop", "prestart")
    ]
    hook = json.loads((root / f"{HOOKS[1:]}/scz-smm-prestart.json").read_text())["hook"]
    assert hook["args"] == [*HOOK, "--engine", "podman", "prestart"]
    assert hook["args"][1:3] == Invocation("prestart").command()[1:3]
    assert root.call("dpkg", "--verify", "scz-smm").stdout == ""


def test_uninstall_says_that_the_hooks_come_back(root: FreshRoot, debs: dict[str, str]) -> None:
    changed = root.call("sczctl", "install", "--engine", "podman", "--timeout", "77").stdout
    assert "brings its own back" in changed
    said = root.call("sczctl", "uninstall", "--engine", "podman").stdout
    assert "brings its own back" in said
    assert not exists(root, f"{HOOKS[1:]}/scz-smm-prestart.json")
    root.apt("install", "--reinstall", debs["new"])
    assert root.call("dpkg", "--verify", "scz-smm").stdout == ""


def test_engines_are_told_names_that_outlive_an_upgrade_of_the_distribution(root: FreshRoot) -> None:
    root.call("sczctl", "install", "--engine", "docker", "--runtime", "/usr/bin/runc")
    script = (root / "usr/local/libexec/scz-smm/docker/scz-runc").read_text()
    assert script.startswith("#!/usr/bin/python3 -IS\n")
    assert "'/usr/lib/scz-smm'" in script


def test_an_unpacked_package_refuses_until_it_is_configured(root: FreshRoot, debs: dict[str, str]) -> None:
    root.call("dpkg", "--unpack", debs["new"])
    hook_refuses_and_says_why(root, STATE)
    hook_refuses_and_says_why(root, ASKING)
    sczctl = root.call("sczctl", "ps", check=False)
    assert (sczctl.returncode, "apt install --reinstall scz-smm" in sczctl.stderr) == (INCOMPLETE, True)
    shim = root.call(*SHIM.split(), "create", "x", check=False)
    assert (shim.returncode, "apt install --reinstall scz-smm" in shim.stderr) == (INCOMPLETE, True)
    runc = root.call(*SHIM.split(), "state", "x", check=False)  # runc itself, or that there is none yet
    assert "container does not exist" in runc.stderr or "runtime cannot be started" in runc.stderr
    root.call("dpkg", "--configure", "--pending")
    works(root, __version__)


def test_an_unpacked_package_is_removed_whole_and_the_engines_are_named(root: FreshRoot, debs: dict[str, str]) -> None:
    root.call("sczctl", "install", "--engine", "docker", "--runtime", "/usr/bin/runc")
    root.call("sczctl", "install", "--engine", "containerd", "--runtime", "/usr/bin/runc")
    root.call("dpkg", "--unpack", debs["new"])
    removed = root.call("apt-get", "-yq", "remove", "scz-smm")
    for file in ("/etc/docker/daemon.json", "/etc/containerd/conf.d/50-scz-smm.toml"):
        assert f"WARNING: {file} still names what is gone" in removed.stdout + removed.stderr
    assert not exists(root, PRIVATE)
    root.apt("install", debs["new"])
    works(root, __version__)
    root.call("sczctl", "uninstall", "--engine", "containerd")
    root.call("sczctl", "uninstall", "--engine", "docker")
    root.call("sczctl", "install", "--engine", "docker", "--runtime", "/usr/bin/runc")


def test_a_package_that_was_not_configured_to_the_end_still_cleans_the_engines(
    root: FreshRoot, debs: dict[str, str]
) -> None:
    root.call("dpkg", "--unpack", debs["new"])
    root.sh("mv /usr/lib/scz-smm/maintain /root/maintain && ln -s /bin/false /usr/lib/scz-smm/maintain")
    assert root.call("dpkg", "--configure", "scz-smm", check=False).returncode != 0
    root.sh("rm /usr/lib/scz-smm/maintain && mv /root/maintain /usr/lib/scz-smm/maintain")
    assert "half-configured" in root.call("dpkg-query", "--show", "--showformat=${Status}", "scz-smm").stdout
    removed = root.call("apt-get", "-yq", "remove", "scz-smm")
    assert "WARNING" not in removed.stdout + removed.stderr
    assert not exists(root, "etc/docker/daemon.json")
    root.apt("install", debs["new"])
    works(root, __version__)


@pytest.mark.parametrize("lost", ["oci_hook/hook.py", "oci_hook/errors.py", "oci_hook/oci"])
def test_lost_modules_are_refused_and_a_reinstallation_mends_it(
    root: FreshRoot, debs: dict[str, str], lost: str
) -> None:
    root.sh(f"rm -r /usr/lib/scz-smm/{lost}")
    hook_refuses_and_says_why(root, ASKING)
    assert root.call(*HOOK, "prestart", stdin=STATE).stderr == ""  # it asks for nothing, so nothing of this is read
    root.apt("install", "--reinstall", debs["new"])
    works(root, __version__)


def test_purge_leaves_nothing(root: FreshRoot) -> None:
    root.sh("mkdir -p /var/lib/scz-smm/models /var/log/scz-smm /run/scz-smm && touch /var/lib/scz-smm/models/x")
    root.apt("purge", "scz-smm")
    left = root.sh("find / -xdev -name '*scz*smm*' -not -path '/proc/*' -not -path '/root/*' -not -path '/sys/*'")
    assert [line for line in left.splitlines() if "scz-smm" in line] == []
    assert not exists(root, "etc/docker/daemon.json")  # `install` made it


# --- the README's example, and what comes after ---


def test_a_model_is_protected_with_the_package_alone(root: FreshRoot, story: Story) -> None:
    assert version(root) == OLDER
    story.tell()
    story.start("first")
    assert story.reads("first")
    assert story.holders() == 1


def test_a_container_without_a_token_does_not_start(root: FreshRoot, story: Story) -> None:
    words = ["podman", "run", "--rm", "--annotation", "smm.scz/model=minilm:1", "localhost/application"]
    assert root.call(*words, "/bin/busybox", "true", check=False).returncode != 0
    why = root.call("sczctl", "why").stdout
    assert "18" in why
    assert "token" in why


def test_a_full_disk_leaves_the_version_before_at_work(root: FreshRoot, story: Story, debs: dict[str, str]) -> None:
    root.sh(
        "mkdir /root/before && cp -a /usr/lib/scz-smm/. /root/before/ && "
        "size=$(du -sk /root/before | cut -f1) && "
        "mount -t tmpfs -o size=$((size + 2048))k,mode=0755 full /usr/lib/scz-smm && "
        "cp -a /root/before/. /usr/lib/scz-smm/ && rm -r /root/before"
    )
    try:
        failed = root.call("apt-get", "-yq", "install", debs["new"], check=False)
        assert failed.returncode != 0
        assert "No space left on device" in failed.stdout + failed.stderr
        works(root, OLDER)
        story.start("meanwhile")
        assert story.reads("meanwhile")
        root.sh("podman rm --force --time 0 meanwhile")
        root.sh("mount -o remount,size=200m /usr/lib/scz-smm")
        root.apt("-f", "install")
        root.apt("install", debs["new"])
        works(root, __version__)
        assert story.reads("first")
    finally:
        root.sh("umount /usr/lib/scz-smm")  # what lies under it is the version before, whole
    root.call("dpkg", "--force-confold", "--install", debs["older"])


def test_an_upgrade_while_a_container_holds_a_model(root: FreshRoot, story: Story, debs: dict[str, str]) -> None:
    works(root, OLDER)
    changed = (root / "etc/scz-smm/config.toml").read_text()
    assert "\ntcti = " in changed
    assert exists(root, f"{PRIVATE}/oci_hook/gone.py")
    root.apt("install", debs["new"])
    works(root, __version__)
    assert not exists(root, f"{PRIVATE}/oci_hook/gone.py")
    assert (root / "etc/scz-smm/config.toml").read_text() == changed
    assert story.reads("first")
    assert story.holders() == 1
    story.start("second")
    assert story.reads("second")
    assert exists(root, "etc/scz-smm/config.toml.dpkg-dist")  # the new one, beside it
    assert root.call("dpkg", "--verify", "scz-smm").stdout.splitlines() == ["??5?????? c /etc/scz-smm/config.toml"]


def test_removal_cleans_the_engines_and_keeps_models_and_keys(root: FreshRoot, story: Story) -> None:
    """And the shim's scripts, without which no engine could stop or enter what was started through them."""
    root.sh("""mkdir -p /etc/docker && echo '{"log-level": "info"}' >/etc/docker/daemon.json""")
    root.call("sczctl", "install", "--engine", "docker", "--runtime", "/usr/bin/runc")
    root.call("sczctl", "install", "--engine", "containerd", "--runtime", "/usr/bin/runc")
    root.call("sczctl", "install", "--engine", "cri-o")
    root.call("sczctl", "cdi", "generate", "--all")
    make_bundle(root / "root/bundle", args=["sleep", "3600"])
    root.sh(f"{SHIM} create --bundle /root/bundle plain </dev/null >/dev/null 2>&1; {SHIM} start plain")
    kept = {path: snapshot(root, path) for path in ("var/lib/scz-smm", "etc/scz-smm/trust", SCRIPTS)}
    assert len(kept[SCRIPTS]) == 2
    assert all(kept.values())
    removed = root.call("apt-get", "-yq", "remove", "scz-smm")
    assert "WARNING: containers hold models now" in removed.stdout + removed.stderr
    assert f"remove /{SCRIPTS}/docker/scz-runc when no container is left" in removed.stdout
    assert {path: snapshot(root, path) for path in kept} == kept
    assert exists(root, "etc/scz-smm/config.toml")
    for gone in (PRIVATE, "usr/bin/sczctl", f"{HOOKS[1:]}/scz-smm-prestart.json"):
        assert not exists(root, gone)
    for gone in (
        "etc/containerd/conf.d/50-scz-smm.toml",
        "etc/crio/crio.conf.d/50-scz-smm.conf",
        "etc/cdi/scz-smm.json",
    ):
        assert not exists(root, gone)
    assert json.loads((root / "etc/docker/daemon.json").read_text()) == {"log-level": "info"}
    assert story.reads("first")
    assert story.reads("second")


def test_what_the_shim_started_is_entered_and_stopped_without_the_package(root: FreshRoot, story: Story) -> None:
    assert not exists(root, PRIVATE)
    assert root.call(*SHIM.split(), "exec", "plain", "/bin/busybox", "echo", "in").stdout == "in\n"
    refused = root.call(*SHIM.split(), "create", "--bundle", "/root/bundle", "other", check=False)
    assert (refused.returncode, "InstallationIncomplete (72)" in refused.stderr) == (INCOMPLETE, True)
    root.call(*SHIM.split(), "kill", "plain", "KILL")
    root.call(*SHIM.split(), "delete", "--force", "plain")
    assert json.loads(root.call(*SHIM.split(), "list", "--format", "json").stdout or "[]") in (None, [])


def snapshot(root: FreshRoot, path: str) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in (root / path).rglob("*") if each.is_file()}


def test_it_comes_back_with_models_and_keys(root: FreshRoot, story: Story, debs: dict[str, str]) -> None:
    root.apt("install", debs["new"])
    works(root, __version__)
    story.start("third")
    assert story.reads("third")
    assert "minilm:1" in root.call("sczctl", "list").stdout


def test_purge_removes_models_and_keys(root: FreshRoot, story: Story) -> None:
    root.sh("podman rm --all --force --time 0")
    assert story.holders() == 0
    purged = root.call("apt-get", "-yq", "purge", "scz-smm")
    assert "WARNING" not in purged.stdout + purged.stderr
    for path in (*DATA, PRIVATE, SCRIPTS):
        assert not exists(root, path)
    assert root.call("dpkg-query", "--show", "scz-smm", check=False).returncode != 0
