"""The way of NRI, for containerd and CRI-O: the engine lets the plugin in and waits long enough, and it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator

from oci_hook.cli.checks.check import Check, failed
from oci_hook.cli.checks.models import StoredSize, needed_seconds
from oci_hook.config import Config, load_config
from oci_hook.documents import shown
from oci_hook.engines import nri
from oci_hook.engines.plan import HostFiles, Settings
from oci_hook.errors import SczError
from oci_hook.linux.processes import process_start_time
from oci_hook.nri.adjust import is_vm
from oci_hook.nri.prepared import load_connected

_GUARDED = "a pod that names scz-smm in required-plugins.noderesource.dev does not start without it"
_OPEN = "pods of this engine start without model when it is not there: docs/nri.md, «When the plugin is absent»"


def check_nri(
    engine: str, version: tuple[int, int] | None, config_file: str, files: HostFiles, largest: StoredSize | None
) -> Iterator[Check]:
    """What an engine's files say of NRI; and the plugin, if it is to be there.

    Args:
        engine: One of `nri.ENGINES`.
        version: Of the engine, if it is known.
        config_file: The hook's configuration.
        largest: The largest model that is here, if any.
    """
    name = f"NRI {engine}"
    settings = Settings(config_file=config_file, engine_version=version)
    try:
        found = nri.find(engine, settings, files)
        installed = files.exists(nri.drop_in_of(engine, settings))
        config = load_config(config_file)
    except SczError as error:
        yield failed(name, error)
        return
    command = f"`sczctl install --engine {engine} --nri`"
    text = f"plugin_request_timeout is {found.seconds:g} s {f'by {found.where}' if found.where else 'by default'}"
    if not installed and not os.path.lexists(os.path.join(config.runtime_directory, "nri", "connected.json")):
        text = text if found.enabled else f"switched off{f' in {found.where}' if found.where else ''}"
        yield Check(name, "ok", f"{text}; the hook does not come that way ({command})")
        return
    if not found.enabled:
        yield Check(name, "fail", f"{engine} lets no plugin in: NRI is off", f"{command}; restart {engine}")
    elif largest is not None and needed_seconds(largest.size_bytes) > found.seconds:
        needed = needed_seconds(largest.size_bytes)
        text += (
            f", less than the {needed} s that {largest.name} may need in a virtual machine, where it is refused then"
        )
        yield Check(name, "warn", text, f"{command}; restart {engine}")
    else:
        yield Check(name, "ok", text)
    yield from _check_plugin(engine, config)
    yield from _check_engine(engine, settings, files, config, largest)
    yield from _check_guard(engine, settings, files, validates=found.validates)


def _check_engine(
    engine: str, settings: Settings, files: HostFiles, config: Config, largest: StoredSize | None
) -> Iterator[Check]:
    """What the engine itself does, or suffers, while a plugin is at work: docs/nri.md."""
    in_vm = [name for name in nri.handlers(engine, settings, files) if is_vm(name, config.nri_vm_handlers)]
    if in_vm and largest is not None and needed_seconds(largest.size_bytes) > nri.DEFAULT_SECONDS:
        text = (
            f"{engine} creates no other container of this node while {largest.name} is made ready for the handler "
            f"{shown(in_vm[0])}, up to {needed_seconds(largest.size_bytes)} s"
        )
        remedy = "small models, or few starts, where virtual machines have them: docs/nri.md, «Calls beside each other»"
        yield Check(f"NRI {engine} wait", "warn", text, remedy)
    if engine == "containerd" and (2, 0) <= (settings.engine_version or (0, 0)) < (2, 2):
        text = (
            "containerd 2.0 and 2.1 can end when the plugin connects again while containers have megabytes of "
            "arguments, variables or annotations"
        )
        yield Check(f"NRI {engine} reconnect", "warn", text, "a newer containerd; docs/nri.md, «Known of engines»")


def _check_guard(engine: str, settings: Settings, files: HostFiles, *, validates: bool) -> Iterator[Check]:
    """What keeps a container with a model from starting while the plugin is absent."""
    name = f"NRI {engine} guard"
    guarded = nri.guarded_handlers(settings, files) if engine == "containerd" else {}
    for handler, problem in guarded.items():
        if problem:
            remedy = f"`sczctl install --engine {engine} --nri --guard` says what is to be done"
            yield Check(name, "fail", f"handler {shown(handler)}: {problem}", remedy)
    working = [handler for handler, problem in guarded.items() if not problem]
    if working:
        listed = ", ".join(shown(handler)[1:-1] for handler in working)
        yield Check(name, "ok", f"handlers with our hooks, which start nothing without the plugin: {listed}")
    if validates:
        yield Check(name, "ok", _GUARDED)
    elif not guarded:
        remedy = "`sczctl install --engine containerd --nri --guard`" if engine == "containerd" else "CRI-O 1.34"
        yield Check(name, "warn", _OPEN, remedy)


def _check_plugin(engine: str, config: Config) -> Iterator[Check]:
    """Whether the plugin is connected, and to this engine."""
    name, remedy = f"scz-nri {engine}", "`systemctl enable --now scz-nri`; `journalctl -u scz-nri`"
    if config.nri_engine != engine:
        text = f"it is the plugin of {config.nri_engine}, not of {engine}"
        yield Check(name, "warn", text, f'`engine = "{engine}"` below [nri] in config.toml')
        return
    try:
        connected = load_connected(config.runtime_directory)
    except SczError as error:
        yield failed(name, error)
        return
    if connected is None or process_start_time(connected.pid) != connected.start_time:
        yield Check(name, "fail", "it is not connected: containers start without their models", remedy)
        return
    waits = f"; it waits {connected.request_seconds} s for an answer" if connected.request_seconds else ""
    yield Check(name, "ok", f"process {connected.pid} is connected to {shown(connected.engine)[1:-1]}{waits}")
