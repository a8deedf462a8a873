"""Where a model may appear in a container, and the way there: descriptor by descriptor beneath the root file system.

The image is hostile: any of its directories may be a symbolic link, a file or a mount. So every step is one name,
opened without following anything, and after every step the mount is looked at: the root file system's own, or a tmpfs
that config.json declares and that the host does not have. A mount with a `shared:` tag is refused: what is attached on
it appears on the host too and outlives the container. Missing directories are made, 0755, the container root's.

It attaches nothing. Specification: docs/design.md, "Delivery"; openat2(2), mount_namespaces(7).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from oci_hook.documents import shown
from oci_hook.errors import DestinationInvalid, DestinationRefused
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import Mount

_PATH_LIMIT_BYTES, _PART_LIMIT_BYTES = 4095, 255
_FORBIDDEN = frozenset({"proc", "sys", "dev"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WALK = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_SYMLINKS


def parse_destination(text: str) -> tuple[str, ...]:
    """The parts of an absolute, normal path below `/` that is not one of the kernel's.

    Raises:
        DestinationInvalid: It is `/`, relative, not normal, too long, has a control character, or lies in /proc, /sys
            or /dev.
    """
    try:
        size = len(text.encode())
        parts = text.split("/")
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError as cause:
        raise DestinationInvalid(f"the path {shown(text)} is not UTF-8") from cause
    if size > _PATH_LIMIT_BYTES or longest > _PART_LIMIT_BYTES:
        raise DestinationInvalid(f"the path {shown(text)} is too long")
    if _CONTROL.search(text):
        raise DestinationInvalid(f"the path {shown(text)} has a control character")
    if len(parts) < 2 or parts[0] or any(part in ("", ".", "..") for part in parts[1:]):
        raise DestinationInvalid(f"the path {shown(text)} is not absolute and normal, below /")
    if parts[1] in _FORBIDDEN:
        raise DestinationInvalid(f"the path {shown(text)} lies in /{parts[1]}, which is the kernel's")
    return tuple(parts[1:])


def parse_destinations(texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The parts of several destinations, none of which covers another.

    Raises:
        DestinationInvalid: One cannot be used, or lies at or below another.
    """
    parsed = tuple(parse_destination(text) for text in texts)
    for index, one in enumerate(parsed):
        for other in parsed[:index] + parsed[index + 1 :]:
            if other[: len(one)] == one:
                raise DestinationInvalid(f"the paths {shown('/' + '/'.join(other))} and {shown(texts[index])} overlap")
    return parsed


@dataclass(frozen=True, slots=True)
class AllowedMounts:
    """The mounts of a container that a destination may lie on, by mount id.

    Attributes:
        mounts: All mounts of the namespace, for messages.
        allowed: Ids of the root file system's mount and of the container's own tmpfs.
    """

    mounts: Mapping[int, Mount]
    allowed: frozenset[int]

    def verify(self, mount_id: int, path: str) -> None:
        """Raise unless the mount may carry a destination.

        Args:
            mount_id: From `syscalls.statx_mount_id`.
            path: In the container, for the message.

        Raises:
            DestinationRefused: It is a volume, or propagates.
        """
        # 1. The root file system's mount or a tmpfs of the container's own: neither a volume nor another's.
        mount = self.mounts.get(mount_id)
        if mount is None or mount_id not in self.allowed:
            kind = "a mount that appeared meanwhile" if mount is None else f"a {mount.kind} mount"
            raise DestinationRefused(f"{shown(path)} lies on {kind} that is neither the root nor a declared tmpfs")
        # 2. What is attached there stays there.
        if mount.shared:
            raise DestinationRefused(f"{shown(path)} lies on a shared mount: the model would propagate out of it")


def allow_mounts(
    mounts: Iterable[Mount], *, root_mount_id: int, tmpfs_mount_ids: Iterable[int], foreign_devices: frozenset[str]
) -> AllowedMounts:
    """Which mounts may carry a destination.

    Args:
        mounts: Of the container's namespace.
        root_mount_id: The root file system's.
        tmpfs_mount_ids: What lies at the destinations of tmpfs mounts in config.json.
        foreign_devices: `major:minor` of every mount that the hook itself sees: a tmpfs among them is a volume.
    """
    known = {mount.mount_id: mount for mount in mounts}
    own = {
        mount_id
        for mount_id in tmpfs_mount_ids
        if (mount := known.get(mount_id)) is not None
        and (mount.kind, mount.root) == ("tmpfs", "/")
        and mount.device not in foreign_devices
    }
    return AllowedMounts(known, frozenset({root_mount_id, *own}))


def find_declared_tmpfs(root_fd: int, destinations: Iterable[str]) -> frozenset[int]:
    """The ids of the mounts at the destinations of tmpfs mounts in config.json, as the runtime has placed them.

    Links are followed inside the root, as the runtime did; `allow_mounts` looks at what was found.
    """
    found = set()
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
    for destination in destinations:
        with suppress(OSError, ValueError):  # absent, not a directory, NUL: it allows nothing
            fd = syscalls.openat2(root_fd, destination, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
            try:
                found.add(syscalls.statx_mount_id(fd))
            finally:
                os.close(fd)
    return frozenset(found)


def prepare_destination(root_fd: int, parts: Sequence[str], allowed: AllowedMounts, *, uid: int, gid: int) -> int:
    """Walk to a destination, making the directories that are missing. Called in the container's mount namespace.

    Args:
        root_fd: The root file system.
        parts: From `parse_destination`.
        allowed: Where it may lie.
        uid: Host uid that owns what is made.
        gid: Host gid that owns what is made.

    Returns:
        O_PATH descriptor of the directory; the caller closes it.

    Raises:
        DestinationInvalid: A symbolic link or a file is in the way, or a directory cannot be made.
        DestinationRefused: The way leaves the root file system and the container's own tmpfs, or is shared.
    """
    with ExitStack() as stack:
        current = os.dup(root_fd)
        stack.callback(os.close, current)
        allowed.verify(syscalls.statx_mount_id(current), "/")
        for depth, part in enumerate(parts, 1):
            path = "/" + "/".join(parts[:depth])
            current = _enter(current, part, path, uid, gid)
            stack.callback(os.close, current)
            # Before anything is made in it: a volume gets no directory of ours either.
            allowed.verify(syscalls.statx_mount_id(current), path)
        return os.dup(current)


def _enter(directory_fd: int, part: str, path: str, uid: int, gid: int) -> int:
    """Open one directory, or make it; what is mounted there is what is opened."""
    try:
        with suppress(FileNotFoundError):
            return _open_directory(directory_fd, part)
        os.mkdir(part, 0o755, dir_fd=directory_fd)
        os.chown(part, uid, gid, dir_fd=directory_fd, follow_symlinks=False)
        return _open_directory(directory_fd, part)
    except OSError as cause:
        if cause.errno == errno.ELOOP:
            raise DestinationInvalid(f"{shown(path)} is a symbolic link") from cause
        if cause.errno in (errno.ENOTDIR, errno.EEXIST):
            raise DestinationInvalid(f"{shown(path)} is not a directory") from cause
        raise DestinationInvalid(
            f"{shown(path)} cannot be made: {cause.strerror}",
            remedy="make this directory in the image, or choose an smm.scz/path that exists and can be written",
        ) from cause


def _open_directory(directory_fd: int, name: str) -> int:
    return syscalls.openat2(directory_fd, name, os.O_PATH | os.O_DIRECTORY, resolve=_WALK)
