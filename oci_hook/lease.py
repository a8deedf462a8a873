"""A lease: how long a grant opens without word from the model's owner, in boots and in powered-on time of the device.

Pure. The TPM counts both and enforces them (PolicyCounterTimer), whatever the host's clock says: `attestation.policy`
has the digests. Specification: docs/specification.md, "Grant" (`lease`); TPM 2.0 Library, Part 1, 36 (clock); ADR 19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from oci_hook.documents import Fields
from oci_hook.errors import SczError

RESETS_LIMIT: Final = (1 << 32) - 1
CLOCK_LIMIT: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Lease:
    """The last boot and the last moment at which a grant opens; at least one of them is set.

    Attributes:
        resets: Highest `resetCount` of the TPM: it goes up by one at each boot. None: any.
        clock_ms: Highest `clock` of the TPM, in milliseconds: it runs while the TPM has power. None: any.
    """

    resets: int | None = None
    clock_ms: int | None = None

    def __post_init__(self) -> None:
        """A lease that bounds nothing would look like one: a mistake of the caller's."""
        if self.resets is None and self.clock_ms is None:
            raise ValueError("a lease bounds boots, powered-on time or both")

    def document(self) -> dict[str, int]:
        """The lease as our JSON documents carry it."""
        members = {"resets": self.resets, "clock_ms": self.clock_ms}
        return {name: value for name, value in members.items() if value is not None}


def parse_lease(fields: Fields, name: str, *, error: type[SczError]) -> Lease | None:
    """An optional member that is a lease.

    Raises:
        SczError: The class `error`: malformed, or it bounds nothing.
    """
    if not fields.has(name):
        return None
    members = fields.fields(name)
    resets = members.integer("resets", low=0, high=RESETS_LIMIT) if members.has("resets") else None
    clock_ms = members.integer("clock_ms", low=0, high=CLOCK_LIMIT) if members.has("clock_ms") else None
    members.finish()
    if resets is None and clock_ms is None:
        raise error(f"{name} bounds neither boots (resets) nor powered-on time (clock_ms)")
    return Lease(resets, clock_ms)
