"""`sczctl install` and `uninstall`: make an engine call the hook, and take exactly that away again."""

from __future__ import annotations

import json
import os
import sys

import click

import oci_hook
from oci_hook.cli import print_json
from oci_hook.cli.options import DRY_RUN, JSON
from oci_hook.config import load_config
from oci_hook.errors import ConfigInvalid, FileUnreadable
from oci_hook.trusted_file import replace_file

# podman reads /etc/containers/oci/hooks.d only if its configuration names it (seen with 4.3), this one always.
_DEFAULT_HOOKS_DIRECTORY = "/usr/share/containers/oci/hooks.d"
_ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]


def hook_command(config_file: str, stage: str) -> list[str]:
    """The argument list that starts the hook: the interpreter itself, isolated, without site packages of others."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    launcher = os.path.join(os.path.dirname(os.path.abspath(oci_hook.__file__)), "launch.py")
    return [interpreter, "-I", "-S", launcher, "--config", config_file, stage]


def hooks_d_documents(config_file: str, timeout_seconds: int) -> dict[str, bytes]:
    """One hooks.d file (oci-hooks(5), version 1.0.0) a stage: a file gives the same arguments to all its stages.

    The environment is never empty: an engine passes its own on to a hook that names none (docs/runtimes.md).
    """
    documents = {}
    for stage in ("poststop", "prestart"):  # in this order: what starts containers is written when all else is there
        arguments = hook_command(config_file, stage)
        hook = {"path": arguments[0], "args": arguments, "env": _ENVIRONMENT, "timeout": timeout_seconds}
        document = {"version": "1.0.0", "hook": hook, "when": {"annotations": {r"^smm\.scz/": ".*"}}, "stages": [stage]}
        documents[f"scz-smm-{stage}.json"] = json.dumps(document, indent=2).encode() + b"\n"
    return documents


def _targets(config_file: str, hooks_directory: str, timeout_seconds: int) -> dict[str, bytes]:
    documents = hooks_d_documents(os.path.abspath(config_file), timeout_seconds)
    return {os.path.join(os.path.abspath(hooks_directory), name): data for name, data in documents.items()}


_ENGINE = click.option("--engine", type=click.Choice(["podman"]), required=True, help="The engine to prepare.")
_HOOKS_DIRECTORY = click.option(
    "--hooks-dir",
    type=click.Path(file_okay=False),
    default=_DEFAULT_HOOKS_DIRECTORY,
    show_default=True,
    help="Directory that the engine reads hooks from.",
)


@click.command()
@_ENGINE
@_HOOKS_DIRECTORY
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.IntRange(10, 3600),
    default=300,
    show_default=True,
    help="Seconds after which the runtime ends the hook and the container.",
)
@DRY_RUN
@JSON
@click.pass_obj
def install(config_file: str, engine: str, hooks_dir: str, timeout_seconds: int, dry_run: bool, as_json: bool) -> None:
    """Make an engine call the hook for containers that have annotations under smm.scz/."""
    configured = load_config(config_file).engine
    if configured != engine:
        raise ConfigInvalid(
            f"the configuration names the engine {configured}, not {engine}",
            remedy=f'set engine = "{engine}" in {config_file}',
        )
    targets = _targets(config_file, hooks_dir, timeout_seconds)
    if not dry_run:
        _write(hooks_dir, targets)
    if as_json:
        print_json({"engine": engine, "dry_run": dry_run, "files": {p: json.loads(d) for p, d in targets.items()}})
        return
    for path, data in targets.items():
        click.echo(f"{'would write' if dry_run else 'wrote'} {path}")
        if dry_run:
            click.echo(data.decode(), nl=False)


def _write(hooks_directory: str, targets: dict[str, bytes]) -> None:
    try:
        os.makedirs(hooks_directory, mode=0o755, exist_ok=True)
    except OSError as cause:
        raise FileUnreadable(f"{hooks_directory}: {cause.strerror}") from cause
    for path, data in targets.items():
        replace_file(path, data, mode=0o644)


@click.command()
@_ENGINE
@_HOOKS_DIRECTORY
@DRY_RUN
@JSON
@click.pass_obj
def uninstall(config_file: str, engine: str, hooks_dir: str, dry_run: bool, as_json: bool) -> None:
    """Remove exactly the files that `sczctl install` writes."""
    found = [path for path in _targets(config_file, hooks_dir, 300) if os.path.lexists(path)]
    if not dry_run:
        for path in reversed(found):
            _remove(path)
    if as_json:
        print_json({"engine": engine, "dry_run": dry_run, "files": found})
        return
    if not found:
        click.echo(f"nothing of ours is in {hooks_dir}", err=True)
    for path in found:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause


COMMANDS = {"install": install, "uninstall": uninstall}
