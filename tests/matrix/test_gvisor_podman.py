"""The main job with podman and gVisor: podman's `--runtime` is runsc; hook, configuration, annotations are the same.

bookworm's runsc of 2022 (or what this machine's own suite has), and trixie's of 2024 with directfs on and off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import FILES, contents
from tests.integration.test_release import ps
from tests.integration.test_start import hook_processes, model_mounts, refused, start
from tests.scene import TOKEN_PATH, Scene
from tests.suites import program, version
from tests.workshop import wait_until


def _own() -> str:
    path = shutil.which("runsc")
    assert path is not None, "packaging/prepare-host tests"
    return path


def _trixies() -> str:
    return str(program("trixie", "runsc"))


RUNSC: dict[str, tuple[Callable[[], str], str, str]] = {
    "own": (_own, "platform=ptrace", "overlay2=none"),
    "trixie": (_trixies, "platform=systrap", "overlay2=none"),
    "trixie without directfs": (_trixies, "platform=systrap directfs=false", "overlay2=root:memory"),
}


@pytest.fixture(params=RUNSC.values(), ids=RUNSC)
def runsc(request: pytest.FixtureRequest) -> str:
    """`runtime` of `tests.engines`: a path and flags. runsc of 2022 has no layer over its root, and no flag for it."""
    find, flags, layer = request.param
    path = find()
    has_layer = "~2022" not in version(Path(path))
    return f"{path} {flags} network=none" + (f" {layer}" if has_layer else "")


def reads_everything(scene: Scene, runsc: str, *options: str) -> None:
    """Start a container and check that it reads exactly what was packed."""
    (scene.host / "trace").mkdir(exist_ok=True)
    (scene.host / "trace").chmod(0o777)
    names = " ".join(f"/models/small/{name}" for name in FILES)
    attempt = start(scene, scene.token(), runtime=runsc, options=options, command=f"dmesg; sha256sum {names}")
    assert attempt.returncode == 0, attempt.stderr
    assert "gVisor" in attempt.stdout
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in attempt.stdout
    assert attempt.ran
    assert model_mounts(scene) == []
    assert hook_processes(scene) == []


@pytest.mark.parametrize("options", [(), ("--read-only",)], ids=["plain", "read-only"])
def test_a_container_reads_exactly_what_was_packed(scene: Scene, runsc: str, options: tuple[str, ...]) -> None:
    reads_everything(scene, runsc, *options)


def test_in_a_user_namespace_it_is_as_without_us(scene: Scene, runsc: str) -> None:
    """podman 4.3: the model is read. podman 5 keeps its folders from gVisor's gofer there, and no container starts."""
    options = ("--uidmap", "0:200000:65536")
    without_us = scene.podman.run(["--rm", *options, scene.image, "true"], runtime=runsc, check=False)
    if without_us.returncode == 0:
        reads_everything(scene, runsc, *options)
        return
    assert "cannot create sandbox" in without_us.stderr
    attempt = start(scene, scene.token(), runtime=runsc, options=options)
    assert "cannot create sandbox" in attempt.stderr
    assert not attempt.ran
    assert model_mounts(scene) == []
    assert hook_processes(scene) == []


def test_a_container_cannot_write_the_model(scene: Scene, runsc: str) -> None:
    command = "cd /models/small; echo x > config.json; rm -f empty; touch new; ls; cat config.json"
    attempt = start(scene, scene.token(), runtime=runsc.replace("root:memory", "none"), command=command)
    assert attempt.returncode == 0, attempt.stderr
    assert attempt.stderr.count("Read-only file system") >= 3
    assert attempt.stdout.split() == [
        "config.json",
        "empty",
        "model.json",
        "shards",
        "weights.safetensors",
        "config.json",
    ]


