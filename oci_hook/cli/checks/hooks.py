"""hooks.d: the directories that each engine really reads, and every file there that calls our hook.

podman (4.3 to 5.8) reads by itself /usr/share/containers/oci/hooks.d alone, not /etc/containers/oci/hooks.d; CRI-O the
same until its configuration names others. Where files of one name lie in two directories that an engine reads, the last
directory's is the hook; two of different names are two hooks. Sources: oci-hooks(5), containers.conf(5), crio.conf(5).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from oci_hook import __version__
from oci_hook.cli.checks.check import Check, failed
from oci_hook.engines.crio import OWN_DIRECTORY
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import HostFiles, strings, table
from oci_hook.errors import FileUnreadable, SczError
from oci_hook.invocation import Invocation, parse_invocation

ENGINES_OF_HOOKS = ("podman", "cri-o")
_LAUNCHER = re.compile(r"/oci_hook/launch\.py")
_KNOWN_DIRECTORIES = (DEFAULT_DIRECTORY, "/etc/containers/oci/hooks.d", OWN_DIRECTORY)
_PODMAN_FILES = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
_PODMAN_DROP_INS = "/etc/containers/containers.conf.d"
_CRIO_FILES, _CRIO_DROP_INS = ("/etc/crio/crio.conf",), "/etc/crio/crio.conf.d"
_VERSION = re.compile(rb'^__version__ = "([^"\n]{1,64})"', re.MULTILINE)
_MAX_FILES = 200


@dataclass(frozen=True, slots=True)
class HookFile:
    """A file of a hooks directory that calls our hook.

    Attributes:
        engine: As which its command line calls; None: as the configuration says.
        stages: At which the engine calls it.
        timeout_seconds: None: it names none.
    """

    path: str
    interpreter: str
    launcher: str
    engine: str | None
    stages: tuple[str, ...]
    timeout_seconds: int | None
    data: bytes

    @property
    def name(self) -> str:
        """By which the engine tells it from others."""
        return os.path.basename(self.path)


def read_directories(engine: str, files: HostFiles) -> list[str]:
    """The hooks directories that an engine reads, in its order.

    Raises:
        ConfigInvalid: A file of its configuration is not TOML.
        FileUnreadable: One cannot be read.
    """
    is_podman = engine == "podman"
    main, drop_ins = (_PODMAN_FILES, _PODMAN_DROP_INS) if is_podman else (_CRIO_FILES, _CRIO_DROP_INS)
    below = [path for path in files.below(drop_ins) if not is_podman or path.endswith(".conf")]
    found = [DEFAULT_DIRECTORY]
    for path in (*main, *below):
        section = table(files.read_toml(path), *(("engine",) if is_podman else ("crio", "runtime")))
        named = section.get("hooks_dir")
        if isinstance(named, list):
            kept = found if _appends(named) else []
            found = list(dict.fromkeys([*kept, *(os.path.normpath(each) for each in strings(named))]))
    return found


def directory_in_use(engine: str, files: HostFiles) -> str | None:
    """The last directory that an engine reads and where our files for it lie; None: where `install` puts them.

    Raises:
        ConfigInvalid: A file of the engine's configuration is not TOML.
        FileUnreadable: One cannot be read.
    """
    for directory in reversed(read_directories(engine, files)):
        if any(_is_own_name(hook) and hook.engine == engine for hook in our_hooks(directory, files)[0]):
            return directory
    return None


def _appends(named: list[Any]) -> bool:
    """`{append=true}` in a list of containers.conf (podman 5)."""
    return any(isinstance(each, dict) and each.get("append") is True for each in named)


def our_hooks(directory: str, files: HostFiles) -> tuple[list[HookFile], list[Check]]:
    """The files of a directory that call our hook, and a line for each file that cannot be read as the engine does."""
    found: list[HookFile] = []
    checks: list[Check] = []
    try:
        paths = [path for path in files.below(directory) if os.path.dirname(path) == directory]
    except FileUnreadable as error:
        return [], [failed(f"hooks directory {directory}", error)]
    for path in [path for path in paths if path.endswith(".json")][:_MAX_FILES]:
        try:
            data = files.read(path) or b""
            hook = _parse(path, data)
        except FileUnreadable as error:
            checks.append(failed(f"hook {path}", error))
            continue
        except (ValueError, RecursionError):
            ours = "scz-smm" in os.path.basename(path)
            message = f"{path} is not JSON of oci-hooks(5): the engine reads no hook of this directory then"
            remedy = "`sczctl install` for its engine again" if ours else f"correct or remove {shlex.quote(path)}"
            checks.append(Check(f"hook {path}", "fail" if ours else "warn", message, remedy))
            continue
        if hook is not None:
            found.append(hook)
    return found, checks


def _parse(path: str, data: bytes) -> HookFile | None:
    """None: it is another's hook. Raises ValueError: it is no hook at all."""
    document = json.loads(data)
    hook = document.get("hook") if isinstance(document, dict) else None
    if not isinstance(hook, dict):
        raise ValueError("it has no hook")
    words, executable = strings(hook.get("args")), hook.get("path")
    launcher = next((word for word in words if _LAUNCHER.search(word)), "")
    if not launcher:
        return None
    position = words.index(launcher)
    invocation = parse_invocation(words[position + 1 :])
    timeout = hook.get("timeout")
    return HookFile(
        path=path,
        interpreter=executable if isinstance(executable, str) else "",
        launcher=launcher,
        engine=invocation.engine if invocation is not None else None,
        stages=tuple(strings(document.get("stages"))),
        timeout_seconds=timeout if type(timeout) is int and timeout > 0 else None,
        data=data,
    )


