"""Guest mode under a stand-in for Kata's agent (`tests.agent`), here without a machine around it: deliveries, refusals
that the workload reads, the time that the agent gives, and what cannot be told.

The stand-in ignores how a hook ends, as the agent does. So every refusal is looked for inside the container, and where
it cannot be there, the workload must not have run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oci_hook.key_errors import all_errors
from tests import agent as stand_in
from tests.engines import unpack_busybox
from tests.integration.conftest import FILES, contents
from tests.scene import SCZCTL, TOKEN_PATH, Scene

ROOT = Path(__file__).parents[2]
CODES = {cls.__name__: code for code, cls in all_errors().items()}
LAUNCHER = "/usr/bin/python3 -I -S /usr/lib/scz-smm/oci_hook/launch.py --config /etc/scz-smm/config.toml"
LOOK = """
for file in $(find /models -type f | sort); do
    echo "$file"
    case "$file" in */REFUSED.txt) cat "$file";; esac
done
grep /models/ /proc/self/mountinfo
"""


@dataclass(frozen=True)
class Ran:
    """How a container went."""

    returncode: int
    stdout: str
    stderr: str
    ran: bool


class Agent:
    """A guest's image below a folder: agent, hooks, configuration; and containers of it."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.folder = scene, scene.directory / "guest"
        self.executable = stand_in.copy_interpreter(self._made(self.folder) / "kata-agent")
        self.hooks = self.folder / "hooks"
        self.configure()
        for stage in ("prestart", "poststop"):
            self.place_hook(stage)
        self.rootfs = self.folder / "image"
        unpack_busybox(self.rootfs)

    @staticmethod
    def _made(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def configure(self, **changes: object) -> None:
        """The guest's configuration; `changes` of its section [guest]."""
        values = {"agent": str(self.executable), "timeout_seconds": 60, **changes}
        self.scene.write_config(
            guest="[guest]\n" + "".join(f"{key} = {json.dumps(each)}\n" for key, each in values.items())
        )

    def place_hook(self, stage: str, name: str = "scz-smm") -> Path:
        """The project's own script, with the places of this virtual environment."""
        launcher = next((Path(SCZCTL[0]).parents[1] / "lib").glob("python3*/site-packages/oci_hook/launch.py"))
        text = (ROOT / "config/guest" / stage / "scz-smm").read_text()
        assert LAUNCHER in text
        path = self._made(self.hooks / stage) / name
        python = Path(SCZCTL[0]).with_name("python")
        path.write_text(text.replace(LAUNCHER, f"{python} -I -S {launcher} --config {self.scene.config}"))
        path.chmod(0o755)
        return path

    @contextlib.contextmanager
    def bundle(
        self,
        *,
        token: Path | None,
        annotations: Mapping[str, str],
        mounts: tuple[dict[str, Any], ...] = (),
        command: str = LOOK,
    ) -> Iterator[Path]:
        """A container's folder, whose workload first leaves a trace."""
        folder = self.folder / f"c-{os.urandom(4).hex()}"
        folder.mkdir()
        shutil.copytree(self.rootfs, folder / "rootfs", symlinks=True)
        (folder / "trace").mkdir()
        entries: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/trace", "type": "bind", "source": str(folder / "trace"), "options": ["bind"]},
            *mounts,
        ]
        if token is not None:
            entries.append({"destination": TOKEN_PATH, "type": "bind", "source": str(token), "options": ["bind", "ro"]})
        spec = {
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": ["/bin/sh", "-c", f"echo > /trace/ran; {command}"], "env": ["PATH=/bin"], "cwd": "/"},
            "annotations": dict(annotations),
            "mounts": entries,
            "linux": {"namespaces": [{"type": each} for each in ("mount", "uts", "ipc", "pid")]},
        }
        (folder / "config.json").write_text(json.dumps(spec))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def start(
        self, bundle: Path, *, hook_seconds: float = 120, executable: Path | None = None
    ) -> subprocess.Popen[str]:
        """The agent, which makes one container of the bundle."""
        words = [executable or self.executable, "-I", "-S", stand_in.__file__, "--bundle", bundle, "--id", bundle.name]
        words += ["--hooks", self.hooks, "--hook-seconds", str(hook_seconds)]
        return subprocess.Popen(
            [str(word) for word in words], env={}, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True
        )

    def run(
        self,
        token: Path | None,
        *,
        annotations: Mapping[str, str] | None = None,
        mounts: tuple[dict[str, Any], ...] = (),
        command: str = LOOK,
        change: Callable[[Path], None] = lambda _bundle: None,
        executable: Path | None = None,
        hook_seconds: float = 120,
    ) -> Ran:
        """One container from beginning to end."""
        asked = {"smm.scz/model": "small:1"} if annotations is None else annotations
        with self.bundle(token=token, annotations=asked, mounts=mounts, command=command) as bundle:
            change(bundle)
            with self.start(bundle, executable=executable, hook_seconds=hook_seconds) as process:
                try:
                    stdout, stderr = process.communicate(timeout=240)
                finally:
                    process.kill()
            return Ran(process.returncode, stdout, stderr, (bundle / "trace/ran").exists())


