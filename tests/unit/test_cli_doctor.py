"""`sczctl doctor`: what is there, what is missing and what mends it, on hosts that a test can make; a TPM is in
integration/test_doctor.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hook.audit import AuditLog
from oci_hook.engines import programs
from tests.commands import Household, done, sczctl, snapshot

SAYS = {
    "podman": "podman version 4.3.1",
    "runc": "runc version 1.1.5+ds1\ncommit: x",
    "crun": "crun version 1.8.1",
    "runsc": "runsc version release-20240729.0\nspec: 1.1.0",
    "crio": "crio version 1.37.0",
    "containerd": "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
    "dockerd": "Docker version 20.10.24+dfsg1, build 5d6db84",
    "kata-runtime": "kata-runtime  : 3.2.0",
}


# What depends on the machine that the tests run on; unit/test_doctor_kernel.py has them one by one.
MACHINES = (
    "plaintext",
    "swap",
    "kdump",
    "hibernation",
    "core dumps",
    "suid_dumpable",
    "ptrace",
    "clock",
    "TPM access tpm0",
    "TPM access tpmrm0",
)


class Host(Household):
    """A household whose engines and runtimes are small scripts below a root of their own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.root = directory / "root"
        self.root.mkdir()

    def has(self, *names: str, says: str | None = None) -> None:
        folder = self.root / "usr/bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_text(f"#!/bin/sh\necho '{SAYS[name] if says is None else says}'\n")
            (folder / name).chmod(0o755)

    def install(self, engine: str, *words: object) -> None:
        done(self.ctl("install", "--engine", engine, "--root", self.root, *words))

    def doctor(self) -> dict[str, list[dict[str, Any]]]:
        """The checks by their names; exit code and text are compared with them, and that nothing changed."""
        before = snapshot(self.host, self.root)
        told = self.ctl("doctor", "--root", self.root, "--json")
        assert told.err == ""
        checks = told.json["checks"]
        failing = [check for check in checks if check["status"] == "fail"]
        assert (told.code, told.json["ok"]) == (1 if failing else 0, not failing)
        for check in checks:
            assert check["status"] in ("ok", "warn", "fail")
            assert bool(check["remedy"]) == (check["status"] != "ok")
        lines = self.ctl("doctor", "--root", self.root).out.splitlines()
        assert [line for line in lines if line.startswith("  fail ")] == [
            f"  fail {check['name']}: {check['message']}" for check in failing
        ]
        totals = {status: sum(check["status"] == status for check in checks) for status in ("ok", "warn", "fail")}
        assert told.json["summary"] == totals
        assert set(checks[0]) == {"group", "name", "status", "message", "remedy"}
        assert lines[-1] == (
            f"{totals['ok']} ok, {totals['warn']} warn, {totals['fail']} fail" + ("" if failing else ": nothing fails")
        )
        assert snapshot(self.host, self.root) == before
        found: dict[str, list[dict[str, Any]]] = {}
        for check in checks:
            found.setdefault(check["name"], []).append(check)
        return found

    def lines(self, name: str, status: str) -> list[tuple[str, str]]:
        """Message and remedy of each line of that name and status."""
        return [(each["message"], each["remedy"]) for each in self.doctor().get(name, []) if each["status"] == status]

    def check(self, name: str) -> tuple[str, str, str]:
        (check,) = self.doctor()[name]
        return check["status"], check["message"], check["remedy"]


def make_host(directory: Path) -> Host:
    """A host without a TPM."""
    made = Host(directory)
    with made.config.open("a") as file:
        file.write(f'[tpm]\ntcti = "device:{directory}/no-tpm"\n')
    return made


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path)


def statuses(host: Host) -> dict[str, str]:
    return {name: checks[0]["status"] for name, checks in host.doctor().items()}


def test_an_empty_host(host: Host) -> None:
    found = statuses(host)
    for name in MACHINES:
        found.pop(name, None)
    assert found == {
        "package": "ok",
        "permissions": "ok",
        "log rotation": "warn",
        "configuration": "ok",
        "kernel": "ok",
        "huge pages": "ok",
        "memory": "ok",
        "control groups": "ok",
        "enrolment": "fail",
        "TPM": "fail",
        "owners": "fail",
        "issuers": "fail",
        "models": "fail",
        "audit log": "ok",
        "runtimes": "fail",
        "engines": "fail",
    }
    assert not (host.host / "run").exists()
    assert not (host.host / "log").exists()


def test_a_prepared_host(host: Host) -> None:
    out = host.prepared()
    done(host.ctl("add", out, host.pack("two", version="2") / "bundle"))
    done(host.ctl("token", "init", "--issuer", "https://i.example", "-o", host.host / "issuer.json"))
    done(host.ctl("trust", "add", "issuer", host.host / "issuer.json"))
    host.has("podman", "runc", "crun", "runsc")
    host.install("podman")
    found = host.doctor()
    assert found["enrolment"][0]["status"] == "ok"
    assert found["owners"][0]["message"] == "1 owner trusted"
    assert found["issuers"][0]["message"] == "1 token issuer trusted"
    assert found["model minilm:1"][0]["status"] == "ok"
    (ungranted,) = found["model minilm:2"]
    assert (ungranted["status"], "sczctl grant" in ungranted["remedy"]) == ("fail", True)
    assert found["runtime runsc"][0]["message"] == "/usr/bin/runsc, 20240729.0"
    assert found["runtime crun"][0]["message"] == "/usr/bin/crun, 1.8.1"
    assert found["engine podman"][0]["message"] == "/usr/bin/podman, 4.3.1: hooks.d or CDI, installed"
    assert "engines" not in found


