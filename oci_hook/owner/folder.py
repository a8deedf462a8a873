"""The files of an owner's folder: mode 0600, each there whole or not at all, changed under the folder's lock.

What they say is `records`' and `former`'s. Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oci_hook.bundle.files import closing, open_beneath, read_bounded, refusal, save_new_file
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, KeyInvalid, SczError
from oci_hook.locks import lock_file
from oci_hook.trust import NAME, NAME_LIMIT, Owner, parse_owner
from oci_hook.trusted_file import replace_file

RECORD_LIMIT_BYTES = 2**20
_LOCK_SECONDS = 120  # longer than thousands of devices take


def checked_name(value: str, error: type[SczError]) -> str:
    """A name that may be part of a path (`error`: it is none)."""
    if not re.fullmatch(NAME, value) or len(value) > NAME_LIMIT:
        raise error(f"{shown(value)} is not a name")
    return value


class OwnerFolder:
    """One owner's folder, as `keyring.create_keyring` made it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock: who changes a record reads it in here, so that nobody's change is undone.

        A passphrase, or another machine, is waited for before. FileUnreadable: others held it for two minutes.
        """
        with lock_file(self.folder / ".lock", timeout_seconds=_LOCK_SECONDS, error=FileUnreadable):
            yield

    def _load_owner(self) -> Owner:
        return parse_owner(self._load(("owner.json",), KeyInvalid, KeyInvalid.remedy))

    def _save(self, parts: tuple[str, ...], data: bytes, *, replace: bool) -> None:
        path = self.folder.joinpath(*parts)
        try:
            for depth in range(1, len(parts)):
                self.folder.joinpath(*parts[:depth]).mkdir(mode=0o700, exist_ok=True)
        except OSError as cause:
            raise FileUnreadable(f"{shown(path.parent)}: {cause.strerror}") from cause
        if replace:
            replace_file(str(path), data, mode=0o600)
        else:
            save_new_file(path, data, mode=0o600)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as cause:
            raise FileUnreadable(f"{shown(path)}: {cause.strerror}") from cause

    def _load(self, parts: tuple[str, ...], error: type[SczError], remedy: str) -> bytes:
        try:
            directory = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as cause:
            raise refusal(cause, f"the owner's folder {shown(self.folder)}", KeyInvalid) from cause
        with closing(directory):
            try:
                descriptor = open_beneath(directory, parts, error=error)
            except error as cause:
                raise error(cause.message, remedy=remedy) from cause
            with closing(descriptor):
                return read_bounded(descriptor, RECORD_LIMIT_BYTES, shown("/".join(parts)), error=error)

    def _names(self, parts: tuple[str, ...], *, suffix: str, pattern: str) -> tuple[str, ...]:
        path = self.folder.joinpath(*parts)
        try:
            found = os.listdir(path)
        except FileNotFoundError:
            return ()
        except OSError as cause:
            raise FileUnreadable(f"{shown(path)}: {cause.strerror}") from cause
        names = (entry.removesuffix(suffix) for entry in found if entry.endswith(suffix))
        return tuple(sorted(name for name in names if re.fullmatch(pattern, name)))
