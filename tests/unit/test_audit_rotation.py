"""Rotation of the audit log: numbers, links and the clock's floor go on, whoever renames it, whenever one is killed."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from oci_hook import audit_chain, metrics
from oci_hook.audit import AuditLog
from oci_hook.errors import AuditFailed, AuditRefused
from tests.commands import Household, done, misused, refused, snapshot

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_700_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the log alone."""
    made = tmp_path / "log"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return AuditLog(str(path), lambda: NOW)


def fill(log: AuditLog, number: int = 3, name: str = "c") -> None:
    for each in range(number):
        log.append("grant", container=f"{name}{each}")


def sequence(log: AuditLog) -> list[int]:
    return [record["seq"] for record in log.records()]


def test_the_chain_goes_on(log: AuditLog, path: Path, folder: Path) -> None:
    fill(log)
    before = log.head()
    assert log.rotate() == f"{path}.000000000003"
    record = next(iter(AuditLog(str(path)).records(after=3)))
    assert record == {
        "event": "continued",
        "seq": 4,
        "prev": before.digest.hex(),
        "last": 3,
        "since": "2023-11-14T22:13:20.000Z",
        "time": "2023-11-14T22:13:20.000Z",
    }
    assert log.rotate() is None  # nothing has happened since
    fill(log)
    assert sequence(log) == list(range(1, 8))
    assert {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()} == {
        "audit.jsonl": 0o600,
        "audit.jsonl.000000000003": 0o600,
    }
    assert log.rotate() == f"{path}.000000000007"
    fill(log, 1)
    assert sequence(log) == list(range(1, 10))


def test_the_clocks_floor_goes_on(path: Path) -> None:
    AuditLog(str(path), lambda: NOW).append("grant", container="a")
    AuditLog(str(path), lambda: NOW - 3600).rotate()
    assert AuditLog(str(path)).head().seconds == NOW
    records = list(AuditLog(str(path)).records())
    assert [record["time"] for record in records] == [records[0]["time"]] * 2
    assert records[1]["clock"] < records[1]["time"]


def test_nothing_to_rotate(log: AuditLog, folder: Path) -> None:
    assert log.rotate() is None
    assert list(folder.iterdir()) == []


RENAMES = {
    "logrotate": lambda path: path.rename(f"{path}.1"),
    "logrotate with dateext": lambda path: path.rename(f"{path}-20260131"),
    "compressed": lambda path: compress(path, f"{path}.1.gz"),
    "being compressed": lambda path: (shutil.copy(path, f"{path}.1"), compress(path, f"{path}.1.gz", whole=False)),
    "created empty": lambda path: (path.rename(f"{path}.1"), path.touch(0o600)),
}


def compress(path: Path, to: str, *, whole: bool = True) -> None:
    data = gzip.compress(path.read_bytes())
    Path(to).write_bytes(data if whole else data[:20])
    path.unlink()


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_whoever_renames_it(log: AuditLog, path: Path, rename: Callable[[Path], object]) -> None:
    fill(log)
    rename(path)
    fill(log, 2)
    assert [record["event"] for record in log.records()] == ["grant"] * 3 + ["continued"] + ["grant"] * 2
    assert sequence(log) == list(range(1, 7))


@pytest.mark.parametrize("kept", [5, -1])
def test_a_crash_before_the_rename_tore_the_last_line(log: AuditLog, path: Path, kept: int) -> None:
    fill(log, 2)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    path.rename(f"{path}.1")
    fill(log, 1)
    events = [record["event"] for record in log.records()]
    assert events == (["grant", "recovered", "continued", "grant"] if kept == 5 else ["grant"] * 2 + events[2:])
    assert events[-2:] == ["continued", "grant"]


@pytest.mark.parametrize("kept", [0, 1, 50, -1])
def test_a_crash_tore_the_first_line_of_the_new_one(log: AuditLog, path: Path, kept: int) -> None:
    fill(log)
    log.rotate()
    path.write_bytes(path.read_bytes()[:-1][:kept])
    assert sequence(log)[:3] == [1, 2, 3]
    fill(log, 1)
    assert [record["event"] for record in log.records()][3:] == ["continued", "grant"]


def test_old_files_that_were_removed(log: AuditLog, path: Path, folder: Path) -> None:
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    (folder / "audit.jsonl.000000000002").unlink()
    assert sequence(log) == list(range(3, 10))
    (folder / "audit.jsonl.000000000008").unlink()
    with pytest.raises(AuditRefused, match=r"line 1 of .*audit\.jsonl does not follow"):
        list(log.records())


