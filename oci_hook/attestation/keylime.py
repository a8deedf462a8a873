"""Keylime's one-shot verification of a quote: the request to its verifier, and what its answer means.

Pure. `POST /v2.5/verify/evidence` takes the reference values from whoever asks: it says whether a quote is genuine,
made for this nonce and of these values, and nothing about who may choose them. PCRs that the policy leaves out are
skipped there, so every quoted PCR is in it. Source: keylime 7.14.3, VerifyEvidenceHandler of
keylime/cloud_verifier_tornado.py.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final

from oci_hook.attestation.checkquote import pcrs_file
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.structures import Public
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.key_errors import AppraisalRefused, VerifierUnavailable

PATH: Final = "/v2.5/verify/evidence"
LIMIT_BYTES: Final = 256 << 10
_FAILURES_LIMIT: Final = 256
_WORDS_LIMIT: Final = 8


def keylime_request(quote: Evidence, *, ak: Public, extra_data: bytes, reference: Mapping[int, bytes]) -> bytes:
    """The body of the request.

    Args:
        quote: What the TPM said.
        ak: The attestation key, as the asker knows it.
        extra_data: What the quote must carry, 32 bytes.
        reference: The PCR values that are approved, of all PCRs that were quoted.

    Raises:
        AppraisalRefused: The reference values are not of the PCRs that were quoted: Keylime would skip what is missing.
    """
    if reference.keys() != quote.pcrs.keys():
        raise AppraisalRefused("the quote is of other PCRs than the reference values: nothing was asked")
    parts = (quote.attest, quote.signature, pcrs_file(quote.pcrs))
    policy: dict[str, Any] = {str(pcr): [value.hex()] for pcr, value in sorted(reference.items())}
    policy["mask"] = hex(sum(1 << pcr for pcr in reference))
    data = {
        "quote": "r" + ":".join(base64.b64encode(part).decode() for part in parts),
        "nonce": base64.b64encode(extra_data).decode(),
        "hash_alg": "sha256",
        "tpm_ak": base64.b64encode(ak.marshalled).decode(),
        "tpm_ek": "none",  # has to be there, and is not looked at: the AK is the enrolled one
        "tpm_policy": canonical(policy).decode(),
    }
    return canonical({"type": "tpm", "data": data})


def read_keylime_answer(status: int, body: bytes) -> None:
    """What the verifier's answer means: it returns if the evidence was accepted.

    Args:
        status: Of HTTP.
        body: At most 256 KiB.

    Raises:
        AppraisalRefused: The verifier says no; with its reasons.
        VerifierUnavailable: It says nothing that can be used: another status, another form, a contradiction.
    """
    if status != 200:
        raise VerifierUnavailable(f"the verifier answered with the status {status}")
    document = parse_object(body, limit_bytes=LIMIT_BYTES, what="the verifier's answer", error=VerifierUnavailable)
    fields = Fields(document, what="the verifier's answer", error=VerifierUnavailable)
    code = fields.integer("code", low=0, high=999)
    results = fields.fields("results")
    valid = results.boolean("valid")
    failures = results.items("failures", _failure, low=0, high=_FAILURES_LIMIT)
    if code != 200:
        raise VerifierUnavailable(f"the verifier answered with the code {code}")
    if not valid:
        said = ", ".join(failures[:_WORDS_LIMIT]) or "no reason"
        raise AppraisalRefused(f"the verifier says: {said}")
    if failures:
        raise VerifierUnavailable("the verifier's answer contradicts itself: valid, with failures")


def _failure(value: object) -> str:
    fields = Fields(value, what="the verifier's answer: a failure", error=VerifierUnavailable)
    kind = fields.string("type", limit=256)
    context = fields.take("context") if fields.has("context") else None
    message = context.get("message") if isinstance(context, dict) else None
    return shown(kind if not isinstance(message, str) else f"{kind}: {message}", 200)
