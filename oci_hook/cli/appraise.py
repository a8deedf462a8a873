"""`sczctl appraise`: the appraisal of a container's evidence by another party, and the check of attestation results."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import click

from oci_hook.attestation.boot_policy import parse_boot_policy
from oci_hook.attestation.device_record import DeviceRecord, parse_device_record
from oci_hook.attestation.ear import sign_ear
from oci_hook.attestation.evidence_appraisal import References, StartAppraisal, appraise_kept
from oci_hook.attestation.kept_evidence import LIMIT_BYTES, KeptEvidence, format_evidence, parse_evidence
from oci_hook.attestation.results import result_of
from oci_hook.audit import AuditLog
from oci_hook.cli.appraisal_output import check_ear, show_appraisals
from oci_hook.cli.completion import complete_devices, complete_files
from oci_hook.cli.options import JSON, name_of, read_input, verify_new_output, write_output
from oci_hook.errors import BootPolicyInvalid, ConfigInvalid, DeviceInvalid, TokenMalformed, TrustInvalid
from oci_hook.https_request import Server
from oci_hook.key_errors import AppraisalRefused, EvidenceInvalid, VerifierUnavailable
from oci_hook.remote_appraisal import ask_keylime, parse_ca
from oci_hook.signing_key import signing_key
from oci_hook.trust import Owner, parse_owner
from oci_hook.trusted_file import load_file

_FILE = click.Path(dir_okay=False)
_KEYLIME_SECONDS = 60.0


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
@click.option("--keylime", metavar="URL", help="Also ask this verifier of Keylime (https); what it refuses is refused.")
@click.option("--keylime-ca", type=_FILE, help="With --keylime: the CA that issued its certificate (PEM).")
@click.option("--keylime-certificate", type=_FILE, help="With --keylime: your certificate (PEM), if it asks for one.")
@click.option("--keylime-key", type=_FILE, help="With --keylime: the key of that certificate (PEM).")
@JSON
def appraise(
    evidence: str | None,
    output: str | None,
    sign_key: str | None,
    ear: str | None,
    key: str | None,
    keylime: str | None,
    keylime_ca: str | None,
    keylime_certificate: str | None,
    keylime_key: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """OWNER, AUDITOR: check a container's evidence on a machine of your own.

    EVIDENCE is what `sczctl evidence` wrote: the folder, or evidence.json. The quote is checked with the key that the
    device enrolled with, against the owner's boot policy; nonce, token, container, manifest and audit log must be those
    that it was made for. Nothing that the host concluded is believed: the device's name and class are those of your
    record. A revoked device, and with --keys a revoked version or a withdrawn boot policy, is refused. With --keylime,
    a verifier of Keylime is asked, too: by you, so that its answer is more than the host's diagnosis of itself.

    Exit codes: 0 what was looked at holds (what was not is listed), 1 nothing in it is this owner's, or the EAR does
    not affirm everything, 30 to 59 the first refusal.
    """
    if (evidence is None) == (ear is None):
        raise click.UsageError("give EVIDENCE, or --ear FILE")
    if ear is not None:
        if key is None:
            raise click.UsageError("--ear needs --key FILE: a key that comes with the EAR proves nothing")
        return check_ear(ear, key, as_json=as_json)
    if (output is None) != (sign_key is None):
        raise click.UsageError("--output and --sign-key belong together")
    if output:
        verify_new_output(output)
    kept = _load_evidence(str(evidence))
    appraisals, left_out = _appraised(kept, _Asked(**options))
    if keylime is not None:
        if keylime_ca is None:
            raise click.UsageError("--keylime needs --keylime-ca FILE: no other CA is believed")
        ca = parse_ca(read_input(keylime_ca, ConfigInvalid))
        server = Server(keylime, ca, keylime_certificate, keylime_key)
        appraisals = tuple(_asked_remotely(kept, each, server) for each in appraisals)
    if output and sign_key and appraisals:
        result = result_of(appraisals, kind="appraisal", issued=int(time.time()), raw_evidence=format_evidence(kept))
        write_output(output, sign_ear(result, signing_key(sign_key)) + b"\n")
    show_appraisals(kept, appraisals, left_out, as_json=as_json)
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
    record = _device(own, asked)
    references = References(
        ak=record.ak,
        record=record,
        owner=owner,
        boot_policies=tuple(parse_boot_policy(read_input(each, BootPolicyInvalid)) for each in asked.boot_policies),
        container_id=asked.container,
        manifest_digest=asked.manifest,
        token_hash=_token_hash(asked.token),
        **_owners_records(own, asked.keys),
    )
    log = AuditLog(os.path.abspath(asked.audit_log)).verified() if asked.audit_log else None
    return appraise_kept(own, references, log), left_out


def _asked_remotely(kept: KeptEvidence, found: StartAppraisal, server: Server) -> StartAppraisal:
    """What passed here is put to the verifier; the values are approved by now, and the key is the enrolled one."""
    if found.error is not None:
        return found
    quote, extra_data = found.start.quote, found.start.qualifying_data(kept.container_id)
    try:
        ask_keylime(
            server,
            quote,
            ak=found.start.ak,
            extra_data=extra_data,
            reference=quote.pcrs,
            timeout_seconds=_KEYLIME_SECONDS,
        )
    except (AppraisalRefused, VerifierUnavailable) as error:
        return dataclasses.replace(found, error=error)
    return dataclasses.replace(found, shown=(*found.shown, f"Keylime's verifier at {server.address} accepts it"))


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


def _owners_records(kept: KeptEvidence, keys: str | None) -> dict[str, Any]:
    """What the owner packed under these names, revoked of it, and withdrew, for `References`.

    A name that was never packed is not in it.
    """
    if keys is None:
        return {}
    from oci_hook.owner.records import OwnerRecords

    records, manifests, revoked = OwnerRecords(Path(keys)), dict[str, str](), set[str]()
    packed = set(records.content_keys())
    for start in kept.starts:
        if (start.model_name, start.model_version) in packed:
            found = records.load_content_key(start.model_name, start.model_version)
            manifests[start.model] = found.manifest_digest
            if not records.load_line(start.model_name).allows(found.model):
                revoked.add(start.model)
    lines = {(each.model_name, each.device_class) for each in kept.starts}
    epochs = {(name, device_class): records.load_line(name).epoch(device_class) for name, device_class in lines}
    return {"manifests": manifests, "revoked": frozenset(revoked), "epochs": epochs}


def _token_hash(path: str | None) -> bytes | None:
    if path is None:
        return None
    return hashlib.sha256(read_input(path, TokenMalformed).removesuffix(b"\n")).digest()  # as the hook reads it


COMMANDS = {"appraise": appraise}
