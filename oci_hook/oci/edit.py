"""What the shim changes in config.json: our hooks behind those that are there, bound to the file by a digest.

Before a VM sandbox's runtime the bind entries of the models come behind the other mounts, too. Bytes in, bytes out;
nothing is read or written here. The digest is SHA-256 of the new file with zeros in the digest's own place
(`verify_spec_digest`), and an argument of the prestart hook: the runtime keeps the arguments that it read, so a file
that is changed afterwards does not fit them. OCI runtime specification, "POSIX-platform Hooks".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from oci_hook.documents import parse_object, shown
from oci_hook.errors import AnnotationInvalid, SpecInvalid
from oci_hook.invocation import ENVIRONMENT, NO_DIGEST, Invocation
from oci_hook.oci.annotations import CONTAINER_WIDE_KEYS, PREFIX, has_ours, parse_annotations, parse_requests
from oci_hook.oci.engine import read_engine_facts
from oci_hook.oci.spec import MAX_SPEC_BYTES, verify_spec_digest

HOOK_SECONDS = 300
VARIABLES = "SMM_SCZ_"
_WHAT = "config.json"
_VARIABLE = re.compile(r"SMM_SCZ_(?:(TOKEN|REQUIRE)|(MODEL|PATH)(?:_([A-Z0-9_]{1,32}))?)")
_READ_HERE = ("annotations", "hooks", "mounts", "process")
_ANEW = "let the engine write config.json anew, or take every hook of oci_hook/launch.py out of it"


def parse_document(data: bytes) -> dict[str, Any]:
    """Parse a config.json strictly.

    Raises:
        SpecInvalid: It is not one strict JSON object; or a member that we read is there in other letters, too, which
            Go's parser folds into ours: capitals, a long s, the Kelvin sign.
    """
    document = parse_object(data, limit_bytes=MAX_SPEC_BYTES, what=_WHAT, error=SpecInvalid)
    for name in document:
        if name.casefold() in _READ_HERE and name not in _READ_HERE:
            raise SpecInvalid(f"{_WHAT} has {shown(name)} in other letters: runtimes differ in what they make of it")
    return document


def requested_annotations(document: Mapping[str, Any], engine: str) -> Mapping[str, str]:
    """The annotations of ours of a container; empty if there are none, or if it is a pod's sandbox.

    Docker before 24 cannot set annotations: under it, and only if there is none of ours, variables of the workload's
    environment select in their place. An image can set those, too; they select, as annotations do, and relax nothing.

    Raises:
        SpecInvalid: The file is malformed.
        AnnotationInvalid: One of them is unknown, malformed or there twice; or variables narrow what a device asks for.
    """
    annotations = parse_annotations(document.get("annotations"), what=_WHAT, error=SpecInvalid)
    annotated = ours = {key: text for key, text in annotations.items() if key.startswith(PREFIX)}
    if not ours and engine == "docker":
        ours = _from_environment(document)
    if not has_ours(ours) or read_engine_facts(engine, annotations).is_sandbox:
        return {}
    if _has_device(document) and ours.keys() <= CONTAINER_WIDE_KEYS:
        if not annotated:  # dropped in silence, a requirement would not hold
            raise AnnotationInvalid(
                f"a device's hook does not see the variables {VARIABLES}*",
                remedy="give annotations beside a device (`docker run --annotation`), not variables",
            )
        return {}  # a device's own hook delivers, and reads what holds for the container
    parse_requests(ours)  # the hook does the same; here the engine shows its user what is wrong
    return ours


def _has_device(document: Mapping[str, Any]) -> bool:
    """Whether CDI has put a hook of ours into the file, with what it asks for in its arguments."""
    return any(
        _carries(entry, "--request") is not None
        for entries in _table(document, "hooks").values()
        for entry in _list(entries)
    )


def _from_environment(document: Mapping[str, Any]) -> dict[str, str]:
    process = document.get("process")
    variables = process.get("env") if isinstance(process, dict) else None
    if not isinstance(variables, list | None) or not all(isinstance(entry, str) for entry in variables or ()):
        raise SpecInvalid(f"{_WHAT}: process.env is not a list of strings")
    found: dict[str, str] = {}
    for entry in variables or ():
        name, equals, text = entry.partition("=")
        if not name.startswith(VARIABLES):
            continue
        match = _VARIABLE.fullmatch(name)
        if match is None or not equals:
            raise AnnotationInvalid(f"the environment variable {shown(name)} is not known")
        key = PREFIX + (match[1] or match[2]).lower()
        if match[3]:
            key += "." + match[3].lower().replace("_", "-")
        if key in found:
            raise AnnotationInvalid(f"the environment variable {shown(name)} is there twice")
        found[key] = text
    return found


def add_hooks(
    data: bytes,
    document: dict[str, Any],
    annotations: Mapping[str, str],
    *,
    engine: str,
    config_file: str,
    binds: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The new config.json: `annotations` in it, our hooks behind the others, and bind entries behind the mounts.

    Args:
        data: The file as it is; returned as it is if the shim has been there before and nothing was changed since.
        document: The same, parsed; it is changed.
        annotations: Of `requested_annotations`.
        engine: Who calls; the hook believes its annotations.
        config_file: Path of the configuration, for the hook.
        binds: `destination`, `source` and `options` of each model that is there already.

    Raises:
        SpecInvalid: Hooks or mounts are malformed, or a hook carries a digest that the file does not fit.
    """
    entries = [{**bind, "type": "bind"} for bind in binds]
    ours = {stage: _entry(stage, engine, config_file, NO_DIGEST) for stage in ("prestart", "poststop")}
    hooks = document["hooks"] = _table(document, "hooks")
    if marked := _marked(hooks):
        _verify_marked(data, marked, engine, config_file)
        if any(entry not in _list(document.get("mounts")) for entry in entries):
            raise SpecInvalid(f"{_WHAT} was prepared for another container", remedy=_ANEW)
        return data
    document["annotations"] = {**_table(document, "annotations"), **annotations}
    if entries:
        document["mounts"] = [*_list(document.get("mounts")), *entries]
    for stage, entry in ours.items():
        hooks[stage] = [*_list(hooks.get(stage)), entry]
    digest = hashlib.sha256(_serialised(document)).hexdigest()
    # Only here, and not wherever a container may have put that many zeros.
    ours["prestart"].update(_entry("prestart", engine, config_file, digest))
    return _serialised(document)


