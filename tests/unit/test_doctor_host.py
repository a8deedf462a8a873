"""`cli.checks.host`, `models` and `package`: whose files they are, what is damaged, too old or half there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oci_hook
from oci_hook import __version__
from oci_hook.audit import AuditLog
from oci_hook.cli.checks import host as host_checks
from oci_hook.cli.checks.models import StoredSize, check_room, judge_timeout, needed_seconds
from oci_hook.cli.checks.package import check_package
from oci_hook.config import Config, load_config
from tests.commands import done, flip_bit, snapshot
from tests.unit.test_cli_doctor import Host, make_host

GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path)


# --- whose files ------------------------------------------------------------------------------------------------------


def test_a_configuration_that_others_can_write(host: Host) -> None:
    host.config.chmod(0o666)
    status, message, remedy = host.check("configuration")
    assert (status, f"{host.config} is writable by others than root (mode 0666)" in message) == ("fail", True)
    assert f"`chmod go-w {host.config}`" in remedy
    host.config.chmod(0o644)
    os.chown(host.config, 1000, 1000)
    assert f"`chown root: {host.config}`" in host.check("configuration")[2]


def test_a_configuration_of_a_newer_version(host: Host) -> None:
    host.config.write_text("version = 2\n" + host.config.read_text())
    status, message, remedy = host.check("configuration")
    assert (status, message) == ("fail", "this configuration is of version 2; this scz-smm reads version 1")
    assert "upgrade the package" in remedy


def test_folders_and_trusted_files_that_others_can_write(host: Host) -> None:
    host.trust()
    assert host.check("permissions")[0] == "ok"
    trust = host.host / "trust"
    owner = trust / "owners/acme.json"
    owner.chmod(0o664)
    status, message, remedy = host.check("permissions")
    assert (status, str(owner) in message, remedy) == ("fail", True, f"chmod go-w {owner}")
    owner.chmod(0o644)
    host.config.parent.chmod(0o1777)  # sticky, as /tmp: nobody else can rename root's files there
    assert host.check("permissions")[0] == "ok"
    host.config.parent.chmod(0o755)
    os.chown(trust, 1000, 0)
    assert host.check("permissions")[2] == f"chown root: {trust}"


# --- the store --------------------------------------------------------------------------------------------------------


def blobs(host: Host) -> list[Path]:
    """The layers in the store, the largest first."""
    found = (host.store_folder / "models").rglob("blobs/sha256/*")
    return sorted(found, key=lambda path: -path.stat().st_size)


def test_an_entry_that_is_damaged_on_disk(host: Host) -> None:
    out = host.prepared()
    done(host.ctl("add", out))
    (found,) = host.doctor()["model minilm:1"]
    assert (found["status"], "its files have their sizes" in found["message"]) == ("ok", True)
    layer = blobs(host)[0]
    data = layer.read_bytes()
    layer.write_bytes(data[:-1])
    status, message, remedy = host.check("model minilm:1")
    assert (status, message.startswith("damaged on disk: the blob sha256:")) == ("fail", True), message
    assert remedy.startswith("`sczctl add FOLDER` again")
    layer.unlink()
    assert host.check("model minilm:1")[1].startswith("damaged on disk")
    layer.write_bytes(data)
    assert host.check("model minilm:1")[0] == "ok"


def test_damage_that_leaves_the_size_is_found_by_hashing(host: Host) -> None:
    out = host.prepared()
    done(host.ctl("add", out))
    flip_bit(blobs(host)[0])
    assert host.check("model minilm:1")[0] == "ok"
    told = host.ctl("doctor", "--deep", "--root", host.root, "--json")
    (found,) = (check for check in told.json["checks"] if check["name"] == "model minilm:1")
    assert (found["status"], "does not hash" in found["message"]) == ("fail", True)
    assert found["remedy"].startswith("`sczctl add FOLDER` again")


def test_a_grant_whose_bundle_an_image_carries(host: Host) -> None:
    out = host.prepared()
    done(host.ctl("add", "--without-bundle", out / "grant.jwt", out / "boot-policy.json"))
    status, message, _ = host.check("model minilm:1")
    assert (status, message.startswith("its grant;")) == ("ok", True)


def test_memory_against_the_models() -> None:
    config = Config(memory_reserve_bytes=0)
    assert list(check_room(config, [])) == []
    (found,) = check_room(config, [StoredSize("a:1", 1), StoredSize("b:1", 2)])
    assert found.status == "ok"
    (found,) = check_room(config, [StoredSize("a:1", 1 << 50), StoredSize("b:1", 2)])
    assert (found.status, "a:1 takes 1073741824 MiB" in found.message) == ("warn", True)
    with open("/proc/meminfo", encoding="utf-8") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    half = total * 6 // 10
    (found,) = check_room(config, [StoredSize("a:1", half // 4)] * 8)
    assert (found.status, "not all of them can run at once" in found.message) == ("warn", True)


def test_the_formula_for_the_hooks_time() -> None:
    assert [needed_seconds(size) for size in (0, 1, 100_000_000, 10 * GIB)] == [10, 11, 11, 118]
    large, command = StoredSize("m:1", 10 * GIB), "sczctl install --engine podman"
    assert judge_timeout("podman", 118, large, command=command).status == "ok"
    found = judge_timeout("podman", 117, large, command=command)
    assert (found.status, found.remedy) == ("warn", "`sczctl install --engine podman --timeout 118`")
    assert judge_timeout("podman", 10, large, command=command).status == "fail"  # not even at 1 GB/s
    assert judge_timeout("podman", None, large, command=command).status == "warn"
    assert judge_timeout("podman", 10, None, command=command).status == "ok"


# --- trust ------------------------------------------------------------------------------------------------------------


def test_keys_of_an_issuer_that_are_old(host: Host, tmp_path: Path) -> None:
    other = make_host(tmp_path / "other")
    done(other.ctl("token", "init", "--issuer", "https://other.example", "--name", "other", "-o", tmp_path / "o.json"))
    done(host.ctl("trust", "add", "issuer", tmp_path / "o.json"))
    path = host.host / "trust/issuers/other.json"
    assert host.check("issuer other")[1] == "1 key, added 0 days ago"
    old = time.time() - (host_checks.JWK_SET_DAYS + 1) * 86400
    os.utime(path, (old, old))
    status, message, remedy = host.check("issuer other")
    assert (status, "added 91 days ago" in message, "trust add issuer" in remedy) == ("warn", True, True)


def test_this_hosts_own_issuer(host: Host) -> None:
    document = host.host / "i.json"
    done(host.ctl("token", "init", "--issuer", "https://i.example", "-o", document))
    status, message, remedy = host.check("own issuer")
    assert (status, "is not trusted" in message, "trust add issuer" in remedy) == ("warn", True, True)
    done(host.ctl("trust", "add", "issuer", document))
    os.utime(host.host / "trust/issuers/local.json", (0, 0))
    assert host.check("own issuer")[0] == "ok"
    assert "issuer local" not in host.doctor()  # its keys do not age: they are this host's
    key = host.store_folder / "issuer/issuer.key"
    key.chmod(0o640)
    assert "others may issue tokens" in host.check("own issuer")[1]
    key.unlink()
    status, _, remedy = host.check("own issuer")
    assert (status, "sczctl token init" in remedy) == ("fail", True)


# --- audit, rotation, timer -------------------------------------------------------------------------------------------


def test_the_chain_is_followed_for_a_bounded_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    log = host.host / "log/audit.jsonl"
    for _ in range(3):
        AuditLog(str(log)).append("closed", container="c")
    assert host.check("audit log")[1] == f"{log}, 3 records, chained"
    monkeypatch.setattr(host_checks, "_CHAIN_SECONDS", -1.0)
    assert "1 record; `sczctl audit verify` looks at all" in host.check("audit log")[1]
    monkeypatch.undo()
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[2])
    status, message, remedy = host.check("audit log")
    assert (status, "does not follow" in message, "sczctl audit verify" in remedy) == ("fail", True, True)


def test_a_log_that_was_rotated_is_not_begun(host: Host) -> None:
    path = host.host / "log/audit.jsonl"
    log = AuditLog(str(path))
    log.append("closed", container="c")
    path.rename(f"{path}.1")
    for made in (False, True):  # as logrotate's `create` would
        if made:
            path.touch(0o600)
        before = snapshot(path.parent)
        assert host.check("audit log")[1] == f"{path}, 1 record, chained"
        assert snapshot(path.parent) == before
    Path(f"{path}.1").write_bytes(b"no record\n")
    status, message, remedy = host.check("audit log")
    assert (status, f"{path}.1" in message, f"restore {path}.1" in remedy) == ("fail", True, True)


def test_room_for_the_audit_log(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "_LEAST_ROOM_BYTES", 1 << 62)
    status, message, _ = host.check("audit log")
    assert (status, "refuses every start" in message) == ("warn", True)


def test_rotation_and_timer(host: Host) -> None:
    assert host.check("log rotation")[0] == "warn"
    assert "sweep timer" not in host.doctor()  # no systemd runs there
    (host.root / "etc/logrotate.d").mkdir(parents=True)
    (host.root / "etc/logrotate.d/scz-smm").write_text(f"{load_config(str(host.config)).audit_file} {{\n}}\n")
    assert host.check("log rotation")[0] == "ok"
    (host.root / "run/systemd/system").mkdir(parents=True)
    assert host.check("sweep timer")[2] == "systemctl enable --now scz-smm-sweep.timer"
    wants = host.root / "etc/systemd/system/timers.target.wants"
    wants.mkdir(parents=True)
    (wants / "scz-smm-sweep.timer").symlink_to("/usr/lib/systemd/system/scz-smm-sweep.timer")
    assert host.check("sweep timer")[0] == "ok"


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to be broken."""
    folder = tmp_path / "lib/oci_hook"
    shutil.copytree(os.path.dirname(oci_hook.__file__), folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_package_that_is_whole(package: Path) -> None:
    (found,) = check_package(str(package))
    assert (found.status, __version__ in found.message) == ("ok", True)


def test_a_package_of_which_a_half_is_there(package: Path) -> None:
    (package / "delivery/fill.py").unlink()
    (package / "hook.py").write_text("")
    (package / "__init__.py").write_text('__version__ = "99.0"\n')
    description = package.parent / "scz_smm-98.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: scz-smm\nVersion: 98.0\n")
    found = list(check_package(str(package)))
    assert {check.status for check in found} == {"fail"}
    assert {check.remedy for check in found} == {
        "install the package scz-smm again (`apt install --reinstall scz-smm`)"
    }
    said = " ".join(check.message for check in found)
    for word in ("oci_hook.delivery.fill is missing", "oci_hook.hook is empty", "version 99.0", "of version 98.0"):
        assert word in said