def test_a_log_that_begins_in_the_middle_without_saying_so(log: AuditLog, path: Path) -> None:
    fill(log)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(AuditRefused, match=r"line 1 .* is not the first"):
        list(log.records())


def test_hostile_rotated_files(log: AuditLog, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log)
    log.rotate()
    fill(log, 1)
    rotated = folder / "audit.jsonl.000000000003"
    good = rotated.read_bytes()
    for data, words in (
        (gzip.compress(good)[:-9], "is not whole"),
        (b"\x1f\x8b rubbish", "is not whole"),
        (gzip.compress(b"x" * (1 << 20)), "is not a record"),
        (gzip.compress(good + b'{"seq":4}\n'), "is not a record"),
        (gzip.compress(good.replace(b'"c1"', b'"d1"')), "does not follow"),
    ):
        rotated.unlink(missing_ok=True)
        Path(f"{rotated}.gz").write_bytes(data)
        with pytest.raises(AuditRefused, match=words):
            list(log.records())
    Path(f"{rotated}.gz").write_bytes(gzip.compress(good))
    assert sequence(log) == [1, 2, 3, 4, 5]
    monkeypatch.setattr(audit_chain, "FILE_LIMIT_BYTES", 100)
    with pytest.raises(AuditRefused, match="larger than 100 bytes"):
        list(log.records())
    monkeypatch.undo()
    Path(f"{rotated}.gz").unlink()
    rotated.symlink_to("/etc/passwd")
    with pytest.raises(AuditFailed):
        list(log.records())


# --- what lies beside the log -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [".bak", ".old", ".2", "-20260131"])
@pytest.mark.parametrize("name", [".1", ".1.gz", ".000000000010"])
def test_a_copy_of_an_earlier_moment_takes_nothing_away(path: Path, copy: str, name: str) -> None:
    clock = iter(NOW + 60 * number for number in range(100))
    log = AuditLog(str(path), lambda: next(clock))
    fill(log, 5)
    shutil.copy(path, f"{path}{copy}")
    assert sequence(log) == list(range(1, 6))
    fill(log, 5)
    assert sequence(log) == list(range(1, 11))
    counters = metrics.Counters()
    metrics.update(counters, log)
    if name.endswith(".gz"):
        compress(path, f"{path}{name}")
    else:
        path.rename(f"{path}{name}")
    assert AuditLog(str(path)).peek().sequence == 10
    head = AuditLog(str(path), lambda: NOW).append("released", container="c")
    assert (head.sequence, head.seconds) == (12, NOW + 540)  # the clock's floor, too
    assert sequence(log) == list(range(1, 13))
    metrics.update(counters, log)
    assert (counters.sequence, counters.released) == (12, 1)


def test_files_that_disagree_are_refused(log: AuditLog, path: Path, folder: Path) -> None:
    fill(log)
    three = path.read_bytes()
    fill(log, 2)
    five = path.read_bytes()
    other = AuditLog(str(folder.parent / "other" / "audit.jsonl"), lambda: NOW)
    fill(other, 4, "d")
    path.rename(f"{path}.1")
    fill(log, 1)
    Path(f"{path}.2").write_bytes(Path(other.path).read_bytes())
    with pytest.raises(AuditRefused, match=r"line 1 of .*\.2 is not that of .*\.1") as caught:
        list(log.records())
    assert "move the other out" in caught.value.advice
    Path(f"{path}.2").write_bytes(three.splitlines(keepends=True)[1] + three.splitlines(keepends=True)[2])
    for after in (0, 1, 2, 4):  # it lies within the other
        with pytest.raises(AuditRefused, match="does not follow"):
            list(log.records(after=after))
    Path(f"{path}.2").unlink()
    Path(f"{path}.1.gz").write_bytes(gzip.compress(five))
    assert sequence(log) == list(range(1, 8))
    Path(f"{path}.1").write_bytes(three)  # the shorter of two: the other has the rest
    assert sequence(log) == list(range(1, 8))
    path.write_bytes(three)
    Path(f"{path}.1").unlink()
    with pytest.raises(AuditRefused, match="lacks: the log was cut"):
        list(log.records())


def test_a_gz_that_is_not_of_the_file_beside_it(log: AuditLog, path: Path) -> None:
    """Compression was on, then off: `.1.gz` and `.1` are two files of the log."""
    fill(log)
    compress(path, f"{path}.1.gz")
    fill(log)
    path.rename(f"{path}.1")
    fill(log)
    assert sequence(log) == list(range(1, 12))


