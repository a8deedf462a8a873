"""Whether a boot state, measured or predicted, would be let open what a boot policy guards.

Pure. It compares values and enforces nothing: at a start the TPM does. Use it before a reboot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oci_hook.attestation.appraisal import differing_pcrs, missing_signature, nearest_form, pcrs_in_words
from oci_hook.attestation.boot_policy import BootForm


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model on one device in that state.

    Attributes:
        model: Name and version.
        device: The device's name; empty: this host.
        differing: PCRs that are not as in the nearest approved form; empty: the model opens.
        untold: Those of them of which the state does not tell a value.
        unsigned: Why the PCRs of them that another key approves are not, in words; empty: they are, or there are none.
        problem: Why it cannot open in any state, such as a missing boot policy; empty: it can.
    """

    model: str
    device: str
    differing: tuple[int, ...] = ()
    untold: tuple[int, ...] = ()
    unsigned: str = ""
    problem: str = ""

    @property
    def opens(self) -> bool:
        """Whether a start in that state would find it approved."""
        return not self.differing and not self.problem

    @property
    def words(self) -> str:
        """For people."""
        if self.opens:
            return "opens"
        if self.problem:
            return f"LOCKED: {self.problem}"
        known = tuple(pcr for pcr in self.differing if pcr not in self.untold)
        parts = [f"not approved: {pcrs_in_words(known)}"] if known else []
        parts += [f"cannot be told: {pcrs_in_words(self.untold)}"] if self.untold else []
        parts += [self.unsigned] if self.unsigned else []
        return "LOCKED: " + "; ".join(parts)


def outcome_of(model: str, device: str, forms: Sequence[BootForm], values: Mapping[int, bytes]) -> Outcome:
    """Compare a state with the forms of a verified boot policy.

    Args:
        model: Name and version, for the outcome.
        device: The device, for the outcome.
        forms: At least one; those with signed PCRs know the signatures that are at hand.
        values: PCRs of the SHA-256 bank; one that is absent cannot be told.
    """
    form = nearest_form(forms, values)
    differing = differing_pcrs(form, values)
    untold = tuple(pcr for pcr in differing if pcr not in values)
    return Outcome(model, device, differing, untold, missing_signature(form, differing))