def test_a_model_without_its_boot_policy_or_owner(host: Host) -> None:
    done(host.ctl("add", host.prepared()))
    (policy,) = (host.store_folder / "boot-policies").rglob("*.json")
    policy.unlink()
    status, message, remedy = host.check("model minilm:1")
    assert (status, "no boot policy" in message, "boot-policy sign" in remedy) == ("fail", True, True)
    done(host.ctl("trust", "rm", "owner", "acme"))
    assert host.check("model minilm:1")[0] == "fail"
    assert host.check("owners")[0] == "fail"
    Path(host.store.name_path("minilm", "1")).write_bytes(b"?")
    assert "sczctl rm" in host.check("model minilm:1")[2]


def test_what_is_damaged_is_a_line_and_no_traceback(host: Host) -> None:
    host.prepared()
    (host.store_folder / "device.json").write_bytes(b"{}")
    (host.host / "trust/owners/acme.json").write_bytes(b"{}")
    (host.host / "log").mkdir()
    (host.host / "log/audit.jsonl").write_bytes(b"")
    (host.host / "log/audit.jsonl").chmod(0o666)
    found = statuses(host)
    assert [found[name] for name in ("enrolment", "owners", "audit log")] == ["fail"] * 3
    host.config.write_text("x = 1\n")
    status, message, _ = host.check("configuration")
    assert (status, "'x'" in message) == ("fail", True)


def test_a_clock_behind_the_audit_log(host: Host) -> None:
    path = host.host / "log/audit.jsonl"
    AuditLog(str(path), clock=lambda: time.time() + 3600).append("closed", container="c")
    status, message, remedy = host.check("audit log")
    assert (status, "behind the last record" in message, "set the clock" in remedy) == ("fail", True, True)
    path.write_bytes(b"not a record\n")
    assert host.check("audit log")[0] == "fail"


def test_hostile_names_do_not_reach_the_terminal(host: Host) -> None:
    host.has("podman", says="podman version 1.0\x1b[2J")
    assert "\x1b" not in host.ctl("doctor", "--root", host.root).out


@pytest.mark.parametrize("engine", ["podman", "cri-o", "containerd", "docker"])
def test_each_engine_is_seen_before_during_and_after(host: Host, engine: str) -> None:
    name, check = {"cri-o": "crio", "docker": "dockerd"}.get(engine, engine), f"engine {engine}"
    host.has(name, "runc")
    host.root.joinpath("etc/containerd").mkdir(parents=True)
    main = host.root / "etc/containerd/config.toml"
    main.write_text('version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    status, message, remedy = host.check(check)
    assert (status, "not installed" in message, remedy) == ("warn", True, f"`sczctl install --engine {engine}`")
    assert statuses(host)["engines"] == "fail"
    host.install(engine)
    assert (host.check(check)[0], "engines" in host.doctor()) == ("ok", False)
    done(sczctl("--config", "/etc/other.toml", "install", "--engine", engine, "--root", host.root))
    status, message, remedy = host.check(check)
    assert (status, "another" in message, f"--engine {engine}" in remedy) == ("fail", True, True)
    done(host.ctl("uninstall", "--engine", engine, "--root", host.root))
    assert host.check(check)[0] == "warn"


def test_half_an_installation_is_missing(host: Host) -> None:
    host.has("podman", "crio", "containerd", "dockerd", "runc", "crun")
    for engine in ("podman", "cri-o", "docker"):
        host.install(engine)
    (host.root / "usr/share/containers/oci/hooks.d/scz-smm-poststop.json").unlink()
    (host.root / "etc/crio/crio.conf.d/50-scz-smm.conf").unlink()
    (host.root / "usr/local/libexec/scz-smm/docker/scz-crun").unlink()
    host.install("containerd")  # without a config.toml that imports the drop-in
    for engine, word in (("podman", "poststop"), ("cri-o", "does not read"), ("docker", "scz-crun is missing")):
        status, message, _ = host.check(f"engine {engine}")
        assert (status, word in message) == ("fail", True), message
    assert host.check("engine containerd")[:2][0] == "fail"
    host.install("podman")
    conf = host.root / "etc/containers/containers.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text('[engine]\nhooks_dir = ["/other"]\n')
    assert "does not read" in host.check("engine podman")[1]
    (host.root / "etc/docker/daemon.json").write_text("{")
    assert host.check("engine docker")[0] == "fail"


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "\xff", "x = 1"])
def test_whatever_lies_in_the_engines_files_is_a_line(host: Host, text: str) -> None:
    host.has("podman", "crio", "containerd", "dockerd", "runc")
    for engine in ("podman", "cri-o", "containerd", "docker"):
        host.install(engine)
    done(host.ctl("add", host.prepared()))
    done(host.ctl("cdi", "generate", "--all", "-o", host.root / "etc/cdi/scz-smm.json"))
    written = sorted(path for path in host.root.rglob("*") if path.is_file() and "usr/bin" not in str(path))
    (host.root / "etc/containerd/config.toml").touch()
    for path in [*written, host.root / "etc/containerd/config.toml"]:
        before = path.read_bytes()
        path.write_text(text, encoding="latin-1")
        told = host.ctl("doctor", "--root", host.root)
        assert (told.code in (0, 1), told.err) == (True, ""), path
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("etc/containerd/config.toml", "imports = 1\ndisabled_plugins = 'cri'\nversion = true\nplugins = 3"),
        ("etc/containerd/config.toml", "imports = [1, {}]\n[plugins.'io.containerd.grpc.v1.cri']\ncontainerd = 1"),
        (
            "etc/containerd/config.toml",
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes]\nx = 1\ny.options = 2\nz.options.BinaryName = 3",
        ),
        ("etc/containerd/config.toml", "imports = ['config.toml', '*', '/etc/containerd/*']"),
        ("etc/crio/crio.conf", "[crio.runtime]\nhooks_dir = 'x'"),
        ("etc/crio/crio.conf", "[crio]\nruntime = [1]"),
        ("etc/containers/containers.conf", "engine = 1"),
        ("etc/containers/containers.conf", "[engine]\nhooks_dir = [1, ['x']]"),
        ("etc/docker/daemon.json", '{"runtimes": {"scz-runc": [], "x": {"path": 1}}, "default-runtime": []}'),
        ("etc/cdi/scz-smm.json", '{"kind": "smm.scz/model", "devices": [{"name": 1}]}'),
        ("usr/share/containers/oci/hooks.d/scz-smm-prestart.json", '{"hook": {"args": [1, 2, 3, 4, 5]}}'),
        ("usr/share/containers/oci/hooks.d/scz-smm-prestart.json", '{"hook": {"args": []}}'),
    ],
)  # fmt: skip
def test_files_of_another_shape_are_a_line(host: Host, file: str, text: str) -> None:
    host.has("podman", "crio", "containerd", "dockerd", "runc")
    path = host.root / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    host.doctor()


