"""What stands in for Kata Containers in the tests: the way in which it shares files with its guest, and a small agent.

No package registry carries Kata. Its sources (1.12 and 3.x) say what lies between a host and the containers in its
virtual machine, and that part is built here as they build it; a `Guest` of real QEMU, with Debian's kernel and real 9p
or virtio-fs, is at the other end:

* a folder `mounts`, and `shared`, which the guest sees: a read-only bind of `mounts` with slave propagation, so that
  what is mounted below `mounts` later appears there too;
* a container's root file system and the source of each bind entry are bound below `mounts` without what is mounted
  below them (MS_BIND, not MS_REC) and made private; a read-only one by way of a private read-only bind, since a remount
  does not propagate;
* a source below kubelet's ``kubernetes.io~empty-dir/`` is replaced by an empty tmpfs of the guest;
* prestart hooks run before all that for the first container of a sandbox, and after it for a further one of a pod.

What it does not do: Kata's agent protocol, image or kernel; devices, networks, block storage; the guest's containers
are processes in a changed root. It stands for the way of the files, and for nothing else of Kata's.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.engines import unmount_below, unpack_busybox
from tests.guests import GUEST_SECONDS, Guest, Kernel, Machine, Share, virtiofsd, write_initramfs

KINDS = ("9p", "virtiofs")
_TAG = "kataShared"
_EMPTY_DIR = "/kubernetes.io~empty-dir/"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_COMMAND_SECONDS = 60

# Reads lines like `bind CONTAINER SHARED DESTINATION` on the console. A container's output has its name in front.
_AGENT = f"""#!/bin/sh
stty -echo
shared=/run/kata-containers/shared/containers
mkdir -p $shared
case $(cat /share) in
9p) mount -t 9p -o trans=virtio,version=9p2000.L,cache=mmap,nodev {_TAG} $shared || exit 1 ;;
virtiofs) mount -t virtiofs -o nodev {_TAG} $shared || exit 1 ;;
esac
place() {{ if [ -f "$1" ]; then mkdir -p "${{2%/*}}" && touch "$2"; else mkdir -p "$2"; fi; }}
echo "agent: ready"
while read -r verb container first second; do
    root=/run/$container/rootfs
    case $verb in
    rootfs) mkdir -p $root && mount --bind "$shared/$container/rootfs" $root ;;
    bind) place "$shared/$first" "$root$second" && mount --bind "$shared/$first" "$root$second" ;;
    tmpfs) mkdir -p "$root$first" && mount -t tmpfs tmpfs "$root$first" ;;
    run) {{ chroot $root /bin/sh -c "$first $second"; echo "ended $?"; }} </dev/null 2>&1 | sed "s/^/$container: /" & ;;
    forget) grep -o " $root[^ ]* " /proc/mounts | sort -r | xargs -r -n 1 umount ;;
    esac || {{ echo "agent: failed: $verb $container $first $second"; continue; }}
    echo "agent: done"
done
"""


class SandboxError(RuntimeError):
    """The stand-in could not do what was asked; the message has what the guest said."""


@dataclass(slots=True)
class Bind:
    """A bind entry of a container.

    Attributes:
        source: On the host.
        destination: In the container, absolute.
        read_only: Whether the options have `ro`.
    """

    source: Path
    destination: str
    read_only: bool = True


@dataclass(slots=True)
class Contained:
    """A container: its root file system on the host, and its bind entries."""

    rootfs: Path
    binds: Sequence[Bind] = field(default_factory=tuple)


def write_agent(folder: Path, kernel: Kernel, kind: str) -> Path:
    """Write the initramfs of a sandbox's guest, below a folder; returns its path."""
    root = folder / f"agent-{kind}"
    root.mkdir()
    (root / "main").write_text(_AGENT)
    (root / "main").chmod(0o755)
    (root / "share").write_text(f"{kind}\n")
    modules = {"9p": ("virtio_pci", "9pnet_virtio", "9p"), "virtiofs": ("virtio_pci", "virtiofs")}
    return write_initramfs(folder / f"agent-{kind}.cpio", root, kernel, modules[kind])


def write_rootfs(path: Path) -> Path:
    """A root file system with busybox; returns its path."""
    path.mkdir(parents=True)
    unpack_busybox(path)
    return path


