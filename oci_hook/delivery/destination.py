"""Where a model may appear in a container, and the way there: descriptor by descriptor beneath the root file system.

The image is hostile: any of its directories may be a symbolic link, a file or a mount. So every step is one name,
opened without following anything, and after every step the mount is looked at: the root file system's own, or a tmpfs
that config.json declares and that the host does not have, or, exactly at the destination, a memory-backed volume of the
pod. A mount with a `shared:` tag is refused: what is attached on it appears on the host too and outlives the container.
Missing directories are made, 0755, the container root's; where the holder's root may be read-only (gVisor), on the
host's side of the same directory, step by step beside it.

It attaches nothing. Specification: docs/design.md, "Delivery"; openat2(2), mount_namespaces(7).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from oci_hook.documents import shown
from oci_hook.errors import DestinationInvalid, DestinationRefused
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import Mount

_PATH_LIMIT_BYTES, _PART_LIMIT_BYTES = 4095, 255
_FORBIDDEN = frozenset({"proc", "sys", "dev"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
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
        volumes: Id of the memory-backed volume of the pod that lies at a path; it may carry a model there, not below.
        private: What is attached must not propagate; only on the host's side it does, and is removed there.
    """

    mounts: Mapping[int, Mount]
    allowed: frozenset[int]
    volumes: Mapping[str, int] = field(default_factory=dict)
    private: bool = True

    def verify(self, mount_id: int, path: str, *, last: bool = True) -> None:
        """Raise unless the mount may carry a destination.

        Args:
            mount_id: From `syscalls.statx_mount_id`.
            path: In the container.
            last: It is the destination itself, not a directory on the way there.

        Raises:
            DestinationRefused: It is a volume, or propagates.
        """
        # 1. The root file system's mount, a tmpfs of the container's own or of its pod: no other volume, nor another's.
        mount = self.mounts.get(mount_id)
        volume = last and self.volumes.get(path) == mount_id
        if mount is None or (mount_id not in self.allowed and not volume):
            kind = "a mount that appeared meanwhile" if mount is None else f"a {mount.kind} mount"
            raise DestinationRefused(f"{shown(path)} lies on {kind} that is neither the root nor a declared tmpfs")
        # 2. What is attached there stays there.
        if mount.shared and self.private:
            raise DestinationRefused(f"{shown(path)} lies on a shared mount: the model would propagate out of it")


def allow_mounts(
    mounts: Iterable[Mount],
    *,
    root_mount_id: int,
    tmpfs_mount_ids: Iterable[int],
    foreign_devices: frozenset[str],
    volumes: Mapping[str, int] | None = None,
    private: bool = True,
) -> AllowedMounts:
    """Which mounts may carry a destination.

    Args:
        mounts: Of the container's namespace.
        root_mount_id: The root file system's.
        tmpfs_mount_ids: What lies at the destinations of tmpfs mounts in config.json.
        foreign_devices: `major:minor` of every mount that the hook itself sees: a tmpfs among them is a volume.
        volumes: What lies at the destinations of the pod's memory-backed volumes, which the host has, too.
        private: As `AllowedMounts.private`.
    """
    known = {mount.mount_id: mount for mount in mounts}
    whole = {mount_id for mount_id, mount in known.items() if (mount.kind, mount.root) == ("tmpfs", "/")}
    own = {each for each in tmpfs_mount_ids if each in whole and known[each].device not in foreign_devices}
    at = {path: mount_id for path, mount_id in (volumes or {}).items() if mount_id in whole}
    return AllowedMounts(known, frozenset({root_mount_id, *own}), at, private)


def find_mounts(root_fd: int, destinations: Iterable[str]) -> dict[str, int]:
    """The ids of the mounts at destinations of config.json, by destination, as the runtime has placed them.

    Links are followed inside the root, as the runtime did; `allow_mounts` looks at what was found.
    """
    return {path: syscalls.statx_mount_id(fd) for path, fd in _resolved(root_fd, destinations)}


