"""`sczctl install --nri` and `uninstall --nri`, and what `doctor` says of NRI and its plugin."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from oci_hook.cli.checks.models import StoredSize
from oci_hook.cli.checks.nri import check_nri
from oci_hook.config import parse_config
from oci_hook.engines import nri
from oci_hook.engines.nri import GUARD, Found, parse_duration
from oci_hook.engines.plan import HostFiles, Settings
from oci_hook.errors import EngineUnsupported
from oci_hook.invocation import Invocation
from oci_hook.linux.processes import process_start_time
from oci_hook.nri.main import NAME
from oci_hook.nri.prepared import Connected, write_connected
from tests.commands import Done, done, misused, refused
from tests.unit.test_cli_doctor import Host, make_host
from tests.unit.test_cli_install import IMPORTS, Root

MAIN, DROP_IN = "etc/containerd/config.toml", "etc/containerd/conf.d/50-scz-smm-nri.toml"
CRIO_DROP_IN = "etc/crio/crio.conf.d/50-scz-smm-nri.conf"
SECTION = "io.containerd.nri.v1.nri"
TABLE = f'[plugins."{SECTION}"]\n'


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path)


def install(root: Root, version: str, *words: str) -> list[str]:
    told = done(root.run("install", "containerd", "--nri", "--engine-version", version, "--json", *words))
    return list(told.json["next"])


def drop_in(root: Root) -> dict[str, object]:
    document = tomllib.loads((root / DROP_IN).read_text())
    section: dict[str, object] = document["plugins"][SECTION]
    return section


@pytest.mark.parametrize(
    ("version", "form", "main"),
    [
        ("1.7", 2, "version = 2\n"),
        ("2.1", 3, "version = 3\n"),
        ("2.2", 2, "version = 2\n"),
        ("2.3", 3, "version = 3\n"),
    ],
)
def test_containerd(root: Root, version: str, form: int, main: str) -> None:
    root.write(MAIN, main + IMPORTS)
    assert install(root, version) == ["systemctl restart containerd", "systemctl enable --now scz-nri"]
    assert tomllib.loads((root / DROP_IN).read_text())["version"] == form
    validates = version in ("2.2", "2.3")
    assert drop_in(root) == {
        "disable": False,
        "plugin_request_timeout": "100s",
        **({"default_validator": {"enable": True}} if validates else {}),
    }
    major, minor = map(int, version.split("."))
    settings = Settings(config_file="/c", engine_version=(major, minor))
    found = nri.find("containerd", settings, HostFiles(str(root.path)))
    assert found == Found(enabled=True, seconds=100.0, where=f"/{DROP_IN}", validates=validates)
    assert root.files() == {MAIN, DROP_IN}
    told = done(root.run("uninstall", "containerd", "--nri", "--json"))
    assert told.json["next"] == ["systemctl disable --now scz-nri", "systemctl restart containerd"]
    assert root.files() == {MAIN}
    assert done(root.run("uninstall", "containerd", "--nri")).out == ""


def test_beside_the_shim(root: Root) -> None:
    root.write(MAIN, "version = 3\n" + IMPORTS)
    done(root.install("containerd", "--engine-version", "2.1"))
    shims = root.files()
    install(root, "2.1")
    assert root.files() == shims | {DROP_IN}
    done(root.run("uninstall", "containerd", "--nri"))
    assert root.files() == shims


def test_a_section_that_a_drop_in_would_replace(root: Root) -> None:
    """containerd 1.7: the administrator's own socket, say, would be forgotten."""
    root.write(MAIN, f'version = 2\n{IMPORTS}{TABLE}socket_path = "/run/own.sock"\n')
    step, *_ = install(root, "1.7")
    assert f"set there:\n\n{TABLE}" in step
    assert root.files() == {MAIN}
    root.write(MAIN, f'version = 2\n{IMPORTS}{TABLE}disable = false\nplugin_request_timeout = "2m"\n')
    assert install(root, "1.7") == ["systemctl restart containerd", "systemctl enable --now scz-nri"]
    # From 2.0 on tables are merged.
    root.write(MAIN, f'version = 3\n{IMPORTS}{TABLE}socket_path = "/run/own.sock"\n')
    assert len(install(root, "2.1")) == 2
    assert root.files() == {MAIN, DROP_IN}


