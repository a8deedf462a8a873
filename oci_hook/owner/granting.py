"""Granting: one model version's content key, wrapped for one device's TPM under the owner's policy.

Needs the owner's keys and the device's record, and no TPM: `TPM2_Import` takes a blob that is made in software, wrapped
to the device's SRK. The grant opens while the owner's boot policy for the device's class holds and the device's counter
is at most the grant's maximum. Specification: docs/specification.md, "Grant" and "TPM policy".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.policy import policy_ref, sealed_object_policy
from oci_hook.attestation.structures import ecdsa_signing_public
from oci_hook.attestation.tpm import wrap_secret
from oci_hook.bundle.grant import NONCE_BYTES, SECRET_BYTES, Counter, Grant, SealedKey, sign_grant, wrap_content_key
from oci_hook.bundle.layout import Layout
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.segments import associated_data, decrypt_stream
from oci_hook.errors import DeviceInvalid, KeyInvalid
from oci_hook.lease import Lease
from oci_hook.owner.broker_shares import EncryptedShare, verify_share_wanted
from oci_hook.owner.keyring import Keyring, open_content_key
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords

STEP_LIMIT = 1000  # how far from the last certified value a revocation may count: below what a host counts in one go


def boot_policy_key_name(keyring: Keyring) -> bytes:
    """The Name of the owner's boot-policy key as a TPM object, 34 bytes."""
    return b"\x00\x0b" + hashlib.sha256(ecdsa_signing_public(keyring.boot_policy_key.public_key())).digest()


def _limit(device: DeviceRecord, maximum: int | None) -> int:
    if device.revoked is not None:
        raise DeviceInvalid(
            f"the device {device.device} was revoked",
            remedy="`sczctl enroll` it anew, with --unrevoke at `accept`, if it is to have models again",
        )
    limit = device.counter_value if maximum is None else maximum
    if limit < device.counter_value:
        raise DeviceInvalid(
            f"the counter of {device.device} is {device.counter_value} by now: the grant would never open",
            remedy="leave --maximum away, or give that value or more",
        )
    certified = device.counter_value if device.certified is None else device.certified
    if limit > device.counter_value and limit >= certified + STEP_LIMIT:
        below = max(device.counter_value + 1, certified + STEP_LIMIT)
        raise DeviceInvalid(
            f"the counter of {device.device} was {certified} at its enrolment: a revocation could not count beyond "
            f"{limit}",
            remedy=f"give --maximum below {below}",
        )
    return limit


def make_grant(
    keyring: Keyring,
    content: ContentKeyRecord,
    device: DeviceRecord,
    *,
    maximum: int | None,
    created: int,
    random: Callable[[int], bytes],
    share: EncryptedShare | None = None,
    epoch: int = 0,
    lease: Lease | None = None,
) -> tuple[Grant, bytes]:
    """Make and sign a grant.

    Args:
        keyring: The owner's, opened.
        content: The model version's sealed content key.
        device: The enrolled device's record.
        maximum: The highest value of the device's counter at which it opens; None: the one that the owner knows.
        created: Seconds since 1970.
        random: Gives so many random bytes, as `os.urandom` does.
        share: The broker's share, this grant's own; None: the access policy asks for none.
        epoch: Of the boot policy of that model line and device class.
        lease: The last boot and the last moment at which it opens; None: no such bound.

    Returns:
        The grant and its compact bytes.

    Raises:
        KeyInvalid: The content key is not this owner's.
        DeviceInvalid: The device's counter has passed the maximum, or the device was revoked.
        GrantInvalid: The access policy asks for a broker's share, and there is none; or the other way round.
    """
    verify_share_wanted(content, given=share is not None)
    limit = _limit(device, maximum)
    key_name = boot_policy_key_name(keyring)
    reference = policy_ref(content.model.name, device.device_class, epoch)
    secret = random(SECRET_BYTES)
    wrapped = wrap_secret(
        device.srk, secret, sealed_object_policy(key_name, reference, device.counter.name, limit, lease)
    )
    grant = Grant(
        model=content.model,
        manifest_digest=content.manifest_digest,
        owner_id=keyring.owner.owner_id,
        created=created,
        device_name=device.device,
        device_class=device.device_class,
        ak_name=device.ak.name,
        srk_name=device.srk.name,
        boot_policy_key_name=key_name,
        policy_ref=reference,
        counter=Counter(index=device.counter.index, name=device.counter.name, maximum=limit),
        sealed=SealedKey(wrapped.public, wrapped.duplicate, wrapped.seed),
        wrapped_key=_wrapped_key(keyring, content, secret, random(NONCE_BYTES), share),
        broker=share.member if share else None,
        lease=lease,
    )
    return grant, sign_grant(grant, key=keyring.manifest_key)


def _wrapped_key(
    keyring: Keyring, content: ContentKeyRecord, secret: bytes, nonce: bytes, share: EncryptedShare | None
) -> bytes:
    digest = content.manifest_digest
    content_key = open_content_key(content.sealed_key, manifest_digest=digest, recovery_key=keyring.recovery_key)
    return wrap_content_key(content_key, secret, digest, nonce, share.value if share is not None else None)


def verify_decryption(keyring: Keyring, layout: Layout, manifest: Manifest, progress: Callable[[int], object]) -> None:
    """Decrypt every file of a bundle of the owner's own and throw the plaintext away.

    Args:
        keyring: The owner's, opened.
        layout: Verified against `manifest`.
        manifest: Verified.
        progress: Called with the bytes of plaintext done so far.

    Raises:
        DecryptionRefused: A file does not authenticate.
        KeyInvalid: The content key is not here, or another bundle's.
    """
    content = OwnerRecords(keyring.folder).load_content_key(manifest.model.name, manifest.model.version)
    if content.manifest_digest != manifest.digest:
        raise KeyInvalid("the owner's folder has the content key of another bundle of this version")
    content_key = open_content_key(
        content.sealed_key, manifest_digest=manifest.digest, recovery_key=keyring.recovery_key
    )
    done = 0

    def count(view: memoryview) -> None:
        nonlocal done
        done += len(view)
        progress(done)

    for file in manifest.files:
        descriptor = layout.open_blob(file.layer_digest)
        with os.fdopen(descriptor, "rb", buffering=0) as blob:
            decrypt_stream(
                blob.read,
                count,
                content_key=content_key,
                associated_data=associated_data(manifest.model, file.path),
                ciphertext_bytes=file.layer_size,
                plaintext_bytes=file.size,
            )
