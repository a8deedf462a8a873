"""Containers of a real containerd through `ctr`, with the shim in runc's place (`--runc-binary`, options.BinaryName).

The machine's own containerd (1.6 on Debian 12), Debian 13's (1.7) and sid's, each with runtimes of its own suite. Pods
are in `test_pods.py`. Of sid, whatever it holds today; what it does not have is said by `test_what_sid_holds_today`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.containerd import Containerd
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import CODES, craft_token
from tests.matrix.test_pods import SUITES, engine, holders, nothing_left
from tests.scene import TOKEN_PATH, Scene
from tests.suites import NotInSuite, package_version, program, version

DIGESTS = {name: hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}
EACH = [(suite, runtime) for suite in SUITES for runtime in ("runc", "crun", "runsc")] + [("sid", "runc")]
OURS = {"smm.scz/model": "small:1"}
each = pytest.mark.parametrize(("suite", "runtime"), EACH, ids=["-".join(one) for one in EACH])


class Engines:
    """The suites' containerds, each started when it is first asked for."""

    def __init__(self, scene: Scene, stack: contextlib.ExitStack) -> None:
        self.scene, self._stack = scene, stack
        self._started: dict[str, Containerd] = {}
        self.trace = scene.host / "trace"

    def get(self, suite: str) -> Containerd | None:
        """A suite's; None if sid has none today. The others' must be there."""
        if suite not in self._started:
            try:
                containerd = self._stack.enter_context(engine(self.scene, suite))
            except NotInSuite:
                if suite != "sid":
                    raise
                return None
            containerd.busybox_image()
            self._started[suite] = containerd
        return self._started[suite]


@pytest.fixture(scope="module")
def started(scene: Scene) -> Iterator[Engines]:
    """All containerds of this module."""
    with contextlib.ExitStack() as stack:
        yield Engines(scene, stack)


@pytest.fixture
def engines(started: Engines) -> Iterator[Engines]:
    """The same, with no trace of an earlier test, and nothing left afterwards."""
    scene = started.scene
    scene.forget_refusals()
    started.trace.mkdir(exist_ok=True)
    for path in started.trace.iterdir():
        path.unlink()
    yield started
    nothing_left(scene)


