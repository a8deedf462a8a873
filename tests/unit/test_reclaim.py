"""delivery.reclaim and delivery.resident on a process in a mount namespace of its own: a container that may mount."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from oci_hook.delivery import resident
from oci_hook.delivery.reclaim import Reclaimed, reclaim
from oci_hook.delivery.resident import memory_bytes
from oci_hook.linux.mounts import create_memory_filesystem, is_free_number, probe_memory_filesystem
from tests.stuck import stuck_filesystem
from tests.unshared import container, held_at


def test_a_model_that_the_container_unmounted_and_keeps_is_not_free(tmp_path: Path) -> None:
    with container(tmp_path) as one:
        for use, end, what in (
            (f"exec 3< {one.path}/file", "exec 3<&-", "open file"),
            (f"cd {one.path}", "cd /", "working directory"),
        ):
            assert one.do(f"{use}; umount -l {one.path}") == ""
            found = one.reclaim()
            assert (found.state, found.path) == ("detached", "")
            assert [(each.pid, each.what) for each in found.uses] == [(one.process.pid, what)]
            one.do(end)
            assert one.settled() == Reclaimed("absent", "", ())
            assert one.do(f"mount -t tmpfs scz-smm {one.path} && head -c 65536 /dev/zero > {one.path}/file") == ""
            one.record = dataclasses.replace(one.record, held=(held_at(one.process.pid, one.path),))


def test_a_mapping_and_a_copy_that_nobody_sees_are_found(tmp_path: Path) -> None:
    program = "import mmap,os,sys;f=os.open(sys.argv[1],0);m=mmap.mmap(f,0,prot=1);os.close(f);print(1,flush=True)"
    with container(tmp_path) as one:
        copy = one.path.parent / "copy"
        copy.mkdir()
        one.do(f"mount --bind {one.path} {copy}; exec 3< {copy}/file; umount -l {copy} {one.path}")
        found = one.reclaim()
        assert (found.state, [each.what for each in found.uses]) == ("detached", ["open file"])
        # By /proc/self/fd the model is still opened: from here on a mapping alone keeps it.
        one.do(f"mkfifo {copy}.fifo")
        one.do(f'python3 -c "{program};input()" /proc/self/fd/3 <> {copy}.fifo > {copy}.out & true')
        one.do(f"until grep -q 1 {copy}.out; do sleep 0.05; done; exec 3<&-")
        found = one.reclaim()
        assert found.state == "detached"
        assert "mapping" in {each.what for each in found.uses}
        one.do(f"echo > {copy}.fifo; wait")
        assert one.settled() == Reclaimed("absent", "", ())


def test_who_keeps_it_where_proc_does_not_show_it_is_not_called_free(tmp_path: Path) -> None:
    """A descriptor in a message that nobody has received: no process has it."""
    program = (
        "import os,socket,sys;a,b=socket.socketpair();f=os.open(sys.argv[1],0);"
        "socket.send_fds(a,[b'x'],[f]);os.close(f);print(1,flush=True);sys.stdin.readline()"
    )
    with container(tmp_path) as one:
        one.do(f"mkfifo {tmp_path}/fifo; exec 4<> {tmp_path}/fifo")
        one.do(f'python3 -c "{program}" {one.path}/file <&4 > {tmp_path}/out & true')
        one.do(f"until grep -q 1 {tmp_path}/out; do sleep 0.05; done; umount -l {one.path}")
        assert one.reclaim() == Reclaimed("unknown", "", ())
        one.do("echo >&4; wait")
        assert one.settled() == Reclaimed("absent", "", ())


def test_a_number_that_another_has_by_now_proves_that_it_is_gone(tmp_path: Path) -> None:
    with container(tmp_path) as one, container(tmp_path, "d") as two:
        held = one.record.held[0]
        # As after an unmount of both, when the kernel gave the number to another.
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        assert one.do(f"mount -t tmpfs theirs {theirs}") == ""
        number = held_at(one.process.pid, theirs).device
        gone = dataclasses.replace(held, device=number, mount_id=1 << 40)
        assert reclaim(one.record, gone, lazy=False, dry_run=False) == Reclaimed("absent", "", ())
        # To another container's model, which is seen there.
        gone = dataclasses.replace(held, device=two.record.held[0].device, mount_id=1 << 40)
        found = reclaim(one.record, gone, others=[two.record], lazy=False, dry_run=False)
        assert found == Reclaimed("absent", "", ())
        # A record of another container whose model is gone as well proves nothing.
        other = dataclasses.replace(two.record, held=(dataclasses.replace(two.record.held[0], device=held.device),))
        assert one.do(f"exec 3< {one.path}; umount -l {one.path}") == ""
        assert one.reclaim(other).state == "detached"


def test_a_number_is_free_once_its_file_system_is_gone() -> None:
    kind = probe_memory_filesystem()
    for _ in range(100):  # others make file systems meanwhile, and may get the number first
        with create_memory_filesystem(4096, 1, kind) as made:
            number = os.fstat(made.fd).st_dev
            device = f"{os.major(number)}:{os.minor(number)}"
            assert not is_free_number(device)
        if is_free_number(device):
            break
    else:
        pytest.fail("no number was ever free again")
    assert not is_free_number("8:1")
    assert not is_free_number("0:1048575")  # too far to be tried


def test_a_container_that_never_answers_costs_little_and_others_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_ONE_SECONDS", 0.3)
    with container(tmp_path) as one, container(tmp_path, "d") as two:
        assert memory_bytes([one.record, two.record]) == ((1 << 16,), (1 << 16,))
        with stuck_filesystem(one.path.parents[1], pid=one.process.pid):
            assert memory_bytes([one.record, two.record, one.record]) == (None, (1 << 16,), None)
            left = children()
            assert left
            # The next call meets the child that this one left, and leaves no other.
            assert memory_bytes([one.record, two.record]) == (None, (1 << 16,))
            assert set(children()) <= set(left)
        for pid in left:
            os.waitpid(pid, 0)
        assert memory_bytes([two.record]) == ((1 << 16,),)


def children() -> list[int]:
    """Our children that were killed and are still there."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if "ShdPnd:\t0000000000000100" in Path(f"/proc/{pid}/status").read_text()]


