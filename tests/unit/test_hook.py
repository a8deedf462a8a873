"""`hook`: where nothing asks for a model, one look whether one came before `create`, and no import for that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oci_hook import hook

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from oci_hook import fast_path, hook
fast_path.RUNTIME_DIRECTORY = sys.argv[3]
assert hook.main(["--config", sys.argv[2], "prestart"]) == 0
print(*sorted(name for name in sys.modules if name.startswith("oci_hook") or name == "tomllib"))
"""
_FAST = {"", ".documents", ".errors", ".fast_path", ".hook", ".invocation", ".oci", ".oci.annotations", ".oci.state"}


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        (None, "/run/scz-smm"),
        ("", "/run/scz-smm"),
        ('#runtime = "/a"\n[paths]\n  # runtime = "/b"\nstore = "/s"\n', "/run/scz-smm"),
        ('[paths]\nruntime = "/a"\n', "/a"),
        ('paths.runtime="/a"\n', "/a"),
        ('paths = {runtime="/a"}\n', "/a"),
        ('[paths]\n"runtim\\u0065" = "/a"\n', "/a"),
        ("[paths]\nruntime = 7\n", None),
    ],
)
def test_which_folder_that_is(tmp_path: Path, text: str | None, directory: str | None) -> None:
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(f"version = 1\n{text}")
    assert hook._runtime_directory(str(file)) == directory


def _modules(config: Path, default: Path) -> set[str]:
    state = {"ociVersion": "1.0", "id": "c", "status": "created", "bundle": "/b", "annotations": {"x": "y"}}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SCRIPT, str(ROOT), str(config), str(default)],
        input=json.dumps(state),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_a_container_of_nobodys_costs_no_import(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'version = 1\n[paths]\nstore = "{tmp_path}"\n')
    assert _modules(config, tmp_path) <= {f"oci_hook{name}" for name in _FAST}


def test_where_models_came_before_create_the_records_are_looked_at_and_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "bound").mkdir(parents=True)
    (run / "host-mounts").mkdir()
    (run / "host-mounts" / "another.json").touch()
    config = tmp_path / "config.toml"
    config.write_text(f'version = 1\n[paths]\nruntime = "{run}"\n')
    found = _modules(config, tmp_path)
    assert "oci_hook.delivery.host_records" in found
    assert not {"oci_hook.host", "oci_hook.start", "oci_hook.admission"} & found
