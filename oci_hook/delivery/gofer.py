"""gVisor: the holder is the gofer, which serves the root file system to the sandbox from a mount namespace of its own.

`state.pid` is the sandbox: it lives as long as the container does and is held for that, but its mount namespace is
empty. The gofer is found among the runtime's own children and checked in every way that there is: its command line,
its executable, its bundle, its namespace, and the root that it has come to. One candidate or none at all: never a
choice.

A container that joins a pod's sandbox has no gofer yet while the hook runs: `host_side` is for those.
Source: gVisor, runsc/container/container.go (`createGoferProcess`), runsc/cmd/gofer.go; seen in 20221219 and 20240729.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from oci_hook.delivery.holder import (
    MOUNT_NAMESPACE,
    ContainerView,
    Ground,
    Holder,
    RootIdentity,
    foreign_namespaces,
    identify_root,
    verify_namespace_unchanged,
)
from oci_hook.documents import shown
from oci_hook.errors import EngineUnsupported, HolderGone, HolderRefused
from oci_hook.linux.processes import HeldProcess, children

GOFER, SANDBOX = "runsc-gofer", "runsc-sandbox"
ROOT_ANNOTATIONS = "dev.gvisor.spec.rootfs."
"""By these a container names another root file system, and where its writes go (runsc/boot/mount_hints.go)."""
_FLAG_ANNOTATIONS = "dev.gvisor.flag.overlay"
_GOFER_ROOT = "/root"
_ROOT_SECONDS = 10.0  # from the gofer's start to its chroot; it waits for nobody there
_ROOT_POLL_SECONDS = 0.002


def flag(arguments: Sequence[str], name: str) -> str | None:
    """The value of a flag in a command line of Go's: `--name=value`, `--name value`, or either with one dash.

    Args:
        arguments: Of a process of runsc's, which writes the flags of its own processes itself.
        name: Without dashes.

    Raises:
        HolderRefused: It is there twice: then it is not runsc that wrote them.
    """
    found = _values(arguments, name)
    if len(found) > 1:
        raise HolderRefused(f"a process of runsc's has the flag --{name} twice")
    return found[0] if found else None


def _values(arguments: Sequence[str], name: str) -> list[str]:
    found = []
    for index, word in enumerate(arguments):
        key, separator, value = word.partition("=")
        if key in (f"-{name}", f"--{name}"):
            found.append(value if separator else "".join(arguments[index + 1 : index + 2]))
    return found


def find_gofers(runtime: HeldProcess) -> tuple[int, ...]:
    """The pids of the runtime's children that are gofers by their name.

    Raises:
        HolderGone: The runtime ended.
        SystemCallFailed: /proc cannot be read.
    """
    found = []
    for pid in children(runtime):
        try:
            with HeldProcess(pid) as child:
                if child.parent_pid == runtime.pid and child.arguments()[:1] == (GOFER,):
                    found.append(pid)
        except HolderGone:
            continue
    return tuple(found)


def verify_own_process(process: HeldProcess, runtime: HeldProcess, kind: str, bundle: str) -> None:
    """Raise unless a process is the runtime's own, for this bundle.

    Args:
        process: The one in question.
        runtime: The process that runs this hook.
        kind: Its name, `GOFER` or `SANDBOX`.
        bundle: The state's.

    Raises:
        HolderRefused: It is not.
        HolderGone: One of them ended.
        SystemCallFailed: /proc cannot be read.
    """
    arguments = process.arguments()
    # 1. The runtime's child, by the name that runsc gives it.
    if process.parent_pid != runtime.pid or arguments[:1] != (kind,):
        raise HolderRefused(f"process {process.pid} is not a {kind} that the runtime which started this hook has made")
    # 2. The same program.
    if process.identity("exe") != runtime.identity("exe"):
        raise HolderRefused(f"the {kind} {process.pid} is not the runtime's own executable")
    # 3. For this bundle.
    if (served := flag(arguments, "bundle")) != bundle:
        raise HolderRefused(f"the {kind} {process.pid} serves the bundle {shown(str(served))}, not this container's")


def verify_writes_in_memory(arguments: Sequence[str]) -> None:
    """Raise if a sandbox keeps what its first container writes in a file on the host's disk.

    gVisor's overlay copies a whole file up when it is opened for writing, or when its owner or mode is changed, and
    asks nothing of a read-only file system below: `chown -R` in a container would put the model on the disk. Since
    2023 that is runsc's default (`--overlay2=root:self`).

    Args:
        arguments: The sandbox's command line, as runsc wrote it.

    Raises:
        EngineUnsupported: It does, or in a way that is not known.
    """
    # Since 2023: "lisafs:self", one for each mount, the root's first. Before: the file's descriptor, -1 for none.
    confs, file_fd = flag(arguments, "gofer-mount-confs"), flag(arguments, "overlay-filestore-fd")
    upper = (confs or "").split(",")[0].split(":")[1:2]
    in_memory = upper in (["none"], ["memory"]) if confs is not None else file_fd == "-1"
    if not in_memory:
        raise _on_the_disk()


def verify_joining_writes_in_memory(
    sandbox: Sequence[str], runtime: Sequence[str], annotations: Mapping[str, str]
) -> None:
    """Raise if what a container that joins a pod writes would go to a file on the host's disk.

    runsc decides that for each container when it starts it, by its own flag and by the container's annotations. What
    the sandbox was told is only its first container's lot: a pause container has a read-only root, so none.

    Args:
        sandbox: The sandbox's command line, as runsc wrote it.
        runtime: Of the runtime that creates the container.
        annotations: Of the container.

    Raises:
        EngineUnsupported: It would, or in a way that is not known.
    """
    # 1. No annotation of the container's says something else of its root file system.
    if any(key.startswith((ROOT_ANNOTATIONS, _FLAG_ANNOTATIONS)) for key in annotations):
        raise EngineUnsupported(
            "an annotation tells gVisor where the root file system comes from, or where its writes go",
            remedy=f"remove the annotations {ROOT_ANNOTATIONS}* and {_FLAG_ANNOTATIONS}*",
        )
    # 2. Nor did the sandbox's first container get a file.
    verify_writes_in_memory(sandbox)
    # 3. Since 2023 the flag must be there, as its default is the disk. Of a flag given twice the last counts.
    if flag(sandbox, "gofer-mount-confs") is None:
        return
    for arguments in (sandbox, runtime):
        said = "".join(_values(arguments, "overlay2")[-1:]).split(",")[0]
        if said not in ("none", "root:memory", "all:memory"):
            raise _on_the_disk()


def _on_the_disk() -> EngineUnsupported:
    return EngineUnsupported(
        "runsc keeps what the container writes in a file on the host's disk (--overlay2=root:self, its default): "
        "a model that the container opens for writing, or gives another owner, would be copied there",
        remedy="give runsc --overlay2=root:memory or --overlay2=none (Docker: runtimeArgs in daemon.json; containerd: "
        "a script that adds it, `sczctl install --runtime SCRIPT`, or runsc.toml with gVisor's own shim)",
    )


class Gofer(Holder):
    """The gofer of a container that is alone in its sandbox, or the first in it; held until the `with` block ends.

    Args:
        container: The container.
        runtime: The process that runs this hook.

    Raises:
        HolderRefused: A check below failed, or there is not exactly one gofer.
        EngineUnsupported: What the container writes would go to the host's disk.
        HolderGone: A process ended meanwhile, or the gofer did not come to its root.
        SpecInvalid: `root.path` is no directory.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(self, container: ContainerView, runtime: HeldProcess) -> None:
        with ExitStack() as stack:
            # 1. `state.pid` is the sandbox that this runtime has made for this bundle.
            sandbox = stack.enter_context(HeldProcess(container.pid))
            verify_own_process(sandbox, runtime, SANDBOX, container.bundle)
            verify_writes_in_memory(sandbox.arguments())
            # 2. Exactly one gofer, made by this runtime for this bundle.
            gofers = find_gofers(runtime)
            if len(gofers) != 1:
                raise HolderRefused(f"the runtime has {len(gofers)} gofers where it must have one")
            self._gofer = stack.enter_context(HeldProcess(gofers[0]))
            verify_own_process(self._gofer, runtime, GOFER, container.bundle)
            # 3. In a mount namespace that is neither the runtime's, nor ours, nor the host's.
            namespace_fd = self._gofer.open(MOUNT_NAMESPACE)
            stack.callback(os.close, namespace_fd)
            seen = os.fstat(namespace_fd)
            self._namespace = (seen.st_dev, seen.st_ino)
            if self._namespace in foreign_namespaces():
                raise HolderRefused("the gofer runs in the host's or the runtime's own mount namespace")
            # 4. Its root is the container's root file system: the directory that the host has at `root.path`.
            root = identify_root(container.bundle, container.root_path)
            root_fd = _await_root(self._gofer, root)
            stack.callback(os.close, root_fd)
            host_root_fd = root.open_here()
            stack.callback(os.close, host_root_fd)
            # The sandbox makes every other mount itself, over what the gofer has there.
            covering = (*container.mount_destinations, *container.tmpfs_destinations, *container.memory_volumes)
            ground = Ground(root, namespace_fd, root_fd, host_root_fd, covering=covering)
            super().__init__("runsc", sandbox, ground, stack, keeper=self._gofer)
            # 5. What was opened belongs to two processes, which live still.
            self.verify_unchanged()
            self._descriptors = stack.pop_all()

    def verify_unchanged(self) -> None:
        """Raise unless sandbox and gofer live still, and the gofer is where it was.

        Raises:
            HolderGone: They do not.
        """
        self.process.verify_same()
        verify_namespace_unchanged(self._gofer, self._namespace)


def _await_root(gofer: HeldProcess, root: RootIdentity) -> int:
    """The gofer's root directory as it sees it, once the gofer has chrooted to it; the caller closes it.

    The hook may come before the gofer's last step; until then its root is another directory.

    Raises:
        HolderRefused: It is another directory still when the time is over.
        HolderGone: The gofer ended.
        SystemCallFailed: It cannot be opened.
    """
    deadline = time.monotonic() + _ROOT_SECONDS
    while True:
        # Its last step is a chroot to /root of its namespace; nothing changes after that.
        final = gofer.link("root") == _GOFER_ROOT
        fd = gofer.open_directory("root")
        if root.is_at(fd):
            return fd
        os.close(fd)
        if final or time.monotonic() >= deadline:
            raise HolderRefused("the gofer's root is not the container's root file system")
        time.sleep(_ROOT_POLL_SECONDS)
