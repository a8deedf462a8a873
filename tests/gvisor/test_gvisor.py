"""Delivery under real gVisor: the root container through its gofer, containers of a pod on the host's side.

Every test runs the machine's own runsc and Debian trixie's, as bare runtimes, with `delivery_hook.py` as prestart hook.
Its `in_sandbox` stands for what an engine vouches for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from oci_hook.delivery import host_mounts
from oci_hook.errors import DestinationRefused, EngineUnsupported, HolderGone, HolderRefused
from oci_hook.linux.processes import process_start_time
from tests.integration.conftest import FILES as SOURCE_FILES
from tests.integration.conftest import contents
from tests.models import MIB, noise
from tests.runtimes import USERNS_OFFSET, Pod, Runsc, newer_runsc, own_runsc, prestart, run_container, start_container
from tests.scene import Scene
from tests.workshop import (
    SMALL,
    SUMS,
    Workshop,
    delivered,
    hooks_alive,
    open_workshop,
    refuse,
    resume,
    sums,
    wait_for_pause,
    wait_until,
)
from tests.workshop import host_mounts as mounts_on_host

BUILDS = {"own": own_runsc, "newer": newer_runsc}
VARIANTS = (
    *((build, flags) for build in BUILDS for flags in ((), ("--overlay2=none",), ("--overlay2=all:memory",))),
    *((build, ("--file-access=shared", "--overlay2=none")) for build in BUILDS),
    ("newer", ("--directfs=false",)),
    ("newer", ("--directfs=false", "--overlay2=none")),
)
"""Ways to serve files: by the gofer or, since 2023, opened by the sandbox itself; with or without writes of its own."""


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    yield from open_workshop(tmp_path)


@pytest.fixture(params=BUILDS)
def runsc(request: pytest.FixtureRequest) -> Runsc:
    """Each build."""
    return BUILDS[request.param]()


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *variant[1]]))
def variant(request: pytest.FixtureRequest) -> Runsc:
    """Each build with each way to serve files."""
    build, flags = request.param
    return BUILDS[build]().with_flags(*flags)


FILES = {"weights": noise(3 * MIB + 5), "deep/er/config.json": b"{}", "empty": b""}
READ = ("sh", "-c", "cd /models && find . -type f -exec sha256sum {} + && id -u")


def read_by(output: str, uid: int = 0) -> set[str]:
    """What READ printed, without our own model.json."""
    *lines, last = output.splitlines()
    assert last == str(uid)
    return {line.replace("  ./", "  ") for line in lines if not line.endswith("/model.json")}


class TestRootContainer:
    @pytest.mark.parametrize("readonly", [False, True], ids=["writable", "read-only"])
    def test_every_way_to_serve_files(self, workshop: Workshop, variant: Runsc, readonly: bool) -> None:
        model = workshop.pack("m", FILES)
        bundle = workshop.bundle("c", {"/deep/models": model}, ("sh", "-c", SUMS[2].replace("/", "/deep/", 1)))
        config = json.loads((bundle / "config.json").read_text())
        config["root"]["readonly"] = readonly
        (bundle / "config.json").write_text(json.dumps(config))
        assert delivered(run_container(variant, bundle)) == sums(FILES)
        report = workshop.reported("c")
        assert report["runtime"] == "runsc"
        assert [one[1] for one in report["attached"]] == ["/deep/models"]
        assert not (workshop.runtime_directory / "host-mounts").exists()
        assert os.listdir(bundle / "rootfs/deep/models") == []

    def test_another_user_reads_it(self, workshop: Workshop, variant: Runsc) -> None:
        model = workshop.pack("m", FILES)
        outcome = run_container(variant, workshop.bundle("c", {"/models": model}, READ, uid=1000))
        assert outcome.returncode == 0, outcome
        assert read_by(outcome.stdout, 1000) == sums(FILES)

    def test_what_the_container_writes_stays_in_its_sandbox(self, workshop: Workshop, runsc: Runsc) -> None:
        model = workshop.pack("m", FILES)
        script = (
            "echo changed 2>/dev/null >/models/deep/er/config.json; echo new 2>/dev/null >/models/new; "
            "sha256sum /models/weights; sleep 60"
        )
        bundle = workshop.bundle("c", {"/models": model}, ("sh", "-c", script), instructions={"pause": "attached"})
        with start_container(runsc, bundle) as process:
            wait_for_pause(workshop, "c", "attached")
            gofers = [pid for pid in children_of(process.pid) if argv(pid)[0] == "runsc-gofer"]
            resume(workshop, "c")
            assert process.stdout is not None
            assert process.stdout.readline().split()[0] in {line.split()[0] for line in sums(FILES)}
            served = Path(f"/proc/{gofers[0]}/root/models")
            assert (served / "deep/er/config.json").read_bytes() == b"{}"
            assert sorted(os.listdir(served)) == ["deep", "empty", "model.json", "weights"]
        wait_until(lambda: not served.exists())

    def test_owner_modes_and_a_user_namespace(self, workshop: Workshop, runsc: Runsc) -> None:
        model = workshop.pack("m", SMALL)
        script = "cd /models && stat -c '%a %u %g %n' . * && sha256sum weights config.json"
        bundle = workshop.bundle("c", {"/models": model}, ("sh", "-c", script), user_namespace=True)
        outcome = run_container(runsc, bundle)
        assert outcome.returncode == 0, outcome
        lines = outcome.stdout.splitlines()
        assert set(lines[-2:]) == sums(SMALL)
        names = ("config.json", "model.json", "weights")
        assert lines[:-2] == ["555 0 0 .", *(f"444 0 0 {name}" for name in names)]
        made = (bundle / "rootfs/models").stat()
        assert (made.st_uid, made.st_gid) == (USERNS_OFFSET, USERNS_OFFSET)

    def test_several_models_at_createruntime(self, workshop: Workshop, runsc: Runsc) -> None:
        models = {f"/models/{name}": workshop.pack(name, {name: noise(MIB, seed)}) for seed, name in enumerate("abc")}
        args = ("sh", "-c", "cd /models; sha256sum */[abc]")
        outcome = run_container(runsc, workshop.bundle("c", models, args, stage="createRuntime"))
        expected = {f"{name}/{name}": models[f"/models/{name}"].files[name] for name in "abc"}
        assert set(outcome.stdout.splitlines()) == sums(expected), outcome

    def test_below_a_directory_that_the_sandbox_would_cover_if_it_were_empty(
        self, workshop: Workshop, runsc: Runsc
    ) -> None:
        model = workshop.pack("m", SMALL)
        args = ("sh", "-c", "cd /tmp/models && sha256sum weights config.json")
        assert delivered(run_container(runsc, workshop.bundle("c", {"/tmp/models": model}, args))) == sums(SMALL)

    def test_two_containers_of_one_bundle_at_once(self, workshop: Workshop, runsc: Runsc) -> None:
        model = workshop.pack("m", FILES)
        bundle = workshop.bundle("c", {"/models": model}, SUMS)
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda _: run_container(runsc, bundle), range(2)))
        assert [delivered(outcome) for outcome in outcomes] == [sums(FILES)] * 2

    @pytest.mark.parametrize("where", ["in the bundle", "out of it"])
    def test_a_root_behind_links(self, workshop: Workshop, runsc: Runsc, where: str) -> None:
        model = workshop.pack("m", FILES)
        bundle = workshop.bundle("c", {"/models": model}, SUMS, root_path="first")
        target = bundle / "rootfs"
        if where == "out of it":
            target = workshop.folder / "elsewhere"
            (bundle / "rootfs").rename(target)
        (bundle / "second").symlink_to(target)
        (bundle / "first").symlink_to("second")
        assert delivered(run_container(runsc, bundle)) == sums(FILES)
        assert (target / "models").is_dir()

    @pytest.mark.parametrize("annotated", [{}, {"io.kubernetes.cri.sandbox-id": "c"}])
    def test_forged_annotations_of_a_pod(self, workshop: Workshop, runsc: Runsc, annotated: dict[str, str]) -> None:
        """runsc believes them, and has no such sandbox; the engine vouches for nothing."""
        model = workshop.pack("m", SMALL)
        annotations = {"io.kubernetes.cri.container-type": "container"} | annotated
        bundle = workshop.bundle("c", {"/models": model}, SUMS, annotations=annotations)
        outcome = run_container(runsc, bundle)
        assert outcome.returncode != 0
        assert outcome.stdout == ""
        assert not workshop.result("c").exists()

    def test_an_engine_that_takes_a_root_container_for_a_pods(self, workshop: Workshop, runsc: Runsc) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, SUMS, instructions={"in_sandbox": True})
        assert delivered(run_container(runsc, bundle)) == sums(SMALL)
        assert not (workshop.runtime_directory / "host-mounts").exists()


def children_of(pid: int) -> list[int]:
    """The pids of a process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def argv(pid: int) -> list[str]:
    """A process's command line; empty words for one that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return [""]


class TestRefused:
    @pytest.mark.parametrize(
        "destination",
        ["/volume", "/volume/models", "/memory", "/memory/models", "/linked", "/linked/models", "/late/models"],
    )
    def test_what_the_sandbox_would_cover(self, workshop: Workshop, runsc: Runsc, destination: str) -> None:
        model = workshop.pack("m", SMALL)
        volume = workshop.folder / "volume"
        volume.mkdir()
        mounts = [
            {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["bind", "rw"]},
            {"destination": "/memory", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/link", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/root/late", "type": "tmpfs", "source": "tmpfs"},
        ]
        bundle = workshop.bundle("c", {destination: model}, ("true",), mounts=mounts)
        (bundle / "rootfs/linked").mkdir()
        (bundle / "rootfs/link").symlink_to("linked")
        (bundle / "rootfs/root").symlink_to("/")
        report = refuse(workshop, runsc, "c", bundle, DestinationRefused)
        assert "at or below the mount" in report["message"]
        assert os.listdir(volume) == []

    @pytest.mark.parametrize("where", ["the default", "a folder"])
    def test_writes_that_would_go_to_the_disk(self, workshop: Workshop, runsc: Runsc, where: str) -> None:
        model = workshop.pack("m", SMALL)
        folder = workshop.folder / "writes"
        folder.mkdir()
        medium = (
            f"root:{folder}" if runsc.year < 2023 else "root:self" if where == "the default" else f"root:dir={folder}"
        )
        bundle = workshop.bundle("c", {"/models": model}, ("true",))
        refuse(workshop, runsc.with_flags(f"--overlay2={medium}"), "c", bundle, EngineUnsupported)
        assert not (bundle / "rootfs/models").exists()

    @pytest.mark.parametrize("readonly", [False, True], ids=["writable", "read-only"])
    def test_writes_of_a_pod_that_would_go_to_the_disk(
        self, workshop: Workshop, runsc: Runsc, *, readonly: bool
    ) -> None:
        folder = workshop.folder / "writes"
        folder.mkdir()
        medium = f"root:{folder}" if runsc.year < 2023 else "root:self"
        with Pod(runsc.with_flags(f"--overlay2={medium}"), closed(workshop), readonly=readonly) as pod:
            assert pod.create(joining(workshop, pod, "c"), "c", check=False) != 0
        assert workshop.reported("closed/c")["error"] == EngineUnsupported.__name__
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    def test_writes_to_the_disk_by_an_annotation_of_a_pods_container(self, workshop: Workshop) -> None:
        said = {"source": str(workshop.folder), "type": "bind", "overlay": "self"}
        with Pod(newer_runsc(), closed(workshop), readonly=True) as pod:
            hints = {f"dev.gvisor.spec.rootfs.{key}": value for key, value in said.items()}
            bundle = joining(workshop, pod, "c", annotations=pod.annotations | hints)
            assert pod.create(bundle, "c", check=False) != 0
        assert workshop.reported("closed/c")["error"] == EngineUnsupported.__name__
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    def test_a_memory_backed_volume(self, workshop: Workshop, runsc: Runsc) -> None:
        model = workshop.pack("m", SMALL)
        memory = workshop.folder / "memory"
        memory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "test", memory], check=True)
        try:
            volume = {"destination": "/models", "type": "bind", "source": str(memory), "options": ["rbind", "rw"]}
            instructions = {"memory_volumes": ["/models"]}
            bundle = workshop.bundle("c", {"/models": model}, ("true",), mounts=[volume], instructions=instructions)
            refuse(workshop, runsc, "c", bundle, DestinationRefused)
            assert os.listdir(memory) == []
        finally:
            subprocess.run(["umount", memory], check=True)

    def test_a_root_that_was_exchanged_after_create_began(self, workshop: Workshop, runsc: Runsc) -> None:
        """The gofer has the directory that `root.path` led to then; another hook changes where it leads."""
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("true",), root_path="link")
        (bundle / "link").symlink_to("rootfs")
        (bundle / "other").mkdir()
        config = json.loads((bundle / "config.json").read_text())
        change = prestart("/bin/ln", "-sfn", "other", bundle / "link")
        config["hooks"]["prestart"].insert(0, change)
        (bundle / "config.json").write_text(json.dumps(config))
        report = refuse(workshop, runsc, "c", bundle, HolderRefused)
        assert "gofer's root is not" in report["message"]
        assert os.listdir(bundle / "other") == []

    @pytest.mark.parametrize("victim", ["runsc-gofer", "runsc-sandbox"])
    @pytest.mark.parametrize("point", ["prepared", "filled"])
    def test_a_process_of_the_sandbox_dies_half_way(
        self, workshop: Workshop, runsc: Runsc, victim: str, point: str
    ) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("echo", "ran"), instructions={"pause": point})
        with start_container(runsc, bundle) as process:
            wait_for_pause(workshop, "c", point)
            (dying,) = [pid for pid in children_of(process.pid) if argv(pid)[0] == victim]
            os.kill(dying, signal.SIGKILL)
            wait_until(lambda: argv(dying) == [""])
            resume(workshop, "c")
            stdout, _ = process.communicate(timeout=60)
            assert process.returncode != 0
            assert stdout == ""
        assert workshop.reported("c")["error"] == HolderGone.__name__

    @pytest.mark.parametrize("point", ["prepared", "filled", "attached"])
    def test_the_hook_is_killed(self, workshop: Workshop, runsc: Runsc, point: str) -> None:
        model = workshop.pack("m", SMALL)
        bundle = workshop.bundle("c", {"/models": model}, ("echo", "ran"), instructions={"pause": point})
        with start_container(runsc, bundle) as process:
            os.kill(wait_for_pause(workshop, "c", point), signal.SIGKILL)
            stdout, _ = process.communicate(timeout=60)
            assert process.returncode != 0
            assert stdout == ""

    def test_a_joining_container_for_which_no_engine_vouches(self, workshop: Workshop, runsc: Runsc) -> None:
        with Pod(runsc, closed(workshop)) as pod:
            bundle = joining(workshop, pod, "c", in_sandbox=False)
            assert pod.create(bundle, "c", check=False) != 0
            assert workshop.reported("closed/c")["error"] == HolderRefused.__name__
            assert mounts_on_host(workshop.folder) == []
            assert os.listdir(pod_gofer_root(pod)) == os.listdir(workshop.folder / "closed/sandbox/rootfs")


def closed(workshop: Workshop) -> Path:
    """A folder that other users cannot enter, as an engine keeps its containers in."""
    folder = workshop.folder / "closed"
    folder.mkdir(mode=0o700)
    return folder


def joining(workshop: Workshop, pod: Pod, name: str, *, in_sandbox: bool = True, **options: Any) -> Path:
    """The bundle of a container that joins a pod and has a model of FILES at /models; poststop removes it."""
    poststop = options.pop("poststop", True)
    instructions = {"in_sandbox": in_sandbox} | options.pop("instructions", {})
    model = workshop.pack(f"model-{name}", FILES)
    options = {"annotations": pod.annotations} | options
    args = options.pop("args", READ)
    bundle = workshop.bundle(f"closed/{name}", {"/models": model}, args, instructions=instructions, **options)
    if poststop:
        config = json.loads((bundle / "config.json").read_text())
        hook = config["hooks"]["prestart"][0]
        config["hooks"]["poststop"] = [hook | {"args": [*hook["args"], "poststop"]}]
        (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def pod_gofer_root(pod: Pod) -> Path:
    """What the gofer of the pod's own root container serves."""
    for process in Path("/proc").glob("[0-9]*"):
        words = argv(int(process.name))
        if words[0] == "runsc-gofer" and str(pod.state) in " ".join(words):
            return process / "root"
    raise AssertionError("the pod has no gofer")


