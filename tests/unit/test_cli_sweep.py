"""`sczctl sweep`: what gone containers left goes, what living ones have stays, and a dry run changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.delivery.holder import own_mount_namespace
from oci_hook.delivery.host_records import HostMount, HostRecord, HostRecords
from oci_hook.linux import mounts, syscalls
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords
from tests.commands import Household, done, snapshot

GONE = (os.getpid(), 1)  # this process, at another time


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def run(house: Household) -> str:
    return str(house.host / "run")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A model's file system, mounted as the delivery mounts it."""
    place = tmp_path / "rootfs" / "models"
    place.mkdir(parents=True)
    with mounts.create_memory_filesystem(1 << 20, 10, mounts.probe_memory_filesystem()) as made:
        directory = os.open(place, os.O_PATH | os.O_DIRECTORY)
        file = os.open("weights", os.O_WRONLY | os.O_CREAT, 0o444, dir_fd=made.fd)
        os.write(file, b"plaintext")
        os.close(file)
        mounts.seal_superblock(made.fd)
        mounts.attach(made.fd, directory)
        os.close(directory)
    try:
        yield place
    finally:
        if os.path.ismount(place):
            syscalls.umount2(str(place), syscalls.MNT_DETACH)


def mounted(run: str, place: Path, *, sandbox: tuple[int, int], container: str = "c1") -> None:
    found = os.statvfs(place)
    device = place.stat().st_dev
    mount = HostMount(str(place), found.f_fsid, f"{os.major(device)}:{os.minor(device)}")
    HostRecords(run).write(
        HostRecord(container, str(place.parent.parent), own_mount_namespace(), "/run/runsc", "s1", "/usr/bin/runsc",
                   sandbox, sandbox, (mount,))
    )  # fmt: skip


def started(run: str, *containers: str) -> None:
    """Records of this process, and of one that is gone if the container's name says so."""
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    record = ContainerRecord("", "/b", os.getpid(), start_time, 1, ("m",), ("m:1",), ("sha256:" + "0" * 64,),
                             ("/models/m",), "s", 1, True)  # fmt: skip
    records = ContainerRecords(run)
    for name in sorted(containers, reverse=True):  # each writing drops what is stale: those that live come first
        records.write(replace(record, container_id=name, start_time=1 if name.startswith("gone") else start_time))


def test_nothing_is_left_behind(house: Household) -> None:
    told = done(house.ctl("sweep"))
    assert (told.out, told.err) == ("", "nothing is left behind\n")
    assert done(house.ctl("sweep", "--json")).json == {"dry_run": False, "mounts": [], "records": []}
    assert not (house.host / "run").exists()


def test_a_model_of_a_container_that_is_gone(house: Household, run: str, model: Path) -> None:
    mounted(run, model, sandbox=GONE)
    started(run, "live", "gone")
    halves = [Path(run, folder, ".killed.0123456789ab") for folder in ("host-mounts", "containers")]
    for half in halves:
        half.touch()
        os.utime(half, (1, 1))
    before = snapshot(house.host)
    told = done(house.ctl("sweep", "--dry-run"))
    assert told.out.splitlines() == [
        f"would remove {model} of container c1",
        "would remove the record of container gone",
    ]
    assert os.path.ismount(model)
    assert {path: was for path, was in snapshot(house.host).items() if not path.endswith("host-mounts.lock")} == before
    with (model / "weights").open("rb") as kept:
        told = done(house.ctl("sweep", "--json"))
        assert kept.read() == b""
    (removed,) = told.json["mounts"]
    assert (removed["container_id"], removed["paths"], removed["left"]) == ("c1", [str(model)], [])
    assert told.json["records"] == ["gone"]
    assert not any(half.exists() for half in halves)
    assert not os.path.ismount(model)
    assert [record.container_id for record in ContainerRecords(run).live()] == ["live"]
    assert done(house.ctl("sweep")).err == "nothing is left behind\n"


def test_a_model_of_a_container_that_lives(house: Household, run: str, model: Path) -> None:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    mounted(run, model, sandbox=(os.getpid(), start_time))
    assert done(house.ctl("sweep")).err == "nothing is left behind\n"
    assert (model / "weights").read_bytes() == b"plaintext"


def test_what_cannot_be_removed_is_said_and_counts(house: Household, run: str, model: Path) -> None:
    mounted(run, model, sandbox=GONE)
    (Path(run) / "host-mounts" / "bad.json").write_text("{")
    for words, verb in ((["--dry-run"], "would remove"), ([], "removed")):
        told = house.ctl("sweep", *words)
        assert (told.code, told.out) == (1, f"{verb} {model} of container c1\n")
        assert "bad.json" in told.err
    assert not os.path.ismount(model)
