"""The shim before a VM sandbox's runtime: models are made ready by a process of their own, before `create`.

    config.json ─► [stage `prepare`, a child: keys live and die there] ─► bind entries

The creator that the record names is this very process: it becomes the runtime by exec, so it lives until the prestart
hook adopts the record, or the record is stale. Source: docs/adr/0014-before-create.md.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import SczError, SystemCallFailed
from oci_hook.invocation import ENVIRONMENT, Invocation
from oci_hook.key_errors import all_errors
from oci_hook.linux.processes import process_start_time
from oci_hook.oci.edit import HOOK_SECONDS

_LIMIT_BYTES = 1 << 20
_WHAT = "what the stage `prepare` printed"


class Told(Exception):
    """The child refused, and has told journal, audit log and `sczctl why`.

    Attributes:
        code: Its exit code.
        line: What it said.
    """

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code, self.line = code, line


def bind_entries(
    document: Mapping[str, Any], container_id: str, bundle: str, *, engine: str, config_file: str
) -> list[dict[str, Any]]:
    """Make the models of a container ready and return its bind entries; none if it concerns another of its pod.

    Args:
        document: config.json, with its annotations.
        container_id: From the runtime's command line.
        bundle: From the same; relative to the working directory.
        engine: Who calls.
        config_file: The host's configuration.

    Raises:
        Told: The container must not be created.
        SystemCallFailed: The child cannot be run, or does not answer.
    """
    linux = document.get("linux")
    read = ("namespaces", "uidMappings", "gidMappings")
    spec = {name: document[name] for name in ("annotations", "mounts", "root") if name in document}
    spec["linux"] = {name: linux[name] for name in read if name in linux} if isinstance(linux, dict) else None
    asking = {
        "container_id": container_id,
        "bundle": os.path.realpath(bundle or "."),
        "runtime": "kata",
        "creator": _ourselves(),
        "spec": spec,
    }
    command = Invocation("prepare", config_file=config_file, engine=engine).command()
    environment = dict(entry.split("=", 1) for entry in ENVIRONMENT)
    try:
        done = subprocess.run(
            command, input=canonical(asking), env=environment, capture_output=True, check=False, timeout=HOOK_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as cause:
        raise SystemCallFailed(f"the models cannot be made ready: {type(cause).__name__}: {cause}") from cause
    if done.returncode == 0:
        return _parse(done.stdout)
    if done.returncode in all_errors():
        raise Told(done.returncode, done.stderr.decode("utf-8", "replace").strip())
    raise SystemCallFailed(f"the process that makes models ready ended with {done.returncode}: {shown(done.stderr)}")


def _parse(data: bytes) -> list[dict[str, Any]]:
    fields = Fields(
        parse_object(data, limit_bytes=_LIMIT_BYTES, what=_WHAT, error=SystemCallFailed),
        what=_WHAT,
        error=SystemCallFailed,
    )

    def entry(value: object) -> dict[str, Any]:
        each = Fields(value, what=_WHAT, error=SystemCallFailed)
        found = {
            "destination": each.string("destination", limit=4096),
            "source": each.string("source", limit=4096),
            "options": list(each.strings("options", low=1, high=16)),
        }
        each.finish()
        return found

    entries = fields.items("binds", entry, low=0, high=64)
    fields.finish()
    return list(entries)


def take_back(container_id: str, bundle: str, config_file: str) -> None:
    """Remove what was made ready for a container that will not be created; a sweep does what cannot be done now."""
    from oci_hook.adoption import withdraw_own
    from oci_hook.config import load_config

    with suppress(SczError):
        withdraw_own(container_id, os.path.realpath(bundle or "."), _ourselves(), load_config(config_file))


def _ourselves() -> tuple[int, int]:
    return os.getpid(), process_start_time(os.getpid()) or 0
