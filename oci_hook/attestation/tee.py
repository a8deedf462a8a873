"""Whether a TEE's report proves, for one start, that this is a guest whose memory its host cannot read.

Pure. As with a quote, the attested machine itself asks: a diagnosis there, and evidence for whoever holds a share of
the key and asks for it elsewhere (docs/tee.md). SEV-SNP alone.
Specification: docs/specification.md, "Trusted execution environment", checks 1 to 9.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from oci_hook.attestation.evidence import TeeReport
from oci_hook.attestation.sev_snp import Product, SigningKey, SnpReport, Tcb, parse_report, parse_tcb
from oci_hook.attestation.sev_snp import verify_report_signature as verify_signature
from oci_hook.attestation.sev_snp_chain import Role, parse_table, verify_endorsement
from oci_hook.key_errors import TeeRefused, TeeUnavailable
from oci_hook.tee_policy import SEV_SNP, TeePolicy

SEV_GUEST: Final = "sev_guest"  # configfs-tsm's name of the format
TCBS: Final = ("reported", "current", "committed", "launch")


@dataclass(frozen=True, slots=True)
class TeeExpectation:
    """What a report is held against: the owner's policy, the certificates kept here, the time (with its zone)."""

    policy: TeePolicy
    certificates: Mapping[Role, bytes]
    now: datetime


@dataclass(frozen=True, slots=True)
class AppraisedTee:
    """What was proven, for the audit log and for people; `tcb` is the reported one."""

    kind: str
    product: Product
    signing_key: SigningKey
    measurement: bytes
    tcb: Tcb


def appraise_tee(report: TeeReport | None, *, expected_data: bytes, expectation: TeeExpectation) -> AppraisedTee:
    """Run the nine checks.

    Args:
        report: Of the evidence; None: there is none.
        expected_data: `evidence.tee_report_data` of this start, 64 bytes.
        expectation: The owner's policy, and what goes with it.

    Raises:
        TeeUnavailable: There is no report of that kind, or no certificate for it.
        TeeRefused: It proves something else than is asked.
    """
    policy, kept = expectation.policy, expectation.certificates
    # 1. There is a report, of the kind that the owner asks for.
    if report is None:
        raise TeeUnavailable("the model's owner asks for an SEV-SNP guest, and this machine gives no report of a TEE")
    verify_provider(report)
    # 2. It is well-formed. 3. Its certificates end in a root that the owner pinned.
    parsed = parse_report(report.report, error=TeeRefused)
    certificates = certificates_for(parsed, report, kept)
    endorsement = verify_endorsement(
        certificates,
        parsed,
        roots=policy.roots,
        vlek_providers=policy.vlek_providers,
        now=expectation.now,
        error=TeeRefused,
    )
    # 4. That key signed it. 5. It was made for this start: REPORT_DATA.
    verify_signature(parsed, endorsement.key, error=TeeRefused)
    if not hmac.compare_digest(parsed.report_data, expected_data):
        raise TeeRefused("the report was made for another occasion (REPORT_DATA)")
    # 6 to 8. What was launched, and what its host may do.
    _verify_guest(parsed, policy)
    # 9. No patch level is below the owner's: as reported, running, committed, and when the guest was launched.
    _verify_tcb(parsed, endorsement.product, policy)
    return AppraisedTee(SEV_SNP, endorsement.product, endorsement.kind, parsed.measurement, endorsement.tcb)


def verify_provider(report: TeeReport) -> None:
    """Verify that a report is of the one kind that is known here.

    Raises:
        TeeUnavailable: It is another hardware's.
    """
    if report.provider != SEV_GUEST:
        raise TeeUnavailable(f"an SEV-SNP guest is asked for; reports here are of {report.provider}")


def certificates_for(parsed: SnpReport, report: TeeReport, kept: Mapping[Role, bytes]) -> Mapping[Role, bytes]:
    """The certificates that a report needs: the hypervisor's and, for roles that it does not have, those kept here.

    Raises:
        TeeRefused: The hypervisor's table is malformed.
        TeeUnavailable: One is nowhere.
    """
    certificates = {**kept, **parse_table(report.certificates, error=TeeRefused)}
    missing = [role for role in ("ark", "ask", parsed.signing_key) if role not in certificates]
    if missing:
        raise TeeUnavailable(
            f"neither the hypervisor nor this host's store has the certificates {', '.join(missing)}",
            remedy="let the hypervisor hand them over, or put AMD's into the folder tee of the store (docs/tee.md)",
        )
    return certificates


def _verify_guest(report: SnpReport, policy: TeePolicy) -> None:
    # 6. It was launched from what the owner knows.
    if report.measurement not in policy.measurements:
        raise TeeRefused(f"the launch measurement {report.measurement.hex()} is none that the model's owner accepts")
    # 7. Its host may neither debug nor migrate it.
    for name, is_permitted in (("debug", report.may_debug), ("migration", report.may_migrate)):
        if is_permitted and name not in policy.allow:
            raise TeeRefused(f"the guest's policy permits its host {name}")
    # 8. Who asked is privileged enough.
    if report.vmpl > policy.vmpl:
        raise TeeRefused(f"VMPL {report.vmpl} asked for the report; the model's owner accepts {policy.vmpl} at most")


def _verify_tcb(report: SnpReport, product: Product, policy: TeePolicy) -> None:
    levels = {name: parse_tcb(raw, product, error=TeeRefused) for name, raw in zip(TCBS, report.tcbs, strict=True)}
    if policy.minimum_tcb and product not in policy.minimum_tcb:
        raise TeeRefused(f"the model's owner names patch levels, and none for {product}")
    minimum = policy.minimum_tcb.get(product, {})
    for which, tcb in levels.items():
        low = [
            f"{name} {getattr(tcb, name)} < {least}" for name, least in minimum.items() if getattr(tcb, name) < least
        ]
        if low:
            raise TeeRefused(f"the {which} patch levels are below the model owner's: {', '.join(low)}")
