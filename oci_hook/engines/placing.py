"""Carry out a plan: each file whole or absent, root's, in the plan's order."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from functools import partial

from oci_hook.disk_space import Need, full_disk_explained
from oci_hook.engines.plan import Change, HostFiles, Plan
from oci_hook.errors import FileUnreadable
from oci_hook.trusted_file import replace_file, sync_directory

_ROOM = "free {size} on {mount} (`df -h {mount}`), then run it again: it goes on where it stopped"


def carry_out(plan: Plan, files: HostFiles) -> None:
    """Make the changes, one after the other, then remove our directories that are empty.

    Raises:
        FileUnreadable: A system call failed; the changes before that one were made.
    """
    for change in plan.changes:
        path = files.real(change.path)
        need = Need.of([len(change.data or b"")], 4096, _ROOM)
        with full_disk_explained(_existing(os.path.dirname(path)), partial(replace, need)):
            _carry_out(change, path)
    for directory in plan.directories:
        with contextlib.suppress(OSError):
            os.rmdir(files.real(directory))


def _carry_out(change: Change, path: str) -> None:
    try:
        if change.data is None:
            os.unlink(path)
            sync_directory(os.path.dirname(path))
            return
        _make_directories(os.path.dirname(path))
    except OSError as cause:
        raise FileUnreadable(f"{path}: {cause.strerror}") from cause
    replace_file(path, change.data, mode=change.mode)


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


def _existing(path: str) -> str:
    """The folder, or the nearest one above it that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _make_directories(path: str) -> None:
    """With mode 0755 whatever the umask is: engines and the users of rootless ones read what lies there."""
    missing, there = [], _existing(path)
    while path != there:
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory)
        os.chmod(directory, 0o755)  # noqa: S103 - see above
