"""Many files from one command: each is a row, a failure too, and the others go on.

Exit code 1 says that a row failed; which, and why, is in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.options import show_progress
from oci_hook.errors import FileUnreadable, SczError

FILE_LIMIT = 10_000
_SUFFIX = ".json"


def documents_in(folder: str, error: type[SczError]) -> list[str]:
    """The paths of a folder's `*.json`, sorted; hidden ones (of a stick's other users) are left out.

    Raises:
        SczError: The class `error`: there is none, or more than 10 000.
        FileUnreadable: The system said no.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX) and not name.startswith("."))
    except OSError as cause:
        raise FileUnreadable(f"{folder}: {cause.strerror}") from cause
    if not names or len(names) > FILE_LIMIT:
        raise error(f"{folder} holds {'no' if not names else f'more than {FILE_LIMIT}'} files that end in {_SUFFIX}")
    return [os.path.join(folder, name) for name in names]


def run_batch(
    label: str,
    paths: Sequence[str],
    step: Callable[[str], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
    *,
    as_json: bool,
) -> None:
    """Do one thing with each file, and show what became of it.

    Args:
        label: Of the progress bar.
        paths: The files.
        step: What to do; returns the row.
        line: A row that went well, as a line for a person.
        as_json: Print the rows as JSON.

    Raises:
        click.exceptions.Exit: With code 1: a file failed.
    """
    rows = []
    with show_progress(label, len(paths)) as progress:
        for number, path in enumerate(paths, 1):
            try:
                row = {"file": path, **step(path)}
            except SczError as error:
                said = {"code": error.code, "reason": error.reason, "message": error.message, "remedy": error.advice}
                row = {"file": path, "error": said}
            rows.append(row)
            progress(number)
    failed = [row for row in rows if "error" in row]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            if "error" not in row:
                click.echo(printable(line(row)))
        for row in failed:
            said = row["error"]
            click.echo(printable(f"{row['file']}: {said['reason']} ({said['code']}): {said['message']}"), err=True)
            click.echo(f"  remedy: {printable(said['remedy'])}", err=True)
        click.echo(f"{len(rows) - len(failed)} done, {len(failed)} refused", err=True)
    if failed:
        raise click.exceptions.Exit(1)
