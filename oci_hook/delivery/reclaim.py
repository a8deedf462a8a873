"""How a model is taken away from a running container before that ends.

A child enters the mount namespace that the record names, whose process is held meanwhile. A mount is the model's if its
id, its superblock's number, its source and its `f_fsid` are all those of the record, wherever its directory has been
moved to; nothing else is touched. That its memory came back is the kernel's word: IN_UNMOUNT, which comes when the
last mount, open file and mapping of the whole file system is gone. Of a model that its container unmounted itself it is
that the number of its superblock is given away again.

It decides about no record and no audit log (`cli.containers`). Sources: umount2(2), inotify(7); docs/adr/0011.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Literal

from oci_hook.delivery.holder import open_directory
from oci_hook.delivery.resident import find_mount, hold_namespace, memory_bytes, open_mount, own_proc
from oci_hook.errors import EngineUnsupported, HolderGone
from oci_hook.held import HeldModel
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import Mount
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.linux.usage import Use, find_remains, find_uses
from oci_hook.records import ContainerRecord

_ANSWER_SECONDS = 10.0
_GONE_SECONDS = 2.0
_TRIES, _PAUSE_SECONDS = 20, 0.1
_EVENT = struct.Struct("=iIII")
_WHAT = "the process that looks at the container's mounts"

State = Literal["released", "detached", "busy", "covered", "absent", "unknown", "shared"]
DryRun = Literal["would-release", "would-detach", "would-unshare"]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What came of taking a model away.

    Attributes:
        state: `released`: its memory is free. `detached`: the container sees it no more, its users keep its memory.
            `busy`: it is used and stays. `covered`: another mount lies over it or in it; it stays. `absent`: it was
            not there any more, and its memory is free. `unknown`: it was not there any more, and whether its memory
            is free cannot be told. `shared`: this container has it no more, and nobody in it uses it; its memory stays,
            as other containers, or it itself at another place, have the same copy. `would-…`: of a dry run.
        path: Where it was, as the namespace names it; empty if it was not there.
        uses: Who keeps its memory, as far as /proc tells, but for the other containers.
        shared_with: The ids of the other containers that have the same copy; its own if it has it at another place.
    """

    state: State | DryRun
    path: str
    uses: tuple[Use, ...]
    shared_with: tuple[str, ...] = ()


def reclaim(
    record: ContainerRecord, model: HeldModel, *, others: Sequence[ContainerRecord] = (), lazy: bool, dry_run: bool
) -> Reclaimed:
    """Take one model away from a running container.

    Args:
        record: The container's.
        model: One of its `held`.
        others: Other containers that live: they may have the same copy, or by now the number of a superblock that is
            gone.
        lazy: Also if it is used: then it goes from the container's sight, and its memory with its last user.
        dry_run: Only look.

    Raises:
        EngineUnsupported: The model is on the host's side, or the record is of an earlier version.
        HolderGone: The container ended, or its process is in another namespace.
        SystemCallFailed: The kernel refuses.
    """
    _verify_not_on_the_host(record)
    sharers = _sharers(model, others)
    elsewhere = tuple(each for each in record.held if each.is_same_copy(model) and each.mount_id != model.mount_id)
    is_elsewhere = bool(elsewhere and _sharers(model, [replace(record, held=elsewhere)]))
    known = frozenset(each.mount_id for each in elsewhere)
    names = (*(each.container_id for each in sharers), *([record.container_id] if is_elsewhere else []))
    with ExitStack() as stack:
        namespace_fd = hold_namespace(record, stack)
        if namespace_fd is None:
            raise HolderGone("the models are in our own mount namespace")

        def body(channel: Channel) -> Report:
            return _reclaim_in_namespace(channel, namespace_fd, model)

        child = stack.enter_context(Child(_WHAT, body, gone=HolderGone, keep=(namespace_fd,)))
        seen = child.receive(_ANSWER_SECONDS)
        path = str(seen["path"])
        if seen["state"] == "covered":
            return Reclaimed("covered", path, ())
        without = frozenset({os.getpid(), child.pid, *_processes_of(sharers)})
        if seen["state"] == "absent":
            looked = _look_for_uses_of_shared(model, names, without, known) if names else None
            return looked or _look_for_remains(model, others, without)
        uses = find_uses(model.device, model.mount_id, without=without, known=known)
        # gVisor keeps open what its container has opened once, and shows it whatever is mounted on the host: a lazy
        # unmount would hide nothing there, nor give anything back before the container ends.
        if uses and (not lazy or record.runtime == "runsc"):
            return Reclaimed("busy", path, uses, names)
        if dry_run:
            free: DryRun = "would-unshare" if names else "would-release"
            return Reclaimed("would-detach" if uses else free, path, uses, names)
        child.send({"lazy": lazy, "seconds": 0 if names else _GONE_SECONDS})
        state: State = child.receive(_ANSWER_SECONDS)["done"]["state"]
        child.join(_ANSWER_SECONDS)
    is_shared = bool(names) and state == "detached" and not uses
    if is_shared or state == "released":  # nobody keeps the mount: its id may be another's by now
        return Reclaimed("shared" if is_shared else state, path, (), names if is_shared else ())
    return Reclaimed(state, path, find_uses(model.device, model.mount_id, without=without, known=known), names)


