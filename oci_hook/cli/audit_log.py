"""`sczctl audit`: show, verify and rotate the audit log."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from oci_hook.audit import EMPTY_HEAD, EVENTS, AuditLog, text_line
from oci_hook.audit_chain import seconds_of
from oci_hook.cli import print_json, printable
from oci_hook.cli.options import DRY_RUN, JSON, container_of
from oci_hook.config import load_config
from oci_hook.errors import AuditRefused
from oci_hook.key_errors import all_errors

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_KEPT_LINES = 100_000


def moment_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds since 1970 of an option that is a moment: a date, a date and a time (UTC), `today`, or `-1h`."""
    if value is None:
        return None
    if value == "today":
        return datetime.fromtimestamp(time.time(), UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    if (ago := re.fullmatch(r"-([0-9]{1,6})([smhdw])", value)) is not None:
        return time.time() - int(ago[1]) * _UNITS[ago[2]]
    try:
        found = datetime.fromisoformat(value)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no moment: give 2026-01-31, 2026-01-31T12:00:00 (UTC), today, or -90s, -5m, -1h, -2d, -1w"
        ) from None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `show` prints; None or empty: whatever it is."""

    container: str | None
    events: tuple[str, ...]
    model: str | None
    subject: str | None
    code: int | None
    reason: str | None
    since: float | None
    until: float | None

    def matches(self, record: dict[str, Any]) -> bool:
        """Whether a record is wanted."""
        seconds = seconds_of(record["time"])
        return (
            (self.container is None or str(record.get("container", "")).startswith(self.container))
            and (not self.events or record.get("event") in self.events)
            and (self.model is None or self.model in _models(record))
            and (self.subject is None or record.get("subject") == self.subject)
            and (self.code is None or record.get("code") == self.code)
            and (self.reason is None or record.get("reason") == self.reason)
            and (self.since is None or seconds >= self.since)
            and (self.until is None or seconds < self.until)
        )


def _models(record: dict[str, Any]) -> set[str]:
    """Names of a record's models, with and without their versions."""
    named = {part for part in str(record.get("model", "")).split(", ") if part}
    if "version" in record:
        named |= {f"{name}:{record['version']}" for name in named}
    return named | {name.partition(":")[0] for name in named}


@click.group()
def audit() -> None:
    """Show, verify and rotate the audit log."""


@audit.command("show")
@click.option("--container", metavar="ID", callback=container_of, help="Only records of containers whose id begins so.")
@click.option("--event", "events", type=click.Choice(EVENTS), multiple=True, help="Only these; may be repeated.")
@click.option("--model", metavar="NAME[:VERSION]", help="Only records of this model.")
@click.option("--subject", help="Only records of this identity.")
@click.option("--code", type=click.IntRange(0, 255), help="Only records with this exit code.")
@click.option(
    "--reason", type=click.Choice([cls.__name__ for cls in all_errors().values()]), metavar="NAME", help="Only these."
)
@click.option("--since", metavar="MOMENT", callback=moment_of, help="From: 2026-01-31[T12:00:00] (UTC), today, -1h.")
@click.option("--until", metavar="MOMENT", callback=moment_of, help="Before.")
@click.option("--limit", type=click.IntRange(1, _KEPT_LINES), help="Only the last so many of them.")
@click.option("--reverse", is_flag=True, help="The newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_obj
def show_audit(config_file: str, /, limit: int | None, reverse: bool, as_json: bool, **wanted: Any) -> None:
    """Print the records; the chain is verified as they are read, across rotated files.

    With --limit or --reverse nothing is printed before all was read and verified.
    """
    log = AuditLog(load_config(config_file).audit_file)
    chosen: Iterator[dict[str, Any]] = filter(Wanted(**wanted).matches, log.records())
    if limit is not None or reverse:
        last = deque(chosen, maxlen=limit or _KEPT_LINES)
        chosen = reversed(last) if reverse else iter(last)
    for record in chosen:
        click.echo(json.dumps(record, sort_keys=True) if as_json else printable(text_line(record)))
    _warn_of_foreign(log)


def _warn_of_foreign(log: AuditLog) -> None:
    for path in log.foreign():
        click.echo(printable(f"{path} is none of the log's files by its name, and was not read"), err=True)


def _digest_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise click.BadParameter("a head is 64 hexadecimal digits, as `sczctl audit verify` prints it")
    return value


@audit.command("verify")
@click.option(
    "--from-head",
    metavar="HEX",
    callback=_digest_of,
    help="Also check that the log goes on from this head, kept before.",
)
@JSON
@click.pass_obj
def verify_audit(config_file: str, from_head: str | None, as_json: bool) -> None:
    """Verify the chain from the oldest record that is there to the last, across rotated files; print the head.

    A log whose oldest files were removed begins later: the answer says with which record, and after which head. That
    the end was not cut off is seen only with --from-head and a head that was kept elsewhere.
    """
    log = AuditLog(load_config(config_file).audit_file)
    verified = log.verified()
    first = next(verified, None)
    number, last, before = 0, None, EMPTY_HEAD.hex() if first is None else str(first.record["prev"])
    known = before == from_head
    for each in itertools.chain([first] if first else [], verified):
        number, last = number + 1, each
        known = known or each.digest.hex() == from_head
    if from_head is not None and not known:
        raise AuditRefused(
            f"no record has the digest {from_head}, nor does the oldest follow it: the log was cut or exchanged",
            remedy="keep the log for an investigation; look for rotated files that were moved away",
        )
    _warn_of_foreign(log)
    head = last.digest.hex() if last else EMPTY_HEAD.hex()
    begins = first.record["seq"] if first else 0
    if as_json:
        seconds = last.record["time"] if last else None
        print_json({"records": number, "head": head, "last": seconds, "first": begins, "after": before})
        return
    click.echo(f"{number} records, each follows the one before; head {head}")
    if begins > 1:
        click.echo(f"the chain begins with record {begins}, after the head {before}: older files are not here")


@audit.command("rotate")
@DRY_RUN
@JSON
@click.pass_obj
def rotate_audit(config_file: str, dry_run: bool, as_json: bool) -> None:
    """Rename the log, to its name and its last record's number, and go on in a new one.

    The new file's first record carries number, link and time over, so the chain goes on. logrotate may rename the
    log, too (config/logrotate.d): whoever writes next carries them over. Compress with gzip what was rotated, not
    before a day has passed. Never truncate the log.
    """
    log = AuditLog(load_config(config_file).audit_file)
    if dry_run:
        last = deque(log.records(), maxlen=1)
        target = None if not last or last[0]["event"] == "continued" else f"{log.path}.{last[0]['seq']:012}"
    else:
        target = log.rotate()
    if as_json:
        print_json({"dry_run": dry_run, "path": target})
    elif target is None:
        click.echo("there is nothing to rotate", err=True)
    else:
        click.echo(printable(f"{'would rename' if dry_run else 'renamed'} {log.path} to {target}"))


COMMANDS = {"audit": audit}
