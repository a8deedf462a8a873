"""VM sandboxes: whether a model can be there before the runtime is called; who else reads podman's file for that."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from oci_hook.cli.checks.check import Check, failed
from oci_hook.cli.checks.hooks import our_hooks, read_directories
from oci_hook.engines import podman
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import HostFiles, Settings
from oci_hook.engines.programs import find_program
from oci_hook.errors import SczError

_KATA = ("kata-runtime", "containerd-shim-kata-v2")
_INSTALL = "sczctl install --engine podman --before-create"
_BUILDAH_READS = (DEFAULT_DIRECTORY, "/etc/containers/oci/hooks.d")
"""Whatever containers.conf says (buildah 1.28)."""


def check_kata(files: HostFiles) -> Iterator[Check]:
    """The programs of Kata that are here."""
    for name in _KATA:
        path = find_program(name, files)
        if path is not None:
            message = f"{path}: a VM sandbox; what a hook mounts does not reach its guest, what is there before does"
            yield Check(f"runtime {name}", "ok", message)


def check_before_create(settings: Settings, files: HostFiles) -> Iterator[Check]:
    """podman's `precreate`: written, read by podman, and followed by the hooks that check."""
    name = "before create podman"
    try:
        state = podman.before_create_state(settings, files)
        after = podman.state(replace(settings, hooks_directory=_ordinary(files)), files)
    except SczError as error:
        yield failed(name, error)
        return
    kata = any(find_program(program, files) for program in _KATA)
    if state == "no" and kata:
        message = "not installed: podman's containers under Kata are refused"
        yield Check(name, "warn", message, f"`{_INSTALL}`")
    elif state not in ("yes", "no"):
        yield Check(name, "fail", f"{state}: containers that ask for a VM are refused", f"`{_INSTALL}`")
    elif state == "yes" and after != "yes":
        message = f"the hooks that check and remove the model are not there ({after}): containers that ask for a VM are"
        yield Check(name, "fail", f"{message} refused", f"`{_INSTALL}`")
    elif state == "yes":
        message = f"{podman.PRECREATE_FILE}, for smm.scz/require with runtime=kata"
        yield Check(name, "ok", message)


def _ordinary(files: HostFiles) -> str | None:
    """Where the other hooks of podman's lie; None: in the default directory."""
    for directory in reversed(read_directories("podman", files)):
        if any("prestart" in hook.stages and hook.engine == "podman" for hook in our_hooks(directory, files)[0]):
            return directory
    return None


def check_other_readers(files: HostFiles) -> Iterator[Check]:
    """Files for `precreate` where buildah or CRI-O reads them: these give up at a stage that they do not know."""
    readers = {directory: ["`podman build` and buildah"] for directory in _BUILDAH_READS}
    try:
        for directory in read_directories("cri-o", files):
            readers.setdefault(directory, []).append("CRI-O")
    except SczError:
        pass  # its own line says so, where it is installed
    for directory, names in readers.items():
        for hook in our_hooks(directory, files)[0]:
            if "precreate" in hook.stages:
                message = f"{hook.path}: {' and '.join(names)} read it, do not know its stage, and fail"
                remedy = f"rm {shlex.quote(hook.path)}, then `{_INSTALL}`"
                yield Check("before create podman", "fail", message, remedy)
