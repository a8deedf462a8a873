"""What the store holds for a model on this device: the grant, its boot policy, and the owner's list of revocations.

Each is verified as the model owner's. Admission makes these checks at a start, doctor and `boot-policy diff` before
one: what they tell of a start is what it will find.
"""

from __future__ import annotations

from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.boot_signatures import with_signatures_of_host
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant
from oci_hook.bundle.manifest import Manifest
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.revocations import Revocations
from oci_hook.config import Config
from oci_hook.errors import BootPolicyRefused, KeyRefused, Revoked
from oci_hook.key_errors import LeaseExpired
from oci_hook.provenance import verify_device
from oci_hook.revoked import is_of_device, load_list, verify_generation
from oci_hook.store import Store
from oci_hook.trust import Owner


def verified_grant(manifest: Manifest, owner: Owner, store: Store, device: HostDevice | None) -> Grant:
    """The grant of exactly this manifest to exactly this device.

    Args:
        manifest: Verified.
        owner: Whose it is.
        store: This host's.
        device: This host's enrolment; None: whose grant it is is not looked at.

    Raises:
        InputError: It is missing or malformed.
        GrantRefused: Not this owner's, of another manifest, or for another device.
    """
    grant = verify_grant(parse_grant(store.load_grant(manifest.digest)), owner=owner, manifest=manifest)
    if device is not None:
        verify_device(grant, device)
    return grant


def verified_boot_policy(owner: Owner, grant: Grant, store: Store, config: Config) -> BootPolicy:
    """The boot policy of the grant's model line and device class; its nested forms know this host's signatures.

    Raises:
        InputError: It is missing or malformed.
        BootPolicyRefused: Not this owner's, or of another epoch than the grant.
    """
    line = grant.model.name, grant.device_class
    boot_policy = verify_boot_policy(
        parse_boot_policy(store.load_boot_policy(owner.owner_id, *line)),
        owner=owner,
        model_name=line[0],
        device_class=line[1],
    )
    verify_epoch(boot_policy, grant)
    return with_signatures_of_host(boot_policy, config)


def verify_epoch(boot_policy: BootPolicy, grant: Grant) -> None:
    """Refuse a boot policy and a grant of which the owner withdrew one.

    Raises:
        BootPolicyRefused: They are not of the same epoch: the TPM would not open the one by the other.
    """
    if boot_policy.policy_ref != grant.policy_ref:
        raise BootPolicyRefused(
            f"the boot policy is of epoch {boot_policy.epoch}, the grant is not: the owner withdrew one of them",
            remedy="`sczctl add` the owner's latest boot policy and grant of this model",
        )


def verified_revocations(model: ModelId, owner: Owner, grant: Grant, store: Store) -> Revocations | None:
    """The list of this enrolment, if there is one, which does not name this version's generation.

    Whether it is the latest is told by the counter: `revoked.verify_in_force`.

    Raises:
        RevocationsMissing: There is one that cannot be used.
        GenerationRefused: The owner revoked the version.
    """
    found = load_list(store, owner)
    if found is not None and not is_of_device(found, grant.ak_name, grant.counter.index, grant.counter.name):
        found = None  # of an earlier enrolment: as if there were none, and the counter tells whether one is missing
    verify_generation(found, model)
    return found


def verify_counted(grant: Grant, *, counter: int | None, resets: int, clock_ms: int) -> None:
    """Tell before a start what the TPM itself will say at the release, by what it counts now.

    Args:
        grant: Verified.
        counter: What the owner's counter is at; None: it is gone.
        resets: The TPM's `resetCount`.
        clock_ms: The TPM's `clock`.

    Raises:
        KeyRefused: The counter was deleted.
        Revoked: It has passed the grant's maximum.
        LeaseExpired: The lease allows no boot as late as this one, or no longer.
    """
    if counter is None:
        raise KeyRefused(
            f"the owner's counter at {grant.counter.index:#x} was deleted",
            remedy="enrol again (`sczctl enroll request`), then ask the model's owner for new grants",
        )
    if counter > grant.counter.maximum:
        raise Revoked(f"the owner's counter is {counter}, the grant opens up to {grant.counter.maximum}")
    lease = grant.lease
    if lease is None:
        return
    for what, now, last in (("boots", resets, lease.resets), ("powered-on milliseconds", clock_ms, lease.clock_ms)):
        if last is not None and now > last:
            raise LeaseExpired(f"the TPM counts {now} {what}, the lease allows {last}")
