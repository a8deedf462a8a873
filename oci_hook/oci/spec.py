"""What we read of a container's config.json; the engine wrote it, the runtime obeys it.

Nothing is looked up on a file system but the file itself: paths are resolved lexically. Unknown keys are allowed, as
the file is not ours. OCI runtime specification, "Configuration" and "Linux Container Configuration".
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from oci_hook.documents import Fields, parse_object, shown
from oci_hook.errors import FileUnreadable, SpecInvalid
from oci_hook.invocation import NO_DIGEST
from oci_hook.oci.annotations import parse_annotations
from oci_hook.trusted_file import read_regular

MAX_SPEC_BYTES = 4 << 20
_MAX_MOUNTS = 4096
_MAX_ID = (1 << 32) - 1
_WHAT = "config.json"
_CAPABILITY = re.compile(r"CAP_[A-Z]+(?:_[A-Z]+)*")  # all of capabilities(7), none of the numbers that libcap takes
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


@dataclass(frozen=True, slots=True)
class Mount:
    """One entry of `mounts`.

    Attributes:
        destination: Absolute and normal, in the container; symbolic links of the image are not followed.
        type: The file system's, as written; empty if absent.
        source: Absolute for a bind mount, else as written; empty if absent.
        options: As written.
    """

    destination: str
    type: str
    source: str
    options: tuple[str, ...]

    @property
    def is_bind(self) -> bool:
        """Whether the source is a path of the host. Type `none` says nothing; the option that goes with it does."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def is_recursive(self) -> bool:
        """Whether the container also sees what is mounted below the source."""
        return "rbind" in self.options


@dataclass(frozen=True, slots=True)
class IdMapping:
    """`size` ids from `container_id` in the user namespace are those from `host_id` outside."""

    container_id: int
    host_id: int
    size: int


@dataclass(frozen=True, slots=True)
class Spec:
    """What we read of config.json.

    Attributes:
        root_path: The rootfs, absolute, resolved against the bundle lexically; empty where that is not known.
        root_readonly: Whether the container's root is read-only.
        mounts: In their order; a later one hides an earlier one.
        uid_mappings: Empty without a user namespace of the container's own.
        gid_mappings: The same for groups.
        has_mount_namespace: Whether the container gets one; without, it shares the runtime's, the host's.
        mount_namespace_path: The one that it joins, None if it gets a new one.
        user_namespace: Whether it is in one other than the runtime's.
        user_namespace_path: The one that it joins, None if it gets a new one; the mappings may then be absent here.
        new_pid_namespace: Whether it gets a process namespace of its own.
        memory_limit_bytes: None: no limit in this file.
        capabilities: All five sets together, upper case; None if the file does not say.
        cgroups_path: As written; systemd's form has colons.
    """

    annotations: Mapping[str, str]
    root_path: str
    root_readonly: bool
    mounts: tuple[Mount, ...]
    uid_mappings: tuple[IdMapping, ...]
    gid_mappings: tuple[IdMapping, ...]
    has_mount_namespace: bool
    mount_namespace_path: str | None
    user_namespace: bool
    user_namespace_path: str | None
    new_pid_namespace: bool
    memory_limit_bytes: int | None
    capabilities: frozenset[str] | None
    cgroups_path: str | None

    @property
    def root_uid(self) -> int:
        """The host's uid of the container's uid 0; 0 without mappings in this file."""
        return _host_id(self.uid_mappings)

    @property
    def root_gid(self) -> int:
        """The host's gid of the container's gid 0; 0 without mappings in this file."""
        return _host_id(self.gid_mappings)

    @property
    def has_sys_admin(self) -> bool:
        """Whether the container may hold CAP_SYS_ADMIN, by any set; so also if the file does not say.

        Nor if it says something that is no name: libcap, which crun asks, takes "21" for this one.
        """
        names = self.capabilities
        return names is None or "CAP_SYS_ADMIN" in names or not all(map(_CAPABILITY.fullmatch, names))

    @property
    def can_share(self) -> bool:
        """Whether no process of the container can make a read-only superblock of the host's writable again.

        That takes CAP_SYS_ADMIN in the initial user namespace. In a new one, which no process ever leaves for its
        parent, any capability is harmless to it; what a namespace that is joined by path belongs to is not known.
        Whoever shares its process namespace and has that capability enters its mount namespace: so that is its own.
        Who joins it later is not seen here.
        """
        if not self.new_pid_namespace:
            return False
        if self.user_namespace:
            return self.user_namespace_path is None and bool(self.uid_mappings and self.gid_mappings)
        return not self.has_sys_admin


