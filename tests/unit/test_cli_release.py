"""`sczctl release`: its exit codes and what it writes down; with engines: integration/test_release.py."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from oci_hook.audit import AuditLog
from oci_hook.records import ContainerRecord, ContainerRecords
from tests.commands import Household, done, misused
from tests.stuck import stuck_filesystem
from tests.unshared import container


@pytest.fixture
def house(tmp_path: Path) -> Household:
    made = Household(tmp_path)
    (made.host / "log").mkdir(mode=0o700, exist_ok=True)
    return made


def recorded(house: Household, *records: ContainerRecord) -> ContainerRecords:
    found = ContainerRecords(str(house.host / "run"))
    for record in records:
        found.write(record)
    return found


def test_what_the_container_unmounted_and_keeps_stays_in_the_record(house: Household, tmp_path: Path) -> None:
    audit = AuditLog(str(house.host / "log/audit.jsonl"))
    with container(tmp_path) as one:
        records = recorded(house, one.record)
        one.do(f"exec 3< {one.path}/file; umount -l {one.path}")
        told = house.ctl("release", "c")
        assert told.code == 4
        assert "the container has unmounted it itself; its memory comes back" in told.out
        assert "open file" in told.out
        assert records.live()[0].is_released(0) is False
        assert list(audit.records()) == []
        lazily = house.ctl("release", "--lazy", "--json", "c")
        assert (lazily.code, lazily.json["models"][0]["state"]) == (4, "detached")
        assert records.live()[0].is_released(0)
        assert [(each["event"], each["state"]) for each in audit.records()] == [("released", "detached")]
        one.do("exec 3<&-")


def test_what_cannot_be_told_is_not_called_free(house: Household, tmp_path: Path) -> None:
    program = (
        "import os,socket,sys;a,b=socket.socketpair();f=os.open(sys.argv[1],0);"
        "socket.send_fds(a,[b'x'],[f]);os.close(f);print(1,flush=True);sys.stdin.readline()"
    )
    with container(tmp_path) as one:
        records = recorded(house, one.record)
        one.do(f"mkfifo {tmp_path}/fifo; exec 4<> {tmp_path}/fifo")
        one.do(f'python3 -c "{program}" {one.path}/file <&4 > {tmp_path}/out & true')
        one.do(f"until grep -q 1 {tmp_path}/out; do sleep 0.05; done; umount -l {one.path}")
        told = house.ctl("release", "c")
        assert (told.code, "nor that it is free" in told.out) == (5, True)
        assert records.live()[0].is_released(0) is False
        one.do("echo >&4; wait")
        until = time.monotonic() + 60  # other tests' file systems may have the number meanwhile
        while (told := house.ctl("release", "c")).code in (3, 4, 5) and time.monotonic() < until:
            time.sleep(0.2)
        assert done(told).code == 0
        assert records.live()[0].is_released(0)


def test_which_container_is_meant_is_not_guessed(house: Household, tmp_path: Path) -> None:
    with container(tmp_path) as one:
        records = recorded(house, one.record)
        for empty in (("release", ""), ("release", "", "m:1"), ("why", ""), ("audit", "show", "--container", "")):
            misused(house.ctl(*empty), "it is empty")
        assert "file" in one.do(f"ls {one.path}")
        assert records.live()[0].is_released(0) is False
        recorded(house, dataclasses.replace(one.record, container_id="c" * 63 + "d"))
        misused(house.ctl("release", "cc"), "c" * 64, "c" * 63 + "d")
        assert "file" in one.do(f"ls {one.path}")


def test_a_container_that_never_answers_keeps_no_command_back(house: Household, tmp_path: Path) -> None:
    with container(tmp_path) as one, container(tmp_path, "d") as two:
        recorded(house, one.record, two.record)
        with stuck_filesystem(one.path.parents[1], pid=one.process.pid):
            for _ in range(2):
                rows = {row["container_id"][0]: row["memory_bytes"] for row in done(house.ctl("ps", "--json")).json}
                assert rows == {"c": 0, "d": 1 << 16}
            output = tmp_path / "metrics.prom"
            done(house.ctl("metrics", "--output", output))
            assert "scz_smm" in output.read_text()
            assert json.loads(done(house.ctl("metrics", "--json")).out)["resident"] == 2
