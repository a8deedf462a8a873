"""Whether a verified token is this container's own: bound to its pod, or to its first live container.

A token is a bearer token: whoever can read it can present it. Under Kubernetes three independent sources must name one
pod; elsewhere the first container that uses a token keeps it while it lives. `token` says what a token claims,
`admission` which of the two bindings applies. No byte of a token is stored.
Specification: docs/specification.md, "Identity token".
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import FileUnreadable, HolderGone, SczError, StateInvalid, SystemCallFailed, TokenBoundElsewhere
from oci_hook.identity.token import Identity
from oci_hook.linux.processes import HeldProcess
from oci_hook.locks import lock_file
from oci_hook.oci.state import ABSOLUTE_PATH, CONTAINER_ID, PATH_LIMIT
from oci_hook.trusted_file import load_file, make_private_directory, replace_file

SCHEMA = "scz-smm/token-binding/v1"
_RECORD_LIMIT_BYTES = 4 << 10
_RECORD_NAME = re.compile(r"[0-9a-f]{64}\.json")
_PID_HIGH = (1 << 31) - 1
_START_TIME_HIGH = (1 << 64) - 1
_POD_VOLUME = re.compile(r"/pods/([^/]+)/volumes/([^/]+)/")


# --- by pod -----------------------------------------------------------------------------------------------------------


def verify_pod_binding(identity: Identity, host_path: str, pod_uid_of_engine: str | None) -> None:
    """Check that a Kubernetes token belongs to the container's pod. Pure.

    Args:
        identity: Of an issuer of kind `kubernetes`.
        host_path: Where the token lies on the host, all links resolved.
        pod_uid_of_engine: What the engine that root configured says; None or empty if it says nothing.

    Raises:
        TokenBoundElsewhere: The engine names no pod, or the claim, the engine and the path do not all name one.
        RuntimeError: The identity is not a Kubernetes one; a fault of ours.
    """
    if identity.issuer.kind != "kubernetes" or not identity.pod_uid:
        raise RuntimeError("only a Kubernetes token is bound to a pod")
    # 1. The engine vouches for a pod: annotations of an engine that has none are anybody's.
    if not pod_uid_of_engine:
        raise TokenBoundElsewhere(
            "the token is bound to a pod, and the engine names none for this container",
            remedy="set `engine` in the configuration to cri-o or containerd, or use a token of another issuer",
        )
    # 2. The claim names that pod.
    if identity.pod_uid != pod_uid_of_engine:
        raise TokenBoundElsewhere(
            f"the token is for the pod {shown(identity.pod_uid)}, the container is of {shown(pod_uid_of_engine)}"
        )
    # 3. The kubelet wrote the token for that pod. The first match: a container can make directories of any name, but
    #    only in a volume, whose own path comes first.
    match = _POD_VOLUME.search(host_path)
    if match is None or match.group(1, 2) != (identity.pod_uid, "kubernetes.io~projected"):
        raise TokenBoundElsewhere(
            f"the token does not lie in a projected volume of the pod {shown(identity.pod_uid)}",
            remedy="mount the token as a projected volume of the pod, without subPath",
        )


# --- by first live container ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Record:
    """Who holds a token: the file's name is the SHA-256 of what the token signs.

    The bundle is a part of it: two namespaces of containerd may use one id.
    """

    container_id: str
    bundle: str
    pid: int
    start_time: int


def parse_record(data: bytes) -> _Record:
    """Parse a record.

    Raises:
        FileUnreadable: It is not one of ours.
    """
    what = "token binding"
    document = parse_object(data, limit_bytes=_RECORD_LIMIT_BYTES, what=what, error=FileUnreadable)
    fields = Fields(document, what=what, error=FileUnreadable)
    fields.literal("schema", SCHEMA)
    record = _Record(
        container_id=fields.string("container", pattern=CONTAINER_ID, limit=255),
        bundle=fields.take("bundle")
        if document.get("bundle") == ""
        else fields.string("bundle", pattern=ABSOLUTE_PATH, limit=PATH_LIMIT),
        pid=fields.integer("pid", low=1, high=_PID_HIGH),
        start_time=fields.integer("start_time", low=0, high=_START_TIME_HIGH),
    )
    fields.finish()
    return record


def is_process_alive(pid: int, start_time: int) -> bool:
    """Whether the process of this pid and start time (clock ticks since boot) still runs, in any of its threads."""
    try:
        with HeldProcess(pid) as process:
            return process.start_time == start_time
    except HolderGone:
        return False


class Bindings:
    """The tokens that live containers hold on this host.

    Args:
        directory: Root's alone; made with mode 0700 if absent. It must not outlive a boot, so: below /run.
        is_alive: Whether a process of this pid and start time runs; tests replace it.
        lock_timeout_seconds: How long to wait for another hook.
    """

    def __init__(
        self,
        directory: str,
        *,
        is_alive: Callable[[int, int], bool] = is_process_alive,
        lock_timeout_seconds: float = 10.0,
    ) -> None:
        self._directory = directory
        self._is_alive = is_alive
        self._lock_timeout_seconds = lock_timeout_seconds

    def bind_token(self, identity: Identity, container_id: str, bundle: str, pid: int, start_time: int) -> None:
        """Give the token to this container, unless another live one has it.

        The same process may bind again, as with several models. A dead holder's token is taken over: so a restarted
        container, whose process is another, gets it back, be its poststop hook run or not.

        Args:
            identity: Of a token that is not bound to a pod.
            container_id: The container's.
            bundle: Absolute path of its OCI bundle; empty where it is not known yet.
            pid: The process that lives as long as the container.
            start_time: Its start in clock ticks since boot (proc(5), stat, field 22).

        Raises:
            TokenBoundElsewhere: Another live container has it.
            HolderGone: The process itself is not alive, so it could hold nothing.
            StateInvalid: The container's id or pid cannot be recorded.
            FileUnreadable: A record or the directory cannot be read or written.
            SystemCallFailed: The lock could not be had in time.
        """
        record = _Record(container_id, bundle, pid, start_time)
        # A holder that looks dead at once, by a wrong clock or unit, would bind nothing.
        if not re.fullmatch(CONTAINER_ID, container_id) or not 0 < pid <= _PID_HIGH:
            raise StateInvalid("the token cannot be bound: the state names no container or no process")
        if not self._is_alive(pid, start_time):
            raise HolderGone(f"process {pid} ended before the token was bound to it")
        make_private_directory(self._directory)
        path = os.path.join(self._directory, f"{identity.signed_hash.hex()}.json")
        with self._locked():
            held = self._load(path)
            if held is not None and held != record and self._is_alive(held.pid, held.start_time):
                raise TokenBoundElsewhere(f"the token is in use by the container {shown(held.container_id)}")
            document = {"schema": SCHEMA, "container": container_id, "bundle": bundle}
            replace_file(path, canonical(document | {"pid": pid, "start_time": start_time}))

    def adopt(self, container_id: str, earlier: str, bundle: str, process: tuple[int, int]) -> None:
        """Give what a container holds to the process that lives as long as it does.

        Args:
            container_id: The container's.
            earlier: The bundle by which it was bound, empty if it was not known then.
            bundle: The one that is known now.
            process: Pid and start time.

        Raises:
            FileUnreadable: A record cannot be written.
            SystemCallFailed: The lock could not be had in time.
        """
        if not os.path.isdir(self._directory):
            return
        document = {"schema": SCHEMA, "container": container_id, "bundle": bundle}
        with self._locked():
            for name in sorted(os.listdir(self._directory)):
                path = os.path.join(self._directory, name)
                with contextlib.suppress(SczError):  # damaged: it is told to the one whose token it is about
                    held = self._load(path) if _RECORD_NAME.fullmatch(name) else None
                    if held is None or (held.container_id, held.bundle) != (container_id, earlier):
                        continue
                    replace_file(path, canonical(document | {"pid": process[0], "start_time": process[1]}))

    def release(self, container_id: str, bundle: str, *, process: tuple[int, int] | None = None) -> None:
        """Free what a container held, and what dead ones left; for poststop.

        Args:
            container_id: The container's.
            bundle: Its OCI bundle.
            process: Pid and start time; what another living process holds stays. None: whoever holds it.

        Raises:
            FileUnreadable: The directory cannot be read or written.
            SystemCallFailed: The lock could not be had in time.
        """
        if not os.path.isdir(self._directory):
            return
        make_private_directory(self._directory)
        with self._locked():
            for name in sorted(os.listdir(self._directory)):
                path = os.path.join(self._directory, name)
                # A hook that was killed while it wrote left a dotted name; under the lock nobody writes now.
                left_over = name.startswith(".")
                if left_over or (_RECORD_NAME.fullmatch(name) and self._is_free(path, container_id, bundle, process)):
                    _remove(path)

    def _is_free(self, path: str, container_id: str, bundle: str, process: tuple[int, int] | None) -> bool:
        try:
            held = self._load(path)
        except SczError:  # damaged: it is told to the one whose token it is about, who is refused
            return False
        if held is None:
            return False
        is_its_own = (held.container_id, held.bundle) == (container_id, bundle) and (
            process in (None, (held.pid, held.start_time))
        )
        return is_its_own or not self._is_alive(held.pid, held.start_time)

    def _load(self, path: str) -> _Record | None:
        if not os.path.lexists(path):
            return None
        try:
            return parse_record(load_file(path, limit_bytes=_RECORD_LIMIT_BYTES, error=FileUnreadable))
        except FileUnreadable as cause:
            raise FileUnreadable(
                f"the record of the token's holder is damaged: {cause.message}",
                remedy=f"remove {path} if no container uses the token",
            ) from cause

    def _locked(self) -> AbstractContextManager[None]:
        """One hook at a time."""
        path = os.path.join(self._directory, "lock")
        return lock_file(path, timeout_seconds=self._lock_timeout_seconds, error=SystemCallFailed)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