def _host_id(mappings: tuple[IdMapping, ...]) -> int:
    return next((mapping.host_id for mapping in mappings if mapping.container_id == 0), 0)


def load_spec(bundle: str, *, directory: int | None = None, digest: str | None = None) -> Spec:
    """Read and parse `<bundle>/config.json`; a link in its place is refused.

    Args:
        bundle: Absolute path of the OCI bundle.
        directory: A descriptor of that directory, if it is already open; it stays the caller's.
        digest: What the shim wrote into it, `verify_spec_digest`; None if no shim was there.

    Raises:
        SpecInvalid: It is absent, not a regular file, over 4 MiB, or malformed, or not what the digest says.
        FileUnreadable: It could not be read.
    """
    path = posixpath.join(bundle, "config.json")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path if directory is None else "config.json", flags, dir_fd=directory)
    except OSError as cause:
        error = SpecInvalid if cause.errno in _ABSENT else FileUnreadable
        raise error(f"{shown(path, 200)}: {cause.strerror}") from cause
    try:
        data = read_regular(descriptor, shown(path, 200), limit_bytes=MAX_SPEC_BYTES, error=SpecInvalid)
    finally:
        os.close(descriptor)
    if digest is not None:
        verify_spec_digest(data, digest)
    return parse_spec(data, bundle=bundle)


def verify_spec_digest(data: bytes, digest: str) -> None:
    """Check that config.json is still what the shim made of it.

    The digest is an argument of the hook in that same file, so it was made with zeros in its own place. The runtime
    keeps the arguments that it read: a file that was changed afterwards does not fit them.

    Args:
        data: config.json.
        digest: From the hook's command line, 64 hexadecimal digits.

    Raises:
        SpecInvalid: It does not fit.
    """
    is_digest = re.fullmatch(r"[0-9a-f]{64}", digest) is not None
    plain = data.replace(digest.encode(), NO_DIGEST.encode()) if is_digest else b""
    if hashlib.sha256(plain).hexdigest() != digest:
        raise SpecInvalid(f"{_WHAT} is not the one into which the shim wrote this hook")


def parse_spec(data: bytes, *, bundle: str) -> Spec:
    """Parse a config.json.

    Args:
        data: JSON, at most 4 MiB.
        bundle: Absolute path of the OCI bundle, which relative paths start from. Empty: before `create` it may not be
            known; then `root` may be absent or relative, and is not known either, and no bind's source is relative.

    Raises:
        SpecInvalid: Not one strict JSON object, or a field that we read is missing or malformed.
    """
    document = parse_object(data, limit_bytes=MAX_SPEC_BYTES, what=_WHAT, error=SpecInvalid)
    if bundle and not bundle.startswith("/"):
        raise SpecInvalid(f"the bundle's path {shown(bundle)} is not absolute")
    if not bundle and document.get("root") is None:
        document["root"] = {"path": "."}
    root = Fields(document.get("root"), what=f"{_WHAT}: root", error=SpecInvalid)
    linux = _optional_fields(document, "linux")
    namespaces = _namespaces(linux)
    user_namespace = "user" in namespaces
    return Spec(
        annotations=parse_annotations(document.get("annotations"), what=_WHAT, error=SpecInvalid),
        root_path=_root_path(bundle, root.string("path", pattern=r"[^\x00]+", limit=4096)),
        root_readonly=root.boolean("readonly") if root.has("readonly") else False,
        mounts=_mounts(document, bundle),
        uid_mappings=_mappings(linux, "uidMappings") if user_namespace else (),
        gid_mappings=_mappings(linux, "gidMappings") if user_namespace else (),
        has_mount_namespace="mount" in namespaces,
        mount_namespace_path=namespaces.get("mount"),
        user_namespace=user_namespace,
        user_namespace_path=namespaces.get("user"),
        new_pid_namespace=namespaces.get("pid", "none") is None,
        memory_limit_bytes=_memory_limit(linux),
        capabilities=_capabilities(document),
        cgroups_path=_optional_string(linux, "cgroupsPath") or None,
    )


def _root_path(bundle: str, path: str) -> str:
    return _resolved(bundle, path) if bundle or path.startswith("/") else ""


def _resolved(start: str, path: str) -> str:
    """An absolute, normal path. POSIX lets two leading slashes mean something else; Linux does not."""
    return "/" + posixpath.normpath(posixpath.join(start, path)).lstrip("/")


def _optional_fields(document: Mapping[str, object], name: str) -> Fields:
    """A member that is an object, null or absent."""
    value = document.get(name)
    return Fields({} if value is None else value, what=f"{_WHAT}: {name}", error=SpecInvalid)


