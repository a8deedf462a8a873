"""The appraisal of kept evidence by another party: the owner, or an auditor, on a machine of their own.

Pure. What the host says is believed only as far as the quote binds it; what the quote does not bind (the model's name,
the time) is compared with what the appraiser brings, or said to be the host's word alone. The checks of the quote are
`appraisal`'s, the very ones of a start. Specification: docs/specification.md, "Appraisal of kept evidence".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oci_hook.attestation.appraisal import appraise_evidence, pcrs_in_words
from oci_hook.attestation.boot_policy import (
    BootPolicy,
    UnverifiedBootPolicy,
    verify_boot_policy,
    with_host_signatures,
)
from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.kept_evidence import KeptEvidence, StartEvidence
from oci_hook.attestation.pcr_signature import UnverifiedPcrSignature, fingerprint
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.structures import Public
from oci_hook.audit_chain import EMPTY_HEAD, Verified
from oci_hook.documents import shown
from oci_hook.errors import BootPolicyRefused, BootStateRefused, EvidenceRefused, Revoked, SczError
from oci_hook.key_errors import GenerationRefused
from oci_hook.trust import Owner


@dataclass(frozen=True, slots=True)
class References:
    """What the appraiser brings.

    Attributes:
        ak: The attestation key, as enrolled.
        owner: The model's owner.
        boot_policies: Of that owner; of those of the model line and class, the one of the highest epoch is taken.
        container_id, manifest_digest, token_hash: What the evidence must be for; None: whatever it says.
        manifests: Manifest digests by `name:version`, of the owner's own records; None: not at hand.
        record: The owner's record of the device whose key `ak` is; None: not at hand.
        revoked: `name:version` of what the owner revoked; of the owner's own records, as `manifests`.
        epochs: The epoch by model line and device class; of the same records, 0 if it is not there.
    """

    ak: Public
    owner: Owner
    boot_policies: tuple[UnverifiedBootPolicy, ...]
    container_id: str | None = None
    manifest_digest: str | None = None
    token_hash: bytes | None = None
    manifests: Mapping[str, str] | None = None
    record: DeviceRecord | None = None
    revoked: frozenset[str] = frozenset()
    epochs: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartAppraisal:
    """How one start's evidence came out: what was shown, what was not looked at, and the refusal, if any."""

    start: StartEvidence
    shown: tuple[str, ...]
    unchecked: tuple[str, ...]
    error: SczError | None = None


@dataclass(slots=True)
class _Findings:
    shown: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def appraise_kept(
    kept: KeptEvidence, references: References, log: Iterable[Verified] | None
) -> tuple[StartAppraisal, ...]:
    """Appraise every start of a document.

    Args:
        kept: As parsed.
        references: The appraiser's.
        log: The host's audit log, in order, its chain verified while it is read; None: not at hand.

    Returns:
        One appraisal for each start, in their order.

    Raises:
        AuditRefused: The audit log's chain is broken; from the iterable.
    """
    audited = _audited(kept, log) if log is not None else None
    return tuple(_appraised(kept, number, references, audited) for number in range(len(kept.starts)))


def _appraised(
    kept: KeptEvidence, number: int, references: References, audited: Mapping[int, _Logged] | None
) -> StartAppraisal:
    start, findings = kept.starts[number], _Findings()
    try:
        _verify_start(kept, start, references, findings)
        if audited is not None:
            _verify_audited(audited[number], start, findings)
        else:
            findings.unchecked.append("no audit log was given: that the host logged this start was not looked at")
    except SczError as refusal:
        return StartAppraisal(start, tuple(findings.shown), tuple(findings.unchecked), refusal)
    return StartAppraisal(start, tuple(findings.shown), tuple(findings.unchecked))


