"""The wrappers give what the kernel gives, and errors that name what they were about."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from oci_hook.errors import DestinationInvalid, SystemCallFailed
from oci_hook.linux import syscalls


def test_an_error_carries_errno_and_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        syscalls.openat2(syscalls.AT_FDCWD, str(tmp_path / "absent"), os.O_RDONLY, resolve=0)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "absent")


def test_failing_turns_it_into_an_error_of_ours() -> None:
    expected = re.escape("this was tried: No such file or directory (/absent)")
    with pytest.raises(SystemCallFailed, match=expected), syscalls.failing("this was tried"):
        os.stat("/absent")
    with pytest.raises(DestinationInvalid), syscalls.failing("this was tried", DestinationInvalid):
        raise OSError(errno.EPERM, "no")


@pytest.mark.parametrize(
    ("path", "resolve", "code"),
    [
        ("link/file", syscalls.RESOLVE_NO_SYMLINKS, errno.ELOOP),
        ("../outside", syscalls.RESOLVE_BENEATH, errno.EXDEV),
        ("/etc", syscalls.RESOLVE_BENEATH, errno.EXDEV),
        ("/etc/passwd", syscalls.RESOLVE_IN_ROOT, errno.ENOENT),
        ("../../../etc/passwd", syscalls.RESOLVE_IN_ROOT, errno.ENOENT),
    ],
)
def test_openat2_stays_where_it_is_told(tmp_path: Path, path: str, resolve: int, code: int) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to("folder")
    root = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError) as caught:
            syscalls.openat2(root, path, os.O_RDONLY, resolve=resolve)
        assert caught.value.errno == code
    finally:
        os.close(root)


def test_openat2_sets_close_on_exec(tmp_path: Path) -> None:
    fd = syscalls.openat2(syscalls.AT_FDCWD, str(tmp_path), os.O_PATH, resolve=0)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_the_mount_id_is_the_one_of_fdinfo() -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        fields = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        assert syscalls.statx_mount_id(fd) == int(fields["mnt_id"])
    finally:
        os.close(fd)
