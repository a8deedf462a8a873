"""`scz-hook`: the OCI hook. State on standard input; exit 0, or the container does not run.

    state ─► annotations ─► [none of ours: exit 0] ─► config.json ─► destinations held ─► admission ─► decrypt into a
    detached tmpfs ─► seal ─► audit ─► attach

OCI runtime specification, "POSIX-platform Hooks". Stages: `prestart` or `createRuntime` deliver, `poststop` closes the
record. Until an annotation of ours is seen, only the standard library is imported. This module has the one broad
`except`: whatever is not foreseen ends the container, too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from oci_hook.errors import InternalError, SczError, StateInvalid, Terminated
from oci_hook.oci.annotations import has_ours
from oci_hook.oci.state import MAX_STATE_BYTES, State, parse_state

if TYPE_CHECKING:
    from oci_hook.admission import Admission, Host
    from oci_hook.delivery.deliver import ContainerView, DeliverySettings
    from oci_hook.oci.annotations import Requests
    from oci_hook.oci.engine import EngineFacts
    from oci_hook.oci.spec import Spec

_DEFAULT_CONFIG_FILE = "/etc/scz-smm/config.toml"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_CHILD_SECONDS = 120.0  # for one answer of a child of the delivery; the engine's own timeout bounds the whole hook
_USAGE = "usage: scz-hook [--config FILE] prestart|createRuntime|poststop   (OCI state on standard input)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code (0, or one of `errors.py`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config_file = _DEFAULT_CONFIG_FILE
    if len(arguments) >= 2 and arguments[0] == "--config":
        config_file, arguments = arguments[1], arguments[2:]
    stage = _STAGES.get(arguments[0]) if len(arguments) == 1 else None
    if stage is None:
        print(_USAGE, file=sys.stdout if arguments == ["--help"] else sys.stderr)
        return 0 if arguments == ["--help"] else StateInvalid.code
    container_id = "unknown"
    try:
        _isolate()
        state = parse_state(sys.stdin.buffer.read(MAX_STATE_BYTES + 1))
        container_id = state.container_id
        if state.annotations and not has_ours(state.annotations):
            return 0
        stage(state, config_file)
    except SczError as error:
        return _refuse(config_file, container_id, error)
    except BaseException as error:
        return _refuse(config_file, container_id, InternalError(f"{type(error).__name__}: {error}"))
    return 0


def _isolate() -> None:
    """A fixed environment and a clean signal mask: crun blocks nearly all signals, engines pass on their variables."""
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())

    def terminate(number: int, _frame: object) -> None:
        raise Terminated(f"signal {signal.Signals(number).name} came before the hook was done")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, terminate)


def _start(state: State, config_file: str) -> None:
    """prestart, createRuntime: from the state to the attached models."""
    from oci_hook.oci.annotations import merge_annotations, parse_requests
    from oci_hook.oci.spec import load_spec

    spec = load_spec(state.bundle)
    annotations = merge_annotations(state.annotations, spec.annotations)
    if not has_ours(annotations):
        return
    requests = parse_requests(annotations)

    from oci_hook.host import load_host
    from oci_hook.oci.engine import read_engine_facts

    host = load_host(config_file)
    facts = read_engine_facts(host.config.engine, annotations)
    if facts.is_sandbox or not requests.concerns(facts.container_name):
        return
    try:
        _deliver(state, spec, requests, facts, host)
    except SczError as refusal:
        _audit_refusal(host, state, requests, refusal)
        raise


def _deliver(state: State, spec: Spec, requests: Requests, facts: EngineFacts, host: Host) -> None:
    """The way of the data. Whatever raises before `attach` leaves nothing visible: the tmpfs has no path yet."""
    from oci_hook.admission import Container, admit
    from oci_hook.delivery.deliver import Delivery
    from oci_hook.host import open_record
    from oci_hook.identity.sources import load_token
    from oci_hook.records import ContainerRecords
    from oci_hook.report import forget_refusal

    records = ContainerRecords(host.config.runtime_directory)
    with ExitStack() as bundles, Delivery(_view(state, spec), _settings(host)) as delivery:
        if records.is_delivered(state.container_id, state.bundle, state.pid, delivery.start_time):
            return  # reached by two ways, hooks.d and CDI say: once is enough
        # The destinations are resolved and held by a child in the container's mount namespace before any key is here.
        delivery.prepare([request.destination for request in requests.models])
        container = Container(
            container_id=state.container_id,
            pid=state.pid,
            start_time=delivery.start_time,
            runtime=delivery.runtime,
            pod_uid=facts.pod_uid,
            token=load_token(spec.mounts, requests.token_path or host.config.token_path),
        )
        admissions = [
            admit(request, bundles.enter_context(host.store.open_reference(request.reference)), container, host)
            for request in requests.models
        ]
        delivery.fill([admission.delivery() for admission in admissions])
        _audit_grants(host, state, admissions)
        record = open_record(container, state.bundle, admissions, seconds=host.clock())
        records.write(record)
        attached = delivery.attach()
        records.mark_delivered(record)
    forget_refusal(host.config.runtime_directory, state.container_id)
    host.audit.append(
        "outcome", container=state.container_id, code=0, bytes=sum(model.size_bytes for model in attached)
    )


def _view(state: State, spec: Spec) -> ContainerView:
    """What the delivery needs of the state and of config.json."""
    from oci_hook.delivery.deliver import ContainerView

    return ContainerView(
        container_id=state.container_id,
        pid=state.pid,
        bundle=state.bundle,
        root_path=spec.root_path,
        tmpfs_destinations=frozenset(mount.destination for mount in spec.mounts if mount.type == "tmpfs"),
        uid_offset=spec.root_uid,
        gid_offset=spec.root_gid,
        mount_namespace_joined=spec.mount_namespace_path is not None or not spec.has_mount_namespace,
    )


def _settings(host: Host) -> DeliverySettings:
    from oci_hook.delivery.deliver import DeliverySettings

    return DeliverySettings(
        memory_reserve_bytes=host.config.memory_reserve_bytes,
        runtime_directory=host.config.runtime_directory,
        workers=None,
        timeout_seconds=_CHILD_SECONDS,
    )


def _stop(state: State, config_file: str) -> None:
    """poststop: the mounts went with the container's namespace; close the record and free the token."""
    from oci_hook.host import close_container

    close_container(state, config_file)


