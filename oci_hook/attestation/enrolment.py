"""Enrolment: how a model's owner comes to trust a device's TPM, by four files that may travel on a USB stick.

    request (host) ─► checks 1 to 5 ─► challenge (owner) ─► answer (host) ─► checks 1 to 9 ─► device record (owner)

Pure: bytes, a clock's reading and a random secret in, documents out. The owner's side needs no TPM; MakeCredential is
passed in, as it lives in `tpm`. The challenge proves that the TPM with that EK holds the AK; the AK then vouches for
the SRK, the counter and the PCRs. That the EK is a TPM's, its certificate says or, if it has none, the owner's list.
Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from oci_hook.attestation.attest import parse_attest, verify_attest
from oci_hook.attestation.device_record import COUNTER_LIMIT, DeviceRecord, Vouched
from oci_hook.attestation.ek_chain import CaCertificates, verify_ek_certificate
from oci_hook.attestation.ek_list import EkList, verify_listed, verify_not_listed_otherwise
from oci_hook.attestation.enrolment_documents import (
    Answer,
    Certification,
    Pending,
    Request,
    Verifier,
    format_challenge,
    parse_request,
)
from oci_hook.attestation.evidence import verify_quote
from oci_hook.attestation.key_checks import COUNTER_BYTES, verify_ak, verify_counter, verify_ek, verify_srk
from oci_hook.attestation.measurement import MEASURED_PCRS
from oci_hook.attestation.structures import Public
from oci_hook.errors import EnrolmentRefused

SECRET_BYTES: Final = 32
_PROOF_LABEL: Final = b"scz-smm/enroll/v1 proof"

# EK, secret, the AK's Name -> TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET
MakeCredential = Callable[[Public, bytes, bytes], tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class VouchedEk:
    """By what an EK is a TPM's, the SHA-256 of that (see `DeviceRecord`), and who made the TPM."""

    vouched: Vouched
    sha256: str
    subject: str


@dataclass(frozen=True, slots=True)
class VerifiedRequest:
    """A request that passed checks 1 to 5. That its keys lie in one TPM is not known before the answer."""

    request: Request
    ek: VouchedEk


@contextmanager
def _check(number: int) -> Iterator[None]:
    """Name the check that an `EnrolmentRefused` inside failed."""
    try:
        yield
    except EnrolmentRefused as refusal:
        raise EnrolmentRefused(f"enrolment check {number}: {refusal.message}") from refusal


# --- both sides: what only the TPM that opened the challenge can know -------------------------------------------------


def proof(secret: bytes, request_digest: bytes) -> bytes:
    """The host's proof that its TPM opened the challenge; 32 bytes."""
    return hmac.digest(secret, _PROOF_LABEL + request_digest, "sha256")


def enrolment_qualifying_data(kind: str, secret: bytes, request_digest: bytes) -> bytes:
    """The qualifying data that makes a certification fresh; `kind` is `srk`, `counter` or `quote`; 32 bytes."""
    label = b"scz-smm/enroll/v1 " + kind.encode() + b"\x00"
    return hashlib.sha256(label + secret + request_digest).digest()


# --- the owner's side -------------------------------------------------------------------------------------------------


def verify_request(
    request: Request, *, authorities: CaCertificates | None, now: datetime, ek_list: EkList | None = None
) -> VerifiedRequest:
    """Checks 1 to 5: who vouches for the EK, and every attribute of the keys and the counter.

    A request that has a certificate needs a root for it; the list then says only which TPM has which name.

    Args:
        request: From `parse_request`.
        authorities: The owner's folder of EK roots; None: no certificate is accepted.
        now: With a time zone.
        ek_list: The owner's list of TPMs and their names; None: no TPM without certificate is accepted.

    Raises:
        EnrolmentRefused: The first check that failed.
    """
    # 1. The EK certificate chains to a root in the owner's folder, all in their dates, issuers CAs; or, where there is
    #    no certificate, the owner's list has the EK under this device's name.
    # 2. The EK is the certified key, of the default template's kind.
    vouched = _verify_ek_listed(request, ek_list) or _verify_ek_certified(request, authorities, now, ek_list)
    # 3. The AK can sign nothing but what its own TPM says.
    with _check(3):
        verify_ak(request.ak, error=EnrolmentRefused)
    # 4. The SRK never was and never will be outside a TPM.
    with _check(4):
        verify_srk(request.srk, error=EnrolmentRefused)
    # 5. The counter is one that only counts up.
    with _check(5):
        verify_counter(request.counter, request.owner_id, error=EnrolmentRefused)
    return VerifiedRequest(request, vouched)


def _verify_ek_listed(request: Request, ek_list: EkList | None) -> VouchedEk | None:
    """Checks 1 and 2 of a request without a certificate; None: it has one."""
    if request.ek_certificate is not None:
        return None
    with _check(1):
        if ek_list is None:
            raise EnrolmentRefused("the TPM has no EK certificate, and no list of EKs was given")
        digest = verify_listed(request.ek, request.device, ek_list, error=EnrolmentRefused)
    with _check(2):
        verify_ek(request.ek, request.ek.public_key, error=EnrolmentRefused)
    return VouchedEk("list", digest, "no certificate: in the owner's list")


