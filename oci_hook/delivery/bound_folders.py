"""The folders below `<runtime_directory>/bound`: one a container, root's alone, with a place for each of its models.

A folder is named after the container's id and bundle as they were when it was prepared, so a second preparation of the
same container gives the same paths. Whoever prepares holds it locked; what nobody holds and no record names was left by
one that was killed. Nothing is mounted or unmounted here (`delivery.bound`, `delivery.host_mounts`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Container
from contextlib import suppress

from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, HolderRefused
from oci_hook.locks import lock_descriptor
from oci_hook.trusted_file import make_private_directory

_FOLDER = "bound"
_TRIES, _SWEEP_SECONDS = 100, 3.0


def bound_directory(runtime_directory: str) -> str:
    """Where the folders are; without links, as the mounts' own paths are."""
    return os.path.join(os.path.realpath(runtime_directory), _FOLDER)


def folder_of(runtime_directory: str, container_id: str, bundle: str) -> str:
    """The folder of a container.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm.
        container_id: The engine's.
        bundle: Absolute path of the OCI bundle; empty where it is not known.
    """
    name = hashlib.sha256(f"{container_id}\0{bundle}".encode()).hexdigest()
    return os.path.join(bound_directory(runtime_directory), name)


def place_of(folder: str, number: int) -> str:
    """Where in its folder a container's model lies, by the number of its request."""
    return os.path.join(folder, str(number))


def lock_folder(folder: str, container_id: str) -> int:
    """Make a folder, mode 0700, if it is not there, and lock it; closing the descriptor unlocks it.

    Raises:
        HolderRefused: Another process prepares the same container.
        FileUnreadable: It cannot be made.
    """
    parent = os.path.dirname(folder)
    make_private_directory(os.path.dirname(parent))
    make_private_directory(parent)
    for _ in range(_TRIES):
        try:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)  # below directories that root alone enters
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # a sweep took it for an abandoned one
            continue
        except OSError as cause:
            raise FileUnreadable(f"{folder}: {cause.strerror}") from cause
        try:
            # A sweep holds it for a moment only.
            lock_descriptor(fd, what=folder, timeout_seconds=_SWEEP_SECONDS, error=HolderRefused)
            if _is_at(fd, folder):
                return fd
        except HolderRefused:
            os.close(fd)
            raise HolderRefused(
                f"another process prepares the models of the container {shown(container_id)} at this moment",
                remedy="let the engine create the container once, and start it again when that has ended",
            ) from None
        os.close(fd)
    raise FileUnreadable(f"{folder}: it is removed as often as it is made")


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def remove_folder(folder: str) -> None:
    """Remove a folder's empty places and itself; what is mounted there still keeps it."""
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                os.rmdir(os.path.join(folder, name))
        os.rmdir(folder)


def folders(runtime_directory: str) -> tuple[str, ...]:
    """Every folder that is there."""
    directory = bound_directory(runtime_directory)
    try:
        return tuple(os.path.join(directory, name) for name in sorted(os.listdir(directory)))
    except OSError:
        return ()


def remove_abandoned(runtime_directory: str, used: Container[str]) -> None:
    """Remove the folders that no record names and nobody prepares. The caller holds the records' lock.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm.
        used: The folders that records name.
    """
    for folder in folders(runtime_directory):
        if folder in used:
            continue
        with suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)
            finally:
                os.close(fd)
