"""The evidence of a container's starts, as it is kept and handed to others: what was quoted, and what it was bound to.

Pure. A quote says nothing without the parts of its qualifying data, so they are kept beside it, and whoever reads it
recomputes them. Nothing in the document may be believed before `evidence_appraisal` has looked at it.
Specification: docs/specification.md, "Kept evidence".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from oci_hook.attestation.boot_policy import parse_pcrs, pcrs_document
from oci_hook.attestation.evidence import Evidence, TeeReport, qualifying_data
from oci_hook.attestation.pcr_signature import PCR_SIGNATURE_BYTES
from oci_hook.attestation.structures import STRUCTURE_LIMIT_BYTES, Public, parse_public
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.key_errors import EvidenceInvalid
from oci_hook.trust import NAME, NAME_LIMIT

SCHEMA: Final = "scz-smm/evidence/v1"
STARTS_LIMIT: Final = 64
"""As many models as a container's record has."""
LIMIT_BYTES: Final = 4 << 20
TEE_LIMIT_BYTES: Final = 16 << 10
"""Of a TEE's report, and of the certificates beside it: real ones have a third of it. Larger ones are not kept."""
_TIME_LIMIT: Final = 1 << 40
_VERSION: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"  # as in `bundle.model`, another room
_PROVIDER: Final = r"[a-z0-9_]{1,32}"
_OWNER_ID: Final = r"[A-Za-z0-9_-]{43}"
_CONTAINER_ID: Final = r"[^\x00-\x1f\x7f]+"


@dataclass(frozen=True, slots=True)
class StartEvidence:
    """What was proven when a container was given one model.

    Attributes:
        model_name, model_version: What the manifest calls the model; bound to the quote by `manifest_digest` alone.
        manifest_digest: With its `sha256:` prefix.
        owner_id: The model owner's.
        device_name, device_class: As the grant names this device.
        created: When, by the host's clock, in seconds since 1970.
        nonce, token_hash, audit_head: Parts of the qualifying data, 32 bytes each.
        form_policy: The policy digest (32 bytes) of the boot policy's form that the host found itself in.
        quote: TPMS_ATTEST, TPMT_SIGNATURE and the PCR values; a TEE's report, where there was one.
        ak: The attestation key that the host says it has.
        pcr_signature: By the key that a nested form names, over the PCR values that it approved; None: the form has
            all values itself.
        remote: `keylime`: a remote verifier accepted the quote at the host's own asking; None: none was asked.
    """

    model_name: str
    model_version: str
    manifest_digest: str
    owner_id: str
    device_name: str
    device_class: str
    created: int
    nonce: bytes
    token_hash: bytes
    audit_head: bytes
    form_policy: bytes
    quote: Evidence
    ak: Public
    pcr_signature: bytes | None = None
    remote: str | None = None

    def qualifying_data(self, container_id: str) -> bytes:
        """What the quote must carry as extraData, recomputed from the parts; 32 bytes."""
        return qualifying_data(self.nonce, self.token_hash, container_id, self.manifest_digest, self.audit_head)

    @property
    def model(self) -> str:
        """`name:version`."""
        return f"{self.model_name}:{self.model_version}"


@dataclass(frozen=True, slots=True)
class KeptEvidence:
    """A container's evidence: one quote for each model that it was given, in that order."""

    container_id: str
    starts: tuple[StartEvidence, ...]

    def joined(self, later: KeptEvidence) -> KeptEvidence:
        """This one and that of models which the same container got later, by another way."""
        return KeptEvidence(later.container_id, (self.starts + later.starts)[-STARTS_LIMIT:])


def format_evidence(kept: KeptEvidence) -> bytes:
    """The document's bytes."""
    starts = [_start_document(start) for start in kept.starts]
    return canonical({"schema": SCHEMA, "container": kept.container_id, "starts": starts})