def records(workshop: Workshop) -> list[Path]:
    """What is remembered of mounts on the host's side."""
    return sorted((workshop.runtime_directory / "host-mounts").glob("*"))


def swept(workshop: Workshop) -> list[list[str]]:
    """What a sweep took away, container by container."""
    removed = host_mounts.sweep(str(workshop.runtime_directory))
    assert [one.left for one in removed] == [()] * len(removed)
    return [list(one.paths) for one in removed]


@pytest.fixture
def pod(workshop: Workshop, runsc: Runsc) -> Iterator[Pod]:
    """A sandbox of each build, without containers yet; when a test ends, nothing may be left on the host's side."""
    with Pod(runsc, closed(workshop)) as made:
        try:
            yield made
        finally:
            made.__exit__()
            host_mounts.sweep(str(workshop.runtime_directory))
    assert records(workshop) == []


class TestPod:
    def test_beside_a_pause_container(self, workshop: Workshop, runsc: Runsc) -> None:
        with Pod(runsc, closed(workshop), readonly=True) as pod:
            pod.create(joining(workshop, pod, "c"), "c")
            assert read_by(pod.finish("c")) == sums(FILES)
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    @pytest.mark.parametrize("uid", [0, 1000])
    def test_a_container_that_joins(self, workshop: Workshop, pod: Pod, uid: int) -> None:
        bundle = joining(workshop, pod, "c", uid=uid)
        pod.create(bundle, "c")
        report = workshop.reported("closed/c")
        assert (report["runtime"], report["pid"]) == ("runsc", pod.sandbox_pid)
        (record,) = records(workshop)
        assert record.stat().st_mode & 0o777 == 0o600
        path = str(bundle / "rootfs/models")
        assert [one["path"] for one in json.loads(record.read_text())["mounts"]] == [path]
        assert [line.split()[4] for line in mounts_on_host(workshop.folder)] == [path]
        assert swept(workshop) == []
        assert read_by(pod.finish("c"), uid) == sums(FILES)
        assert swept(workshop) == []
        with (bundle / "rootfs/models/weights").open("rb") as kept:
            pod.run("delete", "c")
            assert kept.read() == b""
        assert mounts_on_host(workshop.folder) == []
        assert os.listdir(bundle / "rootfs/models") == []
        assert records(workshop) == []
        assert "models" not in os.listdir(pod_gofer_root(pod))

    def test_two_of_them(self, workshop: Workshop, pod: Pod) -> None:
        for name in "ab":
            pod.create(joining(workshop, pod, name), name)
        assert read_by(pod.finish("a")) == sums(FILES)
        pod.run("delete", "a")
        assert swept(workshop) == []
        assert read_by(pod.finish("b")) == sums(FILES)

    @pytest.mark.parametrize("gone", ["container", "sandbox", "bundle"])
    def test_a_container_whose_end_nobody_tells(self, workshop: Workshop, pod: Pod, gone: str) -> None:
        bundle = joining(workshop, pod, "c", poststop=False)
        pod.create(bundle, "c")
        path = bundle / "rootfs/models"
        if gone == "container":
            pod.run("delete", "--force", "c")
        elif gone == "sandbox":
            os.kill(pod.sandbox_pid, signal.SIGKILL)
            wait_until(lambda: process_start_time(pod.sandbox_pid) is None)
        else:
            bundle = bundle.rename(bundle.with_name("moved"))
            path = bundle / "rootfs/models"
        assert len(mounts_on_host(workshop.folder)) == 1
        with (path / "weights").open("rb") as kept:
            assert swept(workshop) == [[str(path)]]
            assert kept.read() == b""
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])
        assert swept(workshop) == []

    def test_a_create_that_fails_afterwards(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c", poststop=False)
        config = json.loads((bundle / "config.json").read_text())
        hooks = config["hooks"]["prestart"]
        config["hooks"]["prestart"] = [*hooks, prestart("/bin/false")]
        (bundle / "config.json").write_text(json.dumps(config))
        assert pod.create(bundle, "c", check=False) != 0
        assert len(mounts_on_host(workshop.folder)) == 1
        assert swept(workshop) == [[str(bundle / "rootfs/models")]]
        # The same again, and then a create of the same name that finds what the one before has left.
        assert pod.create(bundle, "c", check=False) != 0
        config["hooks"]["prestart"] = hooks
        (bundle / "config.json").write_text(json.dumps(config))
        pod.create(bundle, "c")
        assert len(mounts_on_host(workshop.folder)) == len(records(workshop)) == 1
        assert read_by(pod.finish("c")) == sums(FILES)

    def test_a_second_hook_of_one_create(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c")
        config = json.loads((bundle / "config.json").read_text())
        config["hooks"]["prestart"] *= 2
        (bundle / "config.json").write_text(json.dumps(config))
        assert pod.create(bundle, "c", check=False) != 0
        assert workshop.reported("closed/c")["error"] == DestinationRefused.__name__
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    def test_two_hooks_of_one_create_with_a_model_each(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c", args=("sh", "-c", "cd / && sha256sum models/weights more/weights"))
        first = workshop.folder / "closed/c.instructions"
        orders = json.loads(first.read_text())
        orders["models"][0]["destination"] = "/more"
        second = first.with_suffix(".second")
        second.write_text(json.dumps(orders))
        config = json.loads((bundle / "config.json").read_text())
        (hook,) = config["hooks"]["prestart"]
        words = [str(second) if word == str(first) else word for word in hook["args"]]
        config["hooks"]["prestart"].append(hook | {"args": words})
        (bundle / "config.json").write_text(json.dumps(config))
        pod.create(bundle, "c")
        (record,) = records(workshop)
        paths = [str(bundle / "rootfs/models"), str(bundle / "rootfs/more")]
        assert [one["path"] for one in json.loads(record.read_text())["mounts"]] == paths
        (digest,) = {line.split()[0] for line in sums({"weights": FILES["weights"]})}
        assert pod.finish("c") == f"{digest}  models/weights\n{digest}  more/weights\n"
        pod.run("delete", "c")
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    def test_a_folder_that_anybody_can_enter(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c")
        (workshop.folder / "closed").chmod(0o711)
        opened = [parent for parent in workshop.folder.parents if not parent.stat().st_mode & 0o001]
        assert pod.create(bundle, "c", check=False) != 0
        assert opened == []  # otherwise this test says nothing
        assert "could walk to" in workshop.reported("closed/c")["message"]
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])

    def test_another_mount_over_it(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c", poststop=False)
        pod.create(bundle, "c")
        path = bundle / "rootfs/models"
        subprocess.run(["mount", "-t", "tmpfs", "test", path], check=True)
        try:
            pod.run("delete", "--force", "c")
            (removed,) = host_mounts.sweep(str(workshop.runtime_directory))
            assert removed.paths == ()
            assert removed.left == (f"{path}: a mount that is not ours covers it",)
            assert len(mounts_on_host(workshop.folder)) == 2
        finally:
            subprocess.run(["umount", path], check=True)
        assert swept(workshop) == [[str(path)]]

    def test_another_mount_in_its_place(self, workshop: Workshop, pod: Pod) -> None:
        bundle = joining(workshop, pod, "c", poststop=False)
        pod.create(bundle, "c")
        path = bundle / "rootfs/models"
        subprocess.run(["umount", path], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "scz-smm", path], check=True)
        try:
            pod.run("delete", "--force", "c")
            assert swept(workshop) == [[]]
            assert len(mounts_on_host(workshop.folder)) == 1
        finally:
            subprocess.run(["umount", path], check=True)
        assert records(workshop) == []

    def test_a_destination_that_the_sandbox_would_cover(self, workshop: Workshop, pod: Pod) -> None:
        mounts = [{"destination": "/models", "type": "tmpfs", "source": "tmpfs"}]
        bundle = joining(workshop, pod, "c", mounts=mounts)
        assert pod.create(bundle, "c", check=False) != 0
        assert workshop.reported("closed/c")["error"] == DestinationRefused.__name__
        assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])


