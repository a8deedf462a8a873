"""`cli.checks.grade` and what `containers` reads for it, reason by reason; real ones: matrix/test_doctor.py."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.cli.checks import containers
from oci_hook.cli.checks.containers import (
    grade_containers,
    model_mounts,
    parse_core_limit,
    parse_status,
    token_lifetime,
)
from oci_hook.cli.checks.grade import TOKEN_SECONDS, ContainerFacts, HostFacts, ModelMount, grade
from oci_hook.cli.checks.kernel import load_kernel_state
from oci_hook.errors import TokenMalformed
from oci_hook.held import HeldModel
from oci_hook.linux.mounts import parse_mountinfo
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords
from tests.stuck import stuck_filesystem
from tests.unshared import container as unshared_container

GOOD = ContainerFacts(
    sandbox="none",
    user_namespace=True,
    host_uid=200_000,
    capabilities=frozenset((0, 1, 5)),
    shares_pids=False,
    seccomp=True,
    core_limit_bytes=0,
    swapped_bytes=0,
    mounts=(ModelMount("/models/m", True),),
    token_seconds=600,
)
RECORD = ContainerRecord(
    container_id="c" * 64,
    bundle="/bundle",
    pid=1,
    start_time=0,
    seconds=1,
    references=("m",),
    models=("m:1",),
    manifests=("sha256:" + "0" * 64,),
    destinations=("/models/m",),
    subject="s",
    size_bytes=1,
    delivered=True,
)
HOST = HostFacts(stores_cores=False, core_program="", plain_swap=False, software_tpm=False)


def mount(**changes: Any) -> dict[str, Any]:
    return {"mounts": (dataclasses.replace(GOOD.mounts[0], **changes),)}


def test_secure_is_where_nothing_is_found() -> None:
    assert grade(GOOD, HOST) == ("secure", ())
    assert grade(GOOD, dataclasses.replace(HOST, software_tpm=None)) == ("secure", ())


@pytest.mark.parametrize(
    ("container", "host", "name", "weight"),
    [
        ({"user_namespace": False}, {}, "no-user-namespace", "weak"),
        ({"user_namespace": False, "capabilities": frozenset((21,))}, {}, "privileged", "insecure"),
        ({"user_namespace": False, "capabilities": frozenset((2,))}, {}, "privileged", "insecure"),
        ({"shares_pids": True}, {}, "host-pids", "weak"),
        ({"shares_pids": True, "capabilities": frozenset((19,))}, {}, "host-pids", "weak"),
        (
            {"shares_pids": True, "capabilities": frozenset((19,)), "user_namespace": False},
            {},
            "host-pids",
            "insecure",
        ),
        ({"capabilities": frozenset((19,))}, {}, "ptrace", "weak"),
        ({"seccomp": False}, {}, "no-seccomp", "weak"),
        ({"core_limit_bytes": None}, {"stores_cores": True}, "core-dumps", "weak"),
        ({"core_limit_bytes": 1}, {"stores_cores": True}, "core-dumps", "weak"),
        ({}, {"stores_cores": True, "core_program": "/usr/share/apport/apport"}, "core-dumps", "weak"),
        ({}, {"plain_swap": True}, "swap", "weak"),
        ({"swapped_bytes": 4096}, {"plain_swap": True}, "swapped", "insecure"),
        (mount(noswap=False), {}, "mount-swappable", "weak"),
        (mount(noswap=False), {"plain_swap": True}, "mount-swappable", "insecure"),
        (mount(present=False), {}, "mount-gone", "weak"),
        (mount(read_only=False), {}, "mount-writable", "insecure"),
        (mount(kind="ext4"), {}, "mount-kind", "insecure"),
        ({}, {"software_tpm": True}, "software-tpm", "weak"),
        ({"token_seconds": TOKEN_SECONDS + 1}, {}, "long-token", "weak"),
        ({"recorded": False}, {}, "unknown-sandbox", "weak"),
        ({"recorded": False, "sandbox": "unknown"}, {}, "unknown-sandbox", "weak"),
    ],
)
def test_each_reason(container: dict[str, Any], host: dict[str, Any], name: str, weight: str) -> None:
    judged, reasons = grade(dataclasses.replace(GOOD, **container), dataclasses.replace(HOST, **host))
    (found,) = (reason for reason in reasons if reason.name == name)
    assert found.weight == weight
    assert judged == max((reason.weight for reason in reasons), key=("weak", "insecure").index)
    assert found.message
    assert found.remedy


@pytest.mark.parametrize(
    ("container", "host"),
    [
        ({"capabilities": frozenset(range(41)) - {19}}, {}),  # in a user namespace of its own
        ({"core_limit_bytes": None}, {}),  # the pattern throws them away
        ({}, {"stores_cores": True}),  # the limit is 0 and the pattern a file
        ({}, {"stores_cores": True, "core_program": "/lib/systemd/systemd-coredump"}),
        ({"swapped_bytes": 4096}, {}),  # the swap is encrypted
        (mount(kind="ramfs", noswap=False), {}),
        (mount(present=None, read_only=False, kind="?", noswap=False), {}),
        ({"token_seconds": TOKEN_SECONDS}, {}),
        ({"token_seconds": None}, {}),
        ({"sandbox": "gvisor", "seccomp": False, "user_namespace": False}, {}),
    ],
)
def test_what_is_no_reason(container: dict[str, Any], host: dict[str, Any]) -> None:
    assert grade(dataclasses.replace(GOOD, **container), dataclasses.replace(HOST, **host)) == ("secure", ())


def test_the_heaviest_reason_comes_first() -> None:
    container = dataclasses.replace(GOOD, seccomp=False, **mount(present=False))
    judged, reasons = grade(dataclasses.replace(container, swapped_bytes=1), dataclasses.replace(HOST, plain_swap=True))
    assert (judged, reasons[0].name, len(reasons)) == ("insecure", "swapped", 3)


def test_what_all_containers_share(tmp_path: Path) -> None:
    kernel = dataclasses.replace(load_kernel_state(str(tmp_path)), core_pattern="|/usr/bin/x %p")
    assert HostFacts.of(kernel, None) == HostFacts(True, "/usr/bin/x", False, None)
    assert HostFacts.of(dataclasses.replace(kernel, core_pattern="core"), True) == HostFacts(True, "", False, True)
    assert HostFacts.of(dataclasses.replace(kernel, core_pattern=""), None).stores_cores is False


# --- /proc ------------------------------------------------------------------------------------------------------------

STATUS = """Name:\tcat
Uid:\t1000\t1000\t1000\t1000
VmSwap:\t      12 kB
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000200001
CapAmb:\t0000000000000000
Seccomp:\t2
"""
MOUNTINFO = """20 1 0:5 / / rw,relatime - overlay overlay rw
31 20 0:61 / /models/m ro,nosuid,nodev,noexec - tmpfs scz-smm ro,size=4k,noswap
32 20 0:62 / /models/r ro,nosuid - ramfs scz-smm ro
33 20 0:63 / /models/w rw,nosuid - tmpfs scz-smm ro,noswap
34 20 0:64 / /models/s ro - tmpfs scz-smm rw,noswap
35 20 0:65 / /models/hidden ro - tmpfs scz-smm ro,noswap
36 35 0:66 / /models/hidden rw - tmpfs tmpfs rw
"""


def test_a_process_status() -> None:
    found = parse_status(STATUS)
    assert (found.uid, found.capabilities, found.seccomp) == (1000, frozenset((0, 21)), True)
    assert found.swapped_bytes == 12 * 1024
    own = parse_status(Path("/proc/self/status").read_text())
    assert own.uid == 0


def test_a_limit_for_cores() -> None:
    line = "Limit                     Soft Limit           Hard Limit           Units\nMax core file size        {}\n"
    assert parse_core_limit(line.format("0                    unlimited            bytes")) is None
    assert parse_core_limit(line.format("0                    0                    bytes")) == 0
    assert parse_core_limit(line.format("unlimited            4096                 bytes")) == 4096
    assert parse_core_limit("") is None  # the worst


def test_what_lies_at_a_destination() -> None:
    paths = ("/models/m", "/models/r/", "/models/w", "/models/s", "/models/hidden", "/models/absent")
    six = dataclasses.replace(RECORD, destinations=paths, models=("m:1",) * 6)
    found = model_mounts(six, parse_mountinfo(MOUNTINFO.encode()), None)
    assert found == (
        ModelMount("/models/m", True, True, "tmpfs", True),
        ModelMount("/models/r/", True, True, "ramfs", False),
        ModelMount("/models/w", True, False, "tmpfs", True),
        ModelMount("/models/s", True, False, "tmpfs", True),
        ModelMount("/models/hidden", False),
        ModelMount("/models/absent", False),
    )


@pytest.mark.parametrize(
    ("changes", "taken", "present"),
    [
        ({}, (4096,), True),
        ({}, None, True),
        ({"mount_id": 32}, (4096,), False),
        ({"device": "0:62"}, (4096,), False),
        ({}, (None,), False),  # the numbers are those of the record, and yet it is not that file system
        ({"released": True}, (None,), None),
    ],
)
def test_a_source_alone_makes_no_model(
    changes: dict[str, Any], taken: tuple[int | None, ...] | None, present: bool | None
) -> None:
    held = dataclasses.replace(HeldModel(7, "0:61", 31, 4096, "o"), **changes)
    one = dataclasses.replace(RECORD, destinations=("/models/m",), held=(held,))
    assert [each.present for each in model_mounts(one, parse_mountinfo(MOUNTINFO.encode()), taken)] == [present]


def token(claims: object) -> bytes:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=")
    return b"e30." + payload + b".c2ln"


def test_a_tokens_lifetime() -> None:
    assert token_lifetime(token({"iat": 1000, "exp": 1600})) == 600
    assert token_lifetime(token({"iat": 1000.5, "exp": 1600})) == 599
    for claims in ({"exp": 1}, {"iat": 1}, {"iat": True, "exp": 2}, {"iat": "1", "exp": 2}):
        assert token_lifetime(token(claims)) is None
    assert token_lifetime(b"a.b") is None
    with pytest.raises(TokenMalformed):
        token_lifetime(b"a.*.b")


@given(st.binary(max_size=200))
def test_whatever_is_in_the_place_of_a_token(data: bytes) -> None:
    try:
        assert token_lifetime(data) is None
    except TokenMalformed:
        return


@given(st.text(max_size=300))
def test_whatever_proc_says(text: str) -> None:
    parse_core_limit(text)


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this host, as a container that shares everything with it."""
    with subprocess.Popen(["/bin/sleep", "600"], stdin=subprocess.DEVNULL) as started:
        yield started
        started.kill()


