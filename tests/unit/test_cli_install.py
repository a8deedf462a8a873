"""`sczctl install` and `uninstall`: for each engine what is written below a root, left alone, refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import ConfigInvalid, EngineUnsupported, FileUnreadable, OutputExists
from oci_hook.invocation import ENGINES, Invocation, parse_invocation
from oci_hook.shim import shim_script
from tests.commands import Done, done, misused, refused, sczctl, snapshot

CONFIG_FILE = "/etc/scz-smm/config.toml"
HOOKS = ("scz-smm-poststop.json", "scz-smm-prestart.json")
PODMAN_HOOKS, CRIO_HOOKS = "usr/share/containers/oci/hooks.d", "etc/scz-smm/hooks.d-cri-o"
CRIO_DROP_IN = "etc/crio/crio.conf.d/50-scz-smm.conf"
CONTAINERD, CONTAINERD_DROP_IN = "etc/containerd/config.toml", "etc/containerd/conf.d/50-scz-smm.toml"
DAEMON = "etc/docker/daemon.json"
SHIMS = "usr/local/libexec/scz-smm"
IMPORTS = 'imports = ["/etc/containerd/conf.d/*.toml"]\n'
CRI = 'plugins."io.containerd.grpc.v1.cri"'


class Root:
    """A root directory of a host on which an engine is prepared."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "root"
        self.path.mkdir()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def files(self) -> set[str]:
        return {str(Path(path).relative_to(self.path)) for path in snapshot(self.path)}

    def run(self, command: str, engine: str, *words: str) -> Done:
        return sczctl(command, "--engine", engine, "--root", self.path, *words)

    def install(self, engine: str, *words: str) -> Done:
        runtimes = ["--runtime", "/usr/bin/runc"] if engine in ("containerd", "docker") else []
        return self.run("install", engine, *runtimes, *words)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


