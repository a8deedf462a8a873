"""`launch.py`: a hook whose modules are missing, damaged or being replaced refuses in one line, with one exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook import invocation
from oci_hook.errors import InstallationIncomplete
from oci_hook.invocation import Invocation
from oci_hook.key_errors import all_errors
from oci_hook.report import load_refusals
from oci_hook.shim import shim_script

PACKAGE = Path(__file__).resolve().parents[2] / "oci_hook"
STATE = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 1, "bundle": "/none"}
PLAIN = {**STATE, "annotations": {"other": "1"}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the package, without bytecode."""
    shutil.copytree(PACKAGE, tmp_path / "lib/oci_hook", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "lib"


def hook(place: Path, state: object, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", place / "oci_hook/launch.py", *words, "prestart"],
        input=json.dumps(state),
        env={},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_whole_one_runs_and_writes_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = hook(place, PLAIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(place.rglob("*")) == before


def remove(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"(")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(4096))  # as a file system may leave it after a loss of power


@pytest.mark.parametrize("damage", [remove, halve, empty, zero])
@pytest.mark.parametrize("module", ["fast_path.py", "hook.py", "errors.py", "oci/state.py"])
def test_a_damaged_one_refuses_in_one_line(place: Path, module: str, damage: Callable[[Path], None]) -> None:
    damage(place / "oci_hook" / module)
    done = hook(place, STATE)  # without annotations, and a config.json that cannot be looked at
    assert (done.returncode, done.stdout) == (InstallationIncomplete.code, "")
    assert len(done.stderr.splitlines()) == 1
    assert "InstallationIncomplete (72)" in done.stderr
    assert "apt install --reinstall scz-smm" in done.stderr
    assert "rpm -U --replacepkgs FILE" in done.stderr


def test_one_that_is_being_replaced_refuses(place: Path) -> None:
    (place / ".incomplete").touch()
    done = hook(place, PLAIN)
    assert (done.returncode, len(done.stderr.splitlines())) == (InstallationIncomplete.code, 1)
    assert "upgrade" in done.stderr
    (place / ".incomplete").unlink()
    assert hook(place, PLAIN).returncode == 0


def test_a_dependency_that_only_a_model_needs(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[paths]\nruntime = "{tmp_path}/run"\n')
    annotations = {"smm.scz/model": "minilm:1"}
    spec = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {}, "annotations": annotations}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    done = hook(place, {**STATE, "bundle": str(tmp_path), "annotations": annotations}, "--config", str(config))
    assert done.returncode == InstallationIncomplete.code, done.stderr
    assert "No module named" in done.stderr  # this copy has none of them beside it
    assert [refusal.code for refusal in load_refusals(str(tmp_path / "run"))] == [InstallationIncomplete.code]


CREATES = ("create", "run", "restore", "creat", "r")  # a word that a runtime might complete is refused, too


@pytest.fixture
def script(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shim of that copy, before a runtime that says what it is given."""
    monkeypatch.setattr("oci_hook.shim.__file__", str(place / "oci_hook/shim.py"))
    (tmp_path / "runc").write_text("#!/bin/sh\nprintf '%s\\n' \"$0\" \"$@\"; tr '\\0' '\\n' </proc/$$/environ\n")
    (tmp_path / "runc").chmod(0o755)
    written = tmp_path / "scz-runc"
    written.write_bytes(shim_script(runtime=f"{tmp_path}/runc", engine="docker", config_file="/none.toml"))
    written.chmod(0o755)
    return written


def shim(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/bin", "LC_ALL": "C", "LD_LIBRARY_PATH": "/evil", "GODEBUG": "x"}
    return subprocess.run([script, *words], env=environment, capture_output=True, text=True, check=False, timeout=60)


def mark(place: Path) -> None:
    (place / ".incomplete").touch()


@pytest.mark.parametrize("change", [mark, shutil.rmtree])
@pytest.mark.parametrize("before", [(), ("--debug",), ("--root", "/r"), ("--log=l", "--"), ("--unheard-of", "state")])
@pytest.mark.parametrize("verb", CREATES)
def test_a_shim_alone_creates_nothing(
    place: Path, script: Path, change: Callable[[Path], None], before: tuple[str, ...], verb: str
) -> None:
    change(place)
    done = shim(script, *before, verb, "c1")
    assert (done.returncode, done.stdout) == (InstallationIncomplete.code, "")
    assert len(done.stderr.splitlines()) == 1
    assert "apt install --reinstall scz-smm" in done.stderr
    assert "rpm -U --replacepkgs FILE" in done.stderr


@pytest.mark.parametrize("change", [mark, shutil.rmtree])
@pytest.mark.parametrize(
    "words", [(), ("--version",), ("--root", "", "state", "c1"), ("exec", "c1", "sh"), ("kill", "c1")]
)
def test_a_shim_alone_passes_all_else_on(
    place: Path, script: Path, change: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    change(place)
    done = shim(script, *words)
    expected = [str(script.with_name("runc")), *words, "PATH=/bin", "LC_ALL=C"]
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, sorted(expected), "")


def test_a_shim_alone_whose_runtime_is_gone(place: Path, script: Path) -> None:
    mark(place)
    script.with_name("runc").unlink()
    done = shim(script, "state", "c1")
    assert (done.returncode, len(done.stderr.splitlines())) == (InstallationIncomplete.code, 1)
    assert "cannot be started" in done.stderr


def test_the_code_is_known_with_the_same_remedy(place: Path) -> None:
    assert all_errors()[72] is InstallationIncomplete
    mark(place)
    assert hook(place, PLAIN).stderr.endswith(f"remedy: {InstallationIncomplete.remedy}\n")


def test_the_package_names_the_distributions_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation, "__file__", "/usr/lib/scz-smm/oci_hook/invocation.py")
    words = Invocation("prestart").command()
    assert words[:4] == ["/usr/bin/python3", "-I", "-S", "/usr/lib/scz-smm/oci_hook/launch.py"]
    script = shim_script(runtime="/usr/bin/runc", engine="docker", config_file="/etc/scz-smm/config.toml")
    assert script.startswith(b"#!/usr/bin/python3 -IS\n")
