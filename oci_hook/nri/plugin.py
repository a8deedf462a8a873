"""`scz-nri`, what it does: a container that asks for a model gets our hooks and, in a virtual machine, a bind mount.

    CreateContainer ─► none of ours: nothing ─► runc-like handler: hooks ─► the hook delivers, as everywhere
                                             └► VM handler: `prepare` in a child ─► bind entries ─► the hook checks
    PostStartContainer ─► adopt    StopContainer, RemoveContainer ─► discard    Synchronize ─► discard what has gone

A refusal fails CreateContainer with its reason. The engine starts a container **without** this plugin if it is not
there or does not answer in time: then there is neither model nor hook (docs/nri.md, "When the plugin is absent").
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from oci_hook.adoption import withdraw_own
from oci_hook.before_create import adopt, discard
from oci_hook.config import Config
from oci_hook.delivery.host_records import NOBODY, HostRecords
from oci_hook.documents import shown
from oci_hook.errors import EngineUnsupported, HolderRefused, SczError, SystemCallFailed, Terminated
from oci_hook.invocation import Invocation
from oci_hook.linux.processes import process_start_time
from oci_hook.nri.adjust import Wanted, adjustment, asking, is_vm, wanted
from oci_hook.nri.handler import Handler
from oci_hook.nri.messages import Adjustment, Container, Mount, PodSandbox, Settings
from oci_hook.nri.prepared import Connected, Prepared, write_connected
from oci_hook.nri.preparing import run_prepare
from oci_hook.oci.state import State
from oci_hook.records import ContainerRecords
from oci_hook.report import report_refusal

DEFAULT_REQUEST_SECONDS = 2.0
"""What an engine waits by default (NRI, DefaultPluginRequestTimeout)."""
_LAST_SECONDS = 1.0  # of the engine's time are left for ending `prepare` and for the answer
_PROGRAM = "scz-nri"
_RAISE = "`sczctl install --engine {engine} --nri` makes the engine wait for 100 s; then restart the engine"


class ModelPlugin(Handler):
    """The plugin for one engine.

    Args:
        config: The host's configuration.
        config_file: Its path, for hooks and `prepare`.
        say: Called with a line for the journal.
    """

    def __init__(self, config: Config, config_file: str, say: Callable[[str], None]) -> None:
        self._config, self._config_file, self._say = config, os.path.abspath(config_file), say
        self._prepared = Prepared(config.runtime_directory)
        self._connected: Connected | None = None
        self._under_way: set[str] = set()
        self._lock = threading.Lock()  # for the set alone

    # --- the connection -----------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Check that this is the engine that root's configuration names: its facts are believed."""
        engine = self._config.nri_engine
        is_crio = settings.runtime_name.lower().replace("-", "") == "crio"
        if is_crio != (engine == "cri-o"):
            raise EngineUnsupported(
                f"the engine calls itself {shown(settings.runtime_name)}; [nri] engine is {engine}",
                remedy="correct `engine` or `socket` below [nri] in config.toml, then `systemctl restart scz-nri`",
            )
        named = f"{settings.runtime_name} {settings.runtime_version}".strip()[:256] or engine
        start_time = process_start_time(os.getpid()) or 0
        self._connected = Connected(os.getpid(), start_time, named, round(settings.request_seconds))
        told = f"{settings.request_seconds:g} s" if settings.request_seconds else "as long as its configuration says"
        self._say(f"connected to {shown(named)[1:-1]}, which waits for an answer {told}")
        if self._config.nri_vm_handlers and 0 < settings.request_seconds <= DEFAULT_REQUEST_SECONDS:
            self._say(f"a model in a virtual machine may take longer; {_RAISE.format(engine=engine)}")

    def synchronize(self, pods: Sequence[PodSandbox], containers: Sequence[Container]) -> None:
        """Discard what was prepared for containers that have gone, or that were made without their mounts.

        What is still being prepared, for a request of an engine that has gone say, is left to the call that does it.
        """
        if self._connected is not None:  # from here on the engine creates nothing without asking
            write_connected(self._config.runtime_directory, self._connected)
        there = {container.id: container for container in containers}
        for container_id in sorted({*self._prepared.ids(), *self._unmarked(pods)}):
            with self._lock:
                is_under_way = container_id in self._under_way
            container = there.get(container_id)
            if not is_under_way and (container is None or not self._has_bound(container)):
                self._discard(container_id)
        handlers = {pod.id: pod for pod in pods}
        holding = self._holding()
        for container in containers:
            pod = handlers.get(container.pod_id)
            if pod is not None and container.id not in holding and self._started_without_us(pod, container):
                self._say(
                    f"container {shown(container.id, 64)} of {shown(pod.namespace)}/{shown(pod.name)} asks for a model "
                    "and was created while this plugin was not connected: unless its handler brings it, it has none; "
                    "make it again"
                )

    def _unmarked(self, pods: Sequence[PodSandbox]) -> tuple[str, ...]:
        """What was prepared for this engine's pods and has no process yet, by its creator: no mark may be left of it.

        podman's and the shim's have creators of their own.
        """
        try:
            records = [
                record
                for record in HostRecords(self._config.runtime_directory).bound()
                if not record.bundle and record.container == NOBODY
            ]
        except SczError as error:
            self._say(f"{error.reason} ({error.code}): {error.message}")
            return ()
        if not records:
            return ()
        pids = {pod.pid for pod in pods if pod.pid} | {_listener(self._config.nri_socket)}
        creators = {(pid, process_start_time(pid)) for pid in pids if pid}
        return tuple(record.container_id for record in records if record.creator in creators)

    def _holding(self) -> frozenset[str]:
        """The containers that have models, by whatever way."""
        with suppress(SczError):
            records = ContainerRecords(self._config.runtime_directory).live()
            return frozenset(record.container_id for record in records if record.delivered)
        return frozenset()

    def _has_bound(self, container: Container) -> bool:
        place = os.path.join(self._config.runtime_directory, "bound") + "/"
        return any(mount.source.startswith(place) for mount in container.mounts)

    def _started_without_us(self, pod: PodSandbox, container: Container) -> bool:
        try:
            asked = wanted(pod, container)
        except SczError:
            return False
        hooked = any(word.endswith("/oci_hook/launch.py") for hook in container.hooks.prestart for word in hook.args)
        return bool(asked.requests.models) and not hooked

    # --- a container --------------------------------------------------------------------------------------------------

    def create_container(self, pod: PodSandbox, container: Container, deadline: float) -> Adjustment | None:
        """Refuse, or give what is to be added."""
        try:
            asked = wanted(pod, container)
            if not asked.requests.models:
                return None
            in_vm = is_vm(pod.runtime_handler, self._config.nri_vm_handlers)
        except SczError as error:
            self._report(pod, container, error)
            raise
        if not in_vm and asked.has_hooks and not asked.annotations:
            return None
        binds: tuple[Mount, ...] = ()
        if in_vm:
            with self._preparing(container.id):
                binds = self._prepare(pod, container, asked, deadline)
        return adjustment(asked, binds, engine=self._config.nri_engine, config_file=self._config_file)

    def _prepare(self, pod: PodSandbox, container: Container, asked: Wanted, deadline: float) -> tuple[Mount, ...]:
        engine = self._config.nri_engine
        invocation = Invocation("prepare", config_file=self._config_file, engine=engine, requests=asked.given)
        left = deadline - time.monotonic()
        try:
            if any(one.type == "user" for one in container.namespaces):
                raise EngineUnsupported(
                    "NRI does not tell the ids of a user namespace, which the model's files would have to have",
                    remedy="take `hostUsers: false` out of the pod: a virtual machine isolates it",
                )
            creator = creator_of(pod, self._config.nri_socket)
            data = asking(pod, container, asked, engine, creator)
            self._prepared.add(container.id)
        except SczError as error:
            self._report(pod, container, error)
            raise
        try:
            seconds = left - min(_LAST_SECONDS, left / 4)
            binds = run_prepare(invocation, data, seconds=seconds, advice=_RAISE.format(engine=engine))
            if not self._prepared.has(container.id):  # nobody would look after it
                raise Terminated("the container was given up while its model was made ready")
        except BaseException:  # refused because another container of this id lives, say: that one keeps its models
            self._discard(container.id, lambda: withdraw_own(container.id, "", creator, self._config))
            raise
        return binds

    @contextmanager
    def _preparing(self, container_id: str) -> Iterator[None]:
        with self._lock:
            self._under_way.add(container_id)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.discard(container_id)

    def create_container_lost(self, pod: PodSandbox, container: Container) -> None:  # noqa: ARG002 - as `Handler` has it
        """The engine did not hear the answer: the container may run, without its model, marked or not."""
        self._discard(container.id)

    def post_start_container(self, pod: PodSandbox, container: Container) -> None:  # noqa: ARG002 - as `Handler` has it
        """Bind the record to the container's process, where no prestart hook did it before."""
        if not container.pid or not self._prepared.has(container.id):
            return
        try:
            adopt(container.id, "", container.pid, self._config)
        except HolderRefused as error:  # the hook, which knows better
            self._say(f"container {shown(container.id, 64)}: {error.message}")

    def stop_container(self, pod: PodSandbox, container: Container) -> None:  # noqa: ARG002 - as `Handler` has it
        """It has ended, or was never created."""
        self._gone(container)

    def remove_container(self, pod: PodSandbox, container: Container) -> None:  # noqa: ARG002 - as `Handler` has it
        """It has gone, or was never created."""
        self._gone(container)

    def _gone(self, container: Container) -> None:
        if self._prepared.has(container.id):
            self._discard(container.id)

    def _discard(self, container_id: str, take: Callable[[], None] | None = None) -> None:
        """Take models and records away; what cannot be is tried again at the next event, start or sweep."""
        try:
            take() if take is not None else discard(container_id, "", self._config)
        except SczError as error:
            self._say(f"container {shown(container_id, 64)}: {error.reason} ({error.code}): {error.message}")
            return
        self._prepared.remove(container_id)

    def _report(self, pod: PodSandbox, container: Container, error: SczError) -> None:
        """Where a refusal is looked for: the journal, the audit log, `sczctl why`."""
        state = State(container.id, os.getpid(), "", "creating", {**container.annotations, **pod.annotations})
        report_refusal(self._config_file, state, error, program=_PROGRAM)


def creator_of(pod: PodSandbox, socket_path: str) -> tuple[int, int]:
    """A process that lives until a container's own is known, with its start time: the pod's sandbox.

    CRI-O may have pods without such a process, and says 0 then: the engine is it, by its socket. A container that is
    made before an engine's restart and started after it has no model then, and does not start.

    Raises:
        SystemCallFailed: It has ended, or there is none.
    """
    pid = pod.pid or _listener(socket_path)
    start_time = process_start_time(pid) if pid else None
    if start_time is None:
        raise SystemCallFailed(f"neither the pod's sandbox nor the engine is a process that lives ({pid})")
    return pid, start_time


def _listener(path: str) -> int:
    """The process that listens at a socket; 0 if none does, or it is not in a pid namespace that is seen from here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trunk:
        trunk.settimeout(1)
        try:
            trunk.connect(path)
            found = trunk.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return 0
    return int(struct.unpack("3i", found)[0])
