"""A copy is taken from a live holder only if it is the very file system of the record; the holder may try what it can.

The holder is a shell that rules its own user and mount namespaces, with a real sealed model in them. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from oci_hook import locks
from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.manifest import MODEL_DOCUMENT
from oci_hook.delivery import looker, share, share_lock, writer
from oci_hook.delivery.attach import attach_all
from oci_hook.delivery.attached import look_at
from oci_hook.delivery.deliver import ContainerView, Delivery, DeliverySettings
from oci_hook.delivery.fill import FillOptions, Target, fill
from oci_hook.delivery.holder import MOUNT_NAMESPACE, Ground, Holder, RootIdentity, open_directory
from oci_hook.delivery.looker import Looker
from oci_hook.delivery.resident import own_proc
from oci_hook.delivery.room import ModelDelivery, model_room
from oci_hook.delivery.share import SharedCopy, group_of, take_copies, verify_copy
from oci_hook.delivery.share_lock import GroupLocks
from oci_hook.errors import HolderGone, SystemCallFailed
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import MemoryFilesystem, create_memory_filesystem
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.linux.processes import HeldProcess, process_start_time
from oci_hook.locks import lock_file
from oci_hook.records import ContainerRecord
from tests.models import TestOwner, noise
from tests.process_memory import copies
from tests.stuck import stuck_filesystem
from tests.unshared import told
from tests.workshop import wait_until

FILES = {"weights": noise(70_000), "deep/er/config.json": b"{}"}


@dataclass
class House:
    """A holder, its record, and whoever else wants the model."""

    process: subprocess.Popen[str]
    path: Path
    record: ContainerRecord
    model: ModelDelivery
    run: Path
    lookers: int = 2

    def do(self, command: str) -> str:
        return told(self.process, command)

    @contextlib.contextmanager
    def copies(
        self,
        *records: ContainerRecord,
        model: ModelDelivery | None = None,
        expected: Sequence[ContainerRecord] = (),
    ) -> Iterator[tuple[SharedCopy, ...]]:
        with contextlib.ExitStack() as stack:
            found = records or (self.record,)
            wanted = [model or self.model]
            yield take_copies(
                wanted,
                0,
                0,
                runtime_directory=str(self.run),
                live=lambda: found,
                stack=stack,
                locks=stack.enter_context(GroupLocks()),
                lookers=[stack.enter_context(Looker()) for _ in range(self.lookers)],
                expected=expected,
            )

    def is_taken(self, *records: ContainerRecord, expected: Sequence[ContainerRecord] = ()) -> bool:
        with self.copies(*records, expected=expected) as found:
            return [contents(copy.fd) for copy in found] == [FILES]

    def sees(self, path: Path) -> list[mounts.Mount]:
        """The mounts at a path, the uppermost last."""
        seen = mounts.parse_mountinfo(Path(f"/proc/{self.process.pid}/mountinfo").read_bytes())
        return [each for each in seen if each.mount_point == str(path)]

    def forged(self, **changes: object) -> ContainerRecord:
        return replace(self.record, held=(replace(self.record.held[0], **changes),))

    def seen_at(self, path: Path, **changes: object) -> ContainerRecord:
        """A record that tells of what lies at a path whatever can be told of it."""
        mount = self.sees(path)[-1]
        there = f"/proc/{self.process.pid}/root{path}"
        held = {"mount_id": mount.mount_id, "device": mount.device, "fsid": os.statvfs(there).f_fsid}
        return self.forged(**{**held, "root_inode": os.stat(there).st_ino, **changes})


def contents(fd: int) -> dict[str, bytes]:
    top = Path(f"/proc/self/fd/{fd}/")
    return {name: (top / name).read_bytes() for name in FILES}


@contextlib.contextmanager
def filled(
    owner: TestOwner, name: str, *, seal: bool = True, change: Callable[[Path], object] = lambda _top: None
) -> Iterator[Target]:
    model = owner.pack(name, FILES)
    with open_layout(model.bundle) as layout:
        delivery = owner.delivery(model, layout)
        room = model_room(delivery)
        with create_memory_filesystem(room.size_bytes, room.inodes, MemoryFilesystem.TMPFS) as mount:
            fill([target := Target(delivery, mount)], FillOptions(0, 0, 1, False), lambda _done: None)
            change(Path(f"/proc/self/fd/{mount.fd}/"))
            if seal:
                mounts.seal_superblock(mount.fd)
            mounts.set_mount_flags(mount.fd)
            yield target


def attach(pid: int, fd: int, path: Path) -> None:
    """As a delivery does."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)

    def body(_channel: Channel) -> Report:
        proc_fd = own_proc()
        enter_mount_namespace(namespace)
        attach_all([fd], [open_directory(str(path))], proc_fd)
        return {}

    try:
        with Child("test", body, gone=HolderGone) as child:
            child.receive(10)
            child.join(10)
    finally:
        os.close(namespace)