def _resolved(root_fd: int, destinations: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each destination that is a directory, with an O_PATH descriptor that is open until the next step."""
    for destination in destinations:
        try:
            fd = syscalls.openat2(root_fd, destination, os.O_PATH | os.O_DIRECTORY, resolve=_IN_ROOT)
        except (OSError, ValueError):  # absent, not a directory, NUL: nothing is mounted there
            continue
        try:
            yield destination, fd
        finally:
            os.close(fd)


def verify_uncovered(parts: Sequence[str], destinations: Iterable[str]) -> None:
    """Raise if a mount of config.json would hide a model, where the sandbox makes those mounts itself (gVisor).

    Args:
        parts: From `parse_destination`.
        destinations: Of every mount in config.json; absolute and normal.

    Raises:
        DestinationRefused: The path lies at or below one of them.
    """
    for destination in destinations:
        covering = tuple(part for part in destination.split("/") if part)
        if tuple(parts[: len(covering)]) == covering:
            raise _covered(parts, destination)


def verify_uncovered_beneath(root_fd: int, parts: Sequence[str], destinations: Iterable[str]) -> None:
    """The same through the image's symbolic links: a mount's destination is followed, ours is not.

    Args:
        root_fd: The root file system, in which every directory of `parts` exists.
        parts: From `parse_destination`.
        destinations: Of every mount in config.json.

    Raises:
        DestinationRefused: A mount's destination leads to a directory on our way.
        DestinationInvalid: Our way is not there any more.
    """
    ours = set()
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        with syscalls.failing(f"{shown('/' + path)} cannot be opened again", DestinationInvalid):
            fd = _open_directory(root_fd, path, _WALK)
        ours.add(_identity(fd))
        os.close(fd)
    for destination, fd in _resolved(root_fd, destinations):
        if _identity(fd) in ours:
            raise _covered(parts, destination)


def _covered(parts: Sequence[str], destination: str) -> DestinationRefused:
    return DestinationRefused(
        f"{shown('/' + '/'.join(parts))} lies at or below the mount {shown(destination)} of config.json, which the "
        "sandbox makes itself, over the model",
        remedy="under gVisor choose an smm.scz/path on the root file system, outside of every volume and tmpfs",
    )


def _identity(fd: int) -> tuple[int, int]:
    seen = os.fstat(fd)
    return seen.st_dev, seen.st_ino


def prepare_destination(
    root_fd: int, parts: Sequence[str], allowed: AllowedMounts, *, uid: int, gid: int, host_root_fd: int | None = None
) -> int:
    """Walk to a destination, making the directories that are missing. Called in the container's mount namespace.

    Args:
        root_fd: The root file system.
        parts: From `parse_destination`.
        allowed: Where it may lie.
        uid: Host uid that owns what is made.
        gid: Host gid that owns what is made.
        host_root_fd: The root file system as the hook's own mount namespace has it: what is missing is made there, as
            the holder's mount of it may be read-only. Each directory must be the same on both ways.

    Returns:
        O_PATH descriptor of the directory; the caller closes it.

    Raises:
        DestinationInvalid: A symbolic link or a file is in the way, or a directory cannot be made.
        DestinationRefused: The way leaves the root file system and the container's own tmpfs, or is shared, or the
            host's way leads elsewhere.
    """
    with ExitStack() as stack:
        current = os.dup(root_fd)
        stack.callback(os.close, current)
        allowed.verify(syscalls.statx_mount_id(current), "/")
        beside = host_root_fd
        for depth, part in enumerate(parts, 1):
            path = "/" + "/".join(parts[:depth])
            if beside is not None:
                # One file system of the host's: what the host has mounted below the root is not the container's.
                beside = _enter(beside, part, path, uid, gid, _WALK | syscalls.RESOLVE_NO_XDEV)
                stack.callback(os.close, beside)
                with _in_the_way(path):
                    current = _open_directory(current, part, _WALK)
            else:
                current = _enter(current, part, path, uid, gid, _WALK)
            stack.callback(os.close, current)
            # Before anything is made in it: a volume gets no directory of ours either.
            allowed.verify(syscalls.statx_mount_id(current), path, last=depth == len(parts))
            if beside is not None and _identity(beside) != _identity(current):
                raise DestinationRefused(f"{shown(path)} is not the same directory in the sandbox and on the host")
        return os.dup(current)


def _enter(directory_fd: int, part: str, path: str, uid: int, gid: int, resolve: int) -> int:
    """Open one directory, or make it; what is mounted there is what is opened."""
    with _in_the_way(path):
        with suppress(FileNotFoundError):
            return _open_directory(directory_fd, part, resolve)
        os.mkdir(part, 0o755, dir_fd=directory_fd)
        os.chown(part, uid, gid, dir_fd=directory_fd, follow_symlinks=False)
        return _open_directory(directory_fd, part, resolve)


@contextmanager
def _in_the_way(path: str) -> Iterator[None]:
    """Say what is at `path` instead of a directory that can be used."""
    try:
        yield
    except OSError as cause:
        if cause.errno == errno.ELOOP:
            raise DestinationInvalid(f"{shown(path)} is a symbolic link") from cause
        if cause.errno in (errno.ENOTDIR, errno.EEXIST):
            raise DestinationInvalid(f"{shown(path)} is not a directory") from cause
        if cause.errno == errno.EXDEV:
            raise DestinationRefused(f"{shown(path)} is a mount of the host's, not the root file system's") from cause
        raise DestinationInvalid(
            f"{shown(path)} cannot be made: {cause.strerror}",
            remedy="make this directory in the image, or choose an smm.scz/path that exists and can be written",
        ) from cause


def _open_directory(directory_fd: int, name: str, resolve: int) -> int:
    return syscalls.openat2(directory_fd, name, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
