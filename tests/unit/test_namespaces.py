"""Children: what they report, what they inherit, and that none survives its parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import DestinationInvalid, HolderGone, InternalError, SystemCallFailed, WriterFailed
from oci_hook.linux import syscalls
from oci_hook.linux.namespaces import Channel, Child, Report, enter_mount_namespace
from oci_hook.linux.processes import process_start_time


def run(body: Any, *, seconds: float = 10, keep: list[int] | None = None) -> Report:
    """The one report of a child."""
    with Child("the test's child", body, gone=WriterFailed, keep=keep) as child:
        report = child.receive(seconds)
        child.join(seconds)
    return report


def test_a_report_arrives() -> None:
    assert run(lambda _channel: {"pid": os.getppid()}) == {"done": {"pid": os.getpid()}}


def test_descriptors_cross_the_socket(tmp_path: Path) -> None:
    def body(channel: Channel) -> Report:
        received = channel.receive()
        assert received is not None
        report, (fd,) = received
        return {"got": report, "same": os.readlink(f"/proc/self/fd/{fd}")}

    fd = os.open(tmp_path, os.O_PATH)
    with Child("the test's child", body, gone=WriterFailed, keep=[]) as child:
        child.send({"go": 1}, [fd])
        assert child.receive(10)["done"] == {"got": {"go": 1}, "same": str(tmp_path)}
    os.close(fd)


def test_an_error_of_ours_arrives_as_it_was() -> None:
    def body(_channel: Channel) -> Report:
        raise DestinationInvalid("/x is a file", remedy="choose another")

    with pytest.raises(DestinationInvalid) as caught:
        run(body)
    assert (caught.value.message, caught.value.advice) == ("/x is a file", "choose another")


def test_an_error_that_nobody_foresaw_says_no_more_than_its_class() -> None:
    def body(_channel: Channel) -> Report:
        raise KeyError("something secret")

    with pytest.raises(InternalError) as caught:
        run(body)
    assert "KeyError" in caught.value.message
    assert "secret" not in caught.value.message


def test_a_child_that_is_killed() -> None:
    with pytest.raises(WriterFailed, match="SIGKILL"):
        run(lambda _channel: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_that_gives_no_answer_is_ended() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before, started = children(), time.monotonic()  # other tests may have left some that hang in the kernel
    with (
        Child("the test's child", lambda _channel: time.sleep(60), gone=WriterFailed) as child,
        pytest.raises(WriterFailed, match=r"no answer within 0\.1 seconds"),
    ):
        child.receive(0.1)
    assert time.monotonic() - started < 5
    assert children() <= before


def test_a_child_that_is_gone_can_not_be_sent_anything() -> None:
    with Child("the test's child", lambda _channel: {}, gone=HolderGone) as child:
        child.join(10)
        with pytest.raises(HolderGone):
            child.send({"go": 1})


def test_too_large_a_report_is_an_error_of_ours() -> None:
    with pytest.raises(InternalError, match="too large"):
        run(lambda _channel: {"noise": "x" * (1 << 17)})


def test_a_lossy_report_never_waits() -> None:
    def body(channel: Channel) -> Report:
        for number in range(10_000):
            channel.send_lossy({"progress": number})
        return {}

    with Child("the test's child", body, gone=WriterFailed) as child:
        time.sleep(0.1)
        while "done" not in (report := child.receive(10)):
            assert report["progress"] < 10_000


def test_what_a_child_inherits(tmp_path: Path) -> None:
    kept, lost = os.open(tmp_path, os.O_PATH), os.open("/", os.O_PATH)

    def body(_channel: Channel) -> Report:
        links = {}
        for name in os.listdir("/proc/self/fd"):
            if os.path.lexists(f"/proc/self/fd/{name}"):
                links[name] = os.readlink(f"/proc/self/fd/{name}")
        return {"links": links, "mask": len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}

    try:
        report = run(body, keep=[kept])["done"]
    finally:
        os.close(kept)
        os.close(lost)
    links = report["links"]
    assert [links[number] for number in "012"] == ["/dev/null"] * 3
    others = {target.split(":")[0] for number, target in links.items() if int(number) > 2}
    assert others == {str(tmp_path), "socket"}
    assert report["mask"] == 0


def test_a_parents_handler_does_not_run_in_the_child() -> None:
    def refuse(_number: int, _frame: object) -> None:
        raise AssertionError("this is the parent's")

    before = signal.signal(signal.SIGTERM, refuse)
    try:
        with pytest.raises(WriterFailed, match="SIGTERM"):
            run(lambda _channel: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_child_ends_with_its_parent() -> None:
    """kill -9 of the middle one of three generations."""

    def middle(channel: Channel) -> Report:
        with Child("the youngest", lambda _channel: time.sleep(60), gone=WriterFailed) as youngest:
            channel.send({"youngest": youngest._pid, "middle": os.getpid()})
            time.sleep(60)
        return {}

    with Child("the middle one", middle, gone=WriterFailed) as child:
        pids = child.receive(10)
        start_time = process_start_time(pids["youngest"])
        assert start_time is not None
        os.kill(pids["middle"], signal.SIGKILL)
        with pytest.raises(WriterFailed, match="SIGKILL"):
            child.receive(10)
    deadline = time.monotonic() + 5
    while process_start_time(pids["youngest"]) == start_time:
        if Path(f"/proc/{pids['youngest']}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # dead; whoever adopted it has not looked yet
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mount_namespace_is_entered_by_the_child_alone() -> None:
    ours = os.stat("/proc/self/ns/mnt").st_ino

    def other(channel: Channel) -> Report:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        channel.send({"namespace": os.stat("/proc/self/ns/mnt").st_ino, "pid": os.getpid()})
        channel.receive()
        return {}

    with Child("the one whose namespace it is", other, gone=HolderGone) as holder:
        report = holder.receive(10)
        fd = os.open(f"/proc/{report['pid']}/ns/mnt", os.O_RDONLY)

        def body(_channel: Channel) -> Report:
            enter_mount_namespace(fd)
            return {"namespace": os.stat("/proc/self/ns/mnt").st_ino}

        assert run(body, keep=[fd])["done"]["namespace"] == report["namespace"]
        os.close(fd)
    assert report["namespace"] != ours
    assert os.stat("/proc/self/ns/mnt").st_ino == ours


def test_something_else_is_no_mount_namespace() -> None:
    with open("/proc/self/ns/uts", "rb") as namespace, pytest.raises(SystemCallFailed):
        run(lambda _channel: enter_mount_namespace(namespace.fileno()))
