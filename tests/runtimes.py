"""runc and crun as bare runtimes, without an engine: OCI bundles with a busybox root file system, and their hooks.

    bundle = make_bundle(folder, args=["cat", "/models/a"], hooks={"prestart": [...]})
    outcome = run_container("crun", bundle)

What it does not do: images, networks, engines (`tests/engines.py`). Needs root, runc, crun, busybox-static, util-linux.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import RUNTIMES, RuntimeNamespace

__all__ = ["RUNTIMES", "Outcome", "make_bundle", "prestart", "run_container", "start_container"]

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
            "user": {"uid": 0, "gid": 0},
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


@contextmanager
def start_container(runtime: str, bundle: Path) -> Iterator[subprocess.Popen[str]]:
    """`<runtime> run` in the background, with its output piped; what is left of the container is deleted at the end."""
    name = f"scz-test-{uuid.uuid4().hex[:12]}"
    with RuntimeNamespace() as namespace:
        command = [*namespace.prefix, f"/usr/bin/{runtime}", "--root", str(bundle / "state")]
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


def run_container(runtime: str, bundle: Path, *, timeout_seconds: float = 60) -> Outcome:
    """Run a bundle's container to its end."""
    with start_container(runtime, bundle) as process:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
        return Outcome(process.returncode, stdout, stderr)
