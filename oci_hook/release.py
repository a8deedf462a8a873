"""The host's TPM as the hook uses it: evidence for an appraisal, then the release of a content key.

The types keep the order: `appraise_evidence` alone makes an `AttestationResult`, `verify_token` alone an `Identity`,
and `release_key` wants both. What enforces the release is the TPM, by the sealed object's policy; this module asks it
and decides nothing. Each transaction runs in a forked child with a hard deadline, which holds the TPM's lock: whatever
happens to the child, the lock goes with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from oci_hook.attestation.appraisal import AttestationResult, nearest_form
from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.deadline import with_deadline
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import HostDevice
from oci_hook.bundle.grant import Grant, unwrap_content_key
from oci_hook.bundle.segments import ContentKey
from oci_hook.config import Config
from oci_hook.identity.token import Identity
from oci_hook.trust import Owner


@dataclass(frozen=True, slots=True)
class HostTpm:
    """This host's TPM and its enrolment; the configuration names the way to it."""

    config: Config
    device: HostDevice

    def collect_evidence(self, boot_policy: BootPolicy, extra_data: bytes) -> Evidence:
        """Quote the PCRs of the boot policy's form that fits the running system best.

        Args:
            boot_policy: The verified forms.
            extra_data: 32 bytes that bind the quote to this start.

        Raises:
            CouldNotTell: The TPM is away, slow, locked out or faulty.
        """

        def quote() -> bytes:
            from oci_hook.attestation.tpm import open_tpm

            with open_tpm(
                self.config.tpm_tcti, self._lock_file, timeout_seconds=self.config.tpm_timeout_seconds
            ) as tpm:
                wanted = sorted({pcr for form in boot_policy.forms for pcr in form.pcrs})
                values = tpm.read_pcrs(wanted)
                selected = sorted(nearest_form(boot_policy, values).pcrs)
                evidence = tpm.quote(self.device, selected, extra_data)
            pcrs = {str(pcr): value.hex() for pcr, value in evidence.pcrs.items()}
            parts = {"attest": evidence.attest.hex(), "signature": evidence.signature.hex(), "pcrs": pcrs}
            return json.dumps(parts).encode()

        parts = json.loads(with_deadline(quote, self.config.tpm_timeout_seconds))
        return Evidence(
            attest=bytes.fromhex(parts["attest"]),
            signature=bytes.fromhex(parts["signature"]),
            pcrs={int(pcr): bytes.fromhex(value) for pcr, value in parts["pcrs"].items()},
        )

    def unseal(self, grant: Grant, form: BootForm, owner: Owner) -> bytes:
        """The 32-byte secret that the grant's owner sealed to this device.

        Raises:
            Refused: The TPM says no: another boot state, a revoked grant, another device's blob.
            CouldNotTell: The TPM is away, slow, locked out or faulty.
        """

        def unseal() -> bytes:
            from oci_hook.attestation.tpm import open_tpm

            with open_tpm(
                self.config.tpm_tcti, self._lock_file, timeout_seconds=self.config.tpm_timeout_seconds
            ) as tpm:
                return tpm.unseal(
                    self.device,
                    sealed=grant.sealed,
                    form=form,
                    boot_policy_key=owner.boot_policy_key,
                    policy_ref=grant.policy_ref,
                    counter_index=grant.counter.index,
                    counter_maximum=grant.counter.maximum,
                )

        return with_deadline(unseal, self.config.tpm_timeout_seconds)

    @property
    def _lock_file(self) -> str:
        return os.path.join(self.config.runtime_directory, "tpm.lock")


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
