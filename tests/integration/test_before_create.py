"""Models before `create`: bind entries through the shim and the stage `prepare`, adopted or refused at prestart.

Kata is not here: tests/vms.py says what stands in for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import oci_hook.before_create as before_create_module
from oci_hook import release
from oci_hook.before_create import Asking, adopt, discard, known, prepare
from oci_hook.config import load_config
from oci_hook.errors import HolderRefused, SystemCallFailed
from oci_hook.key_errors import all_errors
from oci_hook.linux import mounts
from oci_hook.linux.processes import process_start_time
from oci_hook.oci.annotations import gather_requests
from oci_hook.oci.engine import read_engine_facts
from oci_hook.oci.spec import parse_spec
from tests.engines import RuntimeNamespace
from tests.integration.conftest import FILES, contents
from tests.runtimes import make_bundle
from tests.scene import TOKEN_PATH, Scene
from tests.shims import write_shim
from tests.vms import PATH, Kata, add_mounts, ask, before_create, our_hooks, ourselves, runc_as_kata

CODES = {cls.__name__: code for code, cls in all_errors().items()}
SUMS = {f"/models/small/{name}": hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}
SUM = f"sha256sum {' '.join(SUMS)}"


class Sandboxes:
    """Bundles, the stand-in and its shim, in a folder of their own.

    Attributes:
        runtime: The copy of runc that is named kata-runtime.
        shim: Before it.
    """

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene, self.folder = scene, folder
        self.trace = folder / "trace"
        self.trace.mkdir()
        self.runtime = runc_as_kata(folder)
        self.shim = write_shim(folder / "scz", runtime=self.runtime, engine="containerd", config_file=scene.config)
        self.bound = scene.runtime_directory / "bound"

    def bundle(self, shell: str = SUM, *, token: Path | None = None, hooks: bool = False, **more: Any) -> Path:
        """A bundle that asks for the model; its workload leaves a trace on the host."""
        source = str(token or self.scene.token(f"token-{uuid.uuid4().hex[:8]}"))
        bind = {"type": "bind", "options": ["bind", "rw"]}
        return make_bundle(
            self.folder / f"b-{uuid.uuid4().hex[:8]}",
            args=["sh", "-c", f"echo > /trace/ran; {shell}"],
            mounts=[
                {"destination": "/trace", "source": str(self.trace), **bind},
                {"destination": TOKEN_PATH, "source": source, **bind},
                *more.pop("mounts", ()),
            ],
            annotations={"smm.scz/model": "small:1", **more.pop("annotations", {})},
            hooks=our_hooks(self.scene) if hooks else None,
            **more,
        )

    def command(self, program: Path, *words: str) -> list[str]:
        return [str(program), "--root", str(self.folder / "state"), *words]

    @contextlib.contextmanager
    def start(self, bundle: Path, *, program: Path | None = None, name: str = "") -> Iterator[subprocess.Popen[str]]:
        """`run` in the background; the container is deleted at the end."""
        name, program = name or f"scz-vm-{uuid.uuid4().hex[:12]}", program or self.shim
        process = subprocess.Popen(
            self.command(program, "run", "--bundle", str(bundle), name),
            env={"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            delete = self.command(program, "delete", "--force", name)
            subprocess.run(delete, capture_output=True, check=False, timeout=120)
            if process.poll() is None:
                process.kill()
                subprocess.run(delete, capture_output=True, check=False, timeout=120)
            process.communicate(timeout=120)

    def run(self, bundle: Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """`run` to its end."""
        (self.trace / "ran").unlink(missing_ok=True)
        with self.start(bundle, **how) as process:
            stdout, stderr = process.communicate(timeout=300)
            return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    @property
    def ran(self) -> bool:
        return (self.trace / "ran").exists()

    def mounts(self) -> list[str]:
        """The models that are mounted below the run-time directory."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if f"{self.bound}/" in line]

    def left(self) -> list[str]:
        """Whatever a container could have left in the run-time directory."""
        run = self.scene.runtime_directory
        found = [*self.mounts()]
        for name in ("bound", "host-mounts", "containers", "evidence", "tokens", "reservations"):
            found += [str(path) for path in (run / name).glob("*")] if (run / name).is_dir() else []
        return [path for path in found if not path.endswith("/lock")]

    def records(self) -> list[dict[str, Any]]:
        folder = self.scene.runtime_directory / "host-mounts"
        return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]

    def ps(self) -> list[dict[str, Any]]:
        return list(json.loads(self.scene.sczctl("ps", "--json").stdout))

    def refused(self, reason: str) -> None:
        """The last refusal is of that reason, the workload did not run, and nothing is left."""
        why = self.scene.why()
        assert (why.get("reason"), why.get("code")) == (reason, CODES[reason]), why
        assert not self.ran
        assert self.left() == []