def _verify_start(kept: KeptEvidence, start: StartEvidence, references: References, findings: _Findings) -> None:
    # 1. The attestation key is the enrolled one: anybody's TPM makes genuine quotes.
    if start.ak.name != references.ak.name:
        raise EvidenceRefused("the attestation key is not the one that the device enrolled with")
    device = f"device {references.record.device}'s" if references.record else "device's"
    findings.shown.append(f"the attestation key is the enrolled {device}")
    findings.unchecked.append("the time of it is the host's word: its clock's")
    # 2. It is about what was asked for; nothing in the quote covers the device's name and class.
    _verify_subject(kept, start, references, findings)
    _verify_device(start, references.record, findings)
    # 3. The reference values: the owner signed them for this model line and device class, and has not withdrawn them.
    _verify_not_revoked(start, references, findings)
    policy = _verified_boot_policy(start, references)
    findings.shown.append(f"the boot policy is signed by the owner {references.owner.name}")
    policy = _with_signature(policy, start)
    # 4. The quote: the seven checks of a start, with extraData recomputed from all parts.
    result = appraise_evidence(
        start.quote, ak=references.ak, expected_extra_data=start.qualifying_data(kept.container_id), boot_policy=policy
    )
    findings.shown.append("the TPM quoted this for one nonce, token, container, manifest and audit log")
    # 5. The form is the one that the host says it found itself in.
    if result.form.policy != start.form_policy:
        raise BootStateRefused("the machine was in an approved state, but not in the one that the evidence names")
    findings.shown.append(f"approved: {pcrs_in_words(tuple(sorted(start.quote.pcrs)))}")
    signed = result.form.signed
    if signed is not None:
        key = f"the key that the boot policy names (pkfp {fingerprint(signed.key).hex()})"
        findings.shown.append(f"of these the value of {pcrs_in_words(signed.pcrs)} is signed by {key}")
    if start.quote.tee is not None:
        tee = f"a TEE's report ({start.quote.tee.provider}) was kept"
        findings.unchecked.append(f"{tee}: it was not appraised here, nor whether the model's owner asks for one")
    if start.remote is not None:
        findings.unchecked.append(f"the host says that {start.remote} accepted it: a diagnosis, its own word alone")


def _with_signature(policy: BootPolicy, start: StartEvidence) -> BootPolicy:
    """The policy, whose nested forms know the signature that the host kept; it counts for their keys and values."""
    signature, values = start.pcr_signature, start.quote.pcrs
    if signature is None:
        return policy
    selections = {form.signed.pcrs for form in policy.forms if form.signed is not None}
    entries = [
        UnverifiedPcrSignature(pcrs, policy_pcr(ZERO_DIGEST, {pcr: values[pcr] for pcr in pcrs}), signature)
        for pcrs in selections
        if values.keys() >= set(pcrs)
    ]
    return with_host_signatures(policy, entries, "the evidence")


def _verify_subject(kept: KeptEvidence, start: StartEvidence, references: References, findings: _Findings) -> None:
    if start.owner_id != references.owner.owner_id:
        raise EvidenceRefused(f"the evidence is about a model of another owner than {references.owner.name}")
    for what, wanted, found in (
        ("container", references.container_id, kept.container_id),
        ("manifest", references.manifest_digest, start.manifest_digest),
        ("token", references.token_hash, start.token_hash),
    ):
        if wanted is not None and wanted != found:
            raise EvidenceRefused(f"the evidence is about another {what}")
        if wanted is not None:
            findings.shown.append(f"it is about the {what} that was asked for")
    if references.manifests is None:
        findings.unchecked.append("the model's name is the host's word: the quote binds its manifest digest alone")
    elif references.manifests.get(start.model) != start.manifest_digest:
        raise EvidenceRefused(f"the manifest is not that of {start.model} in the owner's records")
    else:
        findings.shown.append(f"the manifest is that of {start.model} in the owner's records")


def _verify_device(start: StartEvidence, record: DeviceRecord | None, findings: _Findings) -> None:
    if record is None:
        findings.unchecked.append("the device's name and class are the host's word: no record of its owner is at hand")
        return
    for what, known, found in (
        ("name", record.device, start.device_name),
        ("class", record.device_class, start.device_class),
    ):
        if known != found:
            raise EvidenceRefused(
                f"the device's {what} is {known} in the owner's record, the evidence says {found}",
                remedy="the record decides: if the device was enrolled anew since, take evidence of a later start",
            )
    if record.revoked is not None:
        raise Revoked(f"the owner has revoked the device {record.device}", remedy="nothing of it is to be believed")
    findings.shown.append(f"name and class ({record.device_class}) are those of the owner's record, and not revoked")


