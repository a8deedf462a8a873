"""A copy is taken from a live holder only if it is the very file system of the record; the holder may try what it can.

The holder is a shell that rules its own user and mount namespaces, with a real sealed model in them. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.delivery import looker, share
from oci_hook.delivery.attached import look_at
from oci_hook.delivery.fill import FillOptions, Target, fill
from oci_hook.delivery.holder import open_directory
from oci_hook.delivery.looker import Looker
from oci_hook.delivery.room import ModelDelivery, model_room
from oci_hook.delivery.share import SharedCopy, group_of, take_copies, verify_copy
from oci_hook.errors import HolderGone, SystemCallFailed
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import MemoryFilesystem, create_memory_filesystem
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.linux.processes import process_start_time
from oci_hook.locks import lock_file
from oci_hook.records import ContainerRecord
from tests.models import TestOwner, noise
from tests.process_memory import copies
from tests.stuck import stuck_filesystem
from tests.unshared import told

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
    def copies(self, *records: ContainerRecord, model: ModelDelivery | None = None) -> Iterator[tuple[SharedCopy, ...]]:
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
                lookers=[stack.enter_context(Looker()) for _ in range(self.lookers)],
            )

    def is_taken(self, *records: ContainerRecord) -> bool:
        with self.copies(*records) as found:
            return [contents(copy.fd) for copy in found] == [FILES]

    def forged(self, **changes: object) -> ContainerRecord:
        return replace(self.record, held=(replace(self.record.held[0], **changes),))

    def seen_at(self, path: Path, **changes: object) -> ContainerRecord:
        """A record that tells of what lies at a path whatever can be told of it."""
        (mount, *_) = [
            each
            for each in reversed(mounts.parse_mountinfo(Path(f"/proc/{self.process.pid}/mountinfo").read_bytes()))
            if each.mount_point == str(path)
        ]
        there = f"/proc/{self.process.pid}/root{path}"
        held = {"mount_id": mount.mount_id, "device": mount.device, "fsid": os.statvfs(there).f_fsid}
        return self.forged(**{**held, "root_inode": os.stat(there).st_ino, **changes})


def contents(fd: int) -> dict[str, bytes]:
    top = Path(f"/proc/self/fd/{fd}/")
    return {name: (top / name).read_bytes() for name in FILES}


@contextlib.contextmanager
def filled(owner: TestOwner, name: str, *, seal: bool = True) -> Iterator[Target]:
    model = owner.pack(name, FILES)
    with open_layout(model.bundle) as layout:
        delivery = owner.delivery(model, layout)
        room = model_room(delivery)
        with create_memory_filesystem(room.size_bytes, room.inodes, MemoryFilesystem.TMPFS) as mount:
            fill([target := Target(delivery, mount)], FillOptions(0, 0, 1, False), lambda _done: None)
            if seal:
                mounts.seal_superblock(mount.fd)
            mounts.set_mount_flags(mount.fd)
            yield target


def attach(pid: int, fd: int, path: Path) -> None:
    """As a delivery does."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)

    def body(_channel: Channel) -> Report:
        enter_mount_namespace(namespace)
        mounts.attach(fd, open_directory(str(path)))
        return {}

    with Child("test", body, gone=HolderGone) as child:
        child.receive(10)
        child.join(10)
    os.close(namespace)


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


def test_wherever_the_holder_has_moved_it(house: House) -> None:
    house.do(f"mkdir {house.path.parents[1]}/there && mount --move {house.path} {house.path.parents[1]}/there")
    assert house.is_taken()


HIDDEN = {
    "covered by its own": "mount -t tmpfs scz-smm $P",
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
    # After all that: what does not fit hides nothing that does.
    assert house.is_taken(house.record, house.forged(fsid=1), replace(house.record, keeper=(2**22 + 1, 1)))


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
    there = os.open(f"/proc/{house.process.pid}/root{house.path}", os.O_PATH | os.O_DIRECTORY)
    try:
        seen, held = os.fstat(there), record.held[0]
        assert (os.fstatvfs(there).f_fsid, seen.st_ino) == (held.fsid, held.root_inode)
        assert f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}" == held.device
        assert syscalls.fstatfs_type(there) != syscalls.TMPFS_MAGIC
        assert not verify_copy(there, house.model, group_of(house.model, 0, 0), held)
    finally:
        os.close(there)


def test_something_mounted_in_a_clone_before_it_was_private(house: House, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with house.copies() as (copy,):
        mounts.attach(copy.fd, fd := open_directory(str(place)))
        os.close(fd)
        try:
            held, group = house.record.held[0], group_of(house.model, 0, 0)
            assert verify_copy(copy.fd, house.model, group, held)
            for inside, command in (
                ("deep", ["mount", "-t", "tmpfs", "bait"]),
                ("weights", ["mount", "--bind", "/etc/hostname"]),
            ):
                subprocess.run([*command, place / inside], check=True)
                assert not verify_copy(copy.fd, house.model, group, held)
                subprocess.run(["umount", place / inside], check=True)
            assert verify_copy(copy.fd, house.model, group, held)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


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


def test_a_holder_that_makes_it_fail_uses_up_no_child(house: House) -> None:
    other = house.path.parents[1] / "other"
    assert house.do(f"mkdir {other} && mount --bind {house.path} {other} && mount --make-unbindable {house.path}") == ""
    house.lookers = 1
    assert house.is_taken(house.seen_at(other), house.record, house.record)


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


def test_a_lock_that_others_keep(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, but not for ever; then nothing is shared."""
    monkeypatch.setattr(share, "_LOCK_SECONDS", 0.1)
    assert house.is_taken()
    name = group_of(house.model, 0, 0).lock_name
    with lock_file(house.run / "shares" / name, timeout_seconds=1, error=SystemCallFailed):
        assert not house.is_taken()
    assert house.is_taken()


def test_what_makes_a_group(house: House) -> None:
    group = group_of(house.model, 0, 0)
    names = {
        replace(group, **change).lock_name for change in ({}, {"uid": 1}, {"gid": 1}, {"owner": "x"}, {"manifest": "y"})
    }
    assert len(names) == 5
    assert all(len(name) == 64 for name in names)
