"""What `sczctl doctor` looks at around the host: runtimes, engines, and whether each engine calls this hook."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from oci_hook.cli.checks.before_create import check_before_create, check_kata, check_other_readers
from oci_hook.cli.checks.check import Check, failed
from oci_hook.cli.checks.hooks import (
    ENGINES_OF_HOOKS,
    HookFile,
    check_files,
    check_hooks,
    check_unread,
    directory_in_use,
    timeout_of,
)
from oci_hook.cli.checks.models import StoredSize, judge_timeout
from oci_hook.cli.checks.nri import check_nri
from oci_hook.cli.checks.shims import check_shims
from oci_hook.cli.engine_options import ENGINES
from oci_hook.engines import cdi, nri
from oci_hook.engines.plan import HostFiles, Settings
from oci_hook.engines.programs import find_program, find_runtimes, major_minor, program_version
from oci_hook.errors import SczError
from oci_hook.invocation import parse_invocation
from oci_hook.oci.edit import HOOK_SECONDS
from oci_hook.shim import shim_script
from oci_hook.store import Store

_OLDEST = {"runc": (1, 1), "crun": (1, 8)}  # docs/runtimes.md
_PROGRAMS = {"podman": "podman", "cri-o": "crio", "containerd": "containerd", "docker": "dockerd"}
_WAYS = {
    "podman": "hooks.d",
    "cri-o": "hooks.d",
    "containerd": "shim (runtime handlers scz-…)",
    "docker": "shim (runtimes scz-…)",
}
_DEVICES_SINCE = {"podman": (4, 1), "cri-o": (1, 23), "containerd": (1, 7), "docker": (25, 0)}
"""The first version that reads CDI files; containerd and Docker have to be told to until 2.0 and 28.3."""
_GENERATE = "sczctl cdi generate --all"
_UNSUPPORTED = ("youki",)


def check_runtimes(files: HostFiles) -> Iterator[Check]:
    """Each runtime that is here, with its version."""
    found = find_runtimes(files)
    for runtime in found:
        version = program_version(files.resolved(runtime.path))
        text = f"{runtime.path}, {version or 'version unknown'}"
        oldest = _OLDEST.get(runtime.kind)
        if version is None:
            yield Check(f"runtime {runtime.kind}", "warn", f"{text}: it did not answer", f"{runtime.path} --version")
        elif oldest is not None and (major_minor(version) or oldest) < oldest:
            remedy = f"install {runtime.kind} {oldest[0]}.{oldest[1]} or later (docs/runtimes.md)"
            yield Check(f"runtime {runtime.kind}", "warn", f"{text}: older than any that was tested", remedy)
        else:
            yield Check(f"runtime {runtime.kind}", "ok", text)
    if not found:
        yield Check("runtimes", "fail", "none of runc, crun and runsc is here", "install one of them")
    for name in _UNSUPPORTED:
        path = find_program(name, files)
        if path is not None:
            remedy = "use a runtime that docs/runtimes.md lists"
            yield Check(f"runtime {name}", "warn", f"{path}: not supported, the hook refuses it", remedy)
    yield from check_kata(files)


def check_engines(config_file: str, files: HostFiles, largest: StoredSize | None) -> Iterator[Check]:
    """Each engine that is here, the way that it takes, and whether that leads to this installation.

    Args:
        largest: The largest model that is here, if any; the hook's time is measured by it.
    """
    base = Settings(config_file=config_file, runtimes=find_runtimes(files), script=shim_script)
    present: list[str] = []
    versions: dict[str, tuple[int, int] | None] = {}
    calling = 0
    for engine, program in _PROGRAMS.items():
        path = find_program(program, files)
        if path is None:
            continue
        version = program_version(files.resolved(path))
        present.append(engine)
        versions[engine] = major_minor(version)
        check = _check_engine(engine, f"{path}, {version or 'version unknown'}", version, base, files)
        calling += check.status == "ok"
        yield check
        if check.status == "ok" and engine not in ENGINES_OF_HOOKS:  # the shim's own time is fixed, a CDI device's not
            yield judge_timeout(engine, HOOK_SECONDS, largest, command=_GENERATE)
    devices, checks = _check_devices(config_file, files, largest)
    yield from checks
    yield from _check_hooks_directories([engine for engine in present if engine in ENGINES_OF_HOOKS], files, largest)
    if "podman" in present:
        yield from check_before_create(base, files)
    yield from check_other_readers(files)
    yield from check_shims(files)
    for engine in (each for each in nri.ENGINES if each in present):
        yield from check_nri(engine, versions[engine], config_file, files, largest)
    if not present:
        yield Check("engines", "fail", "neither podman, CRI-O, containerd nor Docker is here", "install an engine")
    elif not calling and not devices:
        yield Check("engines", "fail", "no engine calls the hook", "`sczctl install --engine ENGINE`")


def _check_hooks_directories(engines: Sequence[str], files: HostFiles, largest: StoredSize | None) -> Iterator[Check]:
    """What each engine of hooks.d reads, and whether that is our hook, once, whole, and with time enough."""
    read: list[HookFile] = []
    for engine in engines:
        hooks, checks = check_hooks(engine, files)
        yield from checks
        read += hooks
        starts, seconds = timeout_of(hooks)
        if starts:
            yield judge_timeout(engine, seconds, largest, command=f"sczctl install --engine {engine}")
    yield from check_files(read, files)
    yield from check_unread(engines, files)


def _check_engine(engine: str, what: str, version: str | None, base: Settings, files: HostFiles) -> Check:
    settings = replace(base, engine_version=major_minor(version) if engine == "containerd" else None)
    remedy = f"`sczctl install --engine {engine}`"
    try:
        if engine in ENGINES_OF_HOOKS:
            settings = replace(settings, hooks_directory=directory_in_use(engine, files))
        state = ENGINES[engine].state(settings, files)
    except SczError as error:
        return failed(f"engine {engine}", error)
    devices = (major_minor(version) or (0, 0)) >= _DEVICES_SINCE[engine]
    way = f"{what}: {_WAYS[engine]}{' or CDI' if devices else ''}"
    if state == "yes":
        return Check(f"engine {engine}", "ok", f"{way}, installed")
    if state == "no" and engine in nri.ENGINES and files.exists(nri.drop_in_of(engine, settings)):
        return Check(f"engine {engine}", "ok", f"{what}: NRI (scz-nri), installed")
    if state == "no":
        return Check(f"engine {engine}", "warn", f"{way}, not installed", remedy)
    return Check(f"engine {engine}", "fail", f"{way}: {state}", f"{remedy}; it says what is left to do by hand")


def _check_devices(config_file: str, files: HostFiles, largest: StoredSize | None) -> tuple[int, list[Check]]:
    """The CDI file, if there is one: how many devices of it work, and a line for each that does not."""
    if not files.exists(cdi.DEFAULT_FILE):
        return 0, []
    devices = cdi.installed_devices(cdi.DEFAULT_FILE, files)
    remedy = f"`{_GENERATE}`"
    if devices is None:
        return 0, [Check("CDI", "fail", f"{cdi.DEFAULT_FILE} is not a file of ours", remedy)]
    checks = []
    for name, command in devices.items():
        invocation = parse_invocation(command[4:])
        if invocation is None or invocation.command() != command or invocation.config_file != config_file:
            message = f"{cdi.KIND}={name} calls another installation, or with another configuration"
            checks.append(Check("CDI", "fail", message, remedy))
    working = len(devices) - len(checks)
    if working:
        checks.insert(0, Check("CDI", "ok", f"{cdi.DEFAULT_FILE}: {working} devices"))
        checks.append(judge_timeout("CDI", _shortest(files), largest, command=_GENERATE))
    return working, checks


def _shortest(files: HostFiles) -> int | None:
    """The shortest time that a hook of the CDI file has; None if one has no limit."""
    with contextlib.suppress(SczError, ValueError, RecursionError, KeyError, TypeError):
        document = json.loads(files.read(cdi.DEFAULT_FILE) or b"null")
        found = [hook.get("timeout") for each in document["devices"] for hook in each["containerEdits"]["hooks"]]
        if found and all(type(seconds) is int and seconds > 0 for seconds in found):
            return int(min(found))
    return None


def check_cdi_models(store_directory: str, files: HostFiles) -> Iterator[Check]:
    """Devices whose model has left the store."""
    try:
        known = {f"{name}:{version}" for name, version in Store(store_directory).names()}
    except SczError:
        return  # the models' own check says it
    names = {each.partition(":")[0] for each in known}
    for device, command in (cdi.installed_devices(cdi.DEFAULT_FILE, files) or {}).items():
        invocation = parse_invocation(command[4:])
        model = invocation.requests.get("smm.scz/model", "") if invocation else ""
        if model.startswith("rootfs:") or model in known or model.partition("@")[0] in names:
            continue
        yield Check("CDI", "warn", f"{cdi.KIND}={device}: {model} is not in the store", f"`{_GENERATE}`")
