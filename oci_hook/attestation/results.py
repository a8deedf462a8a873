"""An appraisal's outcome as attestation results: each start a submodule, its reasons in words.

Pure. What the values mean: draft-ietf-rats-ar4si, 2.3.4; which are given: docs/specification.md, "Attestation results".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from oci_hook import __version__
from oci_hook.attestation.ear import (
    AFFIRMED,
    BOOT_STATE_DIFFERS,
    DEVICE_REVOKED,
    NOT_GENUINE,
    REASONS_LIMIT,
    Ear,
    Kind,
    Submodule,
    status_of,
)
from oci_hook.attestation.evidence_appraisal import StartAppraisal
from oci_hook.errors import BootStateRefused, EvidenceRefused, Revoked, SczError

DEVELOPER: Final = "scz-smm"
_REASON_CHARACTERS: Final = 1000


def result_of(
    appraisals: Sequence[StartAppraisal], *, kind: Kind, issued: int, raw_evidence: bytes, host: bool = False
) -> Ear:
    """The result to sign.

    Args:
        appraisals: At least one.
        kind: `diagnosis` if the attested host appraised itself.
        issued: Seconds since 1970.
        raw_evidence: The document that was appraised.
        host: Whether the verifier is the attested host, for the verifier's id.
    """
    names = dict[str, int]()
    submodules = []
    for appraisal in appraisals:
        name = appraisal.start.model
        names[name] = names.get(name, 0) + 1
        submodules.append(_submodule(name if names[name] == 1 else f"{name}#{names[name]}", appraisal))
    build = f"scz-smm {__version__}{' on the attested host' if host else ''}"
    return Ear(issued, DEVELOPER, build, kind, tuple(submodules), raw_evidence)


def _submodule(name: str, appraisal: StartAppraisal) -> Submodule:
    start, vector = appraisal.start, _vector(appraisal.error)
    reasons = (*appraisal.shown, *(f"not looked at: {each}" for each in appraisal.unchecked))
    if appraisal.error is not None:
        reasons = (*reasons, f"{appraisal.error.reason} ({appraisal.error.code}): {appraisal.error.message}")
    return Submodule(
        name=name,
        status=status_of(vector),
        vector=vector,
        policy_id=f"scz-smm:boot-policy:{start.owner_id}:{start.model_name}:{start.device_class}",
        reasons=tuple(reason[:_REASON_CHARACTERS] for reason in reasons[-REASONS_LIMIT:]),
    )


def _vector(error: SczError | None) -> Mapping[str, int]:
    """What is claimed; nothing where the appraiser lacked what to compare with (status `none`)."""
    if error is None:
        return AFFIRMED
    if isinstance(error, BootStateRefused):
        return BOOT_STATE_DIFFERS
    if isinstance(error, Revoked):
        return DEVICE_REVOKED
    return NOT_GENUINE if isinstance(error, EvidenceRefused) else {}
