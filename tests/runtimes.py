"""runc, crun and runsc as bare runtimes, without an engine: OCI bundles with a busybox root file system, their hooks.

    bundle = make_bundle(folder, args=["cat", "/models/a"], hooks={"prestart": [...]})
    outcome = run_container("crun", bundle)

runsc comes in builds: the machine's own and one of a newer Debian, each with the platform that needs no hardware.
`Pod` is a gVisor sandbox with containers in it, made by hand with the annotations that containerd sets.
What it does not do: images, networks, engines (`tests/engines.py`). Needs root, runc, crun, runsc, busybox-static,
util-linux.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.engines import RUNTIMES, RuntimeNamespace
from tests.suites import program, version

__all__ = [
    "RUNTIMES",
    "Outcome",
    "Pod",
    "Runsc",
    "make_bundle",
    "newer_runsc",
    "own_runsc",
    "prestart",
    "run_container",
    "start_container",
]

USERNS_OFFSET = 200_000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUSYBOX = "/bin/busybox"
_COMMANDS = (
    "cat",
    "find",
    "grep",
    "head",
    "id",
    "ls",
    "mkdir",
    "mount",
    "sh",
    "sha256sum",
    "sleep",
    "stat",
    "true",
    "umount",
)
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `runc run` or `crun run` ended: the workload's exit code, or the runtime's own."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Runsc:
    """A build of gVisor's runsc, with its global flags.

    Attributes:
        year: Of the build.
    """

    program: Path
    year: int
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(["runsc", str(self.year), *self.flags[2:]])

    def with_flags(self, *flags: str) -> Runsc:
        """The same build with more global flags."""
        return replace(self, flags=(*self.flags, *flags))


def _runsc(path: Path) -> Runsc:
    said = version(path)  # "runsc version 0.0~20240729.0"; upstream's have "release-" there
    found = re.search(r"[0-9]{8}", said)
    assert found is not None, said
    year = int(found[0][:4])
    # Neither hardware virtualization nor a network of its own: systrap came in 2023 and took ptrace's place.
    flags = (f"--platform={'systrap' if year >= 2023 else 'ptrace'}", "--network=none")
    # Since 2023 writes go to a file beside the root file system by default, which the project refuses.
    return Runsc(path, year, (*flags, *(("--overlay2=root:memory",) if year >= 2023 else ())))


def own_runsc() -> Runsc:
    """The machine's own."""
    return _runsc(Path("/usr/bin/runsc"))


def newer_runsc() -> Runsc:
    """Debian trixie's."""
    return _runsc(program("trixie", "runsc"))


def prestart(*command: str | Path, timeout_seconds: int = 30) -> dict[str, Any]:
    """A hook for `hooks` of `make_bundle`: an absolute program and its arguments, in an environment of its own.

    `crun run` waits for all of the timeout when a hook is killed and a child of it dies in the same moment: it is their
    subreaper then, and takes the one SIGCHLD that it gets for the child's (1.8.1; not with `crun create`).
    """
    words = [str(word) for word in command]
    return {"path": words[0], "args": words, "env": [f"PATH={_PATH}"], "timeout": timeout_seconds}


def make_bundle(
    directory: Path,
    *,
    args: Sequence[str],
    hooks: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    mounts: Sequence[Mapping[str, Any]] = (),
    annotations: Mapping[str, str] | None = None,
    user_namespace: bool = False,
    memory_limit_bytes: int | None = None,
    readonly: bool = False,
    capabilities: Sequence[str] = _CAPABILITIES,
    namespaces: Sequence[Mapping[str, str]] | None = None,
    root_path: str = "rootfs",
    uid: int = 0,
) -> Path:
    """An OCI bundle in `directory`, which is made and must not be there.

    Args:
        directory: Its root file system is `directory/rootfs`, to be changed by the caller before it runs.
        args: The workload, by busybox's names.
        hooks: By stage.
        mounts: Besides /proc, /dev and /sys.
        annotations: For config.json.
        user_namespace: Whether root in the container is `USERNS_OFFSET` on the host.
        memory_limit_bytes: Of the container's control group.
        readonly: `root.readonly`.
        capabilities: Of the workload.
        namespaces: Instead of the usual ones.
        root_path: `root.path`.
        uid: Of the workload, and its gid.
    """
    rootfs = directory / "rootfs"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, rootfs / "bin/busybox")
    for name in _COMMANDS:
        (rootfs / "bin" / name).symlink_to("busybox")
    usual = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", *(("user",) if user_namespace else ()))]
    linux: dict[str, Any] = {"namespaces": list(namespaces) if namespaces is not None else usual}
    if user_namespace:
        mapping = [{"containerID": 0, "hostID": USERNS_OFFSET, "size": 65536}]
        linux |= {"uidMappings": mapping, "gidMappings": mapping}
        own(directory / "rootfs", USERNS_OFFSET)
    if memory_limit_bytes is not None:
        linux["resources"] = {"memory": {"limit": memory_limit_bytes}}
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": uid, "gid": uid},
            "args": list(args),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {kind: list(capabilities) for kind in ("bounding", "effective", "permitted")},
        },
        "root": {"path": root_path, "readonly": readonly},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            *mounts,
        ],
        "hooks": {stage: list(entries) for stage, entries in (hooks or {}).items()},
        "annotations": dict(annotations or {}),
        "linux": linux,
    }
    (directory / "config.json").write_text(json.dumps(config))
    for folder in (directory, rootfs):
        folder.chmod(0o755)
    return directory


