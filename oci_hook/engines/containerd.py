"""containerd: a script of the shim a runtime, and a drop-in with a handler for each. Source: its docs/cri/config.md.

The administrator's config.toml is never written. Where a drop-in would undo what it says (`containerd_config`), no
drop-in is written either, and the plan names the lines to add by hand.
"""

from __future__ import annotations

import json
import os

from oci_hook.engines.containerd_config import DROP_INS, SECTIONS, Configuration, load_configuration
from oci_hook.engines.plan import Change, HostFiles, Plan, Runtime, Settings, strings, table
from oci_hook.errors import ConfigInvalid, FileUnreadable

_MAIN = "/etc/containerd/config.toml"
_NAME = "50-scz-smm.toml"
_RUNTIME_TYPE = "io.containerd.runc.v2"  # its shim calls any runtime of runc's command line by `BinaryName`
RESTART = "systemctl restart containerd"
_HEAD = "# Written by `sczctl install --engine containerd`; `sczctl uninstall --engine containerd` removes it."


def drop_in_of(settings: Settings) -> str:
    """Where the drop-in goes: conf.d beside the main file."""
    return os.path.join(os.path.dirname(main_file(settings)), "conf.d", _NAME)


def main_file(settings: Settings) -> str:
    """containerd's own file."""
    return settings.engine_config or _MAIN


def handlers_text(settings: Settings, version: int, *, systemd_cgroup: bool, with_runc: bool) -> str:
    """The handlers, as TOML for a configuration of that version.

    Args:
        systemd_cgroup: The administrator's runc has it: the kubelet's cgroups must mean the same to ours.
        with_runc: Name runc's own handler too: containerd 1.x forgets it once another is named.
    """
    lines: list[str] = []
    prefix = f'plugins."{SECTIONS[version]}".containerd.runtimes'
    if with_runc:
        lines += [f"[{prefix}.runc]", f'  runtime_type = "{_RUNTIME_TYPE}"', ""]
    for runtime in settings.runtimes:
        lines += [
            f"[{prefix}.{runtime.handler}]",
            f'  runtime_type = "{_RUNTIME_TYPE}"',
            '  pod_annotations = ["smm.scz/*"]',
            f"  [{prefix}.{runtime.handler}.options]",
            f"    BinaryName = {json.dumps(settings.script_path('containerd', runtime.handler))}",
            *(["    SystemdCgroup = true"] if systemd_cgroup else []),
            "",
        ]
    return "\n".join(lines)


def plan_install(settings: Settings, files: HostFiles) -> Plan:
    """Write the scripts, then the drop-in if it harms nothing.

    Raises:
        ConfigInvalid: config.toml is not TOML, or of version 1.
    """
    found = load_configuration(main_file(settings), files)
    merges = merges_tables(settings, found)
    version = drop_in_version(settings, found)
    path = drop_in_of(settings)
    handlers = found.handlers(merges=merges, without=path)
    systemd_cgroup = table(handlers.get("runc"), "options").get("SystemdCgroup") is True
    scripts = settings.scripts("containerd")
    others = found.sections(without=path)
    steps = ["the CRI plugin is in disabled_plugins: only `ctr` sees containerd then"] if found.disables_pods() else []
    if not merges and others:
        with_runc = not handlers
        lines = handlers_text(settings, version, systemd_cgroup=systemd_cgroup, with_runc=with_runc)
        undone = (Change(path, None),) if files.exists(path) else ()
        if any(not _is_ours(handlers, runtime, settings) for runtime in settings.runtimes):
            steps.append(
                f"containerd before 2.0 lets a drop-in replace the whole section of {others[-1][0]}, so no drop-in was "
                f"written; add to {others[-1][0]}:\n\n{lines}"
            )
        return Plan((*undone, *scripts), next_steps=(*steps, RESTART))
    lines = handlers_text(settings, version, systemd_cgroup=systemd_cgroup, with_runc=not merges)
    if not found.imports(path):
        steps.append(import_step(found, path))
    data = f"{_HEAD}\nversion = {version}\n\n{lines}".rstrip("\n") + "\n"
    return Plan((*scripts, Change(path, data.encode())), next_steps=(*steps, RESTART))


