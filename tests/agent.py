"""A stand-in for Kata's agent: makes a container as rustjail does, and runs guest hooks as it does.

    kata-agent -I -S agent.py --bundle DIRECTORY --id ID --hooks DIRECTORY [--hook-seconds 10]

The file that runs it is a copy of the interpreter (`copy_interpreter`), as the hook knows the agent by its executable.
What it copies of the agent: the container's init is forked twice, adopted by the agent (a subreaper), has namespaces of
its own, its root bound onto itself, and waits, before it pivots, until the hooks have run. Hooks are the regular,
executable files of `prestart` and `poststop`, get the stage as their argument, the state on standard input, an empty
environment and ten seconds; that one fails or is too late is said on standard error and changes nothing. On an initial
ramdisk, which cannot be pivoted away from, the root is moved.

What it does not: gRPC, cgroups, capabilities, user namespaces, seccomp, storages. Only the standard library is needed,
so that it runs in a guest, too. Ends with the container's exit code.
Source: Kata Containers, src/agent/rustjail/src/container.rs, src/agent/src/sandbox.rs,
src/libs/kata-sys-util/src/hooks.rs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000  # mount, uts, ipc, pid
_MS_BIND, _MS_MOVE, _MS_REC, _MS_SLAVE, _MS_PRIVATE = 4096, 8192, 16384, 1 << 19, 1 << 18
_MS_REMOUNT, _MS_RDONLY = 32, 1
_MNT_DETACH, _SUBREAPER = 2, 36


def copy_interpreter(path: Path) -> Path:
    """A copy of the distribution's interpreter, which is what the agent runs from."""
    shutil.copy(os.path.realpath("/usr/bin/python3"), path)
    return path


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = [text.encode() for text in (source, target, kind, data)]
    _checked(_LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def _make_mount(entry: dict[str, Any], rootfs: str) -> None:
    options = entry.get("options", [])
    target = rootfs + entry["destination"]
    source, kind = entry.get("source", ""), entry.get("type", "bind")
    if kind == "bind" and os.path.isfile(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    else:
        os.makedirs(target, exist_ok=True)
    if kind == "bind":
        _mount(source, target, "", _MS_BIND | (_MS_REC if "rbind" in options else 0))
        _mount("", target, "", _MS_PRIVATE)
        if "ro" in options:
            _mount("", target, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    else:
        _mount(source, target, kind, 0)


def _initial_ramdisk() -> bool:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1:3] == ["/", "rootfs"] for line in mounts)


def _become_root(rootfs: str) -> None:
    os.chdir(rootfs)
    if _initial_ramdisk():
        _mount(rootfs, "/", "", _MS_MOVE)
        os.chroot(".")
    else:
        _checked(_LIBC.pivot_root(b".", b"."), "pivot_root")
        _checked(_LIBC.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def _init(spec: dict[str, Any], rootfs: str, ready: int, go: int) -> NoReturn:
    """The container's init: namespaces are there; mounts, waits for the hooks, pivots, becomes the workload."""
    try:
        _mount("", "/", "", _MS_SLAVE | _MS_REC)
        _mount(rootfs, rootfs, "", _MS_BIND | _MS_REC)
        for entry in spec.get("mounts", []):
            _make_mount(entry, rootfs)
        os.write(ready, b"r")
        if os.read(go, 1) != b"g":
            os._exit(125)
        _become_root(rootfs)
        process = spec["process"]
        os.execve(process["args"][0], process["args"], dict(each.split("=", 1) for each in process.get("env", [])))
    except BaseException as error:  # nothing of this process may run on
        print(f"agent: the container cannot be made: {error}", file=sys.stderr, flush=True)
    os._exit(126)


def _make_container(spec: dict[str, Any], rootfs: str) -> tuple[int, int, int]:
    """The init's pid, where it says that it is ready, and where it is told to go on."""
    ready_read, ready = os.pipe()
    go, go_write = os.pipe()
    number_read, number = os.pipe()
    first = os.fork()
    if first == 0:
        _checked(_LIBC.unshare(_NEW), "unshare")
        pid = os.fork()
        if pid == 0:
            for fd in (ready_read, go_write, number_read, number):
                os.close(fd)
            _init(spec, rootfs, ready, go)
        os.write(number, str(pid).encode())
        os._exit(0)
    for fd in (ready, go, number):
        os.close(fd)
    pid = int(os.read(number_read, 32) or b"0")
    os.close(number_read)
    os.waitpid(first, 0)
    return pid, ready_read, go_write


def _run_hooks(directory: Path, stage: str, state: dict[str, Any], seconds: float) -> None:
    folder = directory / stage
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_symlink() or not path.is_file() or not path.stat().st_mode & 0o111:
            continue
        try:
            done = subprocess.run(
                [path, stage],
                input=json.dumps(state).encode(),
                env={},
                capture_output=True,
                timeout=seconds,
                check=False,
            )
            problem = f"exit code {done.returncode}: {done.stderr.decode(errors='replace')}" if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            print(f"agent: hook {path} failed, which is ignored: {problem}", file=sys.stderr, flush=True)


def main() -> int:
    """Run one container from its making to its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--hooks", type=Path, required=True)
    parser.add_argument("--hook-seconds", type=float, default=10.0)
    given = parser.parse_args()
    _checked(_LIBC.prctl(_SUBREAPER, 1, 0, 0, 0), "prctl")
    spec = json.loads((given.bundle / "config.json").read_text())
    pid, ready, go = _make_container(spec, os.path.realpath(given.bundle / spec["root"]["path"]))
    state = {"ociVersion": "1.1.0", "id": given.id, "status": "creating", "pid": pid, "bundle": str(given.bundle)}
    state["annotations"] = spec.get("annotations", {})
    if os.read(ready, 1) == b"r":
        _run_hooks(given.hooks, "prestart", state, given.hook_seconds)
        try:
            os.write(go, b"g")
        except BrokenPipeError:
            print("agent: the container's init is gone", file=sys.stderr, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _run_hooks(given.hooks, "poststop", {**state, "status": "stopped", "pid": 0}, given.hook_seconds)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