class TestSharedMounts:
    """systemd makes all of the host's mounts shared; what is mounted below one propagates to its peers."""

    @pytest.fixture
    def shared(self, workshop: Workshop) -> Iterator[Path]:
        folder = closed(workshop)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            subprocess.run(["mount", "--make-shared", folder], check=True)
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)

    def test_a_root_container(self, workshop: Workshop, runsc: Runsc, shared: Path) -> None:
        model = workshop.pack("m", FILES)
        before = mounts_on_host(workshop.folder)
        bundle = workshop.bundle(
            "closed/c", {"/models": model}, ("sh", "-c", f"{SUMS[2]}; sleep 60"), instructions={"pause": "attached"}
        )
        with start_container(runsc, bundle) as process:
            wait_for_pause(workshop, "closed/c", "attached")
            assert mounts_on_host(workshop.folder) == before
            resume(workshop, "closed/c")
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(len(FILES) + 1)]
            assert {line.replace("  ./", "  ").strip() for line in lines if "model.json" not in line} == sums(FILES)
            assert mounts_on_host(workshop.folder) == before

    def test_a_container_of_a_pod(self, workshop: Workshop, runsc: Runsc, shared: Path) -> None:
        before = mounts_on_host(workshop.folder)
        with Pod(runsc, shared) as pod:
            pod.create(joining(workshop, pod, "c"), "c")
            assert len(mounts_on_host(workshop.folder)) == len(before) + 1
            assert read_by(pod.finish("c")) == sums(FILES)
            pod.run("delete", "c")
            assert mounts_on_host(workshop.folder) == before


