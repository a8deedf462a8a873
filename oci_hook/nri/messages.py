"""What an engine and a plugin say to each other: NRI's messages as frozen values, to and from protobuf.

Only what this program needs is here. The engine wrote it all; annotations, names, arguments and mounts come from
whoever made the pod. Nothing is checked here but protobuf's types. NRI, package `nri.pkg.api.v1alpha1`; docs/nri.md.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oci_hook.nri.schema import Schema

#: Field numbers of the published protocol, as of NRI 0.12; 0.3 has the same numbers for what it has.
_SCHEMA = Schema(
    "nri.pkg.api.v1alpha1",
    {
        "RegisterPluginRequest": "plugin_name=1 plugin_idx=2 NRI_version=3",
        "ConfigureRequest": "config=1 runtime_name=2 runtime_version=3 registration_timeout=4:int64 "
        "request_timeout=5:int64 NRI_version=6",
        "ConfigureResponse": "events=2:int32",
        "SynchronizeRequest": "pods=1:PodSandbox* containers=2:Container* more=3:bool",
        "SynchronizeResponse": "more=2:bool",
        "Event": "pod=1:PodSandbox container=2:Container",  # all requests about one pod or container begin so
        "StateChangeEvent": "event=1:int32 pod=2:PodSandbox container=3:Container",
        "CreateContainerResponse": "adjust=1:ContainerAdjustment",
        "PodSandbox": "id=1 name=2 uid=3 namespace=4 labels=5% annotations=6% runtime_handler=7 "
        "linux=8:LinuxPodSandbox pid=9:uint32",
        "LinuxPodSandbox": "cgroup_parent=3 cgroups_path=4",
        "Container": "id=1 pod_sandbox_id=2 name=3 state=4:int32 labels=5% annotations=6% args=7* env=8* "
        "mounts=9:Mount* hooks=10:Hooks linux=11:LinuxContainer pid=12:uint32 CDI_devices=20:CDIDevice* user=21:User",
        "Mount": "destination=1 type=2 source=3 options=4*",
        "Hooks": "prestart=1:Hook* create_runtime=2:Hook* create_container=3:Hook* start_container=4:Hook* "
        "poststart=5:Hook* poststop=6:Hook*",
        "Hook": "path=1 args=2* env=3* timeout=4:OptionalInt",
        "OptionalInt": "value=1:int64",
        "LinuxContainer": "namespaces=1:LinuxNamespace* resources=3:LinuxResources cgroups_path=5",
        "LinuxNamespace": "type=1 path=2",
        "LinuxResources": "memory=1:LinuxMemory",
        "LinuxMemory": "limit=1:OptionalInt",
        "CDIDevice": "name=1",
        "User": "uid=1:uint32 gid=2:uint32 additional_gids=3:uint32*",
        "ContainerAdjustment": "annotations=2% mounts=3:Mount* env=4:KeyValue* hooks=5:Hooks",
        "KeyValue": "key=1 value=2",
    },
)
_STAGES = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


class Event(enum.IntEnum):
    """What a plugin can subscribe to (enum Event). Those after 11 are unknown to the engines before 2.2."""

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
    labels: Mapping[str, str] = field(default_factory=dict)
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
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
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


# --- the engine's -----------------------------------------------------------------------------------------------------


def parse_settings(data: bytes) -> Settings:
    """A ConfigureRequest.

    Raises:
        EngineUnsupported: It is malformed; so in all of these.
    """
    found = _SCHEMA.parse("ConfigureRequest", data)
    return Settings(
        config=found.config,
        runtime_name=found.runtime_name,
        runtime_version=found.runtime_version,
        registration_seconds=max(found.registration_timeout, 0) / 1000,
        request_seconds=max(found.request_timeout, 0) / 1000,
        nri_version=found.NRI_version,
    )


def parse_synchronize(data: bytes) -> tuple[tuple[PodSandbox, ...], tuple[Container, ...], bool]:
    """A SynchronizeRequest: pods, containers, and whether more of them follow in another request."""
    found = _SCHEMA.parse("SynchronizeRequest", data)
    return tuple(map(_pod, found.pods)), tuple(map(_container, found.containers)), found.more


def parse_event(data: bytes) -> tuple[PodSandbox, Container]:
    """A request about one pod or one container; what is absent has an empty id."""
    found = _SCHEMA.parse("Event", data)
    return _pod(found.pod), _container(found.container)


def parse_state_change(data: bytes) -> tuple[int, PodSandbox, Container]:
    """A StateChangeEvent, in which engines before NRI 0.12 tell the events that have no answer."""
    found = _SCHEMA.parse("StateChangeEvent", data)
    return found.event, _pod(found.pod), _container(found.container)


def _pod(found: Any) -> PodSandbox:
    return PodSandbox(
        id=found.id,
        name=found.name,
        uid=found.uid,
        namespace=found.namespace,
        labels=dict(found.labels),
        annotations=dict(found.annotations),
        runtime_handler=found.runtime_handler,
        pid=found.pid,
        cgroup_parent=found.linux.cgroup_parent,
    )


def _container(found: Any) -> Container:
    linux, memory = found.linux, found.linux.resources.memory
    user = (found.user.uid, found.user.gid, tuple(found.user.additional_gids)) if found.HasField("user") else None
    return Container(
        id=found.id,
        pod_id=found.pod_sandbox_id,
        name=found.name,
        state=found.state,
        labels=dict(found.labels),
        annotations=dict(found.annotations),
        args=tuple(found.args),
        env=tuple(found.env),
        mounts=tuple(Mount(one.destination, one.type, one.source, tuple(one.options)) for one in found.mounts),
        hooks=Hooks(**{stage: tuple(map(_hook, getattr(found.hooks, stage))) for stage in _STAGES}),
        namespaces=tuple(Namespace(one.type, one.path) for one in linux.namespaces),
        cgroups_path=linux.cgroups_path,
        memory_limit_bytes=memory.limit.value if memory.HasField("limit") else None,
        pid=found.pid,
        cdi_devices=tuple(device.name for device in found.CDI_devices),
        user=user,
    )


def _hook(found: Any) -> Hook:
    timeout = found.timeout.value if found.HasField("timeout") else None
    return Hook(found.path, tuple(found.args), tuple(found.env), timeout)


# --- ours -------------------------------------------------------------------------------------------------------------


def registration(name: str, index: str, version: str) -> bytes:
    """A RegisterPluginRequest."""
    return _bytes(_SCHEMA.new("RegisterPluginRequest", plugin_name=name, plugin_idx=index, NRI_version=version))


def configured(events: Iterable[Event]) -> bytes:
    """A ConfigureResponse that subscribes to the events: bit n-1 for the event n."""
    return _bytes(_SCHEMA.new("ConfigureResponse", events=sum(1 << (event - 1) for event in set(events))))


def synchronized(*, more: bool) -> bytes:
    """A SynchronizeResponse; `more` says that a request that announces another one was understood."""
    return _bytes(_SCHEMA.new("SynchronizeResponse", more=more))


def created(adjustment: Adjustment | None) -> bytes:
    """A CreateContainerResponse."""
    if adjustment is None:
        return b""
    adjust = _SCHEMA.new(
        "ContainerAdjustment",
        annotations=dict(adjustment.annotations),
        mounts=[
            _SCHEMA.new("Mount", destination=one.destination, type=one.type, source=one.source, options=one.options)
            for one in adjustment.mounts
        ],
        env=[
            _SCHEMA.new("KeyValue", key=key, value=value)
            for key, _, value in (e.partition("=") for e in adjustment.env)
        ],
    )
    for stage in _STAGES:
        for hook in getattr(adjustment.hooks, stage):
            limit = None if hook.timeout_seconds is None else _SCHEMA.new("OptionalInt", value=hook.timeout_seconds)
            message = _SCHEMA.new("Hook", path=hook.path, args=hook.args, env=hook.env, timeout=limit)
            getattr(adjust.hooks, stage).append(message)
    return _bytes(_SCHEMA.new("CreateContainerResponse", adjust=adjust))


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data
