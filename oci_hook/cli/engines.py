"""`sczctl install` and `uninstall`: make an engine call the hook, and take exactly that away again.

What each engine needs is in `oci_hook.engines`; this is its command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from oci_hook.cli import print_json
from oci_hook.cli.options import DRY_RUN, JSON, hook_timeout
from oci_hook.config import load_config
from oci_hook.engines import containerd, crio, docker, podman
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.placing import carry_out, without_those_there
from oci_hook.engines.plan import KINDS, SHIM_DIRECTORY, Change, HostFiles, Plan, Runtime, Settings
from oci_hook.engines.programs import find_program, find_runtimes, major_minor, program_version
from oci_hook.errors import EngineUnsupported
from oci_hook.oci.command_line import kind_of
from oci_hook.shim import shim_script

ENGINES: dict[str, ModuleType] = {"podman": podman, "cri-o": crio, "containerd": containerd, "docker": docker}
_BY_HOOKS_DIRECTORY = ("podman", "cri-o")
_MEANT_FOR = {
    "hooks_directory": _BY_HOOKS_DIRECTORY,
    "timeout_seconds": _BY_HOOKS_DIRECTORY,
    "shim_directory": ("containerd", "docker"),
    "runtimes": ("containerd", "docker"),
    "engine_config": ("cri-o", "containerd", "docker"),
    "engine_version": ("containerd",),
    "keep_scripts": ("containerd", "docker"),
    "before_create": ("podman",),
}


def absolute(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Make an option's path absolute."""
    return None if value is None else os.path.abspath(value)


def _runtimes(_context: click.Context, _parameter: click.Parameter, paths: tuple[str, ...]) -> tuple[Runtime, ...]:
    found: dict[str, Runtime] = {}
    for path in paths:
        kind = kind_of(path)
        if kind not in KINDS:
            raise click.BadParameter(f"{path} is none of {', '.join(KINDS)}, by its name")
        if not os.path.isabs(path):
            raise click.BadParameter(f"{path} is not an absolute path")
        if kind in found:
            raise click.BadParameter(f"{kind} is given twice")
        found[kind] = Runtime(kind, path)
    return tuple(found.values())


def _version(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is not None and not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}([.~+-].*)?", value):
        raise click.BadParameter("give a version such as 1.7")
    return major_minor(value)


def _verify_meant(engine: str) -> None:
    """Check that no option is given that the engine has no use for.

    Raises:
        UsageError: One is.
    """
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and engine not in _MEANT_FOR.get(option.name or "", tuple(ENGINES)):
            raise click.UsageError(f"{option.opts[0]} means nothing for {engine}")


