"""Guest mode: who may call, what a refused workload finds, and that it ends where it can be told nothing; as root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook import guest
from oci_hook.delivery.agent import REFUSAL_FILE, AgentInit, refusal_text, tell_inside
from oci_hook.delivery.holder import Agent, ContainerView
from oci_hook.delivery.recognise import hold
from oci_hook.errors import (
    BootStateRefused,
    HolderGone,
    HolderRefused,
    InternalError,
    SczError,
    Terminated,
    TokenMissing,
)
from oci_hook.invocation import Invocation, parse_invocation
from oci_hook.oci.state import State

MINE = Agent(os.getpid(), os.path.realpath(sys.executable))


class Workload:
    """A process of ours that waits in a mount namespace of its own, its root bound onto itself, as before a pivot."""

    def __init__(self, folder: Path) -> None:
        self.bundle, self.rootfs = folder, folder / "rootfs"
        self.rootfs.mkdir()
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "root": {"path": "rootfs"},
                    "annotations": {"smm.scz/model": "m:1"},
                    "linux": {"namespaces": [{"type": "mount"}]},
                }
            )
        )
        script = f"mount --bind {self.rootfs} {self.rootfs} && echo ready && exec sleep 300"
        self.process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    @property
    def state(self) -> State:
        return State("c1", self.process.pid, str(self.bundle), "creating", {"smm.scz/model": "m:1"})

    def view(self, agent: Agent | None = MINE) -> ContainerView:
        return ContainerView(
            container_id="c1",
            pid=self.process.pid,
            bundle=str(self.bundle),
            root_path=str(self.rootfs),
            tmpfs_destinations=frozenset(),
            uid_offset=1000,
            gid_offset=1001,
            mount_namespace_joined=False,
            agent=agent,
        )

    def inside(self, path: str) -> Path:
        """A path of the container's, through its namespace."""
        return Path(f"/proc/{self.process.pid}/root{self.rootfs}{path}")

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def workload(tmp_path: Path) -> Iterator[Workload]:
    made = Workload(tmp_path)
    yield made
    made.close()


