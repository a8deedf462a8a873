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
_FLUSH: Final = (
    "another program fills the TPM: let it use /dev/tpmrm0; what was left: `tpm2_flushcontext -t`, `-l`, `-s`"
)
_AGAIN: Final = "start the container again in a minute"
_WARNINGS: Final = {
    0x901: ("a saved session is too old", _FLUSH),
    0x902: ("its object slots are full", _FLUSH),
    0x903: ("its session slots are full", _FLUSH),
    0x904: ("it is out of memory", _FLUSH),
    0x905: ("its session handles are used up", _FLUSH),
    0x906: ("its object handles are used up", _FLUSH),
    0x909: ("the command was cancelled", _AGAIN),
    0x90A: ("it tests itself", _AGAIN),
    0x920: ("it limits the rate of writes to its memory", _AGAIN),
    0x922: ("it was too busy", _AGAIN),
    0x923: ("its memory cannot be written now", _AGAIN),
}
_AUTHORISATION: Final = "the TPM wants a password", "take the password off the hierarchy or key: `tpm2_changeauth`"
_GONE: Final = "the TPM has lost what was loaded: was it reset?", _AGAIN
_STARTUP: Final = "`tpm2_startup -c`, or turn the machine off and on: firmware or kernel should have started it"
_FAILURE: Final = "turn the machine off and on; if it recurs the TPM is broken (`tpm2_gettestresult`)"
_FAULTS: Final[Mapping[int, tuple[type[SczError], str, str | None]]] = {
    RC_HANDLE: (DeviceNotEnrolled, "the TPM has lost something that this host was enrolled with", None),
    RC_AUTH_FAIL: (TpmFailed, *_AUTHORISATION),
    RC_BAD_AUTH: (TpmFailed, *_AUTHORISATION),
    RC_INITIALIZE: (TpmUnavailable, "the TPM was not started up", _STARTUP),
    RC_FAILURE: (TpmFailed, "the TPM is in failure mode", _FAILURE),
    0x921: (TpmLockout, "a protected object was asked for", None),
    # TPM_RC_REFERENCE_H0 to H6 and S0 to S6 (Part 2, 6.6.3)
    **dict.fromkeys((*range(0x910, 0x917), *range(0x918, 0x91F)), (TpmFailed, *_GONE)),
}

_LAYER_TCTI: Final = 10
_LAYERS_TPM: Final = (0, 11, 12)  # the TPM itself; the same codes by a resource manager in its stead
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
    """Whether the TPM itself answered, or a resource manager in its stead, not a layer of software before it."""
    return code >> 16 in _LAYERS_TPM


def error_for(code: int, step: str, refusals: Refusals | None = None) -> SczError | PcrChangedError:
    """The error to raise for a response code.

    Args:
        code: TSS2_RC.
        step: What was being done, for the message.
        refusals: What certain base codes mean at this step.

    Returns:
        The error, not raised.
    """
    if is_layer_tpm(code) and code & 0xFFFF == RC_PCR_CHANGED:
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
    return _tpm_error(code & 0xFFFF, shown, refusals or {})


def _tpm_error(code: int, shown: str, refusals: Refusals) -> SczError:
    base = base_code(code)
    if base in refusals:
        return refusals[base](shown)
    fault = _fault(base, shown)
    if fault is None and code & 0x080 and ANY_PARAMETER in refusals:
        return refusals[ANY_PARAMETER](shown)
    return fault or TpmFailed(shown)


def _fault(base: int, shown: str) -> SczError | None:
    """What a code means whatever the step; None: that is for the step to say."""
    if base in _WARNINGS:
        why, remedy = _WARNINGS[base]
        return TpmFailed(f"the TPM refuses for now, {why}: {shown}", remedy=remedy)
    if base in _FAULTS:
        error, why, usual = _FAULTS[base]
        return error(f"{why}: {shown}", remedy=usual)
    return None
