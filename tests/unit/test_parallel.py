"""`owner.parallel`: the same results by workers as without, which hold neither keys nor locks and outlive nobody."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from oci_hook.errors import FileUnreadable, GrantInvalid
from oci_hook.locks import lock_file
from oci_hook.owner import parallel
from oci_hook.owner.parallel import map_chunks
from oci_hook.owner.records import OwnerRecords
from tests.commands import Household, done, sczctl

_LONG = 60_000  # milliseconds; nothing rests on it but how a failure ends


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few things there are, and whatever machine this is."""
    monkeypatch.setattr(parallel, "_ALONE", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def squares(items: Sequence[int]) -> list[tuple[int, int]]:
    return [(item * item, os.getpid()) for item in items]


def complaint(items: Sequence[int]) -> list[int]:
    raise GrantInvalid(f"these are {len(items)}", remedy="none")


def crash(items: Sequence[int]) -> list[int]:
    os._exit(3)


def stuck(folder: Path, items: Sequence[int]) -> list[int]:
    """Say that it is there, then wait for a signal."""
    (folder / f"{os.getpid()}.worker").touch()
    while True:
        signal.pause()


def test_results_in_their_order_from_other_processes() -> None:
    results = map_chunks(squares, range(1001))
    assert [square for square, _ in results] == [item * item for item in range(1001)]
    pids = {pid for _, pid in results}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(GrantInvalid, match="these are 5") as caught:
        map_chunks(complaint, range(10))
    assert caught.value.advice == "none"
    with pytest.raises(RuntimeError, match="ended with 3"):
        map_chunks(crash, range(10))


def test_nothing_is_imported_from_where_the_caller_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle", "signal", "oci_hook"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert len(map_chunks(squares, range(4))) == 4


def test_grants_are_read_back_by_workers(tmp_path: Path) -> None:
    house = Household(tmp_path)
    out = house.pack()
    for device in ("edge-1", "edge-2", "edge-3"):
        house.enrolled(device)
        house.grant(out, device=device, file=f"{device}.jwt")
    records = OwnerRecords(house.keys)
    assert [grant.device_name for grant in records.grants()] == ["edge-1", "edge-2", "edge-3"]
    done(sczctl("revoke", "--keys", house.keys, "--device", "edge-2", "-o", house.usb / "revoked"))
    assert [grant.device_name for grant in records.grants()] == ["edge-1", "edge-3"]
    copy = house.keys / "grants" / "minilm" / "1" / "edge-3.grant"
    copy.write_bytes(b"?")
    with pytest.raises(GrantInvalid, match="minilm:1 to edge-3"):
        records.grants()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_worker_no_lock_and_no_key(tmp_path: Path, number: signal.Signals) -> None:
    """The caller holds the owner's lock and keys; its workers have neither, and end with it."""
    key = secrets.token_bytes(32)
    caller = os.fork()
    if caller == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with lock_file(tmp_path / ".lock", timeout_seconds=0, error=FileUnreadable):
                map_chunks(partial(stuck, tmp_path), range(600))
        finally:
            os._exit(1)
    watched = [os.pidfd_open(caller)]
    try:
        while len(found := list(tmp_path.glob("*.worker"))) < 2:
            assert not has_ended(watched[0], 0)
        pids = [caller, *(int(path.stem) for path in found)]
        watched += [os.pidfd_open(pid) for pid in pids[1:]]
        assert [key in memory_of(pid) for pid in pids] == [True, False, False]
        assert [is_open(tmp_path / ".lock", pid) for pid in pids] == [True, False, False]
        os.kill(caller, number)
        assert [has_ended(pidfd) for pidfd in watched] == [True, True, True]
        with lock_file(tmp_path / ".lock", timeout_seconds=0, error=FileUnreadable):
            pass
    finally:
        for pidfd in watched:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        os.waitpid(caller, 0)


def has_ended(pidfd: int, milliseconds: int = _LONG) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def memory_of(pid: int) -> bytes:
    """What a process could write to, all in one."""
    found = bytearray()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            low, high = (int(each, 16) for each in place.split("-"))
            if rights.startswith("rw") and "[v" not in line:
                memory.seek(low)
                found += memory.read(high - low)
    return bytes(found)


def is_open(path: Path, pid: int) -> bool:
    return str(path) in {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}


def test_a_worker_whose_caller_is_gone_does_nothing(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """It is told whom it belongs to, as its caller may have ended before the kernel could be asked to watch it."""
    child = os.fork()
    if child == 0:
        try:
            parallel.serve(1 if os.getppid() != 1 else 2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capsysbinary.readouterr().out == b""