@pytest.mark.parametrize("module", ["jose", "cryptography", "google", "psutil", "tpm2_pytss"])
def test_a_dependency_that_is_not_there_is_told_and_the_rest_is_looked_at(
    host: Host, package: Path, module: str
) -> None:
    """In a process of its own, as none of them may be imported yet."""
    script = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); sys.modules[{module!r}] = None\n"
        "from oci_hook.cli import main; main(sys.argv[1:])"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, "--config", str(host.config), "doctor", "--root", str(host.root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (told.returncode, told.stderr) == (1, "")
    assert "fail package: half installed: " in told.stdout
    name = {"tpm2_pytss": "tpm2-pytss", "google": "protobuf"}.get(module, module)
    assert f"{name}: cannot be imported" in told.stdout
    assert "apt install --reinstall scz-smm" in told.stdout
    assert "kernel: Linux" in told.stdout
    assert " fail" in told.stdout.splitlines()[-1]


# --- without root's rights --------------------------------------------------------------------------------------------


def test_without_roots_rights_it_says_what_it_cannot_see(host: Host, tmp_path: Path) -> None:
    done(host.ctl("add", host.prepared()))
    os.chmod(host.store_folder, 0o700)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            told = host.ctl("doctor", "--root", host.root, "--json")
            checks = {check["name"]: check for check in told.json["checks"]}
            code = 0
            code += told.err != "" or told.code != 1
            code += 2 * (checks["user"]["status"] != "fail")
            code += 4 * any(
                check["status"] == "fail" for check in checks.values() if check["group"] in ("store", "TPM")
            )
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
