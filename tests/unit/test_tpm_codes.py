"""attestation.tpm_codes: every response code that a fault of a TPM gives has its error, exit code and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tpm2_pytss as tss

from oci_hook.attestation import tpm, tpm_codes
from oci_hook.attestation.tpm_codes import PcrChangedError, error_for
from oci_hook.errors import Revoked, SczError, TpmFailed
from oci_hook.key_errors import all_errors

#: Response code, exit code, a word of the message, a word of the remedy.
FAULTS = [
    (0x100, 60, "not started up", "tpm2_startup"),
    (0x101, 62, "failure mode", "tpm2_gettestresult"),
    (0x18B, 69, "has lost something", "sczctl enroll"),
    (0x98E, 62, "password", "tpm2_changeauth"),
    (0x9A2, 62, "password", "tpm2_changeauth"),
    (0x902, 62, "object slots are full", "tpm2_flushcontext"),
    (0x903, 62, "session slots are full", "tpm2_flushcontext"),
    (0x905, 62, "session handles are used up", "tpm2_flushcontext"),
    (0x910, 62, "was it reset", "start the container again"),
    (0x918, 62, "was it reset", "start the container again"),
    (0x91E, 62, "was it reset", "start the container again"),
    (0x920, 62, "rate of writes", "start the container again"),
    (0x921, 63, "0x921", "tpm2_dictionarylockout"),
    (0x922, 62, "too busy", "start the container again"),
    (0x923, 62, "cannot be written", "start the container again"),
    (0xB0902, 62, "object slots are full", "tpm2_flushcontext"),
    (0xB0001, 62, "0xb0001", "tpm2_rc_decode"),
    (0xC0902, 62, "object slots are full", "tpm2_flushcontext"),
    (0xC0921, 63, "0xc0921", "tpm2_dictionarylockout"),
    (0xA000A, 60, "way to the TPM is broken", "tpm.tcti"),
    (0x7001B, 62, "changed between the TPM and this host", "bus"),
    (0x143, 62, "0x143", "tpm2_rc_decode"),
    (0x70001, 62, "0x70001", "tpm2_rc_decode"),
]
REFUSALS = [getattr(tpm_codes, name) for name in ("IMPORT", "VERIFY_SIGNATURE", "POLICY_PCR", "POLICY_NV", "UNSEAL")]


@pytest.mark.parametrize(("code", "number", "message", "remedy"), FAULTS, ids=lambda value: str(value)[:12])
def test_a_fault_has_its_code_and_its_remedy(code: int, number: int, message: str, remedy: str) -> None:
    error = error_for(code, "do something")
    assert isinstance(error, SczError)
    assert error.code == number
    assert message in error.message
    assert f"{code:#x}" in error.message
    assert remedy in error.advice


@pytest.mark.parametrize("code", [code for code, _, message, _ in FAULTS if code not in (0x98E, 0x9A2)])
@pytest.mark.parametrize("refusals", REFUSALS, ids=range(len(REFUSALS)))
def test_a_fault_is_no_refusal_at_any_step(code: int, refusals: tpm_codes.Refusals) -> None:
    """Nobody is told that a grant is bad because a TPM is."""
    error = error_for(code, "do something", refusals)
    assert isinstance(error, SczError)
    assert error.family == "could-not-tell"


@pytest.mark.parametrize("code", [0x128, 0xC0128])
def test_pcrs_that_changed_are_for_the_caller(code: int) -> None:
    assert isinstance(error_for(code, "do something"), PcrChangedError)


class Failing:
    """An ESAPI context whose every question has this answer."""

    def __init__(self, code: int) -> None:
        self.code = code

    def get_capability(self, *_: object) -> None:
        raise tss.TSS2_Exception(self.code)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("code", [0x128, 0x8B, 0x921, 0x101])
def test_what_fails_at_the_end_does_not_hide_what_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tpm.tss, "ESAPI", lambda _tcti: Failing(code))
    monkeypatch.setattr(tpm.Tpm, "flush_left_overs", first_only(tpm.Tpm.flush_left_overs))
    with pytest.raises(Revoked, match="passed"), tpm.open_tpm("swtpm:path=x", tmp_path / "lock", timeout_seconds=1):
        raise Revoked("the counter has passed")


def first_only(flush: Callable[[tpm.Tpm], None]) -> Callable[[tpm.Tpm], None]:
    """As good as done the first time: what was left before is not what fails."""
    calls: list[tpm.Tpm] = []

    def flush_later(self: tpm.Tpm) -> None:
        calls.append(self)
        if len(calls) > 1:
            flush(self)

    return flush_later


def test_pcrs_that_changed_where_nobody_asked_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpm.tss, "ESAPI", lambda _tcti: Failing(0x128))
    with (
        pytest.raises(TpmFailed, match="PCRs changed"),
        tpm.open_tpm("swtpm:path=x", tmp_path / "lock", timeout_seconds=1),
    ):
        raise AssertionError("a TPM that answers so is not used")


def test_every_code_gives_an_error_of_ours() -> None:
    known = set(all_errors().values())
    for layer in range(16):
        for low in range(0x1000):
            for refusals in (None, *REFUSALS):
                error = error_for(layer << 16 | low, "do something", refusals)
                assert isinstance(error, PcrChangedError) or type(error) in known
