"""`kata-runtime` for the tests: a runtime's command line before a `Sandbox`; what it stands for is written there.

    runtime = write_kata_runtime(folder, kernel, initramfs, kind="9p")      # an executable that engines and shims call

A container is one virtual machine. Its process on the host, whose pid engines see, holds the sandbox, hands on what the
workload prints, and ends with the workload's exit code. Hooks are run as Kata runs them, with what matters to them:

* their parent's executable is called `kata-runtime`; a state has neither annotations nor status, and no ociVersion;
* as 1.x: prestart before there is a sandbox, in `create`, whose own thread the state names; poststop in `delete`;
* as 2 and 3 (`hypervisor=True`): prestart and createRuntime when the hypervisor runs, which the state names, and before
  the files are shared; in a mount namespace of the shim's own;
* a failing prestart hook ends `create` with exit code 1, and poststop is not run then; 2 and 3 go on if a poststop hook
  fails, 1.x reports it.

Verbs: create, start, state, kill, delete; also run, which is create, start and waiting. Of config.json it reads root,
process.args, mounts of the type bind, and hooks. Kata 2 and 3 have no such command line: it stands for their shim.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.engines import unmount_below
from tests.guests import Kernel
from tests.sandboxes import Bind, Contained, Sandbox

_END_SECONDS = 60
_CALL_SECONDS = 600
_WORKLOAD_SECONDS = 3600
_CLONE_NEWNS, _MS_REC_SLAVE = 0x20000, 1 << 14 | 1 << 19
_SCRIPT = '#!/bin/sh\nexec "{interpreter}" -I "{program}" "{settings}" "$@"\n'


@dataclass(frozen=True, slots=True)
class Settings:
    """What `write_kata_runtime` was told."""

    release: str
    image: str
    initramfs: str
    kind: str
    hypervisor: bool


def write_kata_runtime(
    folder: Path, kernel: Kernel, initramfs: Path, *, kind: str, hypervisor: bool = False, name: str = "kata-runtime"
) -> Path:
    """Write the runtime below a new folder; returns its executable.

    Args:
        folder: New.
        kernel: The guests' kernel.
        initramfs: Of `sandboxes.write_agent`, for this kind.
        kind: Of the share: one of `sandboxes.KINDS`.
        hypervisor: Whether hooks are run as 2 and 3 run them.
        name: Of the executable, and of the one of the processes.
    """
    (folder / "libexec").mkdir(parents=True)
    interpreter, program, settings = folder / "libexec" / name, folder / name, folder / "settings.json"
    # A process is told by its executable: a copy of the interpreter has the name.
    shutil.copy(os.path.realpath(sys.executable), interpreter)
    settings.write_text(
        json.dumps(
            asdict(Settings(kernel.release, str(kernel.plain or kernel.image), str(initramfs), kind, hypervisor))
        )
    )
    words = {"interpreter": interpreter, "program": Path(__file__).resolve(), "settings": settings}
    program.write_text(_SCRIPT.format(**words))
    program.chmod(0o755)
    return program


class Caller:
    """Calls a runtime as an engine does, with a state folder of its own, below a monitor (conmon's name) for each call.

    The monitor of a `create` stays until `clear`, as an engine's stays with its container: where a state names a thread
    of the runtime, as Kata 1's does, nothing else lives as long.

    Args:
        runtime: The executable: of `write_kata_runtime`, or of a shim before it.
        folder: For the state, and for what was said.
    """

    def __init__(self, runtime: Path, folder: Path) -> None:
        self.runtime, self.folder = runtime, folder
        self.state = folder / "state"
        self._monitor = folder / "conmon"
        if not self._monitor.exists():
            shutil.copy(os.path.realpath("/bin/sh"), self._monitor)
        self._staying: list[subprocess.Popen[bytes]] = []

    def __call__(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """One call, to its end; standard error is in standard output."""
        command = [str(self.runtime), "--root", str(self.state), *map(str, words)]
        # A container keeps what its `create` was given: what only asks about it has a file of its own.
        answer = self.folder / ("answer" if words[0] == "state" else "said")
        answer.write_text("")
        monitor = subprocess.Popen(  # a container keeps what it is given: no pipe
            [self._monitor, "-c", '"$@" </dev/null >>"$0" 2>&1; echo $?; read -r _', answer, *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._staying.append(monitor)
        assert monitor.stdout is not None
        readable, _, _ = select.select([monitor.stdout], [], [], _CALL_SECONDS)
        assert readable, f"{command} has not ended"
        code = int(monitor.stdout.readline())
        if words[0] != "create":
            self._end(self._staying.pop())
        return subprocess.CompletedProcess(command, code, answer.read_text())

    @staticmethod
    def _end(monitor: subprocess.Popen[bytes]) -> None:
        for stream in (monitor.stdin, monitor.stdout):
            assert stream is not None
            stream.close()
        monitor.wait(_END_SECONDS)

    def said(self) -> str:
        """What the last call that changed something said, and what its container has printed since."""
        return (self.folder / "said").read_text()

    def status(self, name: str) -> str:
        """The runtime's own word for it."""
        return str(json.loads(self("state", name).stdout)["status"])

    def clear(self) -> None:
        """Delete what is left of its containers."""
        for folder in self.state.glob("*"):
            self("delete", "--force", folder.name)
        while self._staying:
            self._end(self._staying.pop())


# --- one container ----------------------------------------------------------------------------------------------------


class Container:
    """A container's folder below `--root`: what the verbs know of it."""

    def __init__(self, root: Path, name: str, settings: Settings) -> None:
        self.folder, self.name, self.settings = root / name, name, settings
        self.socket = self.folder / "socket"

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def create(self, bundle: Path, pid_file: str) -> int:
        """Make the sandbox; returns the pid of its process."""
        spec = json.loads((bundle / "config.json").read_text())
        self.folder.mkdir(parents=True)
        try:
            if not self.settings.hypervisor:
                run_hooks(spec, "prestart", self.name, bundle, threading.get_native_id())
            pid = self._fork(bundle, spec)
            self._write({"pid": pid, "start": start_time(pid), "bundle": str(bundle)})
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        if pid_file:
            Path(pid_file).write_text(str(pid))
        return pid

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))
            client.recv(1)
        (self.folder / "started").touch()
        run_hooks(self._spec(), "poststart", self.name, self._bundle, threading.get_native_id())

    def state(self) -> dict[str, object]:
        status = "stopped" if not self._alive() else "running" if (self.folder / "started").exists() else "created"
        known = self._read()
        pid = known["pid"] if status != "stopped" else 0
        return {"ociVersion": "1.0.2", "id": self.name, "status": status, "pid": pid, "bundle": known["bundle"]}

    def kill(self, number: int) -> None:
        if not self._alive():
            raise SystemExit("no such process")
        if number in (signal.SIGKILL, signal.SIGTERM):
            os.kill(self._read()["pid"], signal.SIGTERM)  # so that it takes its sandbox away

    def delete(self, *, force: bool) -> None:
        if not self.folder.exists():
            raise SystemExit(0 if force else "container does not exist")
        if self._alive() and not force and (self.folder / "started").exists():
            raise SystemExit("container still running, should be stopped")
        self._end()
        spec, bundle = self._spec(), self._bundle
        unmount_below(self.folder)
        shutil.rmtree(self.folder)
        if not self.settings.hypervisor:
            self._stopped(spec, bundle)
        elif not succeeds(lambda: self._stopped(spec, bundle)):
            print("a poststop hook failed, and the container is gone", file=sys.stderr)

    def _stopped(self, spec: Mapping[str, Any], bundle: Path) -> None:
        if self.settings.hypervisor:
            leave_mounts()
        run_hooks(spec, "poststop", self.name, bundle, threading.get_native_id())

    # --- its process --------------------------------------------------------------------------------------------------

    def _fork(self, bundle: Path, spec: Mapping[str, Any]) -> int:
        """Start the process that holds the sandbox; returns its pid when it is ready."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            os.setsid()
            os._exit(self._hold(bundle, spec, writing))
        os.close(writing)
        with open(reading, "rb") as stream:
            said = stream.read().decode(errors="replace")
        if said != "ready":
            os.waitpid(pid, 0)
            raise SystemExit(said or "the sandbox ended")
        return pid

    def _hold(self, bundle: Path, spec: Mapping[str, Any], ready: int) -> int:
        def leave(number: int, _frame: object) -> None:
            raise SystemExit(128 + number)

        try:
            signal.signal(signal.SIGTERM, leave)
            with contextlib.ExitStack() as stack:
                return self._serve(bundle, spec, ready, stack)
        except SystemExit as leaving:
            if not isinstance(leaving.code, int):
                os.write(ready, str(leaving.code).encode())
            return leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(ready, traceback.format_exc().encode())
            return 1

    def _serve(self, bundle: Path, spec: Mapping[str, Any], ready: int, stack: contextlib.ExitStack) -> int:
        """Make sandbox and container, wait for `start`, and hand on what the workload prints until it ends."""
        settings = self.settings
        if settings.hypervisor:
            leave_mounts()
        kernel = Kernel(settings.release, Path(settings.image), {})
        made = Sandbox(self.folder / "sandbox", kernel, Path(settings.initramfs), settings.kind)
        sandbox = stack.enter_context(made)
        if settings.hypervisor:
            for stage in ("prestart", "createRuntime"):
                run_hooks(spec, stage, self.name, bundle, sandbox.guest.pid)
        sandbox.create(self.name, contained(bundle, spec))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self.socket))
        listener.listen()
        os.write(ready, b"ready")
        os.close(ready)
        connection, _ = listener.accept()
        seen = len(sandbox.guest.console)
        sandbox.start(self.name, spec["process"]["args"])
        connection.close()
        return self._hand_on(sandbox, seen)

    def _hand_on(self, sandbox: Sandbox, seen: int) -> int:
        mark = f"{self.name}: "
        deadline = time.monotonic() + _WORKLOAD_SECONDS
        while time.monotonic() < deadline:
            while seen < len(sandbox.guest.console):
                line = sandbox.guest.console[seen]
                seen += 1
                if line.startswith(f"{mark}ended "):
                    return int(line.rpartition(" ")[2])
                if line.startswith(mark):
                    os.write(1, line.removeprefix(mark).encode() + b"\n")
            sandbox.guest.wait_for(f"^{mark}", _WORKLOAD_SECONDS)
        return 1

    def _end(self) -> None:
        """End the process, in order or not."""
        deadline = time.monotonic() + _END_SECONDS
        number = signal.SIGTERM
        while self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._read()["pid"], number)
            if time.monotonic() > deadline:
                number = signal.SIGKILL
            time.sleep(0.1)

    # --- what is remembered -------------------------------------------------------------------------------------------

    def _write(self, known: Mapping[str, object]) -> None:
        (self.folder / "known.json").write_text(json.dumps(known))

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "known.json").read_text()))
        except FileNotFoundError:
            raise SystemExit(f"container {self.name} does not exist") from None

    @property
    def _bundle(self) -> Path:
        return Path(self._read()["bundle"])

    def _spec(self) -> dict[str, Any]:
        return dict(json.loads((self._bundle / "config.json").read_text()))

    def _alive(self) -> bool:
        known = self._read()
        return start_time(known["pid"]) == known["start"]


def contained(bundle: Path, spec: Mapping[str, Any]) -> Contained:
    """A container's root file system and bind entries, by its config.json; without those that Kata makes itself."""
    return Contained(
        bundle / spec["root"]["path"],
        [
            Bind(Path(mount["source"]), mount["destination"], "ro" in mount.get("options", ()))
            for mount in spec.get("mounts", ())
            if mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options", ()))
            if mount["destination"] != "/dev/shm" and not mount["source"].startswith(("/proc", "/sys"))
        ],
    )