def test_what_is_left_to_a_person(root: Root) -> None:
    root.write(MAIN, "version = 2\n")
    step, *_ = install(root, "1.7")
    assert step == f'add at the top of /{MAIN}: imports = ["/etc/containerd/conf.d/*.toml"]'
    root.write(MAIN, "version = 3\n" + IMPORTS)
    later = "etc/containerd/conf.d/90.toml"
    root.write(later, f'version = 3\n{TABLE}plugin_request_timeout = "2s"\n')
    assert install(root, "2.1")[0] == f"/{later} is read after our drop-in: take plugin_request_timeout out of it"
    root.write(MAIN, f'version = 3\nimports = ["/{DROP_IN}"]\n')
    told = done(root.run("uninstall", "containerd", "--nri", "--json"))
    assert "take /etc/containerd/conf.d/50-scz-smm-nri.toml out of `imports`" in told.json["next"][0]


def test_cri_o(root: Root, tmp_path: Path) -> None:
    config = root.write("etc/scz-smm/config.toml", '[nri]\nengine = "cri-o"\n')
    told = done(root.run("install", "cri-o", "--nri", "--json"))
    assert told.json["next"] == ["systemctl restart crio", "systemctl enable --now scz-nri"]
    assert tomllib.loads((root / CRIO_DROP_IN).read_text())["crio"]["nri"] == {
        "enable_nri": True,
        "nri_plugin_request_timeout": "100s",
        "default_validator": {"nri_enable_default_validator": True},
    }
    files = HostFiles(str(root.path))
    for version, validates in (((1, 33), False), ((1, 34), True)):
        found = nri.find("cri-o", Settings(config_file="/c", engine_version=version), files)
        assert found == Found(enabled=True, seconds=100.0, where=f"/{CRIO_DROP_IN}", validates=validates)
    config.write_text("")
    told = done(root.run("install", "cri-o", "--nri", "--json"))
    assert told.json["next"][0] == 'set `engine = "cri-o"` below [nri] in /etc/scz-smm/config.toml'
    done(root.run("uninstall", "cri-o", "--nri"))
    assert root.files() == {"etc/scz-smm/config.toml"}


def test_a_dry_run_writes_nothing(root: Root) -> None:
    told = done(root.run("install", "containerd", "--nri", "--engine-version", "2.2", "--dry-run"))
    assert "would write" in told.out
    assert "plugin_request_timeout" in told.out
    assert root.files() == set()


def guarded(root: Root, said: str) -> Done:
    path = root.write("usr/bin/ctr", f"#!/bin/sh\ntest \"$*\" = 'oci spec' && echo '{said}'\n")
    path.chmod(0o755)
    return root.run("install", "containerd", "--nri", "--engine-version", "1.7", "--guard", "--json")


def test_a_guard(root: Root) -> None:
    root.write(MAIN, "version = 2\n" + IMPORTS)
    other = {"path": "/bin/other"}
    base = {"ociVersion": "1.2.0", "root": {"path": "rootfs"}, "hooks": {"prestart": [other], "poststart": [other]}}
    step = done(guarded(root, json.dumps(base))).json["next"][0]
    assert f'base_runtime_spec = "{GUARD}"' in step
    document = json.loads((root / GUARD.lstrip("/")).read_text())
    hooks = document.pop("hooks")
    assert (document, hooks["poststart"], hooks["prestart"][0]) == (
        {"ociVersion": "1.2.0", "root": {"path": "rootfs"}},
        [other],
        other,
    )
    for stage, entry in (("prestart", hooks["prestart"][1]), ("poststop", hooks["poststop"][0])):
        command = Invocation(stage, config_file="/etc/scz-smm/config.toml", engine="containerd").command()
        assert (entry["path"], entry["args"], entry["timeout"]) == (command[0], command, 300)
        assert entry["env"]
    done(root.run("uninstall", "containerd", "--nri"))
    assert root.files() == {MAIN, "usr/bin/ctr"}


@pytest.mark.parametrize("where", [MAIN, "etc/containerd/conf.d/10-kata.toml"])
def test_a_guard_that_a_handler_names_stays(root: Root, where: str) -> None:
    """containerd would load no handler at all without the file."""
    root.write(MAIN, "version = 2\n" + IMPORTS)
    done(guarded(root, '{"ociVersion": "1", "root": {"path": "rootfs"}}'))
    handler = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\n'
    text = root.write(where, f'version = 2\n{IMPORTS}{handler}base_runtime_spec = "{GUARD}"\n').read_text()
    guard = GUARD.lstrip("/")
    for last in (f"take it out of the handler 'kata' in /{where}", f"rm {GUARD}"):
        told = done(root.run("uninstall", "containerd", "--nri", "--json"))
        assert last in told.json["next"][-1]
        assert (DROP_IN in root.files(), guard in root.files()) == (False, True)
    (root / where).write_text(text + "[")  # who names it is not known then
    assert guard in done(root.run("uninstall", "containerd", "--nri", "--json")).json["next"][-1]
    (root / where).write_text(f"version = 2\n{IMPORTS}")
    assert done(root.run("uninstall", "containerd", "--nri", "--json")).json["files"] == [str(root / guard)]


