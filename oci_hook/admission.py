"""Admission: the checks between an annotation and a content key, in their order. Nothing becomes visible here.

    request ─► bundle ─► manifest ─► grant ─► boot policy ─► token ─► identity ─► evidence ─► result ─► key

The same for every entry point (hook, shim, podman's precreate, NRI, `sczctl exec`). Annotations select; what is
allowed is the model owner's, signed. Each numbered check raises under a code of its own (`errors.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oci_hook.attestation.appraisal import AttestationResult, appraise_evidence
from oci_hook.attestation.boot_policy import BootForm, BootPolicy
from oci_hook.attestation.deadline import Standby
from oci_hook.attestation.evidence import Evidence, qualifying_data
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.kept_evidence import StartEvidence
from oci_hook.audit import AuditLog
from oci_hook.broker import ContainerAtBroker
from oci_hook.bundle.grant import Grant
from oci_hook.bundle.layout import Layout, verify_digests
from oci_hook.bundle.manifest import Manifest, model_document
from oci_hook.bundle.segments import ContentKey
from oci_hook.config import Config
from oci_hook.delivery.deliver import ModelDelivery
from oci_hook.errors import AccessWindowRefused, ClockRefused, RequirementRefused
from oci_hook.granted import verified_boot_policy, verified_grant, verified_revocations
from oci_hook.identity.binding import Bindings, verify_pod_binding
from oci_hook.identity.sources import TokenFile
from oci_hook.identity.token import Identity, verify_token
from oci_hook.oci.annotations import ModelRequest
from oci_hook.provenance import SignedBundle
from oci_hook.release import HostTpm, Patience, release_key
from oci_hook.revoked import verify_in_force
from oci_hook.store import Store
from oci_hook.trust import Issuer, Owner


@dataclass(frozen=True, slots=True)
class Container:
    """What admission knows of the container that asks."""

    container_id: str
    bundle: str
    pid: int
    start_time: int
    runtime: str
    pod_uid: str | None
    token: TokenFile


@dataclass(frozen=True, slots=True)
class Host:
    """What admission knows of the host: all of it root's.

    `standby` was forked for the TPM's transactions, if any; `patience` is for one start.
    """

    config: Config
    store: Store
    owners: Sequence[Owner]
    issuers: Sequence[Issuer]
    device: HostDevice
    audit: AuditLog
    bindings: Bindings
    clock: Callable[[], float]
    random: Callable[[int], bytes]
    store_is_shared: bool = False
    standby: Standby | None = None
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True)
class Admission:
    """One model that one container may have: made by `admit` alone, used by the delivery, then gone.

    `evidence` is what was appraised, for others to look at. `tee` says what a TEE's report had to do with it: `sev-snp`
    was appraised, `sev_guest (not appraised)` was there.
    """

    request: ModelRequest
    manifest: Manifest
    layout: Layout
    identity: Identity
    content_key: ContentKey
    audit_head: bytes
    evidence: StartEvidence
    tee: str = ""

    def delivery(self) -> ModelDelivery:
        """What the delivery needs of it."""
        return ModelDelivery(
            slot=self.request.slot,
            destination=self.request.destination,
            manifest=self.manifest,
            layout=self.layout,
            content_key=self.content_key,
            document=model_document(self.manifest),
        )


def admit(request: ModelRequest, bundle: SignedBundle, container: Container, host: Host) -> Admission:
    """Run every check for one model.

    Args:
        request: What the annotations ask for.
        bundle: The model's, signed by an owner whom this host trusts; it stays the caller's.
        container: Who asks.
        host: Where.

    Returns:
        The admission, which holds the content key.

    Raises:
        InputError: Something that we were given cannot be used.
        Refused: A check was made and failed.
        CouldNotTell: A check could not be made.
    """
    # 1. The time is not behind the last decision, but for the leeway: an expired token must not come back to life. The
    #    head is read first: another start may add a record meanwhile.
    head = host.audit.head()
    now = host.clock()
    _verify_clock(now, head.seconds, host.config)
    # 2. An owner whom this host trusts signed the manifest, and the bundle is what it describes: `verify_signed`.
    layout, manifest, owner = bundle.layout, bundle.manifest, bundle.owner
    # 3. The owner allows the model at this date, under this runtime; the container's own requirements hold.
    _verify_access_window(manifest, now)
    _verify_runtime(manifest, request, container.runtime)
    # 4. The owner granted exactly this manifest to exactly this device.
    grant = verified_grant(manifest, owner, host.store, host.device)
    # 5. The owner signed a boot policy for this model line and device class.
    boot_policy = verified_boot_policy(owner, grant, host.store, host.config)
    #    Nor has the owner revoked this version: the list says so, the counter beside the quote that it is the latest.
    revocations = verified_revocations(manifest.model, owner, grant, host.store)
    # 6. The container's token is by a trusted issuer, fresh, and names a workload of the access policy.
    identity = verify_token(
        container.token.data,
        issuers=host.issuers,
        access=manifest.access,
        now=now,
        leeway_seconds=host.config.token_leeway_seconds,
    )
    # 7. The token is this container's own: its pod's, or not another live container's.
    _verify_binding(identity, container, host)
    # 8. A bundle in the image was never looked at by `sczctl add`, and a guest's store may be a share that its host
    #    writes: it holds the very bytes that the owner signed.
    if request.reference.rootfs_path is not None or host.store_is_shared:
        verify_digests(layout, manifest, lambda _done: None)
    # 9. The TPM vouches, for this start alone, that the machine is in a state of that boot policy.
    tpm = HostTpm(host.config, host.device, host.standby, host.patience)
    asked = _Asked(manifest, grant, boot_policy, identity, container.container_id, int(now), head.digest)
    result, evidence = _attest(asked, tpm, host)
    verify_in_force(revocations, evidence.quote.counter, host.device.counter_values.get(owner.owner_id))
    # 10. The TPM itself, by the sealed object's policy, releases the key; if the owner wants two shares, the broker
    #     gives the other against the container's token.
    broker = ContainerAtBroker(host.config, container.token.data, host.standby)
    content_key = release_key(result, identity, tpm=tpm, broker=broker, grant=grant, owner=owner)
    return Admission(
        request, manifest, layout, identity, content_key, head.digest, evidence, _tee_of(evidence.quote, result)
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an attestation is about; times in seconds since 1970, the audit log's head 32 bytes."""

    manifest: Manifest
    grant: Grant
    boot_policy: BootPolicy
    identity: Identity
    container_id: str
    now: int
    audit_head: bytes


