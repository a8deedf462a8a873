"""Destinations: what the annotation may say, what may lie in the way, and which mounts may carry a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.delivery.destination import (
    AllowedMounts,
    allow_mounts,
    find_mounts,
    parse_destination,
    parse_destinations,
    prepare_destination,
    verify_uncovered,
    verify_uncovered_beneath,
)
from oci_hook.errors import DestinationInvalid, DestinationRefused
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.mounts import Mount


class TestPath:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("/models", ("models",)),
            ("/a/b/c", ("a", "b", "c")),
            ("/developer/proc", ("developer", "proc")),
            ("/...", ("...",)),
            ("/ü", ("ü",)),
            ("/" + 255 * "x", (255 * "x",)),
        ],
    )
    def test_what_can_be_used(self, text: str, parts: tuple[str, ...]) -> None:
        assert parse_destination(text) == parts

    @pytest.mark.parametrize(
        "text",
        [
            *("", "/", "//", "models", "./models", "/models/", "//models", "/a//b", "/.", "/..", "/a/./b", "/a/../b"),
            *("/proc", "/proc/x", "/sys", "/sys/fs", "/dev", "/dev/shm", "/a\0b", "/a\nb", "/a\x7f", "/\udc80"),
            *("/" + 256 * "x", 2048 * "/x"),
        ],
    )
    def test_what_cannot(self, text: str) -> None:
        with pytest.raises(DestinationInvalid):
            parse_destination(text)

    @given(st.text() | st.text().map(lambda text: f"/{text}") | st.from_regex(r"(/[a-c./\x00]{0,4}){0,4}"))
    def test_anything_gives_parts_or_an_error_of_ours(self, text: str) -> None:
        try:
            parts = parse_destination(text)
        except DestinationInvalid:
            return
        assert "/" + "/".join(parts) == text
        assert os.path.normpath(text) == text

    @pytest.mark.parametrize("pair", [("/a", "/a"), ("/a", "/a/b"), ("/a/b/c", "/a")])
    def test_two_that_overlap(self, pair: tuple[str, str]) -> None:
        with pytest.raises(DestinationInvalid, match="overlap"):
            parse_destinations(pair)

    def test_two_that_do_not(self) -> None:
        assert parse_destinations(["/a/b", "/a/bc", "/a/c"]) == (("a", "b"), ("a", "bc"), ("a", "c"))


def mount(
    mount_id: int, *, kind: str = "tmpfs", tags: tuple[str, ...] = (), device: str = "0:9", root: str = "/"
) -> Mount:
    return Mount(mount_id, 1, device, root, "/somewhere", frozenset(), tags, kind, frozenset())


ROOT = mount(10, kind="overlay", device="0:50")


class TestAllowedMounts:
    def allowed(self, other: Mount, *, declared: bool = True, foreign: frozenset[str] = frozenset()) -> AllowedMounts:
        ids = [other.mount_id] if declared else []
        return allow_mounts([ROOT, other], root_mount_id=10, tmpfs_mount_ids=ids, foreign_devices=foreign)

    def test_the_root_and_a_declared_tmpfs(self) -> None:
        allowed = self.allowed(mount(11, tags=("master:3",)))
        allowed.verify(10, "/models")
        allowed.verify(11, "/data/models")
        assert allowed.allowed == {10, 11}

    @pytest.mark.parametrize(
        ("other", "declared", "foreign"),
        [
            (mount(11), False, frozenset()),
            (mount(11, kind="ext4"), True, frozenset()),
            (mount(11, kind="ramfs"), True, frozenset()),
            (mount(11, root="/part"), True, frozenset()),
            (mount(11), True, frozenset({"0:9"})),
            (mount(11, tags=("master:1", "shared:3")), True, frozenset()),
        ],
        ids=["not declared", "not a tmpfs", "a ramfs", "a part of a tmpfs", "the host's tmpfs", "shared"],
    )
    def test_what_is_refused(self, other: Mount, declared: bool, foreign: frozenset[str]) -> None:
        with pytest.raises(DestinationRefused):
            self.allowed(other, declared=declared, foreign=foreign).verify(11, "/data")

    @pytest.mark.parametrize(
        ("volume", "message"),
        [
            (mount(11, tags=("master:3",)), None),
            (mount(11, tags=("shared:3",)), "shared mount"),
            (mount(11, kind="ext4"), "neither the root nor"),
            (mount(11, root="/part"), "neither the root nor"),
        ],
        ids=["a tmpfs", "shared", "not a tmpfs", "a part of a tmpfs"],
    )
    def test_exactly_at_a_volume_of_the_pod(self, volume: Mount, message: str | None) -> None:
        allowed = allow_mounts(
            [ROOT, volume],
            root_mount_id=10,
            tmpfs_mount_ids=[],
            foreign_devices=frozenset({"0:9"}),
            volumes={"/data": 11},
        )
        for path, last in (("/data", False), ("/data/below", True), ("/other", True)):
            with pytest.raises(DestinationRefused, match="neither the root nor"):
                allowed.verify(11, path, last=last)
        if message is None:
            allowed.verify(11, "/data")
        else:
            with pytest.raises(DestinationRefused, match=message):
                allowed.verify(11, "/data")

    def test_the_hosts_side_may_be_shared(self) -> None:
        shared = mount(10, kind="overlay", tags=("shared:1",))
        allow_mounts([shared], root_mount_id=10, tmpfs_mount_ids=[], foreign_devices=frozenset(), private=False).verify(
            10, "/models"
        )

    def test_a_shared_root(self) -> None:
        shared = mount(10, kind="overlay", tags=("shared:1",))
        allowed = allow_mounts([shared], root_mount_id=10, tmpfs_mount_ids=[], foreign_devices=frozenset())
        with pytest.raises(DestinationRefused, match="shared"):
            allowed.verify(10, "/models")

    def test_a_mount_that_is_not_listed(self) -> None:
        with pytest.raises(DestinationRefused, match="appeared"):
            self.allowed(mount(11)).verify(12, "/data")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def here(root: int) -> AllowedMounts:
    """The mount of the test's folder, and no other."""
    fd = os.open("/proc/self", os.O_PATH)
    found = mounts.load_mountinfo(fd)
    os.close(fd)
    private = [Mount(**{name: getattr(each, name) for name in each.__slots__} | {"tags": ()}) for each in found]
    return allow_mounts(
        private, root_mount_id=syscalls.statx_mount_id(root), tmpfs_mount_ids=[], foreign_devices=frozenset()
    )


