"""`audit`: the chain, what a crash leaves, what a tamperer cannot do unseen, and the clock."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from oci_hook.audit import EMPTY_HEAD, AuditLog
from oci_hook.errors import AuditFailed, AuditRefused


class Clock:
    def __init__(self, seconds: float = 1_700_000_000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(str(tmp_path / "audit.jsonl"), Clock())


def lines(tmp_path: Path) -> list[bytes]:
    return (tmp_path / "audit.jsonl").read_bytes().splitlines(keepends=True)


def test_an_empty_log_has_the_empty_head(log: AuditLog) -> None:
    assert log.head().digest == EMPTY_HEAD
    assert list(log.records()) == []


def test_records_follow_each_other(log: AuditLog, tmp_path: Path) -> None:
    for number in range(5):
        log.append("grant", container=f"c{number}", subject=None)
    records = list(log.records())
    assert [record["seq"] for record in records] == [1, 2, 3, 4, 5]
    assert "subject" not in records[0]
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert log.head().sequence == 5


@pytest.mark.parametrize("victim", range(4))
def test_a_changed_line_is_found(log: AuditLog, tmp_path: Path, victim: int) -> None:
    for number in range(5):
        log.append("grant", container=f"c{number}")
    changed = lines(tmp_path)
    changed[victim] = changed[victim].replace(b'"c', b'"d')
    (tmp_path / "audit.jsonl").write_bytes(b"".join(changed))
    with pytest.raises(AuditRefused, match=f"line {victim + 2}"):
        list(log.records())


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00", "2026-01-01T00:00:00", "now", 5])
def test_a_record_without_a_time_that_can_be_told_is_none(log: AuditLog, tmp_path: Path, time: object) -> None:
    record = {"seq": 1, "prev": EMPTY_HEAD.hex(), "event": "grant", "time": time}
    (tmp_path / "audit.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "audit.jsonl").chmod(0o600)
    for look in (log.head, lambda: list(log.records())):
        with pytest.raises(AuditRefused, match=r"no time|is not a record"):
            look()


def test_a_removed_and_a_swapped_line_are_found(log: AuditLog, tmp_path: Path) -> None:
    for number in range(5):
        log.append("grant", container=f"c{number}")
    original = lines(tmp_path)
    (tmp_path / "audit.jsonl").write_bytes(b"".join(original[:2] + original[3:]))
    with pytest.raises(AuditRefused, match="line 3"):
        list(log.records())
    (tmp_path / "audit.jsonl").write_bytes(b"".join([original[1], original[0], *original[2:]]))
    with pytest.raises(AuditRefused, match="line 1"):
        list(log.records())


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_chained_over(log: AuditLog, tmp_path: Path, kept: int) -> None:
    log.append("grant", container="a")
    log.append("grant", container="b")
    whole = lines(tmp_path)
    (tmp_path / "audit.jsonl").write_bytes(whole[0] + whole[1][:kept])
    log.append("grant", container="c")
    events = [record["event"] for record in log.records()]
    assert events == (["grant", "grant", "grant"] if kept == -1 else ["grant", "recovered", "grant"])
    assert log.head().digest.hex() != whole[1]


def test_a_foreign_line_in_the_middle_is_not_excused(log: AuditLog, tmp_path: Path) -> None:
    log.append("grant", container="a")
    log.append("grant", container="b")
    whole = lines(tmp_path)
    (tmp_path / "audit.jsonl").write_bytes(whole[0] + b"hello\n" + whole[1])
    with pytest.raises(AuditRefused, match="line 2"):
        list(log.records())


def test_a_last_line_that_is_no_record_stops_appending(log: AuditLog, tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_bytes(b"hello\n")
    with pytest.raises(AuditRefused):
        log.append("grant", container="a")
    assert (tmp_path / "audit.jsonl").read_bytes() == b"hello\n"


def test_time_never_goes_back(tmp_path: Path) -> None:
    clock = Clock()
    log = AuditLog(str(tmp_path / "audit.jsonl"), clock)
    log.append("grant", container="a")
    clock.seconds -= 3600
    log.append("refused", container="b")
    first, second = log.records()
    assert first["time"] == second["time"]
    assert second["clock"] < second["time"]
    assert log.head().seconds == clock.seconds + 3600


def test_a_full_disk_leaves_no_half_record(log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append("grant", container="a")
    before = (tmp_path / "audit.jsonl").read_bytes()
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
    with pytest.raises(AuditFailed, match="space"):
        log.append("grant", container="b")
    assert (tmp_path / "audit.jsonl").read_bytes() == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"")
    (tmp_path / "audit.jsonl").symlink_to(target)
    with pytest.raises(AuditFailed):
        AuditLog(str(tmp_path / "audit.jsonl")).append("grant", container="a")
    assert target.read_bytes() == b""


def _append_many(path: str, name: str) -> None:
    for number in range(25):
        AuditLog(path).append("grant", container=f"{name}{number}")


def test_processes_append_in_one_chain(tmp_path: Path) -> None:
    path = str(tmp_path / "audit.jsonl")
    writers = [multiprocessing.get_context("fork").Process(target=_append_many, args=(path, n)) for n in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    records = list(AuditLog(path).records())
    assert len(records) == 100
    assert json.loads(lines(tmp_path)[-1])["seq"] == 100


@pytest.mark.parametrize("what", ["file", "folder", "mode"])
def test_a_log_that_others_could_write_is_not_used(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "log"
    folder.mkdir(mode=0o700)
    path = folder / "audit.jsonl"
    path.touch(mode=0o600)
    if what == "mode":
        path.chmod(0o620)
    else:
        os.chown(path if what == "file" else folder, 65534, 65534)
    with pytest.raises(AuditFailed, match="we alone can write"):
        AuditLog(str(path)).append("grant", container="a")
    assert path.read_bytes() == b""


def test_a_lock_that_is_held_does_not_hang_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    monkeypatch.setattr("oci_hook.audit._LOCK_SECONDS", 0.1)
    with path.open("wb") as holder:
        path.chmod(0o600)
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(AuditFailed, match="locked by others"):
            AuditLog(str(path)).append("grant", container="a")
