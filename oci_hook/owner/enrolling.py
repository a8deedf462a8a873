"""The owner's side of enrolments, one or many: request to challenge, answer to record, beside what is enrolled already.

The checks are `attestation.enrolment`'s; what is added here are the names: a name that is taken belongs to one TPM, and
a TPM has one name, one AK and one counter. What the owner replaces all the same is set aside (`former`), as its grants
would else be forgotten, and not be revoked. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from oci_hook.attestation.device_record import DeviceRecord, format_device_record
from oci_hook.attestation.ek_chain import CaCertificates
from oci_hook.attestation.ek_list import EkList
from oci_hook.attestation.enrolment import (
    SECRET_BYTES,
    VerifiedRequest,
    VouchedEk,
    make_challenge,
    verify_answer,
    verify_request,
)
from oci_hook.attestation.enrolment_documents import Answer, Pending, Request, format_pending, parse_pending
from oci_hook.attestation.tpm import make_credential
from oci_hook.errors import DeviceInvalid, EnrolmentRefused
from oci_hook.owner.former import FormerRecords
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.revoking import enrolled_again
from oci_hook.owner.tpms import ByCounter, KnownTpms, TpmKey, is_of_one_place, keys_of, tpm_keys

DEFAULT_CLASS = "default"
_NEW, _KNOWN, _REPLACED, _RENAMED = "new device", "known device", "replaced device", "renamed device"
_UNREVOKED = "unrevoked device"


@dataclass(frozen=True, slots=True)
class Vouchers:
    """Whom an owner believes that an EK is a TPM's: makers' authorities, a list of EKs, or both."""

    authorities: CaCertificates | None
    ek_list: EkList | None


@dataclass(frozen=True, slots=True)
class Challenged:
    """A challenge that was made: for the host, for the owner, and what a person is told.

    `state` is what the device is to the owner: a new, known, replaced, renamed or unrevoked device.
    """

    document: bytes
    pending: Pending
    ek: VouchedEk
    state: str


class Enroller:
    """Makes challenges and takes answers for one owner.

    Args:
        records: The owner's.
        owner_id: The owner's.
        vouchers: Whom the owner believes.
        replace: A device may have a new TPM, AK or counter under its old name, and a TPM a new name.
        unrevoke: A TPM that was revoked may have models again.
        random: Gives so many random bytes, as `os.urandom` does.
    """

    def __init__(
        self,
        records: OwnerRecords,
        *,
        owner_id: str,
        vouchers: Vouchers,
        replace: bool,
        random: Callable[[int], bytes],
        unrevoke: bool = False,
    ) -> None:
        self._records, self._owner_id, self._vouchers = records, owner_id, vouchers
        self._replace, self._random, self._unrevoke = replace, random, unrevoke
        self._former = FormerRecords(records.folder)
        self._known: KnownTpms | None = None
        self._is_locked = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold the folder's lock for many answers, so that the records are read once.

        Raises:
            FileUnreadable: Others held it for too long.
        """
        with self._records.locked():
            self._is_locked, self._known = True, None
            try:
                yield
            finally:
                self._is_locked = False

    def challenge(self, request: Request, *, now: datetime) -> Challenged:
        """Check a request and make a challenge; nothing is kept.

        Raises:
            DeviceInvalid: The request is for another owner.
            EnrolmentRefused: A check that failed, by its number; or the name is another TPM's.
        """
        if request.owner_id != self._owner_id:
            raise DeviceInvalid(f"the request of {request.device} is for another owner")
        verified = verify_request(
            request, authorities=self._vouchers.authorities, now=now, ek_list=self._vouchers.ek_list
        )
        return self._challenged(verified, self._verify_name(request, verified.ek))

    def _challenged(self, verified: VerifiedRequest, state: str) -> Challenged:
        secret = self._random(SECRET_BYTES)
        document, pending = make_challenge(verified, secret=secret, make_credential=make_credential)
        return Challenged(document, pending, verified.ek, state)

    def keep(self, challenged: Challenged) -> None:
        """Keep what the answer will be checked with; it replaces that of an older challenge."""
        self._records.save_pending(challenged.pending.request.device, format_pending(challenged.pending))

    def accept(
        self, answer: Answer, pending: Pending | None = None, *, now: datetime, device_class: str | None
    ) -> tuple[DeviceRecord, str]:
        """Verify an answer and keep the device's record.

        Args:
            answer: From `parse_answer`.
            pending: What `challenge` made; None: what was kept of it.
            now: With a time zone.
            device_class: The class that the device gets; None: as before, or `default`.

        Returns:
            The record, and what the device was to the owner, as in `Challenged`.

        Raises:
            DeviceInvalid: No challenge waits for this device.
            EnrolmentRefused: A check that failed, by its number; the name is another TPM's, or the TPM was revoked.
        """
        if not self._is_locked:
            with self.together():
                return self.accept(answer, pending, now=now, device_class=device_class)
        pending = pending or parse_pending(self._records.load_pending(answer.device))
        known = self._tpms().devices.get(answer.device)
        if device_class is None and known is not None:
            device_class = known.device_class
        record = verify_answer(
            pending,
            answer,
            authorities=self._vouchers.authorities,
            now=now,
            device_class=device_class or DEFAULT_CLASS,
            ek_list=self._vouchers.ek_list,
        )
        state = self._verify_name(pending.request, VouchedEk(record.vouched, record.ek_sha256, record.ek_subject))
        record = self._keep_record(record, unrevoked=state == _UNREVOKED)
        self._records.remove_pending(record.device)
        return record, state

    def _keep_record(self, record: DeviceRecord, *, unrevoked: bool) -> DeviceRecord:
        """Keep a new record with what is known of its TPM; what it replaces is set aside before."""
        tpms, keys = self._tpms(), keys_of(record)
        same, earlier = tpms.same(keys), tpms.former(keys)
        for known in (*same, *earlier):
            record = enrolled_again(record, known, forget=unrevoked)
        old = tpms.devices.get(record.device)
        for other in same if old is None or old in same else (*same, old):
            if not is_of_one_place(other, record):
                self._set_aside(replace(other, revoked=None) if unrevoked and other in same else other)
        for each in earlier if unrevoked else ():
            self._set_aside(replace(each, revoked=None))
        record = self._without_strange_copies(record)
        self._records.save_device(record.device, format_device_record(record))
        tpms.put(record)
        for other in same:
            if other.device != record.device:
                self._records.remove_device(other.device)
                tpms.devices.pop(other.device)
        return record

    def _set_aside(self, record: DeviceRecord) -> None:
        self._former.save_device(record)
        self._tpms().put_former(record)

    def _without_strange_copies(self, record: DeviceRecord) -> DeviceRecord:
        """Set copies of grants aside that lie under the record's name, but hang on another TPM or counter.

        Returns:
            The record, with the highest maximum of those that hang on its own: the copies may be replaced.
        """
        own, highest = ByCounter([record]), record.highest_maximum or 0
        for grant, compact in self._records.copies_of(record.device):
            if own.of(grant):
                highest = max(highest, grant.counter.maximum)
            else:
                self._former.save_grant(grant, compact)
                self._records.remove_grant(grant)
        return replace(record, highest_maximum=highest) if highest > record.counter_value else record

    def _verify_name(self, request: Request, ek: VouchedEk) -> str:
        """Refuse another TPM under a name that is taken: grants to that name would be wrapped to it.

        Nor has a TPM two names, nor another AK or counter than before: what was granted by them would be out of reach
        of a revocation. Nor does one that was revoked come back by another name, or as its own successor.
        """
        device, tpms = request.device, self._tpms()
        keys = tpm_keys(ek.vouched, ek.sha256, request.ak.name, request.srk.name)
        is_revoked = self._verify_unrevoked(device, keys)
        others = [each.device for each in tpms.same(keys) if each.device != device]
        if others and not self._replace:
            raise EnrolmentRefused(
                f"the TPM of {device} is enrolled as {others[0]}: its EK is {ek.sha256}",
                remedy=f"enrol it as {others[0]}; or rename it: --replace, at `challenge` and `accept`",
            )
        known = tpms.devices.get(device)
        state = _RENAMED if others or any(each.device != device for each in tpms.former(keys)) else _NEW
        if known is not None:
            is_same = self._verify_same(known, request, ek)
            state = _KNOWN if is_same or is_revoked else _REPLACED
        return _UNREVOKED if is_revoked and self._unrevoke else state

    def _verify_same(self, known: DeviceRecord, request: Request, ek: VouchedEk) -> bool:
        """Whether the TPM is that of the record, with its AK and counter; EnrolmentRefused: not, and not `replace`."""
        if (known.vouched, known.ek_sha256) != (ek.vouched, ek.sha256):
            if not self._replace:
                what = "EK certificate" if known.vouched == "certificate" else "EK"
                raise EnrolmentRefused(
                    f"the name {known.device} belongs to a device with another TPM ({what} SHA-256 {known.ek_sha256})",
                    remedy="enrol it under another name; --replace if the device was given a new TPM",
                )
            return False
        # TPM2_Clear changes neither: both keys are of the endorsement hierarchy, and the counter is defined as it was.
        changed = [name for name in ("ak", "counter") if getattr(known, name).name != getattr(request, name).name]
        if changed and not self._replace:
            what = {"ak": "attestation key", "counter": "counter"}[changed[0]]
            raise EnrolmentRefused(
                f"the TPM of {known.device} asks with another {what} than it is enrolled with: what was granted before "
                "would be out of reach of a revocation",
                remedy=f"if another program took the {what}'s place in the TPM: --replace, at `challenge` and `accept`",
            )
        return not changed

    def _verify_unrevoked(self, device: str, keys: frozenset[TpmKey]) -> bool:
        """Whether a TPM was revoked, and may ask all the same; EnrolmentRefused: it may not."""
        revoked = {each.device for each in self._tpms().same(keys) if each.revoked is not None}
        others = revoked - {device}
        if others and not (self._unrevoke and device in revoked):
            raise EnrolmentRefused(
                f"the TPM of {device} was revoked as {min(others)}",
                remedy=f"enrol it as {min(others)}, with --unrevoke at `accept`, if it is to have models again",
            )
        earlier = {each.device for each in self._tpms().former(keys) if each.revoked is not None}
        if earlier and not revoked and not self._unrevoke:
            raise EnrolmentRefused(
                f"the TPM of {device} was revoked as {min(earlier)}",
                remedy="--unrevoke, at `challenge` and `accept`, if it is to have models again",
            )
        return bool(revoked or earlier)

    def _tpms(self) -> KnownTpms:
        """The devices' records by name and TPM; read once for all answers under one lock."""
        if self._known is None:
            self._known = KnownTpms.load(self._records, self._former)
        return self._known
