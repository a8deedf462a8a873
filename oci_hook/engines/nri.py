"""NRI in the engine's own configuration: on, with time enough, and able to refuse a pod whose plugin is absent.

An engine waits 2 s for a plugin's answer by default and then goes on **without** it; a model may need longer. The
validator of NRI 0.10 (containerd 2.2, CRI-O 1.34) makes `required-plugins.noderesource.dev` in a pod's annotations
count. No plugin is required of every pod here: that would keep a node's own pods from starting before `scz-nri`.
Sources: containerd, internal/nri/config.go; crio.conf(5), crio.nri; NRI, docs/validation-plugins.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from oci_hook.documents import shown
from oci_hook.engines import containerd, crio
from oci_hook.engines.containerd_config import Configuration, load_configuration
from oci_hook.engines.plan import Change, HostFiles, Plan, Settings, strings, table
from oci_hook.errors import ConfigInvalid, EngineUnsupported, FileUnreadable
from oci_hook.invocation import ENVIRONMENT, Invocation
from oci_hook.oci.edit import HOOK_SECONDS

ENGINES = ("containerd", "cri-o")
REQUEST_SECONDS = 100
"""The kubelet gives an engine 2 minutes for a container's creation."""
DEFAULT_SECONDS = 2.0
"""Of the engines (NRI, DefaultPluginRequestTimeout)."""
VALIDATES_SINCE = {"containerd": (2, 2), "cri-o": (1, 34)}
SINCE = {"containerd": (1, 7)}
ON_SINCE = {"containerd": (2, 0), "cri-o": (1, 30)}
"""The first version in which NRI is on if nothing is configured."""
GUARD = "/etc/scz-smm/containerd-base-spec.json"
"""containerd's base specification with our hooks: a handler that has it starts nothing past them."""
_SECTION = "io.containerd.nri.v1.nri"
_NAMES = {"containerd": "50-scz-smm-nri.toml", "cri-o": "50-scz-smm-nri.conf"}
_START = "systemctl enable --now scz-nri"
_GUARD_STEP = (
    f'in every handler whose containers must not start without the plugin: base_runtime_spec = "{GUARD}" and '
    'pod_annotations = ["smm.scz/*"]; make the file anew after an upgrade of containerd'
)
_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "containerd": (("disable",), ("plugin_request_timeout",), ("default_validator", "enable")),
    "cri-o": (
        ("enable_nri",),
        ("nri_plugin_request_timeout",),
        ("default_validator", "nri_enable_default_validator"),
    ),
}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Found:
    """NRI as an engine's files have it.

    Attributes:
        enabled: Whether the engine lets plugins in.
        seconds: How long it waits for an answer.
        where: The file that says so; empty: its default.
        validates: Whether a pod's annotation can require a plugin.
    """

    enabled: bool
    seconds: float
    where: str
    validates: bool


