"""How well a running container keeps its model: secure, weak or insecure, each with its reasons.

Pure: facts in, a grade out; `containers` reads the facts. The rules, in the words of docs/operations.md:

* **insecure**: somebody without root's rights on this host, or the container by itself, can reach the model or what it
  writes, by ordinary means; or what was delivered is no longer as it was delivered.
* **weak**: a protection that the threat model counts on is absent, or cannot be seen.
* **secure**: none of these was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from oci_hook.cli.checks.kernel import MEND_CORES, KernelState

Grade = Literal["secure", "weak", "insecure"]
Sandbox = Literal["none", "gvisor", "unknown"]

TOKEN_SECONDS = 24 * 3600
"""A bearer token that is valid for longer is one that somebody may still find useful."""
_SYS_ADMIN, _SYS_PTRACE = 21, 19
# Each leads out of a container that shares the host's user namespace: capabilities(7).
_BREAKING = {
    2: "CAP_DAC_READ_SEARCH",
    16: "CAP_SYS_MODULE",
    17: "CAP_SYS_RAWIO",
    _SYS_ADMIN: "CAP_SYS_ADMIN",
    39: "CAP_BPF",
}


@dataclass(frozen=True, slots=True)
class ModelMount:
    """What lies at a model's destination.

    Attributes:
        present: The container sees a model's file system there; None: that cannot be looked at from here.
        read_only: Its superblock and the mount.
        kind: `tmpfs`, `ramfs` or another.
        noswap: The tmpfs is never swapped (a ramfs never is).
    """

    path: str
    present: bool | None
    read_only: bool = True
    kind: str = "tmpfs"
    noswap: bool = True


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """A running container as its process and its record show it.

    Attributes:
        sandbox: What stands between its processes and this kernel, as the record says; `unknown`: it does not, and what
            its process runs is called like a sandbox.
        user_namespace: It has one of its own.
        host_uid: Of its first process, on this host.
        capabilities: What its first process can ever have (bounding and effective), by number.
        shares_pids: It sees the host's processes.
        seccomp: Its system calls are filtered.
        core_limit_bytes: RLIMIT_CORE, the hard limit; None: without limit.
        swapped_bytes: Of its first process, in swap now.
        mounts: Its models.
        token_seconds: How long its identity token is valid from its issue; None: not seen.
        recorded: The record says which runtime made it, and which mounts are the models'.
    """

    sandbox: Sandbox
    user_namespace: bool
    host_uid: int
    capabilities: frozenset[int]
    shares_pids: bool
    seccomp: bool
    core_limit_bytes: int | None
    swapped_bytes: int
    mounts: tuple[ModelMount, ...]
    token_seconds: int | None
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What all containers of a host share; `software_tpm` is None if the TPM did not answer."""

    stores_cores: bool
    core_program: str
    plain_swap: bool
    software_tpm: bool | None

    @classmethod
    def of(cls, kernel: KernelState, software_tpm: bool | None) -> HostFacts:
        """Those of this kernel."""
        program = kernel.core_pattern[1:].split()[0] if kernel.core_pattern[1:].split() else ""
        is_pipe = kernel.core_pattern.startswith("|")
        return cls(kernel.stores_cores, program if is_pipe else "", bool(kernel.plain_swap), software_tpm)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a container is not `secure`, how much it weighs, and what mends it."""

    name: str
    weight: Literal["weak", "insecure"]
    message: str
    remedy: str


def grade(container: ContainerFacts, host: HostFacts) -> tuple[Grade, tuple[Reason, ...]]:
    """The grade, and every reason for it, the heaviest first."""
    found = (*_mounts(container, host), *_isolation(container), *_memory(container, host), *_trust(container, host))
    reasons = tuple(sorted(found, key=lambda reason: reason.weight != "insecure"))
    if not reasons:
        return "secure", ()
    return reasons[0].weight, reasons


def _mounts(container: ContainerFacts, host: HostFacts) -> Iterator[Reason]:
    for mount in container.mounts:
        if mount.present is None:
            continue
        if not mount.present:
            message = f"{mount.path} is not a model's mount any more: nothing vouches for what lies there"
            yield Reason("mount-gone", "weak", message, "start the container again, if nobody released the model")
            continue
        if not mount.read_only:
            message = f"{mount.path} was made writable: what the application reads may not be the model"
            yield Reason("mount-writable", "insecure", message, "start it again without CAP_SYS_ADMIN")
        if mount.kind == "tmpfs" and not mount.noswap:
            weight: Literal["weak", "insecure"] = "insecure" if host.plain_swap else "weak"
            message = f"{mount.path} is a tmpfs that may be swapped"
            yield Reason("mount-swappable", weight, message, "swapoff -a, and start the container again")
        elif mount.kind not in ("tmpfs", "ramfs"):
            message = f"{mount.path} is of the kind {mount.kind}, which may keep it on a disk"
            yield Reason("mount-kind", "insecure", message, "start the container again; `sczctl sweep` first")


def _isolation(container: ContainerFacts) -> Iterator[Reason]:
    if not container.recorded:
        message = "unknown sandbox: its record lacks runtime and mounts (an earlier version's, or a start under way)"
        yield Reason("unknown-sandbox", "weak", message, "start the container again")
    if container.sandbox != "none":
        return  # another kernel stands between; what its process on the host has says nothing of the workload
    if not container.user_namespace:
        breaking = [name for number, name in _BREAKING.items() if number in container.capabilities]
        if breaking:
            message = f"it has {', '.join(breaking)} in the host's user namespace: that leads out of the container"
            yield Reason("privileged", "insecure", message, "start it without --privileged, or with --userns=auto")
        message = f"no user namespace: processes of the host with uid {container.host_uid} can read its files"
        yield Reason("no-user-namespace", "weak", message, "start it with --userns=auto (Kubernetes: hostUsers: false)")
    if container.shares_pids:
        can_trace = _SYS_PTRACE in container.capabilities
        message = f"it sees the host's processes{' and may trace them (CAP_SYS_PTRACE)' if can_trace else ''}"
        heavy = can_trace and not container.user_namespace
        remedy = "start it without --pid=host (Kubernetes: hostPID: false)"
        yield Reason("host-pids", "insecure" if heavy else "weak", message, remedy)
    elif _SYS_PTRACE in container.capabilities:
        message = "its processes may trace each other (CAP_SYS_PTRACE): whoever executes into it reads their memory"
        yield Reason("ptrace", "weak", message, "start it with --cap-drop=SYS_PTRACE")
    if not container.seccomp:
        message = "its system calls are not filtered"
        yield Reason("no-seccomp", "weak", message, "start it without --security-opt=seccomp=unconfined")


def _memory(container: ContainerFacts, host: HostFacts) -> Iterator[Reason]:
    if host.stores_cores and container.core_limit_bytes != 0:
        message = "a crash of the application leaves its memory in a core"
        yield Reason("core-dumps", "weak", message, MEND_CORES)
    elif host.stores_cores and host.core_program and "systemd-coredump" not in host.core_program:
        # The kernel starts the program whatever the limit says (core(5)); systemd-coredump looks at it by itself.
        message = f"a crash hands the application's memory to {host.core_program}, whatever its limit for cores"
        yield Reason("core-dumps", "weak", message, MEND_CORES)
    if host.plain_swap:
        if container.swapped_bytes:
            message = f"{container.swapped_bytes // 1024} KiB of its memory are in swap that is not encrypted"
            yield Reason("swapped", "insecure", message, "swapoff -a; encrypt it (crypttab(5), `swap`) before swapon")
        else:
            what = {"none": "the application's own copy", "gvisor": "the sandbox's memory", "unknown": "its memory"}
            message = f"{what[container.sandbox]} may go to swap that is not encrypted"
            yield Reason("swap", "weak", message, "swapoff -a, or encrypt it (crypttab(5), `swap`)")


def _trust(container: ContainerFacts, host: HostFacts) -> Iterator[Reason]:
    if host.software_tpm:
        message = "the key came from a software TPM: whoever reads its files has it too"
        yield Reason("software-tpm", "weak", message, "use a hardware TPM, or one whose files the hypervisor alone has")
    if container.token_seconds is not None and container.token_seconds > TOKEN_SECONDS:
        hours = container.token_seconds // 3600
        message = f"its identity token is valid for {hours} h: whoever copies it can start the model with it"
        yield Reason("long-token", "weak", message, "issue shorter ones (`sczctl token issue --ttl 600`), at most 24 h")