def _start_document(start: StartEvidence) -> dict[str, Any]:
    document: dict[str, Any] = {
        "model": {"name": start.model_name, "version": start.model_version},
        "manifest": start.manifest_digest,
        "owner": start.owner_id,
        "device": start.device_name,
        "class": start.device_class,
        "created": start.created,
        "nonce": start.nonce.hex(),
        "token_hash": start.token_hash.hex(),
        "audit_head": start.audit_head.hex(),
        "form": start.form_policy.hex(),
        "attest": encode_base64url(start.quote.attest),
        "signature": encode_base64url(start.quote.signature),
        "pcrs": pcrs_document(start.quote.pcrs),
        "ak_public": encode_base64url(start.ak.marshalled),
    }
    tee = start.quote.tee
    if tee is not None and max(len(tee.report), len(tee.certificates)) <= TEE_LIMIT_BYTES:
        blobs = {"report": encode_base64url(tee.report), "certificates": encode_base64url(tee.certificates)}
        document["tee"] = {"provider": tee.provider, **blobs}
    if start.pcr_signature is not None:
        document["pcr_signature"] = encode_base64url(start.pcr_signature)
    if start.remote is not None:
        document["remote"] = start.remote
    return document


def parse_evidence(data: bytes) -> KeptEvidence:
    """Parse a document of kept evidence; nothing in it is verified.

    Args:
        data: At most 4 MiB.

    Raises:
        EvidenceInvalid: Malformed, no start or more than 64, an unknown or a duplicate key.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="evidence", error=EvidenceInvalid)
    fields = Fields(document, what="evidence", error=EvidenceInvalid)
    fields.literal("schema", SCHEMA)
    kept = KeptEvidence(
        container_id=fields.string("container", pattern=_CONTAINER_ID),
        starts=fields.items("starts", _parse_start, low=1, high=STARTS_LIMIT),
    )
    fields.finish()
    return kept


def _parse_start(value: object) -> StartEvidence:
    fields = Fields(value, what="evidence of a start", error=EvidenceInvalid)
    model = fields.fields("model")
    start = StartEvidence(
        model_name=model.string("name", pattern=NAME, limit=NAME_LIMIT),
        model_version=model.string("version", pattern=_VERSION),
        manifest_digest=fields.digest("manifest"),
        owner_id=fields.string("owner", pattern=_OWNER_ID),
        device_name=fields.string("device", pattern=NAME, limit=NAME_LIMIT),
        device_class=fields.string("class", pattern=NAME, limit=NAME_LIMIT),
        created=fields.integer("created", low=0, high=_TIME_LIMIT),
        nonce=fields.hexadecimal("nonce", low=32, high=32),
        token_hash=fields.hexadecimal("token_hash", low=32, high=32),
        audit_head=fields.hexadecimal("audit_head", low=32, high=32),
        form_policy=fields.hexadecimal("form", low=32, high=32),
        quote=Evidence(
            attest=fields.base64url("attest", low=1, high=STRUCTURE_LIMIT_BYTES),
            signature=fields.base64url("signature", low=1, high=STRUCTURE_LIMIT_BYTES),
            pcrs=parse_pcrs(fields, "pcrs", error=EvidenceInvalid),
            tee=_parse_tee(fields.fields("tee")) if fields.has("tee") else None,
        ),
        ak=parse_public(
            fields.base64url("ak_public", low=1, high=STRUCTURE_LIMIT_BYTES), what="ak_public", error=EvidenceInvalid
        ),
        pcr_signature=fields.base64url("pcr_signature", low=1, high=PCR_SIGNATURE_BYTES)
        if fields.has("pcr_signature")
        else None,
        remote=fields.literal("remote", "keylime") if fields.has("remote") else None,
    )
    model.finish()
    fields.finish()
    return start


def _parse_tee(fields: Fields) -> TeeReport:
    report = TeeReport(
        provider=fields.string("provider", pattern=_PROVIDER),
        report=fields.base64url("report", low=1, high=TEE_LIMIT_BYTES),
        certificates=fields.base64url("certificates", low=0, high=TEE_LIMIT_BYTES),
    )
    fields.finish()
    return report
