"""Who reads the file for `precreate`: real podman by the drop-in that `--before-create` writes, nobody who fails at it.

`podman build` (buildah) reads podman's default directories, and knows no stage `precreate`: no step RUN of any image
would be built. CRI-O reads hooks.d by the same library with as few stages; buildah stands in for it here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from oci_hook.engines.podman import DROP_IN, OWN_DIRECTORY, PRECREATE_FILE
from oci_hook.errors import EngineUnsupported, SpecInvalid
from oci_hook.invocation import Invocation
from tests.commands import done, sczctl
from tests.engines import Podman, RuntimeNamespace
from tests.matrix.test_rootless import ran, user
from tests.rootless import Rootless

__all__ = ["user"]
KATA = ("--annotation", "smm.scz/model=small:1", "--annotation", "smm.scz/require=runtime=kata")
UNKNOWN = 'unknown stage "precreate"'


class Place:
    """podman that is told of hooks by files of /etc alone, those that `install --before-create` writes."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        done(sczctl("install", "--engine", "podman", "--before-create", "--root", self.root))
        self.podman = Podman(directory / "podman").__enter__()
        # Its configuration in /etc, too, where drop-ins change it.
        drop_ins = self.root / "etc/containers/containers.conf.d"
        shutil.copy(self.podman.directory / "containers.conf", drop_ins / "10-test.conf")
        self.podman.namespace.stop()
        self.podman.namespace = RuntimeNamespace(self.root / "etc").start()
        self.image = self.podman.busybox_image()
        self.context = directory / "context"
        self.context.mkdir()
        (self.context / "Containerfile").write_text(f"FROM {self.image}\nRUN true\n")

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in self.podman.environment.items() if name != "CONTAINERS_CONF"}
        verb, *rest = words
        parent = [f"--cgroup-parent=/{self.podman._name}"] if verb == "run" else []
        command = self.podman.command(verb, *parent, *rest)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    def build(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call("build", "--isolation=oci", "--network=none", "--no-cache", *words, str(self.context))


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="scz-readers.", dir="/var/tmp") as made:
        one = Place(Path(made))
        try:
            yield one
        finally:
            one.podman.stop()


def test_podman_calls_it_by_the_drop_in(place: Place) -> None:
    # With no prestart hook beside it (`--root` wrote that one elsewhere) it refuses, so that it is seen.
    called = place.call("run", "--rm", "--network=none", *KATA, place.image, "true")
    assert called.returncode != 0
    assert f"precreate]: exit status {EngineUnsupported.code}" in called.stderr
    other = place.call("run", "--rm", "--network=none", "--annotation", "smm.scz/model=x", place.image, "true")
    assert other.returncode == 0, other.stderr
    (place.root / DROP_IN.lstrip("/")).rename(place.root / "drop-in")
    try:
        uncalled = place.call("run", "--rm", "--network=none", *KATA, place.image, "true")
        assert uncalled.returncode == 0, uncalled.stderr
    finally:
        (place.root / "drop-in").rename(place.root / DROP_IN.lstrip("/"))


def test_images_are_built_beside_it(place: Place) -> None:
    built = place.build()
    assert built.returncode == 0, built.stderr


def test_where_others_read_it_no_image_is_built(place: Place) -> None:
    assert UNKNOWN in place.build("--hooks-dir", OWN_DIRECTORY).stderr
    # A directory that buildah reads by itself, which doctor therefore looks at.
    override = place.root / "etc/containers/oci/hooks.d"
    override.mkdir(parents=True)
    shutil.copy(place.root / PRECREATE_FILE.lstrip("/"), override)
    place.podman.namespace.stop()  # overlays show what was there when they were mounted
    place.podman.namespace.start()
    try:
        assert UNKNOWN in place.build().stderr
        checks = sczctl("doctor", "--root", place.root, "--json").json["checks"]
        assert any("rm /etc/containers/oci/hooks.d/scz-smm-precreate.json" in each["remedy"] for each in checks)
    finally:
        shutil.rmtree(override.parent)


# --- rootless ---------------------------------------------------------------------------------------------------------


def write_hooks(user: Rootless, stages: Sequence[str]) -> Path:
    """hooks.d as `install` writes it, with the package where the user may read it."""
    folder = user.directory / "hooks.before-create"
    folder.mkdir(exist_ok=True)
    for stage in stages:
        words = Invocation(stage, engine="podman").command()
        words[0], words[3] = str(user.interpreter), str(user.package / "oci_hook/launch.py")
        hook = {"path": words[0], "args": words, "env": ["PATH=/usr/bin:/bin"], "timeout": 60}
        when = {"annotations": {"^smm\\.scz/require$": "(^|,)runtime=kata(,|$)"}}
        document = {"version": "1.0.0", "hook": hook, "when": when, "stages": [stage]}
        (folder / f"{stage}.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_rootless_podman_is_refused(user: Rootless, runtime: str) -> None:
    options = [f"--hooks-dir={write_hooks(user, ['precreate', 'prestart'])}"]
    annotations = {"smm.scz/model": "small:1", "smm.scz/require": "runtime=kata"}
    refused = user.run("touch", "/trace/ran", runtime=runtime, annotations=annotations, options=options)
    assert refused.returncode != 0
    assert not ran(user)
    # of a user's container it may not even have a cgroup to be named by
    codes = {f"exit status {each.code}" for each in (EngineUnsupported, SpecInvalid)}
    assert any(code in refused.stderr for code in codes), refused.stderr
    other = user.run("touch", "/trace/ran", runtime=runtime, annotations={"a": "b"}, options=options)
    assert other.returncode == 0, other.stderr
    assert ran(user)