def _attest(asked: _Asked, tpm: HostTpm, host: Host) -> tuple[AttestationResult, StartEvidence]:
    """Quote and appraise; the result, and what it rests on, for others to look at."""
    manifest, token_hash, nonce = asked.manifest, asked.identity.token_hash, host.random(32)
    extra_data = qualifying_data(nonce, token_hash, asked.container_id, manifest.digest, asked.audit_head)
    # So does the hardware of a TEE for its guest, where there is one; the owner may insist.
    wanted = manifest.access.tee
    quote = tpm.add_tee_report(
        tpm.collect_evidence(asked.boot_policy, extra_data, asked.grant.counter.index),
        extra_data,
        required=wanted is not None,
    )
    result = appraise_evidence(
        quote,
        ak=host.device.ak,
        expected_extra_data=extra_data,
        boot_policy=asked.boot_policy,
        tee=tpm.tee_expectation(wanted, asked.now),
    )
    # 9a. If the owner wants that, a remote verifier says so, too. This host asks it about itself: a diagnosis.
    remote = manifest.access.appraisal
    if remote is not None:
        _appraise_remotely(quote, extra_data, host)
    evidence = StartEvidence(
        model_name=manifest.model.name,
        model_version=manifest.model.version,
        manifest_digest=manifest.digest,
        owner_id=manifest.owner_id,
        device_name=asked.grant.device_name,
        device_class=asked.grant.device_class,
        created=asked.now,
        nonce=nonce,
        token_hash=token_hash,
        audit_head=asked.audit_head,
        form_policy=result.form.policy,
        quote=quote,
        ak=host.device.ak,
        pcr_signature=_pcr_signature(result.form, quote),
        remote=remote,
    )
    return result, evidence


def _pcr_signature(form: BootForm, quote: Evidence) -> bytes | None:
    found = form.signed.signature_for(quote.pcrs) if form.signed is not None else None
    return None if found is None else found.signature


def _tee_of(evidence: Evidence, result: AttestationResult) -> str:
    if result.tee is not None:
        return result.tee.kind
    return f"{evidence.tee.provider} (not appraised)" if evidence.tee is not None else ""


def _appraise_remotely(quote: Evidence, extra_data: bytes, host: Host) -> None:
    """Ask Keylime's verifier; the values of the quote are approved ones by now, so they are the reference values."""
    from oci_hook.remote_appraisal import ask_keylime, host_verifier  # no other start pays for HTTP and TLS

    ask_keylime(
        host_verifier(host.config),
        quote,
        ak=host.device.ak,
        extra_data=extra_data,
        reference=quote.pcrs,
        timeout_seconds=host.config.keylime_timeout_seconds,
    )


def _verify_clock(now: float, last: float, config: Config) -> None:
    if now < last - config.token_leeway_seconds:
        raise ClockRefused(f"the clock is {last - now:.0f} s behind the last record of {config.audit_file}")


def _verify_access_window(manifest: Manifest, now: float) -> None:
    access = manifest.access
    if access.not_before is not None and now < access.not_before:
        raise AccessWindowRefused("the access policy does not allow the model yet")
    if access.not_after is not None and now >= access.not_after:
        raise AccessWindowRefused("the access policy no longer allows the model")


def _verify_runtime(manifest: Manifest, request: ModelRequest, runtime: str) -> None:
    """`noswap` and `private` hold for every delivery of this version: no memory of ours swaps, no copy is shared."""
    allowed = manifest.access.runtimes
    if allowed and runtime not in allowed:
        raise RequirementRefused(f"the access policy allows the runtimes {', '.join(allowed)}, this is {runtime}")
    required = request.requirements.runtime
    if required is not None and runtime != required:
        raise RequirementRefused(f"smm.scz/require asks for runtime={required}, this is {runtime}")


def _verify_binding(identity: Identity, container: Container, host: Host) -> None:
    if identity.issuer.kind == "kubernetes":
        verify_pod_binding(identity, container.token.host_path, container.pod_uid)
    else:
        host.bindings.bind_token(
            identity, container.container_id, container.bundle, container.pid, container.start_time
        )
