"""What `sczctl appraise` shows: the appraisals of a container's evidence, and an EAR whose signature was checked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import click

from oci_hook.attestation.ear import LIMIT_BYTES, parse_ear, verify_ear
from oci_hook.attestation.evidence_appraisal import StartAppraisal
from oci_hook.attestation.kept_evidence import KeptEvidence
from oci_hook.audit import format_time
from oci_hook.cli import print_json, printable
from oci_hook.cli.options import read_input
from oci_hook.errors import KeyInvalid, SczError
from oci_hook.key_errors import EvidenceInvalid
from oci_hook.signing_key import parse_public_key
from oci_hook.trusted_file import load_file


def _error(error: SczError | None) -> dict[str, Any] | None:
    return None if error is None else {"code": error.code, "reason": error.reason, "message": error.message}


def show_appraisals(kept: KeptEvidence, appraisals: Sequence[StartAppraisal], left_out: int, *, as_json: bool) -> None:
    """Print them, with the reasons in words; `left_out` starts are of other owners' models."""
    if as_json:
        models = [
            {
                "model": each.start.model,
                "manifest": each.start.manifest_digest,
                "created": each.start.created,
                "accepted": each.error is None,
                "shown": list(each.shown),
                "not_looked_at": list(each.unchecked),
                "error": _error(each.error),
            }
            for each in appraisals
        ]
        print_json({"container": kept.container_id, "models": models, "of_other_owners": left_out})
        return
    click.echo(printable(f"container {kept.container_id}"))
    for each in appraisals:
        verdict = "accepted" if each.error is None else "REFUSED"
        click.echo(printable(f"{each.start.model}, said to be of {format_time(each.start.created)}: {verdict}"))
        for line in each.shown:
            click.echo(printable(f"  {line}"))
        for line in each.unchecked:
            click.echo(printable(f"  not looked at: {line}"))
        if each.error is not None:
            click.echo(printable(f"  {each.error.reason} ({each.error.code}): {each.error.message}"))
            click.echo(printable(f"  remedy: {each.error.advice}"))
    if left_out:
        click.echo(f"{left_out} more, of models of other owners: not looked at")


def check_ear(path: str, key: str, *, as_json: bool) -> int:
    """Verify and print an EAR; the exit code: 0 if all of it affirms, else 1."""
    data = load_file(path, limit_bytes=LIMIT_BYTES + 1, error=EvidenceInvalid)
    ear = verify_ear(parse_ear(data), parse_public_key(read_input(key, KeyInvalid)), now=time.time())
    if as_json:
        document = dataclasses.asdict(ear)
        document.pop("raw_evidence")
        print_json(document)
    else:
        what = f"{ear.kind}{', of the host about itself' if ear.kind == 'diagnosis' else ''}" if ear.kind else "result"
        click.echo(printable(f"{what} by {ear.developer}, {ear.build}, {format_time(ear.issued)}"))
        for each in ear.submodules:
            click.echo(printable(f"{each.name}: {each.status}"))
            for line in each.reasons:
                click.echo(printable(f"  {line}"))
    return 0 if all(each.status == "affirming" for each in ear.submodules) else 1