def test_an_engine_without_nri(root: Root) -> None:
    for version in ("1.6", "1.6.20", "1.0"):
        attempt = root.run("install", "containerd", "--nri", "--engine-version", version)
        refused(attempt, EngineUnsupported.code)
    assert root.files() == set()


def test_what_later_files_of_crio_say(root: Root) -> None:
    later = {
        "10.conf": "enable_nri = false",
        "60.conf": "enable_nri = false",
        "70.conf": "[crio.nri.default_validator]\nnri_enable_default_validator = false",
        "80.conf": "nri_plugin_request_timeout = 7\nenable_nri = true",
        "90.conf": 'nri_listen = "/run/nri.sock"',
    }
    for name, text in later.items():
        root.write(f"etc/crio/crio.conf.d/{name}", f"[crio.nri]\n{text}\n")
    root.write("etc/crio/crio.conf", "[crio.nri]\nenable_nri = false\n")
    told = [step for step in done(root.run("install", "cri-o", "--nri", "--json")).json["next"] if "read after" in step]
    assert told == [
        f"/etc/crio/crio.conf.d/{name} is read after our drop-in: take {keys} out of it"
        for name, keys in (
            ("60.conf", "enable_nri"),
            ("70.conf", "default_validator.nri_enable_default_validator"),
            ("80.conf", "enable_nri, nri_plugin_request_timeout"),
        )
    ]


@pytest.mark.parametrize("said", ["", "{", "[]", "{}", '{"ociVersion": "1"}', '{"ociVersion": "1", "root": 7}'])
def test_a_guard_from_what_is_no_specification(root: Root, said: str) -> None:
    refused(guarded(root, said), EngineUnsupported.code)
    assert root.files() == {"usr/bin/ctr"}


def test_a_guard_without_containerds_client(root: Root) -> None:
    refused(root.run("install", "containerd", "--nri", "--guard"), EngineUnsupported.code)
    misused(root.run("install", "containerd", "--guard"))
    misused(root.run("install", "cri-o", "--nri", "--guard"))


def test_options_that_mean_nothing_with_it(root: Root) -> None:
    misused(root.run("install", "podman", "--nri"))
    misused(root.run("install", "docker", "--nri"))
    misused(root.run("install", "containerd", "--nri", "--runtime", "/usr/bin/runc"))
    misused(root.run("install", "cri-o", "--nri", "--timeout", "30"))
    misused(root.run("uninstall", "containerd", "--nri", "--keep-scripts"))


def test_the_validator_knows_the_plugin_by_the_name_of_the_policy() -> None:
    policy = Path(__file__).parents[2] / "config/kubernetes/policy/models.yaml"
    assert f'["{NAME}"]' in policy.read_text()


# --- doctor -----------------------------------------------------------------------------------------------------------

BIG = StoredSize("m:1", 400_000_000)  # 14 s


def checks(host: Host, text: str | None, version: tuple[int, int] = (2, 1)) -> dict[str, tuple[str, str]]:
    if text is not None:
        path = host.root / MAIN
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = check_nri("containerd", version, str(host.config), HostFiles(str(host.root)), BIG)
    return {check.name: (check.status, check.message) for check in found}


def connected(host: Host, pid: int, start_time: int) -> None:
    run = parse_config(host.config.read_bytes()).runtime_directory
    write_connected(run, Connected(pid, start_time, "containerd v2.1.9", 100))


@pytest.mark.parametrize(
    ("text", "version", "word"),
    [
        ("version = 2", (2, 1), "plugin_request_timeout is 2 s by default; the hook does not come that way"),
        ("version = 2", (1, 7), "switched off; the hook"),
        (f"version = 2\n{TABLE}disable = true", (2, 1), f"switched off in /{MAIN}; the hook"),
        (f"version = 2\n{TABLE}disable = false", (1, 6), "switched off; the hook"),
        (f'version = 2\n{TABLE}disable = false\nplugin_request_timeout = "1m30s"', (1, 7), f"is 90 s by /{MAIN}; the"),
        (f"version = 2\n{TABLE}plugin_request_timeout = 7", (2, 1), "is 2 s by default; the hook"),
        (None, None, "switched off; the hook"),
    ],
)
def test_nri_that_is_not_used(host: Host, text: str | None, version: tuple[int, int], word: str) -> None:
    ((status, message),) = checks(host, text, version).values()
    assert (status, word in message) == ("ok", True), message