def run_hooks(spec: Mapping[str, Any], stage: str, name: str, bundle: Path, pid: int) -> None:
    """The hooks of a stage, one after the other.

    Raises:
        SystemExit: One failed.
    """
    state = json.dumps({"ociVersion": "", "id": name, "status": "", "pid": pid, "bundle": str(bundle)})
    for hook in (spec.get("hooks") or {}).get(stage) or ():
        environment = dict(entry.partition("=")[::2] for entry in hook.get("env", ()))
        done = subprocess.run(
            hook.get("args") or [hook["path"]],
            executable=hook["path"],
            env=environment,
            input=state,
            capture_output=True,
            text=True,
            check=False,
            timeout=hook.get("timeout"),
        )
        if done.returncode != 0:
            raise SystemExit(f"exit status {done.returncode}: stdout: {done.stdout}, stderr: {done.stderr}")


def succeeds(action: Callable[[], None]) -> bool:
    """Do something in a process of its own, which says why it fails."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except SystemExit as leaving:
            print(leaving, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def leave_mounts() -> None:
    """A mount namespace of this process's own, in which nothing that it mounts reaches the others."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNS) != 0 or library.mount(b"none", b"/", None, _MS_REC_SLAVE, None) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace could be made")


def start_time(pid: int) -> int:
    """In clock ticks since boot; 0 for a process that is not there, or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def main(arguments: Sequence[str]) -> int:
    """`kata_runtime.py SETTINGS [GLOBAL OPTIONS] VERB [OPTIONS] ID`."""
    parser = argparse.ArgumentParser(prog="kata-runtime", allow_abbrev=False)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/run/scz-kata-standin"))
    for option in ("--log", "--log-format", "--kata-config"):
        parser.add_argument(option)
    parser.add_argument("--version", action="version", version="kata-runtime: stand-in of scz-smm's tests")
    parser.add_argument("--systemd-cgroup", action="store_true")
    parser.add_argument("--debug", action="store_true")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("create", "run"):
        creating = verbs.add_parser(verb)
        creating.add_argument("--bundle", "-b", type=Path, default=Path())
        creating.add_argument("--pid-file", default="")
        creating.add_argument("--no-pivot", action="store_true")
    for verb in ("start", "state"):
        verbs.add_parser(verb)
    verbs.add_parser("kill").add_argument("--all", "-a", action="store_true")
    verbs.add_parser("delete").add_argument("--force", "-f", action="store_true")
    for other in verbs.choices.values():
        other.add_argument("id")
    verbs.choices["kill"].add_argument("signal", nargs="?", default="TERM")
    said = parser.parse_args(arguments)
    container = Container(said.root, said.id, Settings(**json.loads(said.settings.read_text())))
    if said.verb in ("create", "run"):
        pid = container.create(said.bundle.resolve(), said.pid_file)
        if said.verb == "run":
            container.start()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            container.delete(force=True)
            return code
    elif said.verb == "start":
        container.start()
    elif said.verb == "state":
        print(json.dumps(container.state()))
    elif said.verb == "kill":
        name = said.signal.upper().removeprefix("SIG")
        container.kill(int(name) if name.isdigit() else signal.Signals[f"SIG{name}"])
    else:
        container.delete(force=said.force)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