def clone_of(pid: int, path: Path) -> int:
    """A detached clone of what a process sees at a path, its caller's to close."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)

    def body(channel: Channel) -> Report:
        enter_mount_namespace(namespace)
        channel.send({}, [syscalls.open_tree(open_directory(str(path)), clone=True)])
        return {}

    with Child("test", body, gone=HolderGone) as child:
        _, (clone,) = child.receive_descriptors(10)
        child.receive(10)
        child.join(10)
    os.close(namespace)
    return clone


@contextlib.contextmanager
def open_house(place: Path, *, seal: bool = True) -> Iterator[House]:
    place.mkdir(exist_ok=True)
    (path := place / "models" / "m").mkdir(parents=True)
    words = ["/usr/bin/unshare", "--user", "--map-root-user", "--mount", "--propagation", "private", "/bin/sh"]
    with (
        filled(TestOwner(place), "m", seal=seal) as target,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            told(process, "true")
            attach(process.pid, target.mount.fd, path)
            held = look_at(target.model, target.mount.fd, "", shareable=True).held(target.model.manifest.owner_id)
            namespace, start_time = os.stat(f"/proc/{process.pid}/ns/mnt"), process_start_time(process.pid) or 0
            record = ContainerRecord(
                container_id="c" * 64,
                bundle=str(place),
                pid=process.pid,
                start_time=start_time,
                seconds=1,
                references=("m",),
                models=("m:1",),
                manifests=(target.model.manifest.digest,),
                destinations=(str(path),),
                subject="s",
                size_bytes=1,
                delivered=True,
                keeper=(process.pid, start_time),
                namespace=(namespace.st_dev, namespace.st_ino),
                held=(held,),
            )
            yield House(process, path, record, target.model, place / "run")
        finally:
            process.kill()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path / "one") as made:
        yield made


def test_a_copy_is_taken_whole_private_and_read_only(house: House) -> None:
    house.do(f"mount --make-shared {house.path} && mount -t tmpfs bait {house.path}/deep")
    with house.copies() as (copy,):
        assert copy.filled_by == house.record.container_id
        house.do(f"mount -t tmpfs bait {house.path}/deep/er; mount --bind /etc/hostname {house.path}/weights")
        assert contents(copy.fd) == FILES
        assert os.fstatvfs(copy.fd).f_flag & os.ST_RDONLY
        with pytest.raises(OSError, match="Read-only"):
            os.open(f"/proc/self/fd/{copy.fd}/weights", os.O_WRONLY)


def test_a_copy_is_no_peer_of_its_original_and_has_a_models_flags(house: House) -> None:
    (there := house.path.parent / "there").mkdir()
    house.do(f"mount --make-shared {house.path} && mount -o remount,bind,rw,suid,dev,exec {house.path}")
    (its_own,) = house.sees(house.path)
    assert its_own.shared
    assert not its_own.options & {"ro", "nosuid", "nodev", "noexec"}
    with house.copies() as (copy,):
        attach(house.process.pid, copy.fd, there)
        (mount,) = house.sees(there)
        assert mount.tags == ()
        assert mount.options >= {"ro", "nosuid", "nodev", "noexec", "nosymfollow"}


def test_something_mounted_over_a_model_or_in_it_is_not_attached(house: House) -> None:
    """What propagated to a copy before it was private would lie there."""
    for name, inside in (("over", "."), ("in", "deep")):
        for path in ((one := house.path.parent / name), (two := house.path.parent / f"{name}-two")):
            path.mkdir()
        with house.copies() as (copy,):
            attach(house.process.pid, copy.fd, one)
            assert house.do(f"mount -t tmpfs bait {one / inside}") == ""
            with pytest.raises(SystemCallFailed, match="over or in"):
                attach(house.process.pid, copy.fd, two)  # which moves it, with what is on it
        assert [house.sees(each) for each in (one, two, two / inside)] == [[], [], []]


def test_wherever_the_holder_has_moved_it(house: House) -> None:
    house.do(f"mkdir {house.path.parents[1]}/there && mount --move {house.path} {house.path.parents[1]}/there")
    assert house.is_taken()


HIDDEN = {
    "covered by its own": "mount -t tmpfs scz-smm $P",
    "covered by a copy of itself": "mount --bind $P $P",
    "unmounted": "umount -l $P",
    "replaced": "umount -l $P && mount -t tmpfs -o ro scz-smm $P",
    "its folder is a link": "mount --move $P /mnt && rmdir $P && ln -s /mnt $P && mount -t tmpfs x /mnt",
    "cannot be cloned": "mount --make-unbindable $P",
}


@pytest.mark.parametrize("command", HIDDEN.values(), ids=HIDDEN)
def test_what_the_holder_hides_is_not_taken(house: House, command: str) -> None:
    assert house.do(command.replace("$P", str(house.path))) == ""
    assert not house.is_taken()


def test_records_that_do_not_fit(house: House) -> None:
    held = house.record.held[0]
    for changes in (
        {"fsid": held.fsid + 1},
        {"fsid": 0},
        {"root_inode": held.root_inode + 1},
        {"device": "0:1"},
        {"mount_id": held.mount_id + 1},
        {"uid": 1},
        {"gid": 1},
        {"owner": "another"},
        {"shareable": False},
        {"released": True},
    ):
        assert not house.is_taken(house.forged(**changes)), changes
    for record in (
        replace(house.record, delivered=False),
        replace(house.record, keeper=(0, 0)),
        replace(house.record, keeper=(house.process.pid, 1)),
        replace(house.record, manifests=("sha256:" + "0" * 64,)),
        replace(house.record, namespace=(1, 2)),
        replace(house.record, held=()),
    ):
        assert not house.is_taken(record), record
    assert house.is_taken()
    # After all that: what does not fit hides nothing of another's that does.
    lost = replace(house.record, keeper=(2**22 + 1, 1), namespace=(1, 1))
    assert house.is_taken(house.record, replace(house.forged(fsid=1), namespace=(1, 2)), lost)


def test_the_superblock_of_another_manifest(house: House, tmp_path: Path) -> None:
    """Everything is true of the mount, but it holds another model: its model.json says so."""
    with filled(TestOwner(tmp_path), "other") as other:
        record = replace(house.record, manifests=(other.model.manifest.digest,))
        group = group_of(other.model, 0, 0)
        record = replace(record, held=(replace(record.held[0], owner=group.owner),))
        assert group.holds(record, 0)
        with house.copies(record, model=other.model) as found:
            assert found == ()
    assert house.is_taken()


def test_a_file_system_of_the_holders_own_about_which_the_record_lies(house: House) -> None:
    """A tmpfs of its own that equals the record in all but `f_fsid`, which the kernel draws."""
    own = house.path.parents[1] / "own"
    said = house.do(
        f"mkdir {own} && mount -t tmpfs -o mode=555 scz-smm {own} && cp -rp {house.path}/. {own} && "
        f"umount -l {house.path} && mount --move {own} {house.path} && mount -o remount,ro {house.path}"
    )
    assert said == ""
    there = house.seen_at(house.path)
    assert there.held[0].fsid != house.record.held[0].fsid
    assert not house.is_taken()
    assert not house.is_taken(house.seen_at(house.path, fsid=house.record.held[0].fsid))
    assert not house.is_taken(there)  # the kernel takes `noswap` from root of the initial user namespace alone


def test_an_overlay_can_equal_a_record_in_all_but_its_type(house: House) -> None:
    """Its `f_fsid` is that of the file system on top: the model's own here."""
    below, top = house.path.parents[1] / "below", house.path.parents[1] / "top"
    house.do(f"mkdir {below} {top} && mount --move {house.path} {top} && mount -t tmpfs x {below}")
    said = house.do(f"mount -t overlay -o ro,lowerdir={top}:{below} scz-smm {house.path} && echo there")
    assert said == "there\n"
    record = house.seen_at(house.path)
    assert not house.is_taken(record)
    there = clone_of(house.process.pid, house.path)
    try:
        seen, held = os.fstat(there), record.held[0]
        assert (os.fstatvfs(there).f_fsid, seen.st_ino) == (held.fsid, held.root_inode)
        assert f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}" == held.device
        assert contents(there) == FILES
        assert syscalls.fstatfs_type(there) != syscalls.TMPFS_MAGIC
        assert not verify_copy(there, house.model, group_of(house.model, 0, 0), held)
    finally:
        os.close(there)