def effective(engine: str, directories: Sequence[str], files: HostFiles) -> tuple[list[HookFile], list[Check]]:
    """What an engine calls of ours, once files of one name in several directories are sorted out."""
    by_name: dict[str, HookFile] = {}
    checks: list[Check] = []
    for directory in directories:
        hooks, problems = our_hooks(directory, files)
        checks += problems
        for hook in hooks:
            earlier = by_name.get(hook.name)
            if earlier is not None and earlier.data != hook.data and earlier.engine == hook.engine:
                message = f"{earlier.path} is hidden by {hook.path}: of one name, the last directory's is the hook"
                checks.append(Check(f"hooks {engine}", "warn", message, f"rm {shlex.quote(earlier.path)}"))
            by_name[hook.name] = hook
    return list(by_name.values()), checks


def check_hooks(engine: str, files: HostFiles) -> tuple[list[HookFile], list[Check]]:
    """What an engine that is here reads, and whether that is our hook, once, and this installation's."""
    name = f"hooks {engine}"
    try:
        directories = read_directories(engine, files)
    except SczError as error:
        return [], [failed(name, error)]
    hooks, checks = effective(engine, directories, files)
    checks += _copies(engine, hooks)
    for hook in hooks:
        checks += _check_engine(engine, hook)
    listed = ", ".join(directories) or "no directory at all"
    ours = ", ".join(hook.path for hook in hooks) or "nothing of ours there"
    return hooks, [Check(name, "ok", f"reads {listed}: {ours}"), *checks]


def _copies(engine: str, hooks: Sequence[HookFile]) -> Iterator[Check]:
    """Two files for one stage: the engine runs the hook twice."""
    for stage in sorted({stage for hook in hooks for stage in hook.stages}):
        twice = sorted((hook for hook in hooks if stage in hook.stages), key=lambda hook: not _is_own_name(hook))
        if len(twice) > 1:
            message = f"{' and '.join(hook.path for hook in twice)} both call the hook at {stage}: it runs twice"
            others = " ".join(shlex.quote(hook.path) for hook in twice[1:])
            yield Check(f"hooks {engine}", "warn", message, f"rm {others}")


def _is_own_name(hook: HookFile) -> bool:
    return hook.name in ("scz-smm-prestart.json", "scz-smm-poststop.json")


