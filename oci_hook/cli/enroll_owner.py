"""`sczctl enroll challenge` and `accept`: the owner's side, without a TPM; for one device, or for a folder of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.batches import documents_in, run_batch
from oci_hook.cli.enroll_options import DEVICE_CLASS, EK_LIST, EK_ROOTS, REPLACE, UNREVOKE, enroller_of
from oci_hook.cli.options import (
    JSON,
    KEYS,
    read_input,
    verify_new_output,
    write_output,
)
from oci_hook.errors import DeviceInvalid, EnrolmentRefused, FileUnreadable, SczError

if TYPE_CHECKING:
    from oci_hook.attestation.device_record import DeviceRecord
    from oci_hook.attestation.enrolment_documents import Answer, Request
    from oci_hook.owner.enrolling import Challenged, Enroller

_OUTPUT = click.option(
    "-o",
    "--output",
    metavar="FILE|FOLDER",
    type=click.Path(),
    required=True,
    help="File to write, or folder for a folder's challenges; nothing is overwritten.",
)


def challenge_row(challenged: Challenged) -> dict[str, Any]:
    """What `--json` says of a challenge."""
    ek = challenged.ek
    said = {"state": challenged.state, "vouched": ek.vouched, "ek_sha256": ek.sha256, "ek_subject": ek.subject}
    return {"device": challenged.pending.request.device, **said}


def challenge_line(row: dict[str, Any]) -> str:
    """The same for a person."""
    if row["vouched"] == "list":
        return f"{row['state']} {row['device']}: EK in your list, SHA-256 {row['ek_sha256']}"
    subject = printable(row["ek_subject"]) or "(no subject)"
    return f"{row['state']} {row['device']}: EK certificate {subject}, SHA-256 {row['ek_sha256']}"


def record_row(record: DeviceRecord, state: str) -> dict[str, Any]:
    """What `--json` says of an enrolled device."""
    said = {"class": record.device_class, "counter": record.counter_value, "vouched": record.vouched}
    row = {"device": record.device, "state": state, **said, "ek_sha256": record.ek_sha256}
    return row if record.revoked is None else {**row, "revoked": record.revoked}


def record_line(row: dict[str, Any]) -> str:
    """The same for a person."""
    what = "EK certificate" if row["vouched"] == "certificate" else "EK in your list,"
    return (
        f"enrolled {row['state']} {row['device']} (class {row['class']}, counter {row['counter']}), "
        f"{what} SHA-256 {row['ek_sha256']}{'; it stays revoked' if 'revoked' in row else ''}"
    )


# --- challenge --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("request_file", metavar="REQUEST|FOLDER", type=click.Path())
@KEYS
@EK_ROOTS
@EK_LIST
@_OUTPUT
@REPLACE
@UNREVOKE
@JSON
def challenge(
    request_file: str,
    keys: str,
    ek_roots: str | None,
    ek_list: str | None,
    output: str,
    replace: bool,
    unrevoke: bool,
    as_json: bool,
) -> None:
    """OWNER: check a device's TPM and challenge it.

    What fails a check is refused with the check's number. Of a FOLDER each file `*.json` is a request, and its
    challenge is DEVICE.json in the folder that --output names; one that is refused leaves the others as they are, and
    the exit code is 1.
    """
    from oci_hook.attestation.enrolment_documents import parse_request

    def enroller() -> Enroller:
        return enroller_of(keys, ek_roots, ek_list, replace=replace, unrevoke=unrevoke)

    if os.path.isdir(request_file):
        _challenge_folder(request_file, output, enroller(), as_json)
        return
    verify_new_output(output)  # before the waiting challenge is replaced, which an older file may still answer
    found = parse_request(read_input(request_file, DeviceInvalid))
    row = _challenge_one(found, output, enroller())
    if as_json:
        print_json({"file": request_file, **row})
        return
    click.echo(challenge_line(row))
    click.echo(
        f"challenge for {row['device']} in {output}; next, the host: sczctl enroll answer {output} -o answer.json"
    )


def _challenge_one(request: Request, output: str, enroller: Enroller) -> dict[str, Any]:
    verify_new_output(output)
    challenged = enroller.challenge(request, now=datetime.now(UTC))
    enroller.keep(challenged)
    write_output(output, challenged.document)
    return {**challenge_row(challenged), "output": output}


def _challenge_folder(folder: str, output: str, enroller: Enroller, as_json: bool) -> None:
    from oci_hook.attestation.enrolment_documents import parse_request

    paths = documents_in(folder, DeviceInvalid)
    verify_alone = _one_of_each(paths)
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as cause:
        raise FileUnreadable(f"{output}: {cause.strerror}") from cause

    def step(path: str) -> dict[str, Any]:
        request = parse_request(read_input(path, DeviceInvalid))
        verify_alone(request)
        return _challenge_one(request, os.path.join(output, f"{request.device}.json"), enroller)

    run_batch("challenging", paths, step, challenge_line, as_json=as_json)


def _one_of_each(paths: list[str]) -> Callable[[Request], None]:
    """A check that no two of some requests have one name or one EK: nobody could tell which of them is meant."""
    from oci_hook.attestation.ek_list import ek_digest
    from oci_hook.attestation.enrolment_documents import parse_request

    names: Counter[str] = Counter()
    eks: Counter[str] = Counter()
    for path in paths:
        try:
            request = parse_request(read_input(path, DeviceInvalid))
        except SczError:
            continue  # a row of its own says what is wrong with it
        names[request.device] += 1
        eks[ek_digest(request.ek)] += 1

    def verify(request: Request) -> None:
        if names[request.device] > 1:
            raise EnrolmentRefused(f"{names[request.device]} requests are for the name {request.device}")
        if eks[ek_digest(request.ek)] > 1:
            raise EnrolmentRefused(f"{eks[ek_digest(request.ek)]} requests have the EK of {request.device}")

    return verify


# --- accept -----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("answer_file", metavar="ANSWER|FOLDER", type=click.Path())
@KEYS
@EK_ROOTS
@EK_LIST
@DEVICE_CLASS
@REPLACE
@UNREVOKE
@JSON
def accept(
    answer_file: str,
    keys: str,
    ek_roots: str | None,
    ek_list: str | None,
    device_class: str | None,
    replace: bool,
    unrevoke: bool,
    as_json: bool,
) -> None:
    """OWNER: verify the answer, and keep the device's record.

    From then on models can be granted to it, unless it was revoked: that stays so without --unrevoke. Of a FOLDER each
    file `*.json` is an answer; one that is refused leaves the others as they are, and the exit code is 1.
    """
    from oci_hook.attestation.enrolment_documents import parse_answer

    def load(path: str) -> Answer:
        return parse_answer(read_input(path, DeviceInvalid))

    def accepted(enroller: Enroller, answer: Answer) -> dict[str, Any]:
        return record_row(*enroller.accept(answer, now=datetime.now(UTC), device_class=device_class))

    is_folder = os.path.isdir(answer_file)
    paths = documents_in(answer_file, DeviceInvalid) if is_folder else []
    found = None if is_folder else load(answer_file)
    enroller = enroller_of(keys, ek_roots, ek_list, replace=replace, unrevoke=unrevoke)
    if found is None:
        with enroller.together():
            run_batch("accepting", paths, lambda path: accepted(enroller, load(path)), record_line, as_json=as_json)
        return
    row = accepted(enroller, found)
    if as_json:
        print_json({"file": answer_file, **row})
    else:
        click.echo(record_line(row))
