"""What an engine itself says of a pod's container, through annotations that only it sets.

Anyone may write these keys under podman, so they are read only for the engine that root's configuration names for this
entry point. Keys: containerd `pkg/cri/annotations`, CRI-O `pkg/annotations` (see docs/runtimes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oci_hook.documents import parse_object
from oci_hook.errors import SpecInvalid

_MAX_LABELS_BYTES = 256 << 10


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
        SpecInvalid: CRI-O's label annotation is not JSON.
    """
    if engine == "containerd":
        return EngineFacts(
            annotations.get("io.kubernetes.cri.container-type") == "sandbox",
            annotations.get("io.kubernetes.cri.container-name"),
            annotations.get("io.kubernetes.cri.sandbox-uid"),
            annotations.get("io.kubernetes.cri.container-type") == "container",
        )
    if engine == "cri-o":
        labels = parse_object(
            annotations.get("io.kubernetes.cri-o.Labels", "{}").encode("utf-8", "replace"),
            limit_bytes=_MAX_LABELS_BYTES,
            what="annotation io.kubernetes.cri-o.Labels",
            error=SpecInvalid,
        )
        uid, name = labels.get("io.kubernetes.pod.uid"), labels.get("io.kubernetes.container.name")
        return EngineFacts(
            annotations.get("io.kubernetes.cri-o.ContainerType") == "sandbox",
            name if isinstance(name, str) else None,
            uid if isinstance(uid, str) else None,
            annotations.get("io.kubernetes.cri-o.ContainerType") == "container",
        )
    return EngineFacts()
