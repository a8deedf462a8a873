"""What is remembered of models on the host's side, when it is stale, and what is removed. Needs root."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from oci_hook.delivery import host_mounts
from oci_hook.delivery.bound_record import seconds_since_boot
from oci_hook.delivery.holder import own_mount_namespace
from oci_hook.delivery.host_mounts import Removed
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostMount, HostRecord, HostRecords
from oci_hook.delivery.host_side import HostSide, verify_closed
from oci_hook.errors import FileUnreadable, HolderRefused, SystemCallFailed, Terminated
from oci_hook.linux import mounts
from oci_hook.linux.mounts import MemoryFilesystem
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords

GONE = (2**22 + 1, 7)


def myself() -> tuple[int, int]:
    """This process, as a record names it."""
    started = process_start_time(os.getpid())
    assert started is not None
    return os.getpid(), started


@pytest.fixture
def record(tmp_path: Path) -> HostRecord:
    """Of a container that lives; nothing of it is mounted."""
    bundle, state = tmp_path / "bundle", tmp_path / "state"
    (bundle / "rootfs/models").mkdir(parents=True)
    state.mkdir()
    made = HostRecord(
        container_id="c",
        bundle=str(bundle),
        namespace=own_mount_namespace(),
        runtime_root=str(state),
        sandbox_id="pod",
        runtime_executable="/usr/bin/runsc",
        sandbox=myself(),
        creator=GONE,
        mounts=(HostMount(str(bundle / "rootfs/models"), (1 << 64) - 1, "0:1"),),
    )
    Path(made.state_file).touch()
    return made


@pytest.fixture
def records(tmp_path: Path) -> HostRecords:
    return HostRecords(str(tmp_path / "run"))


class TestStale:
    def test_one_that_lives(self, record: HostRecord) -> None:
        assert os.path.basename(record.state_file) == "c_sandbox:pod.state"
        assert not record.is_stale()

    def test_the_sandbox_is_gone(self, record: HostRecord) -> None:
        assert dataclasses.replace(record, sandbox=GONE).is_stale()
        assert dataclasses.replace(record, sandbox=(record.sandbox[0], record.sandbox[1] + 1)).is_stale()

    def test_the_bundle_is_gone(self, record: HostRecord) -> None:
        assert dataclasses.replace(record, bundle="/nonexistent").is_stale()

    def test_the_runtime_has_no_state_of_it(self, record: HostRecord) -> None:
        os.unlink(record.state_file)
        assert record.is_stale()
        # While the `create` runs that made it, the state may not be there any more, or not yet.
        assert not dataclasses.replace(record, creator=myself()).is_stale()


class TestRecords:
    def test_written_and_read_again(self, records: HostRecords, record: HostRecord) -> None:
        assert not records.exist()
        assert records.load("c", record.bundle) is None
        records.write(record)
        assert records.exist()
        assert records.load("c", record.bundle) == record
        assert records.load("c", "/another") is None
        assert records.all() == ((record,), ())
        (file,) = Path(records.runtime_directory, "host-mounts").iterdir()
        assert file.stat().st_mode & 0o7777 == 0o600
        records.remove(record)
        records.remove(record)
        assert not records.exist()

    @pytest.mark.parametrize(
        "change",
        [
            {"sandbox": [1]},
            {"sandbox": [1, -1]},
            {"creator": ["1", 2]},
            {"mounts": []},
            {"mounts": [{"path": "/a", "fsid": -1, "device": "0:1"}]},
            {"mounts": [{"path": "/a", "fsid": 1, "device": "0"}]},
            {"bundle": ""},
            {"more": 1},
        ],
    )
    def test_what_is_no_record(self, records: HostRecords, record: HostRecord, change: dict[str, object]) -> None:
        records.write(record)
        (file,) = Path(records.runtime_directory, "host-mounts").iterdir()
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(FileUnreadable):
            records.load("c", record.bundle)
        found, unreadable = records.all()
        assert found == ()
        assert len(unreadable) == 1

    def test_one_that_anybody_could_have_written(self, records: HostRecords, record: HostRecord) -> None:
        records.write(record)
        (file,) = Path(records.runtime_directory, "host-mounts").iterdir()
        file.chmod(0o666)
        assert records.all()[0] == ()

    def test_half_of_one(self, records: HostRecords, record: HostRecord) -> None:
        records.write(record)
        half = Path(records.runtime_directory, "host-mounts/.new.json.0123456789ab")
        half.write_text("{")
        assert records.all() == ((record,), ())
        assert half.exists()  # whoever only looks, as a dry run does, removes nothing
        with records.locked(timeout_seconds=1):
            records.remove_half_written()
        assert not half.exists()

    def test_the_lock_is_held_by_whoever_has_the_descriptor(self, records: HostRecords) -> None:
        with records.locked(timeout_seconds=1), pytest.raises(SystemCallFailed), records.locked(timeout_seconds=0.01):
            raise AssertionError("this block is not reached")
        with records.locked(timeout_seconds=1):
            pass


@pytest.fixture
def bound(tmp_path: Path) -> BoundRecord:
    """Of a container that is not adopted yet."""
    (tmp_path / "bundle").mkdir(exist_ok=True)
    return BoundRecord(
        container_id="c",
        bundle=str(tmp_path / "bundle"),
        namespace=own_mount_namespace(),
        runtime="kata",
        creator=myself(),
        container=NOBODY,
        mounts=(HostMount("/run/scz-smm/bound/x/0", 7, "0:1", "/models/x"),),
    )


class TestBeforeCreate:
    def test_it_lives_with_its_creator_then_with_its_container(self, bound: BoundRecord) -> None:
        assert not bound.is_stale()
        assert dataclasses.replace(bound, creator=GONE).is_stale()
        assert not dataclasses.replace(bound, creator=GONE, container=myself()).is_stale()
        assert dataclasses.replace(bound, container=GONE).is_stale()
        assert dataclasses.replace(bound, bundle="/nonexistent").is_stale()
        assert not dataclasses.replace(bound, bundle="").is_stale()

    def test_nobody_waits_for_it_for_ever(self, bound: BoundRecord, monkeypatch: pytest.MonkeyPatch) -> None:
        now = seconds_since_boot()
        assert not dataclasses.replace(bound, adopt_by=now + 60).is_stale()
        assert dataclasses.replace(bound, adopt_by=now - 1).is_stale()
        assert not dataclasses.replace(bound, adopt_by=now - 1, container=myself()).is_stale()
        monkeypatch.setattr(time, "time", lambda: 1e12)  # the clock that people set is no matter
        assert not dataclasses.replace(bound, adopt_by=now + 60).is_stale()

    def test_without_the_engines_folder_it_will_not_come(self, bound: BoundRecord) -> None:
        assert not dataclasses.replace(bound, folder=bound.bundle).is_stale()
        assert dataclasses.replace(bound, folder="/nonexistent").is_stale()
        assert not dataclasses.replace(bound, folder="/nonexistent", container=myself()).is_stale()

    def test_whose_it_is(self, bound: BoundRecord) -> None:
        assert not bound.is_held_by_another(GONE)
        assert dataclasses.replace(bound, container=myself()).is_held_by_another(GONE)
        assert not dataclasses.replace(bound, container=myself()).is_held_by_another(myself())
        assert not dataclasses.replace(bound, container=GONE).is_held_by_another(myself())

    def test_both_kinds_are_written_and_read_again(
        self, records: HostRecords, record: HostRecord, bound: BoundRecord
    ) -> None:
        records.write(record)
        (file,) = Path(records.runtime_directory, "host-mounts").iterdir()
        # The form of the version before is that of a pod's record still.
        assert json.loads(file.read_text()).keys() == {field.name for field in dataclasses.fields(HostRecord)}
        assert json.loads(file.read_text())["mounts"][0].keys() == {"path", "fsid", "device"}
        unknown = dataclasses.replace(bound, container_id="d", bundle="", folder="/f", adopt_by=7)
        records.write(unknown)
        assert set(records.all()[0]) == {record, unknown}
        assert records.bound() == (unknown,)

    def test_it_is_found_before_its_bundle_is_known(self, records: HostRecords, bound: BoundRecord) -> None:
        unknown = dataclasses.replace(bound, bundle="")
        records.write(unknown)
        assert records.find("c", bound.bundle) == records.find("c", "") == unknown
        assert records.find("d", bound.bundle) is records.find("d", "") is None
        records.write(bound)
        assert records.find("c", bound.bundle) == bound
        records.remove(unknown)
        link = Path(bound.bundle).with_name("link")
        link.symlink_to(bound.bundle)
        assert records.find("c", str(link)) == records.find("c", "") == bound
        records.write(dataclasses.replace(bound, bundle="/another"))
        with pytest.raises(HolderRefused, match="not known which"):
            records.find("c", "")

    def test_another_containers_of_that_id_that_lives_is_not_found(
        self, records: HostRecords, bound: BoundRecord
    ) -> None:
        unknown = dataclasses.replace(bound, bundle="", container=myself())
        records.write(unknown)
        assert records.find("c", bound.bundle) is None
        assert records.find("c", "") == unknown
        assert records.may_concern("c", bound.bundle)
        records.write(dataclasses.replace(unknown, container=GONE))
        assert records.find("c", bound.bundle) is not None

    def test_what_may_concern_a_container(self, records: HostRecords, record: HostRecord, bound: BoundRecord) -> None:
        assert not records.may_concern("c", bound.bundle)
        records.write(record)
        assert not records.may_concern("c", record.bundle)  # a pod's
        records.write(bound)
        link = Path(bound.bundle).with_name("link")
        link.symlink_to(bound.bundle)
        assert records.may_concern("c", str(link))
        assert not records.may_concern("c", "/another")
        assert not records.may_concern("d", bound.bundle)

    def test_a_pods_record_is_found_by_its_own_bundle_alone(self, records: HostRecords, record: HostRecord) -> None:
        records.write(record)
        link = Path(record.bundle).with_name("link")
        link.symlink_to(record.bundle)
        assert records.find("c", record.bundle) == record
        assert records.find("c", str(link)) is records.find("c", "") is None

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "after"},
            {"kind": 1},
            {"container": [1]},
            {"bundle": 1},
            {"runtime": ""},
            {"mounts": [{"path": "/a", "fsid": 1, "device": "0:1"}]},
            {"mounts": []},
            {"sandbox": [0, 0]},
        ],
    )
    def test_what_is_no_record(self, records: HostRecords, bound: BoundRecord, change: dict[str, object]) -> None:
        records.write(bound)
        (file,) = Path(records.runtime_directory, "host-mounts").iterdir()
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(FileUnreadable):
            records.load("c", bound.bundle)
        assert records.bound() == ()


@pytest.fixture(params=list(MemoryFilesystem))
def mounted(request: pytest.FixtureRequest, record: HostRecord) -> Iterator[HostRecord]:
    """The record of a container whose model is mounted, with a file `model` in it."""
    path = record.mounts[0].path
    with mounts.create_memory_filesystem(4096, 9, request.param) as made:
        file = os.open("model", os.O_WRONLY | os.O_CREAT, 0o444, dir_fd=made.fd)
        os.write(file, b"secret")
        os.close(file)
        mounts.seal_superblock(made.fd)
        mounts.set_mount_flags(made.fd)
        destination = os.open(path, os.O_PATH)
        mounts.attach(made.fd, destination)
        os.close(destination)
        seen = os.fstat(made.fd)
        device = f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}"
        model = HostMount(path, os.fstatvfs(made.fd).f_fsid, device)
    try:
        yield dataclasses.replace(record, mounts=(model,))
    finally:
        while os.path.ismount(path):
            subprocess.run(["umount", path], check=True)


class TestRemoval:
    def test_nothing_is_known(self, records: HostRecords) -> None:
        assert host_mounts.sweep(records.runtime_directory) == []
        assert host_mounts.close(records.runtime_directory, "c", "/bundle") is None
        assert not Path(records.runtime_directory).exists()

    def test_one_that_lives_stays(self, records: HostRecords, mounted: HostRecord) -> None:
        records.write(mounted)
        assert host_mounts.sweep(records.runtime_directory) == []
        assert host_mounts.close(records.runtime_directory, "c", "/another") is None
        assert host_mounts.close(records.runtime_directory, "d", mounted.bundle) is None
        assert os.path.ismount(mounted.mounts[0].path)

    @pytest.mark.parametrize("way", ["close", "sweep"])
    def test_emptied_and_unmounted(self, records: HostRecords, mounted: HostRecord, way: str) -> None:
        path = mounted.mounts[0].path
        records.write(mounted if way == "close" else dataclasses.replace(mounted, sandbox=GONE))
        with open(f"{path}/model", "rb") as kept:
            if way == "close":
                removed = host_mounts.close(records.runtime_directory, "c", mounted.bundle)
            else:
                (removed,) = host_mounts.sweep(records.runtime_directory)
            assert kept.read() == b""
        assert removed == Removed("c", mounted.bundle, (path,), ())
        assert not os.path.ismount(path)
        assert not records.exist()

    def test_another_record_of_the_same_file_system_keeps_its_contents(
        self, records: HostRecords, mounted: HostRecord
    ) -> None:
        records.write(mounted)
        records.write(dataclasses.replace(mounted, container_id="d"))
        with open(f"{mounted.mounts[0].path}/model", "rb") as kept:
            assert host_mounts.close(records.runtime_directory, "c", mounted.bundle) is not None
            assert kept.read() == b"secret"

    def test_a_stale_record_whose_numbers_another_container_has_by_now(
        self, records: HostRecords, mounted: HostRecord
    ) -> None:
        (model,) = mounted.mounts
        elsewhere = dataclasses.replace(model, path="/another/rootfs/models")
        records.write(dataclasses.replace(mounted, container_id="old", sandbox=GONE, mounts=(elsewhere,)))
        records.write(mounted)
        assert host_mounts.sweep(records.runtime_directory) == [Removed("old", mounted.bundle, (), ())]
        with open(f"{model.path}/model", "rb") as kept:
            assert kept.read() == b"secret"
        assert records.all() == ((mounted,), ())

    def test_another_namespace(self, records: HostRecords, mounted: HostRecord) -> None:
        with subprocess.Popen(["unshare", "--mount", "cat"], stdin=subprocess.PIPE) as other:
            namespace = own_mount_namespace()
            while namespace == own_mount_namespace():
                seen = os.stat(f"/proc/{other.pid}/ns/mnt")
                namespace = (seen.st_dev, seen.st_ino)
            records.write(dataclasses.replace(mounted, sandbox=GONE, namespace=namespace))
            (removed,) = host_mounts.sweep(records.runtime_directory)
            assert removed.left == (f"{mounted.mounts[0].path}: in another mount namespace than this process's",)
            assert os.path.ismount(mounted.mounts[0].path)
            assert records.exist()
            other.kill()
            other.wait()
        (removed,) = host_mounts.sweep(records.runtime_directory)  # its mounts went with it
        assert removed == Removed("c", mounted.bundle, (), ())
        assert not records.exist()

    def test_a_record_that_cannot_be_read_is_said(self, records: HostRecords, mounted: HostRecord) -> None:
        records.write(dataclasses.replace(mounted, sandbox=GONE))
        bad = Path(records.runtime_directory, "host-mounts/bad.json")
        bad.write_text("{")
        bad.chmod(0o600)
        removed = host_mounts.sweep(records.runtime_directory)
        assert removed[0].paths == (mounted.mounts[0].path,)
        assert removed[1] == Removed("", "", (), (f"{bad} is not JSON in UTF-8",))


def test_a_hook_that_fails_after_the_models_are_visible(records: HostRecords, mounted: HostRecord) -> None:
    """The sandbox lives on, so its process must not vouch for models that are gone: a second try would get none."""
    pid, started = myself()
    lists = dict.fromkeys(("references", "models", "manifests"), ("m",))
    delivered = ContainerRecord(
        "c", mounted.bundle, pid, started, 1, **lists, destinations=("/m",), subject="s", size_bytes=6, delivered=True
    )
    ContainerRecords(records.runtime_directory).write(delivered)
    records.write(mounted)
    holder = HostSide.__new__(HostSide)
    holder._records, holder._record, holder._descriptors = records, mounted, ExitStack()
    holder.__exit__(Terminated, Terminated("now"), None)
    assert not os.path.ismount(mounted.mounts[0].path)
    assert ContainerRecords(records.runtime_directory).delivered("c", mounted.bundle, pid, started) is None


class TestClosed:
    def test_a_directory_of_roots_above(self, tmp_path: Path) -> None:
        root = tmp_path / "a/b/rootfs"
        root.mkdir(parents=True)
        for mode in (0o700, 0o710, 0o750, 0o766):
            (tmp_path / "a").chmod(mode)
            verify_closed(str(root))

    @pytest.mark.parametrize(("mode", "uid", "gid"), [(0o711, 0, 0), (0o701, 0, 0), (0o700, 7, 0), (0o710, 0, 7)])
    def test_one_that_others_can_enter(self, mode: int, uid: int, gid: int) -> None:
        # Below a directory that everybody may enter, all the way: not where pytest keeps its folders.
        folder = Path(subprocess.check_output(["mktemp", "-d", "-p", "/var/tmp"], text=True).strip())
        try:
            (folder / "rootfs").mkdir(mode=0o700)
            folder.chmod(mode)
            os.chown(folder, uid, gid)
            folder.chmod(mode)
            above = [parent for parent in folder.parents if not parent.stat().st_mode & 0o001]
            if above:  # a root directory of mode 0700 closes everything
                verify_closed(str(folder / "rootfs"))
            else:
                with pytest.raises(HolderRefused, match="could walk to"):
                    verify_closed(str(folder / "rootfs"))
        finally:
            os.rmdir(folder / "rootfs")
            os.rmdir(folder)

    def test_a_path_that_is_not_there_or_not_utf_8(self) -> None:
        # A root directory of mode 0700 closes everything below it, also what is not there.
        missing = ["/nonexistent/a/rootfs"] if os.stat("/").st_mode & 0o001 else []
        for path in (*missing, "/\udc80/rootfs"):
            with pytest.raises(HolderRefused):
                verify_closed(path)
