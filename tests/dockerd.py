"""A dockerd of its own for the tests; nothing of the host's Docker is read or changed.

    with Docker(folder, runtimes={"scz-runc": {"path": "/…/scz-runc"}}) as docker:
        docker.run(["--runtime=scz-runc", docker.busybox_image(), "true"])

Images, containers, sockets, containerd (dockerd starts one) and cgroups are below one directory and one name. All of
it goes again, also after a failure: containers first, then the daemons by their pids, then what they left. It fits
itself to the machine by looking at it, as `tests/engines.py` does: storage driver by trial, limits that may not be
raised handed on as they are, and where crun needs it a mount namespace without the unified cgroup hierarchy.
Containers have no network. Needs Linux, root, docker.io (20.10 of Debian 12, or later), busybox-static, util-linux.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.engines import (
    EngineError,
    RuntimeNamespace,
    container_limits,
    remove_cgroups,
    storage_driver,
    unmount_below,
    write_busybox,
)
from tests.suites import program

BUSYBOX_IMAGE = "busybox:test"

_DOCKER, _DOCKERD = "/usr/bin/docker", "/usr/sbin/dockerd"  # Debian's; another client may come first in PATH
_PROGRAMS = ("docker", "dockerd", "containerd", "containerd-shim-runc-v2", "runc")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_COMMAND_SECONDS = 120
_START_SECONDS = 60
_END_SECONDS = 30
_MARK = "made-by-scz-smm-tests"  # only a directory with this file is ever removed


def _programs(suite: str | None) -> tuple[str, str, str]:
    """docker, dockerd, and a PATH in which the suite's containerd and runc come first."""
    if suite is None:
        return _DOCKER, _DOCKERD, _PATH
    found = {name: program(suite, name) for name in _PROGRAMS}
    folders = dict.fromkeys(str(path.parent) for path in found.values())
    return str(found["docker"]), str(found["dockerd"]), ":".join([*folders, _PATH])


