"""Delivery under real runtimes: what a container sees, and that nothing is left behind when it must not see it.

Each test runs runc and crun as bare runtimes with `delivery_hook.py` as prestart hook: the project's bundle and
delivery, with a key from a file in the TPM's place.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import (
    BundleMismatch,
    DecryptionRefused,
    DestinationInvalid,
    DestinationRefused,
    FileUnreadable,
    HolderGone,
    HolderRefused,
    MemoryRefused,
    SczError,
)
from tests.disks import open_disk
from tests.models import AROUND_SEGMENTS, MIB, PackedModel, noise
from tests.runtimes import RUNTIMES, USERNS_OFFSET, prestart, run_container, start_container
from tests.workshop import (
    HOOK,
    SMALL,
    SUMS,
    Workshop,
    delivered,
    hooks_alive,
    host_mounts,
    is_dead,
    open_workshop,
    refuse,
    resume,
    sums,
    wait_for_pause,
    wait_until,
)

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    yield from open_workshop(tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
class TestDelivered:
    def test_every_size_around_the_segments_arrives_exactly(self, workshop: Workshop, runtime: str) -> None:
        files = {f"size/{size}": noise(size) for size in AROUND_SEGMENTS}
        model = workshop.pack("sizes", files)
        outcome = run_container(runtime, workshop.bundle("c", {"/models": model}, SUMS))
        assert delivered(outcome) == sums(files)
        report = workshop.reported("c")
        assert report["runtime"] == runtime
        assert report["progress"] == [sum(AROUND_SEGMENTS)] * 2

    def test_many_small_files(self, workshop: Workshop, runtime: str) -> None:
        files = {f"d{number % 7}/e{number % 3}/{number}": noise(number) for number in range(1500)}
        model = workshop.pack("many", files)
        outcome = run_container(runtime, workshop.bundle("c", {"/models": model}, SUMS))
        assert delivered(outcome) == sums(files)

    @pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
    def test_flags_modes_and_contents(self, workshop: Workshop, runtime: str, kind: str) -> None:
        model = workshop.pack("small", SMALL)
        script = (
            "grep ' /models ' /proc/self/mountinfo; stat -c '%a %u %g %n' /models /models/*; cat /models/model.json;"
            " echo x 2>/dev/null > /models/new || echo; echo read-only"
        )
        bundle = workshop.bundle("c", {"/models": model}, ("sh", "-c", script), instructions={"file_system": kind})
        outcome = run_container(runtime, bundle)
        assert outcome.returncode == 0, outcome
        mount, *modes, document, end = outcome.stdout.split("\n")[:-1]
        flags, _, file_system = mount.partition(" - ")
        assert set(flags.split()[5].split(",")) >= {"ro", "nosuid", "nodev", "noexec", "nosymfollow"}
        assert file_system.split()[:2] == [kind, "scz-smm"]
        options = file_system.split()[2].split(",")
        assert options[0] == "ro"
        assert kind == "ramfs" or {"noswap", "huge=within_size"} <= set(options)
        names = ("config.json", "model.json", "weights")
        assert modes == ["555 0 0 /models", *(f"444 0 0 /models/{name}" for name in names)]
        assert json.loads(document)["model"] == {"name": "small", "version": "1", "generation": 1}
        assert end == "read-only"

    def test_ramfs_has_the_same_contents(self, workshop: Workshop, runtime: str) -> None:
        files = {"a/b": noise(5 * MIB + 3), "c": noise(100), "empty": b""}
        model = workshop.pack("m", files)
        bundle = workshop.bundle("c", {"/models": model}, SUMS, instructions={"file_system": "ramfs"})
        assert delivered(run_container(runtime, bundle)) == sums(files)

    def test_a_user_namespace_sees_its_root_as_owner(self, workshop: Workshop, runtime: str) -> None:
        files = {"deep/er/file": noise(2 * MIB + 1)}
        model = workshop.pack("m", files)
        script = "cd /deep/models && stat -c '%a %u %g' . deep deep/er deep/er/file .. && sha256sum deep/er/file"
        bundle = workshop.bundle("c", {"/deep/models": model}, ("sh", "-c", script), user_namespace=True)
        outcome = run_container(runtime, bundle)
        assert outcome.returncode == 0, outcome
        *modes, digest = outcome.stdout.splitlines()
        assert modes == ["555 0 0", "555 0 0", "555 0 0", "444 0 0", "755 0 0"]
        assert {digest} == sums(files)
        made = (bundle / "rootfs/deep").stat()
        assert (made.st_uid, made.st_gid) == (USERNS_OFFSET, USERNS_OFFSET)

    @pytest.mark.parametrize("where", ["/data", "/data/models", "/data/deep/er/models"])
    def test_a_declared_tmpfs_may_lie_below(self, workshop: Workshop, runtime: str, where: str) -> None:
        model = workshop.pack("m", SMALL)
        tmpfs = {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}
        args = ("sh", "-c", f"cd {where} && sha256sum weights config.json")
        outcome = run_container(runtime, workshop.bundle("c", {where: model}, args, mounts=[tmpfs]))
        assert delivered(outcome) == sums(SMALL)

    def test_several_models_in_one_container(self, workshop: Workshop, runtime: str) -> None:
        models = {f"/models/{name}": workshop.pack(name, {name: noise(MIB, seed)}) for seed, name in enumerate("abc")}
        args = ("sh", "-c", "cd /models; sha256sum */[abc]; umount a 2>/dev/null; ls")
        outcome = run_container(runtime, workshop.bundle("c", models, args))
        assert outcome.stdout.split("\n")[3:] == ["a", "b", "c", ""]
        expected = {f"{name}/{name}": models[f"/models/{name}"].files[name] for name in "abc"}
        assert set(outcome.stdout.splitlines()[:3]) == sums(expected)
        attached = workshop.reported("c")["attached"]
        assert [one[:2] for one in attached] == [["0", "/models/a"], ["1", "/models/b"], ["2", "/models/c"]]
        assert len({one[2] for one in attached}) == 3

    @pytest.mark.parametrize("stage", ["prestart", "createRuntime"])
    def test_a_read_only_root_with_a_directory_in_the_way(self, workshop: Workshop, runtime: str, stage: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, SUMS, readonly=True, stage=stage)
        (bundle / "rootfs/models").mkdir()
        (bundle / "rootfs/models/covered").write_text("by the model")
        assert delivered(run_container(runtime, bundle)) == sums(SMALL)
        assert (bundle / "rootfs/models/covered").read_text() == "by the model"
        assert os.listdir(bundle / "rootfs/models") == ["covered"]

    def test_the_file_system_is_filled_exactly(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", {f"size/{size}": noise(size) for size in AROUND_SEGMENTS} | {"d/e/f/g": b"1"})
        args = ("stat", "-f", "-c", "%f %d", "/models")
        assert run_container(runtime, workshop.bundle("c", {"/models": model}, args)).stdout == "0 0\n"

    def test_a_container_that_may_mount_cannot_write(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        script = "mount -o remount,rw,bind /models && echo mounted; echo x > /models/new; sha256sum /models/config.json"
        bundle = workshop.bundle(
            "c", {"/models": model}, ("sh", "-c", script), user_namespace=True, capabilities=["CAP_SYS_ADMIN"]
        )
        outcome = run_container(runtime, bundle)
        assert outcome.stdout.splitlines()[:-1] == ["mounted"], outcome
        assert "Read-only file system" in outcome.stderr
        assert outcome.stdout.splitlines()[-1].startswith(hashlib.sha256(b"{}").hexdigest())

    def test_two_containers_of_one_bundle_at_once(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, SUMS)
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda _: run_container(runtime, bundle), range(2)))
        assert [delivered(outcome) for outcome in outcomes] == [sums(SMALL)] * 2

    def test_exactly_at_a_memory_backed_volume_of_the_pod(self, workshop: Workshop, runtime: str) -> None:
        """Another container of the pod has the same volume; it sees what was there, not the model."""
        model = workshop.pack("m", SMALL)
        with memory_volume(workshop) as (memory, mount):
            (memory / "shared file").write_text("of the pod")
            instructions = {"memory_volumes": ["/models"]}
            args = ("sh", "-c", "cd /models && ls && sha256sum weights config.json; echo x 2>/dev/null > new; ls")
            bundle = workshop.bundle("c", {"/models": model}, args, mounts=[mount], instructions=instructions)
            listing, digests = ["config.json", "model.json", "weights"], sums(SMALL)
            printed = run_container(runtime, bundle).stdout.splitlines()
            assert printed[:3] == printed[5:] == listing
            assert set(printed[3:5]) == digests
            assert os.listdir(memory) == ["shared file"]

    def test_eight_at_once(self, workshop: Workshop, runtime: str) -> None:
        files = {"weights": noise(8 * MIB), "more": noise(MIB)}
        model = workshop.pack("m", files)
        bundles = [workshop.bundle(f"c{number}", {"/models": model}, SUMS) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda bundle: run_container(runtime, bundle), bundles))
        assert [delivered(outcome) for outcome in outcomes] == [sums(files)] * 8

    def test_a_container_with_a_limit_is_charged(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", {"weights": noise(24 * MIB)})
        args = ("sh", "-c", "sha256sum /models/weights; sleep 20")
        bundle = workshop.bundle("c", {"/models": model}, args, memory_limit_bytes=64 * MIB)
        with start_container(runtime, bundle) as process:
            assert process.stdout is not None
            assert (
                process.stdout.readline() == f"{hashlib.sha256(model.files['weights']).hexdigest()}  /models/weights\n"
            )
            charged = container_usage(workshop.reported("c")["pid"])
        assert 24 * MIB <= charged <= 40 * MIB


def insert_hook(bundle: Path, hook: dict[str, Any]) -> None:
    """Have a hook run before the project's."""
    config = json.loads((bundle / "config.json").read_text())
    config["hooks"]["prestart"].insert(0, hook)
    (bundle / "config.json").write_text(json.dumps(config))