# --- the links of a root ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads", ["{outside}", "/var/elsewhere", "../../../../../../../../../var/elsewhere"])
def test_links_of_a_root_stay_in_it(root: Root, tmp_path: Path, leads: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for each in (root / "etc", root / "var/elsewhere", root / str(outside).lstrip("/")):
        each.mkdir(parents=True)
    target = leads.format(outside=outside)
    (root / "etc/docker").symlink_to(target)
    done(root.install("docker"))
    inside = root / ("var/elsewhere" if "elsewhere" in leads else str(outside).lstrip("/"))
    assert os.listdir(inside) == ["daemon.json"]
    assert os.listdir(outside) == []
    done(root.run("uninstall", "docker"))
    assert os.listdir(inside) == []


def test_links_of_a_root_that_go_round(root: Root) -> None:
    (root / "etc").mkdir()
    (root / "etc/docker").symlink_to("docker")
    refused(root.install("docker"), FileUnreadable.code, "too many symbolic links")


def test_drop_ins_behind_a_link_of_a_root(root: Root) -> None:
    root.write("data/10-a.conf", '[crio.runtime]\nhooks_dir = ["/right"]\n')
    root.write("etc/crio/crio.conf", "")
    (root / "etc/crio/crio.conf.d").symlink_to("/data")
    done(root.install("cri-o"))
    assert "/right" in (root / "data/50-scz-smm.conf").read_text()


# --- every engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dry_run_shows_what_install_writes_and_writes_nothing(root: Root, engine: str) -> None:
    shown = done(root.install(engine, "--dry-run", "--json")).json
    assert "would write" in done(root.install(engine, "--dry-run")).out
    assert root.files() == set()
    written = done(root.install(engine, "--json")).json
    assert (shown.pop("dry_run"), written.pop("dry_run")) == (True, False)
    assert shown == written
    assert {str(root.path / name) for name in root.files()} == set(written["files"])
    for path, contents in written["files"].items():
        text = Path(path).read_text()
        assert contents == (json.loads(text) if path.endswith(".json") else text)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_there_already_is_not_written_again(root: Root, engine: str) -> None:
    first = done(root.install(engine, "--json")).json
    before = {path: (root / path).stat() for path in root.files()}
    again = done(root.install(engine, "--json")).json
    assert again["files"] == {}
    assert set(again["unchanged"]) <= set(first["files"])
    assert {path: (root / path).stat() for path in root.files()} == before
    said = done(root.install(engine)).out
    assert said.count("already there, not changed: ") == len(again["unchanged"]) > 0
    assert "wrote" not in said


def test_a_file_of_ours_with_another_mode_is_written_again(root: Root) -> None:
    done(root.install("podman"))
    (root / PODMAN_HOOKS / HOOKS[0]).chmod(0o600)
    again = done(root.install("podman", "--json")).json
    assert list(again["files"]) == [str(root / PODMAN_HOOKS / HOOKS[0])]
    assert (root / PODMAN_HOOKS / HOOKS[0]).stat().st_mode & 0o777 == 0o644


def test_the_packages_own_hooks(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    done(root.install("podman"))
    monkeypatch.setattr("oci_hook.engines.podman.is_packaged", lambda: True)
    assert done(root.install("podman", "--json")).json["next"] == []
    (step,) = done(root.install("podman", "--timeout", "77", "--json")).json["next"]
    assert "brings its own back" in step
    (step,) = done(root.run("uninstall", "podman", "--json")).json["next"]
    assert "apt install --reinstall scz-smm" in step
    assert done(root.run("uninstall", "podman", "--json")).json["next"] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_uninstall_takes_exactly_its_files_away(root: Root, engine: str) -> None:
    for name in ("etc/other.json", f"{PODMAN_HOOKS}/other.json", f"{SHIMS}/mine"):
        root.write(name, "{}")
    before = snapshot(root.path)
    nothing = done(root.run("uninstall", engine))
    assert (nothing.out, "nothing of ours" in nothing.err) == ("", True)
    done(root.install(engine))
    installed = snapshot(root.path)
    assert installed.keys() > before.keys()
    assert "would remove" in done(root.run("uninstall", engine, "--dry-run")).out
    tried = done(root.run("uninstall", engine, "--dry-run", "--json")).json
    assert snapshot(root.path) == installed
    assert set(tried["files"]) == installed.keys() - before.keys()
    assert "removed " in done(root.run("uninstall", engine)).out
    assert snapshot(root.path) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_install_again_changes_nothing(root: Root, engine: str) -> None:
    done(root.install(engine))
    before = snapshot(root.path)
    done(root.install(engine))
    assert snapshot(root.path) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_modes_do_not_depend_on_the_umask(root: Root, engine: str) -> None:
    old = os.umask(0o077)
    try:
        done(root.install(engine))
    finally:
        os.umask(old)
    for path in root.path.rglob("*"):
        executable = path.is_dir() or path.name.startswith("scz-runc")
        assert path.stat().st_mode & 0o777 == (0o755 if executable else 0o644), path
        assert path.stat().st_uid == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_in_the_way_of_a_folder(root: Root, engine: str) -> None:
    for name in ("usr", "etc"):
        root.write(name, "")
    before = snapshot(root.path)
    refused(root.install(engine), FileUnreadable.code)
    assert snapshot(root.path) == before


def test_what_it_is_asked_for_is_checked(root: Root, tmp_path: Path) -> None:
    misused(sczctl("install", "--root", root.path), "--engine")
    misused(root.run("install", "nerdctl"), "podman")
    for timeout in ("9", "3601", "x"):
        misused(root.install("podman", "--timeout", timeout), "--timeout")
    misused(root.run("install", "docker", "--runtime", "/usr/bin/youki"), "youki")
    misused(root.run("install", "docker", "--runtime", "runc"), "absolute")
    misused(root.run("install", "docker", "--runtime", "/bin/runc", "--runtime", "/usr/bin/runc"), "twice")
    misused(root.install("containerd", "--engine-version", "new"), "version")
    for engine, option, value in (
        ("podman", "--runtime", "/usr/bin/runc"),
        ("podman", "--engine-config", "/x"),
        ("cri-o", "--shim-dir", "/x"),
        ("docker", "--hooks-dir", "/x"),
        ("docker", "--timeout", "60"),
        ("docker", "--engine-version", "1.7"),
    ):
        misused(root.install(engine, option, value), f"{option} means nothing for {engine}")
    misused(root.run("uninstall", "docker", "--hooks-dir", "/x"), "--hooks-dir")
    refused(root.run("install", "docker"), EngineUnsupported.code, "--runtime")
    assert root.files() == set()
    bad = tmp_path / "config.toml"
    bad.write_text("x = 1\n")
    hooks = tmp_path / "hooks.d"
    refused(sczctl("--config", bad, "install", "--engine", "podman", "--hooks-dir", hooks), ConfigInvalid.code)
    assert not hooks.exists()


# --- podman and CRI-O -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "folder"), [("podman", PODMAN_HOOKS), ("cri-o", CRIO_HOOKS)])
@pytest.mark.parametrize("stage", ["prestart", "poststop"])
def test_each_hooks_file_is_valid_for_the_engines(root: Root, engine: str, folder: str, stage: str) -> None:
    done(root.install(engine, "--timeout", "42"))
    assert {path.name for path in (root / folder).iterdir()} == set(HOOKS)
    document = json.loads((root / folder / f"scz-smm-{stage}.json").read_text())
    # oci-hooks(5), version 1.0.0: these keys and no others, and one stage, as all stages would get the same arguments.
    assert set(document) == {"version", "hook", "when", "stages"}
    assert (document["version"], document["stages"]) == ("1.0.0", [stage])
    hook = document["hook"]
    assert set(hook) == {"path", "args", "env", "timeout"}
    assert hook["timeout"] == 42
    assert hook["env"]
    assert all(re.fullmatch("[A-Z_]+=.+", variable) for variable in hook["env"])
    assert hook["path"] == hook["args"][0]
    assert os.access(hook["path"], os.X_OK)
    assert hook["args"][1:3] == ["-I", "-S"]
    invocation = parse_invocation(hook["args"][4:])
    assert invocation is not None
    assert (invocation.stage, invocation.engine, invocation.config_file) == (stage, engine, CONFIG_FILE)
    (key,) = document["when"]["annotations"]
    assert re.search(key, "smm.scz/model.weights")
    assert not re.search(key, "io.example.smm.scz/model")
    assert not re.search(key, "smmxscz/model")


def test_the_installed_command_is_the_hook(root: Root) -> None:
    done(root.install("cri-o"))
    hook = json.loads((root / CRIO_HOOKS / "scz-smm-prestart.json").read_text())["hook"]
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "created", "pid": 1, "bundle": "/nowhere", "annotations": {}}
    for words, code in (("{", 10), (json.dumps(state), 11)):  # no state; a state without a config.json
        started = subprocess.run(hook["args"], input=words, env={}, capture_output=True, text=True, check=False)
        assert started.returncode == code, started.stderr
        assert started.stderr.startswith("scz-hook: ")


def test_uninstall_needs_no_configuration(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.d"
    done(sczctl("install", "--engine", "podman", "--hooks-dir", hooks))
    assert len(list(hooks.iterdir())) == 2
    done(sczctl("--config", tmp_path / "absent.toml", "uninstall", "--engine", "podman", "--hooks-dir", hooks))
    assert list(hooks.iterdir()) == []


def test_a_hooks_file_that_cannot_be_removed(root: Root) -> None:
    (root / PODMAN_HOOKS / HOOKS[1]).mkdir(parents=True)
    refused(root.run("uninstall", "podman"), FileUnreadable.code, HOOKS[1])
    assert (root / PODMAN_HOOKS / HOOKS[1]).is_dir()


def test_podman_is_told_of_a_directory_that_it_does_not_read(root: Root) -> None:
    assert done(root.install("podman", "--json")).json["next"] == []
    (step,) = done(root.install("podman", "--hooks-dir", "/srv/hooks", "--json")).json["next"]
    assert 'hooks_dir = ["/usr/share/containers/oci/hooks.d", "/srv/hooks"]' in step
    root.write("etc/containers/containers.conf.d/50-scz-smm.conf", '[engine]\nhooks_dir = ["/srv/hooks"]\n')
    assert done(root.install("podman", "--hooks-dir", "/srv/hooks", "--json")).json["next"] == []
    assert "hooks.d" in done(root.install("podman", "--json")).json["next"][0]


def crio_directories(root: Root) -> list[str]:
    found: list[str] = tomllib.loads((root / CRIO_DROP_IN).read_text())["crio"]["runtime"]["hooks_dir"]
    return found


def test_cri_o_reads_its_own_directory_last(root: Root) -> None:
    done(root.install("podman"))
    told = done(root.install("cri-o"))
    assert crio_directories(root) == ["/usr/share/containers/oci/hooks.d", "/etc/scz-smm/hooks.d-cri-o"]
    assert "next: systemctl restart crio\n" in told.out
    # of two files of one name CRI-O takes the last directory's (oci-hooks(5)), so podman's do not run there
    assert {path.name for path in (root / PODMAN_HOOKS).iterdir()} == set(HOOKS)
    assert {path.name for path in (root / CRIO_HOOKS).iterdir()} == set(HOOKS)
    done(root.run("uninstall", "cri-o"))
    assert {path.name for path in (root / PODMAN_HOOKS).iterdir()} == set(HOOKS)
    assert not (root / CRIO_HOOKS).exists()


def test_the_cri_o_drop_in_keeps_directories_of_the_administrator(root: Root) -> None:
    root.write("etc/crio/crio.conf", '[crio.runtime]\nhooks_dir = ["/one"]\n')
    done(root.install("cri-o"))
    assert crio_directories(root) == ["/one", "/etc/scz-smm/hooks.d-cri-o"]
    root.write("etc/crio/crio.conf.d/10-crio.conf", '[crio.runtime]\nhooks_dir = ["/two", "/three"]\n')
    root.write("etc/crio/crio.conf.d/20-other.conf", '[crio.image]\npause_image = "x"\n')
    done(root.install("cri-o"))
    assert crio_directories(root) == ["/two", "/three", "/etc/scz-smm/hooks.d-cri-o"]
    later = root.write("etc/crio/crio.conf.d/99-last.conf", '[crio.runtime]\nhooks_dir = ["/last"]\n')
    steps = done(root.install("cri-o", "--json")).json["next"]
    assert "/etc/crio/crio.conf.d/99-last.conf" in steps[0]
    later.write_text('[crio.runtime]\nhooks_dir = ["/last", "/etc/scz-smm/hooks.d-cri-o/"]\n')
    assert done(root.install("cri-o", "--json")).json["next"] == ["systemctl restart crio"]


def test_a_cri_o_configuration_that_is_not_toml(root: Root) -> None:
    root.write("etc/crio/crio.conf", "[crio.runtime\n")
    before = snapshot(root.path)
    refused(root.install("cri-o"), ConfigInvalid.code, "crio.conf")
    assert snapshot(root.path) == before


def test_cri_o_is_not_called_from_where_podman_looks(root: Root, tmp_path: Path) -> None:
    for directory in ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d/"):
        refused(root.install("cri-o", "--hooks-dir", directory), EngineUnsupported.code, "podman reads")
    assert root.files() == set()
    done(root.install("podman", "--hooks-dir", "/srv/hooks"))
    before = snapshot(root.path)
    refused(root.install("cri-o", "--hooks-dir", "/srv/hooks"), OutputExists.code, "podman")
    assert done(root.run("uninstall", "cri-o", "--hooks-dir", "/srv/hooks")).out == ""
    assert snapshot(root.path) == before


# --- containerd -------------------------------------------------------------------------------------------------------


def handlers(document: dict[str, Any], plugin: str = "io.containerd.grpc.v1.cri") -> dict[str, Any]:
    found: dict[str, Any] = document["plugins"][plugin]["containerd"]["runtimes"]
    return found


def test_containerd_gets_a_script_and_a_handler_a_runtime(root: Root) -> None:
    root.write(CONTAINERD, "version = 2\n" + IMPORTS)
    words = ["--runtime", "/usr/sbin/runc", "--runtime", "/opt/crun-1.28", "--runtime", "/usr/bin/runsc"]
    told = done(root.run("install", "containerd", *words, "--json")).json
    assert told["next"] == ["systemctl restart containerd"]
    document = tomllib.loads((root / CONTAINERD_DROP_IN).read_text())
    assert document["version"] == 2
    # containerd 1.x forgets runc once another handler is named, and then does not offer pods at all
    assert set(handlers(document)) == {"runc", "scz-runc", "scz-crun", "scz-runsc"}
    for handler, runtime in (("scz-runc", "/usr/sbin/runc"), ("scz-crun", "/opt/crun-1.28")):
        script = f"/{SHIMS}/containerd/{handler}"
        assert handlers(document)[handler] == {
            "runtime_type": "io.containerd.runc.v2",
            "pod_annotations": ["smm.scz/*"],
            "options": {"BinaryName": script},
        }
        made = shim_script(runtime=runtime, engine="containerd", config_file=CONFIG_FILE)
        assert (root / script[1:]).read_bytes() == made


def test_docker_gets_kata_s_command_line_where_it_is_named(root: Root) -> None:
    told = done(root.run("install", "docker", "--runtime", "/usr/bin/kata-runtime", "--json")).json
    script = f"/{SHIMS}/docker/scz-kata-runtime"
    assert json.loads((root / DAEMON).read_text())["runtimes"] == {"scz-kata-runtime": {"path": script}}
    made = shim_script(runtime="/usr/bin/kata-runtime", engine="docker", config_file=CONFIG_FILE)
    assert (root / script[1:]).read_bytes() == made
    assert script in "".join(told["files"])
    done(root.run("uninstall", "docker"))
    assert not (root / script[1:]).exists()


@pytest.mark.parametrize("version", ["1.6", "1.7.24~ds1"])
def test_containerd_1_keeps_the_administrators_section(root: Root, version: str) -> None:
    main = root.write(CONTAINERD, f'version = 2\n{IMPORTS}[{CRI}.cni]\nbin_dir = "/usr/lib/cni"\n')
    before = main.read_bytes()
    told = done(root.install("containerd", "--engine-version", version, "--json")).json
    assert main.read_bytes() == before
    assert root.files() == {CONTAINERD, f"{SHIMS}/containerd/scz-runc"}
    by_hand = told["next"][0]
    assert "/etc/containerd/config.toml" in by_hand
    lines = by_hand.partition("\n\n")[2]
    assert set(handlers(tomllib.loads(before.decode() + lines))) == {"runc", "scz-runc"}
    main.write_text(before.decode() + lines)
    assert done(root.install("containerd", "--engine-version", version, "--json")).json["next"] == [
        "systemctl restart containerd"
    ]
    kept = done(root.run("uninstall", "containerd", "--keep-scripts")).out
    assert "its script starts no container" in kept
    assert f"remove /{SHIMS}/containerd/scz-runc when" in kept
    removed = done(root.run("uninstall", "containerd", "--json")).json
    assert "take the handler scz-runc out of /etc/containerd/config.toml" in removed["next"][0]
    assert "its script is gone" in removed["next"][0]
    assert main.read_text() == before.decode() + lines


def test_a_drop_in_that_would_come_to_harm_is_taken_back(root: Root) -> None:
    root.write(CONTAINERD, "version = 2\n" + IMPORTS)
    done(root.install("containerd", "--engine-version", "1.7"))
    assert CONTAINERD_DROP_IN in root.files()
    root.write(CONTAINERD, f'version = 2\n{IMPORTS}[{CRI}.containerd.runtimes.mine]\nruntime_type = "x"\n')
    told = done(root.install("containerd", "--engine-version", "1.7", "--json")).json
    assert CONTAINERD_DROP_IN not in root.files()
    assert f"[{CRI}.containerd.runtimes.runc]" not in told["next"][0]  # the administrator has handlers of his own


def test_containerd_2_gets_a_drop_in_of_its_configurations_version(root: Root) -> None:
    section = '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]\nSystemdCgroup = true\n'
    root.write(CONTAINERD, f"version = 3\n{IMPORTS}{section}")
    assert done(root.install("containerd", "--json")).json["next"] == ["systemctl restart containerd"]
    document = tomllib.loads((root / CONTAINERD_DROP_IN).read_text())
    assert document["version"] == 3
    options = handlers(document, "io.containerd.cri.v1.runtime")["scz-runc"]["options"]
    assert options == {"BinaryName": f"/{SHIMS}/containerd/scz-runc", "SystemdCgroup": True}  # as its runc has it
    root.write(CONTAINERD, f"version = 2\n{IMPORTS}[{CRI}.containerd.runtimes.mine]\n")
    done(root.install("containerd", "--engine-version", "2.1"))
    assert set(handlers(tomllib.loads((root / CONTAINERD_DROP_IN).read_text()))) == {"scz-runc"}


def test_containerd_is_told_what_to_import(root: Root) -> None:
    for text, wanted in (
        (None, "does not exist"),
        ("version = 2\n", 'add at the top of /etc/containerd/config.toml: imports = ["/etc/containerd/conf.d/*.toml"]'),
        ('version = 2\nimports = ["x/*.toml"]\n', 'imports = ["x/*.toml", "/etc/containerd/conf.d/*.toml"]'),
    ):
        if text is not None:
            root.write(CONTAINERD, text)
        steps = done(root.install("containerd", "--json")).json["next"]
        assert wanted in steps[0]
        assert steps[-1] == "systemctl restart containerd"
        assert f"next: {steps[0]}\n" in done(root.install("containerd")).out
    root.write(CONTAINERD, 'version = 2\nimports = ["conf.d/*"]\n')  # relative to the file that says so
    assert len(done(root.install("containerd", "--json")).json["next"]) == 1
    root.write(CONTAINERD, 'version = 2\nimports = ["one.toml"]\n')
    root.write("etc/containerd/one.toml", "version = 2\n" + IMPORTS)
    assert len(done(root.install("containerd", "--json")).json["next"]) == 1


def test_an_import_by_name_has_to_go_with_the_drop_in(root: Root) -> None:
    root.write(CONTAINERD, 'version = 2\nimports = ["/etc/containerd/conf.d/50-scz-smm.toml"]\n')
    done(root.install("containerd"))
    assert "does not start without" in done(root.run("uninstall", "containerd")).out


def test_containerd_configurations_that_are_refused(root: Root) -> None:
    for text in ("version = \n", "[plugins.cri]\n", 'version = 1\n[plugins.cri]\nsandbox_image = "x"\n'):
        root.write(CONTAINERD, text)
        before = snapshot(root.path)
        refused(root.install("containerd"), ConfigInvalid.code, "/etc/containerd/config.toml")
        assert snapshot(root.path) == before


def test_the_file_of_dockers_packages_switches_pods_off(root: Root) -> None:
    root.write(CONTAINERD, 'disabled_plugins = ["cri"]\n' + IMPORTS)
    assert "disabled_plugins" in done(root.install("containerd")).out


# --- Docker -----------------------------------------------------------------------------------------------------------


def test_docker_gets_a_runtime_and_keeps_all_else(root: Root) -> None:
    mine = '{\n\t"log-driver": "json-file",\n\t"runtimes": {\n\t\t"mine": {\n\t\t\t"path": "/opt/é"\n\t\t}\n\t}\n}\n'
    daemon = root.write(DAEMON, mine)
    told = done(root.install("docker", "--json")).json
    assert told["next"] == ["systemctl reload docker"]
    script = f"/{SHIMS}/docker/scz-runc"
    document = json.loads(daemon.read_text())
    assert document == {
        "log-driver": "json-file",
        "runtimes": {"mine": {"path": "/opt/é"}, "scz-runc": {"path": script}},
    }
    assert (root / script[1:]).read_bytes() == shim_script(
        runtime="/usr/bin/runc", engine="docker", config_file=CONFIG_FILE
    )
    removed = done(root.run("uninstall", "docker", "--json")).json
    assert removed["changed"] == [str(daemon)]
    assert daemon.read_text() == mine


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 1, "a": 2}',
        '{"runtimes": []}',
        '{"runtimes": {"scz-runc": {"path": "/usr/bin/runc"}}}',
        '{"runtimes": {"scz-runc": null}}',
    ],
)
def test_a_daemon_json_that_is_not_touched(root: Root, text: str) -> None:
    daemon = root.write(DAEMON, text)
    before = snapshot(root.path)
    code = OutputExists.code if "scz-runc" in text else ConfigInvalid.code
    refused(root.install("docker"), code, str(daemon))
    assert snapshot(root.path) == before


