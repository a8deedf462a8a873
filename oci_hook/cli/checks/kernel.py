"""The kernel: what holds plaintext, and by which ways memory reaches a disk (swap, cores, kdump, hibernation).

`load_kernel_state` reads, the checks judge what it read. Sources: proc(5), core(5), systemd-coredump(8),
Documentation/admin-guide/kdump, Documentation/admin-guide/LSM/Yama.rst, adjtimex(2).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oci_hook.cli.checks.check import Check, failed, load_text
from oci_hook.errors import SczError
from oci_hook.linux.mounts import MemoryFilesystem, probe_memory_filesystem
from oci_hook.linux.syscalls import clock_is_synchronised

_LEAST_KERNEL = (5, 12)  # mount_setattr(2)
_NOSYMFOLLOW = (5, 14)
_DISCARDS = re.compile(r"\|\s*(?:/usr)?/bin/(?:false|true)(?:\s.*)?", re.DOTALL)
_COLLECTORS = re.compile(r"systemd-coredump|apport|abrt|kdump|crash|core", re.IGNORECASE)
_HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


@dataclass(frozen=True, slots=True)
class Swap:
    """An active swap area: its path, and whether it lies on a device that dm-crypt encrypts."""

    path: str
    encrypted: bool


@dataclass(frozen=True, slots=True)
class KernelState:
    """What the kernel says of itself; None: it does not say.

    Attributes:
        filesystem: What can hold plaintext; None: nothing, or we may not look.
        no_filesystem: Why.
        crash_kernel: A kernel for kdump is loaded.
        sleeps: The kernel can hibernate (`disk` in /sys/power/state).
        collector_keeps: systemd-coredump, if it is what gets the cores, stores them (coredump.conf(5)).
        resume: Where the command line says that an image is resumed from; empty: nowhere.
    """

    release: str
    filesystem: MemoryFilesystem | None
    no_filesystem: SczError | None
    swaps: tuple[Swap, ...]
    crash_kernel: bool
    command_line: tuple[str, ...]
    sleeps: bool
    resume: str
    core_pattern: str
    collector_keeps: bool
    suid_dumpable: str | None
    ptrace_scope: str | None
    huge_pages: str | None

    @property
    def plain_swap(self) -> tuple[str, ...]:
        """Active swap areas that nothing encrypts, so far as can be seen."""
        return tuple(swap.path for swap in self.swaps if not swap.encrypted)

    @property
    def stores_cores(self) -> bool:
        """Whether the core of a process that crashes is kept anywhere, if its limit lets it be written."""
        if not self.core_pattern or _DISCARDS.fullmatch(self.core_pattern):
            return False
        return self.collector_keeps or "systemd-coredump" not in self.core_pattern


def load_kernel_state(root: str = "/") -> KernelState:
    """Read what there is below /proc and /sys.

    Args:
        root: Where /proc and /sys are looked for; the probe of the mount API is of this kernel always.
    """

    def text(path: str) -> str | None:
        return load_text(os.path.join(root, path.lstrip("/")))

    filesystem, refusal = None, None
    try:
        filesystem = probe_memory_filesystem()
    except SczError as error:
        refusal = error
    words = _command_line(text("/proc/cmdline") or "")
    resumed = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    return KernelState(
        release=os.uname().release,
        filesystem=filesystem,
        no_filesystem=refusal,
        swaps=parse_swaps(text("/proc/swaps") or "", lambda path: _is_encrypted(path, root)),
        crash_kernel=text("/sys/kernel/kexec_crash_loaded") == "1",
        command_line=words,
        sleeps="disk" in (text("/sys/power/state") or "").split(),
        resume=resumed[-1] if resumed else "",
        core_pattern=text("/proc/sys/kernel/core_pattern") or "",
        collector_keeps=_coredump_storage(root) != "none",
        suid_dumpable=text("/proc/sys/fs/suid_dumpable"),
        ptrace_scope=text("/proc/sys/kernel/yama/ptrace_scope"),
        huge_pages=text(_HUGE),
    )


def _command_line(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:  # an open quotation mark
        return tuple(text.split())


def _coredump_storage(root: str) -> str:
    """`Storage=` of systemd-coredump's configuration: the last that says it counts, drop-ins by name after the file."""
    found: dict[str, str] = {}
    for place in ("usr/lib", "run", "etc"):
        folder = os.path.join(root, place, "systemd/coredump.conf.d")
        with contextlib.suppress(OSError):
            found |= {name: os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".conf")}
    paths = [os.path.join(root, "etc/systemd/coredump.conf"), *(found[name] for name in sorted(found))]
    said = [
        value
        for path in paths
        for value in re.findall(r"^[ \t]*Storage[ \t]*=[ \t]*([a-z]+)", load_text(path) or "", re.MULTILINE)
    ]
    return said[-1] if said else "external"


