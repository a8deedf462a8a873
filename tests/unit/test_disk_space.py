"""`disk_space`: what a full disk says, beforehand and when it happens."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.disk_space import Need, block_bytes, full_disk_explained, mount_point, size_text, verify_room
from oci_hook.errors import FileUnreadable, SourceInvalid

REMEDY = "free {size} on {mount}"


@contextlib.contextmanager
def small_disk(folder: Path, options: str = "size=1m") -> Iterator[Path]:
    """A tmpfs of 1 MiB at `folder`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, env={})
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True, env={})
        assert not os.path.ismount(folder)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 KiB"),
        (1, "1 KiB"),
        (1025, "2 KiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 20) + 1, "2 MiB"),
        (10 << 30, "10.0 GiB"),
        ((10 << 30) + 1, "10.1 GiB"),
    ],
)
def test_sizes_are_rounded_up(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_need_is_counted_in_blocks() -> None:
    assert Need.of([0, 1, 4096, 4097], 4096, "") == Need(4 * 4096, 4, "")


def test_the_disk_is_named_as_df_does(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (disk / "a" / "b").mkdir(parents=True)
        (tmp_path / "link").symlink_to(disk / "a")
        shown = subprocess.run(["df", "--output=target", disk], capture_output=True, text=True, check=True).stdout
        assert mount_point(str(tmp_path / "link" / "b")) == str(disk) == shown.split()[-1]
    assert mount_point("/") == "/"
    assert mount_point("/proc/sys") == "/proc"


def test_room_is_looked_for_beforehand(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        verify_room(str(disk), Need(1 << 20, 1, REMEDY))
        with pytest.raises(FileUnreadable) as caught:
            verify_room(str(disk), Need((1 << 20) + 1, 1, REMEDY))
        assert caught.value.message == (
            f"{disk}: No space left on device: 2 MiB are needed, and the file system on {disk} has 1 MiB free"
        )
        assert caught.value.advice == f"free 2 MiB on {disk}"


def test_room_for_files_too(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "nr_inodes=10") as disk:
        verify_room(str(disk), Need(0, 9, REMEDY))
        with pytest.raises(FileUnreadable, match="room for 9 more files"):
            verify_room(str(disk), Need(0, 10, REMEDY))


def test_a_file_system_that_counts_nothing_refuses_nothing() -> None:
    assert os.statvfs("/proc").f_blocks == 0
    verify_room("/proc", Need(1 << 60, 1 << 30, REMEDY))


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        file = disk / "file"
        with pytest.raises(FileUnreadable) as caught, full_disk_explained(str(disk), lambda: Need(3 << 20, 1, REMEDY)):
            try:
                file.write_bytes(bytes(2 << 20))
            finally:
                file.unlink()
        assert "No space left on device: 3 MiB are needed" in caught.value.message
        assert f"{disk} has 1 MiB free" in caught.value.message  # after the block cleaned up
        assert caught.value.advice == f"free 3 MiB on {disk}"
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_ours_about_a_full_disk_is_explained_once(tmp_path: Path, number: int) -> None:
    def fails(remedy: str | None) -> None:
        cause = OSError(number, os.strerror(number))
        raise FileUnreadable("/x: full", remedy=remedy) from cause

    with pytest.raises(FileUnreadable) as caught, full_disk_explained(str(tmp_path), lambda: Need(1, 1, "outer")):
        fails(None)
    assert caught.value.message.startswith("/x: full: 1 KiB are needed")
    assert caught.value.advice == "outer"
    with pytest.raises(FileUnreadable) as caught, full_disk_explained(str(tmp_path), lambda: Need(1, 1, "outer")):
        fails("inner")
    assert (caught.value.message, caught.value.advice) == ("/x: full", "inner")


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    def need() -> Need:
        raise AssertionError("nobody asks")

    with pytest.raises(OSError, match="Input/output"), full_disk_explained(str(tmp_path), need):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(FileUnreadable, match="only this"), full_disk_explained(str(tmp_path), need):
        raise FileUnreadable("only this")
    with full_disk_explained(str(tmp_path), need):
        pass


def test_what_cannot_be_measured_any_more_hides_nothing(tmp_path: Path) -> None:
    def need() -> Need:
        raise SourceInvalid("the source is gone")

    with pytest.raises(FileUnreadable, match="No space left") as caught, full_disk_explained(str(tmp_path), need):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.advice == FileUnreadable.remedy


def test_blocks_are_the_file_system_s(tmp_path: Path) -> None:
    assert block_bytes(str(tmp_path)) == os.statvfs(tmp_path).f_frsize
