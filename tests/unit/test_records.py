"""`records`: written before the model is visible, told apart by the process, closed by poststop."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.errors import FileUnreadable, SystemCallFailed
from oci_hook.evidence_files import LIMIT_BYTES
from oci_hook.held import HeldModel
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.report import keep_refusal


@pytest.fixture
def record() -> ContainerRecord:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    return ContainerRecord(
        container_id="c1",
        bundle="/b",
        pid=os.getpid(),
        start_time=start_time,
        seconds=1,
        references=("minilm",),
        models=("minilm:1",),
        manifests=("sha256:" + "0" * 64,),
        destinations=("/models/minilm",),
        subject="s",
        size_bytes=1,
        delivered=False,
    )


def test_a_record_is_delivered_for_its_own_process_only(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    assert not records.delivered("c1", "/b", record.pid, record.start_time)
    records.write(record)
    assert not records.delivered("c1", "/b", record.pid, record.start_time)
    records.mark_delivered(record)
    assert records.delivered("c1", "/b", record.pid, record.start_time)
    assert not records.delivered("c1", "/b", record.pid, record.start_time + 1)
    assert not records.delivered("c1", "/other", record.pid, record.start_time)


def test_it_becomes_that_of_the_process_that_adopts_it(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.adopt("c1", "", "/b", (1, 2))  # there is none, nor its folder
    unknown = replace(record, bundle="")
    records.write(unknown)
    records.adopt("c1", "/b", "/b", (1, 2))
    assert list(records.live()) == [unknown]
    init = process_start_time(1)
    assert init is not None
    records.adopt("c1", "", "/b", (1, init))
    assert list(records.live()) == [replace(record, pid=1, start_time=init)]
    records.adopt("c1", "/b", "/b", (record.pid, record.start_time))
    assert list(records.live()) == [record]
    assert records.close("c1", "") is None
    assert records.close("c1", "/b") == record


def test_live_drops_what_a_killed_hook_left(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record)
    records.write(replace(record, container_id="dead", start_time=record.start_time + 1))
    assert [found.container_id for found in records.live()] == ["c1"]
    assert [found.container_id for found in records.sweep(dry_run=True)] == ["dead"]
    assert [found.container_id for found in records.sweep()] == ["dead"]
    assert records.sweep() == []
    assert len(os.listdir(tmp_path / "run" / "containers")) == 1


def test_close_returns_the_record_once(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record)
    assert records.close("c1", "/b") == record
    assert records.close("c1", "/b") is None


def test_only_what_names_a_process_is_closed(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    assert records.load("c1", "/b") is None
    records.write(record)
    assert records.close("c1", "/b", process=(record.pid, record.start_time + 1)) is None
    assert records.load("c1", "/b") == record
    assert records.close("c1", "/b", process=(record.pid, record.start_time)) == record
    assert records.load("c1", "/b") is None


def test_a_damaged_record_is_not_believed(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record)
    (path,) = (tmp_path / "run" / "containers").iterdir()
    path.write_text('{"delivered": true}')
    with pytest.raises(FileUnreadable):
        records.delivered("c1", "/b", record.pid, record.start_time)


def test_what_comes_by_a_second_way_joins_the_record(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.mark_delivered(record)
    later = replace(record, references=("other",), destinations=("/o",), models=("minilm:1",), size_bytes=5)
    records.mark_delivered(record.joined(later))
    found = records.delivered("c1", "/b", record.pid, record.start_time)
    assert found is not None
    assert found.destinations == ("/models/minilm", "/o")
    assert found.models == ("minilm:1", "minilm:1")  # one model at two places
    assert found.size_bytes == record.size_bytes + 5


@pytest.mark.parametrize("folder", ["containers", "last"])
def test_what_a_hook_left_that_was_killed_while_it_wrote(tmp_path: Path, record: ContainerRecord, folder: str) -> None:
    run = tmp_path / "run"

    def write() -> None:
        if folder == "last":
            keep_refusal(str(run), "c", FileUnreadable("x"))
        else:
            ContainerRecords(str(run)).write(record)

    write()
    (written,) = (run / folder).iterdir()
    old, new, another = (run / folder / name for name in (f".{written.name}.0123456789ab", ".n.0123456789ab", ".mine"))
    for file in (old, new, another):
        file.touch()
    for file in (old, another):
        os.utime(file, (1, 1))
    write()
    young = {new} if folder == "last" else set()  # refusals have no lock: somebody may be writing it
    assert set((run / folder).iterdir()) == {written, another} | young


_SWEEPER = """
import os, sys
from oci_hook.records import ContainerRecords
records = ContainerRecords(sys.argv[1])
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    records.sweep()
"""


def test_a_sweep_does_not_take_a_new_record_for_the_dead_one(tmp_path: Path, record: ContainerRecord) -> None:
    """`podman restart` while other starts sweep: id and bundle, so the file, are those of the record that is dead."""
    run, stop = tmp_path / "run", tmp_path / "stop"
    records = ContainerRecords(str(run))
    dead = replace(record, start_time=record.start_time + 1)
    records.write(dead)
    command = [sys.executable, "-c", _SWEEPER, str(run), str(stop)]
    root = str(Path(__file__).resolve().parents[2])
    sweepers = [subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": root}) for _ in range(2)]
    try:
        for sweeper in sweepers:
            assert sweeper.stdout is not None
            assert sweeper.stdout.readline() == b"ready\n"
        for _ in range(300):
            records.write(dead)
            records.write(record)
            assert records.live() == [record]
    finally:
        stop.touch()
        assert [sweeper.wait(60) for sweeper in sweepers] == [0, 0]
        for sweeper in sweepers:
            if sweeper.stdout is not None:
                sweeper.stdout.close()


def test_a_lock_that_others_hold_is_waited_for_in_bounds_and_nothing_changes(
    tmp_path: Path, record: ContainerRecord
) -> None:
    run = tmp_path / "run"
    records = ContainerRecords(str(run), lock_seconds=0.05)
    dead = replace(record, container_id="dead", start_time=record.start_time + 1)
    records.write(dead)
    with (run / "containers.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for change in (
            lambda: records.write(record),
            lambda: records.mark_delivered(record),
            records.sweep,
            lambda: records.close("dead", "/b"),
        ):
            with pytest.raises(SystemCallFailed, match=r"containers\.lock was locked by others"):
                change()
        assert records.sweep(dry_run=True) == [dead]
        assert records.close("never", "/b") is None
    assert sorted(path.name for path in run.iterdir()) == ["containers", "containers.lock"]
    assert records.sweep() == [dead]


def test_a_dry_run_leaves_what_is_half_written(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record)
    half = tmp_path / "run" / "containers" / ".n.0123456789ab"
    half.touch()
    os.utime(half, (1, 1))
    assert records.sweep(dry_run=True) == []
    assert half.exists()
    assert records.sweep() == []
    assert not half.exists()


HELD = HeldModel(7, "0:70", 5, 1, "o", shareable=True, root_inode=1, uid=2, gid=3, filled_by="c0")


def written(run: Path, record: ContainerRecord, **changes: object) -> list[ContainerRecord]:
    """What is read of a record whose held model was changed in the file; `...` takes a member away."""
    records = ContainerRecords(str(run))
    records.write(replace(record, delivered=True, held=(HELD,)))
    (path,) = (run / "containers").glob("*.json")
    document = json.loads(path.read_text())
    held = document["held"][0] | changes
    document["held"] = [{name: value for name, value in held.items() if value is not ...}]
    path.write_text(json.dumps(document))
    return list(records.live())


def test_held_models_are_read_as_they_were_written(tmp_path: Path, record: ContainerRecord) -> None:
    run = tmp_path / "run"
    assert written(run, record)[0].held == (HELD,)
    assert written(run, record, filled_by="")[0].held[0].filled_by == ""
    # As a version wrote them that shared nothing.
    old = dict.fromkeys(("shareable", "root_inode", "uid", "gid", "filled_by"), ...)
    assert written(run, record, **old)[0].held == (HeldModel(7, "0:70", 5, 1, "o"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"shareable": 1},
        {"root_inode": -1},
        {"root_inode": 1 << 64},
        {"uid": 1 << 32},
        {"gid": -1},
        {"gid": True},
        {"filled_by": None},
        {"filled_by": "x" * 1025},
        {"filled_by": ...},
        {"shareable": ...},
        {"more": 1},
    ],
    ids=str,
)
def test_held_models_that_are_damaged(tmp_path: Path, record: ContainerRecord, changes: dict[str, object]) -> None:
    assert written(tmp_path / "run", record, **changes) == []


def test_a_copy_is_known_by_number_and_fsid(record: ContainerRecord) -> None:
    holder = replace(record, held=(HELD,))
    assert holder.has_copy(replace(HELD, mount_id=9, filled_by=""))
    for other in (replace(HELD, fsid=8), replace(HELD, device="0:71"), replace(HELD, released=True)):
        assert not holder.has_copy(other)
        assert not replace(record, held=(other,)).has_copy(HELD)
    nameless = replace(HELD, fsid=0)  # a ramfs
    assert not replace(record, held=(nameless,)).has_copy(nameless)


def test_what_is_not_shareable_is_written_as_earlier_versions_read_it(tmp_path: Path, record: ContainerRecord) -> None:
    """They refuse a record with a key that they do not know: poststop would leave it, and a restart be refused."""
    records = ContainerRecords(str(tmp_path))
    alone = replace(HELD, shareable=False, filled_by="")
    records.mark_delivered(record, (alone, HELD))
    (path,) = (tmp_path / "containers").iterdir()
    first, second = json.loads(path.read_text())["held"]
    assert set(first) == {"fsid", "device", "mount_id", "size_bytes", "owner", "released"}
    assert set(second) - set(first) == {"shareable", "root_inode", "uid", "gid", "filled_by"}
    assert records.live()[0].held == (HeldModel(7, "0:70", 5, 1, "o"), HELD)


def test_a_model_at_two_places_is_released_at_one(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path))
    there = replace(HELD, mount_id=6)
    records.mark_delivered(record, (HELD, there, replace(HELD, device="0:71")))
    records.mark_released(record, HELD)
    assert [each.released for each in records.live()[0].held] == [True, False, False]
    records.mark_released(record, there)
    assert [each.released for each in records.live()[0].held] == [True, True, False]


# --- evidence ---------------------------------------------------------------------------------------------------------


def evidence_files(directory: Path) -> list[str]:
    folder = directory / "run" / "evidence"
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_evidence_comes_and_goes_with_the_record(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record)
    assert records.load_evidence("c1", "/b") is None
    records.write(record, b"first")
    records.mark_delivered(record)
    assert records.load_evidence("c1", "/b") == b"first"
    assert records.load_evidence("c1", "/other") is None
    (name,) = evidence_files(tmp_path)
    assert os.listdir(tmp_path / "run" / "containers") == [name]
    assert (tmp_path / "run" / "evidence" / name).stat().st_mode & 0o777 == 0o600
    assert records.close("c1", "/b", process=(1, 1)) is None  # another process's: it stays
    assert records.load_evidence("c1", "/b") == b"first"
    assert records.close("c1", "/b") is not None
    assert evidence_files(tmp_path) == []


def test_evidence_goes_with_who_adopts(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(replace(record, bundle=""), b"early")
    records.adopt("c1", "", "/b", (record.pid, record.start_time))
    assert records.load_evidence("c1", "") is None
    assert records.load_evidence("c1", "/b") == b"early"
    records.adopt("c1", "/b", "/b", (record.pid, record.start_time))
    assert records.load_evidence("c1", "/b") == b"early"


def test_a_sweep_removes_evidence_of_the_dead_and_of_nobody(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record, b"live")
    records.write(replace(record, container_id="dead", start_time=record.start_time + 1), b"dead")
    folder = tmp_path / "run" / "evidence"
    for name in ("0" * 64 + ".json", ".half.json.0123456789ab"):  # a hook was killed before its record, or in a write
        (folder / name).write_bytes(b"orphan")
    records.sweep()
    assert records.load_evidence("c1", "/b") == b"live"
    assert len(evidence_files(tmp_path)) == 1


def test_a_later_decision_replaces_the_evidence_of_this_very_container(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    records.write(record, b"first")
    records.keep_evidence(replace(record, start_time=record.start_time + 1), b"another's")
    assert records.load_evidence("c1", "/b") == b"first"
    records.keep_evidence(record, b"second")
    assert records.load_evidence("c1", "/b") == b"second"
    records.keep_evidence(replace(record, container_id="gone"), b"x")
    assert len(evidence_files(tmp_path)) == 1


def test_evidence_that_cannot_be_used_is_not(tmp_path: Path, record: ContainerRecord) -> None:
    records = ContainerRecords(str(tmp_path / "run"))
    with pytest.raises(FileUnreadable, match="larger"):
        records.write(record, b"x" * (LIMIT_BYTES + 1))
    assert records.load("c1", "/b") is None  # the record comes last: no record without its evidence
    records.write(record, b"good")
    (name,) = evidence_files(tmp_path)
    path = tmp_path / "run" / "evidence" / name
    path.chmod(0o666)
    with pytest.raises(FileUnreadable, match="writable by others"):
        records.load_evidence("c1", "/b")