def _optional_string(fields: Fields, name: str) -> str:
    value = fields.take(name) if fields.has(name) else None
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        raise SpecInvalid(f"{_WHAT}: {shown(name)} is not a string of at most 4096 characters")
    return value


def _mounts(document: Mapping[str, object], bundle: str) -> tuple[Mount, ...]:
    value = document.get("mounts")
    fields = Fields({"mounts": [] if value is None else value}, what=_WHAT, error=SpecInvalid)
    return fields.items("mounts", lambda item: _mount(item, bundle), low=0, high=_MAX_MOUNTS)


def _mount(value: object, bundle: str) -> Mount:
    fields = Fields(value, what=f"{_WHAT}: a mount", error=SpecInvalid)
    destination = fields.string("destination", pattern=r"[^\x00]+", limit=4096)
    options = fields.take("options") if fields.has("options") else None
    if options is not None and not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
        raise SpecInvalid(f"{_WHAT}: the options of the mount {shown(destination)} are not strings")
    mount = Mount(
        destination=_resolved("/", destination),  # a relative one is taken from / (runtime-spec, "Mounts")
        type=_optional_string(fields, "type"),
        source=_optional_string(fields, "source"),
        options=tuple(options or ()),
    )
    if not mount.is_bind:
        return mount
    if not mount.source:
        raise SpecInvalid(f"{_WHAT}: the bind mount {shown(destination)} has no source")
    if not bundle and not mount.source.startswith("/"):
        raise SpecInvalid(f"{_WHAT}: the source of the bind mount {shown(destination)} is relative to no bundle")
    # Not normalised: behind a symbolic link, `..` is not what it looks like.
    return Mount(mount.destination, mount.type, posixpath.join(bundle, mount.source), mount.options)


def _namespaces(linux: Fields) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    value = linux.take("namespaces") if linux.has("namespaces") else None
    fields = Fields({"namespaces": [] if value is None else value}, what=f"{_WHAT}: linux", error=SpecInvalid)
    items = fields.items(
        "namespaces",
        lambda item: Fields(item, what=f"{_WHAT}: a namespace", error=SpecInvalid),
        low=0,
        high=64,
    )
    for item in items:
        kind = item.string("type", limit=64)
        if kind in found:  # runtimes differ in which of the two they would take
            raise SpecInvalid(f"{_WHAT}: the namespace {shown(kind)} is there twice")
        found[kind] = _optional_string(item, "path") or None
    return found


def _mapping(value: object) -> IdMapping:
    fields = Fields(value, what=f"{_WHAT}: an id mapping", error=SpecInvalid)
    return IdMapping(
        container_id=fields.integer("containerID", low=0, high=_MAX_ID),
        host_id=fields.integer("hostID", low=0, high=_MAX_ID),
        size=fields.integer("size", low=0, high=_MAX_ID),
    )


def _mappings(linux: Fields, name: str) -> tuple[IdMapping, ...]:
    if not linux.has(name):
        return ()
    mappings = tuple(mapping for mapping in linux.items(name, _mapping, low=0, high=1024) if mapping.size)
    if mappings and sum(mapping.container_id == 0 for mapping in mappings) != 1:
        raise SpecInvalid(f"{_WHAT}: {name} does not map the container's id 0 once")
    return mappings


def _memory_limit(linux: Fields) -> int | None:
    resources = linux.take("resources") if linux.has("resources") else None
    if resources is None:
        return None
    memory = _optional_fields(Fields(resources, what=f"{_WHAT}: resources", error=SpecInvalid).rest(), "memory").rest()
    limit = memory.get("limit")
    if limit is None:
        return None
    if type(limit) is not int or not -1 <= limit < 1 << 63:
        raise SpecInvalid(f"{_WHAT}: the memory limit is not a whole number")
    return limit if limit > 0 else None  # -1 is the specification's, 0 runc's word for none


def _capabilities(document: Mapping[str, object]) -> frozenset[str] | None:
    """All sets together: the inheritable and ambient ones outlive a smaller bounding set across exec."""
    value = _optional_fields(document, "process").rest().get("capabilities")
    if value is None:
        return None
    names: set[str] = set()
    for kind, members in Fields(value, what=f"{_WHAT}: capabilities", error=SpecInvalid).rest().items():
        if members is None:
            continue
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise SpecInvalid(f"{_WHAT}: capabilities: {shown(kind)} is not a list of strings")
        # crun reads them as libcap does: in any case. The prefix is runc's demand.
        names.update(f"CAP_{member.upper().removeprefix('CAP_')}" for member in members)
    return frozenset(names)