class TestPreparing:
    def test_missing_directories_are_made(self, tmp_path: Path, root: int, here: AllowedMounts) -> None:
        (tmp_path / "a").mkdir(mode=0o711)
        before = os.umask(0o022)
        try:
            fd = prepare_destination(root, ("a", "b", "c"), here, uid=7, gid=8)
        finally:
            os.umask(before)
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "a/b/c")
        os.close(fd)
        for path, expected in {"a": (0o711, 0, 0), "a/b": (0o755, 7, 8), "a/b/c": (0o755, 7, 8)}.items():
            seen = (tmp_path / path).stat()
            assert (seen.st_mode & 0o7777, seen.st_uid, seen.st_gid) == expected

    def test_a_directory_with_something_in_it(self, tmp_path: Path, root: int, here: AllowedMounts) -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        os.close(prepare_destination(root, ("a",), here, uid=0, gid=0))
        assert (tmp_path / "a/b").is_dir()

    @pytest.mark.parametrize(
        ("make", "parts", "message"),
        [
            (lambda path: path.symlink_to("elsewhere"), ("x",), "symbolic link"),
            (lambda path: path.symlink_to("/"), ("x", "y"), "symbolic link"),
            (lambda path: path.symlink_to("absent"), ("x",), "symbolic link"),
            (lambda path: path.write_text("file"), ("x",), "not a directory"),
            (lambda path: path.write_text("file"), ("x", "y"), "not a directory"),
            (os.mkfifo, ("x",), "not a directory"),
        ],
    )
    def test_what_is_in_the_way(
        self,
        tmp_path: Path,
        root: int,
        here: AllowedMounts,
        make: Callable[[Path], object],
        parts: tuple[str, ...],
        message: str,
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        make(tmp_path / "x")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DestinationInvalid, match=message):
            prepare_destination(root, parts, here, uid=0, gid=0)
        assert len(os.listdir("/proc/self/fd")) == before
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "x"]
        assert os.listdir(tmp_path / "elsewhere") == []

    def test_nothing_is_made_on_a_mount_that_is_not_allowed(self, tmp_path: Path, root: int) -> None:
        nothing = AllowedMounts({}, frozenset())
        with pytest.raises(DestinationRefused):
            prepare_destination(root, ("a",), nothing, uid=0, gid=0)
        assert os.listdir(tmp_path) == []

    def test_the_way_does_not_cross_into_another_mount(self, here: AllowedMounts) -> None:
        host = os.open("/", os.O_PATH)
        root_of_host = AllowedMounts(here.mounts, frozenset({syscalls.statx_mount_id(host)}))
        try:
            with pytest.raises(DestinationRefused, match="/proc"):
                prepare_destination(host, ("proc", "sys"), root_of_host, uid=0, gid=0)
        finally:
            os.close(host)