@pytest.fixture
def vms(scene: Scene) -> Iterator[Sandboxes]:
    folder = scene.directory / f"vms-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    scene.sczctl("sweep")
    made = Sandboxes(scene, folder)
    scene.forget_refusals()
    try:
        yield made
        assert made.left() == []
    finally:
        for path in made.mounts():
            subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(folder)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed, or the block ends."""
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def read(stdout: str) -> dict[str, str]:
    """What `sha256sum` printed."""
    return {line.split()[1]: line.split()[0] for line in stdout.splitlines()}


# --- the shim ---------------------------------------------------------------------------------------------------------


def test_the_shim_makes_ready_and_the_container_reads(vms: Sandboxes) -> None:
    bundle = vms.bundle(f"{SUM}; cat /proc/self/mountinfo >&2; read x < /trace/go")
    os.mkfifo(vms.trace / "go")
    with vms.start(bundle, name="c1") as process:
        wait_until(lambda: vms.ran)
        # The record is the process's by now, in the process's own bundle; the model is mounted once, on the host.
        (record,) = vms.records()
        assert (record["kind"], record["runtime"], record["bundle"]) == ("before-create", "kata", str(bundle))
        state = json.loads((vms.folder / "state/c1/state.json").read_text())
        assert record["container"] == [state["init_process_pid"], int(state["init_process_start"])]
        assert [mount["path"] for mount in record["mounts"]] == vms.mounts()
        spec = json.loads((bundle / "config.json").read_text())
        assert spec["mounts"][-1] == {
            "destination": "/models/small",
            "type": "bind",
            "source": record["mounts"][0]["path"],
            "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
        }
        (row,) = vms.ps()
        assert (row["runtime"], row["container_id"], row["pid"]) == ("kata", "c1", state["init_process_pid"])
        assert row["memory_bytes"] >= sum(FILES.values())
        (shown,) = json.loads(vms.scene.sczctl("evidence", "c1", "--json").stdout)["models"]
        assert shown["diagnosis"]["error"] is None  # it went with the record to the process's own
        released = vms.scene.sczctl("release", "c1", check=False)
        assert released.returncode == CODES["EngineUnsupported"]
        assert "bind entry" in released.stderr
        (vms.trace / "go").write_text("\n")
        stdout, stderr = process.communicate(timeout=120)
    assert read(stdout) == SUMS
    (line,) = [line for line in stderr.splitlines() if " /models/small " in line]
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(line.split()[5].split(","))
    assert " ro" in line.split(" - ")[1]
    assert "shared:" not in line
    assert vms.left() == []
    actions = [json.loads(entry)["event"] for entry in vms.scene.audit.read_text().splitlines()[-3:]]
    assert actions == ["grant", "outcome", "closed"]


def test_the_same_bundle_again(vms: Sandboxes) -> None:
    bundle = vms.bundle()
    for _ in range(2):
        assert read(vms.run(bundle, name="again").stdout) == SUMS
        assert vms.left() == []
    # Its entries and its digest are another container's.
    assert vms.run(bundle, name="another").returncode == CODES["DestinationRefused"]
    vms.refused("DestinationRefused")


def test_a_container_that_asks_for_nothing_and_one_of_the_pod_that_is_not_meant(vms: Sandboxes) -> None:
    bundle = vms.bundle("true", annotations={"smm.scz/containers": "main", "io.kubernetes.cri.container-name": "side"})
    done = vms.run(bundle)
    assert (done.returncode, vms.ran) == (0, True), done
    assert vms.left() == []


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"annotations": {"smm.scz/path": "/trace/model"}}, "DestinationRefused"),
        ({"annotations": {"smm.scz/bound": "/anywhere"}}, "AnnotationInvalid"),
        ({"annotations": {"smm.scz/require": "runtime=runc"}}, "RequirementRefused"),
        ({"annotations": {"smm.scz/token": "/nowhere"}}, "TokenMissing"),
        ({"mounts": [{"destination": "/models/small/x", "type": "tmpfs", "source": "t"}]}, "DestinationRefused"),
    ],
)
def test_what_the_shim_refuses_before_the_runtime_runs(vms: Sandboxes, how: dict[str, Any], reason: str) -> None:
    bundle = vms.bundle(**how)
    before = (bundle / "config.json").read_bytes()
    done = vms.run(bundle)
    assert done.returncode == CODES[reason], done
    assert reason in done.stderr
    assert (bundle / "config.json").read_bytes() == before
    vms.refused(reason)


def test_a_runtime_that_cannot_be_started_leaves_nothing(vms: Sandboxes) -> None:
    bundle = vms.bundle()
    vms.runtime.chmod(0o644)
    assert vms.run(bundle).returncode == CODES["FileUnreadable"]
    vms.refused("FileUnreadable")


def test_a_create_that_fails_before_hooks_leaves_nothing_after_a_sweep(vms: Sandboxes) -> None:
    bundle = vms.bundle(mounts=[{"destination": "/x", "type": "bind", "source": "/nonexistent", "options": ["bind"]}])
    assert vms.run(bundle).returncode != 0
    assert not vms.ran
    swept = vms.scene.sczctl("sweep", "--json")
    assert len(json.loads(swept.stdout)["mounts"]) <= 1
    assert vms.left() == []


def test_a_token_is_one_containers(vms: Sandboxes) -> None:
    token = vms.scene.token("shared-token")
    os.mkfifo(vms.trace / "go")
    with vms.start(vms.bundle("read x < /trace/go", token=token), name="first") as first:
        wait_until(lambda: vms.ran)
        assert vms.run(vms.bundle(token=token)).returncode == CODES["TokenBoundElsewhere"]
        assert len(vms.records()) == 1
        (vms.trace / "go").write_text("\n")
        first.communicate(timeout=120)
    assert read(vms.run(vms.bundle(token=token)).stdout) == SUMS


def test_an_end_that_nobody_tells(vms: Sandboxes) -> None:
    with vms.start(vms.bundle("exec sleep 600"), name="killed") as process:
        wait_until(lambda: vms.ran)
        state = json.loads((vms.folder / "state/killed/state.json").read_text())
        shutil.rmtree(vms.folder / "state/killed")  # so that no `delete` finds it
        process.kill()
        os.kill(state["init_process_pid"], signal.SIGKILL)
        process.communicate(timeout=120)
    wait_until(lambda: not Path(f"/proc/{state['init_process_pid']}").exists())
    (path,) = vms.mounts()
    held = os.open(f"{path}/config.json", os.O_RDONLY)
    try:
        assert os.read(held, 99) == contents("config.json", FILES["config.json"])
        vms.scene.sczctl("sweep")
        assert os.pread(held, 99, 0) == b""
    finally:
        os.close(held)


def test_kills_at_random_moments(vms: Sandboxes) -> None:
    chance = random.Random(14)
    for round_ in range(6):
        with vms.start(vms.bundle("exec sleep 600"), name=f"random-{round_}") as process:
            time.sleep(chance.uniform(0.02, 1.6))
            process.kill()
            process.communicate(timeout=120)
        wait_until(lambda: hooks_alive(vms.scene) == [])
        vms.scene.sczctl("sweep")
        assert vms.left() == []
    assert read(vms.run(vms.bundle()).stdout) == SUMS


def hooks_alive(scene: Scene) -> list[int]:
    """The pids of our own processes of this scene."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.endswith(b"oci_hook/launch.py") for word in words) and os.fsencode(scene.config) in words:
                found.append(int(path.parent.name))
    return found


