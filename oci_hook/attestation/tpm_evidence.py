"""What the TPM vouches for: PCR values read beside a quote of them, and certifications by the AK.

The flow alone: the commands are `tpm`'s, which mixes this in. It believes nothing of what it returns: `evidence` and
`enrolment` verify. Specification: TPM 2.0 Library, Part 3, 18 (attestation) and 22.4 (PCR_Read).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from oci_hook.attestation.enrolment_documents import Certification
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.structures import Handle, NvPublic
from oci_hook.errors import DeviceNotEnrolled, TpmFailed

_QUOTE_ATTEMPTS: Final = 5
_PCRS_PER_READ: Final = 8  # Part 2, 10.9.7: as many digests as a TPML_DIGEST holds


class EvidenceCommands(Protocol):
    """What evidence asks of a TPM, and the evidence."""

    def _find(self, handle: int) -> Handle | None: ...

    def _name(self, handle: Handle) -> bytes: ...

    def _pcr_read(self, pcrs: Sequence[int]) -> list[bytes]: ...

    def _quote(self, ak: Handle, pcrs: Sequence[int], qualifying_data: bytes) -> tuple[bytes, bytes]: ...

    def _certify(self, ak: Handle, key: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]: ...

    def _nv_certify(self, ak: Handle, index: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]: ...

    def read_pcrs(self, pcrs: Iterable[int]) -> dict[int, bytes]:
        """Values of the SHA-256 bank, as the bus delivers them; only a quote proves them.

        Raises:
            TpmFailed: The bank is not active.
        """
        wanted, values = sorted(set(pcrs)), dict[int, bytes]()
        for start in range(0, len(wanted), _PCRS_PER_READ):
            part = wanted[start : start + _PCRS_PER_READ]
            values.update(zip(part, self._pcr_read(part), strict=False))
        if len(values) != len(wanted):
            raise TpmFailed(
                "the TPM has no values for these PCRs in its SHA-256 bank",
                remedy="activate the bank: `tpm2_pcrallocate sha256:all`, then restart",
            )
        return values

    def quote(self, device: HostDevice, pcrs: Sequence[int], qualifying_data: bytes) -> Evidence:
        """Let the AK quote PCRs of the SHA-256 bank.

        Args:
            device: This host's enrolment.
            pcrs: Their numbers.
            qualifying_data: What makes the quote fresh, at most 64 bytes.

        Returns:
            The quote with values read beside it; `evidence.verify_quote` tells whether they agree.
        """
        ak = self._enrolled_key(device.ak_handle, device.ak.name, "attestation key")
        for _ in range(_QUOTE_ATTEMPTS):
            before = self.read_pcrs(pcrs)
            attest, signature = self._quote(ak, pcrs, qualifying_data)
            if self.read_pcrs(pcrs) == before:  # else one was extended meanwhile: the values might not fit the quote
                break
        return Evidence(attest, signature, before)

    def certify(self, device: HostDevice, qualifying_data: bytes) -> Certification:
        """Let the AK certify the Name of the SRK."""
        ak = self._enrolled_key(device.ak_handle, device.ak.name, "attestation key")
        srk = self._enrolled_key(device.srk_handle, device.srk.name, "storage root key")
        return Certification(*self._certify(ak, srk, qualifying_data))

    def nv_certify(self, device: HostDevice, counter: NvPublic, qualifying_data: bytes) -> Certification:
        """Let the AK certify the Name and value of a counter."""
        ak = self._enrolled_key(device.ak_handle, device.ak.name, "attestation key")
        index = self._enrolled_key(counter.index, counter.name, "counter")
        return Certification(*self._nv_certify(ak, index, qualifying_data))

    def _enrolled_key(self, handle: int, name: bytes, what: str) -> Handle:
        """What lies at a handle, if it is what was enrolled.

        Raises:
            DeviceNotEnrolled: Nothing lies there, or something else.
        """
        found = self._find(handle)
        if found is None or self._name(found) != name:
            raise DeviceNotEnrolled(f"the TPM no longer holds the enrolled {what} at {handle:#x}: was it cleared?")
        return found
