"""`config/`: the examples are what the code reads and writes, but for the paths of a packaged installation."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from oci_hook.cli.engines import hooks_d_documents

CONFIG = Path(__file__).parents[2] / "config"
INTERPRETER, LAUNCHER = "/usr/bin/python3", "/usr/lib/scz-smm/oci_hook/launch.py"


@pytest.mark.parametrize("stage", ["prestart", "poststop"])
def test_hooks_d_examples_are_what_install_writes(stage: str) -> None:
    written = json.loads(hooks_d_documents("/etc/scz-smm/config.toml", 300)[f"scz-smm-{stage}.json"])
    written["hook"]["path"] = written["hook"]["args"][0] = INTERPRETER
    written["hook"]["args"][3] = LAUNCHER
    assert json.loads((CONFIG / "hooks.d" / f"scz-smm-{stage}.json").read_text()) == written


def test_hooks_never_inherit_an_environment_and_always_end() -> None:
    for document in hooks_d_documents("/c", 300).values():
        hook = json.loads(document)["hook"]
        assert hook["env"]
        assert hook["timeout"] > 0
        assert hook["args"][1:3] == ["-I", "-S"]


def test_the_podman_drop_in_names_both_directories() -> None:
    drop_in = tomllib.loads((CONFIG / "containers.conf.d" / "50-scz-smm.conf").read_text())
    assert drop_in == {"engine": {"hooks_dir": ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"]}}