def test_sixteen_at_once(vms: Sandboxes) -> None:
    usual = vms.scene.config.read_text()
    vms.scene.config.write_text(usual.replace("timeout_seconds = 60", "timeout_seconds = 600"))  # they wait for one TPM
    try:
        _sixteen(vms)
    finally:
        vms.scene.config.write_text(usual)


def _sixteen(vms: Sandboxes) -> None:
    bundles = [vms.bundle() for _ in range(16)]
    done: dict[int, subprocess.CompletedProcess[str]] = {}

    def one(number: int) -> None:
        done[number] = vms.run(bundles[number], name=f"sixteen-{number}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = {number: each.stderr for number, each in done.items() if read(each.stdout) != SUMS}
    assert failed == {}
    assert len(done) == 16


# --- the stage `prepare`, and what the prestart hook makes of it ------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("names", ["thread", "hypervisor"])
def test_under_a_runtime_whose_pid_is_not_the_containers(vms: Sandboxes, names: str, known: bool) -> None:
    bundle = vms.bundle(hooks=True)
    (entry,) = before_create(vms.scene, "vm", bundle, known=known)
    host = Path("/proc/self/mountinfo").read_text()
    with Kata(vms.folder, bundle, "vm", names, monitor="conmonrs") as kata:
        created = kata.created()
        assert created["code"] == 0, created
        assert {path: sum_ for path, sum_ in created["sums"].items() if path in SUMS} == SUMS
        assert "/models/small/model.json" in created["sums"]
        # Nothing was mounted but what was there: on the host, by us.
        assert vms.mounts() == [entry["source"]]
        assert [line for line in host.splitlines() if str(vms.folder) in line] == []
        (record,) = vms.records()
        assert record["bundle"] == str(bundle)
        lasting = record["container"][0]
        # The thread's process is a `create` that ends: the engine's monitor above it stays.
        comm = Path(f"/proc/{lasting}/comm").read_text()
        assert comm == ("conmonrs\n" if names == "thread" else "sleep\n")
        vms.scene.sczctl("sweep")
        assert vms.mounts() == [entry["source"]]
        kata.delete()
    assert vms.left() == []


@pytest.mark.parametrize("monitor", ["", "a-monitor"])
def test_without_an_engines_monitor_nobody_would_see_the_end(vms: Sandboxes, monitor: str) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "init", bundle)
    with Kata(vms.folder, bundle, "init", "thread", monitor=monitor) as kata:
        created = kata.created()
        assert created["code"] == CODES["HolderRefused"]
        assert f"started by '{monitor or 'python3'}" in created["said"][-1]
    vms.refused("HolderRefused")