class Docker:
    """One dockerd; a context manager.

    Args:
        directory: Everything of it goes here; a new directory, removed by `stop`. What a daemon that died here left is
            taken away first.
        runtimes: As in daemon.json, beside Docker's own runc.
        default_runtime: The name of the one for containers that name none.
        suite: The Debian suite (`tests/suites.py`) whose Docker and containerd it is; None: the machine's own.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        runtimes: Mapping[str, Mapping[str, Any]] | None = None,
        default_runtime: str = "runc",
        suite: str | None = None,
    ) -> None:
        self.directory = Path(directory).resolve()
        self.namespace = RuntimeNamespace()
        self._runtimes, self._default = dict(runtimes or {}), default_runtime
        self._docker, self._dockerd, self._path = _programs(suite)
        self._name = f"scz-docker-{hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:12]}"
        self._run = Path("/run") / self._name  # sockets: their paths are short
        self._daemon: subprocess.Popen[bytes] | None = None

    # --- what tests ask -----------------------------------------------------------------------------------------------

    def call(
        self, *args: str, check: bool = True, stdin: bytes = b"", timeout_seconds: float = _COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Any docker command.

        Raises:
            EngineError: It failed, and `check` is set, or it took too long.
        """
        try:
            done = subprocess.run(
                [self._docker, *args],
                env=self.environment,
                input=stdin,
                capture_output=True,
                check=False,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired as cause:
            raise EngineError(f"docker {' '.join(args)}: no end after {timeout_seconds} s\n{self.log()}") from cause
        stdout, stderr = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        if check and done.returncode != 0:
            raise EngineError(f"docker {' '.join(args)}: exit code {done.returncode}\n{stdout}{stderr}{self.log()}")
        return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every docker command here."""
        return {
            "PATH": self._path,
            "DOCKER_HOST": f"unix://{self._run}/docker.sock",
            "DOCKER_CONFIG": str(self.directory),
        }

    def run(self, args: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`docker run --network=none ARGS`: options, image, command."""
        return self.call("run", "--network=none", *args, check=check)

    def inspect(self, name: str) -> dict[str, Any]:
        """`docker inspect NAME`, the one object."""
        found: list[dict[str, Any]] = json.loads(self.call("inspect", name).stdout)
        return found[0]

    def containers(self) -> list[str]:
        """The ids of all that there are."""
        return self.call("ps", "--all", "--quiet", "--no-trunc").stdout.split()

    def has_annotations(self) -> bool:
        """Whether this Docker's `run` can set annotations (24.0 and later); Debian 12's daemon cannot."""
        version = self.call("version", "--format", "{{.Server.Version}}").stdout
        return int(version.split(".")[0]) >= 24 and "--annotation" in self.call("run", "--help").stdout

    def busybox_image(self, *variables: str) -> str:
        """An image of busybox with its applets; `variables` are in its environment."""
        stream = io.BytesIO()
        write_busybox(stream)
        tag = BUSYBOX_IMAGE + "".join(f"-{index}{len(text)}" for index, text in enumerate(variables))
        changes = [f"--change=ENV {text}" for text in (f"PATH={_PATH}", *variables)]
        self.call("import", *changes, "-", tag, stdin=stream.getvalue())
        return tag

    def bundles(self) -> list[Path]:
        """The OCI bundles of containers that run; seen through the daemon's mount namespace."""
        return sorted((self._run / "exec").glob("containerd/daemon/io.containerd.runtime.v2.task/moby/*"))

    def log(self) -> str:
        """The end of the daemon's log."""
        with contextlib.suppress(OSError):
            return (self.directory / "log").read_text(errors="replace")[-4000:]
        return ""

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def start(self) -> Docker:
        """Start the daemon and wait until it answers."""
        self._take_away()
        self.directory.mkdir(mode=0o711, parents=True)
        (self.directory / _MARK).touch()
        self._run.mkdir(mode=0o711)
        (self.directory / "daemon.json").write_text(json.dumps(self._configuration()))
        self.namespace.start()
        atexit.register(self.stop)
        with (self.directory / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [*self.namespace.prefix, self._dockerd, "--config-file", f"{self.directory}/daemon.json"],
                env={"PATH": self._path, "HOME": str(self.directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while self.call("version", check=False).returncode != 0:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                message = f"dockerd does not answer:\n{self.log()}"
                self.stop()
                raise EngineError(message)
            time.sleep(0.05)
        return self

    def _configuration(self) -> dict[str, Any]:
        limits = {}
        for text in container_limits():
            name, _, value = text.partition("=")
            soft, _, hard = value.partition(":")
            limits[name] = {"Name": name, "Soft": int(soft), "Hard": int(hard)}
        driver = storage_driver(self.directory)
        return {
            "data-root": f"{self.directory}/data",
            "exec-root": f"{self._run}/exec",
            "pidfile": f"{self._run}/docker.pid",
            "hosts": [f"unix://{self._run}/docker.sock"],
            "runtimes": self._runtimes,
            "default-runtime": self._default,
            "storage-driver": "overlay2" if driver == "overlay" else driver,
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "userland-proxy": False,
            "cgroup-parent": f"/{self._name}",
            "default-ulimits": limits,
            "bridge": "none",
            "iptables": False,
            "ip6tables": False,
            "shutdown-timeout": 1,
        }

    def stop(self) -> None:
        """Take everything away; harmless when nothing is there."""
        atexit.unregister(self.stop)
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            with contextlib.suppress(EngineError):  # what it leaves, the next lines take away
                for name in self.call("ps", "--all", "--quiet", timeout_seconds=20).stdout.split():
                    self.call("rm", "--force", name, timeout_seconds=20)
            daemon.terminate()  # dockerd ends its containerd
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(_END_SECONDS)
            daemon.kill()
            daemon.wait(_END_SECONDS)
        self._take_away()
        self.namespace.stop()

    def __enter__(self) -> Docker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take_away(self) -> None:
        """What dockerd itself did not: processes, mounts, cgroups and files."""
        if self.directory.exists() and not (self.directory / _MARK).exists():
            raise EngineError(f"{self.directory} is not an environment of these tests")
        deadline = time.monotonic() + _END_SECONDS
        sockets = _shim_sockets(self.processes())
        while left := self.processes():
            if time.monotonic() > deadline:
                raise EngineError(f"processes of {self.directory} do not end: {left}")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for path in sockets:  # a shim that is killed leaves it
            path.unlink(missing_ok=True)
        unmount_below(self.directory, self._run)
        remove_cgroups(self._name)
        for folder in (self._run, self.directory):
            if folder.exists():
                shutil.rmtree(folder)

    def processes(self) -> list[int]:
        """Daemons and shims that name our directories, and all in our cgroups; no command of the client."""
        places = [os.fsencode(f"{folder}/") for folder in (self.directory, self._run)]
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                program = os.path.basename(words[0])
                daemon = program.startswith((b"dockerd", b"containerd")) and any(p in w for p in places for w in words)
                if daemon or f"/{self._name}/" in (folder / "cgroup").read_text():
                    found.append(int(folder.name))
        return found


def _shim_sockets(pids: Sequence[int]) -> list[Path]:
    """The sockets of containerd's shims, which lie in one folder for all containerds of a machine."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes |= {os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return [
        Path(words[7])
        for words in lines
        if len(words) == 8 and f"socket:[{words[6]}]" in inodes and words[7].startswith("/run/containerd/s/")
    ]