def record(directory: Path, pid: int, bundle: Path, **changes: Any) -> ContainerRecords:
    bundle.mkdir(exist_ok=True)
    made = dataclasses.replace(RECORD, bundle=str(bundle), pid=pid, start_time=process_start_time(pid) or 0)
    records = ContainerRecords(str(directory))
    records.write(dataclasses.replace(made, **changes))
    return records


def test_a_process_without_any_wall(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    record(tmp_path / "run", process.pid, tmp_path / "bundle")
    (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
    assert (found.grade, found.sandbox, found.pid) == ("insecure", "none", process.pid)
    names = {reason.name for reason in found.reasons}
    assert {"privileged", "no-user-namespace", "host-pids", "mount-gone"} <= names
    assert found.unseen[-1] == "its token's lifetime"
    assert "whether what is mounted at its models' places is what was delivered" in found.unseen


def test_the_token_is_found_by_the_annotation_and_no_link_leads_out(
    process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    place, bundle = tmp_path / "token", tmp_path / "bundle"
    place.write_bytes(token({"iat": 0, "exp": 10 * 86400}))
    record(tmp_path / "run", process.pid, bundle)
    (bundle / "config.json").write_text(json.dumps({"annotations": {"smm.scz/token": str(place)}}))
    (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
    assert "valid for 240 h" in next(reason.message for reason in found.reasons if reason.name == "long-token")
    for hostile in ("/proc/self/fd/0", "/dev/zero", str(tmp_path), "relative", "/"):
        (bundle / "config.json").write_text(json.dumps({"annotations": {"smm.scz/token": hostile}}))
        (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
        assert "its token's lifetime" in found.unseen
    os.mkfifo(tmp_path / "pipe")
    (bundle / "config.json").write_text(json.dumps({"annotations": {"smm.scz/token": str(tmp_path / "pipe")}}))
    assert len(list(grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST))) == 1  # it did not wait
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        (bundle / "config.json").write_text(json.dumps({"annotations": {"smm.scz/token": str(tmp_path / "s")}}))
        assert len(list(grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST))) == 1
    (bundle / "config.json").write_text("{")
    assert len(list(grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST))) == 1


def test_a_token_that_never_comes_is_left_behind(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system of the container's own (FUSE) can do it: the child that reads is ended."""
    record(tmp_path / "run", process.pid, tmp_path / "bundle")
    monkeypatch.setattr(containers, "_TOKEN_READ_SECONDS", 0.2)
    monkeypatch.setattr(containers, "_read_lifetime", lambda *_: time.sleep(600))
    (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
    assert "its token's lifetime" in found.unseen


def test_a_process_that_ended_is_no_container(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    record(tmp_path / "run", process.pid, tmp_path / "bundle", start_time=1)
    assert list(grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)) == []
    assert list(grade_containers(str(tmp_path / "none"), "/nowhere/token", HOST)) == []


def test_a_token_for_which_no_signal_ends_the_wait(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """The child that reads waits in the kernel, for a server that never answers: doctor goes on without it."""
    place, bundle = tmp_path / "fuse", tmp_path / "bundle"
    place.mkdir()
    record(tmp_path / "run", process.pid, bundle, runtime="crun")
    (bundle / "config.json").write_text(json.dumps({"annotations": {"smm.scz/token": f"{place}/token"}}))
    with stuck_filesystem(place):
        (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
        assert "its token's lifetime" in found.unseen
        assert found.grade == "insecure"


@pytest.mark.parametrize("name", ["qemu-worker", "runsc", "exe", "cloud-hypervisor"])
@pytest.mark.parametrize("released", [True, False])
def test_the_name_of_a_program_is_no_sandbox(tmp_path: Path, name: str, released: bool) -> None:
    program = tmp_path / name
    shutil.copy("/bin/sleep", program)
    held = (HeldModel(7, "0:61", 31, 4096, "o", released),)
    with subprocess.Popen([program, "600"], stdin=subprocess.DEVNULL) as started:
        try:
            own = os.stat(f"/proc/{started.pid}/ns/mnt")
            start_time = process_start_time(started.pid) or 0
            known = {"held": held, "keeper": (started.pid, start_time), "namespace": (own.st_dev, own.st_ino)}
            for runtime in ("runc", "crun"):
                record(tmp_path / "run", started.pid, tmp_path / "bundle", runtime=runtime, **known)
                (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
                assert (found.grade, found.sandbox) == ("insecure", "none")
                assert "privileged" in {reason.name for reason in found.reasons}
            record(tmp_path / "run", started.pid, tmp_path / "bundle")  # of an earlier version
            (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
            assert (found.grade, found.sandbox) == ("weak", "unknown")
            assert [reason.name for reason in found.reasons] == ["unknown-sandbox"]
            record(tmp_path / "run", started.pid, tmp_path / "bundle", runtime="runsc", **known)
            (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
            assert found.sandbox == "gvisor"
        finally:
            started.kill()


def test_a_mount_that_only_calls_itself_a_model_s(tmp_path: Path) -> None:
    """What the container mounts in the model's place gets its numbers anew, as they are the lowest that are free."""
    with unshared_container(tmp_path) as one:
        records = ContainerRecords(str(tmp_path / "run"))
        records.write(one.record)

        def seen() -> set[str]:
            (found,) = grade_containers(str(tmp_path / "run"), "/nowhere/token", HOST)
            return {reason.name for reason in found.reasons if reason.name.startswith("mount-")}

        assert "mount-gone" not in seen()
        one.do(
            f"umount {one.path}; mount -t tmpfs -o ro,noswap scz-smm {one.path} || mount -t ramfs scz-smm {one.path}"
        )
        assert "scz-smm" in one.do("cat /proc/self/mountinfo")
        assert seen() == {"mount-gone"}
