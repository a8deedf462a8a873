"""What a TPM signs: quotes and certifications, and the check of their signature.

Bytes in, frozen values out. `verify_attest` makes the four checks that every one of them needs; what a quote or a
certification then has to say is for `evidence` and `enrolment`. Types that it does not know are refused.
Specification: TPM 2.0 Library, Part 2, 10.12 (attestation structures) and 11.3 (signatures).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from oci_hook.attestation.structures import ALG_ECDSA, ALG_SHA256, CURVE_P256, Public, Reader
from oci_hook.errors import SczError

Kind = Literal["quote", "certify", "nv"]

# Part 2, 6.2 (TPM_GENERATED) and 6.9 (TPM_ST)
_GENERATED: Final = 0xFF544347
_KINDS: Final[Mapping[int, Kind]] = {0x8018: "quote", 0x8017: "certify", 0x8014: "nv"}
_NAME_LIMIT_BYTES: Final = 66
_BANKS_LIMIT: Final = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPMS_QUOTE_INFO: (hash algorithm, PCR numbers) of each selection, and the digest over their values."""

    selections: tuple[tuple[int, tuple[int, ...]], ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Attest:
    """A TPMS_ATTEST; of the last five, only what belongs to `kind` is set."""

    kind: Kind
    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    quote: Quote | None
    certified_name: bytes | None
    nv_index_name: bytes | None
    nv_offset: int | None
    nv_contents: bytes | None


def parse_attest(data: bytes, *, error: type[SczError]) -> Attest:
    """Parse a TPMS_ATTEST: a quote, the certification of an object, or that of an NV index.

    Args:
        data: Without the size of a TPM2B_ATTEST, nothing after it.
        error: What to raise.

    Raises:
        SczError: The class `error`: not made by a TPM (magic), another type, malformed.
    """
    reader = Reader(data, what="the attestation structure", error=error)
    if reader.number(4) != _GENERATED:
        raise reader.fail("is not marked as made by a TPM (magic)")
    type_number = reader.number(2)
    kind = _KINDS.get(type_number)
    if kind is None:
        raise reader.fail(f"has the type {type_number:#06x}, neither a quote nor a certification")
    qualified_signer, extra_data = reader.sized(_NAME_LIMIT_BYTES), reader.sized(64)
    clock, reset_count, restart_count, safe = (reader.number(size) for size in (8, 4, 4, 1))
    if safe > 1:
        raise reader.fail("has a clock that is neither safe nor unsafe")
    reader.take(8)  # firmwareVersion
    quote = _quote(reader) if kind == "quote" else None
    # TPMS_CERTIFY_INFO is the Name and the Qualified Name; TPMS_NV_CERTIFY_INFO Name, offset and contents.
    name = reader.sized(_NAME_LIMIT_BYTES) if kind != "quote" else None
    if kind == "certify":
        reader.sized(_NAME_LIMIT_BYTES)
    nv_offset, nv_contents = (reader.number(2), reader.sized(2048)) if kind == "nv" else (None, None)
    reader.finish()
    return Attest(
        kind=kind,
        qualified_signer=qualified_signer,
        extra_data=extra_data,
        clock=clock,
        reset_count=reset_count,
        restart_count=restart_count,
        safe=safe == 1,
        quote=quote,
        certified_name=name if kind == "certify" else None,
        nv_index_name=name if kind == "nv" else None,
        nv_offset=nv_offset,
        nv_contents=nv_contents,
    )


def _quote(reader: Reader) -> Quote:
    count = reader.number(4)
    if count > _BANKS_LIMIT:
        raise reader.fail(f"selects from {count} PCR banks")
    selections = []
    for _ in range(count):
        algorithm, size = reader.number(2), reader.number(1)
        bits = int.from_bytes(reader.take(size), "little")
        selections.append((algorithm, tuple(pcr for pcr in range(8 * size) if bits >> pcr & 1)))
    return Quote(tuple(selections), reader.sized(64))


def pcr_digest(pcrs: Mapping[int, bytes]) -> bytes:
    """The digest that a quote carries for these values: SHA-256 over them, in the order of their numbers."""
    return hashlib.sha256(b"".join(pcrs[pcr] for pcr in sorted(pcrs))).digest()


def verify_attest(
    attest: bytes, signature: bytes, *, kind: Kind, ak: Public, extra_data: bytes, error: type[SczError]
) -> Attest:
    """Verify that the enrolled AK signed this, as an answer to this question.

    Args:
        attest: TPMS_ATTEST.
        signature: TPMT_SIGNATURE.
        kind: What was asked for.
        ak: The enrolled attestation key, a primary of the endorsement hierarchy.
        extra_data: The qualifying data that was sent.
        error: What to raise.

    Returns:
        What was signed; of `quote`, `certified_name` and `nv_…`, what belongs to `kind` is set.

    Raises:
        SczError: The class `error`: one of the four checks failed.
    """
    # 1. Magic and type: a TPM made it, as what was asked for.
    parsed = parse_attest(attest, error=error)
    if parsed.kind != kind:
        raise error(f"the attestation structure is of the kind {parsed.kind}, not {kind}")
    # 2. The enrolled attestation key signed it.
    verify_attest_signature(attest, signature, ak, error=error)
    # 3. It was made for this question, not replayed.
    if not hmac.compare_digest(parsed.extra_data, extra_data):
        raise error(f"the {kind} was made for another occasion (extraData)")
    # 4. The signer is that primary of the endorsement hierarchy, not the same key elsewhere.
    if parsed.qualified_signer != ak.qualified_name_in_endorsement:
        raise error(f"the {kind} names another key as its signer (qualifiedSigner)")
    return parsed


def verify_attest_signature(attest: bytes, signature: bytes, ak: Public, *, error: type[SczError]) -> None:
    """Verify a TPMT_SIGNATURE over a TPMS_ATTEST: ECDSA on P-256 with SHA-256, nothing else.

    Args:
        attest: The bytes that were signed.
        signature: TPMT_SIGNATURE.
        ak: The attestation key's public area, which the caller trusts.
        error: What to raise.

    Raises:
        SczError: The class `error`: another algorithm, malformed, or not that key's signature.
    """
    reader = Reader(signature, what="the attestation's signature", error=error)
    if (reader.number(2), reader.number(2)) != (ALG_ECDSA, ALG_SHA256):
        raise reader.fail("is not ECDSA with SHA-256")
    r, s = (int.from_bytes(reader.sized(32), "big") for _ in range(2))
    reader.finish()
    key = ak.public_key
    if not isinstance(key, ec.EllipticCurvePublicKey) or ak.curve != CURVE_P256:
        raise reader.fail("cannot be checked: the attestation key is not on P-256")
    try:
        key.verify(encode_dss_signature(r, s), attest, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as cause:
        raise reader.fail("is not by the enrolled attestation key") from cause
