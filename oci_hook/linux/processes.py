"""Processes held by descriptor, so that a reused pid is never mistaken for them, and the hardening of our own.

A pid is a number that the kernel hands out again. `HeldProcess` opens a pidfd and the `/proc/<pid>` directory once and
reads everything through them; after the process is gone its directory answers ESRCH, whoever has the number then.

It does not decide which process may be trusted (`delivery.holder`). Sources: pidfd_open(2), proc(5), prctl(2),
mlockall(2).
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType

from oci_hook.errors import EngineUnsupported, HolderGone, SystemCallFailed
from oci_hook.linux import syscalls

_MAX_ANCESTORS = 64
_PROC = "/proc"
_LIMIT_BYTES = 1 << 20
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO of Linux (include/linux/proc_ns.h)
_STAT = re.compile(rb"\d+ \(.*\) ([A-Za-z]) (\d{1,10})(?: -?\d+){17} (\d{1,20})(?: .*)?", re.DOTALL)
_GROUP = re.compile(rb"^Tgid:\s+(\d{1,10})$", re.MULTILINE)
_ENDED = re.compile(rb"\d+ \(.*\) [ZXx](?: -?\d+){16} [01](?: .*)?", re.DOTALL)  # and no thread of it runs on


def parse_stat(data: bytes) -> tuple[int, int]:
    """The parent's pid and the start time (clock ticks since boot) of a `/proc/<pid>/stat`.

    Raises:
        SystemCallFailed: It has not the form of proc(5).
    """
    # The name may hold blanks and parentheses: the last ") " ends it, which the greedy .* finds.
    found = _STAT.fullmatch(data.rstrip(b"\n"))
    if found is None:
        raise SystemCallFailed("/proc/<pid>/stat cannot be read as proc(5) describes it")
    return int(found[2]), int(found[3])


def process_start_time(pid: int) -> int | None:
    """The start time of whatever has this pid now, in clock ticks since boot; None if nothing has it.

    A process that ended but was not reaped yet has nothing any more: no memory, no mounts.
    """
    try:
        fd = os.open(f"{_PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        data = os.read(fd, 4096)
        return None if _ENDED.fullmatch(data) else parse_stat(data)[1]
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def process_of_thread(pid: int) -> int:
    """The process that a thread belongs to; a process's own id is its first thread's.

    Raises:
        HolderGone: There is no such thread.
        SystemCallFailed: /proc cannot be read.
    """
    try:
        fd = os.open(f"{_PROC}/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as cause:
        raise HolderGone(f"process {pid} does not exist") from cause
    found = _GROUP.search(read_bounded(fd, f"/proc/{pid}/status", _LIMIT_BYTES))
    if found is None:
        raise SystemCallFailed("/proc/<pid>/status cannot be read as proc(5) describes it")
    return int(found[1])


class HeldProcess:
    """One process, held until the `with` block ends.

    Args:
        pid: In the hook's own pid namespace.

    Raises:
        HolderGone: There is no such process.
        SystemCallFailed: It cannot be opened.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        with ExitStack() as stack:
            try:
                self.pidfd = os.pidfd_open(pid)
                stack.callback(os.close, self.pidfd)
                self.proc_fd = os.open(f"{_PROC}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, self.proc_fd)
            except (ProcessLookupError, FileNotFoundError) as cause:
                raise HolderGone(f"process {pid} does not exist") from cause
            except OSError as cause:
                raise SystemCallFailed(f"process {pid} cannot be held: {cause.strerror}") from cause
            # Alive after both were opened: the directory is the pidfd's process, not a successor's.
            self.verify_alive()
            self.parent_pid, self.start_time = parse_stat(self.read("stat"))
            self._descriptors = stack.pop_all()

    def __enter__(self) -> HeldProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._descriptors.close()

    def verify_alive(self) -> None:
        """Raise unless the process runs still.

        Raises:
            HolderGone: It ended.
        """
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(0):
            raise HolderGone(f"process {self.pid} ended")

    def verify_same(self) -> None:
        """Raise unless the process runs still, with the parent and the start time that it had.

        Raises:
            HolderGone: It ended or is another's child now.
        """
        self.verify_alive()
        if parse_stat(self.read("stat")) != (self.parent_pid, self.start_time):
            raise HolderGone(f"process {self.pid} changed")

    def open(self, name: str) -> int:
        """Open a file of its `/proc` directory for reading; the caller closes it.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be opened.
        """
        with self._reading(name):
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc_fd)

    def open_directory(self, name: str) -> int:
        """An O_PATH descriptor of the directory that a link of its `/proc` directory leads to (`root`, `cwd`); the
        caller closes it.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be opened.
        """
        with self._reading(name):
            return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.proc_fd)

    def read(self, name: str) -> bytes:
        """A file of its `/proc` directory, of at most 1 MiB.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be read, or is larger.
        """
        return read_bounded(self.open(name), f"/proc/{self.pid}/{name}", _LIMIT_BYTES)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            self.verify_alive()  # of a process that is gone, its files are "not found"
            raise SystemCallFailed(f"/proc/{self.pid}/{name} cannot be opened: {cause.strerror}") from cause

    def link(self, name: str) -> str:
        """What a link of its `/proc` directory reads, seen from its root.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be read.
        """
        with self._reading(name):
            return os.readlink(name, dir_fd=self.proc_fd)

    def executable_name(self, *, by_argument: bool = True) -> str:
        """The last part of the path of what it runs.

        crun seals itself by running from a detached bind mount or a memfd, which have no path ("/", "/memfd:…"); its
        first argument, which the engine chose, names it then.

        Args:
            by_argument: Whether that is believed, which anyone can choose; else such a program has no name: empty.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: The link cannot be read.
        """
        link = self.link("exe")
        if link == "/" or link.startswith("/memfd:"):
            link = os.fsdecode(self.read("cmdline").partition(b"\0")[0]) if by_argument else ""
        return os.path.basename(link.removesuffix(" (deleted)"))

    def runs_what_is_roots(self) -> bool:
        """Whether root owns the file that it runs, and nobody else may write it.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be looked at.
        """
        with self._reading("exe"):
            seen = os.stat("exe", dir_fd=self.proc_fd)
        return seen.st_uid == 0 and not seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def arguments(self) -> tuple[str, ...]:
        """Its command line; what it has written over it, if it has.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be read.
        """
        return tuple(os.fsdecode(word) for word in self.read("cmdline").split(b"\0")[:-1])

    def identity(self, name: str) -> tuple[int, int]:
        """Device and inode of what a link of its `/proc` directory leads to: `exe`, `root`, `ns/mnt`.

        Raises:
            HolderGone: The process ended.
            SystemCallFailed: It cannot be looked at.
        """
        with self._reading(name):
            seen = os.stat(name, dir_fd=self.proc_fd)
        return seen.st_dev, seen.st_ino


