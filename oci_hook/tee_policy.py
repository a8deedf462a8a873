"""What a model's owner asks of a trusted execution environment: the member `tee` of the access policy.

Pure. Reads and writes it; whether a report satisfies it is for `attestation.tee` to say. Everything here narrows: what
is absent is forbidden or not accepted. Specification: docs/specification.md, "Trusted execution environment".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from oci_hook.documents import Fields
from oci_hook.errors import SczError
from oci_hook.trust import PLAIN_TEXT

SEV_SNP: Final = "sev-snp"
PRODUCTS: Final = ("milan", "genoa", "turin")
LEVELS: Final = ("fmc", "bootloader", "tee", "snp", "microcode")
ALLOWANCES: Final = ("debug", "migration")
VMPL_HIGH: Final = 3
_MEASUREMENT, _DIGEST = r"[0-9a-f]{96}", r"[0-9a-f]{64}"


@dataclass(frozen=True, slots=True)
class TeePolicy:
    """Which SEV-SNP guests may have the model.

    Attributes:
        measurements: Launch measurements, 48 bytes each; the guest's is one of them.
        roots: SHA-256 of AMD root keys' SubjectPublicKeyInfo (DER), 32 bytes each; the chain ends in one of them.
        minimum_tcb: By product, the lowest security patch levels; a product that is not there is refused, unless
            nothing is.
        vmpl: The highest (least privileged) level that may ask for the report, 0 to 3.
        allow: Of `ALLOWANCES`: what the guest's own launch policy may permit its host.
        vlek_providers: Clouds (CSP_ID) whose loaded keys (VLEK) may sign; none: the chip's own key (VCEK) alone.
    """

    measurements: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    minimum_tcb: Mapping[str, Mapping[str, int]]
    vmpl: int
    allow: tuple[str, ...]
    vlek_providers: tuple[str, ...]


def parse_tee_policy(value: object, *, error: type[SczError]) -> TeePolicy:
    """Check the member `tee`.

    Args:
        value: What JSON gave.
        error: What to raise.

    Raises:
        SczError: The class `error`: another kind, an unknown key, a list that names nothing.
    """
    fields = Fields(value, what="access policy: tee", error=error)
    fields.literal("kind", SEV_SNP)
    policy = TeePolicy(
        measurements=_bytes(fields.strings("measurements", low=1, high=64, pattern=_MEASUREMENT)),
        roots=_bytes(fields.strings("roots", low=1, high=16, pattern=_DIGEST)),
        minimum_tcb=_minimum_tcb(fields.fields("minimum_tcb"), error) if fields.has("minimum_tcb") else {},
        vmpl=fields.integer("vmpl", low=0, high=VMPL_HIGH) if fields.has("vmpl") else 0,
        allow=fields.strings("allow", low=1, high=2, pattern="|".join(ALLOWANCES)) if fields.has("allow") else (),
        vlek_providers=(
            fields.strings("vlek_providers", low=1, high=16, pattern=PLAIN_TEXT, limit=64)
            if fields.has("vlek_providers")
            else ()
        ),
    )
    fields.finish()
    return policy


def _bytes(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(text) for text in texts)


def _minimum_tcb(fields: Fields, error: type[SczError]) -> Mapping[str, Mapping[str, int]]:
    found: dict[str, Mapping[str, int]] = {}
    for product in PRODUCTS:
        if not fields.has(product):
            continue
        levels = fields.fields(product)
        names = [name for name in LEVELS if name != "fmc" or product == "turin"]  # the others have no such level
        found[product] = {name: levels.integer(name, low=0, high=255) for name in names if levels.has(name)}
        levels.finish()
        if not found[product]:
            raise error(f"access policy: tee: minimum_tcb: {product} names no level")
    fields.finish()
    if not found:
        raise error("access policy: tee: minimum_tcb names no product")
    return found


def tee_policy_document(policy: TeePolicy) -> dict[str, Any]:
    """The JSON value of a policy; `parse_tee_policy` gives the same policy again."""
    document: dict[str, Any] = {
        "kind": SEV_SNP,
        "measurements": [measurement.hex() for measurement in policy.measurements],
        "roots": [root.hex() for root in policy.roots],
    }
    if policy.minimum_tcb:
        document["minimum_tcb"] = {product: dict(levels) for product, levels in policy.minimum_tcb.items()}
    if policy.vmpl:
        document["vmpl"] = policy.vmpl
    if policy.allow:
        document["allow"] = list(policy.allow)
    if policy.vlek_providers:
        document["vlek_providers"] = list(policy.vlek_providers)
    return document
