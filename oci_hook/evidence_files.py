"""The files of kept evidence below `<runtime_directory>/evidence`: one a container, named as its record is.

Bytes alone: what they say is `attestation.kept_evidence`'s. They come and go with the container's record, under the
lock of `records`, which is the only caller. Nothing is synced: a power cut ends the container, too.
"""

from __future__ import annotations

import contextlib
import os

from oci_hook.errors import FileUnreadable
from oci_hook.trusted_file import load_root_file, make_private_directory, replace_file

LIMIT_BYTES = 4 << 20


class EvidenceFiles:
    """The folder of evidence of a run-time directory of root's.

    Args:
        runtime_directory: Such as /run/scz-smm.
    """

    def __init__(self, runtime_directory: str) -> None:
        self._directory = os.path.join(runtime_directory, "evidence")

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def load(self, name: str) -> bytes | None:
        """A container's evidence; None if there is none.

        Raises:
            FileUnreadable: It cannot be read, is too large, or others than root can write it.
        """
        path = self._path(name)
        try:
            return load_root_file(path, limit_bytes=LIMIT_BYTES, error=FileUnreadable)
        except FileUnreadable:
            if not os.path.lexists(path):
                return None
            raise

    def write(self, name: str, evidence: bytes) -> None:
        """Write or replace a container's evidence: whole or absent, for whoever reads it meanwhile.

        Raises:
            FileUnreadable: It cannot be written, or is larger than `LIMIT_BYTES`.
        """
        if len(evidence) > LIMIT_BYTES:
            raise FileUnreadable(f"the evidence is larger than {LIMIT_BYTES} bytes")
        make_private_directory(self._directory)
        replace_file(self._path(name), evidence, mode=0o600, sync=False)

    def move(self, name: str, new_name: str) -> None:
        """The container's record has another name by now."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path(name), self._path(new_name))

    def remove(self, name: str) -> None:
        """The container is gone; it may have left none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def remove_all_but(self, records_directory: str) -> None:
        """Remove what has no record in that directory: a hook was killed between the two, or while it wrote."""
        for name in os.listdir(self._directory) if os.path.isdir(self._directory) else []:
            if not os.path.lexists(os.path.join(records_directory, name)):
                self.remove(name)
