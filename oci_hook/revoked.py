"""What a model's owner has revoked on this host: the list, whether it is the one in force, who still holds a model.

The list is this host's memory of what was revoked, the TPM's counter the proof that none was taken away: a list that is
missing, older or not yet applied is told from the counter's value, and refuses. What the TPM enforces is the grants'
maximum alone; the checks here give the reason, and catch a store that was put back. Specification:
docs/specification.md, "Revocations"; ADR 19.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.attestation.device_record import COUNT_LIMIT
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.structures import NvPublic
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.revocations import Revocations, parse_revocations, verify_revocations
from oci_hook.config import Config
from oci_hook.errors import DeviceNotEnrolled, SczError
from oci_hook.key_errors import GenerationRefused, RevocationsMissing
from oci_hook.provenance import find_owner
from oci_hook.records import ContainerRecord
from oci_hook.store import Store
from oci_hook.trust import Owner
from oci_hook.trusted_file import make_private_directory

_REVOKE_AGAIN = (
    "let the model's owner enrol this device again, as its records are behind (from a backup?), then revoke again: a "
    "new list counts further"
)


class Counting(Protocol):
    """The owners' counters in this host's TPM, for whoever applies a list."""

    def value(self, counter: NvPublic) -> int:
        """What a counter is at."""

    def raise_to(self, counter: NvPublic, value: int) -> int:
        """Count it up to a value, if it is below; returns what it is at then."""


class TpmCounting:
    """`Counting` by this host's TPM, in this process: whoever applies a list is at a terminal and can interrupt it."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def value(self, counter: NvPublic) -> int:
        """What a counter is at: counting up to nothing changes nothing."""
        return self.raise_to(counter, 0)

    def raise_to(self, counter: NvPublic, value: int) -> int:
        """Count it up to a value, if it is below; returns what it is at then.

        Raises:
            DeviceNotEnrolled: It was deleted.
            DeviceInvalid: The value is too far above.
            CouldNotTell: The TPM is away, busy or faulty; what was counted stays.
        """
        from oci_hook.attestation.tpm import open_tpm

        config = self._config
        make_private_directory(config.runtime_directory)
        lock = os.path.join(config.runtime_directory, "tpm.lock")
        with open_tpm(config.tpm_tcti, lock, timeout_seconds=config.tpm_timeout_seconds) as tpm:
            return tpm.raise_counter(counter, value)


# --- the hook's checks ------------------------------------------------------------------------------------------------


def load_list(store: Store, owner: Owner) -> Revocations | None:
    """The owner's list in the store, verified as its owner's; None: there is none.

    Raises:
        RevocationsMissing: There is one that cannot be used.
    """
    data = store.load_revocations(owner.owner_id)
    return None if data is None else verify_revocations(parse_revocations(data), owner=owner)


def is_of_device(revocations: Revocations, ak_name: bytes, index: int, counter_name: bytes) -> bool:
    """Whether a list is for the device and counter with these Names; else it is of an enrolment that is no more."""
    of_list = revocations.ak_name, revocations.counter_index, revocations.counter_name
    return of_list == (ak_name, index, counter_name)


def verify_generation(revocations: Revocations | None, model: ModelId) -> None:
    """Refuse a version that the owner revoked with its generation.

    Raises:
        GenerationRefused: Its generation is below the line's lowest.
    """
    lowest = 1 if revocations is None else revocations.lowest_generation(model.name)
    if model.generation < lowest:
        raise GenerationRefused(
            f"{model.name}:{model.version} is generation {model.generation}, the owner allows {lowest} and later"
        )


