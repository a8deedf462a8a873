"""AppArmor profiles and SELinux policy: compiled by the real tools, and compared with what the programs really do.

Neither is enforced here. A trace says which files a command of a unit opened; each has to be one that its profile
allows, and what it has no business with must not be.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.config import DEFAULT_CONFIG_FILE, Config
from oci_hook.delivery.holder import own_mount_namespace
from oci_hook.delivery.host_records import HostMount, HostRecord, HostRecords
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords
from tests.apparmor import Access, Profile, accesses, moved, trace

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "config" / "apparmor.d"
SELINUX = ROOT / "config" / "selinux"
PYTHON = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
(PACKAGES,) = (path for path in site.getsitepackages() if path.endswith("site-packages"))
# As /usr/bin/sczctl of the package starts: isolated, without site packages, nothing but its own beside the library.
LAUNCHER = (
    f"import sys; sys.path.append({PACKAGES!r}); sys.dont_write_bytecode = True; from oci_hook.cli import main; main()"
)


def compiled(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["/usr/sbin/apparmor_parser", "-I", str(PROFILES), "--skip-kernel-load", "--skip-cache", *words],
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def parsed() -> dict[str, Profile]:
    names = re.findall(r"^profile (\S+)", (PROFILES / "scz-smm").read_text(), re.MULTILINE)
    assert set(names) == {"scz-smm-sweep", "scz-smm-token", "scz-smm-metrics"}
    return {name: Profile(PROFILES / "scz-smm", name, include=PROFILES) for name in names}


def test_apparmor_compiles_the_profiles() -> None:
    made = compiled("--skip-read-cache", "--stdout", str(PROFILES / "scz-smm"))
    assert made.returncode == 0, made.stderr
    assert b"scz-smm-sweep" in made.stdout
    wrong = [line for line in made.stderr.decode().splitlines() if not line.startswith("Cache read/write disabled")]
    assert wrong == []


def test_no_profile_attaches_by_path() -> None:
    text = (PROFILES / "scz-smm").read_text()
    assert re.findall(r"^profile \S+ (?!flags=|\{)", text, re.MULTILINE) == []


# --- a scene with the shape of a host, and what the units do in it ----------------------------------------------------


class Host:
    """Configuration, records and directories below one root; the trace's paths are those of a package's host."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = str(root / "run/scz-smm")
        self.config = root / "etc/scz-smm/config.toml"
        for folder in ("etc/scz-smm", "run/scz-smm/tokens", "var/lib/scz-smm", "var/log/scz-smm", "run/containerd"):
            (root / folder).mkdir(parents=True, mode=0o755)
        paths = {"store": "var/lib/scz-smm", "trust": "etc/scz-smm/trust", "runtime": "run/scz-smm"}
        lines = [f'{key} = "{root}/{value}"' for key, value in paths.items()]
        self.config.write_text("[paths]\n" + "\n".join(lines) + f'\naudit = "{root}/var/log/scz-smm/audit.jsonl"\n')

    def words(self, *arguments: str) -> list[str]:
        return [PYTHON, "-I", "-S", "-B", "-c", LAUNCHER, "--config", str(self.config), *arguments]

    def traced(self, *arguments: str) -> tuple[set[Access], str]:
        """What a command opened, by the places of a package's host; and the whole trace."""
        lines = trace(self.words(*arguments), self.root.parent / "trace")
        base = os.path.realpath(sys.base_prefix)
        places = {str(self.root): "", PACKAGES: "/usr/lib/scz-smm", base: "/usr", PYTHON: "/usr/bin/python3"}
        here = [str(parent) for parent in (*self.root.parents, *Path(PACKAGES).parents, *Path(base).parents)][:-1]
        found = {access for access in accesses(lines) if access.path.rstrip("/") not in here}
        return moved(found, {key: value for key, value in places.items() if key != value}), lines


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


@pytest.fixture
def left_mounted(host: Host) -> Iterator[Path]:
    """A model that is mounted on the host's side of a container which is gone."""
    place = host.root / "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1/rootfs/models/m"
    place.mkdir(parents=True)
    with mounts.create_memory_filesystem(1 << 20, 10, mounts.probe_memory_filesystem()) as made:
        directory = os.open(place, os.O_PATH | os.O_DIRECTORY)
        file = os.open("weights", os.O_WRONLY | os.O_CREAT, 0o444, dir_fd=made.fd)
        os.write(file, b"plaintext")
        os.close(file)
        mounts.seal_superblock(made.fd)
        mounts.attach(made.fd, directory)
        os.close(directory)
    device, gone = place.stat().st_dev, (os.getpid(), 1)
    mount = HostMount(str(place), os.statvfs(place).f_fsid, f"{os.major(device)}:{os.minor(device)}")
    record = HostRecord(
        container_id="c1",
        bundle=str(host.root / "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1"),
        namespace=own_mount_namespace(),
        runtime_root=str(host.root / "run/containerd/runsc/k8s.io"),
        sandbox_id="s1",
        runtime_executable="/usr/bin/runsc",
        sandbox=gone,
        creator=gone,
        mounts=(mount,),
    )
    HostRecords(host.run).write(record)
    try:
        yield place
    finally:
        if os.path.ismount(place):
            syscalls.umount2(str(place), syscalls.MNT_DETACH)


