"""attestation.policy: digests against the TPM specification's formulas, written out again, and a real TPM's."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.policy import (
    CC_UNSEAL,
    ZERO_DIGEST,
    approved_policy,
    pcr_selection,
    policy_authorize,
    policy_command_code,
    policy_nv,
    policy_pcr,
    policy_ref,
    sealed_object_policy,
)
from oci_hook.attestation.structures import ecdsa_signing_public
from oci_hook.lease import Lease
from tests.attestation_vectors import public_of, t
from tests.software_tpm import SoftwareTpm

VALUES = {4: b"\x44" * 32, 8: b"\x88" * 32, 9: b"\x99" * 32}
BOOT_POLICY_KEY = ecdsa_signing_public(ec.derive_private_key(1, ec.SECP256R1()).public_key())
KEY_NAME = public_of(BOOT_POLICY_KEY).name
NV_NAME = t.nv_name(t.nv_public(0x01800123))
REFERENCE = hashlib.sha256(b"scz-smm/boot-policy/v1\0resnet\0default").digest()


def sha256(*parts: bytes | str) -> bytes:
    return hashlib.sha256(b"".join(bytes.fromhex(part) if isinstance(part, str) else part for part in parts)).digest()


# Part 3, 23.7, 23.11, 23.16, 23.9, with the numbers of Part 2, 6.5.2 and 6.17.
PCR_STEP = sha256(
    bytes(32), "0000017f", "00000001", "000b", "03", "100300", sha256(b"\x44" * 32, b"\x88" * 32, b"\x99" * 32)
)
APPROVED = sha256(PCR_STEP, "0000016c", "0000015e")
AUTHORIZED = sha256(sha256(bytes(32), "0000016a", KEY_NAME), REFERENCE)
SEALED = sha256(AUTHORIZED, "00000149", sha256("000000000000002a", "0000", "0009"), NV_NAME)


def test_formulas() -> None:
    assert policy_pcr(ZERO_DIGEST, VALUES) == PCR_STEP
    assert policy_command_code(PCR_STEP, CC_UNSEAL) == APPROVED
    assert approved_policy(VALUES) == APPROVED
    assert approved_policy(dict(reversed(VALUES.items()))) == APPROVED
    assert policy_ref("resnet", "default") == REFERENCE
    assert policy_authorize(KEY_NAME, REFERENCE) == AUTHORIZED
    assert policy_nv(AUTHORIZED, NV_NAME, 42) == SEALED
    assert sealed_object_policy(KEY_NAME, REFERENCE, NV_NAME, 42) == SEALED
    assert policy_ref("resnet", "default", 0) == REFERENCE
    assert policy_ref("resnet", "default", 12) == sha256(b"scz-smm/boot-policy/v1\0resnet\0default\x0012")


def test_formulas_of_a_lease() -> None:
    """Part 3, 23.10, with the number of Part 2, 6.5.2: operand, offset, operation."""
    boots = sha256(SEALED, "0000016d", sha256("00000007", "0010", "0009"))
    both = sha256(boots, "0000016d", sha256("0000000000000e10", "0008", "0009"))
    time = sha256(SEALED, "0000016d", sha256("0000000000000e10", "0008", "0009"))
    for lease, expected in ((Lease(7), boots), (Lease(7, 3600), both), (Lease(clock_ms=3600), time), (None, SEALED)):
        assert sealed_object_policy(KEY_NAME, REFERENCE, NV_NAME, 42, lease) == expected


@pytest.mark.parametrize(
    ("pcrs", "bits"), [((), "000000"), ((0,), "010000"), ((7, 8), "800100"), ((23,), "000080"), (range(24), "ffffff")]
)
def test_selection(pcrs, bits: str) -> None:
    assert pcr_selection(pcrs).hex() == f"00000001000b03{bits}"


@pytest.mark.parametrize("pcr", [-1, 24, 1000])
def test_a_pcr_that_there_is_not_is_our_fault(pcr: int) -> None:
    with pytest.raises(ValueError):
        pcr_selection([4, pcr])


def test_policy_ref_borders_cannot_be_shifted() -> None:
    made = [policy_ref(*names) for names in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("c", "ab"))]
    assert len(set(made)) == len(made)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(range(6)), st.binary(min_size=32, max_size=32))
def test_every_part_counts(part: int, other: bytes) -> None:
    changed = [
        lambda: sealed_object_policy(KEY_NAME[:2] + other, REFERENCE, NV_NAME, 42),
        lambda: sealed_object_policy(KEY_NAME, other, NV_NAME, 42),
        lambda: sealed_object_policy(KEY_NAME, REFERENCE, NV_NAME[:2] + other, 42),
        lambda: sealed_object_policy(KEY_NAME, REFERENCE, NV_NAME, int.from_bytes(other[:7], "big") + 43),
        lambda: approved_policy({**VALUES, 9: other}),
        lambda: approved_policy({**VALUES, 7: other}),
    ][part]()
    assert changed not in (SEALED, APPROVED)


# --- the same by a TPM ------------------------------------------------------------------------------------------------


def test_a_real_trial_session_comes_to_the_same_digests(tmp_path: Path) -> None:
    """tpm2-tools against a software TPM: PolicyPCR and PolicyCommandCode, then PolicyAuthorize and PolicyNV."""
    with SoftwareTpm(tmp_path / "tpm") as tpm:
        tpm.measure_boot()

        def run(tool: str, *arguments: str) -> bytes:
            environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": tpm.tcti}
            done = subprocess.run(
                [f"/usr/bin/tpm2_{tool}", *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False
            )
            assert done.returncode == 0, (tool, done.stderr)
            return done.stdout

        run("pcrread", "sha256:4,8,9", "-o", "values")
        raw = (tmp_path / "values").read_bytes()
        values = {pcr: raw[32 * place : 32 * place + 32] for place, pcr in enumerate((4, 8, 9))}
        run("startauthsession", "-S", "session")
        run("policypcr", "-S", "session", "-l", "sha256:4,8,9", "-L", "pcr")
        run("policycommandcode", "-S", "session", "-L", "approved", "TPM2_CC_Unseal")
        run("flushcontext", "session")
        assert (tmp_path / "pcr").read_bytes() == policy_pcr(ZERO_DIGEST, values)
        assert (tmp_path / "approved").read_bytes() == approved_policy(values)

        index = "0x01800123"
        run("nvdefine", index, "-C", "o", "-s", "8", "-a", "nt=counter|authread|authwrite|ownerread|ownerwrite|no_da")
        run("nvincrement", index, "-C", "o")
        shown = run("nvreadpublic", index).decode()
        name = bytes.fromhex(shown.partition("name: ")[2].split()[0])
        assert name == NV_NAME
        (tmp_path / "key").write_bytes(KEY_NAME)
        (tmp_path / "operand").write_bytes((42).to_bytes(8, "big"))
        run("startauthsession", "-S", "session")
        run(
            "policyauthorize", "-S", "session", "-i", "approved", "-n", "key", "-q", REFERENCE.hex(), "-L", "authorized"
        )
        run("policynv", "-S", "session", "-C", "o", "-i", "operand", "-L", "sealed", index, "ule")
        # A trial session takes the steps of a lease as well, whatever the TPM has counted.
        run("policycountertimer", "-S", "session", "-L", "boots", "--ule", "resets=7")
        run("policycountertimer", "-S", "session", "-L", "leased", "--ule", "clock=3600")
        run("flushcontext", "session")
        assert (tmp_path / "leased").read_bytes() == sealed_object_policy(
            KEY_NAME, REFERENCE, NV_NAME, 42, Lease(7, 3600)
        )
        assert (tmp_path / "authorized").read_bytes() == AUTHORIZED
        assert (tmp_path / "sealed").read_bytes() == SEALED
