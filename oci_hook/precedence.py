"""Precedence: which of two documents of one place stays, the store's or the one that comes; of verified ones.

An older grant or boot policy must not come back by mistake: it may approve what its owner withdrew. It is refused; but
beside a list of revocations of its owner's it is left out and named, as nothing that concerns one model may keep a
revocation out that concerns others. `intake` verifies what comes, and places what stays. Specification:
docs/specification.md, "Revocations".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.errors import OutputExists, SczError, StoreInvalid
from oci_hook.incoming import DOCUMENT_BYTES
from oci_hook.provenance import find_owner, verify_device
from oci_hook.store import Store
from oci_hook.trust import Owner
from oci_hook.trusted_file import load_file

_NEWEST = "add the newest file of the model's owner; --replace goes back to the older one"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What came beside a list and was not taken, with the words of the error that it would have been alone."""

    what: str
    reason: str
    message: str
    remedy: str

    @classmethod
    def of(cls, what: str, error: SczError, *, remedy: str | None = None) -> LeftOut:
        """For an error's reason."""
        return cls(what, error.reason, error.message, remedy or error.advice)


@dataclass(frozen=True, slots=True)
class Settled:
    """What is to be placed, in that order: the last of several for one place stays."""

    grants: tuple[tuple[Grant, bytes], ...]
    policies: tuple[tuple[BootPolicy, bytes], ...]
    left_out: tuple[LeftOut, ...]


def words(document: Grant | BootPolicy) -> str:
    """A grant or boot policy, for people."""
    if isinstance(document, Grant):
        return f"grant for {document.model.name}:{document.model.version} to {document.device_name}"
    return f"boot policy for {document.model_name}, device class {document.device_class}"


def verified_policy(data: bytes, owners: Sequence[Owner]) -> BootPolicy:
    """A boot policy by a trusted owner, for the model line and device class that it names itself.

    Raises:
        OwnerUntrusted: By nobody whom this host trusts.
        BootPolicyInvalid, BootPolicyRefused: Malformed, or not that owner's.
    """
    unverified = parse_boot_policy(data)
    return verify_boot_policy(
        unverified,
        owner=find_owner(unverified.unverified_owner_id, owners),
        model_name=unverified.unverified_model_name,
        device_class=unverified.unverified_device_class,
    )


class Precedence:
    """The comparison with one store; to be repeated under its lock, as another `add` may be faster.

    Args:
        store: This host's.
        owners: Whom it trusts.
        device: Its enrolment; None: it has none, and no grant comes.
        lists: The value of the list that comes, of each owner of whom one does.
        replace: Whether older documents are wanted.
    """

    def __init__(
        self,
        store: Store,
        owners: Sequence[Owner],
        device: HostDevice | None,
        lists: Mapping[str, int],
        *,
        replace: bool = False,
    ) -> None:
        self._store = store
        self._owners = owners
        self._device = device
        self._lists = lists
        self._replace = replace

    def settle(self, grants: Sequence[tuple[Grant, bytes]], policies: Sequence[tuple[BootPolicy, bytes]]) -> Settled:
        """Say which of the verified documents are to be placed.

        Raises:
            OutputExists: The store has a newer one, and no list of that owner's comes.
        """
        left_out: list[LeftOut] = []
        taken_grants = [each for each in grants if self._is_taken(each[0], self._stays_grant(each[0]), left_out)]
        taken_policies = [each for each in policies if self._is_taken(each[0], self._stays_policy(each[0]), left_out)]
        # What the list locks goes first, as the last one stays; else the newest does.
        taken_grants.sort(key=lambda each: (self._opens(each[0]), each[0].created))
        taken_policies.sort(key=lambda each: (self._epoch(each[0]), each[0].created))
        return Settled(tuple(taken_grants), tuple(taken_policies), tuple(left_out))

    def _is_taken(self, document: Grant | BootPolicy, stays: str | None, left_out: list[LeftOut]) -> bool:
        """Whether a document is placed; `stays` is the file in the store that is to stay instead."""
        if stays is None:
            return True
        older = OutputExists(
            f"{os.path.basename(stays)} in the store is newer than what is to be added", remedy=_NEWEST
        )
        if document.owner_id not in self._lists:
            raise older
        left_out.append(LeftOut.of(words(document), older, remedy="none is needed: the newer one stays"))
        return False

    def _stays_grant(self, grant: Grant) -> str | None:
        path = self._store.grant_path(grant.manifest_digest)
        try:
            unverified = parse_grant(self._load(path))
            stored = verify_grant_signature(unverified, owner=find_owner(unverified.owner_id, self._owners))
        except SczError:
            return None  # none there; or damaged, or by an owner who is trusted no longer: nothing to keep
        if self._replace or grant.created >= stored.created or (self._opens(grant) and not self._opens(stored)):
            return None
        return path

    def _stays_policy(self, policy: BootPolicy) -> str | None:
        path = self._store.boot_policy_path(policy.owner_id, policy.model_name, policy.device_class)
        try:
            stored = verified_policy(self._load(path), self._owners)
        except SczError:
            return None
        if self._replace or policy.created >= stored.created or self._epoch(policy) > self._epoch(stored):
            return None
        return path

    def _load(self, path: str) -> bytes:
        return load_file(path, limit_bytes=DOCUMENT_BYTES, error=StoreInvalid)

    def _opens(self, grant: Grant) -> bool:
        """Whether a grant opens after the list that comes was applied; True if none comes."""
        if grant.owner_id not in self._lists or self._device is None:
            return True
        try:
            verify_device(grant, self._device)
        except SczError:
            return False  # it is of an earlier enrolment
        return grant.counter.maximum >= self._lists[grant.owner_id]

    def _epoch(self, policy: BootPolicy) -> int:
        """A policy's epoch, if it counts: beside a list, that of a withdrawn one must not stay."""
        return policy.epoch if policy.owner_id in self._lists else 0