def verify_in_force(revocations: Revocations | None, counter: int | None, enrolled: int | None) -> None:
    """Check that the list at hand is the one that the device's counter asks for.

    Args:
        revocations: Of this device; None: there is none.
        counter: The owner's counter now; None: it is gone, which the release says better.
        enrolled: Its value at the enrolment; None: an earlier version did not keep it.

    Raises:
        RevocationsMissing: A list that was applied is gone or was put back, or one was not applied to its end.
    """
    if counter is None or counter == (revocations.value if revocations else enrolled):
        return
    if revocations is None:
        if enrolled is not None:
            raise RevocationsMissing(
                f"the owner's counter is {counter}, it was {enrolled} at the enrolment, and no list is here"
            )
    elif counter < revocations.value:
        raise RevocationsMissing(
            f"the list of revocations was not applied to its end: the counter is {counter} of {revocations.value}",
            remedy="`sczctl add` the same folder again: it goes on where it was interrupted",
        )
    elif counter != enrolled:  # a list from before the last enrolment is as good as none was then
        raise RevocationsMissing(
            f"the list of revocations is for {revocations.value}, the owner's counter is {counter}: it is an older one"
        )


# --- applying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IncomingList:
    """A list that may be applied, with its bytes, its owner's counter, and what counts that."""

    revocations: Revocations
    compact: bytes
    counter: NvPublic
    counting: Counting

    def count_up(self) -> None:
        """Put the list in force, for good; see `Counting.raise_to`."""
        self.counting.raise_to(self.counter, self.revocations.value)


def verify_incoming(
    lists: Sequence[bytes], store: Store, owners: Sequence[Owner], device: HostDevice | None, counting: Counting | None
) -> list[IncomingList]:
    """Verify lists before they are placed: a trusted owner's, for this device, none older than what is in force.

    Returns:
        The lists in the order in which they are to be placed, the newest of an owner last.

    Raises:
        OwnerUntrusted: By nobody whom this host trusts.
        DeviceNotEnrolled: This host is not enrolled.
        RevocationsMissing: Not for this device; an older one than is here, or than the counter is at; not the one that
            was applied for this value; or the counter cannot be counted that far.
    """
    found: list[IncomingList] = []
    for compact in lists:
        unverified = parse_revocations(compact)
        owner = find_owner(unverified.owner_id, owners)
        revocations = verify_revocations(unverified, owner=owner)
        counter = device.counters.get(owner.owner_id) if device is not None else None
        if device is None or counter is None or counting is None:
            raise DeviceNotEnrolled(f"this host is not enrolled with {owner.name}, whose list of revocations this is")
        if not is_of_device(revocations, device.ak.name, counter.index, counter.name):
            raise RevocationsMissing(
                f"the list of revocations is for the device {revocations.device_name}, whose keys are not this one's",
                remedy="`sczctl add` the folder that the owner made for this device",
            )
        now = counting.value(counter)
        _verify_within_reach(revocations, now)
        _verify_newer(revocations, compact, _stored(store, owner), now, device.counter_values.get(owner.owner_id))
        _verify_alone(revocations, compact, found)
        found.append(IncomingList(revocations, compact, counter, counting))
    return sorted(found, key=lambda each: (each.revocations.value, each.revocations.created))


def _stored(store: Store, owner: Owner) -> tuple[Revocations, bytes] | None:
    """The owner's list that is here, and its bytes; None also if it is damaged: the list that comes takes its place."""
    try:
        data = store.load_revocations(owner.owner_id)
        return None if data is None else (verify_revocations(parse_revocations(data), owner=owner), data)
    except SczError:
        return None


def _verify_within_reach(revocations: Revocations, counter: int) -> None:
    """What is placed but cannot be counted would lock everything of its owner, and every later list with it."""
    if revocations.value - counter > COUNT_LIMIT:
        raise RevocationsMissing(
            f"the list of revocations is for {revocations.value}, the owner's counter is {counter}: it is counted up "
            f"by at most {COUNT_LIMIT}",
            remedy="`sczctl add` the folders that came before it, the oldest first: each counts a part of the way",
        )