def test_cri_o_under_a_later_drop_in(host: Host) -> None:
    host.has("crio", "runc")
    host.install("cri-o")
    later = host.root / "etc/crio/crio.conf.d/99-x.conf"
    later.write_text('[crio.runtime]\nhooks_dir = ["/x"]\n')
    assert "does not read" in host.check("engine cri-o")[1]


def test_a_handler_that_drops_the_annotations(host: Host) -> None:
    host.has("containerd", "runc")
    main = host.root / "etc/containerd/config.toml"
    main.parent.mkdir(parents=True)
    main.write_text('version = 2\nimports = ["conf.d/*.toml"]\n')
    host.install("containerd")
    drop_in = main.parent / "conf.d/50-scz-smm.toml"
    drop_in.write_text(drop_in.read_text().replace('["smm.scz/*"]', "[]"))
    assert "pod_annotations" in host.check("engine containerd")[1]


def test_runtimes_that_are_too_old_or_unknown(host: Host) -> None:
    host.has("runc", says="runc version 1.0.3")
    host.has("crun", says="")
    found = host.doctor()
    for name in ("runtime runc", "runtime crun"):
        assert found[name][0]["status"] == "warn"


def test_a_program_that_does_not_answer_is_left_behind(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_SECONDS", 0.2)
    host.has("podman")
    (host.root / "usr/bin/podman").write_text("#!/bin/sh\nexec sleep 1000\n")
    assert "version unknown" in host.check("engine podman")[1]


@pytest.mark.parametrize(
    ("name", "version"),
    [("podman", "4.3.1"), ("runc", "1.1.5+ds1"), ("crio", "1.37.0"), ("containerd", "1.6.20~ds1"),
     ("dockerd", "20.10.24+dfsg1"), ("runsc", "20240729.0")],
)  # fmt: skip
def test_versions_are_read(name: str, version: str) -> None:
    assert programs.parse_version(SAYS[name]) == version


def test_cdi_devices_are_looked_at(host: Host) -> None:
    done(host.ctl("add", host.prepared()))
    file = host.root / "etc/cdi/scz-smm.json"
    host.has("podman", "runc")
    done(host.ctl("cdi", "generate", "--all", "-o", file))
    found = host.doctor()
    assert found["CDI"][0]["status"] == "ok"
    assert "engines" not in found  # a device calls the hook, too
    done(host.ctl("rm", "minilm:1"))
    assert [check["status"] for check in host.doctor()["CDI"]] == ["ok", "warn"]
    document = json.loads(file.read_text())
    document["devices"][0]["containerEdits"]["hooks"][0]["args"][3] = "/elsewhere/launch.py"
    file.write_text(json.dumps(document))
    assert host.doctor()["CDI"][0]["status"] == "fail"
    file.write_text("{}")
    assert host.check("CDI")[0] == "fail"
