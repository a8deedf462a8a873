"""`sczctl ps` and `sczctl release` on real containers: the model goes, its memory comes back, the container goes on.

The container is a shell that obeys the test. What must stay, stays: whoever uses a model is named, and mounts of the
container's own are not touched. That the memory is free is the kernel's word (inotify's IN_UNMOUNT), asked for a second
time here.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_hook.audit import AuditLog
from oci_hook.linux import syscalls
from tests.integration.conftest import FILES
from tests.scene import ISSUER, SUBJECT, TOKEN_PATH, Scene

USERNS = ("--uidmap", "0:200000:65536", "--gidmap", "0:200000:65536")
MODEL = "/models/small"


class Shell:
    """A container with the model `small:1`, whose only process is a shell that does what it is told."""

    def __init__(self, scene: Scene, process: subprocess.Popen[str], pid: int, container_id: str) -> None:
        self.scene, self.process, self.pid, self.id = scene, process, pid, container_id

    def do(self, command: str) -> str:
        """Run a command in the shell itself; what it printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{{ {command}; }} 2>&1; echo end:$?\n")
        self.process.stdin.flush()
        printed = ""
        for line in self.process.stdout:
            if line.startswith("end:"):
                return printed
            printed += line
        raise AssertionError(f"the shell ended: {printed}")

    def release(self, *words: str) -> tuple[int, dict[str, Any]]:
        """`sczctl release --json` of the container; its exit code, and what it says of the one model."""
        until = time.monotonic() + 60  # other tests' file systems may have the number of one that is gone
        done = self.scene.sczctl("release", self.id, "--json", *words, check=False)
        while done.returncode == 5 and time.monotonic() < until:
            done = self.scene.sczctl("release", self.id, "--json", *words, check=False)
        assert done.returncode in (0, 3, 4), done.stderr
        (model,) = json.loads(done.stdout)["models"]
        return done.returncode, model

    def release_of_nothing(self) -> str:
        """What `release` says of a model that is gone; others' files may have its file system's number for a while."""
        until = time.monotonic() + 60
        state = self.release()[1]["state"]
        while state == "detached" and time.monotonic() < until:
            state = self.release()[1]["state"]
        return str(state)

    def mounted(self, path: str = MODEL) -> bool:
        """Whether the model is readable in the container."""
        return "model.json" in self.do(f"ls {path}")


@contextlib.contextmanager
def shell(scene: Scene, *options: str, runtime: str = "runc", token: str = "token") -> Iterator[Shell]:
    """Start one."""
    (before,) = ({row["container_id"] for row in ps(scene)},)
    words = ["--rm", "--interactive", "--annotation", "smm.scz/model=small:1", *options]
    words += ["--volume", f"{scene.token(token)}:{TOKEN_PATH}:ro", scene.image, "sh"]
    process = scene.podman.spawn(words, runtime=runtime)
    try:
        started = Shell(scene, process, 0, "")
        started.do("true")
        (row,) = [row for row in ps(scene) if row["container_id"] not in before]
        started.pid, started.id = row["pid"], row["container_id"]
        yield started
    finally:
        process.communicate(timeout=60)


def ps(scene: Scene) -> list[dict[str, Any]]:
    """`sczctl ps --json`."""
    return list(json.loads(scene.sczctl("ps", "--json").stdout))


@contextlib.contextmanager
def watching(pid: int, path: str = MODEL) -> Iterator[int]:
    """An inotify descriptor on the model's root as a process sees it."""
    watch = syscalls.inotify_init1()
    try:
        syscalls.inotify_add_watch(watch, f"/proc/{pid}/root{path}", syscalls.IN_DELETE_SELF)
        yield watch
    finally:
        os.close(watch)


