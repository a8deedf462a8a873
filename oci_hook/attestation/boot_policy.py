"""The boot policy: the states of a machine that a model's owner approved, each signed for the TPM.

Pure. One document serves a whole fleet: its PCR values are the appraisal's reference values, and its signatures are
what the TPM's PolicyAuthorize wants. A reader recomputes every policy from the values: it never shows an operator
values that the TPM would not enforce. Specification: docs/specification.md, "Boot policy" and "TPM policy".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from oci_hook.attestation.pcr_signature import (
    SignedPcrs,
    UnverifiedPcrSignature,
    parse_signed_pcrs,
    signer_name,
)
from oci_hook.attestation.policy import PCR_COUNT, approved_policy, nested_policy, policy_ref
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import BootPolicyInvalid, BootPolicyRefused, SczError
from oci_hook.jws import ec_public_key
from oci_hook.trust import NAME, NAME_LIMIT, Owner

SCHEMA: Final = "scz-smm/boot-policy/v1"
LIMIT_BYTES: Final = 1 << 20
FORMS_LIMIT: Final = 32
_OWNER_ID: Final = r"[A-Za-z0-9_-]{43}"
_TIME_LIMIT: Final = 1 << 40
EPOCH_LIMIT: Final = (1 << 31) - 1

# Kernel, initrd and command line: by a unified kernel image, or by GRUB.
COVERAGE: Final = (frozenset({11, 12}), frozenset({4, 8, 9}))
RESETTABLE: Final = frozenset({16, 23})  # root can reset them while the system runs


@dataclass(frozen=True, slots=True)
class BootForm:
    """One approved state: PCR values of the SHA-256 bank, their policy digest, and its signature (r, s: 32 bytes).

    `signed`: further PCRs, whose values are approved by another key (nested form); None: there are none.
    """

    pcrs: Mapping[int, bytes]
    policy: bytes
    signature_r: bytes
    signature_s: bytes
    signed: SignedPcrs | None = None

    @property
    def selection(self) -> frozenset[int]:
        """All PCRs that it covers, by value or by signature."""
        return frozenset(self.pcrs) | frozenset(self.signed.pcrs if self.signed is not None else ())


@dataclass(frozen=True, slots=True)
class UnverifiedBootPolicy:
    """A boot policy as parsed; nothing in it may be believed before `verify_boot_policy`."""

    unverified_owner_id: str
    unverified_model_name: str
    unverified_device_class: str
    unverified_created: int
    unverified_forms: tuple[BootForm, ...]
    unverified_epoch: int = 0


@dataclass(frozen=True, slots=True)
class BootPolicy:
    """A boot policy by a trusted owner, for one model line and device class; `epoch`: see `policy.policy_ref`."""

    owner_id: str
    model_name: str
    device_class: str
    created: int
    forms: tuple[BootForm, ...]
    policy_ref: bytes
    epoch: int = 0


def verify_coverage(pcrs: Mapping[int, bytes], error: type[SczError], *, signed: SignedPcrs | None = None) -> None:
    """Refuse PCRs that do not tell one system from another.

    Args:
        pcrs: Values of the SHA-256 bank by number.
        error: What to raise.
        signed: PCRs whose values another key approves: they count as covered, and as measured.

    Raises:
        SczError: The class `error`: kernel, initrd and command line are not covered; PCR 16 or 23; a value of all zeros
            (nothing was measured, or the bank is unused; PCR 12 beside a measured PCR 11 may be zero) or all ones (a
            PCR of a dynamic launch that did not happen); a PCR both by value and by signature.
    """
    by_signature = frozenset(signed.pcrs if signed is not None else ())
    if by_signature & pcrs.keys():
        raise error("a form covers a PCR either by its value or by a signature")
    if not any(needed <= pcrs.keys() | by_signature for needed in COVERAGE):
        raise error("the PCRs cover neither 11 and 12 (unified kernel image) nor 4, 8 and 9 (GRUB)")
    for pcr, value in sorted(pcrs.items()):
        if not 0 <= pcr < PCR_COUNT:
            raise error(f"there is no PCR {pcr}")
        if pcr in RESETTABLE:
            raise error(f"PCR {pcr} can be reset by root and proves nothing")
        if len(value) != 32:
            raise error(f"PCR {pcr} is not a SHA-256 value")
        # systemd-stub measures into PCR 12 only what overrides the image's own command line: beside a measured PCR 11,
        # zero there says that nothing did.
        untouched_override = pcr == 12 and (11 in by_signature or pcrs.get(11, bytes(32)) != bytes(32))
        if value in (bytes(32), b"\xff" * 32) and not (untouched_override and value == bytes(32)):
            raise error(f"PCR {pcr} has never been measured into: all bits are the same")


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_pcrs(fields: Fields, name: str, *, error: type[SczError]) -> Mapping[int, bytes]:
    """A required object of PCR values: decimal numbers from 0 to 23, 32 bytes in hexadecimal each; at least one."""
    values = fields.take(name)
    if not isinstance(values, dict) or not 0 < len(values) <= PCR_COUNT:
        raise error(f"{name} is not an object of 1 to {PCR_COUNT} PCR values")
    numbers = {str(pcr): pcr for pcr in range(PCR_COUNT)}
    taken = Fields(values, what=name, error=error)
    found: dict[int, bytes] = {}
    for text in values:
        if text not in numbers:
            raise error(f"{name}: {shown(text)} is not a PCR")
        found[numbers[text]] = taken.hexadecimal(text, low=32, high=32)
    return MappingProxyType(dict(sorted(found.items())))


def pcrs_document(pcrs: Mapping[int, bytes]) -> dict[str, str]:
    """PCR values as our JSON documents carry them."""
    return {str(pcr): value.hex() for pcr, value in sorted(pcrs.items())}


def _parse_form(value: object) -> BootForm:
    fields = Fields(value, what="boot policy's form", error=BootPolicyInvalid)
    fields.literal("type", "pcr")
    fields.literal("bank", "sha256")
    pcrs = parse_pcrs(fields, "pcrs", error=BootPolicyInvalid)
    signed = parse_signed_pcrs(fields, error=BootPolicyInvalid) if fields.has("signed") else None
    policy = fields.hexadecimal("policy", low=32, high=32)
    signature = fields.fields("signature")
    fields.finish()
    r, s = (signature.hexadecimal(name, low=32, high=32) for name in ("r", "s"))
    signature.finish()
    verify_coverage(pcrs, BootPolicyInvalid, signed=signed)
    return BootForm(pcrs, policy, r, s, signed)


def parse_boot_policy(data: bytes) -> UnverifiedBootPolicy:
    """Parse a boot policy.

    Args:
        data: The document, at most 1 MiB.

    Raises:
        BootPolicyInvalid: Malformed, no form or more than 32, or a form that covers too little.
    """
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what="boot policy", error=BootPolicyInvalid)
    fields = Fields(document, what="boot policy", error=BootPolicyInvalid)
    fields.literal("schema", SCHEMA)
    unverified = UnverifiedBootPolicy(
        unverified_owner_id=fields.string("owner", pattern=_OWNER_ID),
        unverified_model_name=fields.string("model", pattern=NAME, limit=NAME_LIMIT),
        unverified_device_class=fields.string("class", pattern=NAME, limit=NAME_LIMIT),
        unverified_created=fields.integer("created", low=0, high=_TIME_LIMIT),
        unverified_forms=fields.items("forms", _parse_form, low=1, high=FORMS_LIMIT),
        unverified_epoch=fields.integer("epoch", low=1, high=EPOCH_LIMIT) if fields.has("epoch") else 0,
    )
    fields.finish()
    return unverified


def verify_boot_policy(
    unverified: UnverifiedBootPolicy, *, owner: Owner, model_name: str, device_class: str
) -> BootPolicy:
    """Verify that an owner approved every form, for this model line and this device class.

    Args:
        unverified: From `parse_boot_policy`.
        owner: Whom this host trusts and whose model it is.
        model_name: The manifest's.
        device_class: The grant's.

    Raises:
        BootPolicyRefused: Another owner's, model's or class's; a policy that is not its PCR values'; not signed.
    """
    # 1. It says that it is this owner's, for this model line and this class (the signatures prove it, below).
    if unverified.unverified_owner_id != owner.owner_id:
        raise BootPolicyRefused("the boot policy is another owner's")
    if unverified.unverified_model_name != model_name:
        raise BootPolicyRefused(f"the boot policy is for the model {unverified.unverified_model_name}")
    if unverified.unverified_device_class != device_class:
        raise BootPolicyRefused(f"the boot policy is for the device class {unverified.unverified_device_class}")
    reference = policy_ref(model_name, device_class, unverified.unverified_epoch)
    key = ec_public_key(owner.boot_policy_key, error=BootPolicyRefused)
    for number, form in enumerate(unverified.unverified_forms, 1):
        # 2. Each policy is that of the PCR values, and the signer's key, beside it: they are shown to people and used
        #    as reference values.
        if form_policy(form.pcrs, form.signed) != form.policy:
            raise BootPolicyRefused(f"form {number} of the boot policy: the policy is not that of its PCR values")
        # 3. The owner's boot-policy key signed it together with the policyRef.
        _verify_signature(form, reference, key, number)
    return BootPolicy(
        owner_id=owner.owner_id,
        model_name=model_name,
        device_class=device_class,
        created=unverified.unverified_created,
        forms=unverified.unverified_forms,
        policy_ref=reference,
        epoch=unverified.unverified_epoch,
    )


def form_policy(pcrs: Mapping[int, bytes], signed: SignedPcrs | None) -> bytes:
    """The policy of a form, 32 bytes, which the owner signs."""
    return approved_policy(pcrs) if signed is None else nested_policy(signer_name(signed.key), pcrs)


def with_host_signatures(boot_policy: BootPolicy, entries: Sequence[UnverifiedPcrSignature], source: str) -> BootPolicy:
    """The same boot policy, whose nested forms have the signatures of this host that are by their keys.

    Args:
        boot_policy: Verified.
        entries: Of the host's signature file; none if it has none.
        source: Where they come from, for messages.
    """
    forms = (
        form if form.signed is None else replace(form, signed=form.signed.with_signatures(entries, source))
        for form in boot_policy.forms
    )
    return replace(boot_policy, forms=tuple(forms))


def _verify_signature(form: BootForm, reference: bytes, key: ec.EllipticCurvePublicKey, number: int) -> None:
    r, s = (int.from_bytes(part, "big") for part in (form.signature_r, form.signature_s))
    try:
        key.verify(encode_dss_signature(r, s), form.policy + reference, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as cause:
        raise BootPolicyRefused(
            f"form {number} of the boot policy is not signed by the owner for this model line and device class"
        ) from cause


# --- signing ----------------------------------------------------------------------------------------------------------


def sign_boot_policy(
    forms_pcrs: Sequence[Mapping[int, bytes]],
    *,
    owner_id: str,
    model_name: str,
    device_class: str,
    created: int,
    key: ec.EllipticCurvePrivateKey,
    nested: Sequence[tuple[Mapping[int, bytes], SignedPcrs]] = (),
    epoch: int = 0,
) -> bytes:
    """Sign a boot policy.

    Args:
        forms_pcrs: For each approved state its PCR values of the SHA-256 bank.
        owner_id: The owner's id.
        model_name: The model line.
        device_class: The device class.
        created: Seconds since 1970.
        key: The owner's boot-policy key, on P-256.
        nested: Further forms: PCR values, and the PCRs that another key approves.
        epoch: The current one of the model line and class, 0 to 2³¹−1.

    Returns:
        The document.

    Raises:
        BootPolicyInvalid: No form or more than 32, a form twice, or one that covers too little.
    """
    reference = policy_ref(model_name, device_class, epoch)
    forms = []
    for pcrs, signed in [*((pcrs, None) for pcrs in forms_pcrs), *nested]:
        verify_coverage(pcrs, BootPolicyInvalid, signed=signed)
        policy = form_policy(pcrs, signed)
        r, s = decode_dss_signature(key.sign(policy + reference, ec.ECDSA(hashes.SHA256())))
        signature = {"r": r.to_bytes(32, "big").hex(), "s": s.to_bytes(32, "big").hex()}
        form = {"type": "pcr", "bank": "sha256", "pcrs": pcrs_document(pcrs), "policy": policy.hex()}
        by_key = {} if signed is None else {"signed": signed.document()}
        forms.append({**form, **by_key, "signature": signature})
    if len({form["policy"] for form in forms}) != len(forms):
        raise BootPolicyInvalid("two forms of the boot policy are the same")
    document: dict[str, object] = {"schema": SCHEMA, "owner": owner_id, "model": model_name, "class": device_class}
    if epoch:  # 0 is not written: versions that know no epochs read the document
        document["epoch"] = epoch
    data = canonical({**document, "created": created, "forms": forms})
    parse_boot_policy(data)  # what a reader would refuse is never written
    return data
