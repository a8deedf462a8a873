"""podman of an unprivileged user, for one test: the user, its subordinate ids and its home exist nowhere else.

/etc (the user, its ids) and /usr/share/containers (hooks.d) are overlaid in a mount namespace; nothing of the machine
is changed. The user's processes, which podman leaves behind on purpose (a pause process), are ended by its uid, which
no other process has. Containers get a folder as their root file system and no network, so that neither a storage
driver for users nor a network stack for them is needed.
Needs Linux, root, podman, runc, crun, newuidmap (package uidmap), util-linux, an overlay file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.engines import EngineError, RuntimeNamespace

USER = "scz-rootless"
FIRST_UID, LAST_UID = 61_184, 65_519  # systemd's range for users that come and go
SUBORDINATE_IDS = f"{USER}:700000:65536\n"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SECONDS = 120
# Files besides the machine's own; our package and its interpreter where a user may read them.
_MOUNTS = """
set -e
mount -t overlay -o "ro,lowerdir=$1/share:/usr/share/containers" overlay /usr/share/containers
mount --bind "$2" "$1/lib"
mount --bind "$3" "$1/python"
"""
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Rootless:
    """A user's podman environment; a context manager that takes all of it away.

    Attributes:
        uid: The user's.
        directory: What the user may enter; `home` below it is the user's own.
        package: Where the user sees the installed package, `oci_hook` in it.
        interpreter: Where the user sees this Python.
        default_hooks: hooks.d where podman looks by itself, in `/usr/share/containers`, as this environment sees it.
    """

    def __init__(self) -> None:
        self.uid = next(uid for uid in range(FIRST_UID, LAST_UID) if not _processes_of(uid))
        self.directory = Path(tempfile.mkdtemp(prefix="scz-rootless.", dir="/var/tmp"))
        self.home, self.package = self.directory / "home", self.directory / "lib"
        real = Path(os.path.realpath(sys.executable))
        self._prefix = real.parents[1]  # that of a virtual environment's own interpreter
        self.interpreter = self.directory / "python" / real.relative_to(self._prefix)
        self.default_hooks = self.directory / "share/oci/hooks.d"
        self.namespace = RuntimeNamespace(self.directory / "etc")

    def __enter__(self) -> Rootless:
        self.directory.chmod(0o711)
        for folder in ("etc", "home/run", "lib", "python", "share/oci/hooks.d"):
            (self.directory / folder).mkdir(mode=0o755, parents=True)
        for name, line in (("passwd", f"{USER}:x:{self.uid}:{self.uid}::{self.home}:/bin/sh"), ("group", "")):
            text = Path("/etc", name).read_text() + (line or f"{USER}:x:{self.uid}:") + "\n"
            (self.directory / "etc" / name).write_text(text)
        for name in ("subuid", "subgid"):
            (self.directory / "etc" / name).write_text(SUBORDINATE_IDS)
        (self.home / "containers.conf").write_text(_CONFIGURATION)
        self._make_root(self.home / "rootfs")
        try:
            self.namespace.start()
            places = [str(self.directory), sysconfig.get_paths()["purelib"], str(self._prefix)]
            self._call([*self.namespace.prefix, "sh", "-c", _MOUNTS, "sh", *places], check=True)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _make_root(self, root: Path) -> None:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "trace"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin/busybox")
        for name in ("cat", "sh", "touch", "true"):
            (root / "bin" / name).symlink_to("busybox")
        for folder, _, files in os.walk(self.home):
            for entry in (".", *files):
                os.chown(os.path.join(folder, entry), self.uid, self.uid, follow_symlinks=False)

    @property
    def environment(self) -> Mapping[str, str]:
        """The user's."""
        return {
            "PATH": _PATH,
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "CONTAINERS_CONF": str(self.home / "containers.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }

    def call(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command as the user."""
        words = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--", *command]
        return self._call([*self.namespace.prefix, *words], check=False, stdin=stdin)

    def podman(
        self, *args: str, runtime: str = "runc", options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`podman ARGS` as the user; `options` are podman's own, before ARGS."""
        return self.call("podman", "--storage-driver=vfs", f"--runtime={runtime}", *options, *args)

    def run(
        self, *command: str, runtime: str, annotations: Mapping[str, str] = {}, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`podman run` of the user's folder with a root file system."""
        words = [word for key, value in annotations.items() for word in ("--annotation", f"{key}={value}")]
        root = str(self.home / "rootfs")
        return self.podman(
            "run", "--rm", "--network=none", *words, "--rootfs", root, *command, runtime=runtime, options=options
        )

    def _call(self, command: Sequence[str], *, check: bool, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SECONDS,
        )
        if check and done.returncode != 0:
            raise EngineError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def stop(self) -> None:
        """End the user's processes, and with them and the namespace all mounts; remove the files."""
        while left := _processes_of(self.uid):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.namespace.stop()
        shutil.rmtree(self.directory)


def _processes_of(uid: int) -> list[int]:
    """Processes that have the uid, and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if str(uid) in lines["Uid"].split() and not lines["State"].startswith("Z"):
                found.append(int(path.parent.name))
    return found
