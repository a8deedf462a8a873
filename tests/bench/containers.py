"""Containers under runc whose hook is the real one, timed from outside; the host and its TPM are `tests.scene`'s.

The hook of a bundle is a clock that turns into `scz-hook`: it writes its pid and the time to a pipe, then executes the
hook's own command line, so that runc stays the hook's parent. The end is the process's, seen through a pidfd.
Two hooks of one container are told apart by their pipes. Processes are looked at from outside, through /proc.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci_hook.linux.mounts import SOURCE, parse_mountinfo
from tests.bench.rows import sized
from tests.bench.workspace import Workspace
from tests.engines import RuntimeNamespace
from tests.runtimes import make_bundle, prestart, start_container
from tests.scene import TOKEN_PATH, Scene

_SECONDS = 300
_SAMPLE_SECONDS = 0.002
_CLOCK = """#!{python} -IS
import os, sys, time
pipe = os.open({pipe!r}, os.O_WRONLY | os.O_CLOEXEC)
os.write(pipe, b"%d %d\\n" % (os.getpid(), time.monotonic_ns()))
os.execv(sys.argv[1], sys.argv[1:])
"""
_COMMAND = """
import json, sys
from oci_hook.invocation import Invocation
print(json.dumps(Invocation(sys.argv[1], config_file=sys.argv[2]).command()))
"""
_WORKLOAD = "for file in /models/m/weights-*; do cat $file > /dev/null || exit 1; done; echo ran; exec sleep 600"
_IDLE = "echo ran; exec sleep 600"


def hook_command(stage: str, config_file: Path) -> list[str]:
    """The command line of the installed hook; what is imported here may be the source folder."""
    command = [sys.executable, "-I", "-c", _COMMAND, stage, str(config_file)]
    return list(json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout))


@dataclass(frozen=True, slots=True)
class Started:
    """A container that runs.

    Attributes:
        wall_seconds: From runc's start to the workload's first word.
        hook_seconds: From the hook's exec to its end; 0 without a hook.
        hook_bytes: The most private memory (Pss_Anon) that the hook and its children had at once, if it was sampled.
    """

    wall_seconds: float
    hook_seconds: float
    hook_bytes: int


class _Watch:
    """Waits for one hook, in a thread."""

    def __init__(self, pipe: Path, *, sample: bool) -> None:
        os.mkfifo(pipe)
        self._fd = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        self._sample = sample
        self.seconds, self.peak_bytes = 0.0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pid, began = (int(word) for word in os.read(self._fd, 100).split())
        if not pid:
            return
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            while not select.select([process], [], [], _SAMPLE_SECONDS if self._sample else None)[0]:
                self.peak_bytes = max(self.peak_bytes, _private_bytes(pid))
            os.close(process)
        self.seconds = (time.monotonic_ns() - began) / 1e9

    def close(self) -> None:
        """Let the thread end, whether a hook came or not."""
        os.write(self._fd, b"0 0\n")
        self._thread.join(10)
        os.close(self._fd)

    def wait(self) -> None:
        """Until the hook has ended."""
        self._thread.join(_SECONDS)


def _private_bytes(pid: int) -> int:
    """Pss_Anon of a process and all its descendants: each page once, also those that they share after a fork."""
    total = 0
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) << 10
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                total += _private_bytes(int(child))
    return total


class Station:
    """A host on which containers are started, with models by name; a context manager."""

    def __init__(self, space: Workspace) -> None:
        self._space = space
        self._stack = ExitStack()
        self._count = 0
        self._tokens: list[Path] = []
        self._issued = 0

    def __enter__(self) -> Station:
        with ExitStack() as stack:
            folder = self._space.folder / "scene"
            folder.mkdir(mode=0o755)
            stack.callback(shutil.rmtree, folder)  # if this fails, another benchmark begins anew
            self._space.say("a host with a software TPM, and an owner: enrolment")
            self.scene = stack.enter_context(Scene(folder))
            self._namespace = stack.enter_context(RuntimeNamespace())
            self.scene.tpm.measure_boot()
            self.scene.keygen()
            self.scene.enrol()
            self.scene.trust()
            self._commands = {stage: hook_command(stage, self.scene.config) for stage in ("prestart", "poststop")}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add_model(self, name: str, size_bytes: int) -> None:
        """Pack, grant and add a model, which its containers may share."""
        source = self._space.plain_folder(size_bytes)
        self._space.say(f"{name}: packing, granting and adding {sized(size_bytes)}")
        out = self.scene.pack(source, name=name, extra=("--share",))
        self.scene.grant(out, name=name)
        self.scene.add(out)
        subprocess.run(["/bin/rm", "-r", str(out)], check=True)
        os.sync()

    @property
    def store(self) -> Path:
        """Where the host keeps what it was given."""
        return self.scene.store

    def shared(self) -> tuple[int, int]:
        """How many deliveries the hook says it shared, and of how many; (0, 0) if its audit log does not say."""
        said = []
        for line in self.scene.audit.read_text().splitlines():
            said += _values(json.loads(line), "shared")
        return sum(bool(value) for value in said), len(said)

    @contextmanager
    def container(self, model: str | None, *, sample: bool = False, read: bool = True) -> Iterator[_Starting]:
        """A bundle whose container is not started yet."""
        self._count += 1
        folder = self._space.folder / f"c{self._count}"
        with ExitStack() as stack:
            stack.callback(subprocess.run, ["/bin/rm", "-rf", str(folder)], check=True)
            pipe = Path(f"{folder}.pipe")
            stack.callback(pipe.unlink, missing_ok=True)
            watch = None
            hooks: dict[str, list[Mapping[str, Any]]] = {}
            annotations: dict[str, str] = {}
            mounts: Sequence[Mapping[str, Any]] = ()
            if model is not None:
                watch = _Watch(pipe, sample=sample)
                stack.callback(watch.close)
                clock = self._clock(pipe)
                stack.callback(clock.unlink)
                stop = prestart(*self._commands["poststop"], timeout_seconds=_SECONDS)
                start = prestart(clock, *self._commands["prestart"], timeout_seconds=_SECONDS)
                hooks = {"prestart": [start], "poststop": [stop]}
                annotations = {"smm.scz/model": f"{model}:1", "smm.scz/path": "/models/m"}
                # One that no live container uses: poststop frees it.
                token = self._tokens.pop() if self._tokens else self._issue()
                stack.callback(self._tokens.append, token)
                bind = {"type": "bind", "source": str(token), "options": ["bind", "ro"]}
                mounts = [bind | {"destination": TOKEN_PATH}]
            script = _WORKLOAD if model is not None and read else _IDLE
            bundle = make_bundle(folder, args=["sh", "-c", script], hooks=hooks, mounts=mounts, annotations=annotations)
            yield _Starting(bundle, self._namespace, watch, stack)

    def _issue(self) -> Path:
        self._issued += 1
        return self.scene.token(f"token-{self._issued}", ttl_seconds=3600)

    def _clock(self, pipe: Path) -> Path:
        path = Path(f"{pipe}.clock")
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        path.write_text(_CLOCK.format(python=python, pipe=str(pipe)))
        path.chmod(0o755)
        return path


class _Starting:
    """A container that can be started, once."""

    def __init__(self, bundle: Path, namespace: RuntimeNamespace, watch: _Watch | None, stack: ExitStack) -> None:
        self._bundle, self._namespace, self._watch, self._stack = bundle, namespace, watch, stack

    def begin(self) -> None:
        """Start runc."""
        self._began = time.monotonic()
        starting = start_container("runc", self._bundle, self._namespace)
        self.process = self._stack.enter_context(starting)

    def finish(self) -> Started:
        """Wait for the workload's word.

        Raises:
            RuntimeError: The container does not run; with what was said.
        """
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if self.process.stdout.readline() != "ran\n":
            self.process.wait(_SECONDS)
            raise RuntimeError(f"a container did not run: {self.process.stderr.read()[-1500:]}")
        wall = time.monotonic() - self._began
        if self._watch is None:
            return Started(wall, 0.0, 0)
        self._watch.wait()
        return Started(wall, self._watch.seconds, self._watch.peak_bytes)

    def start(self) -> Started:
        """Both."""
        self.begin()
        return self.finish()

    def kill(self) -> None:
        """End the workload; runc and the hook clean up at the same time as those of other containers."""
        with suppress(ProcessLookupError):
            os.kill(self.init_pid(), signal.SIGKILL)

    def init_pid(self) -> int:
        """The workload's process on the host."""
        states = list((self._bundle / "state").glob("*/state.json"))
        return int(json.loads(states[0].read_text())["init_process_pid"])


def memory_file_systems(containers: Sequence[_Starting]) -> dict[str, int]:
    """The bytes that the models of these containers take, by superblock: what is shared is counted once."""
    found = {}
    for container in containers:
        proc = Path(f"/proc/{container.init_pid()}")
        for mount in parse_mountinfo((proc / "mountinfo").read_bytes()):
            if mount.source == SOURCE:
                room = os.statvfs(f"{proc}/root{mount.mount_point}")
                found[mount.device] = (room.f_blocks - room.f_bfree) * room.f_frsize
    return found


def _values(document: object, key: str) -> list[object]:
    if isinstance(document, dict):
        own = [document[key]] if key in document else []
        return own + [value for inner in document.values() for value in _values(inner, key)]
    if isinstance(document, list):
        return [value for inner in document for value in _values(inner, key)]
    return []