def _check_engine(engine: str, hook: HookFile) -> Iterator[Check]:
    """A file that calls as one engine where another reads it."""
    if hook.engine in (None, engine):
        return
    if engine == "podman":
        message = f"{hook.path} calls as {hook.engine}, and podman reads it: podman's users can write its annotations"
        yield Check("hooks podman", "fail", message, f"sczctl uninstall --engine {hook.engine}, then install it again")
    else:
        message = f"{hook.path} calls as {hook.engine}, and {engine} reads it: what {engine} says of pods is not used"
        yield Check(f"hooks {engine}", "warn", message, f"sczctl install --engine {engine}")


def check_files(hooks: Sequence[HookFile], files: HostFiles) -> Iterator[Check]:
    """Whether each file leads to a program that is there, of this version, and is root's alone to write.

    This installation's own paths are there, also in an image that does not have it yet.
    """
    own = Invocation("prestart").command()
    for hook in sorted({each.path: each for each in hooks}.values(), key=lambda each: each.path):
        name = f"hook {hook.path}"
        engine = hook.engine or "podman"
        remedy = f"`sczctl install --engine {engine}`"
        for what, path in (("interpreter", hook.interpreter), ("program", hook.launcher)):
            if path not in own and not os.path.isfile(_resolved(path, files)):
                message = f"its {what} {path or '(none named)'} is not there: every start with a model fails"
                yield Check(name, "fail", message, f"install the package scz-smm again, then {remedy}")
        version = _version_beside(hook.launcher, files)
        if version is not None and version != __version__:
            message = f"it starts version {version} ({hook.launcher}); this sczctl is {__version__}"
            yield Check(name, "fail", message, f"install the package scz-smm again, then {remedy}")
        yield from _writable(name, hook.path, files)


def _resolved(path: str, files: HostFiles) -> str:
    try:
        return files.resolved(path) if path else ""
    except FileUnreadable:
        return ""


def _version_beside(launcher: str, files: HostFiles) -> str | None:
    try:
        data = files.read(os.path.join(os.path.dirname(launcher), "__init__.py"))
    except FileUnreadable:
        return None
    found = _VERSION.search(data or b"")
    return found[1].decode("utf-8", "replace") if found else None


def _writable(name: str, path: str, files: HostFiles) -> Iterator[Check]:
    for each in (path, os.path.dirname(path)):
        try:
            found = os.stat(files.resolved(each))
        except (OSError, FileUnreadable):
            continue
        if found.st_uid != 0 or found.st_mode & 0o022:
            message = f"{each} can be changed by others than root: they choose what root runs"
            yield Check(name, "fail", message, f"chown root: {shlex.quote(each)} && chmod go-w {shlex.quote(each)}")


def check_unread(engines: Sequence[str], files: HostFiles) -> Iterator[Check]:
    """Our files in a well-known directory that the engine which they are meant for does not read."""
    read: dict[str, list[str]] = {}
    for engine in engines:
        try:
            read[engine] = read_directories(engine, files)
        except SczError:
            return  # its own line says so
    if not read:
        return
    for directory in _KNOWN_DIRECTORIES:
        readers = [engine for engine, directories in read.items() if directory in directories]
        for hook in our_hooks(directory, files)[0]:
            meant = hook.engine or "podman"
            if meant in read and meant not in readers:
                said = "; ".join(f"{engine} reads {', '.join(dirs)}" for engine, dirs in read.items())
                message = f"{hook.path} is meant for {meant}, which does not read {directory} ({said})"
                yield Check(
                    f"hooks {meant}", "fail", message, f"`sczctl install --engine {meant}`; it says what is left"
                )


def timeout_of(hooks: Sequence[HookFile]) -> tuple[bool, int | None]:
    """Whether there is a file that starts containers, and the shortest time that one of them leaves."""
    starting = [hook for hook in hooks if set(hook.stages) & {"prestart", "createRuntime", "precreate"}]
    named = [hook.timeout_seconds for hook in starting if hook.timeout_seconds is not None]
    return bool(starting), min(named) if named and len(named) == len(starting) else None
