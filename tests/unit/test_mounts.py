"""mountinfo, detached memory file systems, and their sealing. Needs root."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import HolderGone, SystemCallFailed
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import MemoryFilesystem, Mount
from oci_hook.linux.namespaces import Channel, Child, Report

BOTH = pytest.mark.parametrize("kind", list(MemoryFilesystem))
LINE = rb"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue"


class TestMountinfo:
    def test_the_example_of_proc_5(self) -> None:
        assert mounts.parse_mountinfo(LINE + b"\n") == (
            Mount(
                mount_id=36,
                parent_id=35,
                device="98:0",
                root="/mnt1",
                mount_point="/mnt 2",
                options=frozenset({"rw", "noatime"}),
                tags=("master:1", "shared:7"),
                kind="ext3",
                super_options=frozenset({"rw", "errors=continue"}),
                source="/dev/root",
            ),
        )

    @pytest.mark.parametrize(("tags", "shared"), [(b"shared:1 ", True), (b"master:1 ", False), (b"", False)])
    def test_what_propagates(self, tags: bytes, shared: bool) -> None:
        (mount,) = mounts.parse_mountinfo(b"1 2 0:3 / / rw " + tags + b"- tmpfs none rw")
        assert mount.shared is shared

    def test_a_source_may_be_empty(self) -> None:
        (mount,) = mounts.parse_mountinfo(b"1 2 0:3 / / rw - tmpfs  rw,size=1k")
        assert mount.super_options == {"rw", "size=1k"}

    def test_every_escape(self) -> None:
        (mount,) = mounts.parse_mountinfo(rb"1 2 0:3 / /a\011b\012c\040d\134e rw - tmpfs none rw")
        assert mount.mount_point == "/a\tb\nc d\\e"

    @pytest.mark.parametrize(
        "line",
        [
            b"1",
            b"1 2 0:3 / / rw tmpfs none rw",
            b"x 2 0:3 / / rw - t s rw",
            b"1 2 0:3 / / - t s rw",
            b"1 2 3 4 5 6 - t",
        ],
    )
    def test_what_is_not_mountinfo(self, line: bytes) -> None:
        with pytest.raises(SystemCallFailed):
            mounts.parse_mountinfo(line)

    @given(st.binary() | st.binary().map(lambda noise: LINE + noise))
    def test_anything_gives_mounts_or_an_error_of_ours(self, data: bytes) -> None:
        try:
            found = mounts.parse_mountinfo(data)
        except SystemCallFailed:
            return
        assert all(isinstance(mount, Mount) for mount in found)

    def test_our_own(self) -> None:
        fd = os.open("/proc/self", os.O_PATH)
        try:
            found = mounts.load_mountinfo(fd)
        finally:
            os.close(fd)
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        assert [mount.mount_id for mount in found] == [int(line.split()[0]) for line in lines]


@contextmanager
def writable(mount: mounts.DetachedMount, name: str = "file") -> Iterator[int]:
    """A file in a detached file system, open for writing."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT, dir_fd=mount.fd)
    try:
        yield fd
    finally:
        os.close(fd)


