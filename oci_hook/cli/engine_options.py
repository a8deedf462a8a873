"""What `sczctl install` and `uninstall` may be told, and for which engine an option means something."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from types import ModuleType

import click
from click.core import ParameterSource

from oci_hook.cli.options import DRY_RUN, JSON
from oci_hook.engines import containerd, crio, docker, nri, podman
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import BY_NAME_ONLY, KINDS, SHIM_DIRECTORY, Runtime
from oci_hook.engines.programs import major_minor
from oci_hook.oci.command_line import kind_of

ENGINES: dict[str, ModuleType] = {"podman": podman, "cri-o": crio, "containerd": containerd, "docker": docker}
BY_HOOKS_DIRECTORY = ("podman", "cri-o")
_NOT_BY_NRI = ("hooks_directory", "timeout_seconds", "shim_directory", "runtimes", "keep_scripts")
_MEANT_FOR = {
    "hooks_directory": BY_HOOKS_DIRECTORY,
    "timeout_seconds": BY_HOOKS_DIRECTORY,
    "shim_directory": ("containerd", "docker"),
    "runtimes": ("containerd", "docker"),
    "engine_config": ("cri-o", "containerd", "docker"),
    "engine_version": ("containerd",),
    "keep_scripts": ("containerd", "docker"),
    "before_create": ("podman",),
    "by_nri": nri.ENGINES,
    "guard": ("containerd",),
}


def absolute(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Make an option's path absolute."""
    return None if value is None else os.path.abspath(value)


def known_runtimes(_context: click.Context, _parameter: click.Parameter, paths: tuple[str, ...]) -> tuple[Runtime, ...]:
    """Make runtimes of an option's paths: one of each kind."""
    found: dict[str, Runtime] = {}
    for path in paths:
        kind = kind_of(path)
        if kind not in (*KINDS, *BY_NAME_ONLY):
            raise click.BadParameter(f"{path} is none of {', '.join((*KINDS, *BY_NAME_ONLY))}, by its name")
        if not os.path.isabs(path):
            raise click.BadParameter(f"{path} is not an absolute path")
        if kind in found:
            raise click.BadParameter(f"{kind} is given twice")
        found[kind] = Runtime(kind, path)
    return tuple(found.values())


def engine_version(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Make numbers of an option's version."""
    if value is not None and not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}([.~+-].*)?", value):
        raise click.BadParameter("give a version such as 1.7")
    return major_minor(value)


def verify_meant(engine: str) -> None:
    """Check that no option is given that the engine has no use for.

    Raises:
        UsageError: One is.
    """
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and engine not in _MEANT_FOR.get(option.name or "", tuple(ENGINES)):
            raise click.UsageError(f"{option.opts[0]} means nothing for {engine}")
        if given and context.params.get("by_nri") and option.name in _NOT_BY_NRI:
            raise click.UsageError(f"{option.opts[0]} means nothing with --nri")


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
    click.option(
        "--nri",
        "by_nri",
        is_flag=True,
        help="containerd, CRI-O: the engine's plugin scz-nri(8) instead; VM sandboxes too.",
    ),
    DRY_RUN,
    JSON,
    click.pass_obj,
)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that both have."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
