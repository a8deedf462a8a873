"""Which keys and counters of a device an owner accepts: checks 2 to 5 of the enrolment.

Pure. A genuine, restricted attestation key also certifies a storage key that was made in software and imported: grants
to that one open without a TPM. So every attribute counts, one by one. The host uses the same checks to tell whether
what it finds at a handle is what it needs. Specification: docs/specification.md, "Enrolment"; TPM 2.0 Library, Part 2,
8.3 and 13.4; TCG EK Credential Profile, B.3 and B.4.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from oci_hook.attestation.structures import (
    ALG_AES,
    ALG_CFB,
    ALG_ECDSA,
    ALG_SHA256,
    CURVE_P256,
    NV_TYPE_MASK,
    NvAttributes,
    NvPublic,
    ObjectAttributes,
    Public,
    tpm2b,
)
from oci_hook.errors import SczError

COUNTER_BASE: Final = 0x01800000
COUNTER_RANGE: Final = 16
COUNTER_BYTES: Final = 8
COUNTER_ATTRIBUTES: Final = (
    NvAttributes.COUNTER
    | NvAttributes.AUTH_READ
    | NvAttributes.AUTH_WRITE
    | NvAttributes.OWNER_READ
    | NvAttributes.OWNER_WRITE
    | NvAttributes.NO_DA
)

_BORN_IN_TPM: Final = (
    (ObjectAttributes.FIXED_TPM, "fixedTPM"),
    (ObjectAttributes.FIXED_PARENT, "fixedParent"),
    (ObjectAttributes.SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin"),
    (ObjectAttributes.RESTRICTED, "restricted"),
)
_DECRYPT: Final = (ObjectAttributes.DECRYPT, "decrypt")
_SIGN: Final = (ObjectAttributes.SIGN, "sign")


def counter_indices(owner_id: str) -> range:
    """The NV indices at which an owner's counter may lie: the first from the owner's id, then upward."""
    first = COUNTER_BASE + (int.from_bytes(hashlib.sha256(owner_id.encode()).digest()[:3], "big") >> 4)
    return range(first, first + COUNTER_RANGE)


def counter_public(index: int) -> bytes:
    """The TPM2B_NV_PUBLIC with which an enrolment defines a counter."""
    parts = ((index, 4), (ALG_SHA256, 2), (int(COUNTER_ATTRIBUTES), 4), (0, 2), (COUNTER_BYTES, 2))  # 0: no policy
    return tpm2b(b"".join(number.to_bytes(size, "big") for number, size in parts))


def _verify_attributes(
    public: Public,
    what: str,
    wanted: tuple[ObjectAttributes, str],
    unwanted: tuple[ObjectAttributes, str],
    error: type[SczError],
) -> None:
    for attribute, word in (*_BORN_IN_TPM, wanted):
        if not public.attributes & attribute:
            raise error(f"{what} is not {word}")
    if public.attributes & unwanted[0]:
        raise error(f"{what} may also {unwanted[1]}")


def _verify_name_algorithm(algorithm: int, what: str, error: type[SczError]) -> None:
    if algorithm != ALG_SHA256:
        raise error(f"{what}'s Name algorithm is not SHA-256")


def _verify_aes_cfb(public: Public, what: str, error: type[SczError]) -> None:
    if public.symmetric not in ((ALG_AES, 128, ALG_CFB), (ALG_AES, 256, ALG_CFB)):
        raise error(f"{what} does not protect with AES in CFB mode, 128 or 256 bits")


def verify_ek(ek: Public, certified: object, *, error: type[SczError]) -> None:
    """Check 2: the EK is of the default template's kind and is the certified key.

    Args:
        ek: The public area that the host claims.
        certified: The public key of its certificate.
        error: What to raise.

    Raises:
        SczError: The class `error`, with the attribute or part that is wrong.
    """
    _verify_attributes(ek, "the EK", _DECRYPT, _SIGN, error)
    _verify_aes_cfb(ek, "the EK", error)
    key = ek.public_key
    known = (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)
    if not isinstance(key, known) or not isinstance(certified, known) or key != certified:
        raise error("the EK's public area does not carry the key of its certificate")


def verify_ak(ak: Public, *, error: type[SczError]) -> None:
    """Check 3: the AK is a restricted ECDSA-SHA256 key on P-256 that was born in a TPM and never leaves it.

    Raises:
        SczError: The class `error`, with the attribute or part that is wrong.
    """
    _verify_attributes(ak, "the AK", _SIGN, _DECRYPT, error)
    if ak.kind != "ecc" or ak.curve != CURVE_P256:
        raise error("the AK is not on P-256")
    if ak.scheme != (ALG_ECDSA, ALG_SHA256):
        raise error("the AK's scheme is not ECDSA with SHA-256")
    _verify_name_algorithm(ak.name_alg, "the AK", error)


def verify_srk(srk: Public, *, error: type[SczError]) -> None:
    """Check 4: the SRK is a storage key that was born in a TPM and never leaves it.

    Raises:
        SczError: The class `error`, with the attribute or part that is wrong.
    """
    _verify_attributes(srk, "the SRK", _DECRYPT, _SIGN, error)
    _verify_aes_cfb(srk, "the SRK", error)
    _verify_name_algorithm(srk.name_alg, "the SRK", error)


def verify_counter(counter: NvPublic, owner_id: str, *, error: type[SczError]) -> None:
    """Check 5: the NV index is this owner's counter, written, and can be neither locked nor deleted by a policy.

    Args:
        counter: Its public area.
        owner_id: Whose counter it should be.
        error: What to raise.

    Raises:
        SczError: The class `error`, with the attribute or part that is wrong.
    """
    attributes = counter.attributes
    if attributes & NV_TYPE_MASK != NvAttributes.COUNTER:
        raise error("the NV index is not a counter: it could be rolled back")
    if not attributes & NvAttributes.NO_DA:
        raise error("the counter is not exempt from dictionary-attack lockout (NO_DA)")
    if not attributes & NvAttributes.WRITTEN:
        raise error("the counter was never written")
    if attributes & (NvAttributes.POLICY_DELETE | NvAttributes.PLATFORM_CREATE):
        raise error("the counter belongs to the platform or is deleted by a policy")
    if attributes != COUNTER_ATTRIBUTES | NvAttributes.WRITTEN or counter.auth_policy:
        raise error("the counter has other attributes than an enrolment gives it: its increment could be blocked")
    if counter.data_size != COUNTER_BYTES:
        raise error("the counter is not eight bytes long")
    _verify_name_algorithm(counter.name_alg, "the counter", error)
    if counter.index not in counter_indices(owner_id):
        raise error("the counter's index is not in this owner's range")