def _verify_newer(
    revocations: Revocations,
    compact: bytes,
    stored: tuple[Revocations, bytes] | None,
    counter: int,
    enrolled: int | None,
) -> None:
    """Refuse what locks nothing: a list whose value was reached, but for the very one that reached it.

    Two lists of one value are made by an owner whose records went back, as from a backup: the grants that the second
    one locks would go on opening.
    """
    if revocations.value < counter:
        raise RevocationsMissing(
            f"the list of revocations is for {revocations.value}, the owner's counter is {counter}: it is an older one"
        )
    of_device = revocations.ak_name, revocations.counter_index, revocations.counter_name
    if stored is None or not is_of_device(stored[0], *of_device):
        if revocations.value == counter == enrolled:
            raise RevocationsMissing(
                f"the list of revocations is for {counter}, where the owner's counter was at the enrolment: it would "
                "lock nothing",
                remedy="add what came with it without the list; if it is to lock something, " + _REVOKE_AGAIN,
            )
        return  # the list that was applied is gone or damaged: this one takes its place
    here, here_compact = stored
    if revocations.value == here.value and compact != here_compact:
        raise RevocationsMissing(
            f"the list of revocations is another one than the store's for the same value {here.value}: it would lock "
            "nothing more",
            remedy=_REVOKE_AGAIN,
        )
    if revocations.value < here.value:
        raise RevocationsMissing(
            f"the list of revocations in the store is newer (for {here.value}, this one for {revocations.value})"
        )


def _verify_alone(revocations: Revocations, compact: bytes, others: Sequence[IncomingList]) -> None:
    """The same among lists that come together."""
    for other in others:
        of_one_value = revocations.owner_id, revocations.value
        if of_one_value == (other.revocations.owner_id, other.revocations.value) and compact != other.compact:
            raise RevocationsMissing(
                f"two different lists of revocations are for the same value {revocations.value}", remedy=_REVOKE_AGAIN
            )


# --- who still holds a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holder:
    """A running container with a model that it would not be given now, and why; its mount goes on."""

    container_id: str
    pid: int
    model: str
    owner_id: str
    reason: str


def live_holders(store: Store, owners: Iterable[Owner], records: Sequence[ContainerRecord]) -> list[Holder]:
    """The running containers whose models were revoked since, by what the store holds now; no TPM is asked.

    Args:
        store: This host's.
        owners: Whom it trusts; models of others are left out.
        records: Of the containers that run.
    """
    known = {owner.owner_id: owner for owner in owners}
    found = []
    for record in records:
        for index, model in enumerate(record.models):
            owner = known.get(record.held[index].owner) if index < len(record.held) else None
            if owner is None or record.is_released(index):
                continue
            reason = _reason(store, owner, record.manifests[index])
            if reason is not None:
                found.append(Holder(record.container_id, record.pid, model, owner.owner_id, reason))
    return found


def _reason(store: Store, owner: Owner, manifest_digest: str) -> str | None:
    """Why a model would be refused now, in one word of the documents that it is started by; None: it would not."""
    try:
        revocations = load_list(store, owner)
        if revocations is None:
            return None
        if not store.has_grant(manifest_digest):
            return "no grant"
        grant = verify_grant_signature(parse_grant(store.load_grant(manifest_digest)), owner=owner)
        # A list of an earlier enrolment is as if there were none, as at a start.
        if is_of_device(revocations, grant.ak_name, grant.counter.index, grant.counter.name):
            if grant.counter.maximum < revocations.value:
                return "revoked grant"
            verify_generation(revocations, grant.model)
        return None if _has_its_boot_policy(store, owner, grant) else "withdrawn boot policy"
    except GenerationRefused:
        return "revoked generation"
    except SczError as error:
        return error.reason


def _has_its_boot_policy(store: Store, owner: Owner, grant: Grant) -> bool:
    data = store.load_boot_policy(owner.owner_id, grant.model.name, grant.device_class)
    policy = verify_boot_policy(
        parse_boot_policy(data), owner=owner, model_name=grant.model.name, device_class=grant.device_class
    )
    return policy.policy_ref == grant.policy_ref
