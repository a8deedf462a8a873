"""Appraisal: whether a quote proves, for one start, that the machine is in a state that the model's owner approved.

Pure. On the attested host itself this is a diagnosis in an operator's words, and evidence for the audit log; the gate
is the policy of the sealed object, which the TPM enforces. Specification: docs/specification.md, "Evidence at a
container's start", checks 1 to 7; RFC 9334 for the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Final

from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.evidence import Evidence, tee_report_data, verify_quote
from oci_hook.attestation.structures import Public
from oci_hook.errors import BootStateRefused, EvidenceRefused

if TYPE_CHECKING:
    from oci_hook.attestation.tee import AppraisedTee, TeeExpectation

# UAPI group, "Linux TPM PCR registry", and GRUB's manual.
PCR_WORDS: Final[Mapping[int, str]] = {
    0: "firmware",
    1: "firmware settings",
    2: "firmware of add-in cards",
    3: "settings of add-in cards",
    4: "boot loader",
    5: "partition table and boot loader settings",
    6: "platform maker's events",
    7: "secure boot and its keys",
    8: "GRUB commands and kernel command line",
    9: "kernel and initrd, as GRUB read them",
    10: "files measured by IMA",
    11: "unified kernel image",
    12: "kernel command line and credentials given to the unified kernel image",
    13: "system extensions",
    14: "shim's keys",
    15: "root file system and machine identity",
}

_MADE_HERE: Final = object()
_SIGN_REMEDY: Final = (
    "boot a unified kernel image that was built with that key (`ukify --pcr-private-key`), in a boot phase that it "
    "signs; or send `sczctl boot-policy measure` to the owner for a new boot policy"
)


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """Proof that the checks passed: the form that the machine is in, and the evidence's digest (32 bytes).

    `tee` is what a TEE's report proved, where the model's owner asks for one. Only `appraise_evidence` makes a result,
    so that what asks for it can not run before the appraisal.
    """

    form: BootForm
    evidence_digest: bytes
    tee: AppraisedTee | None = None
    maker: InitVar[object] = None

    def __post_init__(self, maker: object) -> None:
        """Refuse to be made elsewhere: a mistake of the caller's, not bad input."""
        if maker is not _MADE_HERE:
            raise RuntimeError("only appraise_evidence makes an AttestationResult")


def differing_pcrs(form: BootForm, values: Mapping[int, bytes]) -> tuple[int, ...]:
    """The PCRs whose values are not the form's, not signed by its key, or missing, in the order of their numbers."""
    differing = {pcr for pcr in form.pcrs if values.get(pcr) != form.pcrs[pcr]}
    if form.signed is not None and form.signed.signature_for(values) is None:
        differing.update(form.signed.pcrs)
    return tuple(sorted(differing))


def nearest_form(forms: Sequence[BootForm], values: Mapping[int, bytes]) -> BootForm:
    """The form from which the fewest PCRs differ; the first of several. It is the one to quote for.

    Args:
        forms: Of a verified boot policy.
        values: The PCRs that any form names, as read.
    """
    return min(forms, key=lambda form: len(differing_pcrs(form, values)))


def pcrs_in_words(pcrs: tuple[int, ...]) -> str:
    """PCR numbers, each with what is measured there."""
    return ", ".join(f"PCR {pcr} ({PCR_WORDS.get(pcr, 'not assigned')})" for pcr in pcrs)


def missing_signature(form: BootForm, differing: Sequence[int]) -> str:
    """Why nobody approved a form's signed PCRs, in words; empty: they are approved, or it has none.

    Args:
        form: Of a verified boot policy.
        differing: Of `differing_pcrs`.
    """
    return form.signed.what_is_missing if form.signed is not None and set(form.signed.pcrs) & set(differing) else ""


def _state_refused(form: BootForm, differing: tuple[int, ...]) -> BootStateRefused:
    """What an operator reads: the PCRs, and for signed ones what is missing."""
    by_value = tuple(pcr for pcr in differing if pcr in form.pcrs)
    parts = [f"not as in the nearest approved boot state: {pcrs_in_words(by_value)}"] if by_value else []
    missing = missing_signature(form, differing)
    if form.signed is None or not missing:
        return BootStateRefused("; ".join(parts))
    words = f"nobody whom the form names signed the value of {pcrs_in_words(form.signed.pcrs)}"
    parts.append(f"{words}; {missing}")
    return BootStateRefused("; ".join(parts), remedy=None if by_value else _SIGN_REMEDY)


def appraise_evidence(
    evidence: Evidence,
    *,
    ak: Public,
    expected_extra_data: bytes,
    boot_policy: BootPolicy,
    tee: TeeExpectation | None = None,
) -> AttestationResult:
    """Run the seven checks, and those of a TEE's report where the model's owner asks for one.

    Args:
        evidence: The quote and the PCR values beside it.
        ak: The attestation key, as enrolled.
        expected_extra_data: `qualifying_data` of this start, 32 bytes.
        boot_policy: Verified; its values are the reference values.
        tee: What the access policy asks of a TEE; None: nothing, and a report that is there is not looked at.

    Returns:
        The result, with the form that the machine is in.

    Raises:
        EvidenceRefused: Checks 1 to 6: it is no quote, or does not say what was asked.
        BootStateRefused: Check 7: a genuine quote of a state that is not approved; the message names the PCRs.
        TeeRefused, TeeUnavailable: Of `tee.appraise_tee`.
    """
    # 1. A TPM made it, as a quote. 2. The enrolled attestation key signed it. 3. It was made for this start: nonce,
    #    token, container, manifest and audit log are in the extraData. 4. The signer is no other key (qualifiedSigner).
    # 5. It selects exactly one form's PCRs. 6. The values at hand are those that the TPM quoted.
    selections = [form.selection for form in boot_policy.forms]
    verify_quote(evidence, ak=ak, extra_data=expected_extra_data, selections=selections, error=EvidenceRefused)
    # 7. The values are the reference values of a form that has this selection; those of its signed PCRs have a
    #    signature by the form's key.
    candidates = [form for form in boot_policy.forms if form.selection == evidence.pcrs.keys()]
    form = min(candidates, key=lambda candidate: len(differing_pcrs(candidate, evidence.pcrs)))
    differing = differing_pcrs(form, evidence.pcrs)
    if differing:
        raise _state_refused(form, differing)
    appraised = None
    if tee is not None:
        from oci_hook.attestation.tee import appraise_tee  # certificates: an import that other starts need not pay

        data = tee_report_data(expected_extra_data, evidence.quote_digest)
        appraised = appraise_tee(evidence.tee, expected_data=data, expectation=tee)
    return AttestationResult(form, evidence.digest, appraised, maker=_MADE_HERE)
