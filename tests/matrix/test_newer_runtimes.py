"""The main job under the runc and crun of other Debian suites: podman with `--runtime` and a path.

Those of trixie are required. Of sid, whatever it holds today: its versions are part of the output, and a program that
sid's archive does not offer today is said to be absent by `test_what_sid_holds_today`, apart from all other tests. A
mirror that cannot be reached, or a program that does not run, fails.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import suites
from tests.engines import Podman
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import hook_processes, model_mounts, refused, start
from tests.scene import Scene
from tests.suites import NotInSuite, SuiteError, package_version, program, version

NAMES = ("runc", "crun")
EACH = [(suite, name) for suite in ("trixie", "sid") for name in NAMES]
#: Since this version crun enters the root file system before some hooks run.
EARLY_PIVOT = (1, 29)
_USER_NAMESPACES = "containers:400000:1048576\n"

each = pytest.mark.parametrize(("suite", "name"), EACH, ids=["-".join(one) for one in EACH])


def runtime_of(suite: str, name: str) -> str | None:
    """The runtime's path; None if sid's archive has none today, which has a test of its own. trixie's must be there."""
    try:
        return str(program(suite, name))
    except NotInSuite:
        if suite != "sid":
            raise
        return None


@pytest.fixture(scope="module")
def auto(scene: Scene) -> Iterator[Podman]:
    """A podman that has ids to give away to `--userns=auto`."""
    etc = {"subuid": _USER_NAMESPACES, "subgid": _USER_NAMESPACES}
    with Podman(scene.directory / "podman-auto", hooks_directories=[scene.hooks], etc=etc) as podman:
        podman.busybox_image()
        yield podman


@contextmanager
def engine(scene: Scene, podman: Podman) -> Iterator[None]:
    """Let the scene start its containers with another podman."""
    own, scene.podman = scene.podman, podman
    try:
        yield
    finally:
        scene.podman = own


@contextmanager
def delivering_at(scene: Scene, stage: str) -> Iterator[None]:
    """Let the hooks that deliver run at another stage than the installed one."""
    folder = scene.host / f"hooks-{stage}"
    folder.mkdir()
    for path in scene.hooks.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes().replace(b'"prestart"', f'"{stage}"'.encode()))
    own, scene.podman.hooks_directories = scene.podman.hooks_directories, [folder]
    try:
        yield
    finally:
        scene.podman.hooks_directories = own
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def reads_everything(scene: Scene, runtime: str, *options: str) -> str:
    """Start a container and check that it reads exactly what was packed; returns its output."""
    names = " ".join(f"/models/small/{name}" for name in FILES)
    command = f"sha256sum {names}; cat /proc/self/uid_map /proc/self/mountinfo"
    attempt = start(scene, scene.token(), runtime=runtime, options=options, command=command)
    assert attempt.returncode == 0, attempt.stderr
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in attempt.stdout
    (mount,) = [line for line in attempt.stdout.splitlines() if " /models/small " in line]
    assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(mount.split()[5].split(","))
    assert model_mounts(scene) == []
    assert hook_processes(scene) == []
    return attempt.stdout


@pytest.mark.parametrize("name", NAMES)
def test_trixies_runtime_runs_here(name: str) -> None:
    path = program("trixie", name)
    assert path.name == name
    assert version(path).startswith(f"{name} version 1.")


def test_what_sid_holds_today(capsys: pytest.CaptureFixture[str]) -> None:
    """Says which runtimes sid has today, or that it has none, so that no other test's success hides an absence."""
    lines = []
    for name in NAMES:
        try:
            said = version(program("sid", name))
            lines.append(f"{said} ({package_version('sid', name)})")
        except NotInSuite as absent:
            lines.append(f"{name}: ABSENT: {absent}")
    crun = re.match(r"crun version (\d+)\.(\d+)", lines[1])
    pivots = crun is not None and (int(crun[1]), int(crun[2])) >= EARLY_PIVOT
    lines.append(
        f"crun 1.29 or later, which pivots early: {'this one' if pivots else 'ABSENT, not tested by this run'}"
    )
    with capsys.disabled():
        print("".join(f"\nsid today: {line}" for line in lines))
    assert all(re.search(r" version \d|ABSENT", line) for line in lines[:2])


def test_a_mirror_that_cannot_be_reached_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "_FOLDER", tmp_path)
    monkeypatch.setattr(suites, "mirror", lambda: "file:///nowhere/at/all")
    with pytest.raises(SuiteError) as failed:
        program("sid", "runc")
    assert type(failed.value) is SuiteError
    with pytest.raises(SuiteError):
        runtime_of("sid", "runc")


def test_a_package_that_a_suite_does_not_have_is_an_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.PACKAGES, "nothing", "scz-smm-is-no-package-of-debian")
    with pytest.raises(NotInSuite):
        program("trixie", "nothing")
    with pytest.raises(NotInSuite):
        runtime_of("trixie", "nothing")
    assert runtime_of("sid", "nothing") is None


@each
def test_podman_starts_that_very_runtime(scene: Scene, suite: str, name: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    container = scene.podman.create([scene.image, "true"], runtime=runtime)
    assert scene.podman.inspect(container)["OCIRuntime"] == runtime
    scene.podman.rm(container)


@each
@pytest.mark.parametrize("stage", ["prestart", "createRuntime"])
def test_a_container_reads_exactly_what_was_packed(scene: Scene, suite: str, name: str, stage: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    with delivering_at(scene, stage):
        reads_everything(scene, runtime)


@each
def test_in_a_user_namespace(scene: Scene, suite: str, name: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    said = reads_everything(scene, runtime, "--uidmap", "0:200000:65536")
    assert re.search(r"^ *0 +200000 +65536$", said, re.MULTILINE)


@pytest.mark.parametrize("runtime", NAMES)
def test_in_a_user_namespace_that_podman_chooses(scene: Scene, auto: Podman, runtime: str) -> None:
    """`--userns=auto`, with this machine's own runtimes."""
    with engine(scene, auto):
        said = reads_everything(scene, runtime, "--userns=auto:size=4096")
    assert re.search(r"^ *0 +4\d{5} +4096$", said, re.MULTILINE)


@each
def test_in_a_user_namespace_that_podman_chooses_with_newer_runtimes(
    scene: Scene, auto: Podman, suite: str, name: str
) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    with engine(scene, auto):
        said = reads_everything(scene, runtime, "--userns=auto:size=4096")
    assert re.search(r"^ *0 +4\d{5} +4096$", said, re.MULTILINE)


@each
def test_with_a_read_only_root(scene: Scene, suite: str, name: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    reads_everything(scene, runtime, "--read-only", "--tmpfs", "/models")


@each
@pytest.mark.parametrize("stage", ["prestart", "createRuntime"])
def test_a_refused_start(scene: Scene, suite: str, name: str, stage: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    with delivering_at(scene, stage):
        refused(scene, "ModelUnknown", scene.token(), runtime=runtime, model="nothing")
        refused(scene, "TokenMissing", None, runtime=runtime)


@each
def test_a_destination_in_a_volume_is_refused(scene: Scene, suite: str, name: str) -> None:
    if (runtime := runtime_of(suite, name)) is None:
        return
    annotations = {"smm.scz/path": "/trace/model"}
    refused(scene, "DestinationRefused", scene.token(), runtime=runtime, annotations=annotations)
    assert list(Path(scene.host / "trace").iterdir()) == []
