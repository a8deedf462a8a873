"""`sczctl doctor` on a whole host: software TPM, enrolment, model and podman; then as parts of it fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.scene import Scene

PROGRAMS = {"podman": "/usr/bin/podman", "runc": "/usr/sbin/runc", "crun": "/usr/bin/crun"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with podman and its runtimes, as no test writes into the directory that the machine's podman reads."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    for name, path in PROGRAMS.items():
        shutil.copy(path, tmp_path / "usr/bin" / name)
    return tmp_path


def ask(scene: Scene, root: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    told = scene.sczctl("doctor", "--root", root, "--json", check=False)
    assert told.stderr == ""
    return told.returncode, {check["name"]: check for check in json.loads(told.stdout)["checks"]}


def test_a_host_that_is_ready_and_one_that_no_longer_is(scene: Scene, root: Path) -> None:
    code, found = ask(scene, root)
    assert found["engines"]["remedy"] == "`sczctl install --engine ENGINE`"
    scene.sczctl("install", "--engine", "podman", "--root", root)
    code, found = ask(scene, root)
    assert [check for check in found.values() if check["status"] != "ok"] == []
    assert code == 0
    assert "is the one that was enrolled" in found["TPM"]["message"]
    assert "that this boot state meets" in found["model small:1"]["message"]

    scene.tpm.extend(8, "another kernel")
    code, found = ask(scene, root)
    missing = [name for name, check in found.items() if check["status"] == "missing"]
    assert (code, missing) == (1, ["model other:1", "model small:1"])
    assert "boot-policy measure" in found["model small:1"]["remedy"]

    scene.tpm.stop()
    code, found = ask(scene, root)
    missing = [name for name, check in found.items() if check["status"] == "missing"]
    assert (code, missing) == (1, ["TPM"])
    assert "tpm.tcti" in found["TPM"]["remedy"]