def children(parent: HeldProcess) -> tuple[int, ...]:
    """The pids of a process's children, lowest first, at one look through /proc.

    Raises:
        HolderGone: The parent ended.
        SystemCallFailed: /proc cannot be read.
    """
    found = []
    with syscalls.failing("/proc cannot be read"):
        pids = [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    for pid in sorted(pids):
        with suppress(OSError, HolderGone):  # one that ended meanwhile
            data = read_bounded(os.open(f"{_PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC), "stat", 4096)
            if parse_stat(data)[0] == parent.pid:
                found.append(pid)
    parent.verify_alive()
    return tuple(found)


def ancestors(process: HeldProcess) -> tuple[int, ...]:
    """The pids above a process, its parent first, as far as this pid namespace goes; at most 64.

    Raises:
        HolderGone: One of them ended meanwhile.
        SystemCallFailed: /proc cannot be read.
    """
    found = [process.parent_pid]
    while found[-1] > 1 and len(found) < _MAX_ANCESTORS:
        with HeldProcess(found[-1]) as parent:
            found.append(parent.parent_pid)
    return tuple(pid for pid in found if pid > 0)


def read_bounded(fd: int, what: str, limit_bytes: int) -> bytes:
    """Read a kernel's file to its end and close it.

    Raises:
        HolderGone: The process that the file is about ended.
        SystemCallFailed: It cannot be read, or is larger than `limit_bytes`.
    """
    parts: list[bytes] = []
    left = limit_bytes + 1
    try:
        while left > 0 and (part := os.read(fd, min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
    except ProcessLookupError as cause:
        raise HolderGone(f"{what}: the process ended") from cause
    except OSError as cause:
        raise SystemCallFailed(f"{what} cannot be read: {cause.strerror}") from cause
    finally:
        os.close(fd)
    if left <= 0:
        raise SystemCallFailed(f"{what} is larger than {limit_bytes} bytes")
    return b"".join(parts)


def verify_privileges() -> None:
    """Check that this is root of the host: a rootless engine runs hooks as its user, in that user's namespace.

    Raises:
        EngineUnsupported: It is not.
    """
    try:
        namespace = os.stat("/proc/self/ns/user").st_ino
    except OSError:
        namespace = 0
    if os.geteuid() != 0 or namespace != _INITIAL_USER_NAMESPACE:
        raise EngineUnsupported(
            "rootless engines are not supported: the TPM, the models and the grants are root's",
            remedy="start the container with the engine of root (`sudo podman run`); `--uidmap` gives it own ids",
        )


def clear_signals() -> None:
    """Block nothing and wait for children as usual: crun starts a hook with nearly every signal blocked."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lock_memory() -> None:
    """Keep this process's pages out of swap, as they are touched; best effort, as limits may forbid it."""
    with suppress(OSError):
        syscalls.mlockall(syscalls.MCL_CURRENT | syscalls.MCL_FUTURE | syscalls.MCL_ONFAULT)


def occupy_standard_descriptors() -> None:
    """Open /dev/null as 0, 1 and 2 where they are closed: no socket or mount may get such a number.

    Raises:
        SystemCallFailed: /dev/null cannot be opened.
    """
    with syscalls.failing("/dev/null cannot be opened"):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(fd)


def harden_process() -> None:
    """Leave no core, be traced by nobody but root, stay out of swap (best effort), inherit no signal mask.

    Raises:
        SystemCallFailed: The kernel refuses; swap alone is best effort.
    """
    clear_signals()
    occupy_standard_descriptors()
    os.umask(0o077)
    with syscalls.failing("the hook's process cannot be hardened"):
        syscalls.prctl_set_dumpable(False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lock_memory()
