"""The owners and issuers that this host trusts: a folder of root's, one file each.

What the files say is `trust`'s to parse; here they are found, written and removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from oci_hook.errors import TrustInvalid
from oci_hook.store import entries, system_calls
from oci_hook.trust import Issuer, Owner, parse_issuer, parse_owner
from oci_hook.trusted_file import load_root_file, replace_file, sync_directory

_DOCUMENT_BYTES = 1 << 20
_MAX_TRUSTED = 256


class Trust:
    """The trust folder: `owners/<name>.json` and `issuers/<name>.json`, root's alone."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def path(self, kind: str, name: str) -> str:
        """Where the file of an owner (`owners`) or issuer (`issuers`) lies."""
        return os.path.join(self._directory, kind, f"{name}.json")

    def names(self, kind: str) -> Iterator[str]:
        """The names of what is trusted of a kind (`owners`, `issuers`), sorted; the files are not looked into.

        Raises:
            TrustInvalid: There are more than 256.
            FileUnreadable: The folder cannot be read.
        """
        directory = os.path.join(self._directory, kind)
        names = [name for name in entries(directory) if name.endswith(".json")]
        if len(names) > _MAX_TRUSTED:
            raise TrustInvalid(f"{directory} holds more than {_MAX_TRUSTED} files")
        for name in names:
            yield name.removesuffix(".json")

    def load_owner(self, name: str) -> Owner:
        """One trusted owner.

        Raises:
            TrustInvalid: Its file cannot be used.
            FileUnreadable: There is none of that name.
        """
        with self._named("owners", name) as data:
            return parse_owner(data)

    def load_issuer(self, name: str) -> Issuer:
        """One trusted issuer; raises as `load_owner` does."""
        with self._named("issuers", name) as data:
            return parse_issuer(data)

    @contextlib.contextmanager
    def _named(self, kind: str, name: str) -> Iterator[bytes]:
        path = self.path(kind, name)
        data = load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=TrustInvalid)
        try:
            yield data
        except TrustInvalid as cause:
            raise TrustInvalid(
                f"{path}: {cause.message}", remedy=f"`sczctl trust rm {kind.rstrip('s')} {name}`, then add it again"
            ) from cause

    def owners(self) -> tuple[Owner, ...]:
        """The trusted owners.

        Raises:
            TrustInvalid: One of the files cannot be used: none is skipped in silence.
        """
        return tuple(self.load_owner(name) for name in self.names("owners"))

    def issuers(self) -> tuple[Issuer, ...]:
        """The trusted issuers of identity tokens; raises as `owners` does."""
        return tuple(self.load_issuer(name) for name in self.names("issuers"))

    def add(self, kind: str, name: str, document: bytes) -> str:
        """Write one file; returns its path.

        Raises:
            FileUnreadable: A system call failed.
        """
        directory, path = os.path.join(self._directory, kind), self.path(kind, name)
        with system_calls(directory):
            os.makedirs(directory, mode=0o755, exist_ok=True)
        replace_file(path, document, mode=0o644)
        return path

    def remove(self, kind: str, name: str) -> None:
        """Remove one file, whatever it holds.

        Raises:
            TrustInvalid: There is none of that name.
            FileUnreadable: A system call failed.
        """
        path = self.path(kind, name)
        self.verify_known(kind, name)
        with system_calls(path):
            os.unlink(path)
            sync_directory(os.path.dirname(path))

    def verify_known(self, kind: str, name: str) -> None:
        """Check that there is a file of that name.

        Raises:
            TrustInvalid: There is none.
        """
        if not os.path.lexists(self.path(kind, name)):
            raise TrustInvalid(
                f"no {kind.rstrip('s')} named {name} is trusted here", remedy="`sczctl trust list` shows the names"
            )