class TestRecognition:
    def test_the_agent_by_its_executable(self, workload: Workload) -> None:
        with hold(workload.view(), runtime_directory="", timeout_seconds=1) as holder:
            assert isinstance(holder, AgentInit)
            assert holder.runtime == "kata"
            holder.verify_unchanged()

    @pytest.mark.parametrize("executable", ["/bin/sh", "/absent", "/", "relative\0"])
    def test_another_program(self, workload: Workload, executable: str) -> None:
        with pytest.raises(HolderRefused, match="agent"):
            hold(workload.view(Agent(os.getpid(), executable)), runtime_directory="", timeout_seconds=1)

    def test_a_name_alone_is_nothing(self, workload: Workload, tmp_path: Path) -> None:
        copy = tmp_path / "python"
        copy.write_bytes(Path(MINE.executable).read_bytes())
        with pytest.raises(HolderRefused, match="not by the agent"):
            hold(workload.view(Agent(os.getpid(), str(copy))), runtime_directory="", timeout_seconds=1)

    def test_a_process_that_the_agent_did_not_make(self, workload: Workload) -> None:
        with subprocess.Popen([MINE.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            with pytest.raises(HolderRefused, match="not made by the agent"):
                hold(workload.view(Agent(other.pid, MINE.executable)), runtime_directory="", timeout_seconds=1)
            other.kill()

    def test_a_process_in_the_guests_own_mount_namespace(self, workload: Workload) -> None:
        with subprocess.Popen(["sleep", "300"]) as bare:
            view = ContainerView("c", bare.pid, str(workload.bundle), "rootfs", frozenset(), 0, 0, False, agent=MINE)
            with pytest.raises(HolderRefused, match="own mount namespace"):
                hold(view, runtime_directory="", timeout_seconds=1)
            bare.kill()

    def test_only_the_command_line_says_that_this_is_a_guest(self) -> None:
        for stage in ("guest-prestart", "guest-poststop"):
            assert parse_invocation(["--config", "/c", stage]) is not None
        assert parse_invocation(["guest"]) is None


class TestTelling:
    def test_code_reason_and_remedy(self) -> None:
        text = refusal_text(BootStateRefused("PCR 9 differs"))
        assert text.splitlines()[1:] == [
            "code: 35",
            f"reason: BootStateRefused ({BootStateRefused.summary})",
            "message: 'PCR 9 differs'",
            f"remedy: {BootStateRefused.remedy!r}",
        ]

    def test_a_message_cannot_forge_a_line(self) -> None:
        text = refusal_text(TokenMissing("x\ncode: 0", remedy="y\nremedy: none"))
        assert [line.partition(":")[0] for line in text.splitlines()[1:]] == ["code", "reason", "message", "remedy"]

    def test_a_read_only_text_for_the_containers_user_and_nothing_else(self, workload: Workload) -> None:
        with hold(workload.view(), runtime_directory="", timeout_seconds=30) as holder:
            tell_inside(holder, workload.view(), ["/models/a", "/b"], "no\n", timeout_seconds=30)
        for path in ("/models/a", "/b"):
            (file,) = workload.inside(path).iterdir()
            assert (file.name, file.read_text()) == (REFUSAL_FILE, "no\n")
            assert (file.stat().st_uid, file.stat().st_gid, file.stat().st_mode & 0o777) == (1000, 1001, 0o444)
            assert workload.inside(path).stat().st_mode & 0o777 == 0o555
            with pytest.raises(OSError, match="Read-only"):
                file.unlink()
        assert [str(path) for path in (workload.rootfs / "models/a").iterdir()] == []  # not on the host's side

    def test_at_every_destination_or_at_none(self, workload: Workload) -> None:
        (workload.rootfs / "link").symlink_to("/tmp")
        with (
            hold(workload.view(), runtime_directory="", timeout_seconds=30) as holder,
            pytest.raises(SczError),
        ):
            tell_inside(holder, workload.view(), ["/models", "/link/m"], "no\n", timeout_seconds=30)
        assert list(workload.inside("/models").iterdir()) == []


class TestSupervision:
    @pytest.fixture(autouse=True)
    def this_process_is_the_agent(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Supervise here: the hook's parent is us, not pytest's."""
        config = tmp_path / "config.toml"
        config.write_text(
            f'[guest]\nagent = "{MINE.executable}"\ntimeout_seconds = 40\n[paths]\nruntime = "{tmp_path}/run"\n'
        )
        self.invocation = Invocation("guest-prestart", config_file=str(config))
        monkeypatch.setattr(os, "getppid", lambda: MINE.pid if os.getpid() == MINE.pid else _parent())
        monkeypatch.setattr(guest, "_seconds_left", lambda budget: self.seconds if self.seconds else budget)
        self.seconds = 0.0

    def refused(self, workload: Workload, error: type[SczError], deliver: Callable[[Agent], None]) -> None:
        with pytest.raises(error):
            guest.supervise(workload.state, self.invocation, deliver)

    def told(self, workload: Workload) -> str:
        assert workload.process.poll() is None
        (file,) = workload.inside("/models/m").iterdir()
        return file.read_text()

    def killed(self, workload: Workload) -> None:
        assert workload.process.wait(30) == -signal.SIGKILL

    def test_what_succeeds_is_left_alone(self, workload: Workload) -> None:
        guest.supervise(workload.state, self.invocation, lambda _agent: None)
        assert not (workload.rootfs / "models").exists()
        assert workload.process.poll() is None

    def test_a_reason_is_told(self, workload: Workload) -> None:
        def refuse(_agent: Agent) -> None:
            raise TokenMissing("there is none")

        self.refused(workload, TokenMissing, refuse)
        assert "code: 18\n" in self.told(workload)

    def test_what_nobody_foresaw_is_told_without_its_words(self, workload: Workload) -> None:
        def fail(_agent: Agent) -> None:
            raise ValueError("a secret")

        self.refused(workload, InternalError, fail)
        assert "code: 70\n" in self.told(workload)
        assert "secret" not in self.told(workload)

    def test_the_time_is_up(self, workload: Workload) -> None:
        self.seconds = 0.2
        self.refused(workload, Terminated, lambda _agent: time.sleep(300))
        assert "code: 71\n" in self.told(workload)

    def test_a_worker_that_is_killed(self, workload: Workload) -> None:
        self.refused(workload, Terminated, lambda _agent: os.kill(os.getpid(), signal.SIGKILL))
        assert "code: 71\n" in self.told(workload)

    def test_once_models_were_being_attached_nothing_is_put_over_them(self, workload: Workload) -> None:
        def half(agent: Agent) -> None:
            os.write(agent.announce_fd, b"a")
            raise HolderGone("no answer")

        self.refused(workload, HolderGone, half)
        self.killed(workload)

    def test_a_workload_that_cannot_be_told_is_killed(self, workload: Workload) -> None:
        (workload.bundle / "config.json").write_text("{")

        def refuse(_agent: Agent) -> None:
            raise TokenMissing("there is none")

        self.refused(workload, TokenMissing, refuse)
        self.killed(workload)

    def test_another_parents_process_is_not(self, workload: Workload) -> None:
        with subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
            assert shell.stdout is not None
            pid = int(shell.stdout.readline())
            state = State("c1", pid, str(workload.bundle), "", {})

            def refuse(_agent: Agent) -> None:
                raise TokenMissing("there is none")

            with pytest.raises(TokenMissing):
                guest.supervise(state, self.invocation, refuse)
            os.kill(pid, 0)
            os.kill(pid, signal.SIGKILL)


def _parent() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[1])


def test_the_time_runs_from_the_making_of_the_process() -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(Path(guest.__file__).parents[1])!r}); time.sleep(1.5); "
        "from oci_hook.guest import _seconds_left; print(_seconds_left(100.0), _seconds_left(1.0))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    left, nothing = (float(word) for word in ran.stdout.split())
    assert 0 < left <= 98.6
    assert nothing == 0
