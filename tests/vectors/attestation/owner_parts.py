"""A model's owner with signed boot policies, and the PCR values of machines that booted something."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import tpm_parts as t
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

Vector = dict[str, Any]

MODEL, CLASS, DEVICE = "resnet", "default", "edge-1"
GRUB, UKI = (4, 7, 8, 9), (7, 11, 12)


def measured(pcrs: Iterable[int], boot: str = "approved") -> dict[int, bytes]:
    return {pcr: hashlib.sha256(f"{boot} {pcr}".encode()).digest() for pcr in pcrs}


def pcrs_json(pcrs: Mapping[int, bytes]) -> dict[str, str]:
    return {str(pcr): value.hex() for pcr, value in pcrs.items()}


class OwnerKeys:
    """A model owner."""

    def __init__(self, name: str = "owner") -> None:
        self.name = name
        self.manifest, self.boot_policy, self.recovery = (t.p256() for _ in range(3))

    @property
    def document(self) -> dict[str, Any]:
        keys = {f"{role}_key": t.jwk(getattr(self, role)) for role in ("manifest", "boot_policy", "recovery")}
        return {"schema": "scz-smm/owner/v1", "name": self.name, **keys}

    @property
    def owner_id(self) -> str:
        return t.b64(hashlib.sha256(t.dumps(t.jwk(self.manifest)).encode()).digest())

    def form(
        self, pcrs: Mapping[int, bytes], *, model: str = MODEL, device_class: str = CLASS, key: Any = None
    ) -> dict[str, Any]:
        """A signed form; the policy's digest from Part 3, 23.7 and 23.11."""
        selected = t.selections(t.selection(pcrs)) if all(pcr < 24 for pcr in pcrs) else b""
        pcr_step = hashlib.sha256(bytes(32) + struct.pack(">I", 0x17F) + selected + t.pcr_digest(pcrs)).digest()
        policy = hashlib.sha256(pcr_step + struct.pack(">II", 0x16C, 0x15E)).digest()
        reference = hashlib.sha256(f"scz-smm/boot-policy/v1\0{model}\0{device_class}".encode()).digest()
        r, s = decode_dss_signature((key or self.boot_policy).sign(policy + reference, ec.ECDSA(hashes.SHA256())))
        spelled = {"r": r.to_bytes(32, "big").hex(), "s": s.to_bytes(32, "big").hex()}
        body = {"pcrs": pcrs_json(pcrs), "policy": policy.hex(), "signature": spelled}
        return {"type": "pcr", "bank": "sha256", **body}

    def policy(self, *forms: dict[str, Any], **changes: Any) -> dict[str, Any]:
        head = {"schema": "scz-smm/boot-policy/v1", "owner": self.owner_id, "model": MODEL, "class": CLASS}
        return {**head, "created": t.NOW, "forms": list(forms), **changes}