def _verify_not_on_the_host(record: ContainerRecord) -> None:
    if record.keeper == (0, 0) and record.runtime != "runsc":
        raise EngineUnsupported(
            "the container has its model by a bind entry of config.json: it is mounted on the host, and both stay "
            "until the container ends",
            remedy="end the container: its model's memory comes back then",
        )
    if record.keeper == (0, 0):
        raise EngineUnsupported(
            "a container of a gVisor pod has its model mounted on the host's side, where its gofer copied it from: "
            "both stay until the container ends",
            remedy="end the container: its model's memory comes back then",
        )


def _sharers(model: HeldModel, others: Sequence[ContainerRecord]) -> list[ContainerRecord]:
    """The other containers that have the same copy; one that cannot be looked at is believed to."""
    holders = [each for each in others if each.has_copy(model)]
    found = []
    for record, taken in zip(holders, memory_bytes(holders), strict=True):
        seen = zip(record.held, taken or (), strict=False)
        if taken is None or any(size is not None and held.is_same_copy(model) for held, size in seen):
            found.append(record)
    return found


def _processes_of(records: Sequence[ContainerRecord]) -> Iterator[int]:
    """The processes in the mount namespaces that containers were given, and those that the records name."""
    namespaces = {record.namespace for record in records}
    yield from (record.pid for record in records)
    for name in os.listdir("/proc") if records else ():
        with suppress(OSError):
            if name.isdigit():
                seen = os.stat(f"/proc/{name}/ns/mnt")
                if (seen.st_dev, seen.st_ino) in namespaces:
                    yield int(name)


def _look_for_uses_of_shared(
    model: HeldModel, names: tuple[str, ...], without: frozenset[int], known: frozenset[int]
) -> Reclaimed:
    """Who uses a copy that this container has unmounted itself, and that others, or its other places, have still."""
    remains = find_remains(model.device, without=without, known=known)
    uses = (*remains.copies, *remains.files)
    state: State = "busy" if remains.copies else "detached" if uses else "shared"
    return Reclaimed(state, "", uses, names)


