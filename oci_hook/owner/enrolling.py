"""The owner's side of enrolments, one or many: request to challenge, answer to record, beside what is enrolled already.

The checks are `attestation.enrolment`'s; what is added here are the names: a name that is taken belongs to one TPM, and
a TPM that the owner's list vouches for has one name. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
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
from oci_hook.owner.grant_batch import load_devices
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.revoking import enrolled_again

DEFAULT_CLASS = "default"


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
    ) -> None:
        self._records, self._owner_id, self._vouchers = records, owner_id, vouchers
        self._replace, self._random = replace, random
        self._listed: dict[str, str] | None = None

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
        state = self._verify_name(request.device, verified.ek)
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
            The record, and what the device was to the owner: a new, known or replaced device.

        Raises:
            DeviceInvalid: No challenge waits for this device.
            EnrolmentRefused: A check that failed, by its number; or the name is another TPM's.
        """
        known = None
        if answer.device in self._records.devices():
            known = parse_device_record(self._records.load_device(answer.device))
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
        state = self._verify_name(record.device, VouchedEk(record.vouched, record.ek_sha256, record.ek_subject))
        record = enrolled_again(record, known, forget=self._replace)
        self._records.save_device(record.device, format_device_record(record))
        self._remember(record)
        self._records.remove_pending(record.device)
        return record, state

    def _verify_name(self, device: str, ek: VouchedEk) -> str:
        """Refuse another TPM under a name that is taken: grants to that name would be wrapped to it."""
        if ek.vouched == "list":
            other = self._listed_devices().get(ek.sha256, device)
            if other != device:
                raise EnrolmentRefused(
                    f"the TPM of {device} is enrolled as {other}: its EK is {ek.sha256}",
                    remedy=f"one name a TPM: list it as {other}, or take the record of {other} away first",
                )
        if device not in self._records.devices():
            return "new device"
        known = parse_device_record(self._records.load_device(device))
        if (known.vouched, known.ek_sha256) == (ek.vouched, ek.sha256):
            return "known device"
        if self._replace:
            return "replaced device"
        what = "EK certificate" if known.vouched == "certificate" else "EK"
        raise EnrolmentRefused(
            f"the name {device} belongs to a device with another TPM ({what} SHA-256 {known.ek_sha256})",
            remedy="enrol it under another name; --replace if the device was given a new TPM",
        )

    def _listed_devices(self) -> dict[str, str]:
        """The devices for which a list vouched, by their EK's SHA-256; read once."""
        if self._listed is None:
            records = load_devices(self._records, self._records.devices())
            self._listed = {each.ek_sha256: each.device for each in records if each.vouched == "list"}
        return self._listed

    def _remember(self, record: DeviceRecord) -> None:
        if self._listed is not None:
            self._listed = {sha256: device for sha256, device in self._listed.items() if device != record.device}
            if record.vouched == "list":
                self._listed[record.ek_sha256] = record.device