@pytest.mark.parametrize("names", ["thread", "hypervisor"])
def test_without_our_record_it_is_refused_with_the_reason(vms: Sandboxes, names: str) -> None:
    bundle = vms.bundle(hooks=True)
    forged = vms.scene.runtime_directory / "bound" / ("0" * 64) / "0"
    add_mounts(bundle, [{"destination": "/models/small", "type": "bind", "source": str(forged), "options": ["bind"]}])
    with Kata(vms.folder, bundle, "vm", names) as kata:
        created = kata.created()
        assert created["code"] == CODES["HolderRefused"]
        assert "--before-create" in created["said"][-1]
    vms.refused("HolderRefused")


def test_in_the_shims_own_mount_namespace(vms: Sandboxes) -> None:
    """As containerd-shim-kata-v2: its hooks see the host's mounts by propagation, and remove them on the host."""
    slave = ("unshare", "--mount", "--propagation", "slave")
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "vm", bundle, known=False)
    with Kata(vms.folder, bundle, "vm", "hypervisor", prefix=slave) as kata:
        assert kata.created()["code"] == 0
        assert len(vms.mounts()) == 1
        kata.delete()
        assert vms.mounts() == []
    assert vms.left() == []


def test_in_the_namespace_of_a_pods_shim_that_was_there_before(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    gate = vms.folder / "gate"
    os.mkfifo(gate)
    vms.bound.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "--bind", vms.bound, vms.bound], check=True)
    try:
        # Shared, as systemd makes all of the host's; and no peer of the mount that it lies on, should that be shared.
        subprocess.run(["mount", "--make-private", vms.bound], check=True)
        subprocess.run(["mount", "--make-shared", vms.bound], check=True)
        waiting = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", f'read x < {gate}; exec "$@"', "sh")
        with Kata(vms.folder, bundle, "vm", "hypervisor", prefix=waiting) as kata:
            with gate.open("w") as opened:
                (entry,) = before_create(vms.scene, "vm", bundle, known=False)
                opened.write("\n")
            created = kata.created()
            assert created["code"] == 0, created
            assert created["sums"].items() >= SUMS.items()
            lines = Path("/proc/self/mountinfo").read_text().splitlines()
            (line,) = [line for line in lines if line.split()[4] == entry["source"]]
            assert "shared:" not in line
            kata.delete()
    finally:
        subprocess.run(["umount", vms.bound], check=True)
    assert vms.left() == []


