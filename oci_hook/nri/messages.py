"""What an engine and a plugin say to each other: NRI's messages as frozen values.

Only what this program needs is here. The engine wrote it all; annotations, names, arguments and mounts come from
whoever made the pod. NRI, package `nri.pkg.api.v1alpha1`; docs/nri.md.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Event(enum.IntEnum):
    """What a plugin can subscribe to (enum Event). Engines before NRI 0.10 refuse whoever asks for one after 11."""

    RUN_POD_SANDBOX = 1
    STOP_POD_SANDBOX = 2
    REMOVE_POD_SANDBOX = 3
    CREATE_CONTAINER = 4
    POST_CREATE_CONTAINER = 5
    START_CONTAINER = 6
    POST_START_CONTAINER = 7
    UPDATE_CONTAINER = 8
    POST_UPDATE_CONTAINER = 9
    STOP_CONTAINER = 10
    REMOVE_CONTAINER = 11
    VALIDATE_CONTAINER_ADJUSTMENT = 14


class ContainerState(enum.IntEnum):
    """A container's state, as the engine says it (enum ContainerState)."""

    UNKNOWN = 0
    CREATED = 1
    PAUSED = 2
    RUNNING = 3
    STOPPED = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine says of itself when it configures the plugin.

    Attributes:
        config: The plugin's part of NRI's configuration, for plugins that the engine starts; else empty.
        runtime_name: The engine: `containerd`, `cri-o`.
        runtime_version: Its version, as it says it.
        registration_seconds: How long it waits for a registration; 0 if it does not say (NRI before 0.7).
        request_seconds: How long it waits for an answer: then it goes on **without** the plugin. 0 if it does not say.
        nri_version: Empty if it does not say (NRI before 0.12).
    """

    config: str
    runtime_name: str
    runtime_version: str
    registration_seconds: float
    request_seconds: float
    nri_version: str


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount of config.json."""

    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hook:
    """One OCI hook; a timeout in seconds, or None."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Hooks:
    """OCI hooks by stage."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Namespace:
    """A Linux namespace of a container: `pid`, `mount`, …; the path that it joins, empty for a new one."""

    type: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class PodSandbox:
    """A pod.

    Attributes:
        id: The engine's.
        uid: Kubernetes'.
        runtime_handler: The runtime class's handler; empty for the engine's default.
        pid: Of the sandbox's process; 0 if the engine does not say.
        cgroup_parent: As Kubernetes gave it; empty if absent.
    """

    id: str
    name: str = ""
    uid: str = ""
    namespace: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    runtime_handler: str = ""
    pid: int = 0
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """A container.

    Attributes:
        id: The engine's.
        pod_id: Its pod's.
        state: `ContainerState`, or a number that a newer engine knows.
        mounts: Of its config.json, in their order.
        hooks: Of its config.json, those of CDI and base specifications among them where the engine applied them before.
        namespaces: Of its config.json.
        cgroups_path: Of its config.json; empty if absent.
        memory_limit_bytes: None if there is none.
        pid: Of its first process; 0 before it exists, and where the engine does not say.
        cdi_devices: Qualified names; engines before NRI 0.10 do not say them.
        user: uid, gid and further gids; None where the engine does not say (NRI before 0.11).
    """

    id: str
    pod_id: str = ""
    name: str = ""
    state: int = ContainerState.UNKNOWN
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks = Hooks()
    namespaces: tuple[Namespace, ...] = ()
    cgroups_path: str = ""
    memory_limit_bytes: int | None = None
    pid: int = 0
    cdi_devices: tuple[str, ...] = ()
    user: tuple[int, int, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What is added to a container that is being created. The engine refuses what another plugin set too.

    Attributes:
        annotations: Added or replaced; a key that begins with `-` removes the rest of it.
        mounts: Added; one with a destination that is there replaces it.
        env: Added or replaced: `NAME=value`.
        hooks: Added after those that are there.
    """

    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    env: tuple[str, ...] = ()
    hooks: Hooks = Hooks()
