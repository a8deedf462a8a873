"""One lock for all of this host's TPM transactions.

A TPM without a resource manager has three slots for objects and three for sessions: without the lock, processes fail
at random.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from oci_hook.errors import TpmTimeout
from oci_hook.locks import lock_file


def tpm_lock(path: str | os.PathLike[str], *, timeout_seconds: float) -> AbstractContextManager[None]:
    """Hold the lock inside the block.

    Args:
        path: The lock file, in a directory that only root can write; made with mode 0600 if absent.
        timeout_seconds: How long to wait for other holders.

    Raises:
        TpmTimeout: Others held it for too long.
        FileUnreadable: The file cannot be opened.
    """
    return lock_file(path, timeout_seconds=timeout_seconds, error=TpmTimeout)
