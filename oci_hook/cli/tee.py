"""`sczctl tee`: what the processor of this confidential guest reports, for the model's owner to hold against."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.options import JSON
from oci_hook.config import Config, load_config


@click.command()
@JSON
@click.pass_obj
def tee(config_file: str, as_json: bool) -> None:
    """Show what this guest's processor reports (AMD SEV-SNP), with the access policy that would accept it.

    For the model's owner, who compares it: the measurement with that of the image that was to be launched, the root
    with AMD's. That report, certificates and root fit together is checked; that the root is AMD's, nobody here can say.
    Nothing is changed.
    """
    document = describe(load_config(config_file))
    if as_json:
        print_json(document)
        return
    for name in ("product", "signed_by", "root", "provider", "measurement", "vmpl", "may_debug", "may_migrate", "chip"):
        if document[name] is not None:
            click.echo(printable(f"{name}: {document[name]}"))
    for which, levels in document["tcb"].items():
        click.echo(f"tcb {which}: {' '.join(f'{name}={level}' for name, level in levels.items())}")


def describe(config: Config) -> dict[str, Any]:
    """A fresh report, taken apart.

    Raises:
        TeeUnavailable: There is none, or no certificate for it.
        TeeRefused: It is malformed, or it and its certificates do not fit together.
    """
    from oci_hook.attestation.sev_snp import REPORT_DATA_BYTES, parse_report, parse_tcb
    from oci_hook.attestation.sev_snp_chain import claimed_by
    from oci_hook.attestation.tee import TCBS, TeeExpectation, appraise_tee, certificates_for, verify_provider
    from oci_hook.attestation.tee_collection import collect_report, load_certificates, read_tee_report
    from oci_hook.key_errors import TeeRefused
    from oci_hook.tee_policy import ALLOWANCES, TeePolicy, tee_policy_document

    data = secrets.token_bytes(REPORT_DATA_BYTES)
    report = read_tee_report(collect_report(config.tsm_directory, data, config.tpm_timeout_seconds))
    kept = load_certificates(os.path.join(config.store_directory, "tee"))
    verify_provider(report)
    parsed = parse_report(report.report, error=TeeRefused)
    root, provider = claimed_by(certificates_for(parsed, report, kept), parsed.signing_key, error=TeeRefused)
    providers = (provider,) if provider is not None else ()
    widest = TeePolicy((parsed.measurement,), (root,), {}, parsed.vmpl, ALLOWANCES, providers)
    found = appraise_tee(
        report, expected_data=data, expectation=TeeExpectation(widest, kept, datetime.fromtimestamp(time.time(), UTC))
    )
    tcbs = [asdict(parse_tcb(raw, found.product, error=TeeRefused)) for raw in parsed.tcbs]
    names = [name for name in tcbs[0] if name != "fmc" or found.product == "turin"]
    levels = {which: {name: tcb[name] for name in names} for which, tcb in zip(TCBS, tcbs, strict=True)}
    lowest = {name: min(each[name] for each in levels.values()) for name in names}
    allowed = tuple(
        name for name, is_so in zip(ALLOWANCES, (parsed.may_debug, parsed.may_migrate), strict=True) if is_so
    )
    policy = TeePolicy(widest.measurements, (root,), {found.product: lowest}, parsed.vmpl, allowed, providers)
    return {
        "product": found.product,
        "signed_by": found.signing_key,
        "root": root.hex(),
        "provider": provider,
        "measurement": parsed.measurement.hex(),
        "vmpl": parsed.vmpl,
        "may_debug": parsed.may_debug,
        "may_migrate": parsed.may_migrate,
        "chip": parsed.chip_id.hex() if parsed.chip_id is not None else None,
        "tcb": levels,
        "tee": tee_policy_document(policy),
    }


COMMANDS = {"tee": tee}
