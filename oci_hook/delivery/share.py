"""One decrypted copy for the containers of a node: a live container's copy of a model, for another that may have it.

    lock of the sharing group ─► live records ─► in the holder's mount namespace: find, open, clone ─► verify ─► isolate

Used after admission: whoever comes here has opened the key itself, and drops it where a copy is found. What does not
fit, or does not answer in time, is left out; then the caller decrypts. There is no daemon: a copy lives as long as the
last mount of it, by the kernel's count.

A holder may rule its own mount namespace (CAP_SYS_ADMIN in its own user namespace). Nothing of what it can mount has
the kernel's type tmpfs *and* the random `f_fsid` of the record. Who may take part at all is said by the caller.
Reasons: docs/adr/0018. Sources: open_tree(2), mount_setattr(2), mount_namespaces(7), statfs(2).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from oci_hook.bundle.manifest import MODEL_DOCUMENT
from oci_hook.delivery.looker import Looker
from oci_hook.delivery.resident import hold_namespace, stuck_namespaces
from oci_hook.delivery.room import ModelDelivery, directories_of
from oci_hook.delivery.share_lock import SHARES, GroupLocks
from oci_hook.documents import canonical
from oci_hook.errors import SczError
from oci_hook.held import HeldModel
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import MemoryFilesystem
from oci_hook.records import ContainerRecord

_STUCK = "stuck"
_ONE_SECONDS, _ALL_SECONDS, _EXPECTED_SECONDS = 1.5, 3.0, 0.5


@dataclass(frozen=True, slots=True)
class SharingGroup:
    """What two containers have in common that may have one copy.

    Attributes:
        manifest: Manifest digest: the files, their contents and the access policy.
        owner: The owner's id.
        uid: Host uid of the container's root, to whom the files belong.
        gid: The same for the group.
    """

    manifest: str
    owner: str
    uid: int
    gid: int

    @property
    def lock_name(self) -> str:
        """The name of its lock file."""
        fields = [self.manifest, self.owner, self.uid, self.gid, MemoryFilesystem.TMPFS.value]
        return hashlib.sha256(canonical({"group": fields})).hexdigest()

    def holds(self, record: ContainerRecord, index: int) -> bool:
        """Whether a container's model of that index is one of the group's, by the record."""
        held = record.held[index]
        return (
            (record.manifests[index], held.owner, held.uid, held.gid) == (self.manifest, self.owner, self.uid, self.gid)
            and held.shareable
            and not held.released
            and held.fsid != 0
        )


@dataclass(frozen=True, slots=True)
class SharedCopy:
    """A copy of a live container's mount of a model; it keeps the files until its descriptor is closed.

    Attributes:
        model: What it is.
        fd: O_PATH, a detached mount's root.
        filled_by: The container whose start decrypted it.
    """

    model: ModelDelivery
    fd: int
    filled_by: str


def group_of(model: ModelDelivery, uid: int, gid: int) -> SharingGroup:
    """The sharing group of a model for a container whose root has these ids on the host."""
    return SharingGroup(model.manifest.digest, model.manifest.owner_id, uid, gid)


def take_copies(
    models: Sequence[ModelDelivery],
    uid: int,
    gid: int,
    *,
    runtime_directory: str,
    live: Callable[[], Sequence[ContainerRecord]],
    stack: ExitStack,
    locks: GroupLocks,
    lookers: Sequence[Looker],
    expected: Sequence[ContainerRecord] = (),
) -> tuple[SharedCopy, ...]:
    """Lock the models' sharing groups, and take what live containers have of them.

    Never raises for what others left: without a lock, or without a copy that fits, a model is left out. No child is
    forked here, where keys are: when the last looker is used up the rest is left out, too.

    Args:
        models: Admitted, and allowed to be shared.
        uid: Host uid of the container's root.
        gid: The same for the group.
        runtime_directory: Root's own, such as /run/scz-smm.
        live: Gives the records of the containers that live, read under the locks if need be.
        stack: Holds descriptors.
        locks: Until they end, no other start looks for, or makes, a copy of these models.
        lookers: Those that wait, forked before there was a key; the next is taken when one has failed. All are ended.
        expected: Records that were read before; one of them is tried first, as reading all takes longer than a clone.
    """
    found: dict[str, SharedCopy] = {}
    with suppress(SczError), ExitStack() as ending:
        for looker in lookers:
            ending.callback(looker.dismiss)
        locks.lock(runtime_directory, {group_of(model, uid, gid).lock_name for model in models})
        search = _Search(os.path.join(runtime_directory, SHARES, _STUCK), lookers)
        for is_again in (False, True):
            missing = [model for model in models if model.destination not in found]
            if missing and is_again:
                search.look_among(live(), _ALL_SECONDS)
            elif missing:
                search.look_among(expected, _EXPECTED_SECONDS, most=1)
            for model in missing:
                copy = search.find(model, group_of(model, uid, gid))
                if copy is not None:
                    stack.callback(os.close, copy.fd)
                    found[model.destination] = copy
    return tuple(found.values())


class _Search:
    """The search of one start through the records, with a time for each list of them.

    A namespace that had no copy to give is not asked again. A child that cannot be ended hangs in a file system of a
    holder's. That this was seen is remembered in a file: while it is there, namespaces where such a child hangs still
    are not entered again.
    """

    def __init__(self, stuck_file: str, lookers: Sequence[Looker]) -> None:
        self._lookers = list(lookers)
        self._stuck_file = stuck_file
        self._records: list[ContainerRecord] = []
        self._stuck: set[tuple[int, int]] = set()
        self._fruitless: set[tuple[int, int]] = set()
        self._until = 0.0
        self._most: int | None = None

    def look_among(self, records: Sequence[ContainerRecord], seconds: float, *, most: int | None = None) -> None:
        """Have `find` look through these, for that long in all, and ask so many for each model; None: all."""
        self._until, self._most = time.monotonic() + seconds, most
        self._records = [record for record in records if record.delivered and record.keeper != (0, 0)]
        if records and os.path.lexists(self._stuck_file):
            stuck = stuck_namespaces({record.namespace for record in self._records})
            self._stuck |= stuck
            if not self._stuck:
                with suppress(OSError):
                    os.unlink(self._stuck_file)

    def find(self, model: ModelDelivery, group: SharingGroup) -> SharedCopy | None:
        """The first copy that fits; the caller closes its descriptor."""
        asked = 0
        for record, held in self._candidates(group):
            seconds = min(_ONE_SECONDS, self._until - time.monotonic())
            if seconds <= 0 or asked == self._most or not self._lookers:
                return None
            if record.namespace in self._stuck | self._fruitless:
                continue
            asked += 1
            fd = self._clone(record, held, seconds)
            if fd is not None and verify_copy(fd, model, group, held):
                return SharedCopy(model, fd, held.filled_by or record.container_id)
            self._fruitless.add(record.namespace)
            if fd is not None:
                os.close(fd)
        return None

    def _candidates(self, group: SharingGroup) -> Iterator[tuple[ContainerRecord, HeldModel]]:
        for record in reversed(self._records):  # the latest will live the longest, often
            if len(record.held) == len(record.models) == len(record.manifests):
                for index, held in enumerate(record.held):
                    if group.holds(record, index):
                        yield record, held

    def _clone(self, record: ContainerRecord, held: HeldModel, seconds: float) -> int | None:
        """A detached clone of what the record names, by a child that is killed if it does not answer."""
        began = time.monotonic()
        with suppress(SczError), ExitStack() as held_open:  # the holder ended, or its namespace is another's
            namespace_fd = hold_namespace(record, held_open)
            if namespace_fd is None:
                return None
            try:
                return self._lookers[0].clone(namespace_fd, held, seconds)
            except SczError:
                is_late = time.monotonic() - began >= seconds
                self._lookers.pop(0).end()
            if is_late:
                self._stuck.add(record.namespace)
                with suppress(OSError):
                    os.close(os.open(self._stuck_file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        return None


def verify_copy(fd: int, model: ModelDelivery, group: SharingGroup, held: HeldModel) -> bool:
    """Whether a cloned mount is the file system of the record, and that holds the model; it is private from then on.

    Args:
        fd: Of the clone's root.
        model: What it has to be.
        group: Whose ids its files have.
        held: The record of it.
    """
    try:
        # 1. It is a tmpfs, by the kernel's word: an overlay's f_fsid can be chosen by whoever makes it, this one not.
        if syscalls.fstatfs_type(fd) != syscalls.TMPFS_MAGIC or os.fstatvfs(fd).f_fsid != held.fsid:
            return False
        # 2. It is that superblock, from its root; through no mapping of ids.
        root = os.fstat(fd)
        if (f"{os.major(root.st_dev)}:{os.minor(root.st_dev)}", root.st_ino) != (held.device, held.root_inode):
            return False
        if not _is_ours(root, stat.S_IFDIR | 0o555, group):
            return False
        # 3. From here on nothing that the holder mounts reaches it.
        mounts.isolate(fd)
        # 4. Nothing did before: each file is this file system's own. And they are those of this manifest.
        return _holds_model(fd, model, group)
    except (OSError, SczError):
        return False


def _is_ours(seen: os.stat_result, mode: int, group: SharingGroup) -> bool:
    return (seen.st_mode, seen.st_uid, seen.st_gid) == (mode, group.uid, group.gid)


def _holds_model(root_fd: int, model: ModelDelivery, group: SharingGroup) -> bool:
    files = {entry.path: entry.size for entry in model.manifest.files}
    for path in directories_of(files):
        with _Opened(root_fd, path, os.O_PATH | os.O_DIRECTORY) as fd:
            if not _is_ours(os.fstat(fd), stat.S_IFDIR | 0o555, group):
                return False
    for path, size in {**files, MODEL_DOCUMENT: len(model.document)}.items():
        with _Opened(root_fd, path, os.O_PATH) as fd:
            seen = os.fstat(fd)
            if seen.st_size != size or not _is_ours(seen, stat.S_IFREG | 0o444, group):
                return False
    # It carries the manifest digest.
    with _Opened(root_fd, MODEL_DOCUMENT, os.O_RDONLY) as fd:
        return os.pread(fd, len(model.document) + 1, 0) == model.document


class _Opened:
    """A path below a root, on that root's own mount, without following a link; closed by its `with` block."""

    def __init__(self, root_fd: int, path: str, flags: int) -> None:
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
        self._fd = syscalls.openat2(root_fd, path, flags, resolve=resolve)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
