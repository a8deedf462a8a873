"""The hot path: every size arrives, and what was changed never does. Needs root."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import select
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.delivery.fill import FillOptions, Target, default_workers, fill
from oci_hook.delivery.place import LargeFile, Workplace
from oci_hook.delivery.room import model_room
from oci_hook.errors import (
    BundleInvalid,
    BundleMismatch,
    DecryptionRefused,
    FileUnreadable,
    SczError,
    SystemCallFailed,
    WriterFailed,
)
from oci_hook.linux import syscalls
from oci_hook.linux.mounts import (
    DetachedMount,
    MemoryFilesystem,
    create_memory_filesystem,
    seal_superblock,
)
from oci_hook.linux.namespaces import Channel, Child, Report
from tests.disks import cached_bytes, forget, open_disk
from tests.models import AROUND_SEGMENTS, FIRST, MIB, OTHER, Files, PackedModel, TestOwner, noise

BOTH = pytest.mark.parametrize("kind", list(MemoryFilesystem))


@contextmanager
def opened(owner: TestOwner, model: PackedModel, kind: MemoryFilesystem = MemoryFilesystem.TMPFS) -> Iterator[Target]:
    """A model and a file system just large enough."""
    with open_layout(model.bundle) as layout:
        delivery = owner.delivery(model, layout)
        room = model_room(delivery)
        with create_memory_filesystem(room.size_bytes, room.inodes, kind) as mount:
            yield Target(delivery, mount)


def options(*, workers: int | None = None, uid: int = 0, gid: int = 0, drop_cache: bool = False) -> FillOptions:
    return FillOptions(uid, gid, workers, drop_cache)


def contents(mount: DetachedMount) -> Files:
    """Every file of a detached file system, by path, but model.json."""
    top = f"/proc/self/fd/{mount.fd}/"
    found = {}
    for folder, _, names in os.walk(top):
        for name in names:
            found[os.path.relpath(os.path.join(folder, name), top)] = Path(folder, name).read_bytes()
    del found["model.json"]
    return found


@contextmanager
def filling(target: Target, settings: FillOptions) -> Iterator[Child]:
    """A writer as the delivery has it, a process of its own; if it refuses, it stays until it is told to end."""

    def body(channel: Channel) -> Report:
        try:
            done = fill([target], settings, lambda _done: None)
        except SczError as refusal:
            channel.send({"refused": refusal.reason, "message": refusal.message})
            channel.receive()
            raise
        return {"filled": done}

    with Child("the test's writer", body, gone=WriterFailed) as writer:
        yield writer


@contextmanager
def ending(owner: TestOwner, model: PackedModel) -> Iterator[Target]:
    """As `opened`; at the end of the block the file system must be gone, by the kernel's word."""
    watch = syscalls.inotify_init1()
    try:
        with opened(owner, model) as target:
            syscalls.inotify_add_watch(watch, f"/proc/self/fd/{target.mount.fd}", syscalls.IN_UNMOUNT)
            yield target
            assert select.select([watch], [], [], 0)[0] == []
        assert select.select([watch], [], [], 30)[0] == [watch]
        _, mask = struct.unpack("iI", os.read(watch, 4096)[:8])
        assert mask & syscalls.IN_UNMOUNT
    finally:
        os.close(watch)


@pytest.fixture
def owner(tmp_path: Path) -> TestOwner:
    return TestOwner(tmp_path)