@contextmanager
def memory_volume(workshop: Workshop, *options: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A tmpfs of the host's, and the mount at /models that an engine makes of it in a container."""
    memory = workshop.folder / "memory"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "test", memory], check=True)
    try:
        yield (
            memory,
            {"destination": "/models", "type": "bind", "source": str(memory), "options": ["rbind", "rw", *options]},
        )
    finally:
        subprocess.run(["umount", memory], check=True)


def container_usage(pid: int) -> int:
    """What the memory control group of a container's process is charged with, in bytes."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return int(Path(f"/sys/fs/cgroup/memory{path}/memory.usage_in_bytes").read_text())
        if not controllers and (usage := Path(f"/sys/fs/cgroup{path}/memory.current")).exists():
            return int(usage.read_text())
    raise AssertionError("no memory control group")


@pytest.mark.parametrize("runtime", RUNTIMES)
class TestRefused:
    @pytest.mark.parametrize(
        ("destination", "error"),
        [
            ("/", DestinationInvalid),
            ("models", DestinationInvalid),
            ("/models/", DestinationInvalid),
            ("/models/../tmp", DestinationInvalid),
            ("/proc/models", DestinationInvalid),
            ("/dev/shm", DestinationInvalid),
            ("/link", DestinationInvalid),
            ("/link/models", DestinationInvalid),
            ("/absolute/models", DestinationInvalid),
            ("/file", DestinationInvalid),
            ("/file/models", DestinationInvalid),
            ("/volume", DestinationRefused),
            ("/volume/models", DestinationRefused),
            ("/covered/models", DestinationRefused),
            ("/shared", DestinationRefused),
            ("/shared/models", DestinationRefused),
        ],
    )
    def test_destinations(self, workshop: Workshop, runtime: str, destination: str, error: type[SczError]) -> None:
        model = workshop.pack("m", SMALL)
        volume, memory = workshop.folder / "volume", Path("/dev/shm") / workshop.folder.name
        volume.mkdir()
        memory.mkdir()
        mounts = [
            {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["bind", "rw"]},
            {"destination": "/covered", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/covered", "type": "bind", "source": str(memory), "options": ["bind", "rw"]},
            {"destination": "/shared", "type": "tmpfs", "source": "tmpfs", "options": ["shared"]},
        ]
        bundle = workshop.bundle("c", {destination: model}, ("true",), mounts=mounts)
        rootfs = bundle / "rootfs"
        (rootfs / "elsewhere").mkdir()
        (rootfs / "link").symlink_to("elsewhere")
        (rootfs / "absolute").symlink_to("/elsewhere")
        (rootfs / "file").write_text("as it was")
        try:
            refuse(workshop, runtime, "c", bundle, error)
            assert [*os.listdir(volume), *os.listdir(memory), *os.listdir(rootfs / "elsewhere")] == []
            assert not (rootfs / "models").exists()
            assert (rootfs / "file").read_text() == "as it was"
        finally:
            memory.rmdir()

    @pytest.mark.parametrize("second", ["/models", "/models/below"])
    def test_destinations_that_overlap(self, workshop: Workshop, runtime: str, second: str) -> None:
        model = workshop.pack("m", SMALL)
        instructions = {
            "models": [
                {"slot": path, "destination": path, "bundle": str(model.bundle), "key": model.key.hex()}
                for path in ("/models", second)
            ]
        }
        bundle = workshop.bundle("c", {}, ("true",), instructions=instructions)
        refuse(workshop, runtime, "c", bundle, DestinationInvalid)
        assert not (bundle / "rootfs/models").exists()

    @pytest.mark.parametrize(
        ("volumes", "destination", "propagation"),
        [
            ([], "/models", "rprivate"),
            (["/models"], "/models/below", "rprivate"),
            (["/models"], "/models", "rshared"),
            (["/other"], "/models", "rprivate"),
        ],
        ids=["no engine vouches", "below it", "it propagates to the host", "another volume"],
    )
    def test_memory_backed_volumes(
        self, workshop: Workshop, runtime: str, volumes: list[str], destination: str, propagation: str
    ) -> None:
        model = workshop.pack("m", SMALL)
        with memory_volume(workshop, propagation) as (memory, mount):
            subprocess.run(["mount", "--make-shared", memory], check=True)
            instructions = {"memory_volumes": volumes}
            bundle = workshop.bundle("c", {destination: model}, ("true",), mounts=[mount], instructions=instructions)
            refuse(workshop, runtime, "c", bundle, DestinationRefused)
            assert os.listdir(memory) == []

    def test_a_root_that_was_exchanged_after_create_began(self, workshop: Workshop, runtime: str) -> None:
        """The container will run on the directory that was there then; another hook puts one in its place."""
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",))
        (bundle / "other").mkdir()
        swap = "mv rootfs was && mv other rootfs"
        insert_hook(bundle, prestart("/bin/sh", "-c", f"cat > /dev/null; cd {bundle} && {swap}"))
        refuse(workshop, runtime, "c", bundle, HolderRefused)
        assert os.listdir(bundle / "rootfs") == []
        assert not (bundle / "was/models").exists()

    def test_a_root_that_cannot_be_written(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",))
        rootfs = bundle / "rootfs"
        files = bundle / "files"
        rootfs.rename(files)
        rootfs.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "test", rootfs], check=True)
        try:
            subprocess.run(["cp", "-a", f"{files}/.", rootfs], check=True)
            subprocess.run(["mount", "-o", "remount,ro", rootfs], check=True)
            report = refuse(workshop, runtime, "c", bundle, DestinationInvalid)
        finally:
            subprocess.run(["umount", rootfs], check=True)
        assert "Read-only" in report["message"]

    @pytest.mark.parametrize("place", [0, 39, 40, 5 * MIB, -1])
    def test_one_flipped_bit(self, workshop: Workshop, runtime: str, place: int) -> None:
        model = workshop.pack("m", {"a": noise(9 * MIB), "b": noise(MIB)})
        layer = model.layer("a")
        data = bytearray(layer.read_bytes())
        data[place] ^= 1
        layer.write_bytes(data)
        refuse(workshop, runtime, "c", workshop.bundle("c", {"/models": model}, ("true",)), DecryptionRefused)

    def test_another_key(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        wrong = PackedModel(model.bundle, os.urandom(32), model.files)
        refuse(workshop, runtime, "c", workshop.bundle("c", {"/models": wrong}, ("true",)), DecryptionRefused)

    def test_one_of_two_models_is_changed(self, workshop: Workshop, runtime: str) -> None:
        good, bad = workshop.pack("good", SMALL), workshop.pack("bad", SMALL)
        layer = bad.layer("config.json")
        data = layer.read_bytes()
        layer.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        bundle = workshop.bundle("c", {"/good": good, "/bad": bad}, ("true",))
        refuse(workshop, runtime, "c", bundle, DecryptionRefused)

    def test_a_truncated_layer(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        layer = model.layer("weights")
        layer.write_bytes(layer.read_bytes()[:-1])
        refuse(workshop, runtime, "c", workshop.bundle("c", {"/models": model}, ("true",)), BundleMismatch)

    def test_a_disk_that_fails_half_way(self, workshop: Workshop, runtime: str, tmp_path: Path) -> None:
        packed = workshop.pack("m", {"a": noise(24 * MIB), "b": b"1"})
        with open_disk(tmp_path) as disk:
            model = disk.move(packed)
            bundle = workshop.bundle("c", {"/models": model}, ("true",))
            disk.fail(model.layer("a"), 6 * MIB)
            report = refuse(workshop, runtime, "c", bundle, FileUnreadable)
        assert "Input/output error" in report["message"]

    def test_a_limit_that_is_too_small(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", {"weights": noise(32 * MIB)})
        bundle = workshop.bundle("c", {"/models": model}, ("true",), memory_limit_bytes=32 * MIB)
        report = refuse(workshop, runtime, "c", bundle, MemoryRefused)
        assert "32 MiB" in report["message"]

    def test_the_nodes_reserve(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",), instructions={"reserve": 1 << 50})
        refuse(workshop, runtime, "c", bundle, MemoryRefused)

    def test_a_joined_mount_namespace(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        with ExitStack() as stack:
            other = stack.enter_context(
                subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo; exec cat"], **PIPES)  # type: ignore[call-overload]
            )
            other.stdout.readline()
            namespaces = [{"type": "pid"}, {"type": "mount", "path": f"/proc/{other.pid}/ns/mnt"}]
            bundle = workshop.bundle("c", {"/models": model}, ("true",), namespaces=namespaces)
            refuse(workshop, runtime, "c", bundle, HolderRefused)
            stack.callback(other.stdin.close)

    def test_the_containers_process_is_killed(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",), instructions={"pause": "filled"})
        with start_container(runtime, bundle) as process:
            hook = wait_for_pause(workshop, "c", "filled")
            state = json.loads(Path(f"{workshop.result('c')}.state").read_text())
            os.kill(state["pid"], signal.SIGKILL)
            wait_until(lambda: is_dead(state["pid"]))
            resume(workshop, "c")
            wait_until(lambda: not Path(f"/proc/{hook}").exists())
            assert process.wait(timeout=30) != 0
        assert workshop.reported("c")["error"] == HolderGone.__name__


class TestRootBehindLinks:
    """crun follows symbolic links in `root.path`, and so does the hook; runc refuses every one before any hook runs."""

    def linked(self, workshop: Workshop, target: Path) -> Path:
        """A bundle `c` whose `root.path` leads through two links to `target`/rootfs, where its files are moved."""
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, SUMS, root_path="first/rootfs")
        target.mkdir()
        (bundle / "rootfs").rename(target / "rootfs")
        (bundle / "second").symlink_to(target)
        (bundle / "first").symlink_to("second")
        return bundle

    @pytest.mark.parametrize("where", ["c/folder", "elsewhere"], ids=["in the bundle", "out of it"])
    def test_crun_follows_them(self, workshop: Workshop, where: str) -> None:
        target = workshop.folder / where
        assert delivered(run_container("crun", self.linked(workshop, target))) == sums(SMALL)
        assert (target / "rootfs/models").is_dir()

    def test_runc_does_not(self, workshop: Workshop) -> None:
        outcome = run_container("runc", self.linked(workshop, workshop.folder / "elsewhere"))
        assert outcome.returncode != 0
        assert not workshop.result("c").exists()

    @pytest.mark.parametrize("mounted", [False, True], ids=["a directory", "another container's root"])
    def test_a_link_that_leads_elsewhere_by_the_time_of_the_hook(self, workshop: Workshop, mounted: bool) -> None:
        bundle = self.linked(workshop, workshop.folder / "elsewhere")
        other = bundle / "other/rootfs"
        other.mkdir(parents=True)
        insert_hook(bundle, prestart("/bin/sh", "-c", f"cat > /dev/null; ln -sfn other {bundle}/first"))
        if mounted:
            subprocess.run(["mount", "--bind", other, other], check=True)
        try:
            refuse(workshop, "crun", "c", bundle, HolderRefused)
            assert os.listdir(other) == []
        finally:
            if mounted:
                subprocess.run(["umount", other], check=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
class TestKilled:
    @pytest.mark.parametrize("point", ["prepared", "filled", "attached"])
    def test_at_a_known_moment(self, workshop: Workshop, runtime: str, point: str) -> None:
        model = workshop.pack("m", SMALL)
        pause = {"pause": point}
        args = ("cat", "/models/config.json")
        bundle = workshop.bundle("c", {"/models": model}, args, instructions=pause, hook_seconds=8)
        with start_container(runtime, bundle) as process:
            os.kill(wait_for_pause(workshop, "c", point), signal.SIGKILL)
            stdout, _ = process.communicate(timeout=30)
            assert process.returncode != 0
            assert stdout == ""
        wait_until(lambda: hooks_alive(workshop.folder) == [])
        again = workshop.bundle("again", {"/models": model}, args)
        assert run_container(runtime, again).stdout == "{}"

    def test_at_random_moments(self, workshop: Workshop, runtime: str) -> None:
        model = workshop.pack("m", {"weights": noise(48 * MIB)})
        moments = random.Random(runtime)
        everything = f"{hashlib.sha256(model.files['weights']).hexdigest()}  /models/weights\n"
        for number in range(8):
            args = ("sha256sum", "/models/weights")
            bundle = workshop.bundle(f"c{number}", {"/models": model}, args, hook_seconds=8)
            with start_container(runtime, bundle) as process:
                hook = wait_for_pause(workshop, f"c{number}", "prepared")
                time.sleep(moments.uniform(0, 0.1))  # filling and attaching take about as long
                with suppress(ProcessLookupError):
                    os.kill(hook, signal.SIGKILL)
                stdout, _ = process.communicate(timeout=30)
                assert stdout == (everything if process.returncode == 0 else "")
            wait_until(lambda: hooks_alive(workshop.folder) == [])
        again = workshop.bundle("again", {"/models": model}, SUMS)
        assert delivered(run_container(runtime, again)) == sums(model.files)


class TestWithoutRuntime:
    """The hook started by hand: whoever can do that is root, but nothing may be attached anywhere by mistake."""

    @pytest.mark.parametrize("whose", ["our own", "a stranger's", "nobody's", "init's"])
    def test_a_process_that_is_no_container(self, workshop: Workshop, whose: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",))
        before = host_mounts(workshop.folder)
        with subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo; exec cat"], **PIPES) as stranger:
            stranger.stdout.readline()
            gone = subprocess.Popen(["/bin/true"])
            gone.wait()
            pid = {"our own": os.getpid(), "a stranger's": stranger.pid, "nobody's": gone.pid, "init's": 1}[whose]
            state = {"id": "c", "pid": pid, "bundle": str(bundle)}
            ended = subprocess.run(
                [sys.executable, "-I", HOOK, workshop.folder / "c.instructions"],
                input=json.dumps(state),
                text=True,
                capture_output=True,
                check=False,
                timeout=30,
            )
            stranger.stdin.close()
        expected = HolderGone if whose == "nobody's" else HolderRefused
        assert workshop.reported("c")["error"] == expected.__name__
        assert ended.returncode == expected.code
        assert host_mounts(workshop.folder) == before
        assert not (bundle / "rootfs/models").exists()
