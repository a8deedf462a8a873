"""The PCR values of a machine's next boot, from the log of the one that is running and what is going to be replaced.

Pure. A PCR whose value cannot be told is named and left out; what is not touched keeps the value that the TPM quoted.
It approves nothing: that is the owner's signature. A wrong prediction opens no model; it only does not help.
Specification: docs/specification.md, "Prediction".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.boot_draft import Draft, Replacement
from oci_hook.attestation.boot_policy import parse_pcrs, pcrs_document
from oci_hook.attestation.event_log import replay
from oci_hook.attestation.explanation import explain_values, with_phases
from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.key_errors import EventLogInvalid
from oci_hook.trust import NAME, NAME_LIMIT

SCHEMA: Final = "scz-smm/prediction/v1"
LIMIT_BYTES: Final = 1 << 20
PREDICTED_PCRS: Final = range(16)
_TIME_LIMIT: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Prediction:
    """The state of the next boot.

    Attributes:
        pcrs: Values of the SHA-256 bank, of PCRs 0 to 15 whose value can be told.
        changed: Those of them that are not as in the boot of the log.
        unknown: PCRs whose value cannot be told, with the reason.
        replacements: What was replaced.
    """

    pcrs: Mapping[int, bytes]
    changed: tuple[int, ...]
    unknown: Mapping[int, str]
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True, slots=True)
class PredictedState:
    """A prediction as it is kept in a file, for `boot-policy sign` and `diff`. It is signed by nobody."""

    device: str
    created: int
    pcrs: Mapping[int, bytes]


def format_prediction(device: str, created: int, prediction: Prediction) -> bytes:
    """The document's bytes. `created`: seconds since 1970."""
    document = {"schema": SCHEMA, "device": device, "created": created}
    return canonical({**document, "pcrs": pcrs_document(prediction.pcrs)})


def parse_prediction(data: bytes) -> PredictedState:
    """Parse a prediction.

    Raises:
        EventLogInvalid: Malformed, or larger than 1 MiB.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="prediction", error=EventLogInvalid)
    fields = Fields(document, what="prediction", error=EventLogInvalid)
    fields.literal("schema", SCHEMA)
    state = PredictedState(
        device=fields.string("device", pattern=NAME, limit=NAME_LIMIT),
        created=fields.integer("created", low=0, high=_TIME_LIMIT),
        pcrs=parse_pcrs(fields, "pcrs", error=EventLogInvalid),
    )
    fields.finish()
    return state


def predict(draft: Draft, quoted: Mapping[int, bytes] | None) -> Prediction:
    """The values of the next boot.

    Args:
        draft: The log of the boot that is running, with its replacements.
        quoted: What the device's TPM quoted in that boot, verified; None: nothing, and the log is taken for true.

    Returns:
        The values. With `quoted`, a PCR that nothing replaced keeps the quoted value, and one that is replaced has a
        value only if the log explains the quoted one; in PCR 11 systemd's phases are repeated.

    Raises:
        EventLogInvalid: The log has no SHA-256 digests, or nothing was replaced.
    """
    replacements = draft.replacements()
    if not replacements:
        raise EventLogInvalid("nothing would be measured otherwise: what is given is what ran")
    now, after, unknown = replay(draft.log), draft.values(), draft.unknown()
    touched = {replacement.pcr for replacement in replacements} | unknown.keys()
    if quoted is None:
        values = {pcr: value for pcr, value in after.items() if pcr in PREDICTED_PCRS}
        start = now
    else:
        start = {pcr: value for pcr, value in quoted.items() if pcr in PREDICTED_PCRS}
        values = dict(start)
        for explained in explain_values(draft.log, start):
            if explained.pcr in touched and explained.is_explained:
                values[explained.pcr] = with_phases(after[explained.pcr], explained.phases)
            elif explained.pcr in touched:
                unknown[explained.pcr] = "the log does not lead to the value that the TPM quoted"
    told = {pcr: value for pcr, value in sorted(values.items()) if pcr not in unknown}
    changed = tuple(pcr for pcr, value in told.items() if start.get(pcr) != value)
    return Prediction(told, changed, dict(sorted(unknown.items())), replacements)
