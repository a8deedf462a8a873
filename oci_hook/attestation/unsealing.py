"""What a TPM is asked to unseal, and under which policy: one value for the release and for the request of it.

Pure. Specification: docs/specification.md, "TPM policy".
"""

from __future__ import annotations

from dataclasses import dataclass

from oci_hook.attestation.boot_policy import BootForm
from oci_hook.attestation.sealed import SealedBlob
from oci_hook.jws import PublicJwk
from oci_hook.lease import Lease


@dataclass(frozen=True, slots=True)
class Unsealing:
    """A sealed secret and what its policy names.

    Attributes:
        sealed: From the grant.
        form: The approved boot state that the machine is in.
        boot_policy_key: The owner's.
        policy_ref: Of the model line, the device class and the epoch, 32 bytes.
        counter_index: NV index of the owner's counter.
        counter_maximum: The highest value at which the object opens.
        lease: The last boot and the last moment at which it opens, if there is one.
    """

    sealed: SealedBlob
    form: BootForm
    boot_policy_key: PublicJwk
    policy_ref: bytes
    counter_index: int
    counter_maximum: int
    lease: Lease | None = None
