"""podman environments of their own for the tests and the demo; nothing of the host's podman is read or changed.

Each `Podman` keeps images, containers, locks and configuration below one directory, runs containers under runc or crun,
and takes all of it away again, also after a failure. It fits itself to the machine by looking at it, never by a switch:

* limits that may not be raised here (RLIMIT_NOFILE without CAP_SYS_RESOURCE) are handed to containers as they are;
* overlay is used where the kernel mounts one, else vfs;
* where version 2 of cgroups holds some controllers beside version 1, which crun refuses, all commands run in one mount
  namespace without the unified hierarchy. Mounts made on the host after `start` are not seen in there;
* where only root may enter the root directory (mode 0700, as a debootstrapped root can have), a container with a user
  namespace could not even open /proc: that mount namespace then has a root of its own, with the same directories.

cgroups are made by podman itself (cgroupfs), which is the same with and without systemd. Containers have no network.
What it does not do: fetch images. They are imported from tar archives.
Needs Linux, root, podman (4.3 of Debian 12, or later), conmon, runc, crun, busybox-static, util-linux.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

RUNTIMES = ("runc", "crun")
BUSYBOX_IMAGE = "localhost/busybox:test"

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COMMAND_SECONDS = 120
_END_SECONDS = 10
_CGROUPS = Path("/sys/fs/cgroup")
_CAP_SYS_RESOURCE = 24
_NOFILE, _NPROC = 1 << 20, 1 << 15  # podman lowers its own limits to these, so a container's can not be above them
_MNT_DETACH = 2
# The root directory's entries in a tmpfs of mode 0755, which then is the root. /mnt is where it is put together.
_OPEN_ROOT = """
mount -t tmpfs -o mode=0755 scz-open-root /mnt
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "/mnt$entry"
    elif [ "$entry" = /mnt ]; then mkdir /mnt/mnt
    elif [ -d "$entry" ]; then mkdir "/mnt$entry"; mount --rbind "$entry" "/mnt$entry"
    fi
done
mkdir /mnt/.old
cd /mnt
pivot_root . .old
umount -l /.old
rmdir /.old
"""
_MARK = "made-by-scz-smm-tests"  # only a directory with this file is ever removed


class EngineError(RuntimeError):
    """podman, or something that it needs, failed; the message carries its standard error."""


# --- looking at the machine -------------------------------------------------------------------------------------------


def _mounts() -> Iterator[tuple[Path, str, str]]:
    """Mount point, file system type and superblock options of each mount that this process sees."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        place, _, kind = line.partition(" - ")
        point = place.split()[4]
        for octal, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(octal, plain)
        yield Path(point), kind.split()[0], kind.split()[-1]


def unified_hierarchy_to_hide() -> Path | None:
    """Where cgroup version 2 is mounted beside version 1 and holds controllers: crun refuses that mixture."""
    mounts = list(_mounts())
    if any(point == _CGROUPS and kind == "cgroup2" for point, kind, _ in mounts):
        return None
    for point, kind, _ in mounts:
        if kind == "cgroup2" and point.is_relative_to(_CGROUPS) and (point / "cgroup.controllers").read_text().strip():
            return point
    return None


def root_is_closed() -> bool:
    """Whether only root may enter `/`."""
    return not Path("/").stat().st_mode & 0o001


def _may_raise_limits() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)
    return False


def container_limits() -> list[str]:
    """`default_ulimits` for containers where podman's own would have to be raised and may not be; else none."""
    if _may_raise_limits():
        return []
    limits = []
    for name, number, most in (("nofile", resource.RLIMIT_NOFILE, _NOFILE), ("nproc", resource.RLIMIT_NPROC, _NPROC)):
        _, hard = resource.getrlimit(number)
        limit = most if hard == resource.RLIM_INFINITY else min(hard, most)
        limits.append(f"{name}={limit}:{limit}")
    return limits


def storage_driver(directory: Path) -> str:
    """overlay if the kernel mounts one on this file system, else vfs."""
    with tempfile.TemporaryDirectory(dir=directory) as trial:
        for part in ("lower", "upper", "work", "merged"):
            (Path(trial) / part).mkdir()
        options = f"lowerdir={trial}/lower,upperdir={trial}/upper,workdir={trial}/work"
        command = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, f"{trial}/merged"]
        tried = subprocess.run(
            command, env={"PATH": SYSTEM_PATH}, capture_output=True, check=False, timeout=_END_SECONDS
        )
        return "overlay" if tried.returncode == 0 else "vfs"


# --- the mount namespace for crun -------------------------------------------------------------------------------------


