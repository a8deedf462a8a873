"""What is compared, before `create` and in the prestart hook, where models come by bind entries. No key is in reach.

Specification: OCI runtime specification, "Mounts"; docs/adr/0014-before-create.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast, get_args

from oci_hook.delivery.bound_folders import bound_directory, folder_of, place_of
from oci_hook.delivery.destination import parse_destinations
from oci_hook.delivery.holder import Runtime, open_directory
from oci_hook.delivery.host_records import BoundRecord
from oci_hook.delivery.recognise import recognise_runtime
from oci_hook.documents import shown
from oci_hook.errors import (
    DestinationInvalid,
    DestinationRefused,
    EngineUnsupported,
    HolderRefused,
    RequirementRefused,
    StateInvalid,
)
from oci_hook.linux.processes import HeldProcess, process_of_thread
from oci_hook.oci.annotations import ModelRequest
from oci_hook.oci.spec import Mount, Spec
from oci_hook.oci.state import CONTAINER_ID

OPTIONS = ("bind", "ro", "nosuid", "nodev", "noexec")
"""Of every bind entry of ours. Never `rbind`: nothing lies below a model."""
_EMPTY_DIR = "kubernetes.io~empty-dir"
_PATH_LIMIT_BYTES = 4095
_INIT = 1
_MONITORS = ("conmon", "conmonrs")


@dataclass(frozen=True, slots=True)
class BindEntry:
    """A mount for config.json, of type `bind`.

    Attributes:
        destination: In the container, as the annotation names it.
        source: Directory on the host: the root of the model's read-only tmpfs.
        options: `OPTIONS`.
    """

    destination: str
    source: str
    options: tuple[str, ...] = OPTIONS

    def is_entry(self, mount: Mount) -> bool:
        """Whether a mount of config.json is exactly this."""
        return mount == Mount(self.destination, "bind", self.source, self.options)


# --- before `create` --------------------------------------------------------------------------------------------------


def verify_container(container_id: str, creator: tuple[int, int], runtime: str) -> Runtime:
    """Whether a record can be made of this at all; returns the runtime.

    Raises:
        StateInvalid: The id is none, or no process creates the container.
        EngineUnsupported: The runtime is not known.
    """
    if not re.fullmatch(CONTAINER_ID, container_id) or creator[0] <= 0 or creator[1] < 0:
        raise StateInvalid("nothing can be made ready: no container, or no process that creates it, is named")
    if runtime not in get_args(Runtime):
        raise EngineUnsupported(f"models are not made ready for the runtime {shown(runtime)}")
    return cast(Runtime, runtime)


def plan_entries(
    container_id: str, bundle: str, spec: Spec, requests: Sequence[ModelRequest], runtime_directory: str
) -> tuple[BindEntry, ...]:
    """The bind entries that a container will get, or the reason why it cannot get them.

    The paths follow from the container's id and bundle alone: a config.json that has the entries already, because its
    container is created once more, is not refused for them.

    Args:
        container_id: The engine's.
        bundle: Absolute path of the OCI bundle, without links; empty where it is not known.
        spec: config.json.
        requests: The models.
        runtime_directory: Root's own, such as /run/scz-smm.

    Raises:
        HolderRefused: The container joins another mount namespace.
        EngineUnsupported: A bundle of the image is asked for, and where that lies is not known.
        DestinationInvalid: A destination cannot be used, or a path would be too long.
        DestinationRefused: Another mount of config.json would hide it, Kata would put something else there, or another
            mount would show the models of other containers.
    """
    # 1. The container's mounts are its own.
    if spec.mount_namespace_path is not None or not spec.has_mount_namespace:
        raise HolderRefused("config.json joins another mount namespace by path, or makes none")
    # 2. Where the bundle lies is known.
    for request in requests:
        if request.reference.rootfs_path is not None and not spec.root_path:
            raise EngineUnsupported(
                f"{shown(str(request.reference))} lies in the image, whose root is not known before create",
                remedy="give the bundle to the host's store: `sczctl add`, and name the model",
            )
    # 3. Destinations that can be used, none in another.
    destinations = [request.destination for request in requests]
    parse_destinations(destinations)
    folder = folder_of(runtime_directory, container_id, bundle)
    entries = tuple(BindEntry(destination, place_of(folder, number)) for number, destination in enumerate(destinations))
    for entry in entries:
        # 4. Kata puts an empty tmpfs of the guest in the place of what lies there.
        if _EMPTY_DIR in f"{entry.source}{entry.destination}":
            raise DestinationRefused(
                f"{shown(entry.destination)}: Kata replaces whatever lies below {_EMPTY_DIR}/ by an empty directory "
                "of the guest",
                remedy="choose another smm.scz/path, or another `runtime` directory in the configuration",
            )
        if len(os.fsencode(entry.source)) > _PATH_LIMIT_BYTES:
            raise DestinationInvalid("the path of the run-time directory is too long")
    # 5. Nothing else of config.json lies there, above or below.
    verify_apart(entries, spec.mounts)
    # 6. No other container's models are shown.
    verify_no_others(entries, spec, bound_directory(runtime_directory))
    return entries


def verify_no_others(entries: Sequence[BindEntry], spec: Spec, directory: str) -> None:
    """Raise if config.json shows the container what lies in or above the folders of every container's models.

    Args:
        entries: What it may show.
        spec: config.json; every absolute path of a mount counts, whatever the mount's type: an overlay has layers.
        directory: `bound_directory`.

    Raises:
        DestinationRefused: A mount's source, a path in its options, or the root file system lies there.
    """
    for mount in (Mount("/", "bind", spec.root_path, ()), *spec.mounts):
        if any(entry.is_entry(mount) for entry in entries):
            continue
        words = [mount.source, *(word for option in mount.options for word in re.split("[=:,]", option))]
        for real in {_real(word) for word in words if word.startswith("/")}:
            if _is_in(real, directory) or _is_in(directory, real):
                raise DestinationRefused(
                    f"the mount {shown(mount.destination)} of config.json shows what lies in or above "
                    f"{shown(directory)}: the models of other containers",
                    remedy="give the container a narrower volume than that",
                )


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL: no file
        return path


def verify_apart(entries: Sequence[BindEntry], mounts: Iterable[Mount]) -> None:
    """Raise if a mount of config.json that is none of the entries lies at, above or below one of them.

    Raises:
        DestinationRefused: It would hide the model or a part of it, or the model would lie on a volume.
    """
    for mount in mounts:
        if any(entry.is_entry(mount) for entry in entries):
            continue
        theirs = mount.destination
        for entry in entries:
            ours = entry.destination
            if _is_in(ours, theirs) or _is_in(theirs, ours):
                raise DestinationRefused(
                    f"{shown(entry.destination)} and the mount {shown(mount.destination)} of config.json lie in each "
                    "other: one would hide the other",
                    remedy="choose an smm.scz/path outside of every volume and tmpfs of the container",
                )


def _is_in(path: str, directory: str) -> bool:
    """Whether it is the directory itself, or lies in it."""
    above = _parts(directory)
    return _parts(path)[: len(above)] == above


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


# --- in the prestart hook ---------------------------------------------------------------------------------------------


def verify_runtime(runtime: HeldProcess, record: BoundRecord) -> None:
    """Raise unless the runtime that runs this hook is the one that the models were admitted for.

    Kata is known by the file that it runs alone: under crun, which has none that can be named, the first argument would
    be whatever a link to crun is called.

    Raises:
        RequirementRefused: It is another, or a program that others than root could have put there.
        HolderGone: It ended.
        SystemCallFailed: /proc cannot be read.
    """
    program = runtime.executable_name(by_argument=record.runtime != "kata")
    try:
        name: str = recognise_runtime(program)
    except HolderRefused:
        name = ""
    if name != record.runtime:
        raise RequirementRefused(
            f"the models were made ready for {record.runtime}, and "
            f"{shown(program) if program else 'a program whose file has no name'} runs the container",
            remedy=f"start the container with a runtime that is {record.runtime}, or without smm.scz/require",
        )
    if name == "kata" and not runtime.runs_what_is_roots():  # it says of itself alone that this is a VM
        raise RequirementRefused(f"the runtime {shown(program)} is not root's alone")


def verify_entries(record: BoundRecord, spec: Spec, requests: Sequence[ModelRequest]) -> None:
    """Raise unless config.json shows the container exactly the models of the record, each where it asks for it.

    Raises:
        DestinationRefused: An entry is missing, was changed or is hidden; another model is asked for, or other
            containers' are shown.
    """
    asked = {request.destination for request in requests}
    entries = tuple(BindEntry(mount.destination, mount.path) for mount in record.mounts)
    # One of several hooks, that of a device of CDI, asks for its own model alone; each compares all entries.
    if not asked or not asked <= {entry.destination for entry in entries} or len(asked) != len(requests):
        raise DestinationRefused("the container asks for models at other places than were made ready for it")
    for entry in entries:
        found = [mount for mount in spec.mounts if mount.destination == entry.destination]
        if len(found) != 1 or not entry.is_entry(found[0]):
            raise DestinationRefused(
                f"config.json does not show the model at {shown(entry.destination)} by the one bind entry that was "
                "made for it",
                remedy="let nothing change mounts behind scz-runtime, precreate or scz-nri, and start the container "
                "again",
            )
    verify_apart(entries, spec.mounts)
    for folder in {os.path.dirname(mount.path) for mount in record.mounts}:
        verify_no_others(entries, spec, os.path.dirname(folder))


def verify_in_place(record: BoundRecord) -> None:
    """Raise unless the models lie where the entries lead to, as this process sees it: in the runtime's namespace.

    Raises:
        DestinationRefused: Something else lies there, or nothing.
    """
    for mount in record.mounts:
        there = False
        with suppress(OSError):
            fd = open_directory(mount.path)
            try:
                device = os.fstat(fd).st_dev
                seen = (os.fstatvfs(fd).f_fsid, f"{os.major(device)}:{os.minor(device)}")
                there = seen == (mount.fsid, mount.device)
            finally:
                os.close(fd)
        if not there:
            raise DestinationRefused(
                f"the model for {shown(mount.destination)} is not mounted where the runtime looks for it",
                remedy="let the engine see mounts of the host (no MountFlags= or PrivateMounts= in its unit)",
            )


def lasting_process(pid: int, runtime: HeldProcess) -> tuple[int, int]:
    """Pid and start time of the process that lives as long as the container, as far as the state tells.

    Kata 1 names a thread of the runtime itself. Where that is a shim it stays; where it is a `create` that ends, the
    engine's own monitor is above it. Without one of those nothing would tell a container's end from a killed runtime's.

    Args:
        pid: The state's.
        runtime: The process that runs this hook.

    Raises:
        HolderRefused: The runtime is no shim, and no engine's monitor started it.
        HolderGone: A process ended.
        SystemCallFailed: /proc cannot be read.
    """
    leader = process_of_thread(pid) if pid > _INIT else runtime.pid
    if leader != runtime.pid:
        with HeldProcess(leader) as process:
            return process.pid, process.start_time
    if _is_monitor(runtime):
        return runtime.pid, runtime.start_time
    if runtime.parent_pid > 0:  # 0: of another pid namespace
        with HeldProcess(runtime.parent_pid) as parent:
            if _is_monitor(parent):
                return parent.pid, parent.start_time
            program = parent.executable_name(by_argument=False)
    else:
        program = ""
    raise HolderRefused(
        f"the runtime was started by {shown(program) or 'a program that cannot be seen'}, and names no process that "
        "lives as long as the container: its end would not be seen",
        remedy="let an engine start it: podman or CRI-O by conmon or conmonrs, containerd or Docker by its shim",
    )


def _is_monitor(process: HeldProcess) -> bool:
    """Whether it is an engine's own process that stays with one container or pod.

    Raises:
        HolderRefused: Others than root could have put it there.
    """
    name = process.executable_name(by_argument=False)
    if name not in _MONITORS and not name.startswith("containerd-shim"):
        return False
    if not process.runs_what_is_roots():
        raise HolderRefused(f"{shown(name)}, which stays with the container, is not root's alone")
    return True
