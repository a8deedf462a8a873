"""NRI's messages to and from protobuf: the table of their fields, and the values of `messages`.

Nothing is checked here but protobuf's types. NRI, pkg/api/api.proto; docs/nri.md, "Messages".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oci_hook.errors import EngineUnsupported
from oci_hook.nri.messages import (
    Adjustment,
    Container,
    Event,
    Hook,
    Hooks,
    Mount,
    Namespace,
    PodSandbox,
    Settings,
)
from oci_hook.nri.schema import Schema

#: Field numbers of the published protocol, as of NRI 0.12; 0.3 has the same numbers for what it has. A container's
#: arguments, environment and labels are left out: others' secrets are there, and nothing here needs them.
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
        "ValidateRequest": "container=2:Container adjust=3:Validated",
        "Validated": "mounts=3:Mount* hooks=5:Hooks",
        "ValidateResponse": "reject=1:bool reason=2",
        "PodSandbox": "id=1 name=2 uid=3 namespace=4 annotations=6% runtime_handler=7 "
        "linux=8:LinuxPodSandbox pid=9:uint32",
        "LinuxPodSandbox": "cgroup_parent=3 cgroups_path=4",
        "Container": "id=1 pod_sandbox_id=2 name=3 state=4:int32 annotations=6% mounts=9:Mount* "
        "hooks=10:Hooks linux=11:LinuxContainer pid=12:uint32 CDI_devices=20:CDIDevice* user=21:User",
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
#: Of pods and containers in one message; a node runs hundreds.
MAX_OBJECTS = 1 << 16
STAGES = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


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
    count = len(found.pods) + len(found.containers)
    if count > MAX_OBJECTS:  # two bytes are enough for one, which takes a kilobyte here
        raise EngineUnsupported(f"the engine lists {count} pods and containers, more than {MAX_OBJECTS}")
    return tuple(map(_pod, found.pods)), tuple(map(_container, found.containers)), found.more


def parse_event(data: bytes) -> tuple[PodSandbox, Container]:
    """A request about one pod or one container; what is absent has an empty id."""
    found = _SCHEMA.parse("Event", data)
    return _pod(found.pod), _container(found.container)


def parse_state_change(data: bytes) -> tuple[int, PodSandbox, Container]:
    """A StateChangeEvent, in which engines before NRI 0.12 tell the events that have no answer."""
    found = _SCHEMA.parse("StateChangeEvent", data)
    return found.event, _pod(found.pod), _container(found.container)


def parse_validation(data: bytes) -> tuple[str, Adjustment]:
    """A ValidateContainerAdjustmentRequest: the container's id, and the mounts and hooks that all plugins add."""
    found = _SCHEMA.parse("ValidateRequest", data)
    return found.container.id, Adjustment(mounts=_mounts(found.adjust.mounts), hooks=_hooks(found.adjust.hooks))


def _pod(found: Any) -> PodSandbox:
    return PodSandbox(
        id=found.id,
        name=found.name,
        uid=found.uid,
        namespace=found.namespace,
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
        annotations=dict(found.annotations),
        mounts=_mounts(found.mounts),
        hooks=_hooks(found.hooks),
        namespaces=tuple(Namespace(one.type, one.path) for one in linux.namespaces),
        cgroups_path=linux.cgroups_path,
        memory_limit_bytes=memory.limit.value if memory.HasField("limit") else None,
        pid=found.pid,
        cdi_devices=tuple(device.name for device in found.CDI_devices),
        user=user,
    )


def _mounts(found: Any) -> tuple[Mount, ...]:
    return tuple(Mount(one.destination, one.type, one.source, tuple(one.options)) for one in found)


def _hooks(found: Any) -> Hooks:
    return Hooks(**{stage: tuple(map(_hook, getattr(found, stage))) for stage in STAGES})


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
    for stage in STAGES:
        for hook in getattr(adjustment.hooks, stage):
            limit = None if hook.timeout_seconds is None else _SCHEMA.new("OptionalInt", value=hook.timeout_seconds)
            message = _SCHEMA.new("Hook", path=hook.path, args=hook.args, env=hook.env, timeout=limit)
            getattr(adjust.hooks, stage).append(message)
    return _bytes(_SCHEMA.new("CreateContainerResponse", adjust=adjust))


def validated(reason: str) -> bytes:
    """A ValidateContainerAdjustmentResponse: a reason rejects, none accepts."""
    return _bytes(_SCHEMA.new("ValidateResponse", reject=bool(reason), reason=reason))


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data
