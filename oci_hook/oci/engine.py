"""What an engine itself says of a pod's container, through annotations that only it sets.

Anyone may write these keys under podman, so they are read only for the engine that root's configuration names for this
entry point. Keys: containerd `pkg/cri/annotations`, CRI-O `pkg/annotations` (see docs/runtimes.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from oci_hook.documents import parse_object
from oci_hook.errors import SpecInvalid

_MAX_JSON_BYTES = 256 << 10
_SANDBOX_NAME = re.compile(r"k8s_[^_]+_[^_]+_([^_]+)_[0-9]+")  # pod, namespace, uid, attempt


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine vouches for.

    Attributes:
        is_sandbox: This is a pod's pause container, which no model concerns.
        in_sandbox: This is a container of a pod, whose sandbox was made before it.
        container_name: The container's name in its pod; None where the engine has no pods.
        pod_uid: The pod's uid; None where the engine has no pods or gives none.
    """

    is_sandbox: bool = False
    container_name: str | None = None
    pod_uid: str | None = None
    in_sandbox: bool = False


def read_engine_facts(engine: str, annotations: Mapping[str, str]) -> EngineFacts:
    """Read the annotations that `engine` sets.

    Args:
        engine: From the configuration, never guessed from the annotations.
        annotations: The container's, from config.json.

    Raises:
        SpecInvalid: CRI-O's annotations are not JSON, or name two pods.
    """
    if engine == "containerd":
        return EngineFacts(
            annotations.get("io.kubernetes.cri.container-type") == "sandbox",
            annotations.get("io.kubernetes.cri.container-name"),
            annotations.get("io.kubernetes.cri.sandbox-uid"),
            annotations.get("io.kubernetes.cri.container-type") == "container",
        )
    if engine == "cri-o":
        return _cri_o(annotations)
    return EngineFacts()


def _cri_o(annotations: Mapping[str, str]) -> EngineFacts:
    """CRI-O sets these after the pod's own annotations were copied, so what a pod says of them is overwritten."""
    label = _json(annotations, "io.kubernetes.cri-o.Labels").get  # the kubelet's; another client may set none
    metadata = _json(annotations, "io.kubernetes.cri-o.Metadata").get
    sandbox = _SANDBOX_NAME.fullmatch(annotations.get("io.kubernetes.cri-o.SandboxName", ""))
    uids = _strings(label("io.kubernetes.pod.uid"), sandbox[1] if sandbox else None)
    if len(set(uids)) > 1:
        raise SpecInvalid("CRI-O's annotations name two pods")
    names = _strings(metadata("name"), label("io.kubernetes.container.name"))
    kind = annotations.get("io.kubernetes.cri-o.ContainerType")
    return EngineFacts(
        is_sandbox=kind == "sandbox",
        container_name=names[0] if names else None,
        pod_uid=uids[0] if uids else None,
        in_sandbox=kind == "container",
    )


def _strings(*values: object) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]


def _json(annotations: Mapping[str, str], key: str) -> dict[str, object]:
    data = annotations.get(key, "{}").encode("utf-8", "replace")
    return parse_object(data, limit_bytes=_MAX_JSON_BYTES, what=f"annotation {key}", error=SpecInvalid)