def test_a_runtime_that_does_not_see_the_model_is_refused(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    gate = vms.folder / "gate"
    os.mkfifo(gate)
    waiting = ("unshare", "--mount", "--propagation", "private", "sh", "-c", f'read x < {gate}; exec "$@"', "sh")
    with Kata(vms.folder, bundle, "vm", "hypervisor", prefix=waiting) as kata:
        with gate.open("w") as opened:  # opens when the namespace is there
            before_create(vms.scene, "vm", bundle, known=False)
            opened.write("\n")
        created = kata.created()
        assert created["code"] == CODES["DestinationRefused"], created
        assert "PrivateMounts" in created["said"][-1]
    vms.refused("DestinationRefused")


def _source(entry: dict[str, Any], _spec: dict[str, Any]) -> None:
    entry["source"] = entry["source"] + "/."


def _gone(entry: dict[str, Any], spec: dict[str, Any]) -> None:
    spec["mounts"].remove(entry)


def _covered(_entry: dict[str, Any], spec: dict[str, Any]) -> None:
    spec["mounts"].append({"destination": "/models", "type": "tmpfs", "source": "t"})


def _another(_entry: dict[str, Any], spec: dict[str, Any]) -> None:
    spec["annotations"] |= {"smm.scz/model": "other:1", "smm.scz/path": "/models/small"}


@pytest.mark.parametrize("change", [_source, _gone, _covered, _another])
def test_a_config_json_that_does_not_show_the_model_is_refused(
    vms: Sandboxes, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "changed", bundle)
    spec = json.loads((bundle / "config.json").read_text())
    change(spec["mounts"][-1], spec)
    (bundle / "config.json").write_text(json.dumps(spec))
    with Kata(vms.folder, bundle, "changed", "hypervisor") as kata:
        assert kata.created()["code"] == CODES["DestinationRefused"]
    vms.refused("DestinationRefused")


def test_a_file_that_was_changed_behind_the_shim(vms: Sandboxes) -> None:
    bundle = vms.bundle()
    hook = vms.folder / "kata-runtime-late"
    late = f'sed -i s/nosuid/suid/ {bundle}/config.json; exec {vms.runtime} "$@"'
    hook.write_text(f"#!/bin/sh\n{late}\n")
    hook.chmod(0o755)
    shim = write_shim(vms.folder / "late", runtime=hook, engine="containerd", config_file=vms.scene.config)
    assert vms.run(bundle, program=shim).returncode != 0
    vms.refused("SpecInvalid")


def test_what_is_ready_for_kata_is_refused_under_another_runtime(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "other", bundle)
    assert vms.run(bundle, program=Path("/usr/bin/runc"), name="other").returncode != 0
    vms.refused("RequirementRefused")


def test_crun_under_katas_name_is_not_kata(vms: Sandboxes) -> None:
    """It runs from a file without a path, and its first argument is what the link to it is called."""
    link = vms.folder / "link" / "kata-runtime"
    link.parent.mkdir()
    link.symlink_to("/usr/bin/crun")
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "link", bundle)
    file = bundle / "config.json"
    spec = json.loads(file.read_text())
    for unused in ("resources", "cgroupsPath"):
        spec["linux"].pop(unused, None)
    file.write_text(json.dumps(spec))
    namespace = RuntimeNamespace().start()
    try:
        words = ["--root", str(vms.folder / "crun"), "run", "--bundle", str(bundle), "link"]
        done = subprocess.run(
            [*namespace.prefix, str(link), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
    finally:
        namespace.stop()
    assert done.returncode != 0
    assert SUMS["/models/small/config.json"] not in done.stdout
    vms.refused("RequirementRefused")


def _of_anothers(source: str) -> tuple[dict[str, Any], ...]:
    return (
        {"destination": "/steal", "type": "bind", "source": source, "options": ["bind", "ro"]},
        {"destination": "/steal", "type": "bind", "source": str(Path(source).parents[1]), "options": ["rbind"]},
        {"destination": "/steal", "type": "none", "source": str(Path(source).parents[2]), "options": ["rbind"]},
        {"destination": "/steal", "type": "overlay", "source": "overlay", "options": [f"lowerdir=/etc:{source}"]},
    )


@pytest.mark.parametrize("number", range(4))
def test_another_containers_models_are_not_shown_beside_ones_own(vms: Sandboxes, number: int) -> None:
    first = vms.bundle(hooks=True)
    (entry,) = before_create(vms.scene, "first", first)
    forged = _of_anothers(entry["source"])[number]
    # Where the thief asks with it already, and where it comes behind what was made ready.
    early = ask(vms.scene, "thief", vms.bundle(hooks=True, mounts=[forged]))
    assert early.returncode == CODES["DestinationRefused"]
    assert "the models of other containers" in early.stderr
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "thief", bundle)
    add_mounts(bundle, [forged])
    with Kata(vms.folder, bundle, "thief", "hypervisor") as kata:
        created = kata.created()
        assert created["code"] == CODES["DestinationRefused"]
        assert "the models of other containers" in created["said"][-1]
    assert vms.mounts() == [entry["source"]]
    assert vms.scene.why()["reason"] == "DestinationRefused"
    discard("first", str(first), load_config(str(vms.scene.config)))
    assert vms.left() == []


def test_what_nobody_adopts_goes_though_its_creator_lives(vms: Sandboxes) -> None:
    for change in ("patience", "folder"):
        bundle = vms.bundle(hooks=True)
        before_create(vms.scene, change, bundle, known=False)
        vms.scene.sczctl("sweep")
        assert len(vms.mounts()) == 1
        (file,) = (vms.scene.runtime_directory / "host-mounts").glob("*.json")
        written = json.loads(file.read_text())
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert now < written["adopt_by"] <= now + 600
        written |= {"adopt_by": int(now) - 1} if change == "patience" else {"folder": str(bundle / "never")}
        file.write_text(json.dumps(written))
        vms.scene.sczctl("sweep")
        assert vms.left() == []


def test_a_runtime_that_is_not_roots_alone(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "loose", bundle)
    vms.runtime.chmod(0o777)
    assert vms.run(bundle, program=vms.runtime, name="loose").returncode != 0
    vms.refused("RequirementRefused")


def test_runc_itself_can_be_given_bind_entries(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "plain", bundle, runtime="runc")
    assert read(vms.run(bundle, program=Path("/usr/bin/runc"), name="plain").stdout) == SUMS
    assert vms.left() == []


def test_asked_twice_it_is_made_once(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    first, second = ask(vms.scene, "twice", bundle), ask(vms.scene, "twice", bundle)
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout) == (0, first.stdout)
    assert len(vms.mounts()) == len(vms.records()) == 1
    # Another creator makes another container of that name: what was made for the one before is emptied and gone.
    (path,) = vms.mounts()
    held = os.open(f"{path}/config.json", os.O_RDONLY)
    with sleeping() as sleeper:
        started = process_start_time(sleeper.pid)
        assert started is not None
        third = ask(vms.scene, "twice", bundle, creator=(sleeper.pid, started))
        assert (third.returncode, third.stdout) == (0, first.stdout)
        assert [record["creator"] for record in vms.records()] == [[sleeper.pid, started]]
        assert len(vms.mounts()) == 1
        assert os.pread(held, 99, 0) == b""
        os.close(held)
        sleeper.kill()
    vms.scene.sczctl("sweep")
    assert vms.left() == []


def test_reached_by_two_ways_it_is_adopted_once(vms: Sandboxes) -> None:
    """The engine's own hooks and the shim's."""
    bundle = vms.bundle(hooks=True)
    done = vms.run(bundle)
    assert read(done.stdout) == SUMS, done
    assert len(json.loads((bundle / "config.json").read_text())["hooks"]["prestart"]) == 2


def test_what_the_nri_plugin_calls(vms: Sandboxes) -> None:
    config = load_config(str(vms.scene.config))
    assert known(config) == ()
    adopted, never = vms.bundle(), vms.bundle()
    before_create(vms.scene, "adopted", adopted, known=False)
    before_create(vms.scene, "never", never, known=False)
    assert known(config) == ("adopted", "never")
    with sleeping() as hypervisor:
        adopt("adopted", "", hypervisor.pid, config)
        adopt("adopted", "", hypervisor.pid, config)
        with pytest.raises(HolderRefused, match="another process's"):
            adopt("adopted", "", os.getpid(), config)
        with pytest.raises(HolderRefused, match="nothing was made ready"):
            adopt("unknown", "", hypervisor.pid, config)
        # One of this name lives: it is neither prepared anew nor touched.
        assert ask(vms.scene, "adopted", adopted, known=False).returncode == CODES["HolderRefused"]
        vms.scene.sczctl("sweep")
        assert len(vms.mounts()) == 2
        assert [row["pid"] for row in vms.ps()] == [hypervisor.pid, os.getpid()]
        hypervisor.kill()
    vms.scene.sczctl("sweep")
    assert known(config) == ("never",)
    discard("never", "", config)
    discard("never", "", config)
    discard("unknown", "/nowhere", config)
    assert known(config) == ()
    assert vms.left() == []


def test_a_creator_that_is_gone_gets_nothing(vms: Sandboxes) -> None:
    done = ask(vms.scene, "gone", vms.bundle(), creator=(os.getpid(), 1))
    assert done.returncode == CODES["HolderGone"]
    vms.refused("HolderGone")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"container_id": "../x"}', '{"container_id":"a","bundle":"b","runtime":"kata","creator":[1,1]}'],
)
def test_what_is_no_asking(vms: Sandboxes, text: str) -> None:
    from tests.vms import hook_command

    command = hook_command("prepare", vms.scene)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (CODES["StateInvalid"], "")
    assert done.stderr.count("\n") == 1