RECORDS, ATTACH = "oci_hook.delivery.host_records HostRecords", "oci_hook.delivery.attach Attachment"
MOMENTS = [
    *(f"{when} {RECORDS}.{name}" for name in ("open_lock", "write") for when in ("before", "after")),
    "before oci_hook.trusted_file os.rename",
    "after oci_hook.trusted_file os.rename",
    *(f"{when} {ATTACH}.attach" for when in ("before", "after")),
    "after oci_hook.linux.namespaces Child.send",
]


class TestKilledInAPod:
    @pytest.mark.parametrize("poststop", [True, False], ids=["poststop", "no poststop"])
    def test_between_two_steps(self, workshop: Workshop, pod: Pod, poststop: bool) -> None:
        for number, moment in enumerate(MOMENTS):
            name = f"c{number}"
            bundle = joining(workshop, pod, name, poststop=poststop, instructions={"kill": moment})
            assert pod.create(bundle, name, check=False) != 0, moment
            assert not workshop.result(f"closed/{name}").exists(), moment
            wait_until(lambda: hooks_alive(workshop.folder) == [])
            swept(workshop)
            assert (mounts_on_host(workshop.folder), records(workshop)) == ([], []), moment

    def test_at_random_moments(self, workshop: Workshop, pod: Pod) -> None:
        moments = random.Random(1)
        for number in range(10):
            name = f"c{number}"
            bundle = joining(workshop, pod, name, poststop=False)
            with ThreadPoolExecutor(1) as pool:
                creating = pool.submit(pod.create, bundle, name, check=False)
                hook = wait_for_pause(workshop, f"closed/{name}", "filled")
                time.sleep(moments.uniform(0, 0.02))  # attaching takes about as long
                with suppress(ProcessLookupError):
                    os.kill(hook, signal.SIGKILL)
                failed = creating.result(timeout=60) != 0
            wait_until(lambda: hooks_alive(workshop.folder) == [])
            if not failed:
                assert read_by(pod.finish(name)) == sums(FILES)
                pod.run("delete", name)
            swept(workshop)
            assert (mounts_on_host(workshop.folder), records(workshop)) == ([], [])


