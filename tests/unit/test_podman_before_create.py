"""`--before-create` for podman: what is written where, taken away again, and what `sczctl doctor` says of it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from oci_hook.engines.podman import DROP_IN, OWN_DIRECTORY, PRECREATE_FILE
from oci_hook.errors import EngineUnsupported
from oci_hook.invocation import Invocation, parse_invocation
from tests.commands import Done, done, misused, refused, sczctl, snapshot
from tests.unit.test_cli_doctor import Host, make_host

CONFIG_FILE = "/etc/scz-smm/config.toml"
DEFAULT = "/usr/share/containers/oci/hooks.d"
ORDINARY = {f"{DEFAULT}/scz-smm-poststop.json", f"{DEFAULT}/scz-smm-prestart.json"}
OURS = {PRECREATE_FILE, DROP_IN}
NAME = "before create podman"


class Root:
    """A root directory of a host."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "root"
        self.path.mkdir()

    def run(self, command: str, *words: object) -> Done:
        return sczctl(command, "--engine", "podman", "--root", self.path, *words)

    def write(self, path: str, text: str) -> None:
        real = self.path / path.lstrip("/")
        real.parent.mkdir(parents=True, exist_ok=True)
        real.write_text(text)

    def read(self, path: str) -> str:
        return (self.path / path.lstrip("/")).read_text()

    def files(self) -> set[str]:
        return {f"/{Path(path).relative_to(self.path)}" for path in snapshot(self.path)}

    def directories(self) -> list[str]:
        found: list[str] = tomllib.loads(self.read(DROP_IN))["engine"]["hooks_dir"]
        return found


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_the_file_for_precreate_lies_where_only_podman_is_told_of(root: Root) -> None:
    told = done(root.run("install", "--before-create"))
    assert root.files() == ORDINARY | OURS
    assert root.directories() == [DEFAULT, OWN_DIRECTORY]
    assert "next:" not in told.out
    document = json.loads(root.read(PRECREATE_FILE))
    assert document["stages"] == ["precreate"]
    assert document["hook"]["env"]
    assert document["hook"]["timeout"] == 300
    invocation = parse_invocation(document["hook"]["args"][4:])
    assert invocation is not None
    assert (invocation.stage, invocation.engine, invocation.config_file) == ("precreate", "podman", CONFIG_FILE)
    # what podman reads last is what makes it call; everything else is there by then
    lines = [f"wrote {root.path}{path}" for path in (*sorted(ORDINARY), PRECREATE_FILE, DROP_IN)]
    assert told.out.splitlines() == lines


@pytest.mark.parametrize(
    ("requirement", "meant"),
    [
        ("runtime=kata", True),
        ("noswap,runtime=kata", True),
        ("runtime=kata,private", True),
        ("runtime=runc", False),
        ("runtime=katana", False),
        ("noswap", False),
        ("xruntime=kata", False),
    ],
)
def test_only_containers_that_ask_for_a_vm_are_meant(root: Root, requirement: str, meant: bool) -> None:
    done(root.run("install", "--before-create"))
    ((key, value),) = json.loads(root.read(PRECREATE_FILE))["when"]["annotations"].items()
    assert re.search(key, "smm.scz/require")
    assert not re.search(key, "smm.scz/model")
    assert not re.search(key, "smmxscz/require")
    assert bool(re.search(value, requirement)) == meant


def test_a_dry_run_writes_nothing_and_shows_everything(root: Root) -> None:
    shown = done(root.run("install", "--before-create", "--dry-run", "--json")).json
    assert root.files() == set()
    written = done(root.run("install", "--before-create", "--json")).json
    assert shown.pop("dry_run")
    assert not written.pop("dry_run")
    assert shown == written
    assert set(done(root.run("install", "--before-create", "--json")).json["unchanged"]) == set(written["files"])
    assert "would remove" in done(root.run("uninstall", "--before-create", "--dry-run")).out
    assert root.files() == ORDINARY | OURS


def test_uninstall_takes_that_alone_or_all(root: Root) -> None:
    done(root.run("install", "--before-create"))
    told = done(root.run("uninstall", "--before-create", "--json")).json
    # the drop-in first: podman does not call what is half removed
    assert told["files"] == [f"{root.path}{DROP_IN}", f"{root.path}{PRECREATE_FILE}"]
    assert told["next"] == []
    assert root.files() == ORDINARY
    assert not (root.path / OWN_DIRECTORY.lstrip("/")).exists()
    assert "nothing of ours" in root.run("uninstall", "--before-create").err
    done(root.run("install", "--before-create"))
    done(root.run("uninstall"))
    assert root.files() == set()


def test_install_without_it_leaves_it(root: Root) -> None:
    done(root.run("install", "--before-create"))
    done(root.run("install"))
    assert root.files() == ORDINARY | OURS


