"""CRI-O: hooks.d in a directory of its own, and the drop-in that names it. Sources: crio.conf(5), crio.conf.d(5).

podman reads CRI-O's default directory too, and podman's users can write CRI-O's annotations: so what calls the hook
as CRI-O lies where podman does not look. `hooks_dir` of a later drop-in replaces that of an earlier one, so ours
repeats what it finds and adds to it.
"""

from __future__ import annotations

import json
import os

from oci_hook.engines import hooks_directory
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import Change, HostFiles, Plan, Settings, strings, table
from oci_hook.errors import EngineUnsupported

OWN_DIRECTORY = "/etc/scz-smm/hooks.d-cri-o"
_MAIN = "/etc/crio/crio.conf"
_NAME = "50-scz-smm.conf"
_RESTART = "systemctl restart crio"


def directory_of(settings: Settings) -> str:
    """Where the hooks.d files go."""
    return settings.hooks_directory or OWN_DIRECTORY


def drop_in_of(settings: Settings) -> str:
    """Where the drop-in goes."""
    return os.path.join(_drop_ins(settings), _NAME)


def main_file(settings: Settings) -> str:
    """CRI-O's own file."""
    return settings.engine_config or _MAIN


def _drop_ins(settings: Settings) -> str:
    return os.path.join(os.path.dirname(main_file(settings)), "crio.conf.d")


def drop_in(directories: list[str]) -> bytes:
    """The drop-in's text."""
    lines = "".join(f"    {json.dumps(each)},\n" for each in directories)
    return (
        "# Written by `sczctl install --engine cri-o`; `sczctl uninstall --engine cri-o` removes it.\n"
        "# hooks_dir here replaces that of crio.conf and of earlier drop-ins: their directories are repeated.\n"
        "# Where a file of one name lies in two of them, the last one wins (oci-hooks(5)).\n"
        f"[crio.runtime]\nhooks_dir = [\n{lines}]\n"
    ).encode()


def plan_install(settings: Settings, files: HostFiles) -> Plan:
    """Write the hooks.d files, then the drop-in.

    Raises:
        EngineUnsupported: The directory is one that podman reads too.
        ConfigInvalid: A file of CRI-O's configuration is not TOML.
    """
    directory = directory_of(settings)
    if os.path.normpath(directory) in (DEFAULT_DIRECTORY, "/etc/containers/oci/hooks.d"):
        raise EngineUnsupported(
            f"podman reads {directory} too, and its users can write CRI-O's annotations",
            remedy=f"give another --hooks-dir; the default is {OWN_DIRECTORY}",
        )
    hooks = hooks_directory.plan_files("cri-o", directory, settings, files)
    before, later = _directories(settings, files)
    named = [each for each in before if each != directory] + [directory]
    steps = [f"{path} sets hooks_dir and is read after our drop-in: add {directory} to it" for path in later]
    return Plan((*hooks, Change(drop_in_of(settings), drop_in(named))), next_steps=(*steps, _RESTART))


def plan_removal(settings: Settings, files: HostFiles) -> Plan:
    """Remove the drop-in, then the hooks.d files."""
    path = drop_in_of(settings)
    changes: tuple[Change, ...] = (Change(path, None),) if files.exists(path) else ()
    changes += hooks_directory.plan_removal("cri-o", directory_of(settings), files)
    steps = [f"{path} names {directory_of(settings)}: take that away" for path in _directories(settings, files)[1]]
    return Plan(changes, (OWN_DIRECTORY,), (*steps, _RESTART) if changes else ())


def state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong."""
    directory = directory_of(settings)
    found = hooks_directory.state("cri-o", directory, settings, files)
    if found != "yes":
        return found
    read = _last_named(settings, files)
    if directory not in read:
        return f"CRI-O does not read {directory}"
    if read[-1] != directory and any(
        files.exists(os.path.join(each, hooks_directory.file_name("prestart")))
        for each in read[read.index(directory) + 1 :]
    ):
        return f"files of the same name in {read[-1]} go before those in {directory}"
    return "yes"


def _settings_in_order(settings: Settings, files: HostFiles) -> list[tuple[str, list[str]]]:
    """Each file that sets `hooks_dir`, as CRI-O reads them: crio.conf, then crio.conf.d by name."""
    found = []
    for path in (main_file(settings), *files.below(_drop_ins(settings))):
        named = table(files.read_toml(path), "crio", "runtime").get("hooks_dir")
        if isinstance(named, list):
            found.append((path, [os.path.normpath(each) for each in strings(named)]))
    return found


def _directories(settings: Settings, files: HostFiles) -> tuple[list[str], list[str]]:
    """What is configured before our drop-in; and the files after it that set `hooks_dir` without ours."""
    own, directory = drop_in_of(settings), directory_of(settings)
    before, later = [DEFAULT_DIRECTORY], []
    for path, named in _settings_in_order(settings, files):
        if path == main_file(settings) or path < own:
            before = named
        elif path > own and directory not in named:
            later.append(path)
    return before, later


def _last_named(settings: Settings, files: HostFiles) -> list[str]:
    return ([[DEFAULT_DIRECTORY]] + [named for _, named in _settings_in_order(settings, files)])[-1]