def parse_swaps(text: str, is_encrypted: Callable[[str], bool]) -> tuple[Swap, ...]:
    """The lines of /proc/swaps; zram, which is memory, is none of them.

    Args:
        text: The file.
        is_encrypted: Called with a path; whether its device is dm-crypt's.
    """
    found = []
    for line in text.splitlines()[1:]:
        path = line.split()[0].replace(r"\040", " ") if line.split() else ""
        if path and not os.path.basename(path).startswith("zram"):
            found.append(Swap(path, is_encrypted(path)))
    return tuple(found)


def _is_encrypted(path: str, root: str) -> bool:
    """Whether the device itself is dm-crypt's; a file on an encrypted file system is not seen as such."""
    name = os.path.basename(os.path.realpath(path))
    return (load_text(os.path.join(root, f"sys/class/block/{name}/dm/uuid")) or "").startswith("CRYPT-")


def check_kernel(state: KernelState) -> Iterator[Check]:
    """The kernel's release, and what it offers to hold plaintext."""
    found = re.match(r"([0-9]+)\.([0-9]+)", state.release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < _LEAST_KERNEL:
        yield Check("kernel", "fail", f"Linux {state.release} has no mount_setattr(2)", "boot Linux 5.12 or later")
    elif version < _NOSYMFOLLOW:
        message = f"Linux {state.release} cannot mount with nosymfollow, as the hook does"
        yield Check("kernel", "fail", message, "boot Linux 5.14 or later")
    else:
        yield Check("kernel", "ok", f"Linux {state.release}")
    if state.filesystem is None:
        if state.no_filesystem is not None:
            yield _no_filesystem(state.no_filesystem)
    elif state.filesystem is MemoryFilesystem.TMPFS:
        yield Check("plaintext", "ok", "tmpfs that is never swapped (noswap)")
    else:
        yield Check("plaintext", "ok", "ramfs, which is never swapped: this tmpfs knows no noswap (Linux 6.4)")
    huge = state.huge_pages or ""
    chosen = re.search(r"\[([a-z_]+)\]", huge)
    yield Check("huge pages", "ok", f"for shared memory: {chosen[1] if chosen else 'not offered'} (optional)")


def _no_filesystem(error: SczError) -> Check:
    if os.geteuid() != 0:
        return Check("plaintext", "warn", f"not seen without root's rights ({error.message})", "sudo sczctl doctor")
    return failed("plaintext", error)


def check_leaks(state: KernelState) -> Iterator[Check]:
    """By which ways the memory of a workload reaches a disk: the application's own copy of the model, above all."""
    yield _swap(state)
    yield _kdump(state)
    yield _hibernation(state)
    yield _cores(state)
    if state.suid_dumpable == "1":
        message = "fs.suid_dumpable is 1: cores of programs that changed their user are as readable as others'"
        yield Check("suid_dumpable", "warn", message, "sysctl fs.suid_dumpable=0")
    else:
        yield Check("suid_dumpable", "ok", f"fs.suid_dumpable is {state.suid_dumpable or 'not there'}")
    if state.ptrace_scope in (None, "0"):
        what = "kernel.yama.ptrace_scope is 0" if state.ptrace_scope else "this kernel has no Yama"
        message = f"{what}: a process may read the memory of any other of its user"
        remedy = "sysctl kernel.yama.ptrace_scope=1" if state.ptrace_scope else "boot a kernel with the LSM yama"
        yield Check("ptrace", "warn", message, remedy)
    else:
        yield Check("ptrace", "ok", f"kernel.yama.ptrace_scope is {state.ptrace_scope}")


def _swap(state: KernelState) -> Check:
    plain, all_areas = state.plain_swap, ", ".join(swap.path for swap in state.swaps)
    if not state.swaps:
        return Check("swap", "ok", "none on a disk")
    if not plain:
        return Check("swap", "ok", f"{all_areas}: encrypted by dm-crypt")
    listed = ", ".join(plain)
    message = (
        f"{listed}: not seen to be encrypted. The model's mount is never swapped; what an application copies into its "
        "own memory, and all memory of a gVisor sandbox or a VM, is"
    )
    remedy = f"`swapoff {' '.join(map(shlex.quote, plain))}`, or encrypt it with a random key (crypttab(5), `swap`)"
    return Check("swap", "warn", message, remedy)


def _kdump(state: KernelState) -> Check:
    reserved = next((word for word in state.command_line if word.startswith("crashkernel=")), "")
    if state.crash_kernel:
        message = "a crash kernel is loaded: after a panic it writes all memory, models included, to a disk"
        return Check("kdump", "warn", message, "`kdump-config unload` or `kexec -p -u`, and remove kdump-tools")
    if reserved:
        message = f"no crash kernel is loaded, but the command line has {reserved}: a service may load one"
        return Check("kdump", "warn", message, "take crashkernel= from the kernel's command line (`update-grub`)")
    return Check("kdump", "ok", "no crash kernel is loaded or provided for")


def _hibernation(state: KernelState) -> Check:
    noresume = {"nohibernate", "noresume"} & set(state.command_line)
    if not state.sleeps or "nohibernate" in noresume:
        return Check("hibernation", "ok", "the kernel does not offer it")
    if state.resume and not noresume:
        message = f"memory can be written to {state.resume} (resume= of the kernel's command line)"
    elif state.swaps:
        message = "the kernel offers it, and there is swap to write memory to"
    else:
        return Check("hibernation", "ok", "the kernel offers it, but there is no swap to write memory to")
    remedy = "`systemctl mask hibernate.target hybrid-sleep.target`, or boot with nohibernate"
    return Check("hibernation", "warn", message, remedy)


def _cores(state: KernelState) -> Check:
    pattern = state.core_pattern
    if not pattern:
        return Check("core dumps", "ok", "the kernel writes none")
    if not state.stores_cores:
        return Check("core dumps", "ok", f"not kept (kernel.core_pattern is {pattern})")
    if pattern.startswith("|"):
        program = pattern[1:].split()[0] if pattern[1:].split() else pattern
        kept = "keeps" if _COLLECTORS.search(os.path.basename(program)) else "may keep"
        where = f"{program} {kept} them"
    else:
        where = f"into files named {pattern}"
    message = f"kernel.core_pattern: {where}. The core of a workload has what it read of the model"
    return Check("core dumps", "warn", message, MEND_CORES)


MEND_CORES = (
    "`sysctl -w 'kernel.core_pattern=|/bin/false'` (and in /etc/sysctl.d: for all of this host), or `--ulimit core=0` "
    "(LimitCORE=0) for the containers with models"
)


def check_clock() -> Iterator[Check]:
    """Whether something keeps the clock right: tokens, leases and the audit log go by it."""
    try:
        synchronised = clock_is_synchronised()
    except OSError as error:
        yield Check("clock", "warn", f"adjtimex: {error.strerror}", "start an NTP client (systemd-timesyncd, chrony)")
        return
    if synchronised or os.path.exists("/run/systemd/timesync/synchronized"):
        yield Check("clock", "ok", "synchronised")
    else:
        message = "nothing keeps it right (adjtimex says unsynchronised): tokens expire too early or too late"
        yield Check("clock", "warn", message, "start an NTP client (`systemctl enable --now systemd-timesyncd`)")
