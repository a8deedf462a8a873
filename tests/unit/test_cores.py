"""How many cores we may keep busy: affinity, and the quotas of both versions of control groups."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from oci_hook.delivery.cores import load_quota_cores, usable_cores
from oci_hook.delivery.memory import Cgroup
from oci_hook.errors import SczError
from oci_hook.linux.namespaces import Channel, Child, Report

ALL = os.cpu_count() or 1


def write(folder: Path, files: dict[str, str]) -> Path:
    """A group with these files."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", ALL),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("100001 100000", min(2, ALL)),
        ("9000000 100000", min(90, ALL)),
        ("0 100000", ALL),
        ("100000 0", ALL),
        ("", ALL),
        ("x y", ALL),
        ("9" * 30 + " 1", ALL),
    ],
)
def test_version_2(tmp_path: Path, text: str, cores: int) -> None:
    group = write(tmp_path / "c", {"cpu.max": text})
    assert load_quota_cores(Cgroup(2, str(tmp_path), str(group))) == cores


def test_a_quota_further_up(tmp_path: Path) -> None:
    pod = write(tmp_path / "pod", {"cpu.max": "80000 100000"})
    group = write(pod / "c", {"cpu.max": "max 100000"})
    assert load_quota_cores(Cgroup(2, str(tmp_path), str(group))) == 1


@pytest.mark.parametrize(("quota", "cores"), [("-1", ALL), ("100000", 1), ("30000", 1)])
def test_version_1(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path, {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    group = write(tmp_path / "c", {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})
    assert load_quota_cores(Cgroup(1, str(tmp_path), str(group))) == cores


def test_no_group_at_all(tmp_path: Path) -> None:
    assert load_quota_cores(None) == ALL
    assert load_quota_cores(Cgroup(2, str(tmp_path), str(tmp_path / "c"))) == ALL


@pytest.mark.parametrize("kind", ["a link to itself", "a socket", "a folder"])
@pytest.mark.parametrize("version", [1, 2])
def test_what_cannot_be_read_limits_nothing_and_hides_no_quota_above(tmp_path: Path, version: int, kind: str) -> None:
    """ELOOP and ENXIO stand for whatever a system may say to open(2), EISDIR to read(2)."""
    names = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}[version]
    pod = write(tmp_path / "pod", {})
    group = write(pod / "c", {})
    for name in names:
        if kind == "a socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(group / name))
        elif kind == "a folder":
            (group / name).mkdir()
        else:
            (group / name).symlink_to(name)
    assert load_quota_cores(Cgroup(version, str(tmp_path), str(group))) == ALL
    write(pod, {1: {"cpu.cfs_quota_us": "100", "cpu.cfs_period_us": "100"}, 2: {"cpu.max": "100 100"}}[version])
    assert load_quota_cores(Cgroup(version, str(tmp_path), str(group))) == 1


def test_no_more_than_the_affinity_allows() -> None:
    def body(_channel: Channel) -> Report:
        before = usable_cores()
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        return {"before": before, "after": usable_cores()}

    with Child("the test's child", body, gone=SczError) as child:
        report = child.receive(10)["done"]
    assert 1 <= report["before"] <= len(os.sched_getaffinity(0))
    assert report["after"] == 1