# --- what no longer asks, and others of the same name -----------------------------------------------------------------


def _nothing(spec: dict[str, Any]) -> None:
    spec["annotations"] = {"x": "y"}


def _none_at_all(spec: dict[str, Any]) -> None:
    spec["annotations"] = {}


def _a_sandbox(spec: dict[str, Any]) -> None:
    spec["annotations"]["io.kubernetes.cri.container-type"] = "sandbox"


def _of_another(spec: dict[str, Any]) -> None:
    spec["annotations"] |= {"smm.scz/containers": "main", "io.kubernetes.cri.container-name": "side"}


@pytest.mark.parametrize("program", ["kata-runtime", "runc"])
@pytest.mark.parametrize("change", [_nothing, _none_at_all, _a_sandbox, _of_another])
def test_one_that_no_longer_asks_is_refused(
    vms: Sandboxes, change: Callable[[dict[str, Any]], None], program: str
) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "silent", bundle, known=program == "runc")
    spec = json.loads((bundle / "config.json").read_text())
    change(spec)
    (bundle / "config.json").write_text(json.dumps(spec))
    runtime = vms.runtime if program == "kata-runtime" else Path("/usr/bin/runc")
    assert vms.run(bundle, program=runtime, name="silent").returncode != 0
    vms.refused("DestinationRefused")


