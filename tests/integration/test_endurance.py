"""The demo's container many times over and at once, and a hook that is killed anywhere: nothing may be left behind.

The model is the demo's (90 MB of real weights), the workload loads it with the safetensors library.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from oci_hook.audit import AuditLog
from tests.demo.model import model_folder
from tests.demo.workload.image import workload_image
from tests.integration.test_start import hook_processes, model_mounts, mounts_below, start, tpm_handles
from tests.scene import TOKEN_PATH, Scene

STARTS, AT_ONCE, KILLS = 50, 8, 20
ROOT = Path(__file__).parents[2]
COMMAND = ["--model", "/models/small", "--word", "king"]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """A scene with the demo's model, here called `small`, and both images."""
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    folder.chmod(0o711)  # root of a user namespace has to get through to its root file system
    try:
        with Scene(folder) as made:
            made.prepare(model_folder(ROOT / "build" / "model"), name="small")
            made.image = made.podman.busybox_image()
            workload_image(made.podman)
            yield made
    finally:
        shutil.rmtree(folder)


def run_workload(scene: Scene, token: Path, runtime: str) -> None:
    """The demo's container, which prints what only the real weights give."""
    done = scene.run(workload_image(scene.podman), COMMAND, model="small:1", token=token, runtime=runtime)
    assert done.returncode == 0, done
    assert "nearest to king: kings, queen, monarch" in done.stdout


def left_overs(scene: Scene) -> dict[str, object]:
    """Everything that a start could leave on the host."""
    run = scene.runtime_directory
    return {
        "mounts": model_mounts(scene),
        "hooks": hook_processes(scene),
        "tpm": tpm_handles(scene),
        "records": sorted(os.listdir(run / "containers")),
        "tokens": [name for name in os.listdir(run / "tokens") if name.endswith(".json")],
        "host mounts": mounts_below(scene),
    }


def test_fifty_starts_leave_nothing(scene: Scene) -> None:
    token = scene.token(ttl_seconds=3600)
    run_workload(scene, token, "runc")
    before = left_overs(scene)
    store = sorted(str(path) for path in scene.store.rglob("*"))
    for number in range(STARTS):
        run_workload(scene, token, ("runc", "crun")[number % 2])
    assert left_overs(scene) == before
    assert sorted(str(path) for path in scene.store.rglob("*")) == store


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_eight_starts_at_once(scene: Scene, runtime: str) -> None:
    tokens = [scene.token(f"token-{number}") for number in range(AT_ONCE)]
    before = left_overs(scene)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for ended in [pool.submit(run_workload, scene, token, runtime) for token in tokens]:
            ended.result()
    assert left_overs(scene) == before
    assert len(list(AuditLog(str(scene.audit)).records())) > 0  # the chain holds


def wait_for_hook(scene: Scene, process: subprocess.Popen[str]) -> int | None:
    """The pid of the prestart hook itself, not of one of its children; None if the start ended without one."""
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        if pids := hook_processes(scene):
            return min(pids)  # its children are forked later
        time.sleep(0.001)
    return None


def start_in_background(scene: Scene, token: Path, runtime: str) -> subprocess.Popen[str]:
    trace = scene.host / "trace"
    (trace / "ran").unlink(missing_ok=True)
    words = ["--rm", "--annotation", "smm.scz/model=small:1", "--volume", f"{token}:{TOKEN_PATH}:ro"]
    words += ["--volume", f"{trace}:/trace", scene.image, "sh", "-c", "echo > /trace/ran"]
    return scene.podman.spawn(words, runtime=runtime)


def lifetime_of_a_hook(scene: Scene, token: Path, runtime: str) -> float:
    """Seconds from the first sight of a prestart hook to its end, undisturbed."""
    process = start_in_background(scene, token, runtime)
    pid = wait_for_hook(scene, process)
    began = time.monotonic()
    assert pid is not None
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.001)
    lived = time.monotonic() - began
    process.communicate(timeout=60)
    assert process.returncode == 0
    return lived


def test_a_hook_that_is_killed_anywhere(scene: Scene) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    token = scene.token(ttl_seconds=3600)
    assert start(scene, token).returncode == 0
    before = left_overs(scene)
    lifetime = max(lifetime_of_a_hook(scene, token, runtime) for runtime in ("runc", "crun"))
    killed: list[float] = []
    for number in range(6 * KILLS):
        if len(killed) == KILLS:
            break
        process = start_in_background(scene, token, ("runc", "crun")[number % 2])
        pid, moment = wait_for_hook(scene, process), moments.uniform(0, lifetime)
        assert pid is not None
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it was done before
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        if process.returncode != 0:
            killed.append(moment)
            assert not (scene.host / "trace" / "ran").exists(), f"the workload ran, its hook killed (seed {seed})"
        until = time.monotonic() + 10
        while hook_processes(scene) and time.monotonic() < until:
            time.sleep(0.01)
        assert hook_processes(scene) == []
        assert model_mounts(scene) == []
    print(f"killed at {sorted(round(moment / lifetime, 2) for moment in killed)} of {lifetime:.2f} s")
    assert len(killed) == KILLS
    attempt = start(scene, token)
    assert attempt.returncode == 0, attempt
    after = left_overs(scene)
    assert {key: after[key] for key in ("mounts", "hooks", "tpm", "host mounts")} == {
        key: before[key] for key in ("mounts", "hooks", "tpm", "host mounts")
    }
    assert len(list(AuditLog(str(scene.audit)).records())) > 0