FOREIGN = {
    "checksum": ".sha256",
    "text": ".txt",
    "half compressed": ".1.gz.tmp",
    "folder": ".d",
    "xz": ".2.xz",
    "emacs": "~",
}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_neighbour_stops_nothing(log: AuditLog, path: Path, name: str) -> None:
    fill(log)
    if name == ".d":
        Path(f"{path}{name}").mkdir()
    else:
        Path(f"{path}{name}").write_bytes(b"\xfd7zXZ\x00 no record\n")
    log.rotate()
    fill(log, 1)
    assert sequence(log) == [1, 2, 3, 4, 5]
    assert log.foreign() == [f"{path}{name}"]


@pytest.mark.parametrize("damage", ["rubbish", "cut", "folder", "link"])
@pytest.mark.parametrize("newest", [".1", ".1.gz", ".000000000009"])
def test_an_old_damaged_file_does_not_stop_a_new_log(log: AuditLog, path: Path, newest: str, damage: str) -> None:
    fill(log)
    compress(path, f"{path}.2.gz")
    old = Path(f"{path}.2.gz")
    fill(log)
    good = old.read_bytes()
    damage_file(old, damage)
    os.utime(old, (NOW, NOW), follow_symlinks=False)
    counters = metrics.Counters()
    if newest.endswith(".gz"):
        compress(path, f"{path}{newest}")
    else:
        path.rename(f"{path}{newest}")
    assert log.append("grant", container="after").sequence == 9
    with pytest.raises((AuditRefused, AuditFailed), match=r"audit\.jsonl\.2\.gz"):
        list(log.records())
    assert [record["seq"] for record in log.records(after=7)] == [8, 9]
    if old.is_dir():
        old.rmdir()
    old.unlink(missing_ok=True)
    old.write_bytes(good)
    metrics.update(counters, log)
    assert (counters.sequence, sequence(log)) == (9, list(range(1, 10)))


def damage_file(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"no gzip\n" if how == "rubbish" else data[:-9])


@pytest.mark.parametrize("damage", ["rubbish", "cut", "folder", "link"])
@pytest.mark.parametrize("name", [".1", ".1.gz"])
def test_the_newest_damaged_file_stops_a_new_log(log: AuditLog, path: Path, name: str, damage: str) -> None:
    fill(log)
    log.rotate()
    fill(log)
    newest = Path(f"{path}{name}")
    if name.endswith(".gz"):
        compress(path, str(newest))
    else:
        path.rename(newest)
        if damage == "cut":
            newest.write_bytes(newest.read_bytes() + b"no record\n")
    if name.endswith(".gz") or damage != "cut":
        damage_file(newest, damage)
    for attempt in (log.head, log.peek, lambda: log.append("grant", container="c")):
        with pytest.raises((AuditRefused, AuditFailed)) as caught:
            attempt()
        assert str(newest) in caught.value.message
        assert str(newest) in caught.value.advice or attempt == log.peek
    assert not path.exists() or path.read_bytes() == b""
    newest.rename(path.parent / "kept")  # the remedy
    assert log.append("grant", container="c").sequence == 5


def test_reading_an_empty_log_writes_nothing(log: AuditLog, path: Path, folder: Path) -> None:
    fill(log)
    log.rotate()
    path.write_bytes(b"")
    before = snapshot(folder)
    assert AuditLog(str(path)).peek() == AuditLog(f"{path}.000000000003").peek()
    assert sequence(log) == [1, 2, 3]
    assert snapshot(folder) == before
    path.unlink()
    before = snapshot(folder)
    assert log.peek().sequence == 3
    assert snapshot(folder) == before
    assert AuditLog(str(folder / "none" / "audit.jsonl")).peek().sequence == 0
    assert snapshot(folder) == before


EFFECTS = ("rename", "write", "fsync", "ftruncate", "open")


