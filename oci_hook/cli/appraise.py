"""`sczctl appraise`: the appraisal of a container's evidence by another party, and the check of attestation results."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from oci_hook.attestation.boot_policy import parse_boot_policy
from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.attestation.ear import parse_ear, sign_ear, verify_ear
from oci_hook.attestation.evidence_appraisal import References, StartAppraisal, appraise_kept
from oci_hook.attestation.kept_evidence import LIMIT_BYTES, KeptEvidence, format_evidence, parse_evidence
from oci_hook.attestation.results import result_of
from oci_hook.audit import AuditLog, format_time
from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_devices, complete_files
from oci_hook.cli.options import JSON, name_of, read_input, verify_new_output, write_output
from oci_hook.errors import BootPolicyInvalid, DeviceInvalid, KeyInvalid, SczError, TokenMalformed, TrustInvalid
from oci_hook.key_errors import EvidenceInvalid
from oci_hook.signing_key import parse_public_key, signing_key
from oci_hook.trust import Owner, parse_owner
from oci_hook.trusted_file import load_file

_FILE = click.Path(dir_okay=False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """The options, as click gives them."""

    keys: str | None
    device: str | None
    owner: str | None
    device_record: str | None
    boot_policies: tuple[str, ...]
    audit_log: str | None
    container: str | None
    manifest: str | None
    token: str | None


@click.command()
@click.argument("evidence", required=False, shell_complete=complete_files)
@click.option("--keys", type=click.Path(file_okay=False), help="OWNER: your folder; it has the devices' records.")
@click.option(
    "--device",
    metavar="NAME",
    callback=name_of,
    shell_complete=complete_devices,
    help="With --keys: the device that it must be; default: the one that the evidence names.",
)
@click.option("--owner", type=_FILE, help="AUDITOR: the model owner's public file (owner.json).")
@click.option("--device-record", type=_FILE, help="AUDITOR: the owner's record of the device (devices/NAME.json).")
@click.option(
    "--boot-policy",
    "boot_policies",
    type=_FILE,
    multiple=True,
    help="The owner's boot policy, for the reference values; repeat it for more model lines.",
)
@click.option("--audit-log", type=_FILE, help="The host's audit log, rotated files beside it: the start must be in it.")
@click.option("--container", metavar="ID", help="The container that it must be about; the whole id.")
@click.option("--manifest", metavar="DIGEST", help="The manifest digest that it must be about.")
@click.option("--token", type=_FILE, help="The identity token that the container must have had.")
@click.option("-o", "--output", type=_FILE, help="Write the result as an EAR (JWT), signed by --sign-key.")
@click.option("--sign-key", type=_FILE, help="Your key for results (PEM); made with FILE.jwk if it is not there.")
@click.option("--ear", type=_FILE, help="Instead of EVIDENCE: check the signature of this EAR, and show it.")
@click.option("--key", type=_FILE, help="With --ear: the public key of whom you believe (JWK or PEM).")
@JSON
def appraise(
    evidence: str | None,
    output: str | None,
    sign_key: str | None,
    ear: str | None,
    key: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """OWNER, AUDITOR: check a container's evidence on a machine of your own.

    EVIDENCE is what `sczctl evidence` wrote: the folder, or evidence.json. The quote is checked with the key that the
    device enrolled with, against the owner's boot policy; nonce, token, container, manifest and audit log must be those
    that it was made for. Nothing that the host concluded is believed.

    Exit codes: 0 all of it holds, 1 nothing in it is this owner's, or the EAR does not affirm everything, 30 to 59 the
    first refusal.
    """
    if (evidence is None) == (ear is None):
        raise click.UsageError("give EVIDENCE, or --ear FILE")
    if ear is not None:
        if key is None:
            raise click.UsageError("--ear needs --key FILE: a key that comes with the EAR proves nothing")
        return _check_ear(ear, key, as_json=as_json)
    if (output is None) != (sign_key is None):
        raise click.UsageError("--output and --sign-key belong together")
    if output:
        verify_new_output(output)
    kept = _load_evidence(str(evidence))
    appraisals, left_out = _appraised(kept, _Asked(**options))
    if output and sign_key and appraisals:
        result = result_of(appraisals, kind="appraisal", issued=int(time.time()), raw_evidence=format_evidence(kept))
        write_output(output, sign_ear(result, signing_key(sign_key)) + b"\n")
    _show(kept, appraisals, left_out, as_json=as_json)
    if not appraisals:
        return 1
    return next((each.error.code for each in appraisals if each.error is not None), 0)


def _load_evidence(path: str) -> KeptEvidence:
    file = os.path.join(path, "evidence.json") if os.path.isdir(path) else path
    return parse_evidence(load_file(file, limit_bytes=LIMIT_BYTES, error=EvidenceInvalid))


def _appraised(kept: KeptEvidence, asked: _Asked) -> tuple[tuple[StartAppraisal, ...], int]:
    """The appraisals of this owner's models, and how many starts are of others'."""
    owner = _owner(asked)
    starts = tuple(start for start in kept.starts if start.owner_id == owner.owner_id)
    left_out = len(kept.starts) - len(starts)
    if not starts:
        return (), left_out
    own = dataclasses.replace(kept, starts=starts)
    references = References(
        ak=_device(own, asked).ak,
        owner=owner,
        boot_policies=tuple(parse_boot_policy(read_input(each, BootPolicyInvalid)) for each in asked.boot_policies),
        container_id=asked.container,
        manifest_digest=asked.manifest,
        token_hash=_token_hash(asked.token),
        manifests=_manifests(own, asked.keys),
    )
    log = AuditLog(os.path.abspath(asked.audit_log)).verified() if asked.audit_log else None
    return appraise_kept(own, references, log), left_out


def _owner(asked: _Asked) -> Owner:
    path = asked.owner or (os.path.join(asked.keys, "owner.json") if asked.keys else None)
    if path is None:
        raise click.UsageError("whose models? give --keys FOLDER, or --owner FILE and --device-record FILE")
    return parse_owner(read_input(path, TrustInvalid))


def _device(kept: KeptEvidence, asked: _Asked) -> DeviceRecord:
    if asked.device_record is not None:
        return parse_device_record(read_input(asked.device_record, DeviceInvalid))
    if asked.keys is None:
        raise click.UsageError("which device? give --device-record FILE, or --keys FOLDER")
    from oci_hook.owner.records import OwnerRecords

    return parse_device_record(OwnerRecords(Path(asked.keys)).load_device(asked.device or kept.starts[0].device_name))


def _manifests(kept: KeptEvidence, keys: str | None) -> dict[str, str] | None:
    """What the owner packed under these names; a name that was never packed is not in it."""
    if keys is None:
        return None
    from oci_hook.owner.records import OwnerRecords

    records, known = OwnerRecords(Path(keys)), dict[str, str]()
    packed = set(records.content_keys())
    for start in kept.starts:
        if (start.model_name, start.model_version) in packed:
            found = records.load_content_key(start.model_name, start.model_version)
            known[start.model] = found.manifest_digest
    return known


def _token_hash(path: str | None) -> bytes | None:
    return None if path is None else hashlib.sha256(read_input(path, TokenMalformed)).digest()


# --- showing ----------------------------------------------------------------------------------------------------------


def _error(error: SczError | None) -> dict[str, Any] | None:
    return None if error is None else {"code": error.code, "reason": error.reason, "message": error.message}


def _show(kept: KeptEvidence, appraisals: Sequence[StartAppraisal], left_out: int, *, as_json: bool) -> None:
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


def _check_ear(path: str, key: str, *, as_json: bool) -> int:
    data = load_file(path, limit_bytes=1 << 20, error=EvidenceInvalid)
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


COMMANDS = {"appraise": appraise}