def _verify_not_revoked(start: StartEvidence, references: References, findings: _Findings) -> None:
    if references.manifests is None:
        findings.unchecked.append("whether the owner revoked the version or withdrew the boot policy since")
    elif start.model in references.revoked:
        raise GenerationRefused(f"the owner has revoked {start.model}")


def _verified_boot_policy(start: StartEvidence, references: References) -> BootPolicy:
    policy = verify_boot_policy(
        _boot_policy(start, references),
        owner=references.owner,
        model_name=start.model_name,
        device_class=start.device_class,
    )
    epoch = references.epochs.get((start.model_name, start.device_class), 0)
    if policy.epoch < epoch:
        raise BootPolicyRefused(
            f"the boot policy is of epoch {policy.epoch}, the owner withdrew what is older than {epoch}",
            remedy="give the latest: sign the states that stay good anew (`sczctl boot-policy sign`)",
        )
    return policy


def _boot_policy(start: StartEvidence, references: References) -> UnverifiedBootPolicy:
    """The latest policy of this line and class; if it is none, the first, whose verification says what is wrong."""
    wanted = (references.owner.owner_id, start.model_name, start.device_class)
    found = [
        policy
        for policy in references.boot_policies
        if (policy.unverified_owner_id, policy.unverified_model_name, policy.unverified_device_class) == wanted
    ]
    if not references.boot_policies:
        raise BootPolicyRefused("no boot policy is at hand", remedy="give the owner's with --boot-policy FILE")
    return max(found, key=lambda policy: policy.unverified_epoch, default=references.boot_policies[0])


# --- the audit log ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Logged:
    """Why the log does not bear a start out (None: it does), and whether it names a TEE's report."""

    trouble: str | None
    has_report: bool


def _audited(kept: KeptEvidence, log: Iterable[Verified]) -> dict[int, _Logged]:
    """What the log has of each start. One pass, however long the log is."""
    heads = {start.audit_head for start in kept.starts}
    seen, granted = {EMPTY_HEAD} & heads, dict[int, bool]()
    for each in log:
        record = each.record
        if record.get("event") == "grant" and record.get("container") == kept.container_id:
            granted |= {
                number: "evidence" in record
                for number, start in enumerate(kept.starts)
                if start.audit_head in seen and _is_of(record, start)
            }
        if each.digest in heads:
            seen.add(each.digest)
    return {
        number: _Logged(_trouble(start, seen, is_granted=number in granted), granted.get(number, False))
        for number, start in enumerate(kept.starts)
    }


def _is_of(record: Mapping[str, Any], start: StartEvidence) -> bool:
    wanted = (start.manifest_digest, start.audit_head.hex(), start.model_name, start.model_version)
    if (record.get("manifest"), record.get("quoted"), record.get("model"), record.get("version")) != wanted:
        return False
    # The record has the evidence's digest where a TEE's report is part of it; one that was too large was not kept.
    return start.quote.tee is None or record.get("evidence") == start.quote.digest.hex()


def _trouble(start: StartEvidence, seen: set[bytes], *, is_granted: bool) -> str | None:
    if start.audit_head not in seen:
        return "the audit log has no record with the head that was quoted: it is another's, cut, or rotated away"
    if not is_granted:
        report = "" if start.quote.tee is None else " with this TEE's report"
        return f"the audit log has no grant of {shown(start.model)}{report} after the head that was quoted"
    return None


def _verify_audited(logged: _Logged, start: StartEvidence, findings: _Findings) -> None:
    if logged.trouble is not None:
        raise EvidenceRefused(logged.trouble, remedy="give the whole audit log of that host, with its rotated files")
    findings.shown.append("the audit log has the quoted head, and after it the grant")
    if logged.has_report and start.quote.tee is None:
        findings.unchecked.append("the audit log names evidence with a TEE's report, which was not kept")