def test_what_is_left_of_one_before_does_not_stop_one_that_asks_for_nothing(vms: Sandboxes) -> None:
    bundle = vms.bundle("true", hooks=True)
    with sleeping() as creator:
        started = process_start_time(creator.pid)
        before_create(vms.scene, "left", bundle, creator=(creator.pid, started or 0))
    config_file = bundle / "config.json"
    spec = json.loads(config_file.read_text())
    spec["mounts"].pop()
    _nothing(spec)
    config_file.write_text(json.dumps(spec))
    assert vms.run(bundle, program=vms.runtime, name="left").returncode == 0
    assert (vms.ran, vms.left()) == (True, [])


def test_poststop_of_one_that_no_longer_asks_removes_its_models(vms: Sandboxes) -> None:
    bundle = vms.bundle(hooks=True)
    before_create(vms.scene, "stopped", bundle)
    state = {
        "ociVersion": "1.0",
        "id": "stopped",
        "status": "stopped",
        "bundle": str(bundle),
        "annotations": {"x": "y"},
    }
    command = json.loads((bundle / "config.json").read_text())["hooks"]["poststop"][0]["args"]
    subprocess.run(command, input=json.dumps(state), text=True, check=True, timeout=120)
    assert vms.left() == []


def test_another_container_of_that_name_takes_nothing_from_one_that_lives(vms: Sandboxes) -> None:
    """As in two namespaces of containerd: one by the plugin, which is told no bundle, one by hooks."""
    config = load_config(str(vms.scene.config))
    ready, other = vms.bundle(), vms.bundle("exec sleep 600", hooks=True)
    with vms.start(other, program=Path("/usr/bin/runc"), name="same"), sleeping() as hypervisor:
        wait_until(lambda: vms.ran)
        assert ask(vms.scene, "same", ready, known=False).returncode == 0
        adopt("same", "", hypervisor.pid, config)
        subprocess.run(
            vms.command(Path("/usr/bin/runc"), "delete", "--force", "same"),
            check=True,
            capture_output=True,
            timeout=120,
        )
        assert len(vms.mounts()) == len(vms.records()) == 1
        assert [row["pid"] for row in vms.ps()] == [hypervisor.pid]
        # Nor does one that is refused, or that shows the other's model and asks for none.
        thief = vms.bundle(hooks=True)
        (record,) = vms.records()
        source = record["mounts"][0]["path"]
        add_mounts(thief, [{"destination": "/m", "type": "bind", "source": source, "options": ["bind", "ro"]}])
        spec = json.loads((thief / "config.json").read_text())
        _nothing(spec)
        (thief / "config.json").write_text(json.dumps(spec))
        (vms.trace / "ran").unlink()
        assert vms.run(thief, program=vms.runtime, name="same").returncode != 0
        assert not vms.ran
        assert len(vms.mounts()) == 1
        discard("same", "", config)
    assert vms.left() == []


def test_which_of_two_is_meant_is_not_guessed(vms: Sandboxes) -> None:
    config = load_config(str(vms.scene.config))
    first, second = vms.bundle(), vms.bundle()
    before_create(vms.scene, "two", first)
    before_create(vms.scene, "two", second)
    with pytest.raises(HolderRefused, match="not known which"):
        discard("two", "", config)
    assert len(vms.mounts()) == 2
    discard("two", str(first), config)
    discard("two", "", config)
    assert vms.left() == []


@pytest.mark.parametrize("known", [True, False])
def test_the_same_once_more_is_admitted_once_more(vms: Sandboxes, known: bool) -> None:
    bundle = vms.bundle()
    assert ask(vms.scene, "once", bundle, known=known).returncode == 0
    (path,) = vms.mounts()
    held = os.open(f"{path}/config.json", os.O_RDONLY)
    evidence = vms.scene.runtime_directory / "evidence"
    (first,) = [each.read_bytes() for each in evidence.iterdir()]
    assert ask(vms.scene, "once", bundle, known=known).returncode == 0
    (second,) = [each.read_bytes() for each in evidence.iterdir()]
    assert json.loads(first)["starts"][0]["nonce"] != json.loads(second)["starts"][0]["nonce"]  # the last decision's
    (path,) = vms.mounts()
    # Where no bundle is known it may be another container's: what was made for the one before is emptied and gone.
    assert (os.pread(held, 1, 0) != b"") is known
    os.close(held)
    grants = [json.loads(line)["event"] for line in vms.scene.audit.read_text().splitlines()].count("grant")
    (bundle / "config.json").write_text(
        json.dumps(
            (spec := json.loads((bundle / "config.json").read_text()))
            | {"mounts": [mount for mount in spec["mounts"] if mount["destination"] != TOKEN_PATH]}
        )
    )
    assert ask(vms.scene, "once", bundle, known=known).returncode == CODES["TokenMissing"]
    assert grants == [json.loads(line)["event"] for line in vms.scene.audit.read_text().splitlines()].count("grant")
    vms.refused("TokenMissing")


