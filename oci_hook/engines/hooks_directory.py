"""hooks.d: the files by which podman and CRI-O learn of the hook. Source: oci-hooks(5), version 1.0.0.

A file gives the same arguments to all its stages, so there is one file a stage. Files of one name in two directories
are one hook, the last directory's: that is how CRI-O's go before podman's.
"""

from __future__ import annotations

import json
import os
from typing import Any

from oci_hook.engines.plan import Change, HostFiles, Settings
from oci_hook.errors import FileUnreadable, OutputExists
from oci_hook.invocation import ENVIRONMENT, Invocation, parse_invocation

DEFAULT_DIRECTORY = "/usr/share/containers/oci/hooks.d"
"""Both engines read it if nothing else is configured; podman 4.3 does not read /etc/containers/oci/hooks.d then."""
STAGES = ("poststop", "prestart")  # in this order: what starts containers is written when all else is there


def hooks_d_documents(engine: str, config_file: str, timeout_seconds: int) -> dict[str, bytes]:
    """The files by their names.

    The environment is never empty: an engine passes its own on to a hook that names none (docs/runtimes.md).
    """
    when = {r"^smm\.scz/": ".*"}
    return {file_name(stage): _document(stage, when, engine, config_file, timeout_seconds) for stage in STAGES}


def precreate_document(config_file: str, timeout_seconds: int) -> bytes:
    """podman's file for what is delivered before `create`: of the containers that ask for a VM.

    Neither CRI-O nor buildah (`podman build`) knows the stage: where they read this file they use no hook at all, and
    fail. So it may not lie in a directory that one of them reads.
    """
    when = {r"^smm\.scz/require$": "(^|,)runtime=kata(,|$)"}
    return _document("precreate", when, "podman", config_file, timeout_seconds)


def _document(stage: str, when: dict[str, str], engine: str, config_file: str, timeout_seconds: int) -> bytes:
    arguments = Invocation(stage, config_file=config_file, engine=engine).command()
    hook = {"path": arguments[0], "args": arguments, "env": list(ENVIRONMENT), "timeout": timeout_seconds}
    document = {"version": "1.0.0", "hook": hook, "when": {"annotations": when}, "stages": [stage]}
    return json.dumps(document, indent=2).encode() + b"\n"


def file_name(stage: str) -> str:
    """The same for all engines."""
    return f"scz-smm-{stage}.json"


def plan_files(engine: str, directory: str, settings: Settings, files: HostFiles) -> tuple[Change, ...]:
    """The files to write.

    Raises:
        OutputExists: Those of another engine lie there.
    """
    for stage in STAGES:
        path = os.path.join(directory, file_name(stage))
        other = installed_engine(files, path)
        if other not in (None, engine):
            raise OutputExists(
                f"{files.real(path)} makes {other} call the hook",
                remedy=f"give another --hooks-dir, or `sczctl uninstall --engine {other} --hooks-dir {directory}`",
            )
    documents = hooks_d_documents(engine, settings.config_file, settings.timeout_seconds)
    return tuple(Change(os.path.join(directory, name), data) for name, data in documents.items())


def plan_removal(engine: str, directory: str, files: HostFiles) -> tuple[Change, ...]:
    """The files to remove: those that are there and are not another engine's."""
    paths = [os.path.join(directory, file_name(stage)) for stage in reversed(STAGES)]
    return tuple(
        Change(path, None) for path in paths if files.exists(path) and installed_engine(files, path) in (None, engine)
    )


def installed_engine(files: HostFiles, path: str) -> str | None:
    """The engine that a file of ours names; None if there is no such file, or it names none."""
    return _engine_of(_arguments(files, path))


def _engine_of(arguments: list[str] | None) -> str | None:
    invocation = parse_invocation(arguments[4:]) if arguments else None
    return invocation.engine if invocation else None


def _arguments(files: HostFiles, path: str) -> list[str] | None:
    try:
        document: Any = json.loads(files.read(path) or b"null")
        arguments = document["hook"]["args"]
    except (FileUnreadable, ValueError, RecursionError, KeyError, TypeError):
        return None
    return arguments if isinstance(arguments, list) and all(isinstance(word, str) for word in arguments) else None


def state(engine: str, directory: str, settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong with the files of that directory."""
    found = {stage: os.path.join(directory, file_name(stage)) for stage in STAGES}
    if not any(files.exists(path) for path in found.values()):
        return "no"
    return next((wrong for stage in STAGES if (wrong := problem(stage, engine, found[stage], settings, files))), "yes")


def problem(stage: str, engine: str, path: str, settings: Settings, files: HostFiles) -> str:
    """What is wrong with one file; empty if nothing is."""
    if not files.exists(path):
        return f"{path} is missing"
    arguments = _arguments(files, path)
    if arguments is None:
        return f"{path} cannot be read"
    if _engine_of(arguments) not in (None, engine):
        return f"{path} is that of {_engine_of(arguments)}"
    if arguments != Invocation(stage, config_file=settings.config_file, engine=engine).command():
        return f"{path} calls another installation, or with another configuration"
    return ""