class TestContents:
    @BOTH
    @pytest.mark.parametrize("workers", [1, 2, 3, None])
    def test_every_size(self, owner: TestOwner, kind: MemoryFilesystem, workers: int | None) -> None:
        files = {f"some/{size}": noise(size) for size in AROUND_SEGMENTS}
        seen: list[int] = []
        with opened(owner, owner.pack("m", files), kind) as target:
            done = fill([target], options(workers=workers, drop_cache=workers == 1), seen.append)
            assert contents(target.mount) == files
            room = os.fstatvfs(target.mount.fd)
        assert done == seen[-1] == sum(AROUND_SEGMENTS)
        assert seen == sorted(seen)
        if kind is MemoryFilesystem.TMPFS:
            assert (room.f_bfree, room.f_ffree) == (0, 0)

    def test_several_models_are_one_list(self, owner: TestOwner) -> None:
        one, other = {"a": noise(3 * MIB)}, {"a": noise(5), "b": noise(FIRST + OTHER)}
        with opened(owner, owner.pack("one", one)) as first, opened(owner, owner.pack("other", other)) as second:
            assert fill([first, second], options(), lambda _done: None) == 3 * MIB + 5 + FIRST + OTHER
            assert contents(first.mount) == one
            assert contents(second.mount) == other

    @pytest.mark.parametrize("workers", [1, 3])
    def test_small_and_large_files_of_several_models_in_any_directory(self, owner: TestOwner, workers: int) -> None:
        small = {f"{number % 7}/{number % 3}/{number}": noise(number) for number in range(150)}
        one = small | {"top": noise(FIRST), "0/large": noise(9 * MIB, 1), "z": noise(FIRST + 1)}
        other = {f"only/small/{number}": noise(number, 2) for number in range(64)}
        with opened(owner, owner.pack("one", one)) as first, opened(owner, owner.pack("other", other)) as second:
            total = sum(len(data) for files in (one, other) for data in files.values())
            assert fill([first, second], options(workers=workers), lambda _done: None) == total
            assert contents(first.mount) == one
            assert contents(second.mount) == other

    @pytest.mark.parametrize("workers", [1, 3])
    def test_huge_pages_that_the_kernel_does_not_give(self, owner: TestOwner, workers: int) -> None:
        files = {"large": noise(9 * MIB + 1), "other": noise(2 * MIB)}
        with opened(owner, owner.pack("m", files), MemoryFilesystem.RAMFS) as plain:
            target = Target(plain.model, dataclasses.replace(plain.mount, huge=True))
            fill([target], options(workers=workers), lambda _done: None)
            assert contents(target.mount) == files

    def test_a_file_that_cannot_be_mapped(self, owner: TestOwner) -> None:
        files = {"large": noise(64 * MIB)}
        with opened(owner, owner.pack("m", files)) as made:
            target = Target(made.model, dataclasses.replace(made.mount, huge=True))

            def body(_channel: Channel) -> Report:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * os.sysconf("SC_PAGESIZE") + 32 * MIB
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                return {"filled": fill([target], options(workers=1), lambda _done: None)}

            with Child("the test's writer", body, gone=WriterFailed) as writer:
                assert writer.receive(30) == {"done": {"filled": 64 * MIB}}
            assert contents(made.mount) == files

    def test_one_layer_under_two_names(self, owner: TestOwner) -> None:
        files = {"a": b"same", "b": b"same"}
        with opened(owner, owner.pack("m", files)) as target:
            fill([target], options(), lambda _done: None)
            assert contents(target.mount) == files

    @BOTH
    def test_owners_and_modes(self, owner: TestOwner, kind: MemoryFilesystem) -> None:
        with opened(owner, owner.pack("m", {"d/e/f": noise(3 * MIB), "g": b""}), kind) as target:
            fill([target], options(uid=7, gid=8), lambda _done: None)
            for path, mode in {".": 0o555, "d": 0o555, "d/e": 0o555, "d/e/f": 0o444, "g": 0o444}.items():
                seen = os.stat(path, dir_fd=target.mount.fd)
                assert (seen.st_mode & 0o7777, seen.st_uid, seen.st_gid) == (mode, 7, 8)
            fd = os.open("model.json", os.O_RDONLY, dir_fd=target.mount.fd)
            assert os.read(fd, 4096) == target.model.document
            os.close(fd)

    def test_nothing_stays_open(self, owner: TestOwner) -> None:
        with opened(owner, owner.pack("m", {"a": noise(3 * MIB), "b": b"1"})) as target:
            before = sorted(os.listdir("/proc/self/fd"))
            fill([target], options(), lambda _done: None)
            assert sorted(os.listdir("/proc/self/fd")) == before
            assert "scz-smm" not in Path("/proc/self/maps").read_text()

    def test_memory_is_flat(self, owner: TestOwner) -> None:
        files = {"large": noise(16 * MIB)} | {f"small/{number}": b"x" for number in range(200)}
        with opened(owner, owner.pack("m", files)) as target:
            tracemalloc.start()
            try:
                fill([target], options(workers=1), lambda _done: None)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak < 4 * MIB