def _verify_ek_certified(
    request: Request, authorities: CaCertificates | None, now: datetime, ek_list: EkList | None
) -> VouchedEk:
    with _check(1):
        if request.ek_certificate is None or authorities is None:
            raise EnrolmentRefused("the TPM has an EK certificate, and no folder of EK roots was given")
        certificate = verify_ek_certificate(request.ek_certificate, authorities, now=now, links=request.ek_chain)
        if ek_list is not None:
            verify_not_listed_otherwise(request.ek, request.device, ek_list, error=EnrolmentRefused)
    with _check(2):
        verify_ek(request.ek, certificate.public_key, error=EnrolmentRefused)
    return VouchedEk("certificate", certificate.sha256, certificate.subject)


def make_challenge(
    verified: VerifiedRequest, *, secret: bytes, make_credential: MakeCredential
) -> tuple[bytes, Pending]:
    """Make the challenge that only the TPM with that EK and that AK can open.

    Args:
        verified: From `verify_request`.
        secret: Fresh and random, 32 bytes; it is not kept.
        make_credential: `tpm.make_credential`.

    Returns:
        The challenge's bytes for the host, and what the owner keeps until the answer comes.

    Raises:
        ValueError: A secret of another length; a mistake of the caller's.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError("the challenge's secret is 32 bytes")
    request = verified.request
    id_object, encrypted_secret = make_credential(request.ek, secret, request.ak.name)
    srk, counter, quote = (enrolment_qualifying_data(k, secret, request.digest) for k in ("srk", "counter", "quote"))
    verifier = Verifier(hashlib.sha256(proof(secret, request.digest)).digest(), srk, counter, quote)
    return format_challenge(request, id_object, encrypted_secret), Pending(request, verifier)


def verify_answer(
    pending: Pending,
    answer: Answer,
    *,
    authorities: CaCertificates | None,
    now: datetime,
    device_class: str,
    ek_list: EkList | None = None,
) -> DeviceRecord:
    """All nine checks; the first five again, as the owner's folder, list or the date may have changed meanwhile.

    Args:
        pending: What `make_challenge` returned.
        answer: From `parse_answer`.
        authorities: The owner's folder of EK roots, as for `verify_request`.
        now: With a time zone; becomes the record's date.
        device_class: The class that the owner gives the device.
        ek_list: The owner's list of TPMs and their names, as for `verify_request`.

    Returns:
        The record of the enrolled device.

    Raises:
        EnrolmentRefused: The first check that failed.
    """
    request, verifier = pending.request, pending.verifier
    if (answer.device, answer.owner_id) != (request.device, request.owner_id):
        raise EnrolmentRefused("the answer is another device's or for another owner")
    verified = verify_request(request, authorities=authorities, now=now, ek_list=ek_list)
    # 6. Only the TPM with that EK and that AK could open the challenge.
    if not hmac.compare_digest(hashlib.sha256(answer.proof).digest(), verifier.proof_sha256):
        raise EnrolmentRefused("enrolment check 6: the proof is wrong: another TPM, or another challenge's answer")
    # 7. The AK certifies the SRK, freshly.
    with _check(7):
        _verify_srk_certified(request, answer.srk_certify, verifier.srk)
    # 8. The AK certifies the counter and its value, freshly.
    with _check(8):
        value = _verify_counter_certified(request, answer.counter_certify, verifier.counter)
    # 9. The AK quotes PCRs 0 to 15, freshly.
    with _check(9):
        quote, kinds = answer.quote, [MEASURED_PCRS]
        verify_quote(quote, ak=request.ak, extra_data=verifier.quote, selections=kinds, error=EnrolmentRefused)
    attest = parse_attest(answer.quote.attest, error=EnrolmentRefused)
    return DeviceRecord(
        device=request.device,
        device_class=device_class,
        enrolled=int(now.timestamp()),
        ek_sha256=verified.ek.sha256,
        ek_subject=verified.ek.subject,
        ak=request.ak,
        srk=request.srk,
        counter=request.counter,
        counter_value=value,
        pcrs=answer.quote.pcrs,
        vouched=verified.ek.vouched,
        resets=attest.reset_count,
        clock_ms=attest.clock,
    )


def _verify_srk_certified(request: Request, certification: Certification, extra_data: bytes) -> None:
    attest = verify_attest(
        certification.attest,
        certification.signature,
        kind="certify",
        ak=request.ak,
        extra_data=extra_data,
        error=EnrolmentRefused,
    )
    if attest.certified_name != request.srk.name:
        raise EnrolmentRefused("the AK certifies another key than the SRK")


def _verify_counter_certified(request: Request, certification: Certification, extra_data: bytes) -> int:
    attest = verify_attest(
        certification.attest,
        certification.signature,
        kind="nv",
        ak=request.ak,
        extra_data=extra_data,
        error=EnrolmentRefused,
    )
    if attest.nv_index_name != request.counter.name:
        raise EnrolmentRefused("the AK certifies another NV index than the counter")
    contents = attest.nv_contents or b""
    value = int.from_bytes(contents, "big")
    if attest.nv_offset != 0 or len(contents) != COUNTER_BYTES or value > COUNTER_LIMIT:
        raise EnrolmentRefused("the AK does not certify the counter's whole value")
    return value


__all__ = [
    "MakeCredential",
    "VerifiedRequest",
    "VouchedEk",
    "enrolment_qualifying_data",
    "make_challenge",
    "parse_request",
    "proof",
    "verify_answer",
    "verify_request",
]