@pytest.mark.parametrize("moment", range(14))
def test_killed_at_any_moment(log: AuditLog, path: Path, moment: int) -> None:
    """The rotating process dies before its nth effect on the disk: no record is lost, and the chain goes on."""
    fill(log)

    def body() -> None:
        left = moment
        for name in EFFECTS:
            function = getattr(os, name)

            def deadly(*arguments: object, _function: Callable[..., object] = function, **options: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return _function(*arguments, **options)

            setattr(os, name, deadly)
        log.rotate()

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(30)
    assert child.exitcode in (0, -signal.SIGKILL)
    assert (child.exitcode == 0) == (moment >= 12), moment
    assert sequence(log)[:3] == [1, 2, 3]
    fill(log, 1, "after")
    assert [record["container"] for record in log.records() if record["event"] == "grant"][-1] == "after0"
    log.rotate()
    fill(log, 1)
    found = sequence(log)
    assert found == list(range(1, len(found) + 1))


def appender(path: str, number: int) -> None:
    log = AuditLog(path)
    for each in range(12):
        log.append("grant", container=f"{number}-{each}")


def test_what_logrotate_is_told_for_all_logs_does_not_hold_for_ours(folder: Path, path: Path, tmp_path: Path) -> None:
    ours, everyone, state = tmp_path / "ours", tmp_path / "logrotate.conf", tmp_path / "logrotate.state"
    ours.write_text((ROOT / "config/logrotate.d/scz-smm").read_text().replace("/var/log/scz-smm", str(folder)))
    everyone.write_text(
        "dateext\ndateformat .x%s\ncompresscmd /usr/bin/base64\nuncompresscmd /usr/bin/base64\ncompressext .xz\n"
        f"compressoptions --wrap=0\ncopytruncate\nolddir /var/log\ninclude {ours}\n"
    )
    for each in (ours, everyone):
        each.chmod(0o644)
    log = AuditLog(str(path))
    fill(log)
    for day in (1, 2):  # a date's name serves once
        command = ["/usr/sbin/logrotate", "--state", str(state), "--force", str(everyone)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, ""), ran
        (rotated,) = (each for each in folder.iterdir() if each != path and not each.name.endswith(".gz"))
        assert rotated.name.startswith("audit.jsonl-20")
        rotated.rename(folder / f"audit.jsonl-2023111{day}")
        fill(log, 1)
    assert {each.name for each in folder.iterdir()} == {
        "audit.jsonl",
        "audit.jsonl-20231111.gz",
        "audit.jsonl-20231112",
    }
    assert sequence(log) == list(range(1, 8))


def test_nothing_is_lost_while_logrotate_and_we_rotate(folder: Path, path: Path, tmp_path: Path) -> None:
    """Sixteen processes append; Debian's logrotate, with our file, and `rotate` rename the log meanwhile."""
    config, state = tmp_path / "logrotate", tmp_path / "logrotate.state"
    config.write_text((ROOT / "config/logrotate.d/scz-smm").read_text().replace("/var/log/scz-smm", str(folder)))
    config.chmod(0o644)

    def logrotate(*words: str) -> None:
        command = ["/usr/sbin/logrotate", "--state", str(state), *words, str(config)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, ""), ran

    logrotate("--force")  # there is none yet
    AuditLog(str(path)).append("grant", container="first")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=appender, args=(str(path), number)) for number in range(16)]
    for child in children:
        child.start()
    for turn in ("a", "b", "c"):  # the others may be slow: there is something to rename each time
        AuditLog(str(path)).append("grant", container=f"{turn}1")
        logrotate("--force")
        AuditLog(str(path)).append("grant", container=f"{turn}2")
        AuditLog(str(path)).rotate()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    AuditLog(str(path)).append("grant", container="last")
    logrotate("--force")
    logrotate("--force")  # nothing new: `notifempty` and a log that is absent
    records = list(AuditLog(str(path)).records())
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    found = {record["container"] for record in records if record["event"] == "grant"}
    ours = {"first", "last", "a1", "a2", "b1", "b2", "c1", "c2"}
    assert found == ours | {f"{number}-{each}" for number in range(16) for each in range(12)}
    names = {each.name for each in folder.iterdir()}
    assert {"audit.jsonl.1", "audit.jsonl.2.gz", "audit.jsonl.3.gz"} <= names
    assert any(name[12:].isdigit() and len(name) == 24 for name in names)
    AuditLog(str(path)).append("grant", container="again")
    assert len(list(AuditLog(str(path)).records())) == len(records) + 2


# --- sczctl audit -----------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Household:
    made = Household(tmp_path)
    path = made.host / "log" / "audit.jsonl"
    clock = iter(NOW + 60 * number for number in range(100))
    log = AuditLog(str(path), lambda: next(clock))
    log.append("grant", container="aa", model="small", version="1", subject="shop")
    log.append("outcome", container="aa", code=0, model="small:1, other:2", bytes=5)
    log.append("refused", container="ab", model="other:2", code=35, reason="BootStateRefused")
    log.rotate()
    log.append("closed", container="aa", model="small:1, other:2")
    return made


