"""What podman's `precreate` hook is given: the whole config.json, and no container id beside it.

podman names the container in two places that its user does not write: the last part of `linux.cgroupsPath`, and the
folder of the files that it mounts itself. Both have to say the same. What goes back is the very text that came, with
our mounts behind the others: nothing is written anew, so nothing of it changes. Bytes in, bytes out.
Sources: oci-hooks(5), "precreate"; what podman 4.3 and 5.4 pass, which the tests look at again.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oci_hook.documents import Fields, parse_object, shown
from oci_hook.errors import EngineUnsupported, SpecInvalid
from oci_hook.oci.spec import MAX_SPEC_BYTES, Mount, Spec, parse_spec

_WHAT = "config.json"
_HOOKS = "config.json: hooks"
_READ_HERE = frozenset({"annotations", "hooks", "linux", "mounts", "process", "root"})
_OF_A_MOUNT = frozenset({"destination", "options", "source", "type"})
_ID = "[0-9a-f]{64}"
_CGROUP = re.compile(rf"(?:(?:.*/)?libpod-(?:payload-)?|[^/:]*:libpod:)({_ID})", re.DOTALL)
"""cgroupfs, `--cgroups=split`, systemd."""
_SOURCE = re.compile(rf"/(?:.*/)?[a-z0-9]+-containers/({_ID})/userdata/([^/]+)", re.DOTALL)
_OWN = {"/etc/hostname": "hostname", "/run/.containerenv": ".containerenv"}
_SHARED = {"/etc/hosts": "hosts", "/etc/resolv.conf": "resolv.conf", "/dev/shm": "shm"}  # noqa: S108 - in config.json
"""Another container's where a network or IPC namespace is shared, as in pods."""
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_MAX_HOOKS = 256


@dataclass(frozen=True, slots=True)
class Precreate:
    """What we read of it.

    Attributes:
        spec: As the prestart hook will read it, too.
        hooks: Stage, arguments and the whole of each hook that the runtime will call: also those of hooks.d, but for
            `poststop`, which podman calls itself. podman 5 gives those of `prestart` to the runtime as `createRuntime`.
    """

    spec: Spec
    hooks: tuple[tuple[str, tuple[str, ...], Mapping[str, Any]], ...]


def parse_precreate(data: bytes) -> Precreate:
    """Parse the config.json on standard input.

    Args:
        data: At most 4 MiB.

    Raises:
        SpecInvalid: It is not one strict JSON object; a member that we read is malformed, or is there in other letters,
            too, which Go's parser folds into ours; or a path is relative: to what, podman does not tell.
    """
    document = parse_object(data, limit_bytes=MAX_SPEC_BYTES, what=_WHAT, error=SpecInvalid)
    _verify_letters(document, _READ_HERE)
    spec = parse_spec(data, bundle="/")
    for entry in document.get("mounts") or ():
        _verify_letters(entry, _OF_A_MOUNT)
    for name, member in (("root", "path"), ("linux", "cgroupsPath"), ("linux", "namespaces")):
        _verify_letters(document.get(name) or {}, {member})
    if not document["root"]["path"].startswith("/"):
        raise SpecInvalid(f"{_WHAT}: the root file system's path is relative")
    for entry, mount in zip(document.get("mounts") or (), spec.mounts, strict=True):
        if mount.is_bind and not entry["source"].startswith("/"):
            raise SpecInvalid(f"{_WHAT}: the source of the mount {shown(mount.destination)} is relative")
    hooks = document.get("hooks")
    return Precreate(spec, tuple(_hooks(Fields({} if hooks is None else hooks, what=_HOOKS, error=SpecInvalid))))


def _hooks(fields: Fields) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Any]]]:
    for stage, entries in fields.rest().items():
        found = Fields({stage: [] if entries is None else entries}, what=_HOOKS, error=SpecInvalid)
        for words, hook in found.items(stage, _arguments, low=0, high=_MAX_HOOKS):
            yield stage, words, hook


def _arguments(value: object) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    hook = Fields(value, what=_HOOKS, error=SpecInvalid).rest()
    words = hook.get("args")
    if not isinstance(words, list | None) or not all(isinstance(word, str) for word in words or ()):
        raise SpecInvalid(f"{_HOOKS}: the arguments of one are not strings")
    return tuple(words or ()), hook


