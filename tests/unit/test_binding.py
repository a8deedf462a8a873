"""identity.binding: a token stays with its pod, or with its first live container."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.access_policy import AcceptedIdentity
from oci_hook.errors import FileUnreadable, HolderGone, SczError, StateInvalid, SystemCallFailed, TokenBoundElsewhere
from oci_hook.identity.binding import SCHEMA, Bindings, is_process_alive, parse_record, verify_pod_binding
from oci_hook.identity.token import Identity
from oci_hook.linux.processes import process_start_time
from oci_hook.trust import Issuer

UID, OTHER = "5b1f1d57-7a5e-4c0b-9d3e-0c3f5d7a9b11", "11111111-2222-3333-4444-555555555555"
VOLUME = f"/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~projected/kube-api/..2026/token"


def identity(token: bytes = b"token", *, kind: str = "oidc", pod_uid: str | None = None) -> Identity:
    issuer = Issuer(name="main", issuer="https://issuer.example", kind=kind, keys=())
    accepted = AcceptedIdentity("https://issuer.example", "scz-smm", ("workload-a",), ())
    digest = hashlib.sha256(token).digest()
    return Identity(issuer, accepted, "workload-a", "scz-smm", 0, 1, digest, digest, pod_uid=pod_uid)


# --- by pod -----------------------------------------------------------------------------------------------------------

KUBERNETES = identity(kind="kubernetes", pod_uid=UID)


@pytest.mark.parametrize(
    "host_path",
    [
        VOLUME,
        f"/var/snap/kubelet/pods/{UID}/volumes/kubernetes.io~projected/v/token",
        f"{VOLUME} (deleted)",  # renewed between its opening and the look at its path
    ],
)
def test_claim_engine_and_path_agree(host_path: str) -> None:
    verify_pod_binding(KUBERNETES, host_path, UID)
    with pytest.raises(TokenBoundElsewhere):
        verify_pod_binding(KUBERNETES, host_path, OTHER)


@pytest.mark.parametrize("engine", [None, "", OTHER, UID.upper(), UID + " "])
def test_engine_names_no_pod_or_another(engine: str | None) -> None:
    with pytest.raises(TokenBoundElsewhere) as raised:
        verify_pod_binding(KUBERNETES, VOLUME, engine)
    assert ("engine" in raised.value.advice) == (not engine)


@pytest.mark.parametrize(
    "host_path",
    [
        VOLUME.replace(UID, OTHER),
        VOLUME.replace(UID, UID.upper()),
        VOLUME.replace("~projected", "~empty-dir"),
        VOLUME.replace("~projected", "~projected-not"),
        VOLUME.replace("/pods/", "/pod/"),
        f"/var/lib/kubelet/pods/{UID}/volume-subpaths/kube-api/main/0",
        f"/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~projected",
        f"/var/lib/kubelet/pods/{OTHER}/volumes/kubernetes.io~empty-dir/x{VOLUME}",
        f"/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~empty-dir/x{VOLUME}",
        "/home/user/token",
        "",
    ],
)
def test_path_is_not_in_a_projected_volume_of_the_pod(host_path: str) -> None:
    with pytest.raises(TokenBoundElsewhere):
        verify_pod_binding(KUBERNETES, host_path, UID)


def test_claim_names_another_pod_than_engine_and_path() -> None:
    with pytest.raises(TokenBoundElsewhere):
        verify_pod_binding(identity(kind="kubernetes", pod_uid=OTHER), VOLUME, UID)


@pytest.mark.parametrize(("kind", "pod_uid"), [("oidc", None), ("oidc", UID), ("spiffe", UID), ("kubernetes", None)])
def test_pod_binding_of_another_identity_is_our_fault(kind: str, pod_uid: str | None) -> None:
    with pytest.raises(RuntimeError):
        verify_pod_binding(identity(kind=kind, pod_uid=pod_uid), VOLUME, UID)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="/podsvlume~x.", max_size=80), st.none() | st.text(max_size=8))
def test_arbitrary_paths_and_uids_are_refused(host_path: str, engine: str | None) -> None:
    with pytest.raises(TokenBoundElsewhere):
        verify_pod_binding(KUBERNETES, host_path, engine)


# --- by first live container ------------------------------------------------------------------------------------------


@contextmanager
def process() -> Iterator[tuple[int, int]]:
    """A live process: pid and start time. Reaped at the end."""
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        start_time = process_start_time(child.pid)
        assert start_time is not None
        try:
            yield child.pid, start_time
        finally:
            child.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def bindings(directory: Path) -> Bindings:
    return Bindings(str(directory))


def records(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.json")}


def test_first_container_keeps_the_token_while_it_lives(bindings: Bindings, directory: Path) -> None:
    with process() as first, process() as second:
        bindings.bind_token(identity(), "a", "/b", *first)
        before = records(directory)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "b", "/b", *second)
        assert records(directory) == before
        bindings.bind_token(identity(b"its own"), "b", "/b", *second)


def test_same_container_binds_again_as_with_several_models(bindings: Bindings) -> None:
    with process() as first, process() as second:
        bindings.bind_token(identity(), "a", "/b", *first)
        bindings.bind_token(identity(), "a", "/b", *first)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "b", "/b", *second)


def test_what_is_adopted_lives_with_the_container(bindings: Bindings, directory: Path) -> None:
    bindings.adopt("a", "", "/b", (1, 1))
    assert not directory.exists()
    with process() as creator, process() as container, process() as other:
        bindings.bind_token(identity(), "a", "", *creator)
        bindings.bind_token(identity(b"another's"), "b", "", *creator)
        before = records(directory)
        bindings.adopt("a", "/b", "/b", container)  # it was bound by no such bundle
        assert records(directory) == before
        bindings.adopt("a", "", "/b", container)
        assert len(records(directory).items() - before.items()) == 1
        bindings.bind_token(identity(), "a", "/b", *container)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "c", "/b", *other)
    # Creator and container are gone.
    with process() as other:
        bindings.bind_token(identity(), "c", "/b", *other)


def test_only_what_a_process_holds_is_freed(bindings: Bindings, directory: Path) -> None:
    with process() as holder, process() as other:
        bindings.bind_token(identity(), "a", "/b", *holder)
        before = records(directory)
        bindings.release("a", "/b", process=other)
        assert records(directory) == before
        bindings.release("a", "/b", process=holder)
        assert records(directory) == {}


def test_restarted_container_takes_the_token_again(bindings: Bindings) -> None:
    with process() as first:
        bindings.bind_token(identity(), "a", "/b", *first)
    with process() as again, process() as other:
        bindings.bind_token(identity(), "a", "/b", *again)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "b", "/b", *other)


def test_same_id_under_another_runtime_root_is_another_container(bindings: Bindings) -> None:
    with process() as first, process() as second:
        bindings.bind_token(identity(), "a", "/b", *first)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "a", "/b", *second)


def test_two_containers_of_one_sandbox_process(bindings: Bindings) -> None:
    with process() as sandbox:
        bindings.bind_token(identity(), "a", "/b", *sandbox)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(identity(), "b", "/b", *sandbox)


def test_dead_holder_is_taken_over(bindings: Bindings, directory: Path) -> None:
    with process() as first:
        bindings.bind_token(identity(), "a", "/b", *first)
    with process() as second:
        bindings.bind_token(identity(), "b", "/b", *second)
    (record,) = records(directory).values()
    assert json.loads(record)["container"] == "b"


def test_reused_pid_is_another_process(bindings: Bindings, directory: Path) -> None:
    with process() as (pid, start_time), process() as second:
        bindings.bind_token(identity(), "a", "/b", pid, start_time)
        (path,) = directory.glob("*.json")
        document = {"schema": SCHEMA, "container": "a", "bundle": "/b", "pid": pid, "start_time": start_time - 1}
        path.write_text(json.dumps(document))
        bindings.bind_token(identity(), "b", "/b", *second)


def test_process_that_ended_binds_nothing(bindings: Bindings, directory: Path) -> None:
    with process() as (pid, start_time), pytest.raises(HolderGone):
        bindings.bind_token(identity(), "a", "/b", pid, start_time + 1)
    with pytest.raises(HolderGone):
        bindings.bind_token(identity(), "a", "/b", pid, start_time)
    assert not directory.exists()


@pytest.mark.parametrize(("container_id", "pid"), [("a", 0), ("a", -1), ("a", 1 << 31), ("a/b", 1), ("..", 1), ("", 1)])
def test_no_container_or_no_process(bindings: Bindings, container_id: str, pid: int) -> None:
    with pytest.raises(StateInvalid):
        bindings.bind_token(identity(), container_id, "/b", pid, 1)


def test_respelled_signature_is_the_same_token(bindings: Bindings) -> None:
    respelled = dataclasses.replace(identity(), token_hash=hashlib.sha256(b"(r, n - s)").digest())
    with process() as first, process() as second:
        bindings.bind_token(identity(), "a", "/b", *first)
        with pytest.raises(TokenBoundElsewhere):
            bindings.bind_token(respelled, "b", "/b", *second)


def test_nothing_of_the_token_is_stored(bindings: Bindings, directory: Path) -> None:
    with process() as first:
        bindings.bind_token(identity(b"a.very.secret"), "a", "/b", *first)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert set(records(directory)) == {hashlib.sha256(b"a.very.secret").hexdigest() + ".json"}
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"secret" not in path.read_bytes()


def test_release_frees_the_container_and_what_dead_ones_left(bindings: Bindings, directory: Path) -> None:
    with process() as first, process() as second:
        bindings.bind_token(identity(b"1"), "a", "/b", *first)
        bindings.bind_token(identity(b"2"), "b", "/b", *second)
        with process() as third:
            bindings.bind_token(identity(b"3"), "c", "/b", *third)
        (directory / f".{'0' * 64}.json.abc").write_bytes(b"{")
        bindings.release("a", "/b")
        assert set(records(directory)) == {hashlib.sha256(b"2").hexdigest() + ".json"}
        assert not list(directory.glob(".*"))
        bindings.bind_token(identity(b"1"), "d", "/b", *second)


def test_release_of_nothing_leaves_nothing(bindings: Bindings, directory: Path) -> None:
    bindings.release("a", "/b")
    assert not directory.exists()


def test_damaged_record_refuses_its_token_alone(bindings: Bindings, directory: Path) -> None:
    with process() as first, process() as second:
        bindings.bind_token(identity(b"1"), "a", "/b", *first)
        (path,) = directory.glob("*.json")
        path.write_bytes(b"{}")
        with pytest.raises(FileUnreadable) as raised:
            bindings.bind_token(identity(b"1"), "b", "/b", *second)
        assert str(path) in raised.value.advice
        bindings.bind_token(identity(b"2"), "b", "/b", *second)
        bindings.release("b", "/b")
        assert set(records(directory)) == {path.name}


def test_record_that_is_a_link_is_refused(bindings: Bindings, directory: Path, tmp_path: Path) -> None:
    directory.mkdir(0o700)
    (tmp_path / "target").write_bytes(b"x")
    (directory / f"{identity().signed_hash.hex()}.json").symlink_to(tmp_path / "target")
    with process() as first, pytest.raises(FileUnreadable):
        bindings.bind_token(identity(), "a", "/b", *first)
    assert (tmp_path / "target").read_bytes() == b"x"


def test_directory_that_others_can_write_is_refused(bindings: Bindings, directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with process() as first, pytest.raises(FileUnreadable):
        bindings.bind_token(identity(), "a", "/b", *first)
    with pytest.raises(FileUnreadable):
        bindings.release("a", "/b")
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with process() as first, pytest.raises(FileUnreadable):
        Bindings(str(tmp_path / "link")).bind_token(identity(), "a", "/b", *first)
    assert not list((tmp_path / "real").iterdir())


def test_lock_is_waited_for_but_not_for_ever(bindings: Bindings, directory: Path) -> None:
    impatient = Bindings(str(directory), lock_timeout_seconds=0.05)
    with process() as first:
        bindings.bind_token(identity(), "a", "/b", *first)
        with (directory / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(SystemCallFailed):
                impatient.bind_token(identity(), "a", "/b", *first)
        impatient.bind_token(identity(), "a", "/b", *first)


def _bind_in_child(directory: Path, number: int, result: int, hold: int) -> None:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    try:
        Bindings(str(directory)).bind_token(identity(), f"c{number}", "/b", os.getpid(), start_time)
        os.write(result, b"+")
    except TokenBoundElsewhere:
        os.write(result, b"-")
    os.read(hold, 1)  # lives until everybody has asked


def test_one_of_many_at_once_gets_the_token(directory: Path) -> None:
    result, result_end = os.pipe()
    hold_end, hold = os.pipe()
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            os.close(hold)
            try:
                _bind_in_child(directory, number, result_end, hold_end)
            finally:
                os._exit(0)
        children.append(child)
    os.close(result_end)
    answers = b""
    while len(answers) < len(children) and (part := os.read(result, 8)):
        answers += part
    os.close(hold)
    for child in children:
        os.waitpid(child, 0)
    os.close(result)
    os.close(hold_end)
    assert sorted(answers) == sorted(b"+-------")


# --- liveness ---------------------------------------------------------------------------------------------------------


def test_zombie_is_dead() -> None:
    with process() as (pid, start_time):
        assert is_process_alive(pid, start_time)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while is_process_alive(pid, start_time) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.path.exists(f"/proc/{pid}")  # not reaped
        assert not is_process_alive(pid, start_time)


def test_process_whose_first_thread_ended_is_alive() -> None:
    script = (
        "import ctypes, sys, threading, time\n"
        "threading.Thread(target=lambda: (print('up', flush=True), time.sleep(60))).start()\n"
        "time.sleep(0.2)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            start_time = process_start_time(child.pid)
            assert start_time is not None
            status = Path(f"/proc/{child.pid}/status")
            deadline = time.monotonic() + 10
            while "zombie" not in status.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert "zombie" in status.read_text()
            assert is_process_alive(child.pid, start_time)
            assert process_start_time(child.pid) == start_time
        finally:
            child.kill()


# --- records ----------------------------------------------------------------------------------------------------------

GOOD = {"schema": SCHEMA, "container": "a", "bundle": "/b", "pid": 7, "start_time": 9}


def test_record() -> None:
    record = parse_record(json.dumps(GOOD).encode())
    assert (record.container_id, record.bundle, record.pid, record.start_time) == ("a", "/b", 7, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "scz-smm/token-binding/v2"},
        {"container": "../a"},
        {"container": 1},
        {"bundle": "b"},
        {"pid": 0},
        {"pid": True},
        {"pid": 1.0},
        {"pid": 1 << 31},
        {"start_time": -1},
        {"start_time": "9"},
        {"token": "x"},
        {"container": "a" * 5000},
    ],
)
def test_bad_record(changes: dict[str, object]) -> None:
    with pytest.raises(FileUnreadable):
        parse_record(json.dumps({**GOOD, **changes}).encode())
    for name in GOOD:
        with pytest.raises(FileUnreadable):
            parse_record(json.dumps({key: value for key, value in GOOD.items() if key != name}).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789ab', max_size=80).map(str.encode))
def test_arbitrary_record(data: bytes) -> None:
    with pytest.raises(SczError):
        parse_record(data)