@pytest.fixture(scope="module")
def agent(scene: Scene) -> Agent:
    return Agent(scene)


@pytest.fixture(autouse=True)
def nothing_left(agent: Agent) -> Iterator[None]:
    """After each test no process of the hook is there, and no mount on this side."""
    yield
    agent.configure()
    deadline = time.monotonic() + 60
    while hook_processes(agent) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert hook_processes(agent) == []
    assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(agent.folder) in line] == []


def hook_processes(agent: Agent) -> list[int]:
    """The pids of this scene's guest hooks, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if os.fsencode(agent.scene.config) in words and b"guest-prestart" in words:
                found.append(int(path.parent.name))
    return sorted(found)


def audit(agent: Agent) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.scene.audit.read_text().splitlines()]


def refused_inside(ran: Ran, reason: str, destinations: tuple[str, ...] = ("/models/small",)) -> None:
    """The workload ran, found the text and nothing beside it, on a file system that it cannot write."""
    assert ran.ran, ran
    files = [line for line in ran.stdout.splitlines() if line.startswith("/models")]
    assert files == [f"{destination}/REFUSED.txt" for destination in destinations], ran
    assert ran.stdout.count(f"code: {CODES[reason]}\nreason: {reason} (") == len(destinations), ran
    assert ran.stdout.count("\nremedy: ") == len(destinations)
    mounts = [line.split() for line in ran.stdout.splitlines() if " - " in line]
    assert sorted(mount[4] for mount in mounts) == list(destinations)
    assert all({"ro", "nosuid", "nodev", "noexec"} <= set(mount[5].split(",")) for mount in mounts)
    assert all("ro" in mount[-1].split(",") for mount in mounts)
    assert f"({CODES[reason]})" in ran.stderr  # the agent said so, and went on


def killed(ran: Ran, reason: str) -> None:
    """The workload never ran, and whoever reads the agent's log sees why."""
    assert not ran.ran, ran
    assert ran.stdout == ""
    assert ran.returncode == 128 + signal.SIGKILL, ran
    assert f"{reason} ({CODES[reason]})" in ran.stderr, ran


# --- delivered --------------------------------------------------------------------------------------------------------


def test_a_container_of_the_guest_reads_exactly_what_was_packed(agent: Agent) -> None:
    names = " ".join(f"/models/small/{name}" for name in FILES)
    ran = agent.run(agent.scene.token(), command=f"sha256sum {names}; grep /models/ /proc/self/mountinfo")
    assert ran.returncode == 0, ran
    for name, size in FILES.items():
        assert f"{hashlib.sha256(contents(name, size)).hexdigest()}  /models/small/{name}\n" in ran.stdout
    (mount,) = [line for line in ran.stdout.splitlines() if " /models/small " in line]
    assert "ro" in mount.split()[-1].split(",")
    events = [record["event"] for record in audit(agent)[-3:]]
    assert events == ["grant", "outcome", "closed"]  # the poststop hook ran, too
    assert ran.stderr == ""


def test_a_container_that_asks_for_nothing_is_left_alone(agent: Agent) -> None:
    before = len(audit(agent))
    ran = agent.run(None, annotations={}, command="ls /models 2>&1; true")
    assert (ran.returncode, ran.ran, ran.stderr) == (0, True, "")
    assert "No such file" in ran.stdout
    assert len(audit(agent)) == before


def test_a_pods_sandbox_passes_untouched(agent: Agent) -> None:
    """The pod's annotations are on its pause container, too; the engine on the host says that it is one."""
    agent.scene.write_config(engine='[guest]\nagent = "/absent"')
    config = agent.scene.config.read_text()
    agent.scene.config.write_text(config.replace('engine = "podman"', 'engine = "containerd"'))
    asked = {"smm.scz/model": "small:1", "io.kubernetes.cri.container-type": "sandbox"}
    ran = agent.run(None, annotations=asked, command="ls /models 2>&1; true")
    assert (ran.returncode, ran.ran, ran.stderr) == (0, True, "")
    assert "No such file" in ran.stdout


def test_the_hook_twice_delivers_once(agent: Agent) -> None:
    second = agent.place_hook("prestart", "scz-smm-again")
    try:
        ran = agent.run(agent.scene.token(), command="grep -c /models/ /proc/self/mountinfo")
    finally:
        second.unlink()
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1\n", "")


# --- refused inside ---------------------------------------------------------------------------------------------------


