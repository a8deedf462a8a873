"""A small CRI client for the tests: pods and their containers, as a kubelet would ask an engine for them.

The stubs of `container-runtime-interface-api` (Kubernetes' own `runtime/v1/api.proto`) speak to containerd's or CRI-O's
socket; its high-level classes can neither make a pod nor a container. Pods have the host's network, so no CNI plugin
is needed, and a cgroup parent of the test's. What a kubelet does besides is not here: no volumes are made (see
`tests/kubelet.py`), no image is pulled.

    with CriClient(socket, directory, cgroup_parent="/tests") as cri:
        with cri.pod("shop", handler="scz-runc", annotations={…}) as pod:
            server = pod.create("server", image, ["sh", "-c", "…"], mounts=[bind(source, "/data")])
            pod.start(server)
            cri.exec(server, ["ls"])
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cri_api.v1 import api_pb2, api_pb2_grpc

_CALL_SECONDS = 40
_LOG_FIELDS = 3  # of a log's line before the text: time, stream, tag


class CriError(RuntimeError):
    """The engine refused a call; the message is the engine's."""


@dataclass(frozen=True, slots=True)
class Executed:
    """How a command in a container ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(slots=True)
class Pod:
    """A pod's sandbox that runs.

    Attributes:
        id: The engine's, which is the pause container's.
        uid: Kubernetes' uid of the pod, as the engine was told.
        config: What the sandbox was made from.
    """

    client: CriClient
    id: str
    uid: str
    config: Any
    removed: bool = False

    def create(
        self,
        name: str,
        image: str,
        command: Sequence[str],
        *,
        mounts: Sequence[object] = (),
        annotations: Mapping[str, str] | None = None,
        cdi_devices: Sequence[str] = (),
        memory_limit_bytes: int = 0,
        readonly_root: bool = False,
        privileged: bool = False,
    ) -> str:
        """A container of this pod, made and not started; returns its id.

        Raises:
            CriError: The engine refused.
        """
        config = api_pb2.ContainerConfig(
            metadata=api_pb2.ContainerMetadata(name=name, attempt=0),
            image=api_pb2.ImageSpec(image=image),
            command=list(command),
            mounts=list(mounts),
            labels=self.client.labels(self.config.metadata, name),
            annotations=dict(annotations or {}),
            log_path=f"{name}.log",
            linux=api_pb2.LinuxContainerConfig(
                resources=api_pb2.LinuxContainerResources(memory_limit_in_bytes=memory_limit_bytes),
                security_context=api_pb2.LinuxContainerSecurityContext(
                    namespace_options=_namespaces(), readonly_rootfs=readonly_root, privileged=privileged
                ),
            ),
            CDI_devices=[api_pb2.CDIDevice(name=device) for device in cdi_devices],
        )
        request = api_pb2.CreateContainerRequest(pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        return str(self.client.call("CreateContainer", request).container_id)

    def start(self, container: str) -> None:
        """Start a container; with containerd this is when the runtime is called, so also when a hook refuses.

        Raises:
            CriError: It did not start.
        """
        self.client.call("StartContainer", api_pb2.StartContainerRequest(container_id=container))

    def run(self, name: str, image: str, command: Sequence[str], **how: Any) -> str:
        """Create and start."""
        container = self.create(name, image, command, **how)
        self.start(container)
        return container

    def log(self, name: str) -> str:
        """What a container wrote so far, both streams (CRI's log format, which the engine writes)."""
        path = Path(self.config.log_directory) / f"{name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return "".join(line.split(" ", _LOG_FIELDS)[_LOG_FIELDS] + "\n" for line in lines)

    def stop_container(self, container: str) -> None:
        """Stop a container by SIGKILL, and remove it."""
        self.client.call("StopContainer", api_pb2.StopContainerRequest(container_id=container, timeout=0))
        self.client.call("RemoveContainer", api_pb2.RemoveContainerRequest(container_id=container))

    def remove(self) -> None:
        """Stop and remove the pod and all its containers, as a kubelet does; harmless when they are gone."""
        if self.removed:
            return
        self.client.call("StopPodSandbox", api_pb2.StopPodSandboxRequest(pod_sandbox_id=self.id))
        self.client.call("RemovePodSandbox", api_pb2.RemovePodSandboxRequest(pod_sandbox_id=self.id))
        self.removed = True


class CriClient:
    """A connection to an engine.

    Args:
        socket: Its Unix socket.
        directory: For the pods' logs.
        cgroup_parent: The control group that holds every pod's.
    """

    def __init__(self, socket: Path, directory: Path, *, cgroup_parent: str) -> None:
        self._channel = grpc.insecure_channel(f"unix://{socket}")
        self._runtime = api_pb2_grpc.RuntimeServiceStub(self._channel)
        self._images = api_pb2_grpc.ImageServiceStub(self._channel)
        self.directory = directory
        self.cgroup_parent = cgroup_parent

    def __enter__(self) -> CriClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def call(self, method: str, request: Any) -> Any:
        """One call of the runtime or the image service.

        Raises:
            CriError: The engine answered with an error, or not in time.
        """
        service = self._runtime if hasattr(self._runtime, method) else self._images
        try:
            return getattr(service, method)(request, timeout=_CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as cause:
            raise CriError(f"{method}: {cause.details()}") from cause

    def version(self) -> str:
        """The engine's name and version."""
        answer = self.call("Version", api_pb2.VersionRequest())
        return f"{answer.runtime_name} {answer.runtime_version}"

    def wait_for_image(self, image: str, *, seconds: float = 20) -> str:
        """Until CRI knows an image that was imported beside it; returns the image."""
        deadline = time.monotonic() + seconds
        request = api_pb2.ImageStatusRequest(image=api_pb2.ImageSpec(image=image))
        while not self.call("ImageStatus", request).image.id:
            if time.monotonic() > deadline:
                raise CriError(f"the image {image} does not appear")
            time.sleep(0.05)
        return image

    @contextmanager
    def pod(
        self,
        name: str,
        *,
        handler: str,
        uid: str | None = None,
        annotations: Mapping[str, str] | None = None,
        namespace: str = "shop",
    ) -> Iterator[Pod]:
        """A pod's sandbox, removed at the end with its containers.

        Raises:
            CriError: The engine refused.
        """
        metadata = api_pb2.PodSandboxMetadata(name=name, uid=uid or str(uuid.uuid4()), namespace=namespace, attempt=0)
        logs = self.directory / metadata.uid
        logs.mkdir(parents=True, exist_ok=True)
        config = api_pb2.PodSandboxConfig(
            metadata=metadata,
            hostname="",
            log_directory=str(logs),
            labels=self.labels(metadata),
            annotations=dict(annotations or {}),
            linux=api_pb2.LinuxPodSandboxConfig(
                cgroup_parent=self.cgroup_parent,
                security_context=api_pb2.LinuxSandboxSecurityContext(namespace_options=_namespaces()),
            ),
        )
        request = api_pb2.RunPodSandboxRequest(config=config, runtime_handler=handler)
        pod = Pod(self, str(self.call("RunPodSandbox", request).pod_sandbox_id), metadata.uid, config)
        try:
            yield pod
        except BaseException:
            with suppress(CriError):  # the test's own error is the one to see
                pod.remove()
            raise
        pod.remove()

    def exec(self, container: str, command: Sequence[str], *, seconds: int = 60) -> Executed:
        """A command in a container that runs."""
        request = api_pb2.ExecSyncRequest(container_id=container, cmd=list(command), timeout=seconds)
        answer = self.call("ExecSync", request)
        return Executed(answer.exit_code, answer.stdout.decode(), answer.stderr.decode())

    def state(self, container: str) -> str:
        """`CONTAINER_CREATED`, `_RUNNING`, `_EXITED` or `_UNKNOWN`."""
        answer = self.call("ContainerStatus", api_pb2.ContainerStatusRequest(container_id=container))
        return str(api_pb2.ContainerState.Name(answer.status.state))

    def pods(self) -> list[str]:
        """The ids of all pods."""
        return [str(item.id) for item in self.call("ListPodSandbox", api_pb2.ListPodSandboxRequest()).items]

    @staticmethod
    def labels(metadata: Any, container: str | None = None) -> dict[str, str]:
        """The labels that a kubelet sets."""
        labels = {
            "io.kubernetes.pod.name": metadata.name,
            "io.kubernetes.pod.namespace": metadata.namespace,
            "io.kubernetes.pod.uid": metadata.uid,
        }
        return labels if container is None else {**labels, "io.kubernetes.container.name": container}


def bind(source: Path, destination: str, *, readonly: bool = False, propagation: str = "PRIVATE") -> object:
    """A bind mount for `Pod.create`; propagation is PRIVATE, HOST_TO_CONTAINER or BIDIRECTIONAL."""
    return api_pb2.Mount(
        host_path=str(source),
        container_path=destination,
        readonly=readonly,
        propagation=api_pb2.MountPropagation.Value(f"PROPAGATION_{propagation}"),
    )


def _namespaces() -> Any:
    """The host's network; processes of its own for each container."""
    return api_pb2.NamespaceOption(network=api_pb2.NODE, pid=api_pb2.CONTAINER, ipc=api_pb2.POD)
