"""`sczctl install` and `uninstall`: make an engine call the hook, and take exactly that away again.

What each engine needs is in `oci_hook.engines`; this is its command line.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.engine_options import (
    BY_HOOKS_DIRECTORY,
    ENGINES,
    engine_version,
    known_runtimes,
    verify_meant,
    with_options,
)
from oci_hook.cli.options import hook_timeout
from oci_hook.config import load_config
from oci_hook.engines import nri
from oci_hook.engines.placing import carry_out, without_those_there
from oci_hook.engines.plan import KINDS, Change, HostFiles, Plan, Settings
from oci_hook.engines.programs import find_program, find_runtimes, major_minor, program_output, program_version
from oci_hook.errors import EngineUnsupported
from oci_hook.shim import shim_script


@click.command()
@click.option(
    "--runtime",
    "runtimes",
    metavar="PATH",
    multiple=True,
    callback=known_runtimes,
    help="containerd, Docker: a runtime to go before, kata-runtime too; repeat it for more. "
    "[default: those of runc, crun and runsc that are here]",
)
@click.option(
    "--engine-version",
    metavar="VERSION",
    callback=engine_version,
    help="containerd: its version, which decides how drop-ins are read. [default: that of the containerd here]",
)
@click.option(
    "--guard",
    is_flag=True,
    help="containerd, with --nri: also write a base specification for handlers that must not start a container with a "
    "model while the plugin is absent.",
)
@hook_timeout("podman, CRI-O: seconds")
@with_options
def install(
    config_file: str,
    engine: str,
    root: str,
    dry_run: bool,
    as_json: bool,
    by_nri: bool,
    guard: bool,
    **chosen: Any,
) -> None:
    """Make an engine call the hook.

    It is called for containers that have annotations under smm.scz/. podman and CRI-O get hooks.d files; containerd and
    Docker get runtimes named scz-runc, scz-crun and scz-runsc. What is left to do by hand is said at the end.
    A VM sandbox (Kata) reads a model only if that is there before it is created: --before-create, --nri.
    """
    verify_meant(engine)
    files = HostFiles(root)
    if root == "/":
        load_config(config_file)  # with one that cannot be used, every container would be refused
    settings = Settings(config_file=config_file, script=shim_script, **chosen)
    if guard and not by_nri:
        raise click.UsageError("--guard means nothing without --nri")
    if by_nri:
        settings = _with_version(settings, engine, root)
        whole = nri.plan_install(engine, replace(settings, base_spec=_base_spec(files) if guard else None), files)
    else:
        if engine not in BY_HOOKS_DIRECTORY:
            settings = _with_runtimes(settings, engine, root)
        whole = ENGINES[engine].plan_install(settings, files)
    plan, there = without_those_there(whole, files)
    if not dry_run:
        carry_out(plan, files)
    _show_installed(engine, plan, there, files, dry_run=dry_run, as_json=as_json)


def _with_runtimes(settings: Settings, engine: str, root: str) -> Settings:
    files = HostFiles(root)
    runtimes = settings.runtimes or find_runtimes(files)
    if not runtimes:
        raise EngineUnsupported(f"none of {', '.join(KINDS)} is here", remedy="give --runtime PATH")
    return _with_version(replace(settings, runtimes=runtimes), engine, root)


def _base_spec(files: HostFiles) -> bytes:
    """containerd's own base specification, as its client prints it."""
    program = find_program("ctr", files)
    said = None if program is None else program_output(files.resolved(program), "oci", "spec")
    if said is None:
        raise EngineUnsupported("containerd's `ctr` is not here, or does not answer", remedy="ctr oci spec")
    return said


def _with_version(settings: Settings, engine: str, root: str) -> Settings:
    program = find_program("containerd", HostFiles(root)) if engine == "containerd" and root == "/" else None
    if settings.engine_version is not None or program is None:
        return settings
    return replace(settings, engine_version=major_minor(program_version(program)))


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
@with_options
def uninstall(
    config_file: str,
    engine: str,
    root: str,
    dry_run: bool,
    as_json: bool,
    by_nri: bool,
    **chosen: Any,
) -> None:
    """Remove exactly what `sczctl install` writes."""
    verify_meant(engine)
    files = HostFiles(root)
    settings = Settings(config_file=config_file, **chosen)
    plan: Plan = nri.plan_removal(engine, settings, files) if by_nri else ENGINES[engine].plan_removal(settings, files)
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