def test_a_container_without_a_token_is_told_so(agent: Agent) -> None:
    refused_inside(agent.run(None), "TokenMissing")
    assert audit(agent)[-1]["reason"] == "TokenMissing"


def test_a_model_that_is_not_there(agent: Agent) -> None:
    ran = agent.run(agent.scene.token(), annotations={"smm.scz/model": "absent:1"})
    refused_inside(ran, "ModelUnknown", ("/models/absent",))


def test_every_destination_is_told_when_one_model_is_refused(agent: Agent) -> None:
    asked = {"smm.scz/model": "small:1", "smm.scz/model.b": "absent", "smm.scz/path.b": "/models/b/deep"}
    ran = agent.run(agent.scene.token(), annotations=asked)
    refused_inside(ran, "ModelUnknown", ("/models/b/deep", "/models/small"))


def test_files_of_the_image_at_the_destination_are_hidden_by_the_refusal(agent: Agent) -> None:
    def plant(bundle: Path) -> None:
        (bundle / "rootfs/models/small").mkdir(parents=True)
        (bundle / "rootfs/models/small/weights.safetensors").write_text("not the owner's")

    refused_inside(agent.run(None, change=plant), "TokenMissing")


def test_a_configuration_that_cannot_be_used_is_refused_inside(agent: Agent) -> None:
    agent.scene.write_config(guest="[guest]\nunheard_of = 1")
    ran = agent.run(None)
    killed(ran, "ConfigInvalid")  # which agent may call is unknown then: its default is not there


def test_a_store_that_the_host_changed_is_refused_before_it_is_decrypted(agent: Agent) -> None:
    blobs = [path for path in agent.scene.store.rglob("blobs/sha256/*") if path.stat().st_size > 1 << 20]
    changed = min(blobs, key=lambda path: path.stat().st_size)
    data, mode = changed.read_bytes(), changed.stat().st_mode & 0o777
    changed.chmod(0o600)
    changed.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    try:
        ran = agent.run(agent.scene.token(), annotations={"smm.scz/model": "small:1"})
        other = agent.run(agent.scene.token("second"), annotations={"smm.scz/model": "other:1"})
    finally:
        changed.write_bytes(data)
        changed.chmod(mode)
    results = {"small": ran, "other": other}
    refused = [name for name, each in results.items() if "REFUSED.txt" in each.stdout]
    assert len(refused) == 1
    refused_inside(results[refused[0]], "BundleMismatch", (f"/models/{refused[0]}",))


def test_another_boot_state_is_refused_by_the_tpm_and_the_workload_is_told(agent: Agent) -> None:
    agent.scene.tpm.extend(9, "another kernel")
    try:
        refused_inside(agent.run(agent.scene.token()), "BootStateRefused")
    finally:
        agent.scene.tpm.restart()
        agent.scene.tpm.measure_boot()


# --- in time ----------------------------------------------------------------------------------------------------------


def test_the_budget_ends_before_the_agents_patience_and_the_workload_is_told(agent: Agent) -> None:
    agent.configure(timeout_seconds=4)
    agent.scene.tpm.pause()
    try:
        ran = agent.run(agent.scene.token())
    finally:
        agent.scene.tpm.resume()
    refused_inside(ran, "Terminated")
    assert "timeout_seconds" in ran.stdout


def test_the_agents_own_ten_seconds_are_enough_to_refuse(agent: Agent) -> None:
    agent.scene.write_config(guest=f'[guest]\nagent = "{agent.executable}"')  # the budget that it has by itself
    token = agent.scene.token()
    agent.scene.tpm.pause()
    try:
        ran = agent.run(token, hook_seconds=10)
    finally:
        agent.scene.tpm.resume()
    if ran.ran:
        refused_inside(ran, "Terminated")
    else:  # on a machine too busy to tell it in time
        killed(ran, "Terminated")


def _meanwhile(
    agent: Agent, bundle: Path, choose: Callable[[list[int]], int]
) -> tuple[subprocess.Popen[str], str, str]:
    """Start a container while the TPM does not answer; kill one of the hook's processes; the rest goes on."""
    agent.scene.tpm.pause()
    try:
        with agent.start(bundle) as process:
            deadline = time.monotonic() + 120
            while len(hook_processes(agent)) < 4 and time.monotonic() < deadline:  # supervisor, worker, attacher, TPM's
                time.sleep(0.02)
            os.kill(choose(hook_processes(agent)), signal.SIGKILL)
            threading.Timer(1.0, agent.scene.tpm.resume).start()
            stdout, stderr = process.communicate(timeout=240)
            return process, stdout, stderr
    finally:
        agent.scene.tpm.resume()


