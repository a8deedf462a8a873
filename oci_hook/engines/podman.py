"""podman: hooks.d. Sources: oci-hooks(5), containers.conf(5)."""

from __future__ import annotations

import os

from oci_hook.engines import hooks_directory
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import HostFiles, Plan, Settings, strings, table
from oci_hook.invocation import is_packaged

_CONFIGURATION = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
_BRINGS_BACK = "an upgrade of the package, or `apt install --reinstall scz-smm`, brings its own back"
_DROP_INS = "/etc/containers/containers.conf.d"


def directory_of(settings: Settings) -> str:
    """Where the files go."""
    return settings.hooks_directory or DEFAULT_DIRECTORY


def plan_install(settings: Settings, files: HostFiles) -> Plan:
    """Write the hooks.d files; say what is left if podman does not read that directory."""
    directory = directory_of(settings)
    changes = hooks_directory.plan_files("podman", directory, settings, files)
    steps = _next_steps(directory, files)
    if _is_the_packages(directory) and any(files.read(change.path) != change.data for change in changes):
        steps += (f"{directory} has the package's files: {_BRINGS_BACK}; give --hooks-dir a directory of your own",)
    return Plan(changes, next_steps=steps)


def plan_removal(settings: Settings, files: HostFiles) -> Plan:
    """Remove the hooks.d files."""
    directory = directory_of(settings)
    changes = hooks_directory.plan_removal("podman", directory, files)
    step = f"these files are the package's: {_BRINGS_BACK}; `apt remove scz-smm` takes all of it away"
    return Plan(changes, next_steps=(step,) if changes and _is_the_packages(directory) else ())


def _is_the_packages(directory: str) -> bool:
    return is_packaged() and directory == DEFAULT_DIRECTORY


def state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong."""
    directory = directory_of(settings)
    found = hooks_directory.state("podman", directory, settings, files)
    unread = _next_steps(directory, files)
    return unread[0] if found == "yes" and unread else found


def _next_steps(directory: str, files: HostFiles) -> tuple[str, ...]:
    read = _read_directories(files)
    if directory in read:
        return ()
    listed = ", ".join(f'"{each}"' for each in [*read, directory])
    return (
        f"podman does not read {directory} by itself: put `hooks_dir = [{listed}]` below [engine] into "
        f"{_DROP_INS}/50-scz-smm.conf",
    )


def _read_directories(files: HostFiles) -> list[str]:
    """`hooks_dir` as the last file that names it says."""
    found = [DEFAULT_DIRECTORY]
    drop_ins = [path for path in files.below(_DROP_INS) if path.endswith(".conf")]
    for path in (*_CONFIGURATION, *drop_ins):
        named = table(files.read_toml(path), "engine").get("hooks_dir")
        if isinstance(named, list):
            found = [os.path.normpath(each) for each in strings(named)]
    return found