def verify_unchanged(data: bytes, document: Mapping[str, Any], *, engine: str, config_file: str) -> None:
    """Check, before anything is decrypted for it, that a file into which a shim wrote our hooks is still what it was.

    Raises:
        SpecInvalid: Hooks are malformed, or one carries a digest that the file does not fit.
    """
    if marked := _marked(_table(document, "hooks")):
        _verify_marked(data, marked, engine, config_file)


def _marked(hooks: Mapping[str, Any]) -> list[Any]:
    """Our hooks that carry a digest."""
    return [
        entry for entries in hooks.values() for entry in _list(entries) if _carries(entry, "--spec-digest") is not None
    ]


def _verify_marked(data: bytes, marked: list[Any], engine: str, config_file: str) -> None:
    digest = _carries(marked[0], "--spec-digest") or ""
    try:
        verify_spec_digest(data, digest)
    except SpecInvalid as cause:
        raise SpecInvalid(cause.message, remedy=_ANEW) from cause
    if marked != [_entry("prestart", engine, config_file, digest)]:
        raise SpecInvalid(f"{_WHAT} was prepared by another shim, or twice")


def _serialised(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _entry(stage: str, engine: str, config_file: str, digest: str) -> dict[str, Any]:
    """A hook of ours. Only what runs before the workload looks at the digest: a bundle may be gone at poststop."""
    bound = digest if stage == "prestart" else None
    command = Invocation(stage, config_file=config_file, engine=engine, spec_digest=bound).command()
    return {"path": command[0], "args": command, "env": list(ENVIRONMENT), "timeout": HOOK_SECONDS}


def _carries(entry: object, option: str) -> str | None:
    """What follows an option in the command line of a hook of ours; None for others' hooks, or without it."""
    arguments = _list(entry.get("args")) if isinstance(entry, dict) else []
    words = [str(word) for word in arguments]
    if option not in words or not any(word.endswith("/oci_hook/launch.py") for word in words):
        return None
    return "".join(words[words.index(option) + 1 :][:1])


def _table(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = document.get(name)
    if not isinstance(value, dict | None):
        raise SpecInvalid(f"{_WHAT}: {name} is not an object")
    return dict(value or {})


def _list(value: object) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise SpecInvalid(f"{_WHAT}: a list of hooks, of their arguments or of mounts is not a list")
    return list(value or ())
