"""ESAPI, as the modules that speak with a TPM use it: what is common to all of their commands.

Each command's response code becomes an error of ours (`tpm_codes`); what comes back is bytes or our own frozen values.
Only this module, `tpm` and `tpm_enrolment` import `tpm2_pytss`. Specification: TPM 2.0 Library, Part 3; TCG TSS 2.0
ESAPI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

os.environ["TSS2_LOG"] = "all+none"  # tpm2-tss writes to stderr otherwise; it reads this when it is loaded

import tpm2_pytss as tss

from oci_hook.attestation import tpm_codes
from oci_hook.attestation.policy import pcr_selection
from oci_hook.attestation.structures import Handle, Public, parse_public
from oci_hook.attestation.tpm_codes import Refusals, error_for
from oci_hook.errors import DeviceInvalid, KeyRefused

NONE: Final = tss.ESYS_TR.NONE


@contextmanager
def step(step: str, refusals: Refusals | None = None) -> Iterator[None]:
    """Turn a response code inside the block into an error of ours; `refusals` says what codes mean at this step."""
    try:
        yield
    except tss.TSS2_Exception as cause:
        raise error_for(int(cause.rc), step, refusals) from cause


def unmarshal(kind: Any, data: bytes, what: str, error: type[KeyRefused | DeviceInvalid]) -> Any:
    try:
        value, _ = kind.unmarshal(data)
        if bytes(value.marshal()) == data:
            return value
    except tss.TSS2_Exception as cause:
        raise error(f"{what} is malformed") from cause
    raise error(f"{what} has bytes after its end, or a wrong size")  # tpm2-tss overlooks both


def selection(pcrs: Sequence[int] | Mapping[int, bytes]) -> Any:
    return tss.TPML_PCR_SELECTION.unmarshal(pcr_selection(pcrs))[0]


def parsed(public: Any) -> Public:
    return parse_public(bytes(public.marshal()), what="the TPM's public area", error=DeviceInvalid)


class Esapi:
    """An ESAPI context, and the commands that every flow needs."""

    def __init__(self, esys: Any) -> None:
        self._esys = esys
        self.left_something = False  # a flush failed

    def _flush_later(self, handles: ExitStack, handle: Handle) -> Handle:
        handles.callback(self._flush, handle)
        return handle

    def _flush(self, handle: Handle) -> None:
        try:
            self._esys.flush_context(handle)
        except tss.TSS2_Exception:  # after a broken response nothing works here; open_tpm sweeps later
            self.left_something = True

    def _find(self, handle: int) -> Handle | None:
        try:
            return Handle(self._esys.tr_from_tpmpublic(handle))
        except tss.TSS2_Exception as cause:
            if tpm_codes.base_code(int(cause.rc)) == tpm_codes.RC_HANDLE:
                return None
            raise error_for(int(cause.rc), f"look at {handle:#x}") from cause

    def _name(self, handle: Handle) -> bytes:
        with step("compute a Name"):
            return bytes(self._esys.tr_get_name(handle))

    def _read_properties(self, first: int, count: int) -> dict[int, int]:
        with step("read the TPM's properties"):
            _, found = self._esys.get_capability(tss.TPM2_CAP.TPM_PROPERTIES, first, count)
        return {int(each.property): int(each.value) for each in found.data.tpmProperties}

    def _session(self, salt_key: Handle, symmetric: Any, handles: ExitStack) -> Handle:
        with step("begin a session"):
            session = self._esys.start_auth_session(salt_key, NONE, tss.TPM2_SE.POLICY, symmetric, tss.TPM2_ALG.SHA256)
        return self._flush_later(handles, session)
