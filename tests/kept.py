"""Kept evidence made without a TPM: an owner, a device whose attestation key is in software, and quotes by it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oci_hook.attestation.boot_policy import UnverifiedBootPolicy, parse_boot_policy, sign_boot_policy
from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.evidence import Evidence, qualifying_data
from oci_hook.attestation.evidence_appraisal import References
from oci_hook.attestation.kept_evidence import KeptEvidence, StartEvidence
from oci_hook.attestation.policy import approved_policy
from oci_hook.owner.keyring import Keyring, create_keyring, open_keyring
from tests.attestation_vectors import public_of, t
from tests.devices import make_device

MODEL, VERSION, CLASS, DEVICE = "small", "1", "default", "edge-1"
CONTAINER = "c0ffee"
MANIFEST = "sha256:" + "ab" * 32
HEAD = hashlib.sha256(b"a line of the audit log").digest()
APPROVED = {pcr: hashlib.sha256(b"booted %d" % pcr).digest() for pcr in (4, 7, 8, 9)}


@dataclass(frozen=True)
class Witness:
    """An owner, and the attestation key of one of its devices."""

    keyring: Keyring
    ak_key: Any
    ak: bytes

    def policy(self, model: str = MODEL, device_class: str = CLASS, **changes: Any) -> UnverifiedBootPolicy:
        """The boot policy that approves `APPROVED`."""
        return parse_boot_policy(self.policy_document(model, device_class, **changes))

    def policy_document(
        self,
        model: str = MODEL,
        device_class: str = CLASS,
        *,
        pcrs: Mapping[int, bytes] = APPROVED,
        epoch: int = 0,
    ) -> bytes:
        """A boot policy that approves these values."""
        return sign_boot_policy(
            [pcrs],
            owner_id=self.keyring.owner.owner_id,
            model_name=model,
            device_class=device_class,
            created=1,
            key=self.keyring.boot_policy_key,
            epoch=epoch,
        )

    def record(self, **changes: Any) -> DeviceRecord:
        """The owner's record of the device."""
        return replace(make_device(self.keyring.owner.owner_id, DEVICE).record, ak=public_of(self.ak), **changes)

    def start(
        self,
        number: int = 1,
        *,
        container: str = CONTAINER,
        manifest: str = MANIFEST,
        head: bytes = HEAD,
        pcrs: Mapping[int, bytes] = APPROVED,
        **changes: Any,
    ) -> StartEvidence:
        """A start's evidence, its nonce and token by `number`; `changes` are made after the quote."""
        nonce, token = (hashlib.sha256(what + bytes([number])).digest() for what in (b"nonce", b"token"))
        extra = qualifying_data(nonce, token, container, manifest, head)
        attest = t.attest(t.ST_QUOTE, t.quote_info(pcrs), signer=t.qualified_name(self.ak), extra_data=extra)
        made = StartEvidence(
            model_name=MODEL,
            model_version=VERSION,
            manifest_digest=manifest,
            owner_id=self.keyring.owner.owner_id,
            device_name=DEVICE,
            device_class=CLASS,
            created=1_767_225_600,
            nonce=nonce,
            token_hash=token,
            audit_head=head,
            form_policy=approved_policy(pcrs),
            quote=Evidence(attest, t.signed(self.ak_key, attest), dict(pcrs)),
            ak=public_of(self.ak),
        )
        return replace(made, **changes)

    def kept(self, *starts: StartEvidence) -> KeptEvidence:
        """A container's evidence; default: one good start."""
        return KeptEvidence(CONTAINER, starts or (self.start(),))

    def references(self, **changes: Any) -> References:
        """What its owner brings."""
        known = {f"{MODEL}:{VERSION}": MANIFEST}
        made = References(
            public_of(self.ak), self.keyring.owner, (self.policy(),), manifests=known, record=self.record()
        )
        return replace(made, **changes)


def make_witness(folder: Path, name: str = "acme") -> Witness:
    """An owner's folder below `folder`, and a device's attestation key."""
    create_keyring(folder / name, name, None)
    key = t.p256()
    return Witness(
        open_keyring(folder / name, lambda: ""), key, t.ecc_public(key, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
    )
