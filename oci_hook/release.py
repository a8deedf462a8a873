"""The host's TPM as the hook uses it: evidence for an appraisal, then the release of a content key.

The types keep the order: `appraise_evidence` alone makes an `AttestationResult`, `verify_token` alone an `Identity`,
and `release_key` wants both. What enforces the release is the TPM, by the sealed object's policy; this module asks it
and decides nothing. Each transaction runs in a forked process with a hard deadline, which holds the TPM's lock:
whatever happens to it, the lock goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from oci_hook.attestation.appraisal import AttestationResult
from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.deadline import Standby, with_deadline
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.transactions import quote_request, read_quote, unseal_request
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.bundle.grant import Grant, unwrap_content_key
from oci_hook.bundle.segments import ContentKey
from oci_hook.config import Config
from oci_hook.identity.token import Identity
from oci_hook.standby import transaction
from oci_hook.trust import Owner


@dataclass(frozen=True, slots=True)
class HostTpm:
    """This host's TPM and its enrolment; the configuration names the way to it.

    `standby` is a child that was forked for its transactions before; None: each forks its own.
    """

    config: Config
    device: HostDevice
    standby: Standby | None = None

    def collect_evidence(self, boot_policy: BootPolicy, extra_data: bytes, counter_index: int) -> Evidence:
        """Quote the PCRs of the boot policy's form that fits the running system best.

        Args:
            boot_policy: The verified forms.
            extra_data: 32 bytes that bind the quote to this start.
            counter_index: Of the owner's counter, which is read beside it.

        Raises:
            CouldNotTell: The TPM is away, slow, locked out or faulty.
        """
        return read_quote(self._ask(quote_request(self.device, boot_policy.forms, extra_data, counter_index)))

    def unseal(self, grant: Grant, form: BootForm, owner: Owner) -> bytes:
        """The 32-byte secret that the grant's owner sealed to this device.

        Raises:
            Refused: The TPM says no: another boot state, a revoked grant, a lease that ended, another device's blob.
            CouldNotTell: The TPM is away, slow, locked out or faulty.
        """
        asked = Unsealing(
            sealed=grant.sealed,
            form=form,
            boot_policy_key=owner.boot_policy_key,
            policy_ref=grant.policy_ref,
            counter_index=grant.counter.index,
            counter_maximum=grant.counter.maximum,
            lease=grant.lease,
        )
        return self._ask(unseal_request(self.device, asked))

    def _ask(self, request: bytes) -> bytes:
        seconds = self.config.tpm_timeout_seconds
        if self.standby is not None:
            return self.standby.ask(request, seconds)
        perform = transaction(self.config)
        return with_deadline(lambda: perform(request), seconds)


def release_key(
    result: AttestationResult, identity: Identity, *, tpm: HostTpm, grant: Grant, owner: Owner
) -> ContentKey:
    """Let the TPM release the grant's secret and open the content key with it.

    Args:
        result: What the appraisal of this start's quote proved.
        identity: What the verification of this container's token proved; it is not used, it is required.
        tpm: The host's TPM.
        grant: Verified, for this device and the manifest whose identity and evidence these are.
        owner: The grant's owner.

    Raises:
        Refused: The TPM, or the grant's wrapping, says no.
        CouldNotTell: The TPM gave no answer.
    """
    del identity
    return unwrap_content_key(grant.wrapped_key, tpm.unseal(grant, result.form, owner), grant.manifest_digest)