def is_gone(watch: int) -> bool:
    """Whether the kernel has said that the file system is gone."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    return bool(poll.poll(0)) and bool(int.from_bytes(os.read(watch, 4096)[4:8], "little") & syscalls.IN_UNMOUNT)


def events(scene: Scene, container_id: str) -> list[dict[str, Any]]:
    """What the audit log has of a container."""
    return [each for each in AuditLog(str(scene.audit)).records() if each.get("container") == container_id]


@pytest.mark.parametrize("options", [(), USERNS], ids=["plain", "userns"])
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_the_memory_comes_back_and_the_container_goes_on(scene: Scene, runtime: str, options: tuple[str, ...]) -> None:
    with shell(scene, *options, runtime=runtime) as container:
        assert container.do(f"cp -r {MODEL} /tmp/loaded && ls /tmp/loaded").split()
        (row,) = ps(scene)
        (held,) = row["holds"]
        assert (held["model"], held["path"], row["runtime"]) == ("small:1", MODEL, runtime)
        assert held["memory_bytes"] >= sum(FILES.values())
        assert held["memory_bytes"] < sum(FILES.values()) + (64 << 10)
        lines = scene.sczctl("ps").stdout.splitlines()
        assert len(lines) == 2
        for word in (container.id[:12], "small:1", held["owner"][:8], held["manifest"][7:15], runtime, str(row["pid"])):
            assert word in lines[1]
        assert lines[1].endswith(f"{MODEL}  {SUBJECT} ({ISSUER})")
        assert container.release("--dry-run")[1]["state"] == "would-release"
        assert container.mounted()
        with watching(container.pid) as watch:
            assert not is_gone(watch)
            code, model = container.release()
            assert (code, model["state"], model["uses"]) == (0, "released", [])
            assert is_gone(watch)
        assert container.do(f"ls {MODEL}; cmp /tmp/loaded/config.json /tmp/loaded/config.json && echo on") == "on\n"
        assert ps(scene) == []
        again = scene.sczctl("release", container.id, check=False)
        assert (again.returncode, again.stdout) == (1, "")
        assert "holds no model any more" in again.stderr
    assert [each["event"] for each in events(scene, container.id)] == ["grant", "outcome", "released", "closed"]
    assert events(scene, container.id)[2]["model"] == "small"
    assert list((scene.runtime_directory / "containers").iterdir()) == []


def test_a_release_that_was_not_recorded_is_recorded_by_the_next(scene: Scene) -> None:
    """The audit record comes first: what ends `sczctl release` before it leaves a model that is not marked."""
    with shell(scene) as container:
        scene.audit.chmod(0o666)  # we do not write to a log that others could write
        try:
            failed = scene.sczctl("release", container.id, check=False)
        finally:
            scene.audit.chmod(0o600)
        assert failed.returncode == 65
        assert not container.mounted()
        assert [each["event"] for each in events(scene, container.id)] == ["grant", "outcome"]
        assert container.release_of_nothing() == "absent"
        assert scene.sczctl("release", container.id, check=False).returncode == 1
        assert [each["event"] for each in events(scene, container.id)] == ["grant", "outcome", "released"]


def test_a_restart_gives_the_model_anew(scene: Scene) -> None:
    token = scene.token("restart-token")
    words = ["--annotation", "smm.scz/model=small:1", "--volume", f"{token}:{TOKEN_PATH}:ro"]
    name = scene.podman.create([*words, scene.image, "sh", "-c", f"ls {MODEL}; exec sleep 600"])
    try:
        scene.podman.start_container(name)
        assert scene.sczctl("release", name[:12]).returncode == 0
        assert ps(scene) == []
        scene.podman.call("restart", "--time=0", name)
        (row,) = ps(scene)
        assert [each["model"] for each in row["holds"]] == ["small:1"]
        assert scene.podman.call("logs", name).stdout.count("model.json") == 2
    finally:
        scene.podman.rm(name)
    assert ps(scene) == []


def test_who_uses_it_is_named_and_it_stays(scene: Scene) -> None:
    uses = {
        "open file": ("exec 3<$MODEL/config.json", "exec 3<&-", f"{MODEL}/config.json"),
        "working directory": ("cd $MODEL/shards", "cd /", f"{MODEL}/shards"),
    }
    with shell(scene) as container:
        for what, (use, end, path) in uses.items():
            container.do(use.replace("$MODEL", MODEL))
            code, model = container.release()
            assert (code, model["state"]) == (3, "busy")
            assert model["uses"] == [{"pid": container.pid, "command": "sh", "what": what, "path": path}]
            text = scene.sczctl("release", container.id, check=False)
            assert (text.returncode, text.stderr) == (3, "")
            assert f"  {container.pid} sh: {what} {path}\n" in text.stdout
            assert container.mounted()
            container.do(end)
        file = os.open(f"/proc/{container.pid}/root{MODEL}/config.json", os.O_RDONLY)
        with mmap.mmap(file, 0, prot=mmap.PROT_READ) as mapped:
            os.close(file)
            with watching(container.pid) as watch:
                code, model = container.release()
                assert (code, model["state"]) == (3, "busy")
                ours = [use for use in model["uses"] if use["pid"] == os.getpid()]
                assert {use["what"] for use in ours} >= {"mapping"}
                before = mapped[:]
                code, model = container.release("--lazy")
                assert (code, model["state"]) == (4, "detached")
                assert {use["pid"] for use in model["uses"]} == {os.getpid()}
                assert not container.mounted()
                assert ps(scene) == []
                assert (mapped[:], is_gone(watch)) == (before, False)
                mapped.close()
                assert is_gone(watch)
    assert [each.get("state") for each in events(scene, container.id)][2:] == ["detached", None]


CAN_MOUNT = ("--cap-add", "SYS_ADMIN", "--security-opt", "apparmor=unconfined", "--security-opt", "seccomp=unconfined")


def test_a_container_that_mounts(scene: Scene) -> None:
    with shell(scene, *CAN_MOUNT) as container:
        # 1. Something else over the path: it stays, and the model below it.
        assert container.do(f"mount -t tmpfs other {MODEL} && echo theirs > {MODEL}/file") == ""
        code, model = container.release("--lazy")
        assert (code, model["state"]) == (3, "covered")
        assert container.do(f"cat {MODEL}/file") == "theirs\n"
        container.do(f"umount {MODEL}")
        # 2. Something else in it.
        container.do(f"mount -t tmpfs inner {MODEL}/shards")
        assert container.release("--lazy")[1]["state"] == "covered"
        container.do(f"umount {MODEL}/shards")
        # 3. A copy of the mount, here and in a namespace of its own.
        container.do(f"mkdir /copy && mount --bind {MODEL} /copy")
        code, model = container.release()
        assert (code, model["state"]) == (3, "busy")
        assert [(use["what"], use["path"]) for use in model["uses"]] == [("mount", "/copy")]
        container.do("umount /copy")
        container.do("unshare -m sleep 600 & until grep -q sleep /proc/$!/comm; do sleep 0.05; done")
        code, model = container.release()
        assert (code, model["state"]) == (3, "busy")
        assert [(use["what"], use["path"], use["command"]) for use in model["uses"]] == [("mount", MODEL, "sleep")]
        assert container.mounted()
        container.do("kill $!; wait")
        # 4. Another directory above it.
        container.do("mv /models /elsewhere && mkdir -p /models/small && echo bait > /models/small/file")
        assert container.mounted("/elsewhere/small")
        done = scene.sczctl("release", container.id)
        assert "small:1 at /models/small (now at /elsewhere/small): released" in done.stdout
        assert container.do("ls /elsewhere/small; cat /models/small/file") == "bait\n"
        assert ps(scene) == []


def test_a_container_that_has_unmounted_it_itself(scene: Scene) -> None:
    with shell(scene, *CAN_MOUNT) as container:
        container.do(f"mkdir -p /mnt && mount --bind {MODEL} /mnt && umount {MODEL}")
        assert ps(scene)[0]["holds"][0]["memory_bytes"] is None
        code, model = container.release("--lazy")
        assert (code, model["state"]) == (3, "busy")
        assert [(use["what"], use["path"]) for use in model["uses"]] == [("mount", "/mnt")]
        container.do("exec 3< /mnt/config.json && umount -l /mnt")
        code, model = container.release()
        assert (code, model["state"]) == (4, "detached")
        assert [(use["pid"], use["what"]) for use in model["uses"]] == [(container.pid, "open file")]
        assert ps(scene)
        container.do("exec 3<&-")
        until = time.monotonic() + 60  # other tests have records and file systems of their own
        code, model = container.release()
        while code and container.pid not in {use["pid"] for use in model["uses"]} and time.monotonic() < until:
            time.sleep(0.2)
            code, model = container.release()
        assert (code, model["state"], model["uses"]) == (0, "absent", [])
        assert ps(scene) == []
    assert [each.get("state") for each in events(scene, container.id)][2:] == ["absent", None]


def test_records_that_lie(scene: Scene) -> None:
    """Records are root's alone; one that lies all the same leads to no other mount."""
    with shell(scene) as one, shell(scene, token="token-2") as two:
        folder = scene.runtime_directory / "containers"
        paths = {json.loads(path.read_text())["container_id"]: path for path in folder.glob("*.json")}
        true = {name: path.read_text() for name, path in paths.items()}
        first, second = (json.loads(true[each.id]) for each in (one, two))

        def forged(**changes: object) -> subprocess.CompletedProcess[str]:
            paths[one.id].write_text(json.dumps(first | changes))
            done = scene.sczctl("release", one.id, "--lazy", "--json", check=False)
            assert one.mounted()
            assert two.mounted()
            return done

        own = os.stat("/proc/self/ns/mnt")
        gone = [
            {"keeper": second["keeper"]},  # another's process
            {"keeper": [first["keeper"][0], 1]},  # the pid was used again
            {"keeper": [2**22 + 1, 1]},
            {"keeper": second["keeper"], "namespace": [own.st_dev, own.st_ino]},
        ]
        for changes in gone:
            assert forged(**changes).returncode == 66
        assert forged(keeper=[0, 0]).returncode == 25
        # The mounts of another container, which it does not have: that one has them still.
        models = json.loads(forged(held=second["held"]).stdout)["models"]
        assert [(model["state"], model["shared_with"]) for model in models] == [("shared", [two.id])]
        # Another mount of the container's own with the right number.
        line = one.do("grep ' /proc ' /proc/self/mountinfo").split()
        other = {"mount_id": int(line[0]), "device": line[2]}
        for change, state in (
            ({"mount_id": other["mount_id"]}, "busy"),
            ({"device": line[2]}, "absent"),
            (other, "absent"),
        ):
            models = json.loads(forged(held=[first["held"][0] | change]).stdout)["models"]
            assert [model["state"] for model in models] == [state]
        assert one.do("grep -c ' /proc ' /proc/self/mountinfo") == "1\n"
        assert json.loads(forged(held=[first["held"][0] | {"fsid": 1}]).stdout)["models"][0]["state"] == "covered"
        assert forged(pid=1, start_time=7).returncode == 1
        paths[one.id].write_text(true[one.id])
        paths[one.id].chmod(0o666)
        assert scene.sczctl("release", one.id, check=False).returncode == 1
        paths[one.id].chmod(0o600)
        assert (one.mounted(), two.mounted()) == (True, True)
        assert scene.sczctl("release", one.id, "other", check=False).returncode == 1
        assert scene.sczctl("release", one.id, "small:1").returncode == 0
        assert (one.mounted(), two.mounted()) == (False, True)
        os.kill(two.pid, signal.SIGKILL)
        two.process.wait(60)
        assert scene.sczctl("release", two.id, check=False).returncode == 1


def test_a_record_of_an_earlier_version(scene: Scene) -> None:
    with shell(scene) as container:
        (path,) = (scene.runtime_directory / "containers").glob("*.json")
        record = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in record.items() if k not in NEW}))
        assert [each["memory_bytes"] for each in ps(scene)[0]["holds"]] == [None]
        assert "?" in scene.sczctl("ps").stdout
        done = scene.sczctl("release", container.id, check=False)
        assert (done.returncode, "earlier version" in done.stderr) == (25, True)
        assert container.mounted()


NEW = ("issuer", "runtime", "keeper", "namespace", "held")


def test_nobody_to_release(scene: Scene) -> None:
    done = scene.sczctl("release", "0123", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "sczctl ps" in done.stderr
    assert Path(scene.runtime_directory).is_dir()
