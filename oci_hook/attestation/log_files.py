"""Where event logs lie: the kernel's own of this boot, and copies that a host keeps of the boots that it measured.

A copy is believed by nobody as such: whoever uses it replays it. It says later what another boot measured otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Final

from oci_hook.attestation.event_log import LIMIT_BYTES, EventLog, parse_event_log
from oci_hook.errors import FileUnreadable
from oci_hook.key_errors import EventLogInvalid
from oci_hook.trusted_file import load_file, load_root_file, make_private_directory, replace_file

_FOLDER: Final = "boot-logs"
_KEPT: Final = 8


def load_event_log(path: str) -> bytes:
    """A log's bytes, not yet parsed: the kernel's, or a file of anybody's.

    Raises:
        EventLogInvalid: It is absent where the kernel has it, no regular file, or larger than 4 MiB.
        FileUnreadable: It cannot be read.
    """
    if path.startswith("/sys/") and not os.path.lexists(path):
        raise EventLogInvalid(
            f"{path} is absent: the firmware handed the system no log, or securityfs is not mounted",
            remedy="mount -t securityfs securityfs /sys/kernel/security; name another TPM's with tpm.event_log",
        )
    return load_file(path, limit_bytes=LIMIT_BYTES, error=EventLogInvalid)


def keep_event_log(store_directory: str, data: bytes) -> None:
    """Keep a copy of the log of a boot that was measured; the oldest of more than eight goes.

    Raises:
        FileUnreadable: It cannot be written.
    """
    folder = os.path.join(store_directory, _FOLDER)
    make_private_directory(folder)
    replace_file(os.path.join(folder, f"{hashlib.sha256(data).hexdigest()}.bin"), data)
    for path in _newest_first(folder)[_KEPT:]:
        with contextlib.suppress(OSError):
            os.unlink(path)


def kept_event_logs(store_directory: str) -> Iterator[EventLog]:
    """The copies that can be used, the newest first; what is damaged or not root's alone is passed over."""
    for path in _newest_first(os.path.join(store_directory, _FOLDER))[:_KEPT]:
        with contextlib.suppress(EventLogInvalid, FileUnreadable):
            yield parse_event_log(load_root_file(path, limit_bytes=LIMIT_BYTES, error=EventLogInvalid))


def _newest_first(folder: str) -> list[str]:
    try:
        found = [entry for entry in os.scandir(folder) if entry.name.endswith(".bin")]
        return [entry.path for entry in sorted(found, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)]
    except OSError:
        return []
