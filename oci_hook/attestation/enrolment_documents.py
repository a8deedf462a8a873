"""The files of an enrolment: request, challenge, answer, and what the owner keeps between challenge and answer.

Pure: bytes to values and back; what they say is judged in `enrolment`. All of them come from the other side or through
it, so each is bounded and read strictly. Specification: docs/specification.md, "Enrolment", documents 1 to 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.boot_policy import pcrs_document
from oci_hook.attestation.device_record import counter_document, take_counter, take_public
from oci_hook.attestation.ek_chain import CERTIFICATE_LIMIT_BYTES, LINK_LIMIT
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.measurement import parse_evidence
from oci_hook.attestation.structures import STRUCTURE_LIMIT_BYTES, NvPublic, Public
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.errors import DeviceInvalid
from oci_hook.trust import NAME, NAME_LIMIT

LIMIT_BYTES: Final = 1 << 20
_PENDING_LIMIT_BYTES: Final = 2 << 20  # it carries a request in base64url
_OWNER_ID: Final = r"[A-Za-z0-9_-]{43}"


@dataclass(frozen=True, slots=True)
class Request:
    """What a host asks to be enrolled with; `document` is the file's own bytes, over which the digest goes."""

    device: str
    owner_id: str
    ek_certificate: bytes | None
    ek: Public
    ak: Public
    srk: Public
    counter: NvPublic
    document: bytes
    ek_chain: tuple[bytes, ...] = ()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the request file; ties challenge and answer to it."""
        return hashlib.sha256(self.document).digest()


@dataclass(frozen=True, slots=True)
class Challenge:
    """A secret that only one TPM can open: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    device: str
    owner_id: str
    id_object: bytes
    encrypted_secret: bytes


@dataclass(frozen=True, slots=True)
class Certification:
    """A TPMS_ATTEST and its TPMT_SIGNATURE."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the host's TPM answers to a challenge."""

    device: str
    owner_id: str
    proof: bytes
    srk_certify: Certification
    counter_certify: Certification
    quote: Evidence


@dataclass(frozen=True, slots=True)
class Verifier:
    """What the owner keeps of the challenge's secret: enough to check an answer, not to make one; 32 bytes each."""

    proof_sha256: bytes
    srk: bytes
    counter: bytes
    quote: bytes


@dataclass(frozen=True, slots=True)
class Pending:
    """An enrolment that waits for its answer: `pending/<device>.json` in the owner's folder."""

    request: Request
    verifier: Verifier


def _open(data: bytes, schema: str, what: str, limit_bytes: int = LIMIT_BYTES) -> Fields:
    fields = Fields(
        parse_object(data, limit_bytes=limit_bytes, what=what, error=DeviceInvalid), what=what, error=DeviceInvalid
    )
    fields.literal("schema", schema)
    return fields


def _device(fields: Fields) -> str:
    return fields.string("device", pattern=NAME, limit=NAME_LIMIT)


def _owner(fields: Fields) -> str:
    return fields.string("owner", pattern=_OWNER_ID)


# --- 1. request -------------------------------------------------------------------------------------------------------


def format_request(
    *,
    device: str,
    owner_id: str,
    ek_certificate: bytes | None,
    ek: Public,
    ak: Public,
    srk: Public,
    counter: NvPublic,
    ek_chain: Sequence[bytes] = (),
) -> bytes:
    """The request's bytes.

    Args:
        device: The name that the device shall have.
        owner_id: To whom it goes.
        ek_certificate: DER; None: the TPM has none, and the owner's list has to vouch for the EK.
        ek: The endorsement key's public area.
        ak: The attestation key's.
        srk: The storage root key's.
        counter: The public area of the NV counter for this owner.
        ek_chain: The authorities' certificates that the TPM holds, DER; at most 8.
    """
    chain = {"ek_chain": [encode_base64url(each) for each in ek_chain]} if ek_chain else {}
    certificate = {} if ek_certificate is None else {"ek_certificate": encode_base64url(ek_certificate)}
    return canonical(
        {
            "schema": "scz-smm/enroll-request/v1",
            "device": device,
            "owner": owner_id,
            **certificate,
            **chain,
            "ek_public": encode_base64url(ek.marshalled),
            "ak_public": encode_base64url(ak.marshalled),
            "srk_public": encode_base64url(srk.marshalled),
            "counter": counter_document(counter),
        }
    )


