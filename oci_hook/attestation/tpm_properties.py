"""What a TPM says of itself: its maker, its firmware, its dictionary-attack lockout.

For people (`sczctl doctor`): nothing is decided by it, as the bus delivers it unproven. The command is `tpm`'s, which
mixes this in. Specification: TPM 2.0 Library, Part 2, 6.13 (TPM_PT) and 8.6 (TPMA_PERMANENT); TCG vendor ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

_FIXED, _FIXED_COUNT = 0x100, 16
_VARIABLE, _VARIABLE_COUNT = 0x200, 24
_MANUFACTURER, _VENDOR_STRINGS, _FIRMWARE = 0x105, range(0x106, 0x10A), (0x10B, 0x10C)
_PERMANENT, _LOCKOUT_COUNTER, _MAX_AUTH_FAIL, _LOCKOUT_INTERVAL = 0x200, 0x20E, 0x20F, 0x210
_IN_LOCKOUT: Final = 1 << 9
_SOFTWARE: Final = ("IBM", "MSFT", "XYZ")  # libtpms (swtpm, QEMU), Microsoft's reference and Hyper-V, unnamed builds


@dataclass(frozen=True, slots=True)
class TpmProperties:
    """What a TPM says of itself.

    Attributes:
        manufacturer: Its TCG vendor id, such as `IFX`.
        model: The vendor's own words.
        firmware: Its version, four numbers.
        in_lockout: Objects under dictionary-attack protection cannot be used now.
        lockout_counter: Failures counted so far.
        max_auth_fail: As many lead to the lockout.
        lockout_interval_seconds: After so long one failure is forgotten.
    """

    manufacturer: str
    model: str
    firmware: str
    in_lockout: bool
    lockout_counter: int
    max_auth_fail: int
    lockout_interval_seconds: int

    @property
    def is_software(self) -> bool:
        """Whether it is a program (swtpm, a hypervisor's): its secrets lie in files."""
        return self.manufacturer in _SOFTWARE


def properties_of(values: Mapping[int, int]) -> TpmProperties:
    """Put the properties together from TPM_PT values; what is absent is empty or 0."""

    def letters(numbers: tuple[int, ...]) -> str:
        data = b"".join(values.get(number, 0).to_bytes(4, "big") for number in numbers)
        return re.sub(r"[^ -~]", "", data.decode("latin-1")).strip()

    first, second = (values.get(number, 0) for number in _FIRMWARE)
    return TpmProperties(
        manufacturer=letters((_MANUFACTURER,)),
        model=re.sub(" +", " ", letters(tuple(_VENDOR_STRINGS))),
        firmware=".".join(str(part) for part in (first >> 16, first & 0xFFFF, second >> 16, second & 0xFFFF)),
        in_lockout=bool(values.get(_PERMANENT, 0) & _IN_LOCKOUT),
        lockout_counter=values.get(_LOCKOUT_COUNTER, 0),
        max_auth_fail=values.get(_MAX_AUTH_FAIL, 0),
        lockout_interval_seconds=values.get(_LOCKOUT_INTERVAL, 0),
    )


class PropertyCommands(Protocol):
    """What is asked of a TPM, and the properties."""

    def _read_properties(self, first: int, count: int) -> dict[int, int]: ...

    def properties(self) -> TpmProperties:
        """What the TPM says of itself.

        Raises:
            TpmFailed: It does not answer this.
        """
        values = self._read_properties(_FIXED, _FIXED_COUNT)
        return properties_of({**values, **self._read_properties(_VARIABLE, _VARIABLE_COUNT)})