def import_step(found: Configuration, path: str) -> str:
    """What a person has to do so that containerd reads a drop-in."""
    pattern = os.path.join(os.path.dirname(path), "*.toml")
    if not found.documents:
        if pattern == DROP_INS:
            return (
                f"{found.main} does not exist: containerd 2.2 and later read {pattern} then; for an older one make it "
                f'with the lines `version = 2` and `imports = ["{pattern}"]`'
            )
        return f'make {found.main} with the lines `version = 2` and `imports = ["{pattern}"]`'
    named = strings(found.documents[0][1].get("imports"))
    listed = ", ".join(json.dumps(each) for each in [*named, pattern])
    verb = "change `imports` at the top of" if named else "add at the top of"
    return f"{verb} {found.main}: imports = [{listed}]"


def plan_removal(settings: Settings, files: HostFiles) -> Plan:
    """Remove the drop-in, then the scripts; say what of ours is left in files of the administrator's."""
    path, folder = drop_in_of(settings), os.path.join(settings.shim_directory, "containerd")
    scripts, of_scripts = settings.scripts_to_remove("containerd", files)
    changes = (*((Change(path, None),) if files.exists(path) else ()), *scripts)
    steps = []
    try:
        found = load_configuration(main_file(settings), files)
    except (ConfigInvalid, FileUnreadable):  # it does not keep us from removing what is ours
        return Plan(changes, (folder, settings.shim_directory), (RESTART,))
    if found.names(path):
        steps.append(f"take {path} out of `imports`: containerd does not start without a file that is named there")
    for file, section in found.sections(without=path):
        for name, handler in table(section, "containerd", "runtimes").items():
            if str(table(handler, "options").get("BinaryName", "")).startswith(f"{folder}/"):
                fate = "starts no container" if settings.keep_scripts else "is gone"
                steps.append(f"take the handler {name} out of {file}: its script {fate}")
    if changes or (steps and settings.keep_scripts):
        steps += [*of_scripts, RESTART]
    return Plan(changes, (folder, settings.shim_directory), tuple(steps))


def state(settings: Settings, files: HostFiles) -> str:
    """`yes`, `no`, or what is wrong."""
    found = load_configuration(main_file(settings), files)
    handlers = found.handlers(merges=merges_tables(settings, found))
    folder = os.path.join(settings.shim_directory, "containerd")
    named = {n: h for n, h in handlers.items() if str(table(h, "options").get("BinaryName", "")).startswith(folder)}
    if not named:
        unread = files.exists(drop_in_of(settings)) or files.below(folder)
        return f"{found.main} does not have the handlers" if unread else "no"
    expected = {change.path: change.data for change in settings.scripts("containerd")}
    for name, handler in named.items():
        path = str(table(handler, "options")["BinaryName"])
        if files.read(path) is None:
            return f"{path} is missing"
        if path in expected and files.read(path) != expected[path]:
            return f"{path} starts another installation, or with another configuration"
        if "smm.scz/*" not in strings(handler.get("pod_annotations")):
            return f'the handler {name} does not pass the annotations: pod_annotations = ["smm.scz/*"]'
    missing = [runtime.handler for runtime in settings.runtimes if runtime.handler not in named]
    return f"there is no handler {missing[0]}" if missing else "yes"


def _is_ours(handlers: dict[str, dict[str, object]], runtime: Runtime, settings: Settings) -> bool:
    binary = table(handlers.get(runtime.handler), "options").get("BinaryName")
    return binary == settings.script_path("containerd", runtime.handler)


def merges_tables(settings: Settings, found: Configuration) -> bool:
    """Whether containerd merges a drop-in's tables into those of config.toml."""
    return found.version >= 3 or (settings.engine_version or (0, 0)) >= (2, 0)


def drop_in_version(settings: Settings, found: Configuration) -> int:
    """The version of the drop-in: that of config.toml, as files of two versions are not merged."""
    if found.version >= 2:
        return min(found.version, 3)
    if found.version == 1 or (found.documents and table(found.documents[0][1], "plugins")):
        raise ConfigInvalid(
            f"{found.main} is of version 1, whose plugins have other names",
            remedy=f"bring {found.main} to version 2 (`containerd config migrate` shows how), then run it again",
        )
    return 3 if found.documents and merges_tables(settings, found) else 2
