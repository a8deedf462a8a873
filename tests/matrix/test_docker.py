"""Docker for real: a dockerd of its own, whose runtimes are the shim before runc, crun and runsc.

Debian 12's Docker (20.10) has no annotations: there a variable of the environment selects the model. Docker 24 and
later have `docker run --annotation`: Debian 13's (26.1, with its containerd and runtimes) is started here, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from oci_hook.key_errors import all_errors
from tests.dockerd import Docker
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import hook_processes, model_mounts
from tests.runtimes import Runsc, newer_runsc, own_runsc
from tests.scene import TOKEN_PATH, Scene
from tests.shims import write_shim
from tests.suites import program
from tests.workshop import wait_until

RUNTIMES = ("scz-runc", "scz-crun", "scz-runsc")
CODES = {cls.__name__: code for code, cls in all_errors().items()}
SUMS = " ".join(f"/models/small/{name}" for name in FILES)
EXPECTED = "".join(
    f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" for name, size in FILES.items()
)
NEWER = "trixie"
Shims = Mapping[str, Mapping[str, object]]
Run = Callable[..., subprocess.CompletedProcess[str]]
VARIABLE, ANNOTATION = "--env=SMM_SCZ_MODEL=small:1", "--annotation=smm.scz/model=small:1"


def write_shims(scene: Scene, folder: Path, find: Callable[[str], str], runsc: Runsc) -> Shims:
    """`runtimes` of daemon.json: a shim before each runtime."""
    folder.mkdir()
    made = {}
    for name in RUNTIMES:
        kind = name.removeprefix("scz-")
        path = write_shim(folder / name, runtime=find(kind), engine="docker", config_file=scene.config)
        made[name] = {"path": str(path), "runtimeArgs": list(runsc.flags) if kind == "runsc" else []}
    return made


@pytest.fixture(scope="module")
def shims(scene: Scene) -> Shims:
    """Before the machine's own runtimes."""
    return write_shims(scene, scene.host / "shims", lambda kind: f"/usr/bin/{kind}", own_runsc())


@pytest.fixture(scope="module")
def docker(scene: Scene, shims: Shims) -> Iterator[Docker]:
    """A daemon with the shims beside its own runc."""
    with Docker(scene.directory / "docker", runtimes=shims) as made:
        yield made
    assert made.processes() == []


@pytest.fixture(scope="module")
def newer(scene: Scene) -> Iterator[Docker]:
    """The same of a newer suite: its Docker, its containerd, its runtimes."""
    made_for = write_shims(scene, scene.host / "newer", lambda kind: str(program(NEWER, kind)), newer_runsc())
    with Docker(scene.directory / "newer", runtimes=made_for, suite=NEWER) as made:
        yield made
    assert made.processes() == []


@pytest.fixture
def run(docker: Docker, scene: Scene) -> Iterator[Run]:
    """`docker run` with a model; afterwards no container, mount or record of one is left."""
    with runner(docker, scene) as start:
        yield start


@pytest.fixture
def run_newer(newer: Docker, scene: Scene) -> Iterator[Run]:
    """The same under the newer Docker."""
    with runner(newer, scene) as start:
        yield start


@contextlib.contextmanager
def runner(docker: Docker, scene: Scene) -> Iterator[Run]:
    """Make the function that starts a container whose first act is to leave a trace on the host."""
    scene.forget_refusals()
    image, trace = docker.busybox_image(), scene.host / "docker-trace"
    trace.mkdir(exist_ok=True)
    (trace / "ran").unlink(missing_ok=True)

    def start(
        shell: str,
        *options: str,
        runtime: str = "scz-runc",
        token: Path | None = None,
        select: tuple[str, ...] = (VARIABLE,),
        image: str = image,
    ) -> subprocess.CompletedProcess[str]:
        words = [f"--volume={trace}:/trace", f"--runtime={runtime}", *select, *options]
        words += [f"--volume={token}:{TOKEN_PATH}:ro"] if token else []
        return docker.run([*words, image, "sh", "-c", f"echo > /trace/ran; {shell}"], check=False)

    yield start
    for name in docker.containers():
        docker.call("rm", "--force", name)
    nothing_left(docker, scene)


def ran(scene: Scene) -> bool:
    """Whether the workload ran."""
    return (scene.host / "docker-trace/ran").exists()


