"""podman's `precreate`: config.json on standard input, the one that podman shall go on with on standard output.

    config.json ─► annotations ─► [no VM asked for: the same bytes] ─► container id ─► `before_create.prepare` ─► mounts

podman does not say which runtime it is about to call, so `smm.scz/require` with `runtime=kata` says that the model has
to be there before `create`; whether that was true, the prestart hook sees when it adopts the record. Every other
container goes the ordinary way. On failure nothing is printed and nothing is left; of the hook's words podman shows its
user none, only the exit code.
Sources: oci-hooks(5), "precreate"; docs/runtimes.md.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from oci_hook.errors import EngineUnsupported, HolderGone, SczError, SystemCallFailed
from oci_hook.invocation import Invocation
from oci_hook.oci.annotations import Requests, gather_requests, has_ours
from oci_hook.oci.precreate import Precreate, own_folder, parse_precreate, with_mounts, with_prestart
from oci_hook.oci.spec import MAX_SPEC_BYTES, Spec
from oci_hook.oci.state import State

if TYPE_CHECKING:
    from oci_hook.config import Config

ENGINE = "podman"
RUNTIME = "kata"
"""What `runtime=` names, and what the access policy is asked about."""


def main(invocation: Invocation) -> int:
    """Run the stage; returns the exit code.

    Args:
        invocation: The command line; `--engine` has to be podman.
    """
    creator = os.getppid()  # podman itself, before anything of it can have changed
    state = None
    try:
        data = sys.stdin.buffer.read(MAX_SPEC_BYTES + 1)
        given = parse_precreate(data)
        spec = given.spec
        requests = _requests(spec, invocation)
        if requests is None:
            _write(data)
            return 0
        name, folder = own_folder(spec)
        state = State(name, creator, "", "creating", spec.annotations)
        data = _with_hook(data, given, invocation)
        _deliver(data, spec, requests, state, folder, invocation.config_file)
    except SczError as error:
        from oci_hook.report import report_refusal

        return report_refusal(invocation.config_file, state, error)
    return 0


def _requests(spec: Spec, invocation: Invocation) -> Requests | None:
    """What the container asks for before `create`; None: nothing.

    Raises:
        AnnotationInvalid: An annotation of ours is unknown or malformed.
        EngineUnsupported: Another engine's name is on the command line, and a VM is asked for.
    """
    if not has_ours(spec.annotations):
        return None
    requests = gather_requests(spec.annotations, {}, None)
    if not requests.models or requests.models[0].requirements.runtime != RUNTIME:
        return None
    if invocation.engine != ENGINE or invocation.requests:
        raise EngineUnsupported(
            "precreate is a stage of podman's alone", remedy="`sczctl install --engine podman --before-create`"
        )
    return requests


def _with_hook(data: bytes, given: Precreate, invocation: Invocation) -> bytes:
    """See that our prestart hook follows, as it checks the runtime; config.json with it at `prestart`.

    podman 5 makes `createRuntime` of what hooks.d has at `prestart`. Kata 1 does not know that stage, so there the hook
    is added where podman 4 has it; where both are called, the second finds all done.
    poststop is not in config.json, as podman calls it itself; without it, a later start or the sweep removes the model.

    Raises:
        EngineUnsupported: The runtime will not call it, or that of another installation.
    """
    expected = Invocation("prestart", config_file=invocation.config_file, engine=ENGINE).command()
    ours = {
        stage: hook for stage, words, hook in given.hooks if list(words) == expected and hook.get("path") == expected[0]
    }
    if "prestart" in ours:
        return data
    if "createRuntime" in ours:
        return with_prestart(data, ours["createRuntime"])
    raise EngineUnsupported(
        f"the runtime will not call {expected[3]} at prestart: nothing would check which runtime that is",
        remedy="`sczctl install --engine podman --before-create` writes the hooks; `sczctl doctor` looks at them",
    )


def _deliver(data: bytes, spec: Spec, requests: Requests, state: State, folder: str, config_file: str) -> None:
    """Prepare the models and print the new config.json; if that cannot be printed, they are taken away again.

    podman's API service outlives a creation that fails, so the record says by which folder of podman's the container is
    there still. One that is not there now tells nothing.
    """
    from oci_hook.config import load_config

    config = load_config(config_file)

    from oci_hook.before_create import Asking, discard, prepare
    from oci_hook.linux.processes import harden_process, verify_privileges
    from oci_hook.oci.engine import read_engine_facts

    verify_privileges()
    harden_process()
    facts = read_engine_facts(ENGINE, spec.annotations)
    asking = Asking(state.container_id, "", spec, facts, requests, RUNTIME, _creator(state.pid))
    asking = replace(asking, folder=folder if os.path.isdir(folder) else "")
    _forget_failed(state.container_id, config)
    entries = prepare(asking, config)
    try:
        _write(with_mounts(data, [{**asdict(entry), "type": "bind"} for entry in entries]))
    except BaseException:
        discard(state.container_id, "", config)
        raise


def _forget_failed(container: str, config: Config) -> None:
    """Take away what an earlier start left that came to nothing: each start of podman's is admitted anew.

    podman's API service creates many containers, and one of them time and again: that it lives still says nothing.
    """
    from oci_hook.before_create import discard
    from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostRecords

    earlier = HostRecords(config.runtime_directory).find(container, "")
    if isinstance(earlier, BoundRecord) and earlier.container == NOBODY:
        discard(container, earlier.bundle, config)


def _creator(pid: int) -> tuple[int, int]:
    """podman's pid and start time.

    Raises:
        HolderGone: It has ended: who is our parent now has taken us in.
    """
    from oci_hook.linux.processes import process_start_time

    seconds = process_start_time(pid)
    if seconds is None or pid == 1 or os.getppid() != pid:
        raise HolderGone("podman ended while its hook ran")
    return pid, seconds


def _write(data: bytes) -> None:
    """All of it.

    Raises:
        SystemCallFailed: podman does not read it.
    """
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as cause:
        raise SystemCallFailed(f"config.json cannot be handed back to podman: {cause.strerror}") from cause