def test_filters(house: Household) -> None:
    def shown(*words: str) -> list[int]:
        lines = done(house.ctl("audit", "show", "--json", *words)).out.splitlines()
        return [int(line.split('"seq": ')[1].split(",")[0]) for line in lines]

    assert shown() == [1, 2, 3, 4, 5]
    assert shown("--reverse") == [5, 4, 3, 2, 1]
    assert shown("--limit", "2") == [4, 5]
    assert shown("--limit", "2", "--reverse") == [5, 4]
    assert shown("--container", "a", "--event", "refused", "--event", "continued") == [3]
    assert shown("--event", "continued") == [4]
    assert shown("--model", "small") == shown("--model", "small:1") == [1, 2, 5]
    assert shown("--model", "other:2") == [2, 3, 5]
    assert shown("--model", "smal") == shown("--model", "small:2") == []
    assert shown("--subject", "shop") == [1]
    assert shown("--code", "35") == shown("--reason", "BootStateRefused") == [3]
    assert shown("--code", "0") == [2]
    moment = datetime.fromtimestamp(NOW + 120, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert shown("--since", moment) == [3, 4, 5]
    assert shown("--until", moment) == [1, 2]
    assert shown("--since", f"{moment}+01:00") == [1, 2, 3, 4, 5]
    assert shown("--since", "-1h") == shown("--since", "today") == []
    assert shown("--until", "-1w") == [1, 2, 3, 4, 5]
    for wrong in ("yesterday", "-1y", "", "1h"):
        misused(house.ctl("audit", "show", "--since", wrong), "--since")
    misused(house.ctl("audit", "show", "--reason", "Nothing"), "--reason")


def test_verify_says_where_the_chain_begins(house: Household) -> None:
    path = house.host / "log" / "audit.jsonl"
    heads = [each.digest.hex() for each in AuditLog(str(path)).verified()]
    whole = done(house.ctl("audit", "verify", "--json")).json
    assert (whole["records"], whole["first"], whole["head"]) == (5, 1, heads[-1])
    for head in (*heads, hashlib.sha256(b"").hexdigest()):
        done(house.ctl("audit", "verify", "--from-head", head))
    refused(house.ctl("audit", "verify", "--from-head", "0" * 64), 54, "cut or exchanged")
    misused(house.ctl("audit", "verify", "--from-head", "0"), "64")
    Path(f"{path}.000000000003").unlink()
    assert done(house.ctl("audit", "verify")).out.splitlines()[1] == (
        f"the chain begins with record 4, after the head {heads[2]}: older files are not here"
    )
    assert done(house.ctl("audit", "verify", "--json")).json["after"] == heads[2]
    for head in heads[2:]:
        done(house.ctl("audit", "verify", "--from-head", head))
    refused(house.ctl("audit", "verify", "--from-head", heads[1]), 54)


def test_rotate_as_a_command(house: Household) -> None:
    path = house.host / "log" / "audit.jsonl"
    before = path.read_bytes()
    assert done(house.ctl("audit", "rotate", "--dry-run")).out == f"would rename {path} to {path}.000000000005\n"
    assert path.read_bytes() == before
    assert done(house.ctl("audit", "rotate", "--json")).json == {"dry_run": False, "path": f"{path}.000000000005"}
    assert Path(f"{path}.000000000005").read_bytes() == before
    assert done(house.ctl("audit", "rotate")).err == "there is nothing to rotate\n"
    assert done(house.ctl("audit", "rotate", "--dry-run", "--json")).json == {"dry_run": True, "path": None}


def test_what_is_not_read_is_named(house: Household) -> None:
    path = house.host / "log" / "audit.jsonl"
    Path(f"{path}.bak\x1b").write_bytes(b"x")
    for words in (("verify",), ("verify", "--json"), ("show",)):
        shown = done(house.ctl("audit", *words)).err
        assert shown == f"{path}.bak? is none of the log's files by its name, and was not read\n"


def test_commands_that_read_begin_no_log(house: Household) -> None:
    path = house.host / "log" / "audit.jsonl"
    path.rename(f"{path}.1")
    for content in (None, b"", b'{"cl'):
        if content is not None:
            path.write_bytes(content)
            path.chmod(0o600)
        before = snapshot(house.host)
        for words in (("audit", "verify"), ("audit", "show"), ("audit", "rotate", "--dry-run"), ("metrics",), ("ps",)):
            done(house.ctl(*words))
        house.ctl("doctor")
        assert snapshot(house.host) == before
