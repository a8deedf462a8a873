"""Memory: the container's limits in both versions of control groups, and the node's reserve."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.delivery import memory
from oci_hook.delivery.memory import Cgroup, MemoryLevel
from oci_hook.errors import MemoryRefused, SystemCallFailed
from oci_hook.linux.mounts import Mount

MIB = 1 << 20
UNLIMITED = 0x7FFFFFFFFFFFF000


def mount(kind: str, point: str, *, root: str = "/", options: str = "rw") -> Mount:
    return Mount(1, 1, "0:30", root, point, frozenset(), (), kind, frozenset(options.split(",")))


V1 = mount("cgroup", "/sys/fs/cgroup/memory", options="rw,memory")
V1_CPU = mount("cgroup", "/sys/fs/cgroup/cpu", options="rw,cpu")
V2 = mount("cgroup2", "/sys/fs/cgroup")
HYBRID = mount("cgroup2", "/sys/fs/cgroup/unified")


class TestFinding:
    @pytest.mark.parametrize(
        ("cgroup", "mounts", "expected"),
        [
            (b"4:memory:/a/b\n3:cpu:/\n", [V1_CPU, V1], Cgroup(1, V1.mount_point, "/sys/fs/cgroup/memory/a/b")),
            (b"4:cpu,memory:/\n0::/x\n", [HYBRID, V1], Cgroup(1, V1.mount_point, "/sys/fs/cgroup/memory")),
            (b"0::/machine.slice/c\n", [V2], Cgroup(2, V2.mount_point, "/sys/fs/cgroup/machine.slice/c")),
            (b"1:name=systemd:/\n0::/\n", [V2], Cgroup(2, V2.mount_point, "/sys/fs/cgroup")),
            (b"3:cpu:/\n", [V1_CPU], None),
            (b"0::/x\n", [V1_CPU], None),
            (b"", [], None),
        ],
    )
    def test_where_memory_is_charged(self, cgroup: bytes, mounts: list[Mount], expected: Cgroup | None) -> None:
        assert memory.find_memory_cgroup(cgroup, mounts) == expected

    def test_another_controller(self) -> None:
        assert memory.find_cgroup("cpu", b"4:memory:/a\n3:cpu,cpuacct:/b\n", [V1, V1_CPU]) == Cgroup(
            1, V1_CPU.mount_point, "/sys/fs/cgroup/cpu/b"
        )
        assert memory.find_cgroup("cpu", b"0::/b\n", [V2]) == Cgroup(2, V2.mount_point, "/sys/fs/cgroup/b")

    def test_a_hierarchy_of_which_a_part_is_mounted(self) -> None:
        part = mount("cgroup2", "/here", root="/outer/inner")
        assert memory.find_memory_cgroup(b"0::/outer/inner/c\n", [part]) == Cgroup(2, "/here", "/here/c")

    @pytest.mark.parametrize(
        ("cgroup", "mounts"),
        [
            (b"4:memory:/a\n", [V1_CPU, V2]),
            (b"0::/../a\n", [V2]),
            (b"0::/outer\n", [mount("cgroup2", "/here", root="/outer/inner")]),
            (b"0::/x\n", [mount("cgroup2", "/here", root="/..")]),
        ],
        ids=["not mounted", "outside our namespace", "above the mount", "the mount is outside"],
    )
    def test_a_group_that_we_do_not_see(self, cgroup: bytes, mounts: list[Mount]) -> None:
        with pytest.raises(SystemCallFailed):
            memory.find_memory_cgroup(cgroup, mounts)

    @given(st.binary() | st.from_regex(rb"([0-9]:(memory|cpu|):/[a./]{0,5}\n){0,3}", fullmatch=True))
    def test_anything_stays_below_the_mount(self, cgroup: bytes) -> None:
        try:
            found = memory.find_memory_cgroup(cgroup, [V1, V2])
        except SystemCallFailed:
            return
        assert found is None or os.path.normpath(found.path).startswith(found.top)


def write(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    return folder


class TestLevels:
    def test_version_2_up_the_tree(self, tmp_path: Path) -> None:
        # the root group has none of these files
        slice_ = write(tmp_path / "slice", {"memory.max": 100 * MIB, "memory.high": "max", "memory.current": 60 * MIB})
        (slice_ / "memory.stat").write_text(f"anon 5\ninactive_file {50 * MIB}\nactive_file 7\n")
        pod = write(slice_ / "pod", {"memory.max": "max", "memory.high": "max", "memory.current": MIB})
        group = write(pod / "c", {"memory.max": 90 * MIB, "memory.high": 80 * MIB, "memory.current": 0})
        levels = memory.load_levels(Cgroup(2, str(tmp_path), str(group)))
        assert [(level.path, level.room_bytes // MIB) for level in levels] == [(str(group), 80), (str(slice_), 90)]

    def test_version_1_up_the_tree(self, tmp_path: Path) -> None:
        write(tmp_path, {"memory.limit_in_bytes": UNLIMITED, "memory.usage_in_bytes": 5 * MIB})
        group = write(tmp_path / "c", {"memory.limit_in_bytes": 64 * MIB, "memory.usage_in_bytes": 4 * MIB})
        (group / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {MIB}\n")
        levels = memory.load_levels(Cgroup(1, str(tmp_path), str(group)))
        assert [level.path for level in levels] == [str(group), str(tmp_path)]
        assert levels[0].room_bytes == 61 * MIB
        assert levels[1].room_bytes > 1 << 60

    @pytest.mark.parametrize("text", ["", "x", "-1", "1.5", 50 * "9"])
    def test_a_file_that_holds_no_number(self, tmp_path: Path, text: str) -> None:
        write(tmp_path, {"memory.max": text, "memory.current": 0})
        with pytest.raises(SystemCallFailed):
            memory.load_levels(Cgroup(2, str(tmp_path), str(tmp_path)))

    def test_the_tightest_decides(self) -> None:
        levels = [MemoryLevel("/a", UNLIMITED, 9, 0), MemoryLevel("/b", 50 * MIB, 20 * MIB, 0)]
        memory.verify_limits(levels, 30 * MIB)
        with pytest.raises(MemoryRefused, match=r"needs 31 MiB.*/b has a limit of 50 MiB and 30 MiB left"):
            memory.verify_limits(levels, 30 * MIB + 1)

    def test_no_limit_at_all(self) -> None:
        memory.verify_limits([], 1 << 60)

    def test_a_group_over_its_limit(self) -> None:
        with pytest.raises(MemoryRefused, match="0 MiB left"):
            memory.verify_limits([MemoryLevel("/a", MIB, 2 * MIB, 0)], 0)

    def test_a_group_that_cannot_be_joined(self, tmp_path: Path) -> None:
        with pytest.raises(SystemCallFailed, match="cannot be joined"):
            memory.join_cgroup(Cgroup(2, str(tmp_path), str(tmp_path)))


class TestPageCache:
    """Whether the encrypted files may stay in the page cache."""

    def test_there_must_be_room_for_both_on_the_node_and_in_every_group(self) -> None:
        level = MemoryLevel("/a", 100, 10, 0)
        assert memory.keeps_cache([], 150, 50, 50, 50)
        assert not memory.keeps_cache([], 149, 50, 50, 50)
        assert memory.keeps_cache([level], 1000, 45, 45, 50)
        assert not memory.keeps_cache([MemoryLevel("/b", UNLIMITED, 0, 0), level], 1000, 45, 46, 50)
        assert memory.keeps_cache([MemoryLevel("/a", 100, 60, 50)], 1000, 45, 45, 50)


class TestReserve:
    def test_what_must_stay(self) -> None:
        memory.verify_reserve(100, 30, 50, 20)
        with pytest.raises(MemoryRefused, match=r"needs 1 MiB; the node has 1 MiB available.*1 MiB are promised"):
            memory.verify_reserve(100, 30, 51, 20)

    def test_the_node_has_memory(self) -> None:
        assert MIB < memory.load_available_memory() < 1 << 50

    def reserve(self, folder: Path, need: int, *, available: int = 100) -> memory.Reservation:
        return memory.reserve_memory(str(folder), need, 20, timeout_seconds=0.1, available=lambda: available)

    def test_others_are_counted_while_they_live(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        self.reserve(folder, 1).__exit__(None, None, None)
        with subprocess.Popen(["/bin/sleep", "60"]) as other:
            start_time = memory.process_start_time(other.pid)
            promise = folder / f"reservations/{other.pid}.{start_time}"
            promise.write_text("50\n")
            with self.reserve(folder, 30):
                assert len(list(promise.parent.iterdir())) == 2
            with pytest.raises(MemoryRefused):
                self.reserve(folder, 31)
            promise.write_text("49\n")
            with self.reserve(folder, 31):
                pass
            other.kill()
        promise.write_text("50\n")
        with self.reserve(folder, 80):
            assert not promise.exists()
        assert list(promise.parent.iterdir()) == []

    def test_what_no_process_wrote_is_dropped(self, tmp_path: Path) -> None:
        folder = tmp_path / "reservations"
        folder.mkdir()
        for name in ("x", "1.2.3", f"{os.getpid()}.1", "0.5", f"{2**22 + 1}.7"):
            (folder / name).write_text("99\n")
        with self.reserve(tmp_path, 80):
            assert [path.name for path in folder.iterdir()] == [
                f"{os.getpid()}.{memory.process_start_time(os.getpid())}"
            ]

    def test_what_is_used_is_not_promised_any_more(self, tmp_path: Path) -> None:
        with self.reserve(tmp_path, 80) as reservation:
            (promise,) = (tmp_path / "reservations").iterdir()
            assert int(promise.read_text()) == 80
            reservation.keep(5)
            assert int(promise.read_text()) == 5

    def test_a_refusal_leaves_no_promise(self, tmp_path: Path) -> None:
        with pytest.raises(MemoryRefused):
            self.reserve(tmp_path, 81)
        assert list((tmp_path / "reservations").iterdir()) == []

    def test_only_root_may_look(self, tmp_path: Path) -> None:
        with self.reserve(tmp_path / "run", 1):
            modes = {
                path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "run", *(tmp_path / "run").iterdir()]
            }
        assert modes == {"run": 0o700, "memory.lock": 0o600, "reservations": 0o700}

    def test_a_lock_that_is_held_for_too_long(self, tmp_path: Path) -> None:
        with open(tmp_path / "memory.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(SystemCallFailed, match=r"memory\.lock was locked"):
                self.reserve(tmp_path, 1)
        with self.reserve(tmp_path, 1):
            pass
