"""podman: hooks.d; and for VM sandboxes the stage `precreate`, in a directory that only podman is told of.

CRI-O and buildah (`podman build`) read podman's default directories, too, and give up at a stage that they do not know:
so the file for `precreate` lies elsewhere, and a drop-in of containers.conf names that directory beside the others.
Sources: oci-hooks(5), containers.conf(5).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from oci_hook.engines import hooks_directory
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import Change, HostFiles, Plan, Settings, strings, table
from oci_hook.errors import EngineUnsupported
from oci_hook.invocation import is_packaged

_CONFIGURATION = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
_BRINGS_BACK = "an upgrade of the package, or `apt install --reinstall scz-smm`, brings its own back"
_DROP_INS = "/etc/containers/containers.conf.d"
OWN_DIRECTORY = "/etc/scz-smm/hooks.d-podman"
PRECREATE_FILE = os.path.join(OWN_DIRECTORY, hooks_directory.file_name("precreate"))
DROP_IN = f"{_DROP_INS}/60-scz-smm-before-create.conf"


def directory_of(settings: Settings) -> str:
    """Where the files go."""
    return settings.hooks_directory or DEFAULT_DIRECTORY


def plan_install(settings: Settings, files: HostFiles) -> Plan:
    """Write the hooks.d files; say what is left if podman does not read that directory.

    Raises:
        EngineUnsupported: The directory is the one that is kept for `precreate`.
    """
    directory = directory_of(settings)
    if os.path.normpath(directory) == OWN_DIRECTORY:
        raise EngineUnsupported(
            f"{OWN_DIRECTORY} is for what --before-create writes", remedy="give another --hooks-dir"
        )
    changes = hooks_directory.plan_files("podman", directory, settings, files)
    steps = _next_steps(directory, files)
    if settings.before_create:
        steps = _overridden(files)
        changes += _before_create(directory, settings, files)
    if _is_the_packages(directory) and any(files.read(change.path) != change.data for change in changes[:2]):
        steps += (f"{directory} has the package's files: {_BRINGS_BACK}; give --hooks-dir a directory of your own",)
    return Plan(changes, next_steps=steps)


def plan_removal(settings: Settings, files: HostFiles) -> Plan:
    """Remove the hooks.d files and what --before-create wrote; with that option, only the latter."""
    directory = directory_of(settings)
    changes = tuple(Change(path, None) for path in (DROP_IN, PRECREATE_FILE) if files.exists(path))
    if settings.before_create:
        unread = directory not in _read_directories(files, without=DROP_IN) and DROP_IN in [c.path for c in changes]
        used = hooks_directory.state("podman", directory, settings, files) != "no"
        return Plan(changes, (OWN_DIRECTORY,), (_told(directory, files),) if unread and used else ())
    hooks = hooks_directory.plan_removal("podman", directory, files)
    step = f"these files are the package's: {_BRINGS_BACK}; `apt remove scz-smm` takes all of it away"
    steps = (step,) if hooks and _is_the_packages(directory) else ()
    return Plan((*changes, *hooks), (OWN_DIRECTORY,), steps)


def _is_the_packages(directory: str) -> bool:
    return is_packaged() and directory == DEFAULT_DIRECTORY


def state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong."""
    directory = directory_of(settings)
    found = hooks_directory.state("podman", directory, settings, files)
    unread = _next_steps(directory, files)
    return unread[0] if found == "yes" and unread else found


def _next_steps(directory: str, files: HostFiles) -> tuple[str, ...]:
    return () if directory in _read_directories(files) else (_told(directory, files),)


def _told(directory: str, files: HostFiles) -> str:
    read = _read_directories(files, without=DROP_IN)
    listed = ", ".join(f'"{each}"' for each in [*read, directory])
    return (
        f"podman does not read {directory} by itself: put `hooks_dir = [{listed}]` below [engine] into "
        f"{_DROP_INS}/50-scz-smm.conf"
    )


# --- before create ----------------------------------------------------------------------------------------------------


def _before_create(directory: str, settings: Settings, files: HostFiles) -> tuple[Change, ...]:
    """The file for `precreate`, then the drop-in by which podman reads it; the hooks that follow are there by then."""
    read = [each for each in _read_directories(files, until=DROP_IN) if each != OWN_DIRECTORY]
    named = [*read, *([] if directory in read else [directory]), OWN_DIRECTORY]
    document = hooks_directory.precreate_document(settings.config_file, settings.timeout_seconds)
    return Change(PRECREATE_FILE, document), Change(DROP_IN, drop_in(named))


def drop_in(directories: list[str]) -> bytes:
    """The drop-in's text."""
    lines = "".join(f"    {json.dumps(each)},\n" for each in directories)
    return (
        "# Written by `sczctl install --engine podman --before-create`; uninstall with the same removes it.\n"
        "# hooks_dir here replaces that of containers.conf and of earlier drop-ins: their directories are repeated.\n"
        "# CRI-O and `podman build` do not know the stage in the last one: it is in no directory that they read.\n"
        f"[engine]\nhooks_dir = [\n{lines}]\n"
    ).encode()


def before_create_state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong, of what --before-create writes."""
    if not files.exists(PRECREATE_FILE):
        return f"{PRECREATE_FILE} is missing, and {DROP_IN} is there" if files.exists(DROP_IN) else "no"
    wrong = hooks_directory.problem("precreate", "podman", PRECREATE_FILE, settings, files)
    if wrong:
        return wrong
    if OWN_DIRECTORY not in _read_directories(files):
        return next(iter(_overridden(files)), f"podman does not read {OWN_DIRECTORY}")
    return "yes"


def _overridden(files: HostFiles) -> tuple[str, ...]:
    """The drop-ins that are read after ours and set `hooks_dir` without our directory."""
    return tuple(
        f"{path} sets hooks_dir and is read after {DROP_IN}: add {OWN_DIRECTORY} to it"
        for path, named in _settings_in_order(files)
        if path > DROP_IN and path.startswith(_DROP_INS) and not _appends(named) and OWN_DIRECTORY not in _paths(named)
    )


# --- what podman reads ------------------------------------------------------------------------------------------------


def _settings_in_order(files: HostFiles) -> Iterator[tuple[str, list[Any]]]:
    """Each file that sets `hooks_dir`, as podman reads them."""
    drop_ins = [path for path in files.below(_DROP_INS) if path.endswith(".conf")]
    for path in (*_CONFIGURATION, *drop_ins):
        named = table(files.read_toml(path), "engine").get("hooks_dir")
        if isinstance(named, list):
            yield path, named


def _read_directories(files: HostFiles, *, without: str = "", until: str = "") -> list[str]:
    """`hooks_dir` as the last file that names it says; without one of the files, or only up to one of the drop-ins."""
    found = [DEFAULT_DIRECTORY]
    for path, named in _settings_in_order(files):
        if path == without or (until and path.startswith(_DROP_INS) and path >= until):
            continue
        kept = found if _appends(named) else []
        found = list(dict.fromkeys([*kept, *_paths(named)]))
    return found


def _paths(named: list[Any]) -> list[str]:
    return [os.path.normpath(each) for each in strings(named)]


def _appends(named: list[Any]) -> bool:
    """`{append=true}` in a list (podman 5)."""
    return any(isinstance(each, dict) and each.get("append") is True for each in named)