def mounted(folder: Path) -> list[str]:
    """What this process sees mounted at or below a folder of the test; other tests mount elsewhere meanwhile."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [place for place in places if Path(place).is_relative_to(folder)]


class TestMemoryFilesystem:
    @BOTH
    def test_it_has_no_path(self, kind: MemoryFilesystem) -> None:
        with mounts.create_memory_filesystem(1 << 20, 5, kind) as mount:
            assert mount.kind is kind
            device = os.stat(".", dir_fd=mount.fd).st_dev
            number = f" {os.major(device)}:{os.minor(device)} "
            assert number not in Path("/proc/self/mountinfo").read_text()
            assert os.stat(".", dir_fd=mount.fd).st_mode & 0o7777 == 0o700
            assert os.listdir(f"/proc/self/fd/{mount.fd}") == []

    def test_a_tmpfs_takes_exactly_what_it_was_made_for(self) -> None:
        with mounts.create_memory_filesystem(8192, 2, MemoryFilesystem.TMPFS) as mount:
            with writable(mount) as fd:
                assert os.pwrite(fd, bytes(8192), 0) == 8192
                with pytest.raises(OSError) as caught:
                    os.pwrite(fd, b"x", 8192)
                assert caught.value.errno == errno.ENOSPC
            with pytest.raises(OSError) as caught:
                os.mkdir("one too many", dir_fd=mount.fd)
            assert caught.value.errno == errno.ENOSPC

    def test_a_tmpfs_for_nothing_is_not_a_tmpfs_without_limit(self) -> None:
        with mounts.create_memory_filesystem(0, 1, MemoryFilesystem.TMPFS) as mount:
            assert os.fstatvfs(mount.fd).f_blocks == 1

    def test_two_have_different_ids(self) -> None:
        kind = MemoryFilesystem.TMPFS
        with mounts.create_memory_filesystem(1, 1, kind) as one, mounts.create_memory_filesystem(1, 1, kind) as other:
            assert os.fstatvfs(one.fd).f_fsid != os.fstatvfs(other.fd).f_fsid

    def test_the_kernel_gives_one_or_the_other(self) -> None:
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        expected = MemoryFilesystem.TMPFS if release >= (6, 4) else MemoryFilesystem.RAMFS
        assert mounts.probe_memory_filesystem() is expected


class TestSealing:
    @BOTH
    def test_an_open_writer_is_found(self, kind: MemoryFilesystem) -> None:
        with mounts.create_memory_filesystem(1 << 20, 5, kind) as mount:
            with writable(mount), pytest.raises(SystemCallFailed, match="a writer is left"):
                mounts.seal_superblock(mount.fd)
            with writable(mount, "still writable"):
                pass

    @BOTH
    def test_a_mapping_is_a_writer(self, kind: MemoryFilesystem) -> None:
        with mounts.create_memory_filesystem(1 << 20, 5, kind) as mount:
            with writable(mount) as fd:
                os.ftruncate(fd, 4096)
                mapping = mmap.mmap(fd, 4096)
            with mapping, pytest.raises(SystemCallFailed, match="a writer is left"):
                mounts.seal_superblock(mount.fd)
            mounts.seal_superblock(mount.fd)

    @BOTH
    def test_nothing_can_be_written_afterwards(self, kind: MemoryFilesystem) -> None:
        with mounts.create_memory_filesystem(1 << 20, 5, kind) as mount:
            with writable(mount) as fd:
                os.write(fd, b"model")
            mounts.seal_superblock(mount.fd)
            mounts.set_mount_flags(mount.fd)
            flags = os.fstatvfs(mount.fd).f_flag
            wanted = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | 0x2000  # ST_NOSYMFOLLOW
            assert flags & wanted == wanted
            for attempt in (
                lambda: os.open("file", os.O_RDWR, dir_fd=mount.fd),
                lambda: os.open("other", os.O_RDWR | os.O_CREAT, dir_fd=mount.fd),
                lambda: os.unlink("file", dir_fd=mount.fd),
                lambda: os.chmod("file", 0o777, dir_fd=mount.fd),
            ):
                with pytest.raises(OSError) as caught:
                    attempt()
                assert caught.value.errno == errno.EROFS


class TestErasing:
    @BOTH
    def test_who_has_a_file_open_reads_nothing_any_more(self, kind: MemoryFilesystem) -> None:
        with mounts.create_memory_filesystem(1 << 20, 9, kind) as mount:
            os.mkdir("deep", dir_fd=mount.fd)
            for name in ("file", "deep/file"):
                with writable(mount, name) as fd:
                    os.write(fd, b"model")
                    os.fchmod(fd, 0o444)
            mounts.seal_superblock(mount.fd)
            mounts.set_mount_flags(mount.fd)
            kept = [os.open(name, os.O_RDONLY, dir_fd=mount.fd) for name in ("file", "deep/file")]
            assert [os.pread(fd, 9, 0) for fd in kept] == [b"model", b"model"]
            before = len(os.listdir("/proc/self/fd"))
            mounts.erase(mount.fd)
            assert len(os.listdir("/proc/self/fd")) == before
            assert [os.pread(fd, 9, 0) for fd in kept] == [b"", b""]
            assert os.fstatvfs(mount.fd).f_flag & os.ST_RDONLY
            for fd in kept:
                os.close(fd)


class TestAttaching:
    def test_it_becomes_visible_in_one_namespace_and_can_be_taken_back(self, tmp_path: Path) -> None:

        def body(_channel: Channel) -> Report:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            syscalls.mount_propagation("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
            with mounts.create_memory_filesystem(1 << 20, 5, MemoryFilesystem.TMPFS) as mount:
                with writable(mount):
                    pass
                destination = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
                mounts.attach(mount.fd, destination)
                attached = os.listdir(tmp_path)
                mounts.detach(mount.fd)
            return {"attached": attached, "after": os.listdir(tmp_path)}

        with Child("the test's child", body, gone=HolderGone) as child:
            assert child.receive(10) == {"done": {"attached": ["file"], "after": []}}
        assert mounted(tmp_path) == []

    def test_a_file_is_no_place_for_it(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        destination = os.open(tmp_path / "file", os.O_PATH)
        try:
            with (
                mounts.create_memory_filesystem(1, 1, MemoryFilesystem.TMPFS) as mount,
                pytest.raises(SystemCallFailed, match="cannot be attached"),
            ):
                mounts.attach(mount.fd, destination)
        finally:
            os.close(destination)
        assert mounted(tmp_path) == []