class TestRefused:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize(
        "place",
        [0, 1, 33, 40, MIB - 17, MIB - 1, MIB, 2 * MIB + 5, 4 * MIB - 16, -17, -1],
        ids=lambda place: f"byte {place}",
    )
    def test_one_flipped_bit(self, owner: TestOwner, place: int, workers: int) -> None:
        model = owner.pack("m", {"a": noise(4 * MIB), "b": noise(4 * MIB, 1)})
        data = bytearray(model.layer("a").read_bytes())
        data[place] ^= 0x10
        model.layer("a").write_bytes(data)
        with opened(owner, model) as target, pytest.raises(DecryptionRefused):
            fill([target], options(workers=workers), lambda _done: None)

    def test_segments_in_another_order(self, owner: TestOwner) -> None:
        model = owner.pack("m", {"a": noise(4 * MIB)})
        data = model.layer("a").read_bytes()
        swapped = data[:MIB] + data[2 * MIB : 3 * MIB] + data[MIB : 2 * MIB] + data[3 * MIB :]
        model.layer("a").write_bytes(swapped)
        with opened(owner, model) as target, pytest.raises(DecryptionRefused, match="segment 1 of 5"):
            fill([target], options(workers=1), lambda _done: None)

    def test_another_files_layer(self, owner: TestOwner) -> None:
        model = owner.pack("m", {"a": noise(100), "b": noise(100, 1)})
        model.layer("a").write_bytes(model.layer("b").read_bytes())
        with opened(owner, model) as target, pytest.raises(DecryptionRefused):
            fill([target], options(), lambda _done: None)

    def test_another_models_key(self, owner: TestOwner) -> None:
        model = owner.pack("m", {"a": b"", "b": noise(MIB)})
        wrong = PackedModel(model.bundle, os.urandom(32), model.files)
        with opened(owner, wrong) as target, pytest.raises(DecryptionRefused):
            fill([target], options(), lambda _done: None)

    @pytest.mark.parametrize(("size", "error"), [(-1, BundleMismatch), (1, BundleMismatch), (None, BundleInvalid)])
    def test_a_layer_of_another_size_or_none(self, owner: TestOwner, size: int | None, error: type[Exception]) -> None:
        model = owner.pack("m", {"a": noise(3 * MIB)})
        layer = model.layer("a")
        if size is None:
            layer.unlink()
        else:
            os.truncate(layer, layer.stat().st_size + size)
        with opened(owner, model) as target, pytest.raises(error):
            fill([target], options(), lambda _done: None)

    def test_a_layer_that_becomes_shorter_meanwhile(self, owner: TestOwner) -> None:
        model = owner.pack("m", {"a": noise(8 * MIB)})

        def shorten(_done: int) -> None:
            os.truncate(model.layer("a"), 4 * MIB)

        with opened(owner, model) as target, pytest.raises(FileUnreadable, match="ends early"):
            fill([target], options(workers=1), shorten)

    def test_a_large_file_that_cannot_be_opened_says_so_to_every_thread(self, owner: TestOwner) -> None:
        with opened(owner, owner.pack("m", {"a": noise(8 * MIB)})) as target:

            def body(_channel: Channel) -> Report:
                resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
                file, said = LargeFile(target, target.model.manifest.files[0]), []
                for start in (0, 2):
                    with Workplace(options()) as workplace, pytest.raises(OSError) as caught:
                        file.decrypt(range(start, start + 2), workplace)
                    said.append(caught.value.errno)
                return {"said": said}

            with Child("the test's writer", body, gone=WriterFailed) as writer:
                assert writer.receive(30) == {"done": {"said": [errno.EFBIG, errno.EFBIG]}}

    def test_a_file_system_that_is_too_small(self, owner: TestOwner) -> None:
        model = owner.pack("m", {"a": noise(MIB), "b": noise(MIB)})
        with open_layout(model.bundle) as layout, create_memory_filesystem(MIB, 9, MemoryFilesystem.TMPFS) as mount:
            target = Target(owner.delivery(model, layout), mount)
            with pytest.raises(SystemCallFailed, match="cannot be written to memory"):
                fill([target], options(), lambda _done: None)


