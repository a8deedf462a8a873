"""The child that stands by for the TPM's transactions of one start: forked early, so that it loads what they need while
the checks before them run.

    with tpm_standby(config) as standby: ... HostTpm(config, device, standby)

Nothing here decides anything. What both sides need is imported before the fork, here, and by neither again (ADR 17).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from oci_hook.attestation.deadline import Standby
from oci_hook.attestation.transactions import get_ready, perform
from oci_hook.config import Config


def tpm_standby(config: Config) -> Standby:
    """Fork it; a context manager. The caller has one thread and holds nothing that a child may not have.

    Raises:
        SystemCallFailed: It cannot be forked.
    """
    return Standby(get_ready, transaction(config))


def transaction(config: Config) -> Callable[[bytes], bytes]:
    """What does a request of `attestation.transactions` with this host's TPM."""
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")

    def act(request: bytes) -> bytes:
        return perform(request, tcti=config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds)

    return act