class Sandbox:
    """A sandbox: its shared folder and its running guest; a context manager that takes both away, also on failure.

    Args:
        directory: A new folder, for its mounts; removed at the end.
        kernel: The guest's kernel.
        initramfs: Of `write_agent`, for the same kind.
        kind: One of `KINDS`.
    """

    def __init__(self, directory: Path, kernel: Kernel, initramfs: Path, kind: str) -> None:
        self.directory = directory
        self.mounts, self.shared, self._private = (directory / name for name in ("mounts", "shared", "private"))
        options = _server_options() if kind == "virtiofs" else ()
        share = Share(_TAG, self.shared, kind, options)
        self.guest = Guest(Machine(kernel, initramfs, shares=(share,)))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sandbox:
        with contextlib.ExitStack() as stack:
            self.directory.mkdir(parents=True)
            stack.callback(self._take_away)
            # Kata's folder lies on /run, which systemd makes a shared mount; a container of the tests may have none.
            _mount("-t", "tmpfs", "-o", "mode=0700,size=16m", "scz-sandbox", self.directory)
            _mount("--make-shared", self.directory)
            for folder in (self.mounts, self.shared, self._private):
                folder.mkdir()
            _bind(self.mounts, self.shared, read_only=True, propagation="slave")
            stack.enter_context(self.guest)
            self.guest.wait_for("^agent: ready$")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- containers ---------------------------------------------------------------------------------------------------

    def create(self, name: str, container: Contained) -> None:
        """Share a container's root file system and bind entries with the guest, and mount them there.

        Raises:
            SandboxError: The guest could not.
        """
        rootfs = self.mounts / name / "rootfs"
        rootfs.mkdir(parents=True)
        _bind(container.rootfs, rootfs, read_only=False, propagation="private")
        self._tell(f"rootfs {name}")
        for bind in container.binds:
            if _EMPTY_DIR in str(bind.source):
                self._tell(f"tmpfs {name} {bind.destination}")
            else:
                self._tell(f"bind {name} {self._share(name, bind)} {bind.destination}")

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a container's command; `lines` has what it prints."""
        self._tell(f"run {name} {shlex.join(command)}")

    def run(self, name: str, *command: str, seconds: float = GUEST_SECONDS) -> tuple[int, list[str]]:
        """A command in a container: its exit code, and the lines of its output."""
        seen = len(self.guest.console)
        self.start(name, command)
        code = int(self._ended(name, seen) or self.guest.wait_for(f"^{name}: ended (\\d+)$", seconds)[1])
        mark = f"{name}: "
        said = [line.removeprefix(mark) for line in self.guest.console[seen:] if line.startswith(mark)]
        return code, said[:-1]

    def remove(self, name: str) -> None:
        """Take a container away, in the guest and from the shared folder."""
        self._tell(f"forget {name}")
        unmount_below(self.mounts / name)
        for path in sorted(self.mounts.glob(f"{name}-*")):
            unmount_below(path)
            path.rmdir() if path.is_dir() else path.unlink()
        (self.mounts / name / "rootfs").rmdir()
        (self.mounts / name).rmdir()

    def _share(self, name: str, bind: Bind) -> str:
        """Bind an entry's source below `mounts`; returns its name there."""
        shared = f"{name}-{secrets.token_hex(8)}-{os.path.basename(bind.destination)}"
        places = (self.mounts / shared, self._private / shared)
        for place in places:
            place.mkdir() if bind.source.is_dir() else place.touch()
        if not bind.read_only:
            _bind(bind.source, places[0], read_only=False, propagation="private")
            return shared
        _bind(bind.source, places[1], read_only=True, propagation="private")
        _bind(places[1], places[0], read_only=False, propagation="private")
        unmount_below(places[1])
        return shared

    # --- the agent ----------------------------------------------------------------------------------------------------

    def _ended(self, name: str, seen: int) -> str | None:
        """The exit code, if the console has it already."""
        found = [re.fullmatch(f"{name}: ended (\\d+)", line) for line in self.guest.console[seen:]]
        return next((match[1] for match in found if match), None)

    def _tell(self, line: str) -> None:
        self.guest.say(line)
        if (found := self.guest.wait_for("^agent: (done|failed: .*)$"))[1] != "done":
            raise SandboxError("\n".join([found[1], *self.guest.console[-20:]]))

    def _take_away(self) -> None:
        unmount_below(self.directory)
        self.directory.rmdir()


def _server_options() -> tuple[str, ...]:
    """What Kata hands to virtiofsd: 1.x to the one written in C, 2 and 3 to the one written in Rust."""
    if virtiofsd().parent.name == "libexec":
        return ("--cache=auto", "--thread-pool-size=1", "--announce-submounts")
    return ("-ocache=auto", "-ono_posix_lock", "--thread-pool-size=1")


def _bind(source: Path, destination: Path, *, read_only: bool, propagation: str) -> None:
    """As Kata's own: not recursive, then the propagation, then, in a call of its own, read-only."""
    _mount("--bind", source, destination)
    _mount(f"--make-{propagation}", destination)
    if read_only:
        _mount("-o", "remount,bind,ro", destination)


def _mount(*words: str | Path) -> None:
    command = ["mount", "--no-mtab", *map(str, words)]
    done = subprocess.run(
        command, env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
    )
    if done.returncode != 0:
        raise SandboxError(f"{shlex.join(command)}: {done.stderr}")