def run(
    engines: Engines,
    containerd: Containerd,
    runtime: str,
    command: str,
    *,
    token: Path | None,
    annotations: Mapping[str, str] = OURS,
    name: str = "one",
    namespace: str = "default",
    how: tuple[str, ...] = ("--rm",),
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`ctr run` of a container whose first act is to leave a trace on the host."""
    options = containerd.run_options(name, runtime=containerd.handlers[f"scz-{runtime}"], namespace=namespace)
    options += [f"--annotation={key}={text}" for key, text in annotations.items()]
    options.append(f"--mount=type=bind,src={engines.trace},dst=/trace,options=rbind:rw")
    if token is not None:
        options.append(f"--mount=type=bind,src={token},dst={TOKEN_PATH},options=bind:ro")
    words = [containerd.busybox_image(namespace), name, "sh", "-c", f"echo > /trace/{name}; {command}"]
    return containerd.ctr("run", *how, *options, *words, namespace=namespace, check=check)


def tasks(containerd: Containerd, namespace: str = "default") -> list[str]:
    """The bundles of the containers that a runtime has made: nothing of a refused one stays."""
    folder = containerd.directory / "state/io.containerd.runtime.v2.task" / namespace
    return sorted(path.name for path in folder.glob("*"))


def end(containerd: Containerd, name: str, namespace: str = "default") -> None:
    """Kill a container that runs in the background, and take it away."""
    containerd.ctr("tasks", "delete", "--force", name, namespace=namespace)
    containerd.ctr("containers", "delete", name, namespace=namespace)


@each
def test_the_model_is_there(engines: Engines, suite: str, runtime: str) -> None:
    containerd = engines.get(suite)
    if containerd is None:
        return
    command = "cat /proc/mounts; cd /models/small && find . -type f -exec sha256sum {} +; touch new; exit 7"
    done = run(engines, containerd, runtime, command, token=craft_token(engines.scene))
    assert done.returncode == 7, done
    for name, digest in DIGESTS.items():
        assert f"{digest}  ./{name}\n" in done.stdout
    assert "new" not in done.stdout
    if runtime != "runsc":  # gVisor shows mounts of its own making
        (mount,) = [line for line in done.stdout.splitlines() if " /models/small " in line]
        assert mount.startswith("scz-smm ")
    assert tasks(containerd) == []


@each
def test_a_container_without_annotations_of_ours(engines: Engines, suite: str, runtime: str) -> None:
    containerd = engines.get(suite)
    if containerd is None:
        return
    run(engines, containerd, runtime, "sleep 1000", token=None, annotations={"io.x/y": "z"}, how=("-d",), check=True)
    try:
        bundle = containerd.directory / "state/io.containerd.runtime.v2.task/default/one"
        written = json.loads((bundle / "config.json").read_text())
        asked = json.loads(containerd.ctr("containers", "info", "--spec", "one").stdout)
        assert written == asked
        assert "hooks" not in written
    finally:
        end(containerd, "one")
    assert list((engines.scene.runtime_directory / "last").glob("*")) == []


@each
def test_a_refused_start_says_why_and_leaves_nothing(engines: Engines, suite: str, runtime: str) -> None:
    containerd = engines.get(suite)
    if containerd is None:
        return
    token = craft_token(engines.scene, sub="system:serviceaccount:shop:mailer")
    done = run(engines, containerd, runtime, "true", token=token)
    assert done.returncode != 0
    code = CODES["IdentityRefused"]
    # What the runtime shows, containerd shows: runc and runsc the hook's line, crun its exit code.
    assert (f"exit code: {code}" if runtime == "crun" else f"IdentityRefused ({code})") in done.stderr
    assert engines.scene.why()["reason"] == "IdentityRefused"
    assert list(engines.trace.iterdir()) == []
    assert tasks(containerd) == []
    assert containerd.ctr("containers", "list", "--quiet").stdout == ""
    # An unknown key is told by the shim itself: no container was made.
    done = run(engines, containerd, runtime, "true", token=token, annotations={**OURS, "smm.scz/modle": "x"})
    assert done.returncode != 0
    assert "AnnotationInvalid" in done.stderr
    assert list(engines.trace.iterdir()) == []


@pytest.mark.parametrize("runtime", ["runc", "crun", "runsc"])
def test_one_id_in_two_namespaces(engines: Engines, runtime: str) -> None:
    # runsc of 2022 names its sandbox's socket after the id alone: the host has each id once.
    scene, containerd = engines.scene, engines.get(SUITES[-1] if runtime == "runsc" else "own")
    assert containerd is not None
    tokens = {namespace: craft_token(scene, f"token-{namespace}") for namespace in ("blue", "green")}
    running = set()

    def read(namespace: str) -> str:
        words = ("tasks", "exec", f"--fifo-dir={containerd.directory}/fifo", "--exec-id=read", "same")
        until = time.monotonic() + 60  # ctr of 1.6 can end before it has copied what a quick program says
        while not (said := containerd.ctr(*words, "cat", "/models/small/config.json", namespace=namespace).stdout):
            assert time.monotonic() < until
        return said

    try:
        for namespace, token in tokens.items():
            run(engines, containerd, runtime, "sleep 1000", token=token, name="same", namespace=namespace, how=("-d",),
                check=True)  # fmt: skip
            running.add(namespace)
        assert [record.container_id for record in holders(scene)] == ["same", "same"]
        assert len({record.bundle for record in holders(scene)}) == 2
        expected = contents("config.json", FILES["config.json"]).decode()
        assert [read("blue"), read("green")] == [expected, expected]
        # The end of one frees its token and nothing of the other's.
        end(containerd, "same", "blue")
        running.remove("blue")
        assert read("green") == expected
        assert len(holders(scene)) == 1
        assert run(engines, containerd, runtime, "true", token=tokens["green"]).returncode != 0
        assert scene.why()["reason"] == "TokenBoundElsewhere"
        assert run(engines, containerd, runtime, "true", token=tokens["blue"]).returncode == 0
    finally:
        for namespace in running:
            end(containerd, "same", namespace)


def test_what_sid_holds_today(capsys: pytest.CaptureFixture[str]) -> None:
    """Its containerd's version, or that it has none: the one place where its absence is told."""
    try:
        said, package = version(program("sid", "containerd")), package_version("sid", "containerd")
    except NotInSuite as absent:
        said = package = str(absent)
        assert "containerd" in said
    else:
        assert package.split("~")[0].split("+")[0].split("-")[0] in said
    with capsys.disabled():
        print(f"\nsid today: containerd {package}")


def test_sczctl_installs_the_same_script(engines: Engines) -> None:
    """What all tests here start is what `sczctl install` gives a host, and its drop-in names it."""
    scene, containerd = engines.scene, engines.get("own")
    assert containerd is not None
    shims, configuration = scene.host / "installed", scene.host / "containerd" / "config.toml"
    words = ("--engine", "containerd", "--shim-dir", shims, "--engine-config", configuration)
    scene.sczctl("install", *words, "--runtime", "/usr/bin/runc", "--engine-version", "1.6")
    (script,) = shims.rglob("scz-runc")
    assert script.read_bytes() == containerd.handlers["scz-runc"].read_bytes()
    (drop_in,) = configuration.parent.rglob("*.toml")
    plugin = tomllib.loads(drop_in.read_text())["plugins"]["io.containerd.grpc.v1.cri"]
    handler = plugin["containerd"]["runtimes"]["scz-runc"]
    assert handler["options"]["BinaryName"] == str(script)
    assert handler["pod_annotations"] == ["smm.scz/*"]
    scene.sczctl("uninstall", *words)
    assert [path for path in (*shims.rglob("*"), *configuration.parent.rglob("*")) if path.is_file()] == []
