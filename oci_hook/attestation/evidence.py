"""Evidence: a TPM's quote with the PCR values read beside it, and the value that ties it to one container's start.

Pure. It tells whether a quote is genuine, fresh and of the PCRs that were asked for; whether the values are good is for
`appraisal`. Specification: docs/specification.md, "Evidence at a container's start", checks 1 to 6; RFC 9334.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.attest import pcr_digest, verify_attest
from oci_hook.attestation.structures import ALG_SHA256, Public
from oci_hook.errors import SczError

_LABEL: Final = b"scz-smm/evidence/v1"
_TEE_LABEL: Final = b"scz-smm/evidence/v1 tee\0"


@dataclass(frozen=True, slots=True)
class TeeReport:
    """A report of a trusted execution environment: the name of its format, its bytes, the host's certificates."""

    provider: str
    report: bytes
    certificates: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """A quote: TPMS_ATTEST, TPMT_SIGNATURE, and the PCR values (SHA-256 bank) that were read beside it.

    `tee` is a report over the same data and that quote, where the machine is a guest that can ask for one.
    `counter` is the owner's counter as the bus delivered it in the same transaction, if it was asked for and there is
    one; no signature covers it: the TPM enforces the grant's maximum itself.
    """

    attest: bytes
    signature: bytes
    pcrs: Mapping[int, bytes]
    tee: TeeReport | None = None
    counter: int | None = None

    @property
    def quote_digest(self) -> bytes:
        """SHA-256 over what the TPM signed and its signature; 32 bytes."""
        return hashlib.sha256(len(self.attest).to_bytes(4, "big") + self.attest + self.signature).digest()

    @property
    def digest(self) -> bytes:
        """SHA-256 over all that was signed, 32 bytes, for the audit log: without a TEE the quote's."""
        if self.tee is None:
            return self.quote_digest
        parts = (self.tee.provider.encode(), self.tee.report, self.tee.certificates)
        framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hashlib.sha256(_TEE_LABEL + self.quote_digest + framed).digest()


def tee_report_data(extra_data: bytes, quote_digest: bytes) -> bytes:
    """What a TEE's report must carry to be evidence for one start: the quote's own data, then that quote.

    Args:
        extra_data: `qualifying_data` of the start, 32 bytes.
        quote_digest: Of the quote that was made for it, 32 bytes.

    Returns:
        64 bytes: the whole of REPORT_DATA.

    Raises:
        ValueError: A part of another length; a mistake of the caller's.
    """
    if not len(extra_data) == len(quote_digest) == 32:
        raise ValueError("the quote's data and its digest are 32 bytes each")
    return extra_data + quote_digest


def qualifying_data(
    nonce: bytes, token_hash: bytes, container_id: str, manifest_digest: str, audit_head: bytes
) -> bytes:
    """The value that a quote must carry as extraData to be evidence for one start and no other.

    Args:
        nonce: Fresh and random, 32 bytes.
        token_hash: SHA-256 of the identity token's bytes, 32 bytes.
        container_id: The container's id.
        manifest_digest: With its `sha256:` prefix.
        audit_head: SHA-256 of the audit log's last line, 32 bytes.

    Returns:
        32 bytes.

    Raises:
        ValueError: A part of another length: the parts could be shifted against each other. A mistake of the caller's.
    """
    if not len(nonce) == len(token_hash) == len(audit_head) == 32:
        raise ValueError("nonce, token hash and audit head are 32 bytes each")
    hashed = (hashlib.sha256(text.encode()).digest() for text in (container_id, manifest_digest))
    return hashlib.sha256(_LABEL + nonce + token_hash + b"".join(hashed) + audit_head).digest()


def verify_quote(
    evidence: Evidence,
    *,
    ak: Public,
    extra_data: bytes,
    selections: Collection[frozenset[int]],
    error: type[SczError],
) -> None:
    """Verify that a TPM quoted exactly these PCR values, for this occasion.

    Args:
        evidence: The quote and the values.
        ak: The enrolled attestation key.
        extra_data: The qualifying data that was sent, 32 bytes.
        selections: The sets of PCRs that are acceptable.
        error: What to raise.

    Raises:
        SczError: The class `error`: one of the six checks failed.
    """
    # 1 to 4. Magic and type, signature, extraData, qualifiedSigner: numbered there.
    attest = verify_attest(evidence.attest, evidence.signature, kind="quote", ak=ak, extra_data=extra_data, error=error)
    # 5. One selection, of the SHA-256 bank, of PCRs that were asked for; the values at hand are of these PCRs.
    quoted = attest.quote.selections if attest.quote is not None else ()
    if len(quoted) != 1 or quoted[0][0] != ALG_SHA256:
        raise error("the quote does not select from the SHA-256 bank alone")
    if frozenset(quoted[0][1]) not in selections:
        raise error("the quote selects other PCRs than were asked for")
    if evidence.pcrs.keys() != set(quoted[0][1]):
        raise error("the PCR values at hand are of other PCRs than the quote selects")
    # 6. The values are those that the TPM quoted.
    if attest.quote is None or not hmac.compare_digest(attest.quote.digest, pcr_digest(evidence.pcrs)):
        raise error("the PCR values at hand are not those that the TPM quoted (digest)")
