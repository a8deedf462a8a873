"""`scz-hook`: the OCI hook. State on standard input; exit 0, or the container does not run.

    state ─► annotations ─► [none of ours: exit 0] ─► config.json ─► destinations held ─► admission ─► decrypt into a
    detached tmpfs ─► seal ─► audit ─► attach

OCI runtime specification, "POSIX-platform Hooks". Stages: `prestart` or `createRuntime` deliver, `poststop` closes the
record. `precreate` (podman) and `prepare` (shim, NRI plugin) come before a `create`. Most containers are no concern of
ours and end in `fast_path`; for the others, until an annotation of ours is seen, only the standard library is imported.
This module has the one broad `except`: whatever is not foreseen ends the container, too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from oci_hook.errors import InstallationIncomplete, InternalError, SczError, StateInvalid, Terminated
from oci_hook.fast_path import may_be_ready, usual_runtime_directory
from oci_hook.invocation import ENGINES, STAGES, Invocation, parse_invocation
from oci_hook.oci.annotations import has_ours
from oci_hook.oci.state import MAX_STATE_BYTES, State, parse_state

if TYPE_CHECKING:
    from oci_hook.delivery.holder import Agent
    from oci_hook.oci.spec import Spec

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_USAGE = (
    f"usage: scz-hook [--config FILE] [--engine {'|'.join(ENGINES)}] [--request KEY=VALUE]... [--spec-digest HEX] "
    f"{'|'.join(STAGES)}   (OCI state on standard input; precreate, prepare: scz-hook(8))"
)


def main(arguments: Sequence[str] | None = None, data: bytes | None = None) -> int:
    """Run one stage.

    Args:
        arguments: The command line; None: this process's.
        data: What was read of standard input already, all of it; None: nothing.

    Returns:
        The exit code: 0, or one of `errors.py`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    invocation = parse_invocation(arguments)
    if invocation is None:
        is_help = list(arguments) == ["--help"]
        print(_USAGE, file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else StateInvalid.code
    state = None
    try:
        _isolate()
        if invocation.stage in ("precreate", "prepare"):
            return _before_create(invocation)
        state = parse_state(sys.stdin.buffer.read(MAX_STATE_BYTES + 1) if data is None else data)
        # Some runtimes pass no annotations: config.json has them. A digest is looked at whatever is there by now.
        asks = not state.annotations or has_ours(state.annotations) or invocation.requests or invocation.spec_digest
        if asks or _may_be_ready(state, invocation.config_file):
            _RUN[invocation.stage](state, invocation)
    except SczError as error:
        return _refuse(invocation.config_file, state, error)
    except ImportError as error:
        return _refuse(invocation.config_file, state, InstallationIncomplete(f"{type(error).__name__}: {error}"))
    except BaseException as error:
        return _refuse(invocation.config_file, state, InternalError(f"{type(error).__name__}: {error}"))
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


def _before_create(invocation: Invocation) -> int:
    """Stages that have no state: there is no container yet."""
    if invocation.stage == "precreate":
        from oci_hook.precreate import main as run
    else:
        from oci_hook.prepare import main as run
    return run(invocation)


def _start(state: State, invocation: Invocation) -> None:
    """prestart, createRuntime: a refusal ends the container, so what was there before its `create` goes, too."""
    try:
        _deliver(state, invocation)
    except BaseException:
        _withdraw(state, invocation.config_file)
        raise


def _withdraw(state: State, config_file: str) -> None:
    from oci_hook.config import load_config

    with suppress(SczError):  # a sweep does the same; what is told is why the container may not start
        config = load_config(config_file)
        if may_be_ready(config.runtime_directory):
            from oci_hook.adoption import withdraw

            withdraw(state, config)


def _may_be_ready(state: State, config_file: str) -> bool:
    """Whether models came before a `create` of this name; it asks for none, or none any more."""
    directory = _runtime_directory(config_file)
    if directory is None or not may_be_ready(directory):
        return False
    from oci_hook.delivery.host_records import HostRecords

    return HostRecords(directory).may_concern(state.container_id, state.bundle)


def _runtime_directory(config_file: str) -> str | None:
    """Without the parser of the configuration, unless a line of it may name another; None: it cannot be used."""
    directory = usual_runtime_directory(config_file)
    if directory is not None:
        return directory
    from oci_hook.config import load_config

    with suppress(SczError):  # whoever asks for a model is told; nothing can have been made ready by it
        return load_config(config_file).runtime_directory
    return None


def _deliver(state: State, invocation: Invocation, agent: Agent | None = None) -> None:
    """What the container asks for, if anything; the rest is `start`'s."""
    from oci_hook.oci.annotations import gather_requests, merge_annotations
    from oci_hook.oci.spec import load_spec

    spec = load_spec(state.bundle, digest=invocation.spec_digest)
    annotations = merge_annotations(state.annotations, spec.annotations)
    if not has_ours(annotations) and not invocation.requests:
        _verify_none_prepared(state, spec, invocation)
        return

    from oci_hook.config import load_config
    from oci_hook.linux.processes import harden_process, verify_privileges
    from oci_hook.oci.engine import read_engine_facts
    from oci_hook.standby import tpm_standby

    verify_privileges()
    # Before any child: a runtime may ignore SIGCHLD, and then the kernel reaps what we hold by its pid.
    harden_process()
    config = load_config(invocation.config_file)
    facts = read_engine_facts(invocation.engine or config.engine, annotations)
    if not facts.is_sandbox:
        requests = gather_requests(annotations, invocation.requests, facts.container_name)
        if requests.models:
            with tpm_standby(config) as standby:
                from oci_hook.start import deliver  # while that child imports its part

                deliver(state, spec, facts, requests, config, standby, agent)
            return
    _verify_none_prepared(state, spec, invocation)


def _verify_none_prepared(state: State, spec: Spec, invocation: Invocation) -> None:
    """A container that asks for nothing: refused if its models came before its `create` all the same."""
    if _may_be_ready(state, invocation.config_file):
        from oci_hook.adoption import verify_none_prepared
        from oci_hook.config import load_config

        verify_none_prepared(state, spec, load_config(invocation.config_file))


def _start_in_guest(state: State, invocation: Invocation) -> None:
    """guest-prestart: the same under Kata's agent, which ignores how a hook ends; so `guest` refuses inside."""
    try:
        from oci_hook.guest import supervise
    except ImportError:
        if state.pid > 1:  # a damaged installation can tell the workload nothing, nor may it run
            os.kill(state.pid, signal.SIGKILL)
        raise
    supervise(state, invocation, lambda agent: _deliver(state, invocation, agent))


def _stop(state: State, invocation: Invocation) -> None:
    """poststop: the mounts went with the container's namespace; close the record and free the token."""
    from oci_hook.config import load_config
    from oci_hook.host import close_container

    close_container(state.container_id, state.bundle, load_config(invocation.config_file))


_RUN: dict[str, Callable[[State, Invocation], None]] = {
    "prestart": _start,
    "createRuntime": _start,
    "poststop": _stop,
    "guest-prestart": _start_in_guest,
    "guest-poststop": _stop,
}


def _refuse(config_file: str, state: State | None, error: SczError) -> int:
    """Tell everyone who may ask, and give the code that ends the container."""
    from oci_hook.report import report_refusal

    return report_refusal(config_file, state, error)
