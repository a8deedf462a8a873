"""TPM and TSS response codes, turned into this project's errors.

Pure: a number in, an error out. What a code means depends on the step that got it: the caller names the step and, where
a refusal is possible, the class of it. Specification: TPM 2.0 Library, Part 2, 6.6 (TPM_RC); TCG TSS 2.0 Overview, 3.5
(layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from oci_hook.errors import (
    BootPolicyRefused,
    BootStateRefused,
    DeviceNotEnrolled,
    EnrolmentRefused,
    KeyRefused,
    Revoked,
    SczError,
    TpmFailed,
    TpmLockout,
    TpmUnavailable,
)
from oci_hook.key_errors import LeaseExpired

# Format 1 (bits 0 to 5 and 7 name the error, the others the parameter, handle or session).
RC_VALUE: Final = 0x084
RC_HANDLE: Final = 0x08B
RC_AUTH_FAIL: Final = 0x08E
RC_POLICY_FAIL: Final = 0x09D
RC_BAD_AUTH: Final = 0x0A2
# Format 0
RC_INITIALIZE: Final = 0x100
RC_FAILURE: Final = 0x101
RC_POLICY: Final = 0x126
RC_PCR_CHANGED: Final = 0x128
RC_NV_UNINITIALIZED: Final = 0x14A
_WARNINGS: Final = {
    0x902: "its object slots are full",
    0x903: "its session slots are full",
    0x904: "it is out of memory",
    0x905: "its session handles are used up",
    0x920: "it limits the rate of writes to its memory",
    0x922: "it was too busy",
}
_LOCKOUT: Final = 0x921
_AUTHORISATION_REMEDY: Final = "take the password off the hierarchy or key: `tpm2_changeauth`"

_LAYER_TCTI: Final = 10
_RSP_AUTH_FAILED: Final = 0x7001B

Refusals = Mapping[int, type[SczError]]
ANY_PARAMETER: Final = -1  # any format 1 error: the TPM does not accept what it was given

# What a response code means at the steps at which a refusal is possible.
IMPORT: Final[Refusals] = {ANY_PARAMETER: KeyRefused}
VERIFY_SIGNATURE: Final[Refusals] = {ANY_PARAMETER: BootPolicyRefused}
POLICY_PCR: Final[Refusals] = {RC_VALUE: BootStateRefused}
POLICY_AUTHORIZE: Final[Refusals] = {ANY_PARAMETER: BootPolicyRefused}
POLICY_NV: Final[Refusals] = {RC_POLICY: Revoked, RC_NV_UNINITIALIZED: Revoked}
POLICY_COUNTER_TIMER: Final[Refusals] = {RC_POLICY: LeaseExpired}
UNSEAL: Final[Refusals] = {
    RC_POLICY_FAIL: KeyRefused,  # sealed to another key, policyRef, counter or maximum
    RC_AUTH_FAIL: KeyRefused,  # the session was salted to a key that this TPM does not hold
    RC_BAD_AUTH: KeyRefused,
}
# libtpms answers RC_FAILURE to what was encrypted to another RSA key; a TPM that has failed does not get to this step.
ACTIVATE: Final[Refusals] = {ANY_PARAMETER: EnrolmentRefused, RC_FAILURE: EnrolmentRefused}


class PcrChangedError(Exception):
    """A PCR was extended between PolicyPCR and a later command: the policy has to be walked again. Never leaves."""


def base_code(code: int) -> int:
    """A TPM's code without the number of the parameter, handle or session that it is about."""
    return code & 0x0BF if code & 0x080 else code


def is_layer_tpm(code: int) -> bool:
    """Whether the TPM itself answered, not a layer of software before it."""
    return code >> 16 == 0


def error_for(code: int, step: str, refusals: Refusals | None = None) -> SczError | PcrChangedError:
    """The error to raise for a response code.

    Args:
        code: TSS2_RC.
        step: What was being done, for the message.
        refusals: What certain base codes mean at this step.

    Returns:
        The error, not raised.
    """
    if code == RC_PCR_CHANGED:
        return PcrChangedError(step)
    shown = f"{step} (response code {code:#x})"
    if code >> 16 == _LAYER_TCTI:
        return TpmUnavailable(f"the way to the TPM is broken: {shown}")
    if code == _RSP_AUTH_FAILED:
        return TpmFailed(
            f"a response was changed between the TPM and this host: {shown}",
            remedy="suspect the TPM's bus; enrol again if the TPM was cleared or replaced",
        )
    if not is_layer_tpm(code):
        return TpmFailed(shown)
    return _tpm_error(code, shown, refusals or {})


def _tpm_error(code: int, shown: str, refusals: Refusals) -> SczError:
    base = base_code(code)
    known: dict[int, SczError] = {
        _LOCKOUT: TpmLockout(shown),
        RC_INITIALIZE: TpmUnavailable(f"the TPM was not started up: {shown}"),
        RC_HANDLE: DeviceNotEnrolled(f"the TPM has lost something that this host was enrolled with: {shown}"),
        RC_AUTH_FAIL: TpmFailed(f"the TPM wants a password: {shown}", remedy=_AUTHORISATION_REMEDY),
        RC_BAD_AUTH: TpmFailed(f"the TPM wants a password: {shown}", remedy=_AUTHORISATION_REMEDY),
    }
    known.update({number: TpmFailed(f"the TPM refuses for now, {why}: {shown}") for number, why in _WARNINGS.items()})
    if base in refusals:
        return refusals[base](shown)
    if base not in known and code & 0x080 and ANY_PARAMETER in refusals:
        return refusals[ANY_PARAMETER](shown)
    return known.get(base) or TpmFailed(shown)
