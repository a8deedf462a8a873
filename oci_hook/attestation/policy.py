"""The digests of TPM policies, computed without a TPM.

What the owner signs and seals to, and what a reader recomputes before it believes a boot policy. SHA-256 throughout.
It enforces nothing: the TPM does, when it walks the same steps. Specification: TPM 2.0 Library, Part 3, chapter 23;
docs/specification.md, "TPM policy".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.structures import ALG_SHA256
from oci_hook.lease import Lease

ZERO_DIGEST: Final = bytes(32)
PCR_COUNT: Final = 24

# Part 2, 6.5.2 (TPM_CC) and 6.17 (TPM_EO)
CC_UNSEAL: Final = 0x0000015E
_CC_POLICY_NV: Final = 0x00000149
_CC_POLICY_AUTHORIZE: Final = 0x0000016A
_CC_POLICY_COMMAND_CODE: Final = 0x0000016C
_CC_POLICY_COUNTER_TIMER: Final = 0x0000016D
_CC_POLICY_PCR: Final = 0x0000017F
_EO_UNSIGNED_LE: Final = 0x0009

# Where a value lies in TPMS_TIME_INFO (Part 2, 10.11.3: time, then TPMS_CLOCK_INFO), and its bytes.
CLOCK_PLACE: Final = (8, 8)
RESETS_PLACE: Final = (16, 4)


def _step(digest: bytes, command_code: int, *parts: bytes) -> bytes:
    return hashlib.sha256(digest + command_code.to_bytes(4, "big") + b"".join(parts)).digest()


def pcr_selection(pcrs: Iterable[int]) -> bytes:
    """A TPML_PCR_SELECTION of the SHA-256 bank with a three-byte map, as every PC client TPM returns it.

    Args:
        pcrs: Numbers from 0 to 23.

    Raises:
        ValueError: Another number; a mistake of the caller's.
    """
    bits = 0
    for pcr in pcrs:
        if not 0 <= pcr < PCR_COUNT:
            raise ValueError(f"there is no PCR {pcr}")
        bits |= 1 << pcr
    return (1).to_bytes(4, "big") + ALG_SHA256.to_bytes(2, "big") + b"\x03" + bits.to_bytes(3, "little")


def policy_pcr(digest: bytes, values: Mapping[int, bytes]) -> bytes:
    """The policy digest after PolicyPCR (Part 3, 23.7) with these values of the SHA-256 bank."""
    return _step(digest, _CC_POLICY_PCR, pcr_selection(values), pcr_digest(values))


def policy_command_code(digest: bytes, command_code: int) -> bytes:
    """The policy digest after PolicyCommandCode (Part 3, 23.11)."""
    return _step(digest, _CC_POLICY_COMMAND_CODE, command_code.to_bytes(4, "big"))


def policy_authorize(key_name: bytes, policy_ref: bytes) -> bytes:
    """The policy digest after PolicyAuthorize (Part 3, 23.16), which begins anew: nothing before it counts.

    Args:
        key_name: The signing key's Name, 34 bytes.
        policy_ref: What the key signs together with a policy, 32 bytes.
    """
    return hashlib.sha256(_step(ZERO_DIGEST, _CC_POLICY_AUTHORIZE, key_name) + policy_ref).digest()


def policy_nv(digest: bytes, nv_name: bytes, maximum: int) -> bytes:
    """The policy digest after PolicyNV (Part 3, 23.9): the counter, eight bytes at offset 0, is at most `maximum`."""
    operand = maximum.to_bytes(8, "big") + (0).to_bytes(2, "big") + _EO_UNSIGNED_LE.to_bytes(2, "big")
    return _step(digest, _CC_POLICY_NV, hashlib.sha256(operand).digest(), nv_name)


def policy_counter_timer(digest: bytes, place: tuple[int, int], maximum: int) -> bytes:
    """The policy digest after PolicyCounterTimer (Part 3, 23.10): the value at `place` is at most `maximum`.

    Args:
        digest: The policy digest before.
        place: Offset and size in bytes: `CLOCK_PLACE` or `RESETS_PLACE`.
        maximum: What fits into that size.
    """
    offset, size = place
    operand = maximum.to_bytes(size, "big") + offset.to_bytes(2, "big") + _EO_UNSIGNED_LE.to_bytes(2, "big")
    return _step(digest, _CC_POLICY_COUNTER_TIMER, hashlib.sha256(operand).digest())


def lease_steps(lease: Lease | None) -> tuple[tuple[tuple[int, int], int], ...]:
    """A lease's steps of PolicyCounterTimer in their order, each as place and maximum: boots, then time."""
    if lease is None:
        return ()
    bounds = ((RESETS_PLACE, lease.resets), (CLOCK_PLACE, lease.clock_ms))
    return tuple((place, maximum) for place, maximum in bounds if maximum is not None)


def policy_ref(model_name: str, device_class: str, epoch: int = 0) -> bytes:
    """What ties a signed policy to one model line, one device class and one epoch; 32 bytes.

    Args:
        model_name: The model line.
        device_class: The device class.
        epoch: How often the owner withdrew all boot states that were signed before; 0: never.
    """
    parts = [b"scz-smm/boot-policy/v1", model_name.encode(), device_class.encode()]
    if epoch:
        parts.append(str(epoch).encode())
    return hashlib.sha256(b"\x00".join(parts)).digest()


def approved_policy(values: Mapping[int, bytes]) -> bytes:
    """The policy of one boot state, which the owner signs: these PCRs, and for unsealing only."""
    return policy_command_code(policy_pcr(ZERO_DIGEST, values), CC_UNSEAL)


def nested_policy(signer_name: bytes, fixed: Mapping[int, bytes]) -> bytes:
    """The policy of a boot state of which another key approves a part, and these PCRs are the rest; for unsealing only.

    Args:
        signer_name: Name of that key as a TPM object, 34 bytes; it signs policies without a policyRef, as systemd does.
        fixed: Values of the SHA-256 bank that are compared as they are.
    """
    return policy_command_code(policy_pcr(policy_authorize(signer_name, b""), fixed), CC_UNSEAL)


def sealed_object_policy(
    boot_policy_key_name: bytes, reference: bytes, nv_name: bytes, maximum: int, lease: Lease | None = None
) -> bytes:
    """The policy of a sealed object: a state that the owner signed, a counter that has not passed `maximum`, a lease.

    Args:
        boot_policy_key_name: Name of the owner's boot-policy key as a TPM object, 34 bytes.
        reference: `policy_ref` of the model line and the device class, 32 bytes.
        nv_name: Name of that owner's counter on that device, written, 34 bytes.
        maximum: The highest value of the counter at which the object opens.
        lease: The last boot and the last moment at which it opens, if there is one.
    """
    digest = policy_nv(policy_authorize(boot_policy_key_name, reference), nv_name, maximum)
    for place, bound in lease_steps(lease):
        digest = policy_counter_timer(digest, place, bound)
    return digest
