"""Kata's agent, in the guest: the holder is the container's init, which waits while the agent runs its guest hooks.

The agent is known by its executable, which root's configuration names (the guest's image, so a part of what was
measured). It makes the container's init, or adopts it where that has forked into a process namespace of its own. The
root file system is mounted onto itself in a mount namespace of the container's, as runc does it, and the hooks run
before it pivots. As the agent ignores how a hook ends, a refusal is told inside: `tell_inside` puts a read-only file
system with a text in the model's place.

Source: Kata Containers, src/agent/rustjail/src/container.rs (`join_namespaces`, `do_init_child`) and
src/agent/src/sandbox.rs (`find_hooks`). Facts: docs/runtimes.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from oci_hook.delivery.attach import Attachment
from oci_hook.delivery.holder import (
    MOUNT_NAMESPACE,
    Agent,
    ContainerView,
    Ground,
    Holder,
    foreign_namespaces,
    identify_root,
    verify_namespace_unchanged,
)
from oci_hook.documents import shown
from oci_hook.errors import HolderRefused, SczError
from oci_hook.linux import mounts
from oci_hook.linux.processes import HeldProcess
from oci_hook.linux.syscalls import failing

REFUSAL_FILE = "REFUSED.txt"
"""What a refused container finds in the model's place, and nothing beside it."""
_REFUSAL_BYTES = 64 << 10
_REFUSAL_INODES = 4
_MESSAGE_CHARACTERS = 4096


class AgentInit(Holder):
    """A container's init in a Kata guest, held until the `with` block ends.

    Args:
        container: The container.
        agent: Who called the hook.

    Raises:
        HolderRefused: A check below failed.
        HolderGone: The process ended meanwhile.
        SpecInvalid: `root.path` is no directory.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(self, container: ContainerView, agent: Agent) -> None:
        with ExitStack() as stack, HeldProcess(agent.pid) as caller:
            process = stack.enter_context(HeldProcess(container.pid))
            # 1. The agent called the hook, by the file that it runs: a name could be anyone's.
            _verify_executable(caller, agent.executable)
            # 2. It made the process: no other container's, no successor of a pid that was used before.
            if process.parent_pid != caller.pid:
                raise HolderRefused(f"process {process.pid} was not made by the agent that started this hook")
            # 3. Its mount namespace is neither the agent's, nor ours, nor the guest's.
            namespace_fd = process.open(MOUNT_NAMESPACE)
            stack.callback(os.close, namespace_fd)
            seen = os.fstat(namespace_fd)
            self._namespace = (seen.st_dev, seen.st_ino)
            if self._namespace in foreign_namespaces():
                raise HolderRefused("the container runs in the guest's or the agent's own mount namespace")
            # 4. The root file system is a directory below the guest's, not the guest's own.
            ground = Ground(identify_root(container.bundle, container.root_path), namespace_fd)
            super().__init__("kata", process, ground, stack, keeper=process)
            self._announce_fd = agent.announce_fd
            # 5. What was opened belongs to one process, which lives still.
            self.verify_unchanged()
            self._descriptors = stack.pop_all()

    def verify_unchanged(self) -> None:
        """Raise unless the process lives still, with the parent, start time and mount namespace that it had.

        Raises:
            HolderGone: It does not.
        """
        verify_namespace_unchanged(self.process, self._namespace)

    def announcing(
        self,
        mount_fds: Sequence[int],  # noqa: ARG002 - nothing is to be remembered of them
        destinations: Sequence[str],  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Before the first model is attached, tell whoever might put a refusal in its place."""
        return self._announced()

    @contextmanager
    def _announced(self) -> Iterator[None]:
        if self._announce_fd >= 0:
            with failing("the models cannot be announced"):
                os.write(self._announce_fd, b"a")
        yield


def _verify_executable(caller: HeldProcess, executable: str) -> None:
    """Raise unless the process runs this very file.

    Raises:
        HolderRefused: It runs another one, or there is none of that name.
        HolderGone: It ended.
    """
    try:
        wanted = os.stat(executable)
    except (OSError, ValueError) as cause:
        raise HolderRefused(f"the agent {shown(executable)} of config.toml cannot be looked at: {cause}") from cause
    if caller.identity("exe") != (wanted.st_dev, wanted.st_ino):
        raise HolderRefused(
            f"the hook was called by {shown(caller.executable_name())}, not by the agent {shown(executable)}",
            remedy="set `agent` below [guest] in the guest's config.toml to the file that the guest's agent runs from",
        )


def refusal_text(error: SczError) -> str:
    """What the workload reads: code, reason, what was seen, and what mends it; never a secret (`SczError`)."""
    return (
        "scz-smm refused this container's model; there is none here.\n"
        f"code: {error.code}\n"
        f"reason: {error.reason} ({error.summary})\n"
        f"message: {shown(error.message, _MESSAGE_CHARACTERS)}\n"
        f"remedy: {shown(error.advice, _MESSAGE_CHARACTERS)}\n"
    )


def tell_inside(
    holder: Holder, container: ContainerView, destinations: Sequence[str], text: str, *, timeout_seconds: float
) -> None:
    """Put a read-only file system with this text alone at every destination, or at none.

    Args:
        holder: Whose namespace.
        container: As for a delivery: the same rules say where a mount may be.
        destinations: Absolute paths in the container.
        text: At most 64 KiB.
        timeout_seconds: For each answer of the child that attaches.

    Raises:
        DestinationInvalid: A destination cannot be used.
        DestinationRefused: It leads outside, or a model lies there already.
        HolderRefused: The namespace does not hold the root file system.
        HolderGone: The container or the child ended.
        SystemCallFailed: The kernel refuses something else.
    """
    kind = mounts.probe_memory_filesystem()
    with ExitStack() as stack:
        attachment = stack.enter_context(Attachment(holder, container, destinations, timeout_seconds=timeout_seconds))
        fds = []
        for _ in destinations:
            made = stack.enter_context(mounts.create_memory_filesystem(_REFUSAL_BYTES * 2, _REFUSAL_INODES, kind))
            _write(made.fd, text.encode()[:_REFUSAL_BYTES], container.uid_offset, container.gid_offset)
            mounts.seal_superblock(made.fd)
            mounts.set_mount_flags(made.fd)
            fds.append(made.fd)
        holder.verify_unchanged()
        attachment.attach(fds)


def _write(directory_fd: int, data: bytes, uid: int, gid: int) -> None:
    """The file, and the directory's mode and owner, as `fill` leaves a model's."""
    with failing("the refusal cannot be written"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(REFUSAL_FILE, flags, 0o400, dir_fd=directory_fd)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fchmod(file, 0o444)
            os.fchown(file, uid, gid)
        finally:
            os.close(file)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            os.fchown(directory, uid, gid)
            os.fchmod(directory, 0o555)
        finally:
            os.close(directory)