def test_directories_of_others_are_repeated(root: Root) -> None:
    root.write("/etc/containers/containers.conf", '[engine]\nhooks_dir = ["/one"]\n')
    root.write("/etc/containers/containers.conf.d/10-a.conf", '[engine]\nhooks_dir = ["/two", {append = true}]\n')
    root.write("/etc/containers/containers.conf.d/70-a.conf", "[engine]\nruntime = 'x'\n")
    done(root.run("install", "--before-create", "--hooks-dir", "/three"))
    assert root.directories() == ["/one", "/two", "/three", OWN_DIRECTORY]
    done(root.run("install", "--before-create", "--hooks-dir", "/three"))
    assert root.directories() == ["/one", "/two", "/three", OWN_DIRECTORY]
    (step,) = done(root.run("uninstall", "--before-create", "--hooks-dir", "/three", "--json")).json["next"]
    assert "podman does not read /three by itself" in step


def test_a_later_file_that_goes_before_ours_is_named(root: Root) -> None:
    later = "/etc/containers/containers.conf.d/70-a.conf"
    root.write(later, '[engine]\nhooks_dir = ["/last"]\n')
    (step,) = done(root.run("install", "--before-create", "--json")).json["next"]
    assert later in step
    assert OWN_DIRECTORY in step
    for text in (f'["/last", "{OWN_DIRECTORY}/"]', '["/last", {append = true}]'):
        root.write(later, f"[engine]\nhooks_dir = {text}\n")
        assert done(root.run("install", "--before-create", "--json")).json["next"] == []


def test_its_directory_is_for_nothing_else(root: Root) -> None:
    refused(root.run("install", "--hooks-dir", OWN_DIRECTORY), EngineUnsupported.code, "--hooks-dir")
    assert root.files() == set()


@pytest.mark.parametrize("engine", ["cri-o", "containerd", "docker"])
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_it_means_nothing_for_other_engines(root: Root, engine: str, command: str) -> None:
    said = sczctl(command, "--engine", engine, "--root", root.path, "--before-create")
    misused(said, f"--before-create means nothing for {engine}")


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = make_host(tmp_path)
    made.has("podman", "runc")
    return made


def test_doctor_finds_it_whole(host: Host) -> None:
    assert NAME not in host.doctor()
    host.install("podman", "--before-create")
    assert host.check(NAME)[:2] == ("ok", f"{PRECREATE_FILE}, for smm.scz/require with runtime=kata")
    assert host.check("engine podman")[0] == "ok"
    assert len(host.doctor()["hooks podman"]) == 1


def test_kata_without_it(host: Host) -> None:
    host.install("podman")
    host.has("kata-runtime")
    assert host.check("runtime kata-runtime")[0] == "ok"
    status, message, remedy = host.check(NAME)
    assert (status, remedy) == ("warn", "`sczctl install --engine podman --before-create`")
    assert "Kata are refused" in message
    host.install("podman", "--before-create")
    assert host.check(NAME)[0] == "ok"


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (PRECREATE_FILE, None, "is missing"),
        (PRECREATE_FILE, "{", "cannot be read"),
        (PRECREATE_FILE, "other", "another installation"),
        (DROP_IN, None, f"podman does not read {OWN_DIRECTORY}"),
        ("/etc/containers/containers.conf.d/70-x.conf", '[engine]\nhooks_dir = ["/x"]\n', "70-x.conf sets hooks_dir"),
        (f"{DEFAULT}/scz-smm-prestart.json", None, "scz-smm-prestart.json is missing"),
        (f"{DEFAULT}/scz-smm-poststop.json", None, "scz-smm-poststop.json is missing"),
    ],
)
def test_doctor_tells_what_is_wrong_with_it(host: Host, path: str, text: str | None, said: str) -> None:
    host.install("podman", "--before-create")
    file = host.root / path.lstrip("/")
    if text is None:
        file.unlink()
    else:
        file.write_text(file.read_text().replace("config.toml", "x.toml") if text == "other" else text)
    found = host.lines(NAME, "fail")
    assert [said in message for message, _ in found] == [True]
    assert "`sczctl install --engine podman --before-create`" in found[0][1]


@pytest.mark.parametrize(
    ("directory", "reader"),
    [(DEFAULT, "`podman build`"), ("/etc/containers/oci/hooks.d", "buildah"), ("/srv/hooks", "CRI-O")],
)
def test_doctor_finds_it_where_others_read_it(host: Host, directory: str, reader: str) -> None:
    folder = host.root / directory.lstrip("/")
    folder.mkdir(parents=True)
    crio = host.root / "etc/crio/crio.conf"
    crio.parent.mkdir(parents=True)
    crio.write_text('[crio.runtime]\nhooks_dir = ["/srv/hooks"]\n')
    arguments = Invocation("precreate", config_file=CONFIG_FILE, engine="podman").command()
    hook = {"path": arguments[0], "args": arguments}
    (folder / "mine.json").write_text(json.dumps({"version": "1.0.0", "hook": hook, "stages": ["precreate"]}))
    found = [(message, remedy) for message, remedy in host.lines(NAME, "fail") if "mine.json" in message]
    ((message, remedy),) = found
    assert reader in message
    assert f"rm {directory}/mine.json" in remedy
