"""Carry out a plan: each file whole or absent, root's, in the plan's order."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace

from oci_hook.engines.plan import Change, HostFiles, Plan
from oci_hook.errors import FileUnreadable
from oci_hook.trusted_file import replace_file, sync_directory


def carry_out(plan: Plan, files: HostFiles) -> None:
    """Make the changes, one after the other, then remove our directories that are empty.

    Raises:
        FileUnreadable: A system call failed; the changes before that one were made.
    """
    for change in plan.changes:
        path = files.real(change.path)
        try:
            if change.data is None:
                os.unlink(path)
                sync_directory(os.path.dirname(path))
                continue
            _make_directories(os.path.dirname(path))
        except OSError as cause:
            raise FileUnreadable(f"{path}: {cause.strerror}") from cause
        replace_file(path, change.data, mode=change.mode)
    for directory in plan.directories:
        with contextlib.suppress(OSError):
            os.rmdir(files.real(directory))


def without_those_there(plan: Plan, files: HostFiles) -> tuple[Plan, tuple[Change, ...]]:
    """Take out of a plan what would not be another file than the one that is there.

    Returns:
        The plan that is left, and what was taken out.
    """
    there = tuple(change for change in plan.changes if _is_there(change, files))
    return replace(plan, changes=tuple(change for change in plan.changes if change not in there)), there


def _is_there(change: Change, files: HostFiles) -> bool:
    with contextlib.suppress(OSError, FileUnreadable):  # what cannot be read is written
        found = os.lstat(files.real(change.path))
        if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == change.mode and found.st_uid == 0:
            return files.read(change.path) == change.data
    return False


def _make_directories(path: str) -> None:
    """With mode 0755 whatever the umask is: engines and the users of rootless ones read what lies there."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory)
        os.chmod(directory, 0o755)  # noqa: S103 - see above
