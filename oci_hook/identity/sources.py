"""The identity token in the container's own mounts.

At the hook's time the container's root is not to be trusted as a place to resolve a path in, and the token is there
only through a bind mount: so config.json says which host path shows up at the token's path, and that is read, beneath
the mount's source. Destinations are compared as text: where an image links /var/run to /run, the token's path must be
spelt as the mount's destination is. Nothing is verified here. OCI runtime specification, "Mounts"; openat2(2).
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, TokenMalformed, TokenMissing
from oci_hook.identity.token import TOKEN_LIMIT_BYTES
from oci_hook.linux.syscalls import AT_FDCWD, RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_XDEV, openat2
from oci_hook.oci.spec import Mount
from oci_hook.trusted_file import read_regular

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A token as it was found.

    Attributes:
        data: Its bytes, without the line feed at the end; whoever has them has the identity, so they are not shown.
        host_path: Where it lies on the host, all links resolved, for the pod binding.
    """

    data: bytes = field(repr=False)
    host_path: str


def load_token(spec_mounts: Sequence[Mount], token_path: str) -> TokenFile:
    """Read the container's token.

    Args:
        spec_mounts: The mounts of config.json, in their order.
        token_path: The token's path in the container, absolute.

    Returns:
        The token, at most 16 KiB, and its path on the host.

    Raises:
        TokenMissing: No bind mount covers the path, or there is no regular file, or an empty one.
        TokenMalformed: The file is larger.
        FileUnreadable: The file could not be read.
    """
    mount, below = _covering_mount(spec_mounts, token_path)
    try:
        descriptor = _open_beneath(mount, below)
    except OSError as cause:
        error = TokenMissing if cause.errno in _ABSENT else FileUnreadable
        raise error(f"no token can be opened at {shown(token_path)}: {cause.strerror}") from cause
    try:
        return _read(descriptor, token_path)
    finally:
        os.close(descriptor)


def _covering_mount(mounts: Sequence[Mount], token_path: str) -> tuple[Mount, str]:
    """The mount that the container sees at the path, and the path below its source."""
    if not token_path.startswith("/") or "\0" in token_path:
        raise TokenMissing(f"the token's path {shown(token_path)} is not an absolute path")
    path = "/" + posixpath.normpath(token_path).lstrip("/")
    covering = [mount for mount in mounts if _below(path, mount.destination) is not None]
    if not covering:
        raise TokenMissing(f"nothing is mounted at or above {shown(path)} in the container")
    longest = max(covering, key=lambda mount: len(mount.destination))
    # Mounted in their order: the last of those above the path is what the container sees there.
    if covering[-1].destination != longest.destination:
        raise TokenMissing(f"a later mount at {shown(covering[-1].destination)} hides the token's")
    mount = covering[-1]
    if not mount.is_bind or not mount.source.startswith("/"):
        raise TokenMissing(f"the mount at {shown(mount.destination)} is not a bind mount of a host path")
    return mount, _below(path, mount.destination) or ""


def _below(path: str, destination: str) -> str | None:
    """What of `path` lies below `destination`: empty if they are equal, None if it does not."""
    if path == destination:
        return ""
    prefix = destination.rstrip("/") + "/"
    return path.removeprefix(prefix) if path.startswith(prefix) else None


def _open_beneath(mount: Mount, below: str) -> int:
    """An O_PATH descriptor of what lies at `below` beneath the mount's source."""
    # The engine chose the source, a container may have chosen what lies below it: links there must not lead out.
    source = openat2(AT_FDCWD, mount.source, os.O_PATH, resolve=RESOLVE_NO_MAGICLINKS)
    if not below:
        return source
    resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | (0 if mount.is_recursive else RESOLVE_NO_XDEV)
    try:
        return openat2(source, below, os.O_PATH, resolve=resolve)
    finally:
        os.close(source)


def _read(descriptor: int, token_path: str) -> TokenFile:
    # The kind is known before anything is opened: opening a device acts on it, opening a FIFO waits.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise TokenMissing(f"what lies at {shown(token_path)} is not a regular file")
    link = f"/proc/self/fd/{descriptor}"
    what = f"the token at {shown(token_path)}"
    try:
        host_path = os.readlink(link)
        readable = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as cause:
        raise FileUnreadable(f"{what} cannot be opened: {cause.strerror}") from cause
    try:
        data = read_regular(readable, what, limit_bytes=TOKEN_LIMIT_BYTES + 1, error=TokenMalformed)
    finally:
        os.close(readable)
    data = data.removesuffix(b"\n")
    if not data:
        raise TokenMissing(f"{what} is empty")
    if len(data) > TOKEN_LIMIT_BYTES:
        raise TokenMalformed(f"{what} is larger than {TOKEN_LIMIT_BYTES} bytes")
    return TokenFile(data, host_path)
