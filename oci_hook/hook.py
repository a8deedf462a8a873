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

from oci_hook.errors import InternalError, SczError, StateInvalid, Terminated
from oci_hook.oci.annotations import has_ours
from oci_hook.oci.state import MAX_STATE_BYTES, State, parse_state

_DEFAULT_CONFIG_FILE = "/etc/scz-smm/config.toml"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
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
    state = None
    try:
        _isolate()
        state = parse_state(sys.stdin.buffer.read(MAX_STATE_BYTES + 1))
        if not state.annotations or has_ours(state.annotations):  # some runtimes pass none: config.json has them
            stage(state, config_file)
    except SczError as error:
        return _refuse(config_file, state, error)
    except BaseException as error:
        return _refuse(config_file, state, InternalError(f"{type(error).__name__}: {error}"))
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
    """prestart, createRuntime: from the state to the attached models.

    Whatever raises before `attach` leaves nothing visible: until then the decrypted files have no path.
    """
    from oci_hook.oci.annotations import merge_annotations, parse_requests
    from oci_hook.oci.spec import load_spec

    spec = load_spec(state.bundle)
    annotations = merge_annotations(state.annotations, spec.annotations)
    if not has_ours(annotations):
        return
    requests = parse_requests(annotations)

    from oci_hook.admission import Container, admit
    from oci_hook.delivery.deliver import Delivery
    from oci_hook.host import audit_grants, audit_outcome, container_view, delivery_settings, load_host, open_record
    from oci_hook.identity.sources import load_token
    from oci_hook.linux.processes import harden_process
    from oci_hook.oci.engine import read_engine_facts
    from oci_hook.records import ContainerRecords

    harden_process()
    host = load_host(config_file)
    facts = read_engine_facts(host.config.engine, annotations)
    if facts.is_sandbox or not requests.concerns(facts.container_name):
        return
    records = ContainerRecords(host.config.runtime_directory)
    with ExitStack() as bundles, Delivery(container_view(state, spec), delivery_settings(host.config)) as delivery:
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
        audit_grants(host, container, admissions)  # synced: if it cannot be written, nothing becomes visible
        record = open_record(container, state.bundle, admissions, seconds=host.clock())
        records.write(record)
        attached = delivery.attach()
        records.mark_delivered(record)
    audit_outcome(host, container, attached)


def _stop(state: State, config_file: str) -> None:
    """poststop: the mounts went with the container's namespace; close the record and free the token."""
    from oci_hook.host import close_container

    close_container(state, config_file)


_STAGES: dict[str, Callable[[State, str], None]] = {"prestart": _start, "createRuntime": _start, "poststop": _stop}


def _refuse(config_file: str, state: State | None, error: SczError) -> int:
    """Tell everyone who may ask, and give the code that ends the container."""
    from oci_hook.report import report_refusal

    return report_refusal(config_file, state, error)
