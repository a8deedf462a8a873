"""Rootless engines: the answer is no, said clearly, and the workload does not run.

A real user without privileges, with subordinate ids, runs podman with our hooks.d: the hook is then that user in the
user's own namespace, to which neither the TPM nor the store is open. It says so, and which engine to use.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.engines.hooks_directory import hooks_d_documents
from oci_hook.errors import EngineUnsupported
from tests.rootless import Rootless
from tests.runtimes import make_bundle

RUNTIMES = ("runc", "crun")
ANNOTATIONS = {"smm.scz/model": "small:1"}


@pytest.fixture(scope="module")
def user() -> Iterator[Rootless]:
    with Rootless() as made:
        yield made


@pytest.fixture(scope="module")
def hooks(user: Rootless) -> Path:
    """hooks.d as `sczctl install` writes it, of root's; with the package where the user may read it."""
    folder = user.directory / "hooks.d"
    folder.mkdir()
    write_hooks(user, folder)
    return folder


def write_hooks(user: Rootless, folder: Path) -> None:
    for name, data in hooks_d_documents("podman", "/etc/scz-smm/config.toml", 60).items():
        document = json.loads(data)
        words = document["hook"]["args"]
        document["hook"]["path"] = words[0] = str(user.interpreter)
        (index,) = [index for index, word in enumerate(words) if word.endswith("/oci_hook/launch.py")]
        words[index] = str(user.package / "oci_hook/launch.py")
        (folder / name).write_text(json.dumps(document))


def ran(user: Rootless) -> bool:
    """Whether the workload left its trace; it is taken away."""
    trace = user.home / "rootfs/trace/ran"
    left = trace.exists()
    trace.unlink(missing_ok=True)
    return left


def check_refused(user: Rootless, done: subprocess.CompletedProcess[str], runtime: str) -> None:
    """podman failed, the workload did not run, and the reason or at least its number is shown."""
    assert done.returncode != 0
    assert not ran(user)
    if runtime == "runc":  # it shows what the hook says; crun its exit code, which `sczctl why` explains
        assert f"EngineUnsupported ({EngineUnsupported.code}): rootless engines are not supported" in done.stderr
        assert "sudo podman run" in done.stderr
    else:
        assert f"exit code {EngineUnsupported.code}" in done.stderr.replace("code: ", "code "), done.stderr


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_without_our_annotations_is_left_alone(user: Rootless, hooks: Path, runtime: str) -> None:
    done = user.run("touch", "/trace/ran", runtime=runtime, options=[f"--hooks-dir={hooks}"])
    assert done.returncode == 0, done.stderr
    assert ran(user)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_that_asks_for_a_model_is_refused(user: Rootless, hooks: Path, runtime: str) -> None:
    options = [f"--hooks-dir={hooks}"]
    done = user.run("touch", "/trace/ran", runtime=runtime, annotations=ANNOTATIONS, options=options)
    check_refused(user, done, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_podman_of_a_user_looks_where_install_writes(user: Rootless, runtime: str) -> None:
    write_hooks(user, user.default_hooks)
    try:
        done = user.run("touch", "/trace/ran", runtime=runtime, annotations=ANNOTATIONS)
    finally:
        for path in user.default_hooks.iterdir():
            path.unlink()
    check_refused(user, done, runtime)


@pytest.mark.parametrize("namespace", [(), ("unshare", "--user", "--map-root-user")], ids=["user", "its own root"])
def test_the_hook_itself_called_by_a_user(user: Rootless, hooks: Path, namespace: tuple[str, ...]) -> None:
    bundle = make_bundle(user.home / "bundle", args=["true"])
    try:
        (document,) = [json.loads(path.read_text()) for path in hooks.iterdir() if "poststop" not in path.read_text()]
        state = {"ociVersion": "1.0.2", "id": "x", "pid": 1, "bundle": str(bundle), "annotations": ANNOTATIONS}
        done = user.call(*namespace, *document["hook"]["args"], stdin=json.dumps(state))
    finally:
        shutil.rmtree(bundle)
    assert done.returncode == EngineUnsupported.code, done
    assert "rootless engines are not supported" in done.stderr
