"""Debian systems that have never seen the project: `with FreshRoot("trixie", folder) as root: root.call("apt-get", …)`.

debootstrap makes a minimal system of a suite; `call` runs a command in it, as root, by pivot_root in namespaces of its
own (mount, pid, ipc, uts), so that container engines work inside. What is started there ends with the object, and the
system is removed. What it has of this machine, and nothing else: the kernel with /dev and /sys, the network with
resolv.conf and hosts, apt's configuration and proxies, the Debian mirror's address and the CA bundle. There is no init
system in it, as in a container or an image that is being built. dpkg does not sync there (force-unsafe-io), for speed.
Needs root, debootstrap, util-linux, a Debian mirror.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.engines import SYSTEM_PATH, container_limits
from tests.suites import mirror

_MAKE_SECONDS = 600
_CALL_SECONDS = 300
_CARRIED = ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt")
_ENTER = """
set -eu
root=$1
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
cd "$root"
mkdir -p old
pivot_root . old
umount -l /old
rmdir /old
mount --make-rshared /
hostname fresh
echo ready
# Process 1 waits for what others leave behind.
exec 3<&0
cat <&3 >/dev/null &
wait
"""


class FreshRootError(RuntimeError):
    """The system could not be made, or a command in it failed; with what it said."""


class FreshRoot:
    """One system below `folder`, which must not exist; `make` takes minutes, so it is apart from entering."""

    def __init__(self, suite: str, folder: Path) -> None:
        self.suite, self.folder = suite, folder
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0

    def make(self) -> FreshRoot:
        """Run debootstrap, and carry in what is said above.

        Raises:
            FreshRootError: debootstrap failed.
        """
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", self.suite]
        done = subprocess.run(
            [*command, str(self.folder), mirror()],
            env=self._environment({}),
            capture_output=True,
            text=True,
            check=False,
            timeout=_MAKE_SECONDS,
        )
        if done.returncode != 0:
            raise FreshRootError(f"debootstrap {self.suite}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        for name in _CARRIED:
            if Path("/", name).exists():
                shutil.copy(Path("/", name), self.folder / name)
        shutil.copytree("/etc/apt/apt.conf.d", self.folder / "etc/apt/apt.conf.d", dirs_exist_ok=True)
        (self.folder / "etc/dpkg/dpkg.cfg.d/unsafe").write_text("force-unsafe-io\n")
        return self

    def call(
        self, *words: str | Path, check: bool = True, environment: Mapping[str, str] = {}, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the system.

        Raises:
            FreshRootError: It failed, and `check` is set.
        """
        done = subprocess.run(
            [*self.prefix, *map(str, words)],
            env=self._environment(environment),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_CALL_SECONDS,
        )
        if check and done.returncode != 0:
            raise FreshRootError(f"{self.suite}: {words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def sh(self, script: str, *, check: bool = True) -> str:
        """Run a script of the shell; what it printed."""
        return self.call("sh", "-ec", script, check=check).stdout

    def apt(self, *words: str | Path) -> str:
        """apt-get without questions: a configuration that the administrator changed stays; what it printed."""
        options = ("-yq", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold")
        return self.call("apt-get", *options, *words).stdout

    def __truediv__(self, name: str) -> Path:
        """A file of the system, as this machine sees it; links that are absolute lead astray."""
        return self.folder / name

    @property
    def prefix(self) -> tuple[str, ...]:
        """What enters the system, as the first words of a command."""
        return ("nsenter", f"--target={self._init}", "--mount", "--pid", "--ipc", "--uts", "--")

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
        own = {"PATH": SYSTEM_PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        return {**proxies, **own, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1", **more}

    def __enter__(self) -> FreshRoot:
        options = ["--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--propagation=private"]
        self._holder = subprocess.Popen(
            ["unshare", *options, "--", "sh", "-c", _ENTER, "sh", str(self.folder)],
            env={"PATH": SYSTEM_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.stop()
            raise FreshRootError(f"{self.suite}: the system cannot be entered")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._init = int(children[0])
        return self

    def stop(self) -> None:
        """End everything in the system, and remove it."""
        holder, self._holder = self._holder, None
        if holder is not None:
            with contextlib.suppress(FreshRootError, subprocess.TimeoutExpired):
                self.sh("! command -v podman >/dev/null || podman rm --all --force --time 0 >/dev/null", check=False)
            with holder:
                holder.kill()
        subprocess.run(["rm", "-rf", "--one-file-system", str(self.folder)], check=False)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def containers_conf() -> str:
    """podman's configuration for a system on this machine, whose limits may not be raised and which has no systemd."""
    limits = ", ".join(f'"{each}"' for each in container_limits())
    return (
        f'[containers]\nnetns = "none"\ndefault_ulimits = [{limits}]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
    )
