"""`scz-runtime` before real runtimes, without an engine: what it adds, what passes through it, and what ends there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import AnnotationInvalid, EngineUnsupported, SpecInvalid, TokenMissing
from oci_hook.oci.command_line import read_command
from tests.engines import RuntimeNamespace
from tests.integration.conftest import FILES, contents
from tests.runtimes import make_bundle, own_runsc
from tests.scene import TOKEN_PATH, Scene
from tests.shims import write_shim
from tests.suites import program

RUNTIMES = ("runc", "crun", "runsc")
MODEL = {"smm.scz/model": "small:1"}
SUMS = " ".join(f"/models/small/{name}" for name in FILES)
# crun gives hooks no stderr of its own, so only the code is seen there
SEES_STDERR = ("runc", "runsc")


class Bare:
    """One runtime behind the shim, with bundles in a folder of its own."""

    def __init__(self, scene: Scene, kind: str, folder: Path, namespace: RuntimeNamespace) -> None:
        self.scene, self.kind, self.folder, self.namespace = scene, kind, folder, namespace
        self.trace = folder / "trace"
        self.trace.mkdir()
        self.real = f"/usr/bin/{kind}"
        self.flags = (*own_runsc().flags, "--ignore-cgroups") if kind == "runsc" else ()
        self.shim = self.script(self.real)

    def script(self, runtime: str) -> Path:
        """Write a shim for a runtime."""
        path = self.folder / f"scz-{uuid.uuid4().hex[:8]}"
        return write_shim(path, runtime=runtime, engine="containerd", config_file=self.scene.config)

    def bundle(self, shell: str, *, token: Path | None = None, model: bool = True, **more: Any) -> Path:
        """A bundle whose workload leaves a trace on the host, then runs a line of shell."""
        mounts = [{"destination": "/trace", "type": "bind", "source": str(self.trace), "options": ["bind", "rw"]}]
        if token is not None:
            mounts.append({"destination": TOKEN_PATH, "type": "bind", "source": str(token), "options": ["bind", "ro"]})
        annotations = {**(MODEL if model else {}), **more.pop("annotations", {})}
        return make_bundle(
            self.folder / f"b-{uuid.uuid4().hex[:8]}",
            args=["sh", "-c", f"echo > /trace/ran; {shell}"],
            mounts=mounts,
            annotations=annotations,
            **more,
        )

    def command(self, *words: str) -> list[str]:
        """The shim with this runtime's global options and a state folder of its own."""
        return [
            *self.namespace.prefix,
            str(self.shim),
            "--root",
            str(self.folder / "state"),
            *self.flags,
            *words,
        ]

    @contextlib.contextmanager
    def start(
        self, bundle: Path, *options: str, environment: Mapping[str, str] = {}
    ) -> Iterator[subprocess.Popen[str]]:
        """`run` in the background; what is left of the container is deleted at the end."""
        (self.trace / "ran").unlink(missing_ok=True)
        name = f"scz-shim-{uuid.uuid4().hex[:12]}"
        process = subprocess.Popen(
            self.command("run", *options, "--bundle", str(bundle), name),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=bundle,
        )
        try:
            yield process
        finally:
            subprocess.run(self.command("delete", "--force", name), capture_output=True, check=False, timeout=60)
            if process.poll() is None:
                process.kill()
                subprocess.run(self.command("delete", "--force", name), capture_output=True, check=False, timeout=60)
            process.communicate(timeout=60)

    def run(self, bundle: Path, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """`run` to its end."""
        with self.start(bundle, *options, **how) as process:
            stdout, stderr = process.communicate(timeout=120)
            return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    @property
    def ran(self) -> bool:
        """Whether the workload of the last start ran."""
        return (self.trace / "ran").exists()


@pytest.fixture(scope="module")
def namespace() -> Iterator[RuntimeNamespace]:
    """Where crun works."""
    with RuntimeNamespace() as made:
        yield made


@pytest.fixture(params=RUNTIMES)
def bare(request: pytest.FixtureRequest, scene: Scene, namespace: RuntimeNamespace) -> Iterator[Bare]:
    """Each runtime; afterwards no model is mounted anywhere."""
    folder = scene.directory / f"bare-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o755)
    scene.forget_refusals()
    yield Bare(scene, request.param, folder, namespace)
    assert scene_mounts(folder) == []


def scene_mounts(folder: Path) -> list[str]:
    """Mounts of models below a folder, in any process's mount namespace."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found |= {line for line in path.read_text().splitlines() if " scz-smm " in line and str(folder) in line}
    return sorted(found)


# --- a container with a model -----------------------------------------------------------------------------------------


def test_a_container_reads_exactly_what_was_packed(bare: Bare) -> None:
    bundle = bare.bundle(f"sha256sum {SUMS}", token=bare.scene.token())
    done = bare.run(bundle)
    assert done.returncode == 0, (done, bare.scene.why())
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in done.stdout
    assert not any((bare.scene.runtime_directory / "containers").iterdir())  # poststop closed its record


def test_the_same_bundle_a_second_time(bare: Bare) -> None:
    bundle = bare.bundle("cat /models/small/config.json", token=bare.scene.token())
    first = bare.run(bundle)
    edited = (bundle / "config.json").read_bytes()
    token = bare.scene.token()  # the file is the same, the token another
    second = bare.run(bundle)
    assert token.exists()
    assert (first.returncode, second.returncode) == (0, 0), (first, second, bare.scene.why())
    assert first.stdout == second.stdout == contents("config.json", FILES["config.json"]).decode()
    assert (bundle / "config.json").read_bytes() == edited


def test_a_container_without_a_token_does_not_run(bare: Bare) -> None:
    done = bare.run(bare.bundle("cat /models/small/config.json"))
    assert (done.returncode != 0, bare.ran, done.stdout) == (True, False, "")
    assert bare.scene.why()["reason"] == TokenMissing.__name__
    if bare.kind in SEES_STDERR:
        assert f"TokenMissing ({TokenMissing.code})" in done.stderr


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_hooks_d_and_the_shim_together_give_a_container_its_model_once(scene: Scene, kind: str) -> None:
    """podman with hooks.d, and with the shim as its runtime."""
    shim = write_shim(scene.host / f"scz-{kind}", runtime=f"/usr/bin/{kind}", engine="podman", config_file=scene.config)
    done = scene.run(
        scene.image,
        ["sh", "-c", f"sha256sum {SUMS}; cat /proc/self/mountinfo"],
        model="small:1",
        token=scene.token(),
        runtime=str(shim),
    )
    assert done.returncode == 0, (done.stderr, scene.why())
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in done.stdout
    assert len([line for line in done.stdout.splitlines() if " /models/small " in line]) == 1
    grants = [json.loads(line) for line in scene.audit.read_text().splitlines()]
    assert [entry["event"] for entry in grants if entry.get("event") in ("grant", "closed")][-2:] == ["grant", "closed"]


# --- what stands between shim and hook --------------------------------------------------------------------------------

CHANGE = 'sed -i \'s/"ociVersion"/ "ociVersion"/\' {file}'


def test_config_json_changed_by_a_hook_before_ours(bare: Bare) -> None:
    bundle = bare.bundle("true", token=bare.scene.token())
    command = ["/bin/sh", "-c", CHANGE.format(file=bundle / "config.json")]
    document = json.loads((bundle / "config.json").read_text())
    document["hooks"] = {"prestart": [{"path": command[0], "args": command, "env": ["PATH=/usr/bin:/bin"]}]}
    (bundle / "config.json").write_text(json.dumps(document))
    assert bare.run(bundle).returncode != 0
    assert not bare.ran
    assert bare.scene.why()["reason"] == SpecInvalid.__name__


def test_config_json_changed_by_a_runtime_that_wraps_the_real_one(bare: Bare) -> None:
    bundle = bare.bundle("true", token=bare.scene.token())
    wrapper = bare.folder / f"{bare.kind}-wrapped"
    words = f'case " $* " in *" run "*) {CHANGE.format(file=bundle / "config.json")};; esac'
    wrapper.write_text(f'#!/bin/sh\n{words}\nexec {bare.real} "$@"\n')
    wrapper.chmod(0o755)
    bare.shim = bare.script(str(wrapper))
    assert bare.run(bundle).returncode != 0
    assert not bare.ran
    assert bare.scene.why()["reason"] == SpecInvalid.__name__


def test_our_annotations_taken_out_behind_the_shim(bare: Bare) -> None:
    """The runtime then tells the hook of other annotations only: it still looks at the digest."""
    bundle = bare.bundle("true", token=bare.scene.token(), annotations={"other": "x"})
    file = bundle / "config.json"
    wrapper = bare.folder / f"{bare.kind}-wrapped"
    words = f"""case " $* " in *" run "*) sed -i 's,"smm.scz/model":"[^"]*",,; s/{{,/{{/; s/,}}/}}/' {file};; esac"""
    wrapper.write_text(f'#!/bin/sh\n{words}\nexec {bare.real} "$@"\n')
    wrapper.chmod(0o755)
    bare.shim = bare.script(str(wrapper))
    assert bare.run(bundle).returncode != 0
    assert json.loads(file.read_text())["annotations"] == {"other": "x"}
    assert not bare.ran
    assert bare.scene.why()["reason"] == SpecInvalid.__name__


@pytest.mark.parametrize("forged", ["digest", "zeros"])
def test_a_forged_marker(bare: Bare, forged: str) -> None:
    bundle = bare.bundle("true", token=bare.scene.token())
    bare.run(bundle)
    assert bare.ran
    document = json.loads((bundle / "config.json").read_text())
    arguments = document["hooks"]["prestart"][0]["args"]
    arguments[arguments.index("--spec-digest") + 1] = ("ab" if forged == "digest" else "00") * 32
    (bundle / "config.json").write_text(json.dumps(document))
    done = bare.run(bundle)
    assert (done.returncode, bare.ran) == (SpecInvalid.code, False)  # the shim's own answer
    assert "SpecInvalid" in done.stderr
    bare.scene.forget_refusals()
    bare.shim = Path(bare.real)  # and the hook's, where there is no shim
    assert bare.run(bundle).returncode != 0
    assert not bare.ran
    assert bare.scene.why()["reason"] == SpecInvalid.__name__


def test_an_annotation_that_is_not_known(bare: Bare) -> None:
    bundle = bare.bundle("true", token=bare.scene.token(), annotations={"smm.scz/shim": "was here"})
    before = (bundle / "config.json").read_bytes()
    done = bare.run(bundle)
    assert (done.returncode, bare.ran) == (AnnotationInvalid.code, False)
    assert "smm.scz/shim" in done.stderr
    assert bare.scene.why()["reason"] == AnnotationInvalid.__name__
    assert (bundle / "config.json").read_bytes() == before


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", ["crun"], indirect=True)
@pytest.mark.parametrize("name", ["other.json", "./config.json"])
def test_another_file_than_config_json(bare: Bare, name: str) -> None:
    """crun looks for it before it goes into the bundle."""
    plain, here = bare.bundle("true", model=False), bare.bundle("true")
    for bundle in (plain, here):
        (bundle / "other.json").write_bytes((bundle / "config.json").read_bytes())
    prefix = bare.namespace.prefix  # begins at the root, whatever the working directory is
    words = bare.command("run", "--bundle", str(plain), "--config", name, f"scz-shim-{uuid.uuid4().hex[:12]}")
    for place, code, ran in ((here, EngineUnsupported.code, False), (plain, 0, True)):
        command = [*prefix, "/usr/bin/env", f"--chdir={place}", *words[len(prefix) :]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, bare.ran) == (code, ran), done


def test_a_container_without_an_annotation_of_ours(bare: Bare) -> None:
    bundle = bare.bundle("ls /models", model=False, annotations={"org.example/model": "x"})
    path = bundle / "config.json"
    before, data = path.stat(), path.read_bytes()
    done = bare.run(bundle)
    assert (done.returncode != 0, bare.ran) == (True, True)  # there is no /models
    assert path.read_bytes() == data
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


@pytest.mark.parametrize("model", [False, True])
def test_exit_codes(bare: Bare, model: bool) -> None:
    codes = [7, 70] if model else [0, 1, 2, 11, 42, 126, 127, 128, 137, 255]
    for code in codes:
        bundle = bare.bundle(f"exit {code}", model=model, token=bare.scene.token() if model else None)
        assert bare.run(bundle).returncode == code, bare.scene.why()
        assert bare.ran


def minds_signal(pid: int, number: int) -> bool:
    """Whether a process blocks or handles a signal: runc handles them, crun blocks them and reads a signalfd."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = dict(line.split(":\t", 1) for line in status.splitlines() if line.startswith("Sig"))
    return bool((int(masks["SigBlk"], 16) | int(masks["SigCgt"], 16)) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll a condition; it must come true within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("model", [False, True])
def test_a_signal_to_the_process_reaches_the_runtime(bare: Bare, model: bool) -> None:
    bundle = bare.bundle(
        "trap 'exit 42' TERM; echo ready; while true; do sleep 1; done",
        model=model,
        token=bare.scene.token() if model else None,
    )
    with bare.start(bundle) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (process.communicate(timeout=60), bare.scene.why())
        wait_until(lambda: minds_signal(process.pid, signal.SIGTERM))  # crun may still be on its way there
        process.send_signal(signal.SIGTERM)
        # `runsc run` passes no signal on, it dies of it: what was signalled is the runtime itself, not the shim
        assert process.wait(timeout=60) == (-signal.SIGTERM if bare.kind == "runsc" else 42)


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("bare", ["runc", "crun"], indirect=True)  # runsc has no --preserve-fds for `run`
def test_descriptors_for_the_workload(bare: Bare, model: bool) -> None:
    bundle = bare.bundle("cat <&3; cat <&4", model=model, token=bare.scene.token() if model else None)
    for number in (3, 4):
        (bare.folder / str(number)).write_text(f"through descriptor {number}\n")
    name = f"scz-shim-{uuid.uuid4().hex[:12]}"
    command = bare.command("run", "--preserve-fds", "2", "--bundle", str(bundle), name)
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 3< 3 4< 4', "sh", *command],
        cwd=bare.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    subprocess.run(bare.command("delete", "--force", name), capture_output=True, check=False, timeout=60)
    expected = "through descriptor 3\nthrough descriptor 4\n"
    assert (done.returncode, done.stdout) == (0, expected), (done, bare.scene.why())


def test_the_environment_of_the_runtime_is_thin_for_hooks_without_one(bare: Bare) -> None:
    seen = bare.folder / "environment"
    command = ["/bin/sh", "-c", f"cat /proc/$PPID/environ > {seen}"]  # the hook's parent is the runtime
    hooks = {"prestart": [{"path": command[0], "args": command}]}
    bundle = bare.bundle("env", hooks=hooks, model=False)
    hostile = {"PYTHONPATH": "/x", "OPENSSL_CONF": "/x", "GODEBUG": "http2debug=1", "TSS2_LOG": "all+trace", "X": "1"}
    done = bare.run(bundle, environment={**hostile, "NOTIFY_SOCKET_": "x", "LANG": "C.UTF-8"})
    assert bare.ran, done
    names = {entry.partition("=")[0] for entry in seen.read_text().split("\0") if entry}
    assert {"PATH", "LANG"} <= names
    assert names & {*hostile, "NOTIFY_SOCKET_"} == set()


def test_the_verbs_one_by_one(bare: Bare) -> None:
    bundle = bare.bundle("sleep 100", token=bare.scene.token())
    name = f"scz-shim-{uuid.uuid4().hex[:12]}"

    def call(*words: str, check: bool = True) -> str:
        with (bare.folder / "output").open("w+") as output:  # a daemon of runsc's keeps what it inherits
            done = subprocess.run(
                bare.command(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, timeout=120
            )
        text = (bare.folder / "output").read_text()
        assert not check or done.returncode == 0, (words, text, bare.scene.why())
        return text

    try:
        call("create", "--pid-file", str(bare.folder / "pid"), "--bundle", str(bundle), name)
        assert json.loads(call("state", name))["status"] == "created"
        assert not bare.ran
        call("start", name)
        assert json.loads(call("state", name))["status"] == "running"
        shown = call("exec", name, "/bin/cat", "/models/small/config.json")
        assert shown == contents("config.json", FILES["config.json"]).decode()
        call("kill", name, "KILL")
    finally:
        call("delete", "--force", name, check=False)
    assert bare.ran
    assert not any((bare.scene.runtime_directory / "containers").iterdir())


HELP = {  # how a runtime's help shows an option with a value
    "runc": r"^ +--([\w-]+)(?:, -\w)? value|^ +--([\w-]+) value",
    "crun": r"--([\w-]+)=",
    "runsc": r"^ +-([\w-]+) (?:int|uint|string|value|duration|float)$",
}


@pytest.mark.parametrize("suite", [None, "trixie"])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_the_shim_reads_every_option_that_the_runtime_has(kind: str, suite: str | None) -> None:
    runtime = str(program(suite, kind)) if suite else f"/usr/bin/{kind}"

    def options(*words: str) -> set[str]:
        done = subprocess.run([runtime, *words], capture_output=True, text=True, check=False, timeout=60)
        return {"".join(found) for found in re.findall(HELP[kind], done.stdout + done.stderr, re.MULTILINE)}

    top = options("flags" if kind == "runsc" else "--help")
    assert {"root", "log", "log-format"} <= top
    for name in top:
        # its value is no verb, whatever it looks like
        command = read_command([f"--{name}", "create", "state", "x"], kind)
        assert (name, command.verb, command.doubt) == (name, "state", "")
    for verb in ("create", "run"):
        below = options("help", verb) if kind == "runsc" else options(verb, "--help")
        assert {"bundle", "pid-file", "console-socket"} <= below
        for name in below - {"bundle"}:
            command = read_command([verb, f"--{name}", "--bundle", "--bundle", "/b", "id"], kind)
            assert (name, command.bundle, command.container_id) == (name, "/b", "id")