def nothing_left(docker: Docker, scene: Scene) -> None:
    """No container's mounts, processes or records; engines take bundles away a moment after a container's end."""
    deadline = time.monotonic() + 60
    while any(left := (model_mounts(scene), docker.bundles(), hook_processes(scene), records(scene))):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def records(scene: Scene) -> list[Path]:
    """Records of containers that have a model."""
    return sorted((scene.runtime_directory / "containers").glob("*"))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_reads_exactly_what_was_packed(scene: Scene, run: Run, runtime: str) -> None:
    done = run(f"sha256sum {SUMS}", "--rm", runtime=runtime, token=scene.token())
    assert (done.returncode, done.stdout) == (0, EXPECTED), (done.stderr, scene.why())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_plaintext_goes_with_the_container(docker: Docker, scene: Scene, run: Run, runtime: str) -> None:
    done = run("exec sleep 1000", "--detach", "--name=one", runtime=runtime, token=scene.token())
    assert done.returncode == 0, (done.stderr, scene.why())
    assert model_mounts(scene) != []
    seen = docker.call("exec", "one", "cat", "/models/small/config.json").stdout
    assert seen == contents("config.json", FILES["config.json"]).decode()
    (row,) = json.loads(scene.sczctl("ps", "--json").stdout)
    assert row["container_id"] == docker.inspect("one")["Id"]
    docker.call("rm", "--force", "one")
    nothing_left(docker, scene)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_models_by_variables(scene: Scene, run: Run, runtime: str) -> None:
    select = (
        "--env=SMM_SCZ_MODEL=small:1",
        "--env=SMM_SCZ_PATH=/opt/one",
        "--env=SMM_SCZ_MODEL_SECOND=other:1",
        "--env=SMM_SCZ_TOKEN=/run/token",
    )
    token = scene.token()
    shell = "cat /opt/one/config.json; echo; cat /models/other/model.json"
    done = run(shell, "--rm", f"--volume={token}:/run/token:ro", runtime=runtime, select=select)
    assert done.returncode == 0, (done.stderr, scene.why())
    first, second = done.stdout.strip().splitlines()
    assert first.encode().strip() == contents("config.json", FILES["config.json"]).strip()
    assert json.loads(second)["model"]["name"] == "other"


def test_a_variable_of_the_image_selects_too(docker: Docker, scene: Scene, run: Run) -> None:
    image = docker.busybox_image("SMM_SCZ_MODEL=small:1")
    done = run(f"sha256sum {SUMS}", "--rm", select=(), image=image, token=scene.token())
    assert (done.returncode, done.stdout) == (0, EXPECTED), (done.stderr, scene.why())
    # Docker itself lets the user's variable take the image's place.
    done = run("ls /models", "--rm", select=("--env=SMM_SCZ_MODEL=other:1",), image=image, token=scene.token())
    assert (done.returncode, done.stdout) == (0, "other\n"), (done.stderr, scene.why())


@pytest.mark.parametrize("runtime", ["scz-runc", "scz-crun"])
def test_a_tmpfs_of_docker_is_honoured_with_ours_on_top(scene: Scene, run: Run, runtime: str) -> None:
    shell = f"echo > /models/own && sha256sum {SUMS} && ls /models && ! echo > /models/small/own"
    done = run(shell, "--rm", "--tmpfs=/models", runtime=runtime, token=scene.token())
    assert (done.returncode, done.stdout) == (0, EXPECTED + "own\nsmall\n"), (done.stderr, scene.why())