def own(path: Path, uid: int) -> None:
    """Give a tree to a host uid and gid."""
    for place, folders, files in os.walk(path):
        for name in (".", *folders, *files):
            os.chown(Path(place) / name, uid, uid, follow_symlinks=False)


def _command(runtime: str | Runsc, bundle: Path) -> list[str]:
    """The runtime with its global options; its state lies in the bundle."""
    if isinstance(runtime, Runsc):
        return [str(runtime.program), "--root", str(bundle / "state"), *runtime.flags]
    return [f"/usr/bin/{runtime}", "--root", str(bundle / "state")]


@contextmanager
def start_container(
    runtime: str | Runsc, bundle: Path, namespace: RuntimeNamespace | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`<runtime> run` in the background, with its output piped; what is left of the container is deleted at the end.

    `namespace`: one that is there already, for containers whose start is timed.
    """
    name = f"scz-test-{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        if namespace is None and not isinstance(runtime, Runsc):
            namespace = stack.enter_context(RuntimeNamespace())
        prefix = () if namespace is None else namespace.prefix
        command = [*prefix, *_command(runtime, bundle)]
        environment = {"PATH": _PATH}
        process = subprocess.Popen(
            [*command, "run", "--bundle", str(bundle), name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=bundle,
        )
        try:
            yield process
        finally:
            delete = [*command, "delete", "--force", name]
            subprocess.run(delete, env=environment, capture_output=True, check=False, timeout=30)
            if process.poll() is None:
                process.kill()
                subprocess.run(delete, env=environment, capture_output=True, check=False, timeout=30)
            process.communicate(timeout=30)


def run_container(runtime: str | Runsc, bundle: Path, *, timeout_seconds: float = 60) -> Outcome:
    """Run a bundle's container to its end."""
    with start_container(runtime, bundle) as process:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
        return Outcome(process.returncode, stdout, stderr)


class Pod:
    """A gVisor sandbox that runs in the background, and containers that join it.

    Args:
        runsc: The build.
        folder: For the sandbox's bundle, the runtime's state and what the containers print; made if missing.
        readonly: Whether the sandbox's own root is read-only, as that of an engine's pause container is.
    """

    def __init__(self, runsc: Runsc, folder: Path, *, readonly: bool = False) -> None:
        self._readonly = readonly
        self._folder = folder
        self.state = folder / "state"
        self._command = [str(runsc.program), "--root", str(self.state), *runsc.flags]
        self.sandbox_id = f"scz-pod-{uuid.uuid4().hex[:12]}"
        self._made = [self.sandbox_id]

    def __enter__(self) -> Pod:
        annotations = {"io.kubernetes.cri.container-type": "sandbox"}
        bundle = make_bundle(
            self._folder / "sandbox", args=["sleep", "600"], annotations=annotations, readonly=self._readonly
        )
        try:
            self.run("create", "--bundle", str(bundle), self.sandbox_id)
            self.run("start", self.sandbox_id)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._made:
            self.run("delete", "--force", self._made.pop(), check=False)

    @property
    def annotations(self) -> dict[str, str]:
        """Those of a container that joins, as containerd sets them."""
        return {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.sandbox_id}

    @property
    def sandbox_pid(self) -> int:
        """The sandbox's process."""
        return int(json.loads(next(self.state.glob(f"{self.sandbox_id}_*.state")).read_text())["sandbox"]["pid"])

    def run(self, *arguments: str, check: bool = True) -> int:
        """A command of runsc's; what it and its container print goes to a file."""
        with (self._folder / f"{arguments[-1]}.out").open("ab") as out:
            done = subprocess.run(
                [*self._command, *arguments],
                env={"PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
        assert done.returncode == 0 or not check, (arguments, (self._folder / f"{arguments[-1]}.out").read_text())
        return done.returncode

    def create(self, bundle: Path, name: str, *, check: bool = True) -> int:
        """`runsc create` of a container that joins."""
        self._made.append(name)
        return self.run("create", "--bundle", str(bundle), name, check=check)

    def finish(self, name: str) -> str:
        """`runsc start`, and wait for its end: what it printed."""
        printed = self._folder / f"{name}.out"
        printed.write_bytes(b"")
        self.run("start", name)
        subprocess.run([*self._command, "wait", name], env={"PATH": _PATH}, capture_output=True, check=True, timeout=60)
        return printed.read_text()
