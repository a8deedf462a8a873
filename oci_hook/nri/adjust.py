"""What a container that is about to be created asks for, and what is added to it: values in, values out, no I/O.

The pod's annotations are whoever's made the pod, those of the container's message are config.json's; both select, and
neither says which engine this is. The pod's uid and the container's name are fields of NRI's messages, which the engine
fills in from the sandbox that it made: an annotation of that meaning is overwritten by them. NRI, `PodSandbox` and
`Container`; docs/nri.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from oci_hook.documents import Fields, parse_object
from oci_hook.errors import InternalError
from oci_hook.invocation import ENVIRONMENT, Invocation, parse_invocation
from oci_hook.nri.messages import Adjustment, Container, Hook, Hooks, Mount, PodSandbox
from oci_hook.oci.annotations import (
    CONTAINER_WIDE_KEYS,
    PREFIX,
    Requests,
    gather_requests,
    has_ours,
    merge_annotations,
    parse_requests,
)
from oci_hook.oci.edit import HOOK_SECONDS

STAGES = ("prestart", "poststop")
MAX_ANSWER_BYTES = 1 << 20
_LAUNCHER_AT = 4  # in a hook's arguments: interpreter, -I, -S, launch.py, then what `parse_invocation` reads
_WHERE = "the pod and the container"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a container asks for.

    Attributes:
        annotations: Those of ours, the pod's and the container's together.
        given: What devices of CDI ask for, by the arguments of their hooks, together.
        requests: Both, for this container; with no model, none of them concerns it.
        has_hooks: Our hooks are there for all of it by another way (hooks.d, a device of CDI): none is added again.
    """

    annotations: Mapping[str, str]
    given: Mapping[str, str]
    requests: Requests
    has_hooks: bool


def wanted(pod: PodSandbox, container: Container) -> Wanted:
    """Read what is asked for.

    Raises:
        AnnotationInvalid: An annotation of ours is unknown or malformed, or pod and container contradict each other.
    """
    of_pod, of_container = (
        {key: text for key, text in each.annotations.items() if key.startswith(PREFIX)} for each in (pod, container)
    )
    annotations = merge_annotations(of_pod, of_container, _WHERE)
    present = [found for hook in container.hooks.prestart if (found := _our_hook(hook)) is not None]
    given = _together([invocation.requests for invocation in present if invocation.requests])
    if not has_ours(annotations) and not given:
        return Wanted({}, {}, Requests((), ()), has_hooks=bool(present))
    requests = gather_requests(annotations, given, container.name or None)
    by_device = bool(given) and annotations.keys() <= CONTAINER_WIDE_KEYS  # its own hook reads what holds for all
    has_hooks = by_device or any(not invocation.requests for invocation in present)
    return Wanted(annotations, given, requests, has_hooks)


