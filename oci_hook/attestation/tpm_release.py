"""The release of a sealed secret: the steps of its policy, in their order, as the TPM walks them.

The flow alone: each step is a command of `tpm`, which mixes this in. The TPM decides; a wrong order or a left-out step
gives no secret, only another policy digest. Specification: docs/specification.md, "TPM policy"; TPM 2.0 Library,
Part 3, 13.3 (Import), 20.1 (VerifySignature), 23 (policy), 12.7 (Unseal).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Final, Protocol

from oci_hook.attestation.boot_policy import BootForm
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.pcr_signature import SignedPcrs, signer_name, signer_tpm_public, tpm_signature
from oci_hook.attestation.policy import lease_steps
from oci_hook.attestation.sealed import SealedBlob
from oci_hook.attestation.structures import (
    ALG_ECDSA,
    ALG_SHA256,
    Handle,
    ecdsa_signing_public,
    parse_public,
    tpm2b,
)
from oci_hook.attestation.tpm_codes import PcrChangedError
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.errors import BootPolicyRefused, BootStateRefused, DeviceInvalid, KeyRefused, TpmFailed
from oci_hook.jws import PublicJwk, ec_public_key

_ATTEMPTS: Final = 5
_ENROL_AGAIN: Final = "enrol again (`sczctl enroll request`), then ask the model's owner for new grants"


class ReleaseCommands(Protocol):
    """What a release asks of a TPM, and the release."""

    def _find(self, handle: int) -> Handle | None: ...

    def _name(self, handle: Handle) -> bytes: ...

    def _deserialise(self, serialised: bytes) -> Handle: ...

    def _import_sealed(self, srk: Handle, sealed: SealedBlob, handles: ExitStack) -> Handle: ...

    def _verify_signature(self, public: bytes, digest: bytes, signature: bytes, handles: ExitStack) -> object: ...

    def _pinned_session(self, srk: Handle, handles: ExitStack) -> Handle: ...

    def _pcr_read(self, pcrs: Sequence[int]) -> list[bytes]: ...

    def _policy_pcr(self, session: Handle, pcrs: Mapping[int, bytes]) -> None: ...

    def _policy_unseal_only(self, session: Handle) -> None: ...

    def _policy_authorize(
        self, session: Handle, policy: bytes, ref: bytes, key_name: bytes, ticket: object
    ) -> None: ...

    def _policy_nv(self, session: Handle, counter: Handle, maximum: int) -> None: ...

    def _policy_counter_timer(self, session: Handle, place: tuple[int, int], maximum: int) -> None: ...

    def _policy_restart(self, session: Handle) -> None: ...

    def _unseal(self, session: Handle, item: Handle) -> bytes: ...

    def unseal(self, device: HostDevice, asked: Unsealing) -> bytes:
        """Import a sealed secret, satisfy its policy and unseal it.

        Args:
            device: This host's enrolment; the session is salted to its SRK.
            asked: What to unseal, and what its policy names.

        Returns:
            The secret. It crossed the bus encrypted.

        Raises:
            BootStateRefused: The PCRs are not that form's.
            BootPolicyRefused: The owner did not sign that form's policy for this model line, device class and epoch.
            Revoked: The counter has passed the maximum.
            LeaseExpired: The TPM was reset more often, or had power for longer, than the lease allows.
            KeyRefused: The blob is not for this TPM, or is sealed to another policy than this.
        """
        with ExitStack() as handles:
            srk = self._pinned_srk(device)
            item = self._import_sealed(srk, asked.sealed, handles)
            # What does not depend on PCRs comes before PolicyPCR: every extend in between costs another attempt.
            key_name, ticket = self._ticket(asked.form, asked.boot_policy_key, asked.policy_ref, handles)
            counter = self._find(asked.counter_index)
            if counter is None:
                raise KeyRefused(f"the owner's counter at {asked.counter_index:#x} was deleted", remedy=_ENROL_AGAIN)
            session = self._pinned_session(srk, handles)
            for _ in range(_ATTEMPTS):
                try:
                    if asked.form.signed is not None:
                        self._policy_signed_pcrs(session, asked.form.signed)
                    self._policy_pcr(session, asked.form.pcrs)
                    self._policy_unseal_only(session)
                    self._policy_authorize(session, asked.form.policy, asked.policy_ref, key_name, ticket)
                    self._policy_nv(session, counter, asked.counter_maximum)
                    for place, maximum in lease_steps(asked.lease):
                        self._policy_counter_timer(session, place, maximum)
                    return self._unseal(session, item)
                except PcrChangedError:
                    self._policy_restart(session)
        raise TpmFailed("PCRs kept changing while the key was being released")

    def _pinned_srk(self, device: HostDevice) -> Handle:
        """The SRK as enrolled: its public area comes from device.json, nothing is asked of the bus."""
        srk = self._deserialise(device.srk_serialised)
        if self._name(srk) != device.srk.name:
            raise DeviceInvalid("device.json: the serialised SRK is another key than its public area")
        return srk

    def _policy_signed_pcrs(self, session: Handle, signed: SignedPcrs) -> None:
        """Satisfy the nested part: the signer approved the PCRs' values as they are now.

        They are read here, as the boot phases of systemd extend PCR 11 while containers start already.

        Raises:
            BootStateRefused: There is no signature for them.
            PcrChangedError: They changed in between.
        """
        values = dict(zip(signed.pcrs, self._pcr_read(signed.pcrs), strict=True))
        found = signed.signature_for(values)
        if found is None:
            raise BootStateRefused(f"PCR {signed.pcrs[0]}: {signed.what_is_missing}")
        with ExitStack() as handles:  # flushed at once: a TPM need not have more than three slots for objects
            public = tpm2b(signer_tpm_public(signed.key))
            digest = hashlib.sha256(found.policy).digest()
            ticket = self._verify_signature(public, digest, tpm_signature(signed.key, found.signature), handles)
        try:
            self._policy_pcr(session, values)
        except BootStateRefused as cause:
            if dict(zip(signed.pcrs, self._pcr_read(signed.pcrs), strict=True)) != values:
                raise PcrChangedError("the next boot phase began") from cause
            raise
        self._policy_authorize(session, found.policy, b"", signer_name(signed.key), ticket)

    def _ticket(
        self, form: BootForm, boot_policy_key: PublicJwk, policy_ref: bytes, handles: ExitStack
    ) -> tuple[bytes, object]:
        """The signing key's Name, and the TPM's own proof to itself that this key signed the form's policy."""
        raw = ecdsa_signing_public(ec_public_key(boot_policy_key, error=BootPolicyRefused))
        name = parse_public(tpm2b(raw), what="the boot-policy key", error=BootPolicyRefused).name
        algorithms = ALG_ECDSA.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
        signature = algorithms + tpm2b(form.signature_r) + tpm2b(form.signature_s)
        digest = hashlib.sha256(form.policy + policy_ref).digest()
        return name, self._verify_signature(tpm2b(raw), digest, signature, handles)