def test_a_worker_that_dies_is_a_refusal_inside(agent: Agent) -> None:
    with agent.bundle(token=agent.scene.token(), annotations={"smm.scz/model": "small:1"}) as bundle:
        process, stdout, stderr = _meanwhile(agent, bundle, lambda pids: pids[1])
        ran = Ran(process.returncode, stdout, stderr, (bundle / "trace/ran").exists())
    refused_inside(ran, "Terminated")


def test_a_hook_that_is_killed_leaves_no_model(agent: Agent) -> None:
    with agent.bundle(token=agent.scene.token(), annotations={"smm.scz/model": "small:1"}) as bundle:
        process, stdout, _ = _meanwhile(agent, bundle, lambda pids: pids[0])
    assert process.returncode != 0  # grep finds no mount
    assert "/models/" not in stdout


@pytest.mark.parametrize("delay", [0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2])
def test_a_kill_at_any_moment_leaves_a_whole_model_a_text_or_nothing(agent: Agent, delay: float) -> None:
    command = "cd /models/small && for file in $(find . -type f | sort); do sha256sum $file; done"
    asked = {"smm.scz/model": "small:1"}
    with agent.bundle(token=agent.scene.token(), annotations=asked, command=command) as bundle:
        with agent.start(bundle) as process:
            time.sleep(delay)
            for pid in hook_processes(agent)[-1:]:  # the youngest: it is the one that works
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            stdout, stderr = process.communicate(timeout=240)
        ran = (bundle / "trace/ran").exists()
    found = {line.split()[1].removeprefix("./"): line.split()[0] for line in stdout.splitlines()}
    whole = {name: hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}
    delivered = {name: found.get(name) for name in whole} == whole and set(found) == {*whole, "model.json"}
    assert delivered or not ran or set(found) <= {"REFUSED.txt"}, (stdout, stderr)
    assert ran or "code" in stderr, stderr


# --- what cannot be told ----------------------------------------------------------------------------------------------


def test_an_annotation_that_cannot_be_read_kills_the_workload(agent: Agent) -> None:
    killed(agent.run(None, annotations={"smm.scz/model": "small:1", "smm.scz/modle": "x"}), "AnnotationInvalid")


def test_a_destination_that_is_a_link_kills_the_workload(agent: Agent) -> None:
    def plant(bundle: Path) -> None:
        (bundle / "rootfs/models").symlink_to("/tmp")

    killed(agent.run(None, change=plant), "DestinationInvalid")


def test_a_destination_in_a_volume_kills_the_workload(agent: Agent) -> None:
    volume = agent.folder / "volume"
    volume.mkdir()
    mount = {"destination": "/models", "type": "bind", "source": str(volume), "options": ["bind"]}
    killed(agent.run(agent.scene.token(), mounts=(mount,)), "DestinationRefused")
    assert list(volume.iterdir()) == []


def test_a_container_without_a_mount_namespace_of_its_own_is_killed(agent: Agent) -> None:
    def join(bundle: Path) -> None:
        spec = json.loads((bundle / "config.json").read_text())
        spec["linux"]["namespaces"][0]["path"] = "/proc/1/ns/mnt"
        (bundle / "config.json").write_text(json.dumps(spec))

    killed(agent.run(agent.scene.token(), change=join), "HolderRefused")


def test_another_program_than_the_agent_gets_nothing(agent: Agent) -> None:
    other = stand_in.copy_interpreter(agent.folder / "other")
    ran = agent.run(agent.scene.token(), executable=other)
    killed(ran, "HolderRefused")
    assert "[guest]" in ran.stderr


def test_on_a_host_the_agent_is_no_runtime(agent: Agent) -> None:
    """The ordinary stage does not know it: guest mode is said by whoever wrote the command line, root."""
    script = agent.hooks / "prestart/scz-smm"
    text = script.read_text()
    script.write_text(text.replace(" guest-prestart", " prestart"))
    try:
        ran = agent.run(agent.scene.token())
    finally:
        script.write_text(text)
    assert "HolderRefused" in ran.stderr
    assert "/models/" not in ran.stdout


def test_a_process_that_is_not_the_callers_is_not_killed(agent: Agent) -> None:
    with (
        agent.bundle(token=None, annotations={"smm.scz/model": "small:1"}) as bundle,
        subprocess.Popen(["/bin/sh", "-c", "sleep 300 & echo $!; wait"], stdout=-1, text=True) as shell,
    ):
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        state = {"ociVersion": "1.1.0", "id": bundle.name, "status": "", "pid": pid, "bundle": str(bundle)}
        done = subprocess.run(
            [agent.hooks / "prestart/scz-smm", "prestart"],
            input=json.dumps({**state, "annotations": {"smm.scz/model": "small:1"}}),
            env={},
            capture_output=True,
            text=True,
            check=False,
        )
        still = Path(f"/proc/{pid}").exists() and shell.poll() is None
        os.kill(pid, signal.SIGKILL)
    assert done.returncode == CODES["HolderRefused"], done
    assert still