def _verify_letters(members: Mapping[str, object], known: frozenset[str] | set[str]) -> None:
    folded = {name.casefold() for name in known}
    for name in members:
        if name not in known and name.casefold() in folded:
            raise SpecInvalid(f"{_WHAT} has {shown(name)} in other letters: runtimes differ in what they make of it")


def container_id(spec: Spec) -> str:
    """The container's id, as podman itself names it in two places.

    Raises:
        EngineUnsupported: The container has no cgroup, or one that podman did not name.
        SpecInvalid: None of podman's own mounts names the container, or one names another.
    """
    return own_folder(spec)[0]


def own_folder(spec: Spec) -> tuple[str, str]:
    """The container's id, and podman's folder of the container, which is there until podman removes it.

    Raises:
        EngineUnsupported: The container has no cgroup, or one that podman did not name.
        SpecInvalid: None of podman's own mounts names the container, or one names another.
    """
    found = _CGROUP.fullmatch(spec.cgroups_path or "")
    if found is None:
        raise EngineUnsupported(
            f"linux.cgroupsPath is {shown(spec.cgroups_path or '', 200)}: podman's id of the container is not in it",
            remedy="start the container with podman itself (`podman run`), without --cgroups=disabled",
        )
    named = {place: (container, folder) for place, container, folder in _named(spec.mounts)}
    others = [place for place in _OWN if place in named and named[place][0] != found[1]]
    folders = [folder for container, folder in named.values() if container == found[1]]
    if others or not folders:
        what = f"the mount {others[0]} names another" if others else "no mount of podman's own names it"
        raise SpecInvalid(
            f"linux.cgroupsPath names the container {found[1][:12]}, {what}",
            remedy="create the container anew, without mounts of its own on /etc/hostname and /etc/hosts",
        )
    return found[1], folders[0]


def _named(mounts: Sequence[Mount]) -> Iterator[tuple[str, str, str]]:
    """Where podman mounts a file of a container's folder, whose, and that folder."""
    usual = {**_OWN, **_SHARED}
    for mount in mounts:
        found = _SOURCE.fullmatch(mount.source) if mount.is_bind and mount.destination in usual else None
        if found is not None and found[2] == usual[mount.destination]:
            yield mount.destination, found[1], posixpath.dirname(mount.source)


def with_mounts(data: bytes, entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The same config.json with further mounts behind those that are there; each other byte stays.

    Args:
        data: What `parse_precreate` accepted.
        entries: OCI mounts; none: the text as it is.
    """
    return _with(data.decode(), "mounts", entries).encode() if entries else data


def with_prestart(data: bytes, hook: Mapping[str, Any]) -> bytes:
    """The same config.json with a further hook at prestart.

    Args:
        data: What `parse_precreate` accepted; it has hooks.
        hook: An OCI hook.
    """
    text = data.decode()
    start, end = next((start, end) for name, start, end in _members(text) if name == "hooks")
    return f"{text[:start]}{_with(text[start:end], 'prestart', [hook])}{text[end:]}".encode()


def _with(text: str, member: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """An object's text with entries behind those of a member that is a list, null or absent."""
    added = ",".join(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in entries)
    for name, start, end in _members(text):
        if name == member:
            there = json.loads(text[start:end])
            if there is None:
                return f"{text[:start]}[{added}]{text[end:]}"
            return f"{text[: end - 1]}{',' if there else ''}{added}{text[end - 1 :]}"
    behind = _behind_space(text, 0) + 1
    comma = "" if text[_behind_space(text, behind)] == "}" else ","
    return f'{text[:behind]}"{member}":[{added}]{comma}{text[behind:]}'


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Each member of the outermost object: its name, and where its value begins and ends. The text is valid."""
    place = _behind_space(text, _behind_space(text, 0) + 1)
    while text[place] != "}":
        name, place = _DECODER.raw_decode(text, place)
        start = _behind_space(text, _behind_space(text, place) + 1)
        _, end = _DECODER.raw_decode(text, start)
        yield name, start, end
        place = _behind_space(text, end)
        if text[place] == ",":
            place = _behind_space(text, place + 1)


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place
