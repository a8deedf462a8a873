"""The host's TPM as the hook uses it: evidence for an appraisal, then the release of a content key.

The types keep the order: `appraise_evidence` alone makes an `AttestationResult`, `verify_token` alone an `Identity`,
and `release_key` wants both. What enforces the release is the TPM, by the sealed object's policy; this module asks it
and decides nothing. Each transaction runs in a forked process with a hard deadline, which holds the TPM's lock:
whatever happens to it, the lock goes with it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from oci_hook.attestation.appraisal import AttestationResult
from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.deadline import Standby, with_deadline
from oci_hook.attestation.evidence import Evidence, tee_report_data
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.transactions import quote_request, read_quote, tee_request, unseal_request
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.broker import ContainerAtBroker
from oci_hook.bundle.grant import Grant, unwrap_content_key
from oci_hook.bundle.segments import ContentKey
from oci_hook.config import Config
from oci_hook.errors import TpmTimeout
from oci_hook.identity.token import Identity
from oci_hook.key_errors import TeeUnavailable
from oci_hook.standby import transaction
from oci_hook.tee_policy import TeePolicy
from oci_hook.trust import Owner

if TYPE_CHECKING:
    from oci_hook.attestation.tee import TeeExpectation

_UNASKED_TEE_SECONDS = 2.0  # a report that no owner asks for keeps no start waiting for longer, whatever its models
_TEE_MARGIN_SECONDS = 5.0  # the report's own deadline comes first, and leaves the process that serves requests alive


@dataclass(slots=True)
class Patience:
    """Whether a start still waits for a report that no owner asks for: once none came, its other models do not."""

    is_left: bool = True


@dataclass(frozen=True, slots=True)
class HostTpm:
    """This host's TPM and its enrolment; the configuration names the way to it.

    `standby` is a child that was forked for its transactions before; None, or after it ended: each forks its own.
    `patience` is that of the start.
    """

    config: Config
    device: HostDevice
    standby: Standby | None = None
    patience: Patience = field(default_factory=Patience)

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

    def add_tee_report(self, evidence: Evidence, extra_data: bytes, *, required: bool) -> Evidence:
        """Let a TEE's report over the same data and this quote join the evidence, where the machine can make one.

        Args:
            evidence: A quote for this start.
            extra_data: The 32 bytes that bind it to this start.
            required: Whether the model's owner asks for a report; else none is as good as one, and soon enough.

        Raises:
            TeeUnavailable: It is required, and there is none.
        """
        directory = self.config.tsm_directory
        if not os.path.isdir(directory) or not (required or self.patience.is_left):
            return evidence
        from oci_hook.attestation.tee_collection import read_tee_report, report_if_soon

        seconds = self.config.tpm_timeout_seconds
        data = tee_report_data(extra_data, evidence.quote_digest)
        if not required:
            let_go = self.standby.end if self.standby is not None else lambda: None
            report = report_if_soon(directory, data, min(seconds, _UNASKED_TEE_SECONDS), let_go)
            self.patience.is_left = report is not None
            return replace(evidence, tee=report)
        try:
            answer = self._ask(tee_request(directory, data, seconds), seconds + _TEE_MARGIN_SECONDS)
            return replace(evidence, tee=read_tee_report(answer))
        except TpmTimeout as cause:
            raise TeeUnavailable("configfs-tsm does not answer") from cause

    def tee_expectation(self, policy: TeePolicy | None, now: float) -> TeeExpectation | None:
        """What a TEE's report is held against; None: the model's owner asks for none.

        Args:
            policy: Of the access policy.
            now: Seconds since 1970.

        Raises:
            TeeUnavailable: A certificate that is kept here cannot be used.
        """
        if policy is None:
            return None
        from oci_hook.attestation.tee import TeeExpectation
        from oci_hook.attestation.tee_collection import load_certificates

        kept = load_certificates(os.path.join(self.config.store_directory, "tee"))
        return TeeExpectation(policy, kept, datetime.fromtimestamp(now, UTC))

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

    def _ask(self, request: bytes, seconds: float | None = None) -> bytes:
        seconds = self.config.tpm_timeout_seconds if seconds is None else seconds
        if self.standby is not None and self.standby.is_there:
            return self.standby.ask(request, seconds)
        perform = transaction(self.config)
        return with_deadline(lambda: perform(request), seconds)


def release_key(
    result: AttestationResult,
    identity: Identity,
    *,
    tpm: HostTpm,
    broker: ContainerAtBroker,
    grant: Grant,
    owner: Owner,
) -> ContentKey:
    """Let the TPM release the grant's secret, and the broker its share if the grant has one; open the key with them.

    Args:
        result: What the appraisal of this start's quote proved.
        identity: What the verification of this container's token proved; it is not used, it is required.
        tpm: The host's TPM.
        broker: With the token whose identity this is; it is asked after the TPM, and only for a grant with a share.
        grant: Verified, for this device and the manifest whose identity and evidence these are.
        owner: The grant's owner.

    Raises:
        Refused: The TPM, the broker, or the grant's wrapping, says no.
        CouldNotTell: The TPM or the broker gave no answer.
        ConfigInvalid: The grant has a share of a broker, and the configuration names none.
    """
    del identity
    with ExitStack() as stack:
        request = broker.begin(grant)
        if request is not None:
            stack.enter_context(request)
        secret = tpm.unseal(grant, result.form, owner)
        share = request.result() if request is not None else None
    return unwrap_content_key(grant.wrapped_key, secret, grant.manifest_digest, share)
