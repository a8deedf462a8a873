"""The hook's two transactions with the TPM, a quote and a release, as requests for a process that does them.

A TEE's report is a third: none with the TPM, but as slow, and made by whoever holds no key either.

A request is JSON from this program to a child of its own (`deadline`), so that the child may be forked before anything
is known that the request says. It carries no secret. What comes back is bytes. Specification: docs/specification.md,
"Evidence at a container's start" and "TPM policy".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from oci_hook.attestation.appraisal import nearest_form
from oci_hook.attestation.boot_policy import BootForm
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import HostDevice, format_host_device, parse_host_device
from oci_hook.attestation.pcr_signature import PcrSignature, SignedPcrs, parse_signer_key
from oci_hook.attestation.sealed import WrappedSecret
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.documents import canonical
from oci_hook.errors import BootPolicyRefused
from oci_hook.jws import owner_jwk
from oci_hook.lease import Lease


def get_ready() -> None:
    """Load what a transaction needs and nobody else does."""
    import oci_hook.attestation.tpm  # noqa: F401


def quote_request(
    device: HostDevice, forms: Sequence[BootForm], extra_data: bytes, counter_index: int | None = None
) -> bytes:
    """A request for a quote of the PCRs of the form that fits the running system best.

    Args:
        device: This host's enrolment.
        forms: Of a verified boot policy.
        extra_data: What makes the quote fresh, 32 bytes.
        counter_index: NV index of a counter to read beside it, if one is wanted.
    """
    forms_of = [_form_document(form) for form in forms]
    asked: dict[str, object] = {"quote": extra_data.hex(), "device": _device_document(device), "forms": forms_of}
    return canonical(asked if counter_index is None else {**asked, "counter_index": counter_index})


def unseal_request(device: HostDevice, asked: Unsealing) -> bytes:
    """A request for `tpm_release.ReleaseCommands.unseal`."""
    return canonical(
        {
            "unseal": {name: getattr(asked.sealed, name).hex() for name in ("public", "duplicate", "seed")},
            "device": _device_document(device),
            "forms": [_form_document(asked.form)],
            "boot_policy_key": dict(asked.boot_policy_key.members),
            "policy_ref": asked.policy_ref.hex(),
            "counter_index": asked.counter_index,
            "counter_maximum": asked.counter_maximum,
            "lease": asked.lease.document() if asked.lease else None,
        }
    )


def tee_request(directory: str, data: bytes, seconds: float) -> bytes:
    """A request for `tee_collection.collect_report`, which says what each of these is."""
    return canonical({"tee": data.hex(), "directory": directory, "seconds": seconds})


def _unsealing(asked: dict[str, Any], form: BootForm) -> Unsealing:
    return Unsealing(
        sealed=WrappedSecret(**{name: bytes.fromhex(part) for name, part in asked["unseal"].items()}),
        form=form,
        boot_policy_key=owner_jwk(asked["boot_policy_key"], error=BootPolicyRefused),
        policy_ref=bytes.fromhex(asked["policy_ref"]),
        counter_index=asked["counter_index"],
        counter_maximum=asked["counter_maximum"],
        lease=Lease(**asked["lease"]) if asked["lease"] else None,
    )


def perform(request: bytes, *, tcti: str, lock_file: str, timeout_seconds: float) -> bytes:
    """Do what a request asks for: one transaction, under the TPM's lock if it is the TPM's.

    Args:
        request: As the functions above make it.
        tcti: The way to the TPM.
        lock_file: Of `tpm.open_tpm`.
        timeout_seconds: How long to wait for the lock.

    Returns:
        A quote for `read_quote`, the secret, or a report for `read_tee_report`.

    Raises:
        Refused: The TPM says no.
        CouldNotTell: The TPM is away, slow, locked out or faulty.
    """
    asked = json.loads(request)
    if "tee" in asked:
        from oci_hook.attestation.tee_collection import collect_report

        return collect_report(asked["directory"], bytes.fromhex(asked["tee"]), asked["seconds"])
    from oci_hook.attestation.tpm import open_tpm

    device = parse_host_device(asked["device"].encode())
    forms = [_form(document) for document in asked["forms"]]
    with open_tpm(tcti, lock_file, timeout_seconds=timeout_seconds) as tpm:
        if "quote" in asked:
            values = tpm.read_pcrs(sorted({pcr for form in forms for pcr in form.selection}))
            selected = sorted(nearest_form(forms, values).selection)
            evidence = tpm.quote(device, selected, bytes.fromhex(asked["quote"]))
            index = asked.get("counter_index")
            return _quote_document(evidence if index is None else replace(evidence, counter=tpm.counter_if_any(index)))
        return tpm.unseal(device, _unsealing(asked, forms[0]))


def read_quote(data: bytes) -> Evidence:
    """The answer to a `quote_request`."""
    parts = json.loads(data)
    return Evidence(
        attest=bytes.fromhex(parts["attest"]),
        signature=bytes.fromhex(parts["signature"]),
        pcrs={int(pcr): bytes.fromhex(value) for pcr, value in parts["pcrs"].items()},
        counter=parts["counter"],
    )


def _quote_document(evidence: Evidence) -> bytes:
    pcrs = {str(pcr): value.hex() for pcr, value in evidence.pcrs.items()}
    parts = {"attest": evidence.attest.hex(), "signature": evidence.signature.hex()}
    return canonical({**parts, "pcrs": pcrs, "counter": evidence.counter})


def _device_document(device: HostDevice) -> str:
    return format_host_device(replace(device, counters={})).decode()  # the request names the one that counts


def _form_document(form: BootForm) -> dict[str, object]:
    pcrs = {str(pcr): value.hex() for pcr, value in form.pcrs.items()}
    document: dict[str, object] = {
        "pcrs": pcrs,
        "policy": form.policy.hex(),
        "r": form.signature_r.hex(),
        "s": form.signature_s.hex(),
    }
    return document if form.signed is None else {**document, "signed": _signed_document(form.signed)}


def _signed_document(signed: SignedPcrs) -> dict[str, object]:
    signatures = [[each.policy.hex(), each.signature.hex()] for each in signed.signatures]
    return {**signed.document(), "signatures": signatures, "source": signed.source}


def _signed(document: Any) -> SignedPcrs | None:
    if document is None:
        return None
    signatures = tuple(PcrSignature(*map(bytes.fromhex, pair)) for pair in document["signatures"])
    key = parse_signer_key(document["key"], error=BootPolicyRefused)
    return SignedPcrs(key, tuple(document["pcrs"]), signatures, document["source"])


def _form(document: dict[str, object]) -> BootForm:
    pcrs = document["pcrs"]
    policy, r, s = (bytes.fromhex(str(document[name])) for name in ("policy", "r", "s"))
    values = {int(pcr): bytes.fromhex(value) for pcr, value in dict(pcrs).items()}  # type: ignore[call-overload]
    return BootForm(values, policy, r, s, _signed(document.get("signed")))
