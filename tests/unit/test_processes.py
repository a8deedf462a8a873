"""Processes held by descriptor, and the hardening of our own."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import HolderGone, SystemCallFailed, WriterFailed
from oci_hook.linux import processes
from oci_hook.linux.namespaces import Channel, Child, Report
from oci_hook.linux.processes import HeldProcess

PR_GET_DUMPABLE = 3
TAIL = b" S 7 " + b"0 " * 17 + b"4711 9 9 9\n"


class TestStat:
    @pytest.mark.parametrize("name", [b"sh", b"a b", b"x) S 1 0 0 (y", b")", b"", b"\n\xff("])
    def test_a_name_of_any_kind(self, name: bytes) -> None:
        assert processes.parse_stat(b"12 (" + name + b")" + TAIL) == (7, 4711)

    @given(st.binary() | st.binary().map(lambda name: b"1 (" + name + TAIL))
    def test_anything_gives_numbers_or_an_error_of_ours(self, data: bytes) -> None:
        try:
            parent, start_time = processes.parse_stat(data)
        except SystemCallFailed:
            return
        assert parent >= 0
        assert start_time >= 0

    def test_our_own(self) -> None:
        with HeldProcess(os.getpid()) as held:
            assert held.parent_pid == os.getppid()
            assert held.start_time == processes.process_start_time(os.getpid())


class TestHeldProcess:
    def test_one_that_ends_is_noticed(self) -> None:
        with subprocess.Popen(["/bin/sleep", "60"]) as process, HeldProcess(process.pid) as held:
            held.verify_same()
            assert held.executable_name() == os.path.basename(os.path.realpath("/bin/sleep"))
            process.kill()
            process.wait()
            for attempt in (held.verify_alive, held.verify_same, held.executable_name, lambda: held.read("stat")):
                with pytest.raises(HolderGone):
                    attempt()
        assert processes.process_start_time(process.pid) is None

    def test_a_zombie_has_ended(self) -> None:
        process = subprocess.Popen(["/bin/sleep", "60"])
        with HeldProcess(process.pid) as held:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(HolderGone):
                held.verify_alive()
            assert processes.process_start_time(process.pid) is None
        process.wait()

    @pytest.mark.parametrize("pid", [2**22 + 1, 2**31 - 1])
    def test_one_that_is_not_there(self, pid: int) -> None:
        with pytest.raises(HolderGone):
            HeldProcess(pid)
        assert processes.process_start_time(pid) is None

    def test_nothing_stays_open(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with HeldProcess(os.getpid()):
            pass
        with pytest.raises(HolderGone):
            HeldProcess(2**22 + 1)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_file_that_is_not_there(self) -> None:
        with HeldProcess(os.getpid()) as held, pytest.raises(SystemCallFailed):
            held.read("absent")

    def test_one_that_runs_without_a_path_is_named_by_its_first_argument(self, tmp_path: Path) -> None:
        script = (
            "import os, sys\n"
            "fd = os.memfd_create('sealed')\n"
            "os.write(fd, open('/bin/busybox', 'rb').read())\n"
            "os.execv(f'/proc/self/fd/{fd}', ['/usr/bin/sleep', '60'])\n"
        )
        with subprocess.Popen([sys.executable, "-I", "-c", script]) as process:
            try:
                with HeldProcess(process.pid) as held:
                    # While it becomes another program it is python still, or has no arguments yet.
                    while (name := held.executable_name()) == "" or name.startswith("python"):
                        time.sleep(0.001)
            finally:
                process.kill()
        assert name == "sleep"


def test_children_are_those_that_live_now() -> None:
    with HeldProcess(os.getpid()) as held, subprocess.Popen(["/bin/sleep", "60"]) as process:
        try:
            assert process.pid in processes.children(held)
        finally:
            process.kill()
            process.wait()
        assert process.pid not in processes.children(held)


def test_what_a_process_is_and_where() -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as process, HeldProcess(process.pid) as held:
        try:
            while held.link("exe") != os.path.realpath("/bin/sleep") or not held.arguments():
                time.sleep(0.001)  # it is this test's copy still
            seen, fd = os.stat("/"), held.open_directory("root")
            assert held.arguments() == ("/bin/sleep", "60")
            assert held.link("root") == "/"
            assert held.identity("root") == (seen.st_dev, seen.st_ino)
            assert (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == held.identity("root")
            os.close(fd)
        finally:
            process.kill()
            process.wait()
        for attempt in (
            held.arguments,
            lambda: held.identity("exe"),
            lambda: held.link("exe"),
            lambda: held.open_directory("root"),
        ):
            with pytest.raises(HolderGone):
                attempt()


def test_ancestors_lead_to_the_first_process() -> None:
    with HeldProcess(os.getpid()) as held:
        found = processes.ancestors(held)
    assert found[0] == os.getppid()
    assert found[-1] == 1 or len(found) == 64
    assert len(set(found)) == len(found)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(101))
    before = len(os.listdir("/proc/self/fd"))
    assert processes.read_bounded(os.open(tmp_path / "file", os.O_RDONLY), "file", 101) == bytes(101)
    with pytest.raises(SystemCallFailed, match="larger than 100"):
        processes.read_bounded(os.open(tmp_path / "file", os.O_RDONLY), "file", 100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_hardening() -> None:
    def body(_channel: Channel) -> Report:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.close(2)
        processes.harden_process()
        fields = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "mask": fields["SigBlk"],
            "ignored": signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN,
            "dumpable": ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0),
            "umask": os.umask(0),
            "second": os.readlink("/proc/self/fd/2"),
            "locked": int(fields["VmLck"].split()[0]) > 0,
        }

    with Child("the test's child", body, gone=WriterFailed) as child:
        report = child.receive(10)["done"]
    assert report == {
        "core": [0, 0],
        "mask": "0" * 16,
        "ignored": False,
        "dumpable": 0,
        "umask": 0o077,
        "second": "/dev/null",
        "locked": True,
    }