def _together(devices: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """What several devices ask for, as if it were one: each has the same slots, so they get others here.

    Raises:
        AnnotationInvalid: One of them asks in words that are none, or they differ in what holds for all of a container.
    """
    if not devices or all(each == devices[0] for each in devices):
        return devices[0] if devices else {}
    wide: Mapping[str, str] = {}
    models: dict[tuple[str, str], None] = {}  # an ordered set: one model may be asked for by two
    for each in devices:
        wide = merge_annotations(wide, {k: text for k, text in each.items() if k in CONTAINER_WIDE_KEYS}, "two devices")
        models.update(dict.fromkeys((str(one.reference), one.destination) for one in parse_requests(each).models))
    slots = {f"{PREFIX}model.{n}": reference for n, (reference, _) in enumerate(models)}
    paths = {f"{PREFIX}path.{n}": destination for n, (_, destination) in enumerate(models)}
    return {**wide, **slots, **paths}


def _our_hook(hook: Hook) -> Invocation | None:
    """The command line of a hook of ours; hooks are in config.json by root's files alone (CDI, hooks.d, plugins)."""
    own = Invocation("prestart").command()[:_LAUNCHER_AT]
    return parse_invocation(hook.args[_LAUNCHER_AT:]) if list(hook.args[:_LAUNCHER_AT]) == own else None


def is_vm(handler: str, patterns: Sequence[str]) -> bool:
    """Whether containers of a runtime handler run in a virtual machine, as root's configuration says."""
    return any(fnmatchcase(handler, pattern) for pattern in patterns)


def adjustment(asked: Wanted, binds: Sequence[Mount], *, engine: str, config_file: str) -> Adjustment:
    """What is added: our hooks, the annotations that they read, and for a virtual machine the models' bind mounts.

    Args:
        asked: What the container asks for.
        binds: Of `parse_binds`; none where the hook delivers.
        engine: Whose annotations the hook believes.
        config_file: Path of the configuration, for the hook.
    """
    hooks = Hooks()
    if not asked.has_hooks:
        # In a virtual machine all came at once, and one hook compares all; elsewhere each device's own delivers.
        given = asked.given if binds else {}
        hooks = Hooks(**{stage: (_hook(stage, engine, config_file, given),) for stage in STAGES})
    return Adjustment(annotations=asked.annotations, mounts=tuple(binds), hooks=hooks)


def _hook(stage: str, engine: str, config_file: str, given: Mapping[str, str]) -> Hook:
    command = Invocation(stage, config_file=config_file, engine=engine, requests=given).command()
    return Hook(command[0], tuple(command), ENVIRONMENT, HOOK_SECONDS)


# --- a virtual machine: what `launch.py prepare` reads and writes -----------------------------------------------------


def asking(pod: PodSandbox, container: Container, asked: Wanted, engine: str, creator: tuple[int, int]) -> bytes:
    """What the stage `prepare` reads: the container, who makes it, and as much of config.json as NRI tells.

    The memory limit is not: it is the guest's, and the model lies on the host.

    Args:
        asked: Of `wanted`.
        engine: In whose annotations `prepare` looks for the facts; NRI's own fields are put there.
        creator: Pid and start time of a process that lives until the container's is known.
    """
    spec = {
        "annotations": {**asked.annotations, **_facts(pod, container, engine)},
        "mounts": [
            {"destination": m.destination, "type": m.type, "source": m.source, "options": list(m.options)}
            for m in container.mounts
        ],
        "linux": {
            "namespaces": [
                {"type": one.type, **({"path": one.path} if one.path else {})} for one in container.namespaces
            ],
            "cgroupsPath": container.cgroups_path,
        },
    }
    document = {
        "container_id": container.id,
        "bundle": "",
        "runtime": "kata",
        "creator": list(creator),
        "spec": spec,
    }
    return json.dumps(document).encode()


def _facts(pod: PodSandbox, container: Container, engine: str) -> dict[str, str]:
    """NRI's fields under the keys of `oci.engine`; of the annotations themselves none of the engine's is passed on."""
    if engine == "cri-o":
        labels = {"io.kubernetes.pod.uid": pod.uid} if pod.uid else {}
        return {
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.Metadata": json.dumps({"name": container.name}),
            "io.kubernetes.cri-o.Labels": json.dumps(labels),
        }
    facts = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": container.name}
    return {**facts, "io.kubernetes.cri.sandbox-uid": pod.uid} if pod.uid else facts


def parse_binds(data: bytes) -> tuple[Mount, ...]:
    """The bind entries that `prepare` printed.

    Raises:
        InternalError: They are not of its form.
    """
    document = parse_object(data, limit_bytes=MAX_ANSWER_BYTES, what="the answer of prepare", error=InternalError)
    return Fields(document, what="the answer of prepare", error=InternalError).items("binds", _bind, low=1, high=64)


def _bind(value: object) -> Mount:
    fields = Fields(value, what="a bind entry", error=InternalError)
    destination, source = (fields.string(name, pattern=r"/[^\x00]+", limit=4096) for name in ("destination", "source"))
    options = fields.strings("options", low=1, high=16)
    fields.finish()
    return Mount(destination, "bind", source, options)
