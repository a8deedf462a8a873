"""What is compared where models come by bind entries: the plan before `create`, config.json in the prestart hook."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.bound_checks import (
    OPTIONS,
    BindEntry,
    lasting_process,
    plan_entries,
    verify_apart,
    verify_container,
    verify_entries,
    verify_in_place,
    verify_runtime,
)
from oci_hook.delivery.bound_folders import folder_of, folders, lock_folder, place_of, remove_abandoned
from oci_hook.delivery.holder import own_mount_namespace
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostMount
from oci_hook.errors import (
    DestinationInvalid,
    DestinationRefused,
    EngineUnsupported,
    HolderRefused,
    RequirementRefused,
    SczError,
    StateInvalid,
)
from oci_hook.linux.processes import HeldProcess, process_of_thread, process_start_time
from oci_hook.oci.annotations import ModelRequest, parse_requests
from oci_hook.oci.spec import Mount, Spec, parse_spec
from tests.workshop import wait_until

RUN = "/run/scz-smm"


def spec(*mounts: dict[str, Any], **more: Any) -> Spec:
    document = {"root": {"path": "/r"}, "mounts": list(mounts), "linux": {"namespaces": [{"type": "mount"}]}, **more}
    return parse_spec(json.dumps(document).encode(), bundle="/b")


def requests(**paths: str) -> tuple[ModelRequest, ...]:
    annotations = {f"smm.scz/model.{slot}": f"{slot}:1" for slot in paths}
    return parse_requests({**annotations, **{f"smm.scz/path.{slot}": path for slot, path in paths.items()}}).models


def plan(found: Spec, asked: tuple[ModelRequest, ...], run: str = RUN) -> tuple[BindEntry, ...]:
    return plan_entries("c", "/b", found, asked, run)


def mount(destination: str, kind: str = "tmpfs") -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": "/s", "options": ["rw"]}


class TestPlan:
    def test_one_entry_for_each_model_in_order(self) -> None:
        found = plan(spec(mount("/proc"), mount("/m"), mount("/models2")), requests(a="/models/x", b="/opt/y"))
        folder = folder_of(RUN, "c", "/b")
        assert found == (
            BindEntry("/models/x", place_of(folder, 0), OPTIONS),
            BindEntry("/opt/y", place_of(folder, 1), OPTIONS),
        )
        assert folder != folder_of(RUN, "c", "") != folder_of(RUN, "c", "/b2")
        assert "rbind" not in OPTIONS

    @pytest.mark.parametrize("destination", ["/", "/models", "/models/", "/models/x", "/models/x/y", "//models/./x"])
    def test_another_mount_at_above_or_below(self, destination: str) -> None:
        with pytest.raises(DestinationRefused, match="hide"):
            plan(spec(mount(destination)), requests(a="/models/x"))

    def test_its_own_entries_are_no_others(self) -> None:
        (entry,) = plan(spec(), requests(a="/models/x"))
        again = {**dataclasses.asdict(entry), "type": "bind"}
        assert plan(spec(again), requests(a="/models/x")) == (entry,)
        with pytest.raises(DestinationRefused):
            plan(spec(again | {"options": ["bind"]}), requests(a="/models/x"))

    @pytest.mark.parametrize("namespaces", [[], [{"type": "pid"}], [{"type": "mount", "path": "/proc/1/ns/mnt"}]])
    def test_mounts_that_are_anothers(self, namespaces: list[dict[str, str]]) -> None:
        with pytest.raises(HolderRefused):
            plan(spec(linux={"namespaces": namespaces}), requests(a="/models/x"))

    @pytest.mark.parametrize(
        "shown",
        [
            {"source": f"{RUN}/bound/x/0"},
            {"source": f"{RUN}/bound"},
            {"source": f"{RUN}/bound/../bound/x"},
            {"source": RUN, "options": ["rbind"]},
            {"source": "/run"},
            {"source": "/var/run"},
            {"source": "/"},
            {"source": "/proc/self/root/run"},
            {"type": "none", "source": "/run", "options": ["rbind"]},
            {"type": "overlay", "source": "overlay", "options": [f"upperdir=/u,lowerdir=/l:{RUN}/bound/x/0"]},
        ],
    )
    def test_no_other_containers_models(self, shown: dict[str, Any]) -> None:
        other = {"destination": "/steal", "type": "bind", "options": ["bind", "ro"], **shown}
        with pytest.raises(DestinationRefused, match="the models of other containers"):
            plan(spec(other), requests(a="/models/x"))

    def test_other_volumes_and_a_root(self) -> None:
        for source in ("/running", "/run/scz-smm-x", f"{RUN}/boundary", f"{RUN}/tokens", "/srv/x"):
            volume = {"destination": "/v", "type": "bind", "source": source, "options": ["rbind", "x=/srv\0/x"]}
            assert len(plan(spec(volume), requests(a="/models/x"))) == 1
        with pytest.raises(DestinationRefused, match="the models of other containers"):
            plan(spec(root={"path": f"{RUN}/bound/x/0"}), requests(a="/models/x"))

    def test_what_kata_replaces(self) -> None:
        with pytest.raises(DestinationRefused, match="empty directory"):
            plan(spec(), requests(a="/kubernetes.io~empty-dir/x"))
        with pytest.raises(DestinationRefused, match="empty directory"):
            plan(spec(), requests(a="/x"), "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/v")

    def test_a_bundle_in_an_image_that_is_not_known(self) -> None:
        asked = parse_requests({"smm.scz/model": "rootfs:/b", "smm.scz/path": "/m"}).models
        unknown = parse_spec(b'{"linux": {"namespaces": [{"type": "mount"}]}}', bundle="")
        assert unknown.root_path == ""
        with pytest.raises(EngineUnsupported, match="not known before create"):
            plan_entries("c", "", unknown, asked, RUN)
        assert plan(spec(), asked)

    @pytest.mark.parametrize("path", ["/proc/x", "/dev/m", "/sys/m"])
    def test_the_kernels_places(self, path: str) -> None:
        with pytest.raises(DestinationInvalid):
            plan(spec(), requests(a=path))

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_any_two_paths_are_apart_or_refused(self, ours: str, theirs: str) -> None:
        entry = BindEntry(f"/{ours}", "/s")
        try:
            verify_apart([entry], [Mount(f"/{theirs}", "tmpfs", "t", ())])
        except DestinationRefused:
            return
        one, other = ([part for part in path.split("/") if part] for path in (ours, theirs))
        assert one[: len(other)] != other
        assert other[: len(one)] != one

    @pytest.mark.parametrize(
        ("name", "creator", "runtime", "error"),
        [
            ("", (1, 1), "kata", StateInvalid),
            ("../x", (1, 1), "kata", StateInvalid),
            ("c", (0, 1), "kata", StateInvalid),
            ("c", (1, -1), "kata", StateInvalid),
            ("c", (1, 1), "process", EngineUnsupported),
            ("c", (1, 1), "", EngineUnsupported),
        ],
    )
    def test_what_no_record_can_be_made_of(
        self, name: str, creator: tuple[int, int], runtime: str, error: type[SczError]
    ) -> None:
        with pytest.raises(error):
            verify_container(name, creator, runtime)


@pytest.fixture
def record(tmp_path: Path) -> BoundRecord:
    """Of a directory that is mounted nowhere else."""
    place = tmp_path / "0"
    place.mkdir()
    seen = place.stat()
    return BoundRecord(
        container_id="c",
        bundle="",
        namespace=own_mount_namespace(),
        runtime="kata",
        creator=(1, 1),
        container=NOBODY,
        mounts=(
            HostMount(
                str(place),
                os.statvfs(place).f_fsid,
                f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}",
                "/models/x",
            ),
        ),
    )


class TestEntries:
    def entry(self, record: BoundRecord, **changes: Any) -> dict[str, Any]:
        made = {"destination": "/models/x", "type": "bind", "source": record.mounts[0].path, "options": list(OPTIONS)}
        return made | changes

    def test_the_hook_of_one_of_two_devices(self, record: BoundRecord) -> None:
        another = dataclasses.replace(record.mounts[0], destination="/y")
        two = dataclasses.replace(record, mounts=(*record.mounts, another))
        shown = self.entry(two), self.entry(two, destination="/y")
        for asked in (requests(a="/models/x"), requests(a="/y"), requests(a="/models/x", b="/y")):
            verify_entries(two, spec(*shown), asked)
            with pytest.raises(DestinationRefused):
                verify_entries(two, spec(shown[0]), asked)

    def test_exactly_the_entry(self, record: BoundRecord) -> None:
        verify_entries(record, spec(mount("/proc"), self.entry(record), mount("/opt")), requests(a="/models/x"))

    @pytest.mark.parametrize(
        "changes",
        [
            {"source": "/etc"},
            {"options": ["bind"]},
            {"options": list(reversed(OPTIONS))},
            {"options": [*OPTIONS, "rw"]},
            {"type": "none"},
            {"destination": "/models/y"},
        ],
    )
    def test_anything_else(self, record: BoundRecord, changes: dict[str, Any]) -> None:
        with pytest.raises(DestinationRefused):
            verify_entries(record, spec(self.entry(record, **changes)), requests(a="/models/x"))

    def test_other_containers_models(self, record: BoundRecord) -> None:
        for source in (Path(record.mounts[0].path).parents[1] / "x/0", Path(record.mounts[0].path).parent):
            other = {"destination": "/steal", "type": "bind", "source": str(source), "options": ["bind"]}
            with pytest.raises(DestinationRefused, match="the models of other containers"):
                verify_entries(record, spec(self.entry(record), other), requests(a="/models/x"))

    def test_other_requests(self, record: BoundRecord) -> None:
        for asked in (requests(), requests(a="/models/y"), requests(a="/models/x", b="/opt/y")):
            with pytest.raises(DestinationRefused, match="other places"):
                verify_entries(record, spec(self.entry(record)), asked)

    def test_what_lies_there(self, record: BoundRecord) -> None:
        verify_in_place(record)
        (there,) = record.mounts
        for other in (
            dataclasses.replace(there, device="0:99999"),
            dataclasses.replace(there, fsid=there.fsid ^ 1),
            dataclasses.replace(there, path="/nonexistent"),
        ):
            with pytest.raises(DestinationRefused, match="not mounted where"):
                verify_in_place(dataclasses.replace(record, mounts=(other,)))


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process.pid
        process.kill()


@contextmanager
def monitored(folder: Path, name: str, *, mode: int = 0o755) -> Iterator[tuple[int, int]]:
    """A program of this name and a child of it; yields both pids."""
    program = folder / name
    shutil.copy(os.path.realpath("/bin/sh"), program)
    program.chmod(mode)
    words = [str(program), "-c", "/bin/sleep 600 & echo $!; wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            while os.path.samefile(f"/proc/{child}/exe", program):  # until it has become what it will be
                time.sleep(0.01)
            yield process.pid, child
        finally:
            os.kill(child, signal.SIGKILL)
            process.wait(timeout=60)
    program.unlink()


class TestProcesses:
    def test_a_threads_process(self) -> None:
        found = []
        thread = threading.Thread(target=lambda: found.append(process_of_thread(threading.get_native_id())))
        thread.start()
        thread.join()
        assert found == [os.getpid()] == [process_of_thread(os.getpid())]

    def test_the_runtimes_child(self, sleeper: int) -> None:
        with HeldProcess(os.getpid()) as runtime:
            assert lasting_process(sleeper, runtime) == (sleeper, process_start_time(sleeper))

    @pytest.mark.parametrize("pid", [0, 1])
    @pytest.mark.parametrize("name", ["bash", "conmon-x", "xconmon"])
    def test_no_process_that_stays(self, tmp_path: Path, name: str, pid: int) -> None:
        with monitored(tmp_path, name) as (_, created), HeldProcess(created) as runtime:
            for of_state in (pid, created):
                with pytest.raises(HolderRefused, match=f"started by '{name}', and names no process that lives"):
                    lasting_process(of_state, runtime)

    @pytest.mark.parametrize("name", ["conmon", "conmonrs", "containerd-shim", "containerd-shim-runc-v2"])
    def test_the_engines_monitor_above_a_create(self, tmp_path: Path, name: str) -> None:
        with monitored(tmp_path, name) as (monitor, created), HeldProcess(created) as runtime:
            assert lasting_process(created, runtime) == (monitor, process_start_time(monitor))
        with (
            monitored(tmp_path, name, mode=0o775) as (_, created),
            HeldProcess(created) as runtime,
            pytest.raises(HolderRefused, match="not root's alone"),
        ):
            lasting_process(created, runtime)

    def test_a_shim_stays_itself(self, tmp_path: Path) -> None:
        with monitored(tmp_path, "containerd-shim-kata-v2") as (shim, _), HeldProcess(shim) as runtime:
            assert lasting_process(shim, runtime) == (shim, process_start_time(shim))

    @pytest.mark.parametrize("program", ["runc", "bash", "kata-agent", ""])
    def test_another_runtime(
        self, record: BoundRecord, sleeper: int, program: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(HeldProcess, "executable_name", lambda _self, **_how: program)
        with HeldProcess(sleeper) as runtime, pytest.raises(RequirementRefused, match="made ready for kata"):
            verify_runtime(runtime, record)

    @pytest.mark.parametrize("name", ["kata-runtime", "containerd-shim-kata-v2", "kata-runtime-3"])
    def test_katas(self, record: BoundRecord, tmp_path: Path, name: str) -> None:
        with monitored(tmp_path, name) as (program, _), HeldProcess(program) as runtime:
            verify_runtime(runtime, record)
        with (
            monitored(tmp_path, name, mode=0o757) as (program, _),
            HeldProcess(program) as runtime,
            pytest.raises(RequirementRefused, match="not root's alone"),
        ):
            verify_runtime(runtime, record)

    def test_a_program_without_a_path_is_not_kata_by_its_first_argument(self, record: BoundRecord) -> None:
        memory = os.memfd_create("sealed")
        os.write(memory, Path("/bin/sleep").read_bytes())
        words = ["/usr/bin/kata-runtime", "600"]
        with subprocess.Popen(words, executable=f"/proc/self/fd/{memory}", pass_fds=[memory]) as process:
            try:
                with HeldProcess(process.pid) as runtime:
                    wait_until(lambda: runtime.executable_name() != "")  # its arguments come last in execve
                    assert runtime.executable_name() == "kata-runtime"
                    assert runtime.executable_name(by_argument=False) == ""
                    with pytest.raises(RequirementRefused, match="a program whose file has no name"):
                        verify_runtime(runtime, record)
            finally:
                process.kill()
                os.close(memory)


class TestFolders:
    def test_what_nobody_holds_and_no_record_names_goes(self, tmp_path: Path) -> None:
        run = str(tmp_path / "run")
        held, used, left = (folder_of(run, name, "") for name in ("held", "used", "left"))
        fds = [lock_folder(folder, "c") for folder in (held, used, left)]
        for folder in (held, used, left):
            os.mkdir(place_of(folder, 0))
        with pytest.raises(HolderRefused, match="another process prepares"):
            lock_folder(held, "c")
        os.close(fds[1])
        os.close(fds[2])
        remove_abandoned(run, {used})
        assert set(folders(run)) == {held, used}
        os.close(fds[0])
        remove_abandoned(run, set())
        assert folders(run) == ()

    def test_root_alone_may_enter(self, tmp_path: Path) -> None:
        folder = folder_of(str(tmp_path / "run"), "c", "/b")
        os.close(lock_folder(folder, "c"))
        for path in (folder, os.path.dirname(folder)):
            assert os.stat(path).st_mode & 0o7777 == 0o700

    def test_a_sweep_between_making_and_locking_it(self, tmp_path: Path) -> None:
        """One process makes and locks a folder again and again, the other takes every one that it finds unlocked."""
        run = str(tmp_path / "run")
        folder = folder_of(run, "c", "/b")
        os.close(lock_folder(folder, "c"))
        sweeper = os.fork()
        if sweeper == 0:
            while True:
                remove_abandoned(run, set())
        try:
            for _ in range(300):
                fd = lock_folder(folder, "c")
                assert os.path.samestat(os.fstat(fd), os.stat(folder))
                os.close(fd)
        finally:
            os.kill(sweeper, signal.SIGKILL)
            os.waitpid(sweeper, 0)