def test_nri_that_is_used(host: Host) -> None:
    text = "version = 2\n" + IMPORTS
    checks(host, text)
    done(host.ctl("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.1"))
    found = checks(host, None)
    assert found["NRI containerd"] == ("ok", f"plugin_request_timeout is 100 s by /{DROP_IN}")
    assert found["scz-nri containerd"][0] == "fail"
    assert found["NRI containerd guard"][0] == "warn"
    connected(host, 1, 1)  # of an earlier boot, or killed
    assert checks(host, None)["scz-nri containerd"][0] == "fail"
    connected(host, os.getpid(), process_start_time(os.getpid()) or 0)
    status, message = checks(host, None)["scz-nri containerd"]
    assert (status, "is connected to containerd v2.1.9; it waits 100 s" in message) == ("ok", True)
    done(host.ctl("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.2"))
    assert checks(host, None, (2, 2))["NRI containerd guard"][0] == "ok"
    (host.root / DROP_IN).write_text("version = 2\n")
    status, message = checks(host, None)["NRI containerd"]
    assert (status, "less than the 14 s that m:1 may need" in message) == ("warn", True)
    (host.root / DROP_IN).write_text(f"version = 2\n{TABLE}disable = true\n")
    assert checks(host, None)["NRI containerd"] == ("fail", "containerd lets no plugin in: NRI is off")


def test_what_the_engine_does_meanwhile(host: Host) -> None:
    handler = '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{}]\n'
    checks(host, f"version = 3\n{IMPORTS}{handler.format('runc')}{handler.format('kata-qemu')}")
    done(host.ctl("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.1"))
    status, message = checks(host, None)["NRI containerd wait"]
    assert (status, "no other container" in message, "'kata-qemu', up to 14 s" in message) == ("warn", True, True)
    assert checks(host, None)["NRI containerd reconnect"][0] == "warn"
    assert "NRI containerd reconnect" not in checks(host, None, (2, 2))
    assert "NRI containerd wait" not in checks(host, f"version = 3\n{IMPORTS}{handler.format('runc')}")


def test_the_handlers_of_crio(root: Root) -> None:
    root.write("etc/crio/crio.conf", '[crio.runtime.runtimes.kata]\nruntime_path = "/k"\n[crio.runtime.runtimes.b]\n')
    root.write("etc/crio/crio.conf.d/1.conf", "[crio.runtime.runtimes.runc]\n")
    found = nri.handlers("cri-o", Settings(config_file="/c"), HostFiles(str(root.path)))
    assert found == ("b", "kata", "runc")


def test_the_guards_of_handlers(host: Host) -> None:
    cri = '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\n'
    text = f'version = 3\n{IMPORTS}{cri}base_runtime_spec = "{GUARD}"\n'
    checks(host, text)
    words = ("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.1")
    done(host.ctl(*words))
    assert checks(host, None)["NRI containerd guard"] == ("fail", f"handler 'kata': {GUARD} is missing or unusable")
    program = host.root / "usr/bin/ctr"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho \'{"ociVersion": "1", "root": {"path": "rootfs"}}\'\n')
    program.chmod(0o755)
    done(host.ctl(*words, "--guard"))
    assert "it lacks pod_annotations" in checks(host, None)["NRI containerd guard"][1]
    status, message = checks(host, text + 'pod_annotations = ["smm.scz/*"]\n')["NRI containerd guard"]
    assert (status, message.endswith(": kata")) == ("ok", True)
    guard = host.root / GUARD.lstrip("/")
    guard.write_text(guard.read_text().replace("launch.py", "other.py"))
    assert "calls another installation" in checks(host, None)["NRI containerd guard"][1]


def test_the_plugin_of_another_engine(host: Host) -> None:
    checks(host, "version = 3\n" + IMPORTS)
    done(host.ctl("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.1"))
    with host.config.open("a") as file:
        file.write('[nri]\nengine = "cri-o"\n')
    assert checks(host, None)["scz-nri containerd"] == ("warn", "it is the plugin of cri-o, not of containerd")


def test_the_whole_command_names_it(host: Host) -> None:
    host.has("containerd", "runc")
    checks(host, "version = 2\n" + IMPORTS)
    done(host.ctl("install", "--engine", "containerd", "--nri", "--root", host.root, "--engine-version", "2.1"))
    status, message, _ = host.check("engine containerd")
    assert (status, "NRI (scz-nri), installed" in message) == ("ok", True)
    assert host.check("scz-nri containerd")[0] == "fail"


def test_durations() -> None:
    assert [parse_duration(each) for each in ("2s", "1m30s", "500ms", "1.5h")] == [2, 90, 0.5, 5400]
    assert [parse_duration(each) for each in ("", "2", "s", "2 s", 2, None, "-2s")] == [None] * 7
