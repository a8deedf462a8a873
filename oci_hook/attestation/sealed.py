"""A secret that is sealed to a device from afar, as bytes for TPM2_Import.

`tpm.wrap_secret` makes it on the owner's side, the grant carries it, `tpm.unseal` takes it on the host. Nothing here
can open it. Specification: docs/specification.md, "Grant" (`sealed`) and "TPM policy".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class SealedBlob(Protocol):
    """The three parts, whoever holds them (a grant's `SealedKey`, a `WrappedSecret`)."""

    @property
    def public(self) -> bytes:
        """TPM2B_PUBLIC of the sealed object."""

    @property
    def duplicate(self) -> bytes:
        """TPM2B_PRIVATE, encrypted to the SRK."""

    @property
    def seed(self) -> bytes:
        """TPM2B_ENCRYPTED_SECRET."""


@dataclass(frozen=True, slots=True)
class WrappedSecret:
    """A secret wrapped to a device's SRK; see `SealedBlob`."""

    public: bytes
    duplicate: bytes
    seed: bytes