_OPTIONS = (
    click.option("--engine", type=click.Choice(list(ENGINES)), required=True, help="The engine that is meant."),
    click.option(
        "--hooks-dir",
        "hooks_directory",
        type=click.Path(file_okay=False),
        callback=absolute,
        help=f"podman, CRI-O: directory that the engine reads hooks from. [default: {DEFAULT_DIRECTORY} for "
        f"podman, {crio.OWN_DIRECTORY} for CRI-O, as podman reads CRI-O's own]",
    ),
    click.option(
        "--shim-dir",
        "shim_directory",
        type=click.Path(file_okay=False),
        callback=absolute,
        default=SHIM_DIRECTORY,
        show_default=True,
        help="containerd, Docker: directory for the scripts that go before the runtimes.",
    ),
    click.option(
        "--engine-config",
        type=click.Path(dir_okay=False),
        callback=absolute,
        help="CRI-O, containerd, Docker: the engine's own main file, if it is not at its default place.",
    ),
    click.option(
        "--before-create",
        is_flag=True,
        help="podman: for VM sandboxes, also the stage precreate; with uninstall, take only that away.",
    ),
    click.option(
        "--root",
        type=click.Path(file_okay=False),
        callback=absolute,
        default="/",
        help="Work below this directory, that of an image being built; other paths are those inside it.",
    ),
    DRY_RUN,
    JSON,
    click.pass_obj,
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option(
    "--runtime",
    "runtimes",
    metavar="PATH",
    multiple=True,
    callback=_runtimes,
    help="containerd, Docker: a runtime to go before; repeat it for more. [default: those that are here]",
)
@click.option(
    "--engine-version",
    metavar="VERSION",
    callback=_version,
    help="containerd: its version, which decides how drop-ins are read. [default: that of the containerd here]",
)
@hook_timeout("podman, CRI-O: seconds")
@_with_options
def install(
    config_file: str,
    engine: str,
    root: str,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Make an engine call the hook.

    It is called for containers that have annotations under smm.scz/. podman and CRI-O get hooks.d files; containerd and
    Docker get runtimes named scz-runc, scz-crun and scz-runsc. What is left to do by hand is said at the end.
    A VM sandbox (Kata) reads a model only if that is there before it is created: --before-create.
    """
    _verify_meant(engine)
    files = HostFiles(root)
    if root == "/":
        load_config(config_file)  # with one that cannot be used, every container would be refused
    settings = Settings(config_file=config_file, script=shim_script, **chosen)
    if engine not in _BY_HOOKS_DIRECTORY:
        settings = _with_runtimes(settings, engine, root)
    plan, there = without_those_there(ENGINES[engine].plan_install(settings, files), files)
    if not dry_run:
        carry_out(plan, files)
    _show_installed(engine, plan, there, files, dry_run=dry_run, as_json=as_json)


def _with_runtimes(settings: Settings, engine: str, root: str) -> Settings:
    files = HostFiles(root)
    runtimes = settings.runtimes or find_runtimes(files)
    if not runtimes:
        raise EngineUnsupported(f"none of {', '.join(KINDS)} is here", remedy="give --runtime PATH")
    version = settings.engine_version
    program = find_program("containerd", files)
    if engine == "containerd" and version is None and root == "/" and program is not None:
        version = major_minor(program_version(program))
    return replace(settings, runtimes=runtimes, engine_version=version)


def _show_installed(
    engine: str, plan: Plan, there: tuple[Change, ...], files: HostFiles, *, dry_run: bool, as_json: bool
) -> None:
    written = {files.real(change.path): change.data for change in plan.changes if change.data is not None}
    removed = [files.real(change.path) for change in plan.changes if change.data is None]
    unchanged = [files.real(change.path) for change in there]
    if as_json:
        shown = {path: _readable(path, data) for path, data in written.items()}
        document = {"engine": engine, "dry_run": dry_run, "files": shown, "removed": removed, "unchanged": unchanged}
        print_json({**document, "next": list(plan.next_steps)})
        return
    for path in unchanged:
        click.echo(f"already there, not changed: {path}")
    for path, data in written.items():
        click.echo(f"{'would write' if dry_run else 'wrote'} {path}")
        if dry_run:
            click.echo(data.decode(), nl=False)
    for path in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    _show_next(plan)


def _readable(path: str, data: bytes) -> object:
    with contextlib.suppress(ValueError):
        if path.endswith(".json"):
            return json.loads(data)
    return data.decode("utf-8", "replace")


def _show_next(plan: Plan) -> None:
    for step in plan.next_steps:
        click.echo(f"next: {step}")


@click.command()
@click.option("--keep-scripts", is_flag=True, help="containerd, Docker: leave the shim's scripts to what runs.")
@_with_options
def uninstall(
    config_file: str,
    engine: str,
    root: str,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Remove exactly what `sczctl install` writes."""
    _verify_meant(engine)
    files = HostFiles(root)
    plan: Plan = ENGINES[engine].plan_removal(Settings(config_file=config_file, **chosen), files)
    if not dry_run:
        carry_out(plan, files)
    removed = [files.real(change.path) for change in plan.changes if change.data is None]
    changed = [files.real(change.path) for change in plan.changes if change.data is not None]
    if as_json:
        document = {"engine": engine, "dry_run": dry_run, "files": removed, "changed": changed}
        print_json({**document, "next": list(plan.next_steps)})
        return
    if not plan.changes and not plan.next_steps:
        click.echo(f"nothing of ours is there for {engine}", err=True)
    for path in changed:
        click.echo(f"{'would change' if dry_run else 'changed'} {path}")
    for path in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    _show_next(plan)


COMMANDS = {"install": install, "uninstall": uninstall}
