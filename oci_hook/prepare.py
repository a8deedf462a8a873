"""The stage `prepare`: one container's models before its `create`, for a caller that must not hold keys.

    launch.py --config FILE [--engine ENGINE] prepare  < asking.json  > {"binds": [...]}

The shim and the NRI plugin start it; what it decrypts with lives and ends in this process. Standard input:

    {"container_id", "bundle" ("" if not known), "runtime", "creator": [pid, start time], "spec": {config.json}}

Of `spec` are read: `annotations`, `mounts`, `linux` (`namespaces`, `uidMappings`, `gidMappings`) and, where there is a
bundle in the image, `root`. Exit code 0, or one of `errors.py` with one line on standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import SczError, StateInvalid
from oci_hook.invocation import Invocation
from oci_hook.oci.state import ABSOLUTE_PATH, CONTAINER_ID, PATH_LIMIT, State

MAX_ASKING_BYTES = (4 << 20) + (64 << 10)
_WHAT = "what asks to be prepared"


def main(invocation: Invocation) -> int:
    """Run the stage; returns the exit code."""
    state: State | None = None
    try:
        state, runtime, start_time, spec = parse_asking(sys.stdin.buffer.read(MAX_ASKING_BYTES + 1))
        _prepare(invocation, state, runtime, start_time, spec)
    except SczError as error:
        from oci_hook.report import report_refusal

        return report_refusal(invocation.config_file, state, error)
    return 0


def parse_asking(data: bytes) -> tuple[State, str, int, bytes]:
    """Parse standard input.

    Returns:
        The container, its creator in the place of its process; the runtime; the creator's start time; config.json.

    Raises:
        StateInvalid: It is not the form above.
    """
    document = parse_object(data, limit_bytes=MAX_ASKING_BYTES, what=_WHAT, error=StateInvalid)
    fields = Fields(document, what=_WHAT, error=StateInvalid)
    has_bundle = document.get("bundle") != ""
    spec = document.get("spec")
    annotations = spec.get("annotations") if isinstance(spec, dict) else None

    def number(value: object) -> int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise StateInvalid(f"{_WHAT}: a number is none")
        return value

    state = State(
        container_id=fields.string("container_id", pattern=CONTAINER_ID, limit=255),
        bundle=fields.string("bundle", pattern=ABSOLUTE_PATH, limit=PATH_LIMIT)
        if has_bundle
        else fields.take("bundle"),
        pid=(creator := fields.items("creator", number, low=2, high=2))[0],
        status="creating",
        # For the report of a refusal; the specification is parsed on its own.
        annotations={key: str(text) for key, text in annotations.items()} if isinstance(annotations, dict) else {},
    )
    runtime = fields.string("runtime", pattern="[a-z]{1,32}")
    given = canonical(fields.fields("spec").rest())
    fields.finish()
    return state, runtime, creator[1], given


def _prepare(invocation: Invocation, state: State, runtime: str, start_time: int, given: bytes) -> None:
    from oci_hook.adoption import withdraw_own
    from oci_hook.before_create import Asking, BindEntry, prepare
    from oci_hook.config import load_config
    from oci_hook.linux.processes import harden_process, verify_privileges
    from oci_hook.oci.annotations import gather_requests
    from oci_hook.oci.engine import read_engine_facts
    from oci_hook.oci.spec import parse_spec

    verify_privileges()
    harden_process()
    config = load_config(invocation.config_file)
    spec = parse_spec(given, bundle=state.bundle)
    facts = read_engine_facts(invocation.engine or config.engine, spec.annotations)
    entries: tuple[BindEntry, ...] = ()
    if not facts.is_sandbox:
        requests = gather_requests(spec.annotations, invocation.requests, facts.container_name)
        creator = (state.pid, start_time)
        asking = Asking(state.container_id, state.bundle, spec, facts, requests, runtime, creator)
        entries = prepare(asking, config)
    try:
        print(json.dumps({"binds": [asdict(entry) for entry in entries]}), flush=True)
    except BaseException:  # nobody will make use of them
        withdraw_own(state.container_id, state.bundle, (state.pid, start_time), config)
        raise