def _look_for_remains(model: HeldModel, others: Sequence[ContainerRecord], ours: frozenset[int]) -> Reclaimed:
    """What is left of a model that its container unmounted itself, with files on it still open perhaps.

    Two live superblocks never have one number. So it is gone once its number is free, a mount of another name's, or
    that of a model which another container sees.
    """
    holders = [each for each in others if any(_is_later(held, model) for held in each.held)]
    for record, taken in zip(holders, memory_bytes(holders), strict=True):
        seen = zip(record.held, taken or (), strict=False)
        if any(size is not None and _is_later(held, model) for held, size in seen):
            return Reclaimed("absent", "", ())
    for left in reversed(range(_TRIES)):
        remains = find_remains(model.device, without=ours)
        if remains.another or mounts.is_free_number(model.device):
            return Reclaimed("absent", "", ())
        uses = (*remains.copies, *remains.files)
        if uses or not left:
            break
        time.sleep(_PAUSE_SECONDS)  # a file system that somebody makes just now may have the number for a moment
    if remains.copies:  # a copy that the container made is not the mount that we made: its to unmount
        return Reclaimed("busy", "", uses)
    return Reclaimed("detached" if uses else "unknown", "", uses)


def _is_later(held: HeldModel, model: HeldModel) -> bool:
    return held.device == model.device and held.fsid != model.fsid


def _reclaim_in_namespace(channel: Channel, namespace_fd: int, model: HeldModel) -> Report:
    """The child: enter, look, say what is there, wait, unmount."""
    proc_fd = own_proc()
    enter_mount_namespace(namespace_fd)
    mount = find_mount(proc_fd, model)
    if mount is None:
        channel.send({"state": "absent", "path": ""})
        channel.receive()
        return {"state": "absent"}
    fd = open_mount(mount, model)
    inside = [each.mount_point for each in mounts.load_mountinfo(proc_fd) if each.parent_id == mount.mount_id]
    if fd is None or inside:
        # Its place is another's now, or another's mount would go with it.
        channel.send({"state": "covered", "path": mount.mount_point})
        channel.receive()
        return {"state": "covered"}
    channel.send({"state": "there", "path": mount.mount_point})
    received = channel.receive()
    if received is None:
        return {"state": "busy"}
    with syscalls.failing("the model cannot be unmounted"):
        os.fchdir(fd)
        inotify = syscalls.inotify_init1()
        syscalls.inotify_add_watch(inotify, ".", syscalls.IN_DELETE_SELF)
        if received[0]["lazy"]:
            syscalls.umount2(".", syscalls.MNT_DETACH)
            os.chdir("/")
            os.close(fd)
        elif (state := _unmount_unused(mount, fd)) is not None:
            return {"state": state}
    return {"state": "released" if _is_gone(inotify, received[0]["seconds"]) else "detached"}


def _unmount_unused(mount: Mount, fd: int) -> State | None:
    """Unmount what nobody uses: None; or why it stays. Closes `fd`.

    The kernel counts our own descriptor as a use, so the mount is named once more, in its directory: a container that
    covers it in this very moment loses the mount that it has just made itself, and nothing else.
    """
    parent, name = os.path.split(mount.mount_point)
    directory = open_directory(parent)
    os.fchdir(directory)
    os.close(directory)
    again = syscalls.openat2(syscalls.AT_FDCWD, name, os.O_PATH | os.O_DIRECTORY, resolve=syscalls.RESOLVE_NO_SYMLINKS)
    same = syscalls.statx_mount_id(again) == mount.mount_id
    os.close(again)
    os.close(fd)
    if not same:
        return "covered"
    try:
        syscalls.umount2(name, syscalls.UMOUNT_NOFOLLOW)
    except OSError as refusal:
        if refusal.errno != errno.EBUSY:
            raise
        return "busy"
    return None


def _is_gone(inotify: int, seconds: float) -> bool:
    """Whether the kernel says within a moment that the watched file system is gone."""
    poll = select.poll()
    poll.register(inotify, select.POLLIN)
    while poll.poll(seconds * 1000):
        events = os.read(inotify, 4096)
        for offset in range(0, len(events) - _EVENT.size + 1, _EVENT.size):  # of a directory itself: without a name
            if _EVENT.unpack_from(events, offset)[1] & syscalls.IN_UNMOUNT:
                return True
    return False
