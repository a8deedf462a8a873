"""Where podman looks for hooks by itself: the directory that `sczctl install` writes to by default must be one."""

from __future__ import annotations

import json
import secrets
import tempfile
from pathlib import Path

import pytest

from oci_hook.cli.engines import _DEFAULT_HOOKS_DIRECTORY
from tests.engines import Podman


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_podman_reads_the_default_directory_by_itself(tmp_path: Path, runtime: str) -> None:
    name = f"scz-smm-test-{secrets.token_hex(4)}"
    trace, directory = tmp_path / "trace", Path(_DEFAULT_HOOKS_DIRECTORY)
    hook = {"path": "/bin/touch", "args": ["touch", str(trace)], "env": ["PATH=/bin"], "timeout": 10}
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
