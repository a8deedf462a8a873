"""The main job where the container has entered its root file system already: no runtime of today's suites does so.

crun has entered it early since 1.29, but not if the container has hooks; this is shown with a stand-in named crun.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import early_pivot
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import CODES, hook_processes, model_mounts
from tests.runtimes import make_bundle
from tests.scene import TOKEN_PATH, Scene


@pytest.fixture
def bundle(scene: Scene, tmp_path: Path) -> Path:
    """A bundle whose hooks are those that `sczctl install` wrote."""
    hooks: dict[str, list[dict[str, object]]] = {}
    for path in scene.hooks.glob("*.json"):
        document = json.loads(path.read_text())
        for stage in document["stages"]:
            hooks.setdefault(stage, []).append(document["hook"])
    names = " ".join(f"/models/small/{name}" for name in FILES)
    token = {"destination": TOKEN_PATH, "type": "bind", "source": str(scene.token()), "options": ["bind", "ro"]}
    script = f"echo > /tmp/ran; cat /proc/self/mountinfo; sha256sum {names}"
    annotations = {"smm.scz/model": "small:1"}
    made = make_bundle(
        tmp_path / "bundle", args=["sh", "-c", script], hooks=hooks, mounts=[token], annotations=annotations
    )
    mount_point = made / "rootfs" / TOKEN_PATH.lstrip("/")
    mount_point.parent.mkdir(parents=True)
    mount_point.touch()
    shutil.copytree(made / "rootfs", tmp_path / "other", symlinks=True)
    return made


def run(bundle: Path, *rootfs: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle with the stand-in."""
    crun = bundle.parent / "crun"
    shutil.copy(Path(sys.executable).resolve(), crun)
    words = [crun, early_pivot.__file__, bundle, f"scz-test-{uuid.uuid4().hex[:12]}", *rootfs]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHOME": sys.base_prefix}
    return subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_container_reads_exactly_what_was_packed(scene: Scene, bundle: Path) -> None:
    done = run(bundle)
    assert done.returncode == 0, done.stderr
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in done.stdout
    mounts = [line for line in done.stdout.splitlines() if " - " in line]
    assert not any(str(bundle) in line.split()[4] for line in mounts)  # it had entered its root file system
    (mount,) = [line for line in mounts if line.split()[4] == "/models/small"]
    assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(mount.split()[5].split(","))
    assert model_mounts(scene) == []
    assert hook_processes(scene) == []


def test_another_root_file_system_is_refused(scene: Scene, bundle: Path) -> None:
    other = bundle.parent / "other"
    scene.forget_refusals()
    done = run(bundle, other)
    assert done.returncode != 0
    assert scene.why()["code"] == CODES["HolderRefused"], scene.why()
    assert not (other / "tmp/ran").exists()
    assert not (bundle / "rootfs/tmp/ran").exists()
    assert not (other / "models").exists()
    assert model_mounts(scene) == []
