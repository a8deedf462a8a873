"""hooks.d as podman reads it: its default directory, and what CRI-O's files do to podman's of the same name.

podman and CRI-O read hooks.d by the same library (containers/common, pkg/hooks); no CRI-O runs here.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from pathlib import Path

import pytest

from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from tests.commands import done, sczctl
from tests.engines import Podman


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_podman_reads_the_default_directory_by_itself(tmp_path: Path, runtime: str) -> None:
    name = f"scz-smm-test-{secrets.token_hex(4)}"
    trace, directory = tmp_path / "trace", Path(DEFAULT_DIRECTORY)
    script = f"cat >/dev/null; : >'{trace}'"  # a hook that leaves the state unread can fail under crun (SIGPIPE)
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 10}
    document = {"version": "1.0.0", "hook": hook, "when": {"annotations": {f"^{name}$": "yes"}}, "stages": ["prestart"]}
    made_by_us = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.json"
    try:
        file.write_text(json.dumps(document))
        with (
            tempfile.TemporaryDirectory(prefix="scz-hooks.", dir="/var/tmp") as made,
            Podman(f"{made}/podman") as podman,
        ):
            image = podman.busybox_image()
            podman.run(["--rm", image, "true"], runtime=runtime)
            assert not trace.exists()
            podman.run(["--rm", "--annotation", f"{name}=yes", image, "true"], runtime=runtime)
            assert trace.exists()
    finally:
        file.unlink()
        for folder in made_by_us:
            folder.rmdir()


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_of_two_directories_the_last_ones_files_run(runtime: str) -> None:
    with tempfile.TemporaryDirectory(prefix="scz-hooks.", dir="/var/tmp") as made:
        trace, script = Path(made) / "trace", Path(made) / "hook"
        script.write_text(f'#!/bin/sh\ncat > /dev/null\necho "$*" >> {trace}\n')  # crun fails if nobody reads the state
        script.chmod(0o755)
        directories = [Path("/") / engine for engine in ("podman", "cri-o")]
        for directory in directories:
            done(sczctl("install", "--engine", directory.name, "--hooks-dir", directory, "--root", made))
        written = [Path(f"{made}{directory}") for directory in directories]
        for file in (file for directory in written for file in directory.iterdir()):
            document = json.loads(file.read_text())
            document["hook"]["path"] = str(script)  # the arguments stay
            file.write_text(json.dumps(document))
        with Podman(f"{made}/environment", hooks_directories=written) as podman:
            image = podman.busybox_image()
            podman.run(["--rm", image, "true"], runtime=runtime)
            assert not trace.exists()
            podman.run(["--rm", "--annotation", "smm.scz/model=x", image, "true"], runtime=runtime)
        calls = [line.split() for line in trace.read_text().splitlines()]
        assert [call[-1] for call in calls] == ["prestart", "poststop"]
        assert [call[call.index("--engine") + 1] for call in calls] == ["cri-o", "cri-o"]