@pytest.mark.parametrize("layer", ["overlay2=root:memory", "overlay2=none"])
def test_what_a_container_opens_for_writing_does_not_reach_the_disk(scene: Scene, layer: str) -> None:
    control = scene.podman.directory / "control"
    script = "(: >> /models/small/shards/first.bin) 2>/dev/null; echo up; cat"
    words = ["--rm", "--interactive", "--annotation", "smm.scz/model=small:1"]
    words += ["--volume", f"{scene.token()}:{TOKEN_PATH}:ro", scene.image, "sh", "-c", script]
    process = scene.podman.spawn(words, runtime=f"{_trixies()} platform=systrap network=none {layer}")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert plaintext_on_disk(scene) == ""
        control.write_bytes(contents("shards/first.bin", FILES["shards/first.bin"]))
        assert plaintext_on_disk(scene) == f"{control}\n"
    finally:
        control.unlink(missing_ok=True)
        process.communicate(timeout=60)


def plaintext_on_disk(scene: Scene) -> str:
    """The files of podman, containers' layers among them, that have a line of a model's file."""
    search = ["grep", "-rlsaF", f"shards/first.bin {1:>12}", str(scene.podman.directory)]
    command = [*scene.podman.namespace.prefix, *search]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout


def test_a_layer_on_the_disk_is_refused(scene: Scene) -> None:
    """runsc since 2023 keeps its own layer there by itself: what is opened for writing would be copied into it."""
    attempt = refused(scene, "EngineUnsupported", scene.token(), runtime=f"{_trixies()} platform=systrap network=none")
    assert "overlay2" in str(attempt.why["remedy"])


def test_a_refused_start(scene: Scene, runsc: str) -> None:
    refused(scene, "ModelUnknown", scene.token(), runtime=runsc, model="nothing")
    refused(scene, "TokenMissing", None, runtime=runsc)
    refused(scene, "RequirementRefused", scene.token(), runtime=runsc, annotations={"smm.scz/require": "runtime=runc"})


def test_a_destination_in_a_volume_or_a_tmpfs_is_refused(scene: Scene, runsc: str) -> None:
    annotations = {"smm.scz/path": "/trace/model"}
    refused(scene, "DestinationRefused", scene.token(), runtime=runsc, annotations=annotations)
    assert list((scene.host / "trace").iterdir()) == []
    refused(scene, "DestinationRefused", scene.token(), runtime=runsc, options=("--tmpfs", "/models"))


@pytest.mark.parametrize("reads", [False, True], ids=["unread", "read"])
def test_releasing_a_model(scene: Scene, runsc: str, reads: bool) -> None:
    """What nobody has read goes; what was opened once gVisor keeps open, and so it stays, with --lazy, too."""
    trace = scene.host / "trace"
    trace.mkdir(exist_ok=True)
    trace.chmod(0o777)
    (trace / "ran").unlink(missing_ok=True)
    look = "cat /models/small/weights.safetensors | wc -c; " if reads else ""
    script = (
        f"{look}echo > /trace/ran; until [ -e /trace/go ]; do sleep 0.1; done; ls /models/small; echo end; sleep 60"
    )
    words = ["--detach", "--annotation", "smm.scz/model=small:1", "--volume", f"{trace}:/trace"]
    words += ["--volume", f"{scene.token()}:{TOKEN_PATH}:ro", scene.image, "sh", "-c", script]
    name = scene.podman.run(words, runtime=runsc).stdout.strip()
    try:
        wait_until((trace / "ran").exists, 30)
        (row,) = ps(scene)
        assert row["runtime"] == "runsc"
        assert row["holds"][0]["memory_bytes"] >= sum(FILES.values())
        for options in ((), ("--lazy",)) if reads else ((),):
            done = scene.sczctl("release", name, "--json", *options, check=False)
            (model,) = json.loads(done.stdout)["models"]
            if not reads:
                assert (done.returncode, model["state"], model["uses"]) == (0, "released", [])
                assert ps(scene) == []
                continue
            assert (done.returncode, model["state"]) == (3, "busy")
            assert {use["command"] for use in model["uses"]} & {"runsc-gofer", "runsc-sandbox"}
            assert any(use["path"].endswith("/models/small/weights.safetensors") for use in model["uses"])
            assert "gVisor keeps open" in scene.sczctl("release", name, *options, check=False).stdout
            assert ps(scene) == [row]
        (trace / "go").touch()
        wait_until(lambda: "end" in scene.podman.call("logs", name).stdout, 30)
        assert ("model.json" in scene.podman.call("logs", name).stdout) == reads
    finally:
        (trace / "go").unlink(missing_ok=True)
        scene.podman.rm(name)