def parse_request(data: bytes) -> Request:
    """Parse an enrolment request.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    fields = _open(data, "scz-smm/enroll-request/v1", "enrolment request")
    counter = fields.fields("counter")
    certificate = None
    if fields.has("ek_certificate"):
        certificate = fields.base64url("ek_certificate", low=1, high=CERTIFICATE_LIMIT_BYTES)
    chain: tuple[bytes, ...] = ()
    if fields.has("ek_chain"):
        chain = fields.items("ek_chain", _certificate, low=1, high=LINK_LIMIT)
    request = Request(
        device=_device(fields),
        owner_id=_owner(fields),
        ek_certificate=certificate,
        ek=take_public(fields, "ek_public"),
        ak=take_public(fields, "ak_public"),
        srk=take_public(fields, "srk_public"),
        counter=take_counter(counter),
        document=data,
        ek_chain=chain,
    )
    counter.finish()
    fields.finish()
    return request


def _certificate(item: object) -> bytes:
    fields = Fields({"certificate": item}, what="enrolment request: ek_chain", error=DeviceInvalid)
    return fields.base64url("certificate", low=1, high=CERTIFICATE_LIMIT_BYTES)


# --- 2. challenge, and what the owner keeps ---------------------------------------------------------------------------


def format_challenge(request: Request, id_object: bytes, encrypted_secret: bytes) -> bytes:
    """The challenge's bytes: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET for the host of `request`."""
    return canonical(
        {
            "schema": "scz-smm/enroll-challenge/v1",
            "device": request.device,
            "owner": request.owner_id,
            "id_object": encode_base64url(id_object),
            "encrypted_secret": encode_base64url(encrypted_secret),
        }
    )


def parse_challenge(data: bytes) -> Challenge:
    """Parse an enrolment challenge.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    fields = _open(data, "scz-smm/enroll-challenge/v1", "enrolment challenge")
    challenge = Challenge(
        device=_device(fields),
        owner_id=_owner(fields),
        id_object=fields.base64url("id_object", low=1, high=STRUCTURE_LIMIT_BYTES),
        encrypted_secret=fields.base64url("encrypted_secret", low=1, high=STRUCTURE_LIMIT_BYTES),
    )
    fields.finish()
    return challenge


def format_pending(pending: Pending) -> bytes:
    """The bytes of `pending/<device>.json`."""
    verifier = pending.verifier
    return canonical(
        {
            "schema": "scz-smm/enroll-pending/v1",
            "request": encode_base64url(pending.request.document),
            "proof_sha256": verifier.proof_sha256.hex(),
            "qualifying_data": {
                "srk": verifier.srk.hex(),
                "counter": verifier.counter.hex(),
                "quote": verifier.quote.hex(),
            },
        }
    )


def parse_pending(data: bytes) -> Pending:
    """Parse `pending/<device>.json`.

    Raises:
        DeviceInvalid: Malformed.
    """
    fields = _open(data, "scz-smm/enroll-pending/v1", "pending enrolment", _PENDING_LIMIT_BYTES)
    request = parse_request(fields.base64url("request", low=1, high=LIMIT_BYTES))
    proof_sha256 = fields.hexadecimal("proof_sha256", low=32, high=32)
    expected = fields.fields("qualifying_data")
    srk, counter, quote = (expected.hexadecimal(kind, low=32, high=32) for kind in ("srk", "counter", "quote"))
    expected.finish()
    fields.finish()
    return Pending(request, Verifier(proof_sha256, srk, counter, quote))


# --- 3. answer --------------------------------------------------------------------------------------------------------


def format_answer(answer: Answer) -> bytes:
    """The answer's bytes."""
    return canonical(
        {
            "schema": "scz-smm/enroll-answer/v1",
            "device": answer.device,
            "owner": answer.owner_id,
            "proof": encode_base64url(answer.proof),
            "srk_certify": _certification_document(answer.srk_certify.attest, answer.srk_certify.signature),
            "counter_certify": _certification_document(answer.counter_certify.attest, answer.counter_certify.signature),
            "quote": {
                **_certification_document(answer.quote.attest, answer.quote.signature),
                "pcrs": pcrs_document(answer.quote.pcrs),
            },
        }
    )


def _certification_document(attest: bytes, signature: bytes) -> dict[str, object]:
    return {"attest": encode_base64url(attest), "signature": encode_base64url(signature)}


def parse_answer(data: bytes) -> Answer:
    """Parse an enrolment answer.

    Raises:
        DeviceInvalid: Malformed, or larger than 1 MiB.
    """
    fields = _open(data, "scz-smm/enroll-answer/v1", "enrolment answer")
    quote = fields.fields("quote")
    answer = Answer(
        device=_device(fields),
        owner_id=_owner(fields),
        proof=fields.base64url("proof", low=32, high=32),
        srk_certify=_take_certification(fields, "srk_certify"),
        counter_certify=_take_certification(fields, "counter_certify"),
        quote=parse_evidence(quote),
    )
    quote.finish()
    fields.finish()
    return answer


def _take_certification(fields: Fields, name: str) -> Certification:
    part = fields.fields(name)
    attest, signature = (part.base64url(key, low=1, high=STRUCTURE_LIMIT_BYTES) for key in ("attest", "signature"))
    part.finish()
    return Certification(attest, signature)
