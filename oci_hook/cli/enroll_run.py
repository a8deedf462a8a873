"""`sczctl enroll run`: a whole enrolment of a host that the owner reaches, in one go."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from oci_hook.cli import print_json
from oci_hook.cli.enroll_options import DEVICE_CLASS, EK_LIST, EK_ROOTS, REPLACE, UNREVOKE, enroller_of
from oci_hook.cli.enroll_owner import challenge_line, challenge_row, record_line, record_row
from oci_hook.cli.far_end import call
from oci_hook.cli.options import DOCUMENT_BYTES, JSON, KEYS, name_of, read_input
from oci_hook.cli.streams import STREAM
from oci_hook.errors import EnrolmentRefused, KeyInvalid


@click.command()
@click.argument("prefix", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@KEYS
@EK_ROOTS
@EK_LIST
@click.option(
    "--device",
    metavar="NAME",
    callback=name_of,
    help="The name that the device gets; default: the one that the host gives itself.",
)
@DEVICE_CLASS
@REPLACE
@UNREVOKE
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.IntRange(1, 3600),
    metavar="SECONDS",
    default=120,
    show_default=True,
    help="The longest that one of the host's commands may take.",
)
@JSON
def run(
    prefix: tuple[str, ...],
    keys: str,
    ek_roots: str | None,
    ek_list: str | None,
    device: str | None,
    device_class: str | None,
    replace: bool,
    unrevoke: bool,
    timeout_seconds: int,
    as_json: bool,
) -> None:
    """OWNER: enrol a host that you reach, in one go.

    The host's commands `sczctl enroll request` and `sczctl enroll answer` are run behind the words of COMMAND (`ssh
    edge-1 sudo`), which is executed without a shell; their files go through standard input and output. Every check is
    the same as by hand. A certificate says that it is a TPM, not whose: where the way to the host is not trusted, have
    the device in a list (--ek-list), too. Nothing is kept of an enrolment that fails.
    """
    from oci_hook.attestation.enrolment_documents import parse_answer, parse_request
    from oci_hook.owner.keyring import OWNER_FILE

    enroller = enroller_of(keys, ek_roots, ek_list, replace=replace, unrevoke=unrevoke)
    owner = read_input(str(Path(keys, OWNER_FILE)), KeyInvalid)

    def far(command: str, words: list[str], data: bytes) -> bytes:
        click.echo(f"{device or prefix[0]}: {command}…", err=True)
        everything = [*prefix, "sczctl", "enroll", command, *words, "-o", STREAM]
        return call(everything, data, limit_bytes=DOCUMENT_BYTES, timeout_seconds=timeout_seconds)

    named = [] if device is None else ["--device", device]
    request = parse_request(far("request", ["--owner", STREAM, *named], owner))
    if device is not None and request.device != device:
        raise EnrolmentRefused(f"the host asks as {request.device}, not as {device}")
    challenged = enroller.challenge(request, now=datetime.now(UTC))
    row: dict[str, Any] = challenge_row(challenged)
    click.echo(challenge_line(row), err=True)
    answer = parse_answer(far("answer", [STREAM], challenged.document))
    record, state = enroller.accept(answer, challenged.pending, now=datetime.now(UTC), device_class=device_class)
    if as_json:
        print_json({**row, **record_row(record, state)})
    else:
        click.echo(record_line(record_row(record, state)))
