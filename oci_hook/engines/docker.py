"""Docker: a script of the shim a runtime, and an entry for each in daemon.json. Source: dockerd(8), "runtimes".

daemon.json has no drop-ins. Only entries of ours are added to it and taken out of it; what it says otherwise stays.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from oci_hook.documents import parse_object
from oci_hook.engines.plan import Change, HostFiles, Plan, Settings
from oci_hook.errors import ConfigInvalid, OutputExists

_MAIN = "/etc/docker/daemon.json"
_LIMIT_BYTES = 1 << 20
_RELOAD = "systemctl reload docker"


def _main(settings: Settings) -> str:
    return settings.engine_config or _MAIN


def plan_install(settings: Settings, files: HostFiles) -> Plan:
    """Write the scripts, then daemon.json with an entry for each.

    Raises:
        ConfigInvalid: daemon.json cannot be read as dockerd reads it.
        OutputExists: An entry of such a name is not ours, or daemon.json is a link.
    """
    path = _main(settings)
    data, document = _load(path, files)
    runtimes = _runtimes(document, files.real(path))
    for runtime in settings.runtimes:
        there = runtimes.get(runtime.handler, {})
        if runtime.handler in runtimes and not _is_ours(there, settings):
            raise OutputExists(
                f"{files.real(path)} has a runtime {runtime.handler} that is not ours",
                remedy=f"rename it, or take it out of {files.real(path)}",
            )
        # What the administrator added stays, the runtime's own arguments (runtimeArgs) above all.
        runtimes[runtime.handler] = {**there, "path": settings.script_path("docker", runtime.handler)}
    changes = settings.scripts("docker")
    new = _written(data, {**document, "runtimes": runtimes})
    if new != data:
        changes += (Change(path, new),)
    return Plan(changes, next_steps=(_RELOAD,))


def plan_removal(settings: Settings, files: HostFiles) -> Plan:
    """Take our entries out of daemon.json, and the file away if nothing else is in it; then remove the scripts.

    Raises:
        ConfigInvalid: daemon.json cannot be read, or its default runtime is one of ours.
    """
    path, folder = _main(settings), os.path.join(settings.shim_directory, "docker")
    data, document = _load(path, files)
    runtimes = _runtimes(document, files.real(path))
    ours = [name for name, entry in runtimes.items() if _is_ours(entry, settings)]
    if document.get("default-runtime") in ours:
        raise ConfigInvalid(
            f"the default runtime in {files.real(path)} is {document['default-runtime']}",
            remedy="choose another default-runtime first",
        )
    changes: tuple[Change, ...] = ()
    if ours:
        left = {name: entry for name, entry in runtimes.items() if name not in ours}
        rest = {key: value for key, value in document.items() if key != "runtimes" or left}
        if "runtimes" in rest:
            rest["runtimes"] = left
        changes = (Change(path, _written(data, rest) if rest else None),)
    scripts, steps = settings.scripts_to_remove("docker", files)
    changes += scripts
    return Plan(changes, (folder, settings.shim_directory), (*steps, _RELOAD) if changes else ())


def state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong."""
    path = _main(settings)
    runtimes = _runtimes(_load(path, files)[1], files.real(path))
    ours = {name: entry for name, entry in runtimes.items() if _is_ours(entry, settings)}
    if not ours:
        return f"{path} lacks the runtimes" if files.below(os.path.join(settings.shim_directory, "docker")) else "no"
    expected = {change.path: change.data for change in settings.scripts("docker")}
    for entry in ours.values():
        if files.read(entry["path"]) is None:
            return f"{entry['path']} is missing"
        if entry["path"] in expected and files.read(entry["path"]) != expected[entry["path"]]:
            return f"{entry['path']} starts another installation, or with another configuration"
    missing = [runtime.handler for runtime in settings.runtimes if runtime.handler not in ours]
    return f"there is no runtime {missing[0]}" if missing else "yes"


def _load(path: str, files: HostFiles) -> tuple[bytes | None, dict[str, Any]]:
    files.verify_not_a_link(path)
    data = files.read(path)
    if data is None or not data.strip():  # dockerd takes an empty file for none
        return data, {}
    try:
        return data, parse_object(data, limit_bytes=_LIMIT_BYTES, what=files.real(path), error=ConfigInvalid)
    except ConfigInvalid as cause:
        raise ConfigInvalid(cause.message, remedy=f"correct {files.real(path)}, then run it again") from cause


def _runtimes(document: dict[str, Any], path: str) -> dict[str, Any]:
    found = document.get("runtimes", {})
    if not isinstance(found, dict):
        raise ConfigInvalid(f"{path}: runtimes is not an object", remedy=f"correct {path}, then run it again")
    return dict(found)


def _is_ours(entry: object, settings: Settings) -> bool:
    folder = os.path.join(settings.shim_directory, "docker")
    path = entry.get("path") if isinstance(entry, dict) else None
    return isinstance(path, str) and os.path.dirname(path) == folder


def _written(old: bytes | None, document: dict[str, Any]) -> bytes:
    """As it was indented before; four spaces, as in dockerd(8), if there was nothing."""
    found = re.match(rb"\s*\{\r?\n([ \t]+)", old or b"")
    return json.dumps(document, indent=found[1].decode() if found else 4, ensure_ascii=False).encode() + b"\n"