def test_something_mounted_in_a_clone_before_it_was_private(house: House, tmp_path: Path) -> None:
    """It equals what it hides in all that can be asked of a file, but for its mount."""
    place, bait = tmp_path / "place", tmp_path / "bait"
    place.mkdir()
    with house.copies() as (copy,):
        mounts.attach(copy.fd, fd := open_directory(str(place)))
        os.close(fd)
        try:
            shutil.copytree(place, bait)
            held, group = house.record.held[0], group_of(house.model, 0, 0)
            assert verify_copy(copy.fd, house.model, group, held)
            for inside in ("deep", "deep/er", "weights", MODEL_DOCUMENT):
                subprocess.run(["mount", "--bind", bait / inside, place / inside], check=True)
                assert not verify_copy(copy.fd, house.model, group, held)
                subprocess.run(["umount", place / inside], check=True)
            assert verify_copy(copy.fd, house.model, group, held)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file's user": lambda top: os.chown(top / "weights", 1, 0),
    "a file's group": lambda top: os.chown(top / "weights", 0, 1),
    "a file's mode": lambda top: os.chmod(top / "weights", 0o644),
    "a file's size": lambda top: os.truncate(top / "weights", len(FILES["weights"]) - 1),
    "a larger file": lambda top: os.truncate(top / "weights", len(FILES["weights"]) + 1),
    "the document's owner": lambda top: os.chown(top / MODEL_DOCUMENT, 1, 0),
    "a folder's user": lambda top: os.chown(top / "deep", 1, 0),
    "a folder's mode": lambda top: os.chmod(top / "deep" / "er", 0o755),
    "the root's user": lambda top: os.chown(top, 1, 0),
    "the root's group": lambda top: os.chown(top, 0, 1),
    "the root's mode": lambda top: os.chmod(top, 0o755),
    "the document of another manifest": lambda top: change_one_byte(top / MODEL_DOCUMENT),
}