class RuntimeNamespace:
    """A mount namespace in which runc and crun both work; none at all where they do so anyway.

    `prefix` goes in front of a command, which then needs absolute paths: its working directory is the root. The
    namespace is held by a child that ends with this process, however this process ends.

    Args:
        etc: A folder with files that are seen in /etc, instead of its own or besides them.
        hide: Whether version 2 of cgroups is hidden where crun needs it; else only a closed root directory is opened.
    """

    def __init__(self, etc: Path | None = None, *, hide: bool = True) -> None:
        self._etc = etc
        self._hide = hide
        self._holder: subprocess.Popen[bytes] | None = None

    @property
    def prefix(self) -> tuple[str, ...]:
        """What enters the namespace, as the first words of a command; empty if there is none."""
        if self._holder is None:
            return ()
        return ("nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--")

    def start(self) -> RuntimeNamespace:
        """Look at the machine's cgroups and root directory, and make the namespace if they need one."""
        hidden, closed = unified_hierarchy_to_hide() if self._hide else None, root_is_closed()
        if self._holder is not None or (hidden is None and not closed and self._etc is None):
            return self
        steps = [f'umount "{hidden}"'] if hidden is not None else []
        steps += [f'mount -t overlay -o "ro,lowerdir={self._etc}:/etc" overlay /etc'] if self._etc else []
        script = "\n".join(["set -e", *steps, *([_OPEN_ROOT] if closed else []), "echo ready", "exec cat"])
        command = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", script]
        self._holder = subprocess.Popen(
            command, env={"PATH": SYSTEM_PATH}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.stop()
            raise EngineError("no mount namespace for the runtimes could be made")
        return self

    def stop(self) -> None:
        """Let go of the namespace: it ends with the last process in it."""
        holder, self._holder = self._holder, None
        if holder is not None:
            with holder:  # closes its standard input, which ends it
                holder.kill()

    def __enter__(self) -> RuntimeNamespace:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


# --- podman -----------------------------------------------------------------------------------------------------------


class Podman:
    """One podman environment; a context manager that takes away containers, mounts, processes and files at its end.

    Args:
        directory: Everything that podman keeps goes here; a new directory, removed by `stop`. Left-overs of an
            environment that died here are taken away first; anything else there is an error.
        hooks_directories: hooks.d directories, the only ones; None leaves podman's own defaults. May be changed.
        storage_driver: `overlay` or `vfs`; found by trying if absent.
        etc: Files that podman and the runtimes see in /etc, by name: `{"subuid": "containers:300000:65536\\n"}`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        hooks_directories: Sequence[str | os.PathLike[str]] | None = None,
        storage_driver: str | None = None,
        etc: Mapping[str, str] = {},
    ) -> None:
        self.directory = Path(directory).resolve()
        self.hooks_directories = hooks_directories
        self._etc = dict(etc)
        self.namespace = RuntimeNamespace(self.directory / "etc" if etc else None)
        self._driver = storage_driver
        # Names of its own, so that removing what bears them disturbs nobody; from the directory, so that what a dead
        # environment left is found again.
        self._name = f"scz-podman-{hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:12]}"
        self._run = Path("/run") / self._name  # podman takes at most 50 characters
        self._started = False

    # --- what tests and the demo ask ----------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every podman command here."""
        return {
            "PATH": SYSTEM_PATH,
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.directory / "home"),
            "TMPDIR": str(self.directory / "spool"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",  # podman 5 says so at each command
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.directory / "registries.conf"),
        }

    def command(self, *args: str, runtime: str = "runc") -> list[str]:
        """The whole command line of `podman ARGS` in this environment; `runtime` as in `call`."""
        if not self._started:
            raise EngineError("this podman environment is not started")
        runtime, *flags = runtime.split()
        options = [f"--root={self.directory}/root", f"--runroot={self._run}/root"]
        options += [f"--tmpdir={self._run}/tmp", f"--storage-driver={self._driver}", f"--runtime={runtime}"]
        options += [f"--runtime-flag={flag.removeprefix('--')}" for flag in flags]
        options += ["--cgroup-manager=cgroupfs", "--events-backend=file"]
        options += [f"--hooks-dir={Path(folder).resolve()}" for folder in self.hooks_directories or ()]
        return [*self.namespace.prefix, "podman", *options, *args]

    def call(
        self,
        *args: str,
        runtime: str = "runc",
        check: bool = True,
        stdin: str | None = None,
        timeout_seconds: float = _COMMAND_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Any podman command.

        Args:
            args: Its words after podman's global options.
            runtime: `runc` or `crun`, or the absolute path of a runtime, and after it, in the same string, flags for
                it: `/usr/bin/runsc --platform=ptrace --network=none`. podman remembers a container's own runtime, but
                not its flags.
            check: Raise if it fails.
            stdin: Its standard input; empty if absent.
            timeout_seconds: It is killed after this.

        Raises:
            EngineError: It failed, and `check` is set, or it took too long.
        """
        try:
            done = subprocess.run(
                self.command(*args, runtime=runtime),
                env=self.environment,
                input=stdin or "",
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired as cause:
            raise EngineError(f"podman {' '.join(args)}: no end after {timeout_seconds} s") from cause
        if check and done.returncode != 0:
            raise EngineError(f"podman {' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def run(
        self,
        args: Sequence[str],
        *,
        runtime: str = "runc",
        check: bool = True,
        stdin: str | None = None,
        timeout_seconds: float = _COMMAND_SECONDS,
        network: str = "none",
    ) -> subprocess.CompletedProcess[str]:
        """`podman run --network=none ARGS`: options, image, command. With `stdin`, ARGS need `--interactive`."""
        return self.call(
            *self._new("run", network),
            *args,
            runtime=runtime,
            check=check,
            stdin=stdin,
            timeout_seconds=timeout_seconds,
        )

    def create(self, args: Sequence[str], *, runtime: str = "runc") -> str:
        """`podman create --network=none ARGS`; returns the container's id."""
        return self.call(*self._new("create"), *args, runtime=runtime).stdout.strip()

    def spawn(self, args: Sequence[str], *, runtime: str = "runc") -> subprocess.Popen[str]:
        """`podman run --network=none ARGS` in the background, its three streams on pipes; the caller waits for it."""
        return subprocess.Popen(
            self.command(*self._new("run"), *args, runtime=runtime),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def _new(self, verb: str, network: str = "none") -> tuple[str, ...]:
        return verb, f"--network={network}", f"--cgroup-parent=/{self._name}"

    def start_container(self, name: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`podman start NAME`."""
        return self.call("start", name, check=check)

    def rm(self, name: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`podman rm --force NAME`."""
        return self.call("rm", "--force", "--time=0", name, check=check)

    def inspect(self, name: str) -> dict[str, Any]:
        """`podman inspect NAME`, the one object."""
        found: list[dict[str, Any]] = json.loads(self.call("inspect", name).stdout)
        return found[0]

    def import_image(self, write: Callable[[IO[bytes]], object], tag: str, *, changes: Sequence[str] = ()) -> str:
        """Make an image from a root file system, without any registry.

        Args:
            write: Writes the tar archive into the stream that it is given.
            tag: The image's name, `localhost/NAME:TAG`.
            changes: Dockerfile instructions: CMD, ENTRYPOINT, ENV, USER, WORKDIR.

        Returns:
            The tag.
        """
        archive = self.directory / "spool" / f"import-{os.getpid()}-{time.monotonic_ns()}.tar"
        try:
            with archive.open("wb") as stream:
                write(stream)
            options = [f"--change={change}" for change in changes]
            policy = f"--signature-policy={self.directory}/policy.json"
            self.call("import", "--quiet", policy, *options, str(archive), tag)
        finally:
            archive.unlink(missing_ok=True)
        return tag

    def busybox_image(self) -> str:
        """An image of /bin/busybox with its applets and nothing else; imported once, 2 MB."""
        if self.call("image", "exists", BUSYBOX_IMAGE, check=False).returncode != 0:
            self.import_image(write_busybox, BUSYBOX_IMAGE, changes=['CMD ["/bin/sh"]', f"ENV PATH={SYSTEM_PATH}"])
        return BUSYBOX_IMAGE

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def start(self) -> Podman:
        """Make the environment."""
        if self._started:
            return self
        self._take_away()
        self.directory.mkdir(mode=0o711, parents=True)  # root of a user namespace has to get through
        (self.directory / _MARK).touch()
        for folder in (self._run, self.directory / "home", self.directory / "spool", self.directory / "networks"):
            folder.mkdir(mode=0o711)
        self._driver = self._driver or storage_driver(self.directory)
        for name, text in self._configuration().items():
            (self.directory / name).write_text(text)
        (self.directory / "etc").mkdir(mode=0o755)
        for name, text in self._etc.items():
            (self.directory / "etc" / name).write_text(text)
        self.namespace.start()
        self._started = True
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """Take everything away; harmless when nothing is there."""
        atexit.unregister(self.stop)
        if self._started:
            with contextlib.suppress(EngineError):  # what it leaves, the next lines take away
                self.call("rm", "--all", "--force", "--time=0", timeout_seconds=60)
            self._started = False
        self._take_away()
        self.namespace.stop()

    def __enter__(self) -> Podman:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> Mapping[str, str]:
        engine = {
            "cgroup_manager": "cgroupfs",
            "events_logger": "file",
            "lock_type": "file",  # podman's locks in shared memory are one set for all environments of the machine
            "static_dir": f"{self.directory}/root/libpod",
            "tmp_dir": f"{self._run}/tmp",
            "volume_path": f"{self.directory}/root/volumes",
        }
        containers = {"default_ulimits": container_limits(), "log_driver": "k8s-file"}
        network = {"network_backend": "netavark", "network_config_dir": f"{self.directory}/networks"}
        sections: dict[str, Mapping[str, object]] = {"containers": containers, "engine": engine, "network": network}
        storage = {
            "driver": self._driver,
            "graphroot": f"{self.directory}/root",
            "runroot": f"{self.directory}/runroot",
        }
        return {
            "containers.conf": "".join(_section(name, values) for name, values in sections.items()),
            "storage.conf": _section("storage", storage),
            "registries.conf": "",
            "policy.json": json.dumps({"default": [{"type": "insecureAcceptAnything"}]}),  # local imports only
        }

    def _take_away(self) -> None:
        """What podman itself did not: processes, mounts, cgroups and files of this directory."""
        if self.directory.exists() and not (self.directory / _MARK).exists():
            raise EngineError(f"{self.directory} is not an environment of these tests")
        ids = _container_ids(self.directory)
        _end_processes(self.directory, ids)
        unmount_below(self.directory, self._run)
        remove_cgroups(self._name)
        states = [Path("/run") / runtime / one for runtime in (*RUNTIMES, "runsc") for one in ids]
        for folder in (*states, self._run, self.directory):
            if folder.exists():
                shutil.rmtree(folder)


def _section(name: str, values: Mapping[str, object]) -> str:
    """A table of TOML; JSON's strings and lists of strings are TOML's."""
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def write_busybox(stream: IO[bytes]) -> None:
    """The archive of the busybox image: the binary, a link for each applet, the directories that runtimes expect."""
    listed = subprocess.run(["/bin/busybox", "--list"], env={}, capture_output=True, text=True, check=True)
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        binary = Path("/bin/busybox").read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.mode, entry.size = 0o755, len(binary)
        archive.addfile(entry, io.BytesIO(binary))
        for applet in sorted(set(listed.stdout.split()) - {"busybox"}):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)


def unpack_busybox(folder: Path) -> None:
    """The busybox image's files, in a folder of their own."""
    with io.BytesIO() as stream:
        write_busybox(stream)
        stream.seek(0)
        with tarfile.open(fileobj=stream) as archive:
            # An attribute: Debian 12's Python (3.11.2) has not the argument `filter`, later ones ask for it.
            archive.extraction_filter = lambda member, _path: member
            archive.extractall(folder)


# --- taking away ------------------------------------------------------------------------------------------------------


def _container_ids(directory: Path) -> frozenset[str]:
    """The containers that this environment made, by the folders of their run-time data."""
    folders = directory.glob("root/*-containers/*")
    return frozenset(folder.name for folder in folders if len(folder.name) == 64 and folder.is_dir())


def _owned_processes(directory: Path, ids: frozenset[str]) -> list[int]:
    """conmon and podman with this directory on their command line, and all in these containers' cgroups."""
    place = os.fsencode(f"{directory}/")
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            named = Path(os.fsdecode(words[0])).name in ("conmon", "podman") and any(place in word for word in words)
            if named or any(name in (folder / "cgroup").read_text() for name in ids):
                found.append(int(folder.name))
    return found


def _end_processes(directory: Path, ids: frozenset[str]) -> None:
    """Give conmon's own clean-up a moment, then kill what is left, and see it gone."""
    patience = time.monotonic() + _END_SECONDS / 5
    deadline = time.monotonic() + _END_SECONDS
    while left := _owned_processes(directory, ids):
        if time.monotonic() > deadline:
            raise EngineError(f"processes of {directory} do not end: {left}")
        if time.monotonic() > patience:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def unmount_below(*directories: Path) -> None:
    umount2 = ctypes.CDLL(None, use_errno=True).umount2
    for point, _, _ in reversed(list(_mounts())):
        ours = any(point.is_relative_to(directory) for directory in directories)
        if ours and umount2(os.fsencode(point), _MNT_DETACH) != 0:
            raise EngineError(f"{point} can not be unmounted: {os.strerror(ctypes.get_errno())}")


def remove_cgroups(name: str) -> None:
    """The cgroups below `name`, lowest first, in every hierarchy."""
    for top in (_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")):
        for folder, _, _ in os.walk(top, topdown=False):
            Path(folder).rmdir()
