"""The owner's side of enrolments, one or many: request to challenge, answer to record, beside what is enrolled already.

The checks are `attestation.enrolment`'s; what is added here are the names: a name that is taken belongs to one TPM, and
a TPM that the owner's list vouches for has one name. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from oci_hook.attestation.structures import Public
from oci_hook.attestation.tpm import make_credential
from oci_hook.errors import DeviceInvalid, EnrolmentRefused
from oci_hook.owner.grant_batch import load_device
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.revoking import enrolled_again

DEFAULT_CLASS = "default"
_KNOWN, _REPLACED, _UNREVOKED = "known device", "replaced device", "unrevoked device"


@dataclass(frozen=True, slots=True)
class Vouchers:
    """Whom an owner believes that an EK is a TPM's: makers' authorities, a list of EKs, or both."""

    authorities: CaCertificates | None
    ek_list: EkList | None


@dataclass(frozen=True, slots=True)
class Challenged:
    """A challenge that was made: for the host, for the owner, and what a person is told.

    `state` is what the device is to the owner: a new, known or replaced device.
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
        replace: A device may have a new TPM under its old name.
        unrevoke: A device that was revoked, and is the same, may have models again.
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
        self._known: dict[str, DeviceRecord] | None = None
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
        state = self._verify_name(request.device, verified.ek, request.ak)
        return self._challenged(verified, state)

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
            The record, and what the device was to the owner: a new, known, replaced or unrevoked device.

        Raises:
            DeviceInvalid: No challenge waits for this device.
            EnrolmentRefused: A check that failed, by its number; the name is another TPM's, or the TPM was revoked.
        """
        if not self._is_locked:
            with self.together():
                return self.accept(answer, pending, now=now, device_class=device_class)
        known = self._devices().get(answer.device)
        if device_class is None and known is not None:
            device_class = known.device_class
        record = verify_answer(
            pending or parse_pending(self._records.load_pending(answer.device)),
            answer,
            authorities=self._vouchers.authorities,
            now=now,
            device_class=device_class or DEFAULT_CLASS,
            ek_list=self._vouchers.ek_list,
        )
        ek = VouchedEk(record.vouched, record.ek_sha256, record.ek_subject)
        state = self._verify_name(record.device, ek, record.ak)
        record = enrolled_again(record, known, forget=state in (_REPLACED, _UNREVOKED))
        self._records.save_device(record.device, format_device_record(record))
        self._devices()[record.device] = record
        self._records.remove_pending(record.device)
        return record, state

    def _verify_name(self, device: str, ek: VouchedEk, ak: Public) -> str:
        """Refuse another TPM under a name that is taken: grants to that name would be wrapped to it.

        Nor does a TPM that was revoked come back by another name, or as its own successor.
        """
        revoked = self._revoked(ek, ak)
        if others := revoked - {device}:
            raise EnrolmentRefused(
                f"the TPM of {device} was revoked as {min(others)}",
                remedy=f"enrol it as {min(others)}, with --unrevoke at `accept`, if it is to have models again",
            )
        if ek.vouched == "list":
            listed = {
                name for name, each in self._devices().items() if (each.vouched, each.ek_sha256) == ("list", ek.sha256)
            }
            if others := listed - {device}:
                other = min(others)
                raise EnrolmentRefused(
                    f"the TPM of {device} is enrolled as {other}: its EK is {ek.sha256}",
                    remedy=f"one name a TPM: list it as {other}, or take the record of {other} away first",
                )
        known = self._devices().get(device)
        if known is None:
            return "new device"
        is_known = (known.vouched, known.ek_sha256) == (ek.vouched, ek.sha256)
        if not is_known and not self._replace:
            what = "EK certificate" if known.vouched == "certificate" else "EK"
            raise EnrolmentRefused(
                f"the name {device} belongs to a device with another TPM ({what} SHA-256 {known.ek_sha256})",
                remedy="enrol it under another name; --replace if the device was given a new TPM",
            )
        if revoked:
            return _UNREVOKED if self._unrevoke else _KNOWN
        return _KNOWN if is_known else _REPLACED

    def _revoked(self, ek: VouchedEk, ak: Public) -> set[str]:
        """The names of revoked devices with this EK or this AK."""
        return {
            name
            for name, each in self._devices().items()
            if each.revoked is not None
            and ((each.vouched, each.ek_sha256) == (ek.vouched, ek.sha256) or each.ak.name == ak.name)
        }

    def _devices(self) -> dict[str, DeviceRecord]:
        """The devices' records by name; read once for all answers under one lock."""
        if self._known is None:
            self._known = {name: load_device(self._records, name) for name in self._records.devices()}
        return self._known