def parse_duration(text: object) -> float | None:
    """Seconds of a duration as Go writes it (`2s`, `1m30s`); None if it is none."""
    if not isinstance(text, str) or not re.fullmatch(f"(?:{_PART.pattern})+", text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def drop_in_of(engine: str, settings: Settings) -> str:
    """Where the drop-in goes."""
    beside = containerd.drop_in_of(settings) if engine == "containerd" else crio.drop_in_of(settings)
    return os.path.join(os.path.dirname(beside), _NAMES[engine])


def _head(engine: str) -> str:
    command = f"--engine {engine} --nri`"
    return f"# Written by `sczctl install {command}; `sczctl uninstall {command} removes it."


def _containerd_text(settings: Settings) -> str:
    lines = [f'[plugins."{_SECTION}"]', "  disable = false", f'  plugin_request_timeout = "{REQUEST_SECONDS}s"']
    if (settings.engine_version or (0, 0)) >= VALIDATES_SINCE["containerd"]:
        lines += [f'  [plugins."{_SECTION}".default_validator]', "    enable = true"]
    return "\n".join(lines) + "\n"


_CRIO_TEXT = (
    "[crio.nri]\nenable_nri = true\n"
    f'nri_plugin_request_timeout = "{REQUEST_SECONDS}s"\n'
    "# known since CRI-O 1.34; passed over before\n"
    "[crio.nri.default_validator]\nnri_enable_default_validator = true\n"
)


def plan_install(engine: str, settings: Settings, files: HostFiles) -> Plan:
    """Write the drop-in; say what is left to do.

    Raises:
        EngineUnsupported: The engine is too old to have NRI.
        ConfigInvalid: A file of the engine's is not TOML, or of a version that has no such section.
    """
    path = drop_in_of(engine, settings)
    first = SINCE.get(engine, (0, 0))
    if (settings.engine_version or first) < first:
        had, wanted = (".".join(map(str, each)) for each in (settings.engine_version or first, first))
        raise EngineUnsupported(
            f"{engine} {had} has no NRI, which came with {wanted}",
            remedy=f"take {engine} {wanted} or later, or `sczctl install --engine {engine}` (not for virtual machines)",
        )
    steps = _config_steps(engine, settings, files)
    if engine == "cri-o":
        steps += _later_steps(engine, path, _crio_documents(settings, files)[1:])
        text = f"{_head(engine)}\n{_CRIO_TEXT}"
        return Plan((Change(path, text.encode()),), next_steps=(*steps, "systemctl restart crio", _START))
    guard = guard_change(settings)
    steps += [_GUARD_STEP] if guard else []
    found = load_configuration(containerd.main_file(settings), files)
    merges, text = containerd.merges_tables(settings, found), _containerd_text(settings)
    others = [name for name, document in found.documents if name != path and _section_of(document)]
    restart = (*steps, containerd.RESTART, _START)
    if others and not merges:
        undone = (Change(path, None),) if files.exists(path) else ()
        told = (
            f"containerd before 2.0 lets a drop-in replace the whole section of {others[-1]}, so no drop-in was "
            f"written; set there:\n\n{text}"
        )
        done = _found_in(found, settings).seconds >= REQUEST_SECONDS and _found_in(found, settings).enabled
        return Plan((*guard, *undone), next_steps=restart if done else (told, *restart))
    if not found.imports(path):
        restart = (containerd.import_step(found, path), *restart)
    restart = (*_later_steps(engine, path, found.documents[1:]), *restart)
    data = f"{_head(engine)}\nversion = {containerd.drop_in_version(settings, found)}\n\n{text}"
    return Plan((*guard, Change(path, data.encode())), next_steps=restart)


def _later_steps(engine: str, path: str, documents: Sequence[tuple[str, dict[str, object]]]) -> list[str]:
    """What a person has to do about drop-ins that are read after ours and say something else, or will one day."""
    steps = []
    for name, document in documents:
        section = _section_of(document) if engine == "containerd" else table(document, "crio", "nri")
        named = [".".join(keys) for keys in _KEYS[engine] if keys[-1] in table(section, *keys[:-1])]
        if name > path and named:
            steps.append(f"{name} is read after our drop-in: take {', '.join(named)} out of it")
    return steps


def guard_change(settings: Settings) -> tuple[Change, ...]:
    """The base specification for handlers whose containers must not start without the plugin; none if not asked for.

    Its hooks run whether the plugin is there or not: under runc they deliver, in a virtual machine they find what the
    plugin prepared, or refuse.

    Raises:
        EngineUnsupported: What `ctr oci spec` printed is no specification.
    """
    if settings.base_spec is None:
        return ()
    try:
        document = json.loads(settings.base_spec)
        hooks = {stage: list((document.get("hooks") or {}).get(stage) or ()) for stage in ("prestart", "poststop")}
        document["ociVersion"], document["root"]["path"]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as cause:
        raise EngineUnsupported("`ctr oci spec` printed no specification", remedy="ctr oci spec") from cause
    for stage, entries in hooks.items():
        command = Invocation(stage, config_file=settings.config_file, engine="containerd").command()
        entries.append({"path": command[0], "args": command, "env": list(ENVIRONMENT), "timeout": HOOK_SECONDS})
    data = json.dumps({**document, "hooks": {**(document.get("hooks") or {}), **hooks}}, indent=2)
    return (Change(GUARD, data.encode() + b"\n"),)


def _section_of(document: dict[str, object]) -> dict[str, object]:
    return table(document, "plugins", _SECTION)


def guarded_handlers(settings: Settings, files: HostFiles) -> dict[str, str]:
    """containerd's handlers that name the guard, each with what is wrong with it; empty: nothing.

    Raises:
        ConfigInvalid: A file of containerd's is not TOML.
        FileUnreadable: One cannot be read.
    """
    found = load_configuration(containerd.main_file(settings), files)
    handlers = found.handlers(merges=containerd.merges_tables(settings, found))
    named = {name: each for name, each in handlers.items() if each.get("base_runtime_spec") == GUARD}
    problem = _guard_problem(settings, files)
    return {
        name: problem
        or ("" if "smm.scz/*" in strings(each.get("pod_annotations")) else 'it lacks pod_annotations = ["smm.scz/*"]')
        for name, each in named.items()
    }


def _guard_problem(settings: Settings, files: HostFiles) -> str:
    try:
        entries = json.loads(files.read(GUARD) or b"null")["hooks"]["prestart"]
        commands = [entry["args"] for entry in entries]
    except (FileUnreadable, ValueError, RecursionError, KeyError, TypeError):
        return f"{GUARD} is missing or unusable"
    ours = Invocation("prestart", config_file=settings.config_file, engine="containerd").command()
    return "" if ours in commands else f"{GUARD} calls another installation, or with another configuration"


def _config_steps(engine: str, settings: Settings, files: HostFiles) -> list[str]:
    """What our own configuration has to say."""
    try:
        named = table(files.read_toml(settings.config_file) or {}, "nri").get("engine", "containerd")
    except (ConfigInvalid, FileUnreadable):
        return []  # the command has looked at it, or it is another host's
    return [] if named == engine else [f'set `engine = "{engine}"` below [nri] in {settings.config_file}']


def plan_removal(engine: str, settings: Settings, files: HostFiles) -> Plan:
    """Remove the drop-in; and the guard, unless a handler names it: containerd would serve no pod at all without it."""
    path = drop_in_of(engine, settings)
    has_guard = engine == "containerd" and files.exists(GUARD)
    kept = _naming_the_guard(settings, files) if has_guard else ""
    removed = [path] if files.exists(path) else []
    removed += [GUARD] if has_guard and not kept else []
    gone = tuple(Change(each, None) for each in removed)
    if not gone and not kept:
        return Plan()
    restart = containerd.RESTART if engine == "containerd" else "systemctl restart crio"
    steps = ["systemctl disable --now scz-nri", restart] if gone else []
    try:
        if engine == "containerd" and load_configuration(containerd.main_file(settings), files).names(path):
            steps.insert(0, f"take {path} out of `imports`: containerd does not start without a file named there")
    except (ConfigInvalid, FileUnreadable):
        pass  # it does not keep us from removing what is ours
    if kept:
        steps.append(
            f"{GUARD} stays, as containerd loads no handler without it: take it out of {kept}, then "
            f"{containerd.RESTART}, then rm {GUARD}"
        )
    return Plan(gone, next_steps=tuple(steps))


def _naming_the_guard(settings: Settings, files: HostFiles) -> str:
    """What names the guard, for a person; empty: nothing does."""
    try:
        found = load_configuration(containerd.main_file(settings), files)
    except (ConfigInvalid, FileUnreadable) as error:
        return f"the handlers, if any has it ({error.message})"
    named = [
        f"the handler {shown(name)} in {path}"
        for path, section in found.sections()
        for name, handler in table(section, "containerd", "runtimes").items()
        if table(handler).get("base_runtime_spec") == GUARD
    ]
    return ", ".join(named)


def handlers(engine: str, settings: Settings, files: HostFiles) -> tuple[str, ...]:
    """The names of an engine's configured handlers, sorted.

    Raises:
        ConfigInvalid: A file of the engine's is not TOML.
        FileUnreadable: One cannot be read.
    """
    if engine == "containerd":
        found = load_configuration(containerd.main_file(settings), files)
        return tuple(sorted(found.handlers(merges=containerd.merges_tables(settings, found))))
    tables = (table(document, "crio", "runtime", "runtimes") for _, document in _crio_documents(settings, files))
    return tuple(sorted({name for each in tables for name in each}))


def find(engine: str, settings: Settings, files: HostFiles) -> Found:
    """What the engine's files say.

    Args:
        settings: With the engine's version, if it is known.

    Raises:
        ConfigInvalid: One is not TOML.
        FileUnreadable: One cannot be read.
    """
    if engine == "containerd":
        return _found_in(load_configuration(containerd.main_file(settings), files), settings)
    enabled, seconds, where, validates = _by_default(engine, settings), DEFAULT_SECONDS, "", False
    for path, document in _crio_documents(settings, files):
        section = table(document, "crio", "nri")
        enabled = bool(section.get("enable_nri", enabled))
        named = parse_duration(section.get("nri_plugin_request_timeout"))
        seconds, where = (named, path) if named is not None else (seconds, where)
        validator = table(section, "default_validator")
        validates = bool(validator.get("nri_enable_default_validator", validates))
    return Found(enabled, seconds, where, validates and _can_validate(engine, settings))


def _found_in(configuration: Configuration, settings: Settings) -> Found:
    merges = containerd.merges_tables(settings, configuration)
    whole: dict[str, object] = {}
    where = ""
    for path, document in configuration.documents:
        section = _section_of(document)
        if section:
            whole = {**whole, **section} if merges else dict(section)
            where = path if not merges or {"disable", "plugin_request_timeout"} & section.keys() else where
    seconds = parse_duration(whole.get("plugin_request_timeout"))
    disabled = whole.get("disable", not _by_default("containerd", settings) and not merges) is True
    validates = table(whole.get("default_validator")).get("enable") is True and _can_validate("containerd", settings)
    where = where if seconds is not None or disabled else ""
    is_old = (settings.engine_version or SINCE["containerd"]) < SINCE["containerd"]
    return Found(not disabled and not is_old, DEFAULT_SECONDS if seconds is None else seconds, where, validates)


def _by_default(engine: str, settings: Settings) -> bool:
    return (settings.engine_version or (0, 0)) >= ON_SINCE[engine]


def _can_validate(engine: str, settings: Settings) -> bool:
    return (settings.engine_version or (0, 0)) >= VALIDATES_SINCE[engine]


def _crio_documents(settings: Settings, files: HostFiles) -> list[tuple[str, dict[str, object]]]:
    """crio.conf, then crio.conf.d by name."""
    folder = os.path.dirname(crio.drop_in_of(settings))
    paths = [crio.main_file(settings), *files.below(folder)]
    return [(path, files.read_toml(path) or {}) for path in paths]