class TestPageCache:
    """What of an encrypted file stays in the page cache, on a disk whose cache can be dropped."""

    def fill(self, owner: TestOwner, model: PackedModel, *, drop: bool, workers: int) -> int:
        """Decrypt a model whose large file is not cached; the most of it that was cached meanwhile, in bytes."""
        large = model.layer("large")
        forget(large)
        seen: list[int] = []
        with opened(owner, model) as target:
            settings = options(workers=workers, drop_cache=drop)
            fill([target], settings, lambda _done: seen.append(cached_bytes(large)))
            assert contents(target.mount) == model.files
        return max(seen)

    def test_it_is_dropped_behind_or_kept_warm(self, owner: TestOwner, tmp_path: Path) -> None:
        size = 80 * MIB
        packed = owner.pack("m", {"large": noise(size), "small": b"1"})
        with open_disk(tmp_path, 256 * MIB) as disk:
            model = disk.move(packed)
            large, small = model.layer("large"), model.layer("small")
            assert 0 < self.fill(owner, model, drop=True, workers=1) < size // 2
            assert cached_bytes(large) == cached_bytes(small) == 0
            assert self.fill(owner, model, drop=False, workers=2) >= size // 2
            assert cached_bytes(large) >= size
            assert cached_bytes(small) > 0


class TestNothingIsLeft:
    """A writer that is a process, and what its end leaves."""

    def verify_gone(self, target: Target, refused: str, writer: Child) -> None:
        """The writer has refused, its files cannot be sealed while it lives, and with the mount all is gone."""
        report = writer.receive(30)
        assert report["refused"] == refused, report
        with pytest.raises(SystemCallFailed, match="a writer is left"):
            seal_superblock(target.mount.fd)
        writer.send({})
        with pytest.raises(SczError) as caught:
            writer.receive(30)
        assert caught.value.reason == refused

    def test_what_does_not_authenticate_is_reached_by_nobody(self, owner: TestOwner) -> None:
        plain = noise(4 * MIB)
        model = owner.pack("m", {"a": plain})
        layer = model.layer("a")
        data = bytearray(layer.read_bytes())
        data[-1] ^= 1
        layer.write_bytes(data)
        with ending(owner, model) as target:
            with filling(target, options(workers=1)) as writer:
                self.verify_gone(target, "DecryptionRefused", writer)
            # The cipher writes before it has seen the tag: this is why nothing is attached before all is whole.
            (left,) = contents(target.mount).values()
            assert left[: 3 * MIB] == plain[: 3 * MIB]
            seen = os.stat("a", dir_fd=target.mount.fd)
            assert seen.st_mode & 0o7777 == 0o600

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_disk_that_fails_half_way(self, owner: TestOwner, tmp_path: Path, workers: int) -> None:
        packed = owner.pack("m", {"a": noise(24 * MIB)})
        with open_disk(tmp_path) as disk:
            model = disk.move(packed)
            with ending(owner, model) as target:
                disk.fail(model.layer("a"), 6 * MIB)
                with filling(target, options(workers=workers)) as writer:
                    self.verify_gone(target, "FileUnreadable", writer)
                assert os.fstatvfs(target.mount.fd).f_bfree < os.fstatvfs(target.mount.fd).f_blocks

    def test_a_writer_that_is_done_leaves_no_writer(self, owner: TestOwner) -> None:
        files = {"a": noise(8 * MIB), "b": b"1"}
        with opened(owner, owner.pack("m", files)) as target:
            with filling(target, options(workers=2)) as writer:
                assert writer.receive(30) == {"done": {"filled": 8 * MIB + 1}}
                writer.join(30)
            seal_superblock(target.mount.fd)
            assert contents(target.mount) == files
            room = os.fstatvfs(target.mount.fd)
            assert (room.f_bfree, room.f_ffree) == (0, 0)


def test_no_more_workers_than_cores() -> None:
    assert 1 <= default_workers() <= min(4, len(os.sched_getaffinity(0)))