def test_a_container_that_lives_keeps_its_record_and_its_token(vms: Sandboxes) -> None:
    bundle = vms.bundle("exec sleep 600", hooks=True)
    with vms.start(bundle, program=Path("/usr/bin/runc"), name="dup"):
        wait_until(lambda: vms.ran)
        before = vms.left()
        assert any("/tokens/" in path for path in before)
        done = ask(vms.scene, "dup", bundle)
        assert (done.returncode, vms.left()) == (CODES["HolderRefused"], before), done
    assert vms.left() == []


def test_one_that_was_faster_keeps_what_it_has(vms: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, config = vms.bundle(hooks=True), load_config(str(vms.scene.config))
    data = (bundle / "config.json").read_bytes()
    spec = parse_spec(data, bundle=str(bundle))
    facts = read_engine_facts("containerd", spec.annotations)
    deliver = before_create_module._deliver

    for has_bundle in (True, False):
        requests = gather_requests(spec.annotations, {}, None)
        asking = Asking("race", str(bundle) if has_bundle else "", spec, facts, requests, "kata", ourselves())
        faster: list[list[str]] = []

        def late(*words: Any, known: bool = has_bundle, faster: list[list[str]] = faster, **more: Any) -> None:
            assert ask(vms.scene, "race", bundle, known=known).returncode == 0
            faster.append(vms.left())
            deliver(*words, **more)

        monkeypatch.setattr(before_create_module, "_deliver", late)
        if has_bundle:  # the very same: admitted, too, and given the same entries
            (entry,) = prepare(asking, config)
            assert [entry.source] == vms.mounts()
        else:
            with pytest.raises(HolderRefused, match="ready meanwhile"):
                prepare(asking, config)
        assert [vms.left()] == faster
        assert any("/tokens/" in path for path in faster[0])
        discard("race", asking.bundle, config)
        assert vms.left() == []


def test_the_tpm_is_asked_by_a_child_that_was_forked_before_any_key(
    vms: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that hangs in a driver cannot be ended: it is not to have the keys of the models before."""
    bundle, config = vms.bundle(hooks=True), load_config(str(vms.scene.config))
    data = (bundle / "config.json").read_bytes()
    spec = parse_spec(data, bundle=str(bundle))
    facts, requests = read_engine_facts("containerd", spec.annotations), gather_requests(spec.annotations, {}, None)

    def forks(*_: object) -> bytes:
        raise AssertionError("a child that has what is here by now")

    monkeypatch.setattr(release, "with_deadline", forks)
    (entry,) = prepare(Asking("early", str(bundle), spec, facts, requests, "kata", ourselves()), config)
    assert [entry.source] == vms.mounts()
    discard("early", str(bundle), config)
    assert vms.left() == []


def test_two_at_once(vms: Sandboxes) -> None:
    bundle, config = vms.bundle(hooks=True), load_config(str(vms.scene.config))
    with ThreadPoolExecutor(2) as both:
        for _ in range(3):
            done = list(both.map(lambda _: ask(vms.scene, "par", bundle), range(2)))
            assert {each.returncode for each in done} <= {0, CODES["HolderRefused"]}, done
            assert 0 in {each.returncode for each in done}
            left = vms.left()
            found = [sum(f"/{name}/" in path for path in left) for name in ("containers", "tokens", "host-mounts")]
            assert (found, len(vms.mounts())) == ([1, 1, 1], 1)
            discard("par", str(bundle), config)
            assert vms.left() == []


def test_what_was_granted_and_failed_is_closed_in_the_audit_log(
    vms: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, config = vms.bundle(), load_config(str(vms.scene.config))
    spec = parse_spec((bundle / "config.json").read_bytes(), bundle=str(bundle))
    facts = read_engine_facts("containerd", spec.annotations)
    requests = gather_requests(spec.annotations, {}, None)

    def fails(_path: str) -> None:
        raise SystemCallFailed("as if")

    monkeypatch.setattr(mounts, "make_private", fails)
    with pytest.raises(SystemCallFailed, match="as if"):
        prepare(Asking("failed", str(bundle), spec, facts, requests, "kata", ourselves()), config)
    assert vms.left() == []
    last = [json.loads(line) for line in vms.scene.audit.read_text().splitlines()[-2:]]
    assert [(entry["event"], entry["container"]) for entry in last] == [("grant", "failed"), ("closed", "failed")]
