"""`sczctl evidence`: what was proven when a container got its models, for others to check."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from oci_hook.attestation.boot_policy import parse_boot_policy
from oci_hook.attestation.checkquote import quote_files
from oci_hook.attestation.ear import sign_ear
from oci_hook.attestation.evidence_appraisal import References, StartAppraisal, appraise_kept
from oci_hook.attestation.kept_evidence import KeptEvidence, StartEvidence, format_evidence, parse_evidence
from oci_hook.attestation.results import result_of
from oci_hook.audit import AuditLog
from oci_hook.bundle.files import NewFolder
from oci_hook.cli import print_json, printable
from oci_hook.cli.completion import complete_containers, complete_files
from oci_hook.cli.options import JSON, container_of, verify_new_output
from oci_hook.config import Config, load_config
from oci_hook.errors import FileUnreadable, OwnerUntrusted, SczError
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.signing_key import signing_key
from oci_hook.store import Store
from oci_hook.trust_folder import Trust
from oci_hook.trusted_file import make_private_directory

KEY_FOLDER, KEY_NAME = "ear", "ear.key"


@click.command()
@click.argument("container", callback=container_of, shell_complete=complete_containers)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    shell_complete=complete_files,
    help="Folder to write: evidence, quotes for tpm2_checkquote, the host's result; nothing is overwritten.",
)
@JSON
@click.pass_obj
def evidence(config_file: str, container: str, output: str | None, as_json: bool) -> int:
    """HOST: what the TPM vouched for when a container got its models, for others to check.

    CONTAINER is the id of a running container, or its beginning. FOLDER gets evidence.json, for `sczctl appraise` on
    another machine; ear.jwt, this host's own result, which is a diagnosis: whoever is root here can sign what he
    likes; and for each model, numbered, the raw quote:

    \b
    tpm2_checkquote -u 1/ak.pem -m 1/quote.msg -s 1/quote.sig -f 1/quote.pcrs \\
        -g sha256 -q $(cat 1/qualifying-data.hex)

    The exit code is 1 if no such container, or no evidence of it, is known.
    """
    config = load_config(config_file)
    records = ContainerRecords(config.runtime_directory)
    found = [each for each in records.live() if each.delivered and each.container_id.startswith(container)]
    found = [each for each in found if each.container_id == container] or found
    if not found:
        click.echo(f"no running container {printable(container)} holds a model; `sczctl ps` lists them", err=True)
        return 1
    if len(found) > 1:
        names = ", ".join(f"{each.container_id} ({each.bundle})" for each in found[:8])
        raise click.UsageError(printable(f"{container} may be any of {names}"))
    data = records.load_evidence(found[0].container_id, found[0].bundle)
    if data is None:
        click.echo("no evidence was kept: the container got its models from an earlier version of scz-smm", err=True)
        return 1
    if output:
        verify_new_output(output)
    kept = parse_evidence(data)
    appraisals = diagnose(kept, config)
    if output:
        _write(output, kept, appraisals, config)
    _show(found[0], kept, appraisals, output, as_json=as_json)
    return 0


def diagnose(kept: KeptEvidence, config: Config) -> list[StartAppraisal]:
    """Appraise a container's evidence with what this host has; one for each start.

    Raises:
        CouldNotTell: This host is not enrolled, or its audit log cannot be read.
    """
    store, owners = Store(config.store_directory), Trust(config.trust_directory).owners()
    device, found = store.load_device(), list[StartAppraisal]()
    for start in kept.starts:
        try:
            owner = next((each for each in owners if each.owner_id == start.owner_id), None)
            if owner is None:
                raise OwnerUntrusted("the model's owner is not trusted here any more")
            policy = store.load_boot_policy(owner.owner_id, start.model_name, start.device_class)
            references = References(device.ak, owner, (parse_boot_policy(policy),), container_id=kept.container_id)
            log = AuditLog(config.audit_file).verified()
            found += appraise_kept(KeptEvidence(kept.container_id, (start,)), references, log)
        except SczError as error:
            found.append(StartAppraisal(start, (), (), error))
    return found


def _write(output: str, kept: KeptEvidence, appraisals: list[StartAppraisal], config: Config) -> None:
    folder = os.path.join(config.store_directory, KEY_FOLDER)
    for each in (config.store_directory, folder):
        make_private_directory(each)
    key = signing_key(os.path.join(folder, KEY_NAME), only_root=True)
    document = format_evidence(kept)
    result = result_of(appraisals, kind="diagnosis", issued=int(time.time()), raw_evidence=document, host=True)
    files = {"evidence.json": document, "ear.jwt": sign_ear(result, key) + b"\n"}
    files["ear.jwk"] = Path(folder, f"{KEY_NAME}.jwk").read_bytes()
    for number, start in enumerate(kept.starts, 1):
        files |= {f"{number}/{name}": data for name, data in quote_files(kept, start).items()}
    try:
        with NewFolder(Path(output)) as folder_made:
            for name, data in files.items():
                path = folder_made.partial / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            folder_made.publish(mode=0o700)
    except OSError as cause:
        raise FileUnreadable(f"{output}: {cause.strerror}") from cause


def _row(number: int, start: StartEvidence, appraisal: StartAppraisal) -> dict[str, Any]:
    error = appraisal.error
    return {
        "number": number,
        "model": start.model,
        "manifest": start.manifest_digest,
        "pcrs": sorted(start.quote.pcrs),
        "quote": start.quote.quote_digest.hex(),
        "remote": start.remote,
        "diagnosis": {
            "shown": list(appraisal.shown),
            "not_looked_at": list(appraisal.unchecked),
            "error": None if error is None else {"code": error.code, "reason": error.reason, "message": error.message},
        },
    }


def _show(
    record: ContainerRecord,
    kept: KeptEvidence,
    appraisals: list[StartAppraisal],
    output: str | None,
    *,
    as_json: bool,
) -> None:
    if as_json:
        rows = [_row(number, each.start, each) for number, each in enumerate(appraisals, 1)]
        document = json.loads(format_evidence(kept))
        print_json({"container": record.container_id, "folder": output, "evidence": document, "models": rows})
        return
    click.echo(printable(f"container {record.container_id}: diagnosis of this host about itself"))
    for number, each in enumerate(appraisals, 1):
        click.echo(printable(f"{number}: {each.start.model}, {each.start.manifest_digest}"))
        for line in each.shown:
            click.echo(printable(f"  {line}"))
        for line in each.unchecked:
            click.echo(printable(f"  not looked at: {line}"))
        if each.error is not None:
            click.echo(printable(f"  {each.error.reason} ({each.error.code}): {each.error.message}"))
    if output:
        click.echo(printable(f"written to {output}: `sczctl appraise {output}` checks it on another machine"))


COMMANDS = {"evidence": evidence}