def test_all_containers_share_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_ALL_SECONDS", 0.0)
    with container(tmp_path) as one:
        assert memory_bytes([one.record]) == (None,)


def test_a_model_at_two_places_of_a_container(tmp_path: Path) -> None:
    """Both are mounts of one superblock: neither is a use of the other, nor what is open there."""
    with container(tmp_path) as one:
        (there := one.path.parent / "there").mkdir()
        assert one.do(f"mount --bind {one.path} {there}; exec 3< {there}/file") == ""
        both = (one.record.held[0], held_at(one.process.pid, there))
        one.record = dataclasses.replace(one.record, held=both, models=("m:1",) * 2)
        assert one.reclaim(dry_run=True) == Reclaimed("would-unshare", str(one.path), (), (one.record.container_id,))
        one.do(f"exec 4< {one.path}/file")
        (use,) = one.reclaim().uses
        assert (use.what, use.path) == ("open file", f"{one.path}/file")
        one.do("exec 4<&-")
        assert one.reclaim() == Reclaimed("shared", str(one.path), (), (one.record.container_id,))
        # As after a container's own unmount.
        assert one.reclaim() == Reclaimed("shared", "", (), (one.record.container_id,))
        assert one.do(f"cat {there}/file | wc -c") == "65536\n"
        one.record = dataclasses.replace(one.record, held=both[1:])
        assert one.reclaim().state == "busy"
        one.do("exec 3<&-")
        assert one.reclaim() == Reclaimed("released", str(there), ())


def test_a_mount_of_another_file_system_than_the_records(tmp_path: Path) -> None:
    with container(tmp_path) as one:
        held = one.record.held[0]
        one.record = dataclasses.replace(one.record, held=(dataclasses.replace(held, fsid=held.fsid ^ 1),))
        assert one.reclaim() == Reclaimed("covered", str(one.path), ())
        assert one.do(f"cat {one.path}/file | wc -c") == "65536\n"