def test_declared_tmpfs_are_found_where_the_runtime_put_them(tmp_path: Path) -> None:
    host = os.open("/", os.O_PATH)
    proc = os.open("/proc", os.O_PATH)
    try:
        found = find_mounts(host, ["/proc", "/absent", "/etc/passwd", "/a\0b", "../../proc/", ""])
        assert found == dict.fromkeys(["/proc", "../../proc/"], syscalls.statx_mount_id(proc))
    finally:
        os.close(host)
        os.close(proc)


class TestCovered:
    @pytest.mark.parametrize("mounts_of", [["/models"], ["/a", "/models/deep"], ["/"], ["/models/deep/er"]])
    def test_at_or_below_a_mount_that_the_sandbox_makes(self, mounts_of: list[str]) -> None:
        with pytest.raises(DestinationRefused, match="at or below the mount"):
            verify_uncovered(("models", "deep", "er"), mounts_of)

    def test_beside_and_above_is_free(self) -> None:
        verify_uncovered(("models", "deep"), ["/proc", "/model", "/models/deeper", "/models/deep/er", "/deep"])

    @pytest.mark.parametrize("link", ["/link", "/link/", "/again", "/up/a", "/link/b"])
    def test_through_links_of_the_image(self, tmp_path: Path, root: int, link: str) -> None:
        (tmp_path / "a/b/c").mkdir(parents=True)
        (tmp_path / "link").symlink_to("/a")
        (tmp_path / "again").symlink_to("link/b")
        (tmp_path / "up").symlink_to("../../..")
        with pytest.raises(DestinationRefused, match="at or below the mount"):
            verify_uncovered_beneath(root, ("a", "b"), ["/absent", link])
        verify_uncovered_beneath(root, ("a", "b"), ["/absent", "/a/b/c", "/link/b/c", "/up"])

    def test_a_way_that_is_gone(self, root: int) -> None:
        with pytest.raises(DestinationInvalid):
            verify_uncovered_beneath(root, ("a",), [])


class TestBesideTheHost:
    def test_directories_are_made_on_the_hosts_side(self, tmp_path: Path, root: int, here: AllowedMounts) -> None:
        fd = prepare_destination(root, ("a", "b"), here, uid=7, gid=8, host_root_fd=root)
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "a/b")
        os.close(fd)
        assert (tmp_path / "a/b").stat().st_uid == 7

    def test_another_directory_there_is_refused(self, tmp_path: Path, root: int, here: AllowedMounts) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "host/a").mkdir(parents=True)
        host = os.open(tmp_path / "host", os.O_PATH)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DestinationRefused, match="not the same directory"):
            prepare_destination(root, ("a", "b"), here, uid=0, gid=0, host_root_fd=host)
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.listdir(tmp_path / "host/a") == []
        os.close(host)

    def test_a_mount_of_the_hosts_is_not_crossed(self, here: AllowedMounts) -> None:
        host = os.open("/", os.O_PATH)
        try:
            with pytest.raises(DestinationRefused, match="a mount of the host's"):
                prepare_destination(host, ("proc", "x"), allowed_at(host, here), uid=0, gid=0, host_root_fd=host)
        finally:
            os.close(host)


def allowed_at(fd: int, here: AllowedMounts) -> AllowedMounts:
    return AllowedMounts(here.mounts, frozenset({syscalls.statx_mount_id(fd)}))