def test_a_tmpfs_that_gvisor_makes_itself_would_hide_the_model(scene: Scene, run: Run) -> None:
    done = run("true", "--tmpfs=/models", runtime="scz-runsc", token=scene.token())
    assert (done.returncode, ran(scene)) == (125, False), done
    assert scene.why()["reason"] == "DestinationRefused"
    assert "DestinationRefused" in done.stderr


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_volume_on_the_destination_is_refused(scene: Scene, run: Run, runtime: str, tmp_path: Path) -> None:
    done = run("true", f"--volume={tmp_path}:/models", runtime=runtime, token=scene.token())
    assert (done.returncode, ran(scene)) == (125, False), done
    assert scene.why()["reason"] == "DestinationRefused"
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "no token": "TokenMissing",
    "another subject": "IdentityRefused",
    "no such model": "ModelUnknown",
    "an unknown variable": "AnnotationInvalid",
    "a malformed model": "AnnotationInvalid",
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_refused_start_is_explained_to_dockers_user(
    docker: Docker, scene: Scene, run: Run, runtime: str, why: str
) -> None:
    token = None if why == "no token" else scene.token()
    if why == "another subject":
        token = scene.token("other-token", subject="system:serviceaccount:shop:thief")
    select = {
        "no such model": ("--env=SMM_SCZ_MODEL=nothing:1",),
        "an unknown variable": (VARIABLE, "--env=SMM_SCZ_MODLE=x"),
        "a malformed model": ("--env=SMM_SCZ_MODEL=../../x",),
    }.get(why, (VARIABLE,))
    done = run("true", "--name=refused", runtime=runtime, token=token, select=select)
    assert (done.returncode, ran(scene)) == (125, False), done
    assert scene.why()["reason"] == REFUSED[why]
    if runtime != "scz-crun" or REFUSED[why] == "AnnotationInvalid":  # crun throws away what a hook says
        assert f"{REFUSED[why]} ({CODES[REFUSED[why]]})" in done.stderr
    else:
        assert f"exit code: {CODES[REFUSED[why]]}" in done.stderr or "error executing hook" in done.stderr
    assert docker.inspect("refused")["State"]["Status"] == "created"
    nothing_left(docker, scene)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_that_is_restarted_gets_its_model_again(
    docker: Docker, scene: Scene, run: Run, runtime: str
) -> None:
    done = run("exec sleep 1000", "--detach", "--name=two", runtime=runtime, token=scene.token())
    assert done.returncode == 0, (done.stderr, scene.why())
    for again in (("restart", "--time=0"), ("restart", "--time=0"), ("stop", "--time=0"), ("start",)):
        scene.token()  # a new one in the same place
        docker.call(*again, "two")
        if again[0] == "stop":
            nothing_left(docker, scene)
        else:
            assert docker.call("exec", "two", "sh", "-c", f"sha256sum {SUMS}").stdout == EXPECTED


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_container_without_ours_is_unchanged(docker: Docker, scene: Scene, run: Run, runtime: str) -> None:
    done = run("exec sleep 1000", "--detach", "--name=plain", runtime=runtime, select=("--env=A=b",))
    assert done.returncode == 0, done.stderr
    (bundle,) = docker.bundles()
    document = json.loads((bundle / "config.json").read_text())
    assert "scz-smm" not in json.dumps(document)
    assert all("oci_hook" not in json.dumps(entry) for entry in (document.get("hooks") or {}).values())
    assert model_mounts(scene) == []
    wait_until(lambda: ran(scene))


def test_the_shim_as_the_default_runtime(scene: Scene, shims: Shims) -> None:
    with Docker(scene.directory / "docker-default", runtimes=shims, default_runtime="scz-runc") as docker:
        image, token = docker.busybox_image(), scene.token()
        options = ["--rm", "--env=SMM_SCZ_MODEL=small:1", f"--volume={token}:{TOKEN_PATH}:ro"]
        done = docker.run([*options, image, "sh", "-c", f"sha256sum {SUMS}"], check=False)
        assert (done.returncode, done.stdout) == (0, EXPECTED), (done.stderr, scene.why())
        assert docker.run(["--rm", image, "echo", "plain"]).stdout == "plain\n"
    assert docker.processes() == []


# --- a Docker that knows annotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [ANNOTATION, VARIABLE])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_newer_docker(newer: Docker, scene: Scene, run_newer: Run, runtime: str, select: str) -> None:
    assert newer.has_annotations()
    done = run_newer(f"sha256sum {SUMS}", "--rm", runtime=runtime, token=scene.token(), select=(select,))
    assert (done.returncode, done.stdout) == (0, EXPECTED), (done.stderr, scene.why())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_annotation_comes_before_variables(scene: Scene, run_newer: Run, runtime: str) -> None:
    select = ("--annotation=smm.scz/model=other:1", VARIABLE, "--env=SMM_SCZ_WHATEVER=x")
    done = run_newer("ls /models", "--rm", runtime=runtime, token=scene.token(), select=select)
    assert (done.returncode, done.stdout) == (0, "other\n"), (done.stderr, scene.why())


@pytest.mark.parametrize("annotation", ["smm.scz/shim=x", "smm.scz/modle=small:1", "smm.scz/model=../x"])
def test_an_annotation_that_is_refused_by_a_newer_docker(scene: Scene, run_newer: Run, annotation: str) -> None:
    done = run_newer("true", token=scene.token(), select=(ANNOTATION, f"--annotation={annotation}"))
    assert (done.returncode, ran(scene)) == (125, False), done
    assert f"AnnotationInvalid ({CODES['AnnotationInvalid']})" in done.stderr