_STAGES: dict[str, Callable[[State, str], None]] = {"prestart": _start, "createRuntime": _start, "poststop": _stop}


def _audit_grants(host: Host, state: State, admissions: Sequence[Admission]) -> None:
    """Written and synced before anything becomes visible; if it cannot be, the start is refused."""
    for admission in admissions:
        host.audit.append(
            "grant",
            container=state.container_id,
            model=admission.manifest.model.name,
            version=admission.manifest.model.version,
            manifest=admission.manifest.digest,
            issuer=admission.identity.issuer.issuer,
            subject=admission.identity.subject,
            quoted=admission.audit_head.hex(),
        )


def _audit_refusal(host: Host, state: State, requests: Requests, refusal: SczError) -> None:
    host.audit.append(
        "refused",
        container=state.container_id,
        model=", ".join(str(request.reference) for request in requests.models),
        code=refusal.code,
        reason=refusal.reason,
        message=refusal.message[:1024],
    )


def _refuse(config_file: str, container_id: str, error: SczError) -> int:
    """Tell everyone who may ask, and give the code that ends the container."""
    from oci_hook.config import Config, load_config
    from oci_hook.report import report_refusal

    try:
        runtime_directory = load_config(config_file).runtime_directory
    except SczError:
        runtime_directory = Config().runtime_directory
    report_refusal(runtime_directory, container_id, error)
    return error.code