def with_records(host: Host) -> None:
    """A container that lives, and one that is gone."""
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    for name, started in (("live", start_time), ("gone", 1)):
        record = ContainerRecord(
            container_id=name,
            bundle="/b",
            pid=os.getpid(),
            start_time=started,
            seconds=1,
            references=("m",),
            models=("m:1",),
            manifests=("sha256:" + "0" * 64,),
            destinations=("/models/m",),
            subject="s",
            size_bytes=1,
            delivered=True,
        )
        ContainerRecords(host.run).write(record)


def test_the_sweep_may_do_what_it_does(host: Host, left_mounted: Path, parsed: dict[str, Profile]) -> None:
    with_records(host)
    found, lines = host.traced("sweep")
    assert not os.path.ismount(left_mounted)
    assert " ".join(parsed["scz-smm-sweep"].denied(found)) == ""
    assert Access("/weights", "w") in found  # it has no other name after it was unmounted
    assert "umount2(" in lines
    assert "umount @{scz_rootfs}/**," in parsed["scz-smm-sweep"].lines
    assert not re.search(r"\b(socket\(AF_(?!UNIX)|(setns|mount|move_mount|kill|ptrace)\()", lines)
    assert re.findall(r"\bexecve\(", lines) == ["execve("]


def test_the_token_s_unit_may_do_what_it_does(host: Host, parsed: dict[str, Profile]) -> None:
    subprocess.run(host.words("token", "init", "--issuer", "https://x.example"), check=True, capture_output=True)
    token = host.root / "srv/shop/token"
    token.parent.mkdir(parents=True)
    for _ in range(2):  # the first, and the renewal in place
        found, lines = host.traced("token", "issue", "--subject", "s", "-o", str(token), "--force")
        assert " ".join(parsed["scz-smm-token"].denied(found)) == ""
        assert Access("/srv/shop/token", "w") in found
        assert not re.search(r"\b(socket\(AF_(?!UNIX)|(setns|mount|umount2|ptrace)\()", lines)


def test_profiles_deny_what_a_unit_has_no_business_with(parsed: dict[str, Profile]) -> None:
    for profile in parsed.values():
        for path in ("/etc/shadow", "/root/.ssh/id_ed25519", "/home/a/b", "/dev/tpmrm0", "/dev/sda", "/etc/passwd-"):
            assert not profile.allows(Access(path, "r")), path
        for path in (
            "/etc/scz-smm/config.toml",
            "/usr/lib/scz-smm/oci_hook/hook.py",
            "/usr/bin/sczctl",
            "/etc/crontab",
        ):
            assert not profile.allows(Access(path, "w")), path
        for path in ("/bin/sh", "/usr/bin/dash", "/usr/sbin/runc", "/run/scz-smm/tokens/x"):
            assert not profile.allows(Access(path, "x")), path
        assert not [line for line in profile.lines if re.match(r"(audit )?(network|dbus|change_profile)", line)]
    key = Access("/var/lib/scz-smm/issuer/issuer.key", "r")
    assert [name for name, profile in parsed.items() if profile.allows(key)] == ["scz-smm-token"]
    assert not parsed["scz-smm-token"].allows(Access("/var/lib/scz-smm/device.json", "r"))
    assert not parsed["scz-smm-token"].allows(Access("/run/containerd/c1/rootfs/models/m", "r"))


