"""runc and crun: the holder is the container's init (`state.pid`), which waits while the hook runs.

It is a child of the runtime, as the hook is, in a mount namespace of its own, where the root file system is the very
directory that the hook sees at `root.path`. All of this is checked. `state.pid`'s own executable says nothing (it reads
`/`). Facts: docs/runtimes.md.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from oci_hook.delivery.holder import (
    MOUNT_NAMESPACE,
    ContainerView,
    Ground,
    Holder,
    Runtime,
    foreign_namespaces,
    identify_root,
    verify_namespace_unchanged,
)
from oci_hook.errors import HolderRefused
from oci_hook.linux.processes import HeldProcess, ancestors


class ContainerInit(Holder):
    """The container's init, held until the `with` block ends.

    Args:
        container: The container.
        name: The runtime's.
        runtime: The process that runs this hook.

    Raises:
        HolderRefused: A check below failed.
        HolderGone: The process ended meanwhile.
        SpecInvalid: `root.path` is no directory.
        SystemCallFailed: Something in /proc cannot be read.
    """

    def __init__(self, container: ContainerView, name: Runtime, runtime: HeldProcess) -> None:
        with ExitStack() as stack:
            process = stack.enter_context(HeldProcess(container.pid))
            # 1. The runtime made it: no other container's, no successor of a pid that was used before.
            _verify_made_by(process, runtime, name)
            # 2. Its mount namespace is neither the runtime's, nor ours, nor the host's.
            namespace_fd = process.open(MOUNT_NAMESPACE)
            stack.callback(os.close, namespace_fd)
            seen = os.fstat(namespace_fd)
            self._namespace = (seen.st_dev, seen.st_ino)
            if self._namespace in foreign_namespaces():
                raise HolderRefused("the container runs in the host's or the runtime's own mount namespace")
            # 3. The root file system is a directory below the host's, not the host's own. That it lies in the
            #    namespace is seen by the child that enters it (`RootIdentity.open_in_namespace`).
            ground = Ground(identify_root(container.bundle, container.root_path), namespace_fd)
            super().__init__(name, process, ground, stack, keeper=process)
            # 4. What was opened belongs to one process, which lives still.
            self.verify_unchanged()
            self._descriptors = stack.pop_all()

    def verify_unchanged(self) -> None:
        """Raise unless the process lives still, with the parent, start time and mount namespace that it had.

        Raises:
            HolderGone: It does not.
        """
        verify_namespace_unchanged(self.process, self._namespace)


def _verify_made_by(process: HeldProcess, runtime: HeldProcess, name: Runtime) -> None:
    """Raise unless the runtime made the process.

    It is the runtime's child. crun forks once more where a user namespace meets namespaces that exist already (podman's
    `--uidmap` with a network namespace); the process in between has ended then, and an ancestor of the runtime that
    reaps orphans (conmon, init) has adopted the container's.

    Raises:
        HolderRefused: It did not.
        HolderGone: One of them ended.
        SystemCallFailed: /proc cannot be read.
    """
    if process.parent_pid == runtime.pid:
        return
    younger = process.start_time >= runtime.start_time
    if name == "crun" and younger and process.parent_pid in ancestors(runtime):
        return
    raise HolderRefused(f"process {process.pid} was not made by the runtime that started this hook")