def change_one_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("change", [None, *CHANGES.values()], ids=["nothing", *CHANGES])
def test_one_thing_is_another(tmp_path: Path, change: Callable[[Path], object] | None) -> None:
    with filled(TestOwner(tmp_path), "m", change=change or (lambda _top: None)) as target:
        group = group_of(target.model, 0, 0)
        held = look_at(target.model, target.mount.fd, "", shareable=True).held(group.owner)
        assert verify_copy(target.mount.fd, target.model, group, held) is (change is None)


def test_another_than_the_recorded_file_system(tmp_path: Path) -> None:
    with filled(TestOwner(tmp_path), "m") as target:
        group = group_of(target.model, 0, 0)
        held = look_at(target.model, target.mount.fd, "", shareable=True).held(group.owner)
        for change in ({"fsid": held.fsid ^ 1}, {"device": "0:1"}, {"root_inode": held.root_inode + 1}):
            assert not verify_copy(target.mount.fd, target.model, group, replace(held, **change)), change
        assert verify_copy(target.mount.fd, target.model, group, held)


def test_a_superblock_that_can_be_written(tmp_path: Path) -> None:
    with open_house(tmp_path / "open", seal=False) as house:
        assert not house.is_taken()


def test_a_holder_that_dies(house: House) -> None:
    """Before it is looked at, and after the clone: the copy is whole or there is none."""
    with house.copies() as (copy,):
        house.process.kill()
        house.process.wait()
        assert contents(copy.fd) == FILES
    assert not house.is_taken()


def test_a_file_system_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_ONE_SECONDS", 0.3)
    monkeypatch.setattr(looker, "_ENDING_SECONDS", 0.1)
    with open_house(tmp_path / "one") as house, open_house(tmp_path / "two") as other:
        assert house.is_taken()
        marker = house.run / "shares" / "stuck"
        namesake = replace(other.record, manifests=house.record.manifests)
        with stuck_filesystem(house.path.parents[1], pid=house.process.pid):
            assert not house.is_taken()
            left = children()
            assert left
            assert marker.exists()
            # The next start meets the child that this one left, and leaves no other.
            assert not house.is_taken(namesake, house.record)
            assert children() == left
        for pid in left:
            os.waitpid(pid, 0)
        assert not house.is_taken(replace(house.record, delivered=False))
        assert not marker.exists()


