"""`sczctl why`: what happened, and which command mends it."""

from __future__ import annotations

import dataclasses
import os
import re

import click

from oci_hook.audit import format_time
from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_refused
from oci_hook.cli.options import container_of
from oci_hook.errors import BootStateRefused
from oci_hook.key_errors import all_errors
from oci_hook.report import Refusal, explain, load_refusals, reporting_config

_RAISED_BY_RUNTIMES = {
    125: "podman itself failed, or could not start the container: ask with the container's id, or without an argument",
    126: "podman could not start the container: ask with the container's id, or without an argument",
    127: "podman: ask with the container's id, or without an argument",
}


@click.command()
@click.argument("what", required=False, callback=container_of, shell_complete=complete_refused)
@click.option("--codes", is_flag=True, help="List every exit code of the hook.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def why(config_file: str, what: str | None, codes: bool, as_json: bool) -> int:
    """Tell why a container did not start, and what mends it.

    WHAT is a container's id (or its beginning), or an exit code of the hook; without it: the last refusal. The exit
    code is 1 if nothing is known.
    """
    if codes:
        return _show_codes(as_json)
    if what is not None and re.fullmatch("[0-9]{1,3}", what):
        return _show_code(int(what), as_json)
    found = load_refusals(reporting_config(config_file)[0].runtime_directory)
    if what is not None:
        found = [refusal for refusal in found if refusal.container_id.startswith(what)]
    if not found:
        hint = "" if os.geteuid() == 0 else "; run it as root, who alone may read them"
        click.echo("no refusal is known" + (f" for {printable(what)}" if what else "") + hint, err=True)
        return 1
    _show_refusal(found[0], _differences(config_file, found[0]), as_json)
    return 0


def _differences(config_file: str, refusal: Refusal) -> list[str]:
    """What this boot measured otherwise than an approved one, if that is why and event logs tell."""
    if refusal.code != BootStateRefused.code:
        return []
    from oci_hook.cli.checks.boot import why_refused

    return why_refused(reporting_config(config_file)[0], refusal.message)


def _show_refusal(refusal: Refusal, differences: list[str], as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(refusal) | ({"differences": differences} if differences else {}))
        return
    for line in (
        f"{format_time(refusal.seconds)} container {refusal.container_id[:12]}",
        f"{refusal.reason} ({refusal.code}): {refusal.message}",
        *(f"  {line}" for line in differences),
        f"remedy: {refusal.remedy}",
    ):
        click.echo(printable(line))


def _show_code(code: int, as_json: bool) -> int:
    found = explain(code)
    if found is None:
        hint = _RAISED_BY_RUNTIMES.get(code, "`sczctl why --codes` lists the hook's")
        click.echo(f"{code} is not an exit code of the hook; {hint}", err=True)
        return 1
    reason, family, summary, remedy = found
    if as_json:
        print_json({"code": code, "reason": reason, "family": family, "summary": summary, "remedy": remedy})
    else:
        click.echo(f"{reason} ({code}, {family}): {summary}\nremedy: {remedy}")
    return 0


def _show_codes(as_json: bool) -> int:
    if as_json:
        keys = ("reason", "family", "summary", "remedy")
        print_json({str(code): dict(zip(keys, explain(code) or (), strict=True)) for code in all_errors()})
        return 0
    for code, cls in all_errors().items():
        click.echo(f"{code:>3}  {cls.__name__:<22} {cls.summary}")
    return 0


COMMANDS = {"why": why}
