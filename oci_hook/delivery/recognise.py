"""Who holds a container's root file system: the runtime that runs this hook decides, by ways that are known.

The hook's parent process is the runtime. What is not recognised is refused, never guessed. Under a VM sandbox nothing
is held: what the state names is a hypervisor or a thread of the runtime, whose mount namespace is the host's; there the
models come before `create` (`delivery.bound`). Facts: docs/runtimes.md.
"""

from __future__ import annotations

import os
import re
from typing import cast

from oci_hook.delivery.agent import AgentInit
from oci_hook.delivery.container_init import ContainerInit
from oci_hook.delivery.gofer import Gofer
from oci_hook.delivery.holder import ContainerView, Holder, Runtime
from oci_hook.delivery.host_side import HostSide
from oci_hook.documents import shown
from oci_hook.errors import HolderRefused
from oci_hook.linux.processes import HeldProcess, process_of_thread

_RUNTIME = re.compile(r"(?:(runc|crun|runsc)|kata-runtime|containerd-shim-kata)(?:[^a-z].*)?", re.DOTALL)
_BEFORE_CREATE = (
    "let the model come before create: `sczctl install --engine podman --before-create` and smm.scz/require with "
    "runtime=kata, `sczctl install --engine containerd --nri`, or the shim before kata-runtime"
)


def recognise_runtime(executable_name: str) -> Runtime:
    """The runtime whose executable has this name: one that is known, or one followed by what is not a small letter.

    Raises:
        HolderRefused: It is none of them.
    """
    found = _RUNTIME.fullmatch(executable_name)
    if found is None:
        raise HolderRefused(f"the runtime {shown(executable_name)} is not recognised")
    return cast(Runtime, found[1] or "kata")


def hold(container: ContainerView, *, runtime_directory: str, timeout_seconds: float) -> Holder:
    """Find the holder and hold it; its `with` block lets it go.

    Args:
        container: What the state and config.json say.
        runtime_directory: Root's own, for what must be remembered of mounts on the host's side.
        timeout_seconds: For the lock of that.

    Raises:
        HolderRefused: It is not recognised.
        EngineUnsupported: gVisor is told to keep a container's writes on the host's disk.
        HolderGone: It ended meanwhile.
        SpecInvalid: `root.path` is no directory.
        SystemCallFailed: Something in /proc cannot be read.
    """
    # 1. The container has a mount namespace of its own, not another's by path.
    if container.mount_namespace_joined:
        raise HolderRefused("config.json joins another mount namespace by path")
    if container.pid <= 1:
        raise HolderRefused(f"the state names process {container.pid}")
    if container.agent is not None:
        return AgentInit(container, container.agent)
    leader = process_of_thread(container.pid)
    with HeldProcess(os.getppid()) as runtime:
        # 2. The runtime that runs this hook is one whose ways are known, and shares its kernel with the container.
        name = recognise_runtime(runtime.executable_name())
        if name == "kata":
            raise HolderRefused(
                "under a VM sandbox a model must be there before create, and no bind entry of ours was made for this "
                "container: what is mounted now would stay on the host",
                remedy=_BEFORE_CREATE,
            )
        if leader != container.pid:
            raise HolderRefused(
                f"the state names {container.pid}, a thread: a VM sandbox's runtime does that", remedy=_BEFORE_CREATE
            )
        if name != "runsc":
            return ContainerInit(container, name, runtime)
        # 3. Under gVisor the runtime that makes a sandbox is its parent; one that finds it in place is not.
        with HeldProcess(container.pid) as process:
            is_made_now = process.parent_pid == runtime.pid
        if not is_made_now:
            return HostSide(container, runtime, runtime_directory=runtime_directory, timeout_seconds=timeout_seconds)
        return Gofer(container, runtime)