def test_the_matcher_reads_globs_as_the_manual_says(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(
        "include <tunables/global>\n@{x} = /a /b/c\n"
        "profile p {\n  @{x}/*.so mr,\n  /d/{e,f[0-9]?}/** w,\n  /g/{,**/} r,\n"
        "  /h/**.py r,\n  /i/{,**} r,\n  deny /i/secret r,\n}\n"
    )
    profile = Profile(tmp_path / "p", "p")
    allowed = ["/a/y.so", "/b/c/y.so", "/g/", "/g/h/", "/g/h/i/", "/h/a.py", "/h/a/b.py", "/i/", "/i/j/k"]
    assert [path for path in allowed if not profile.allows(Access(path, "r"))] == []
    refused = ["/a/y/z.so", "/a/y", "/b/y.so", "/g/h", "/h/apy", "/i/secret", "/d/e/x", "/i"]
    assert [path for path in refused if profile.allows(Access(path, "r"))] == []
    assert profile.allows(Access("/d/e/x/y", "w"))
    assert profile.allows(Access("/d/f1x/y", "w"))
    assert not profile.allows(Access("/d/f1/y", "w"))
    assert not profile.allows(Access("/d/e/", "w"))


# --- SELinux ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module, as the Makefile of Debian's selinux-policy-dev makes it."""
    folder = tmp_path_factory.mktemp("selinux")
    for kind in ("te", "fc", "if"):
        shutil.copy(SELINUX / f"scz_smm.{kind}", folder)
    made = subprocess.run(
        ["/usr/bin/make", "-f", "/usr/share/selinux/devel/Makefile", "scz_smm.pp"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120, env={"PATH": "/usr/sbin:/usr/bin:/bin"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""  # m4 goes on after an error, with less than was meant
    return folder / "scz_smm.pp"


def rules(policy: Path) -> list[str]:
    """What the module allows, in CIL."""
    made = subprocess.run(
        ["/usr/libexec/selinux/hll/pp", str(policy)], capture_output=True, text=True, check=True, timeout=60
    )
    return re.findall(r"^\s*(\(allow .*\))$", made.stdout, re.MULTILINE)


def test_selinux_compiles_the_policy(policy: Path) -> None:
    allowed = rules(policy)
    assert any("(allow scz_smm_t scz_smm_runtime_t (file (" in rule for rule in allowed)
    assert any(rule.startswith("(allow container_engine_domain scz_smm_var_lib_t (file (") for rule in allowed)


def test_only_the_units_may_read_the_issuer_s_key(policy: Path) -> None:
    readers = {rule.split()[1] for rule in rules(policy) if " scz_smm_key_t " in rule}
    assert readers == {"scz_smm_t"}


def test_nobody_may_write_configuration_or_store(policy: Path) -> None:
    for rule in rules(policy):
        if re.search(r" scz_smm_(conf|var_lib|key)_t ", rule):
            assert not {"write", "append", "create", "unlink", "rename"} & set(re.findall(r"\w+", rule)), rule


def test_every_place_of_the_configuration_has_a_type(policy: Path) -> None:
    shown = subprocess.run(
        ["/usr/bin/semodule_unpackage", policy.name, "module", "contexts"], cwd=policy.parent, check=True, timeout=60
    )
    assert shown.returncode == 0
    lines = re.findall(
        r"^(/\S+)\s+(?:--\s+)?system_u:object_r:(\w+):s0$", (policy.parent / "contexts").read_text(), re.MULTILINE
    )
    default = Config()
    wanted = {
        DEFAULT_CONFIG_FILE: "scz_smm_conf_t",
        f"{default.trust_directory}/owners/acme.json": "scz_smm_conf_t",
        f"{default.store_directory}/device.json": "scz_smm_var_lib_t",
        f"{default.store_directory}/issuer/issuer.key": "scz_smm_key_t",
        f"{default.runtime_directory}/last": "scz_smm_runtime_t",
        default.audit_file: "scz_smm_log_t",
        "/usr/bin/sczctl": "scz_smm_exec_t",
    }
    for path, kind in wanted.items():
        found = [context for pattern, context in lines if re.fullmatch(pattern, path)]
        assert found, path
        assert found[-1] == kind, path


# --- the units --------------------------------------------------------------------------------------------------------


def test_a_unit_that_names_a_profile_names_one_that_exists_and_starts_without(parsed: dict[str, Profile]) -> None:
    units = sorted((ROOT / "config" / "systemd").glob("*.service"))
    assert units
    for unit in units:
        for profile in re.findall(r"^AppArmorProfile=(.*)$", unit.read_text(), re.MULTILINE):
            assert profile.startswith("-"), unit.name  # without AppArmor it starts all the same
            assert profile.removeprefix("-") in parsed


def test_what_the_units_run_is_allowed_by_their_profiles(host: Host, parsed: dict[str, Profile]) -> None:
    """Units without instance and variables, as they are; files that they write are below the scene, and root's."""
    subprocess.run(host.words("token", "init", "--issuer", "https://x.example"), check=True, capture_output=True)
    with_records(host)
    ran = []
    for unit in sorted((ROOT / "config" / "systemd").glob("scz-smm-*.service")):
        (line,) = re.findall(r"^ExecStart=/usr/bin/sczctl (.*)$", unit.read_text(), re.MULTILINE)
        if "%" in line or "$" in line:
            continue
        words = [f"{host.root}{word}" if word.startswith(("/run/", "/var/")) else word for word in line.split()]
        words = ["root" if before == "--group" else word for before, word in zip(["", *words], words, strict=False)]
        for word in words:
            if word.startswith("/"):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
        assert parsed[unit.stem].denied(host.traced(*words)[0]) == [], unit.name
        ran.append(unit.stem)
    assert "scz-smm-sweep" in ran