def test_a_daemon_json_that_is_a_link_is_not_cut_off(root: Root) -> None:
    target = root.write("etc/shared.json", "{}")
    (root / "etc/docker").mkdir()
    (root / DAEMON).symlink_to(target)
    before = snapshot(root.path)
    refused(root.install("docker"), OutputExists.code, "symbolic link")
    assert snapshot(root.path) == before


def test_docker_installed_again_keeps_the_runtimes_arguments(root: Root) -> None:
    done(root.install("docker"))
    document = json.loads((root / DAEMON).read_text())
    document["runtimes"]["scz-runc"] |= {"path": f"/{SHIMS}/docker/old", "runtimeArgs": ["--debug"]}
    root.write(DAEMON, json.dumps(document))
    done(root.install("docker"))
    written = json.loads((root / DAEMON).read_text())["runtimes"]["scz-runc"]
    assert written == {"path": f"/{SHIMS}/docker/scz-runc", "runtimeArgs": ["--debug"]}


@pytest.mark.parametrize("engine", ["containerd", "docker"])
def test_scripts_stay_for_what_runs(root: Root, engine: str) -> None:
    """As the package leaves them when it is removed; the engine does not know them any more."""
    script, configuration = f"{SHIMS}/{engine}/scz-runc", {"containerd": CONTAINERD_DROP_IN, "docker": DAEMON}[engine]
    done(root.install(engine))
    told = done(root.run("uninstall", engine, "--keep-scripts", "--json")).json
    assert told["files"] == [str(root / configuration)]
    assert f"remove /{script} when no container is left" in told["next"][0]
    assert "systemctl" in told["next"][-1]
    assert root.files() == {script}
    assert "nothing of ours is there" in done(root.run("uninstall", engine, "--keep-scripts")).err
    assert str(root / script) in done(root.run("uninstall", engine, "--json")).json["files"]
    assert root.files() == set()


def test_scripts_are_kept_for_containerd_and_docker_alone(root: Root) -> None:
    misused(root.run("uninstall", "cri-o", "--keep-scripts"), "--keep-scripts")


def test_docker_keeps_a_default_runtime_that_is_ours(root: Root) -> None:
    done(root.install("docker"))
    document = json.loads((root / DAEMON).read_text())
    root.write(DAEMON, json.dumps({**document, "default-runtime": "scz-runc"}))
    before = snapshot(root.path)
    refused(root.run("uninstall", "docker"), ConfigInvalid.code, "default-runtime")
    assert snapshot(root.path) == before


def test_the_hooks_command_is_that_of_this_installation() -> None:
    assert Invocation("prestart", engine="podman").command()[3].endswith("/oci_hook/launch.py")