def test_no_child_is_forked_where_keys_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes where another rules, and may hang there, was made before; when all are lost nothing is taken."""
    monkeypatch.setattr(share, "_ONE_SECONDS", 0.3)
    monkeypatch.setattr(looker, "_ENDING_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:
        names = ("good", "one", "two")
        good, one, two = [stack.enter_context(open_house(tmp_path / name)) for name in names]
        group = good.record.held[0].owner
        bad = [
            replace(each.record, manifests=good.record.manifests, held=(replace(each.record.held[0], owner=group),))
            for each in (one, two)
        ]
        for each in (one, two):
            stack.enter_context(stuck_filesystem(each.path.parents[1], pid=each.process.pid))
        lookers = [stack.enter_context(Looker()) for _ in range(2)]
        before = children()
        key = os.urandom(32)
        taken = take_copies(
            [good.model],
            0,
            0,
            runtime_directory=str(good.run),
            live=lambda: [good.record, *bad],
            stack=stack,
            locks=stack.enter_context(GroupLocks()),
            lookers=lookers,
        )
        assert taken == ()
        left = children()
        assert len(left) == 2
        assert left == before
        assert copies(os.getpid(), key) > 0
        assert [copies(pid, key) for pid in left] == [0, 0]
    for pid in left:
        os.waitpid(pid, 0)


def test_without_a_child_that_waits_nothing_is_looked_for(house: House) -> None:
    assert house.is_taken()
    house.lookers = 0
    assert not house.is_taken()


def test_one_that_is_lost_costs_no_copy(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_ONE_SECONDS", 0.3)
    monkeypatch.setattr(looker, "_ENDING_SECONDS", 0.1)
    with open_house(tmp_path / "two") as other:
        held = replace(other.record.held[0], owner=house.record.held[0].owner)
        bad = replace(other.record, manifests=house.record.manifests, held=(held,))
        with stuck_filesystem(other.path.parents[1], pid=other.process.pid):
            assert house.is_taken(house.record, bad)
            left = children()
            assert len(left) == 1
        os.waitpid(left[0], 0)


def test_a_holder_that_makes_it_fail_uses_up_no_child(house: House, tmp_path: Path) -> None:
    with open_house(tmp_path / "two") as other:
        assert other.do(f"mount --make-unbindable {other.path}") == ""
        held = replace(other.record.held[0], owner=house.record.held[0].owner)
        bad = replace(other.record, manifests=house.record.manifests, held=(held,))
        house.lookers = 1
        assert not house.is_taken(bad)
        assert house.is_taken(house.record, bad)


def test_a_namespace_that_did_not_answer_is_asked_once_in_a_start(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "_ONE_SECONDS", 0.3)
    monkeypatch.setattr(looker, "_ENDING_SECONDS", 0.1)
    with stuck_filesystem(house.path.parents[1], pid=house.process.pid):
        assert not house.is_taken(house.record, house.record, house.record)
        left = children()
        assert len(left) == 1  # each time that it is asked leaves one
    for pid in left:
        os.waitpid(pid, 0)


def test_one_of_the_expected_is_tried_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_house(tmp_path / "one") as house, open_house(tmp_path / "two") as other:
        nobody, false = replace(house.record, delivered=False), house.forged(fsid=1)
        assert house.is_taken(nobody, expected=[house.record])
        assert house.is_taken(nobody, expected=[false, house.record])  # the latest
        namesake = replace(other.record, manifests=house.record.manifests, held=house.record.held)
        assert not house.is_taken(nobody, expected=[house.record, namesake])
        # What is read under the lock has a time of its own.
        monkeypatch.setattr(share, "_EXPECTED_SECONDS", 0)
        assert not house.is_taken(nobody, expected=[house.record])
        assert house.is_taken(house.record, expected=[namesake])


def test_what_does_not_answer_and_was_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_EXPECTED_SECONDS", 0.3)
    monkeypatch.setattr(looker, "_ENDING_SECONDS", 0.1)
    with open_house(tmp_path / "one") as house, open_house(tmp_path / "two") as other:
        namesake = replace(other.record, manifests=house.record.manifests, held=house.record.held)
        with stuck_filesystem(other.path.parents[1], pid=other.process.pid):
            assert house.is_taken(house.record, namesake, expected=[namesake])
            left = children()
    for pid in left:
        os.waitpid(pid, 0)


def children() -> list[int]:
    """The forks of this process that were not reaped."""
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [
        int(pid) for pid in task if Path(f"/proc/{pid}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes()
    ]


def test_a_child_that_was_dismissed_is_reaped_at_the_end(house: House) -> None:
    before = children()
    with house.copies() as found:
        assert len(found) == 1
        for pid in set(children()) - set(before):
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is not None
    assert children() == before


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


KUBELET_SECONDS = 120  # runtimeRequestTimeout, by default; `sczctl install` gives a hook 300


def test_a_lock_that_others_keep(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for while there is time left to decrypt afterwards; then nothing is shared."""
    assert house.is_taken()
    name = group_of(house.model, 0, 0).lock_name
    with lock_file(house.run / "shares" / name, timeout_seconds=1, error=SystemCallFailed), monkeypatch.context() as by:
        clock = Clock()
        by.setattr(locks, "time", clock)
        by.setattr(share_lock, "time", clock)
        assert not house.is_taken()
        assert 0 < clock.now < KUBELET_SECONDS / 3
    assert house.is_taken()