class TestThroughPodman:
    """The installed hook itself, with TPM and token, as podman's hooks.d runs it."""

    def start(self, scene: Scene, runsc: Runsc, folder: Path, *, token: Path | None) -> tuple[int, str, str]:
        """`podman run` under runsc; podman gives a runtime no flags of its own, so a script of that name does."""
        script = folder / "runsc"
        script.write_text(f'#!/bin/sh\nexec {runsc.program} {" ".join(runsc.flags)} "$@"\n')
        script.chmod(0o755)
        command = ["sh", "-c", "cd /models/small && find . -type f -exec sha256sum {} +"]
        done = scene.run(scene.image, command, model="small", token=token, runtime=str(script))
        return done.returncode, done.stdout, done.stderr

    def test_delivered_and_refused(self, scene: Scene, runsc: Runsc, tmp_path: Path) -> None:
        code, out, err = self.start(scene, runsc, tmp_path, token=scene.token())
        assert code == 0, err
        files = {name: contents(name, size) for name, size in SOURCE_FILES.items()}
        lines = {line.replace("  ./", "  ") for line in out.splitlines() if not line.endswith("/model.json")}
        assert lines == sums(files)
        assert os.listdir(scene.runtime_directory / "containers") == []  # poststop came and was understood
        assert mounts_on_host(scene.directory) == []
        code, out, _ = self.start(scene, runsc, tmp_path, token=None)
        assert (code != 0, out) == (True, "")
        assert scene.why()["reason"] == "TokenMissing"