def test_several_locks_have_one_time_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clock = str(tmp_path / "run"), Clock()
    with GroupLocks() as others, GroupLocks() as ours, monkeypatch.context() as by:
        others.lock(run, ["b"])
        by.setattr(locks, "time", clock)
        by.setattr(share_lock, "time", clock)
        with pytest.raises(SystemCallFailed):
            ours.lock(run, ["b", "a", "b"])
        assert clock.now < KUBELET_SECONDS / 3
        assert len(set(os.listdir(tmp_path / "run" / "shares"))) == 2
    assert os.listdir(tmp_path / "run" / "shares") == []


def test_who_waited_for_a_lock_whose_file_went_has_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = str(tmp_path / "run"), tmp_path / "run" / "shares" / "a"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        with GroupLocks() as first:
            first.lock(run, ["a"])
            waiting = pool.submit(stack.enter_context(GroupLocks()).lock, run, ["a"])
            wait_until(lambda: [os.path.realpath(f"/proc/self/fd/{fd}") for fd in fds()].count(str(path)) == 2)
            path.unlink()
            path.touch()
        waiting.result(timeout=30)
        monkeypatch.setattr(share_lock, "LOCK_SECONDS", 0.1)
        path.touch()
        with pytest.raises(SystemCallFailed), GroupLocks() as third:
            third.lock(run, ["a"])
    assert not path.exists()


def fds() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_a_lock_ends_with_the_hook_whatever_becomes_of_its_writer(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_PROGRESS_SECONDS", 0)
    owner, root = TestOwner(tmp_path), house.path.parents[1]
    model = owner.pack("large", {"weights": noise(64 << 20)})
    (run := tmp_path / "run").mkdir(mode=0o700)
    view = ContainerView("c", house.process.pid, str(root), ".", frozenset(), 0, 0, mount_namespace_joined=False)
    seen: list[set[str]] = []

    def look(_done: int, _all: int) -> None:
        for pid in children() if not seen else []:
            os.kill(pid, signal.SIGSTOP)
            with contextlib.suppress(FileNotFoundError):
                seen.append({os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")})
            os.kill(pid, signal.SIGCONT)

    with contextlib.ExitStack() as stack, open_layout(model.bundle) as layout:
        wanted = replace(owner.delivery(model, layout), destination="/large")
        process = stack.enter_context(HeldProcess(house.process.pid))
        root_fd = os.open(f"/proc/{process.pid}/root{root}", os.O_PATH)
        stack.callback(os.close, root_fd)
        identity = os.fstat(root_fd)
        stack.callback(os.close, namespace_fd := process.open(MOUNT_NAMESPACE))
        ground = Ground(RootIdentity(str(root), identity.st_dev, identity.st_ino), namespace_fd, root_fd)
        holder = Holder("runc", process, ground, contextlib.ExitStack(), keeper=process)
        settings = DeliverySettings(0, str(run), 1, 60)
        with Delivery(view, settings, find=lambda: holder) as delivery:
            delivery.prepare(["/large"])
            assert delivery.share([wanted], lambda: ()) == frozenset()
            (lock,) = (run / "shares").iterdir()
            delivery.fill([wanted], look)
            assert str(lock) in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in fds()}
            (attached,) = delivery.attach()
            assert attached.shareable
    (writers,) = [names for names in seen if any(name.startswith(str(model.bundle)) for name in names)]
    assert str(lock) not in writers
    assert list((run / "shares").iterdir()) == []


def test_what_makes_a_group(house: House) -> None:
    group = group_of(house.model, 0, 0)
    names = {
        replace(group, **change).lock_name for change in ({}, {"uid": 1}, {"gid": 1}, {"owner": "x"}, {"manifest": "y"})
    }
    assert len(names) == 5
    assert all(len(name) == 64 for name in names)
