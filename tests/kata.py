"""Stand-ins for Kata towards an engine and its hooks; no registry carries Kata's own programs.

* `runc_named_kata`: runc under Kata's name. A container is none of a VM, so what a workload reads is seen end to end.
* `KataLike`: a runtime with runc's command line that does with hooks and mounts what Kata 1 does (docs/runtimes.md,
  and Kata's source, virtcontainers `shareFiles`): each bind mount's source is bound, not recursively, into a shared
  folder that receives what comes later from nobody; prestart hooks are called with a thread of the runtime as
  `state.pid`, in the host's mount namespace, with no annotations; a failing one ends `create` with 1 and calls no
  poststop; no container process is in the rootfs. In place of a guest a process of the host reads the models through
  the shared folder and writes down what it saw.
What they do not do: boot a kernel. tests/machines does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAME = "kata-runtime"


def runc_named_kata(folder: Path) -> str:
    """A copy of runc, root's alone, named as Kata's runtime is; returns its path."""
    return _copied(
        shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin") or "/usr/sbin/runc", folder / "runc" / NAME
    )


def _copied(program: str, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(os.path.realpath(program), path)
    path.chmod(0o755)
    return str(path)


class KataLike:
    """The stand-in below `folder`.

    Attributes:
        runtime: Its path, for the engine.
        folder: `state` and `shared` hold what of it is left: nothing, once its containers are deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        interpreter = getattr(sys, "_base_executable", sys.executable)
        copy = _copied(interpreter, folder / "kata" / NAME)
        # The copy finds its library where the original does (site module, pyvenv.cfg).
        (folder / "kata/pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(interpreter))}\n")
        for name in ("state", "shared", "seen"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        script = folder / "kata" / "kata"
        script.write_text(f"#!{copy} -IS\nFOLDER = {str(folder)!r}\n{_PROGRAM}")
        script.chmod(0o755)
        self.runtime = str(script)

    def seen(self, container_id: str) -> dict[str, dict[str, str]]:
        """What the guest read: by mount destination, SHA-256 of each file; empty if it never ran."""
        path = self.folder / "seen" / container_id
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def left(self) -> list[str]:
        """What is left of containers: folders, and mounts of them."""
        mounts = subprocess.run(["cat", "/proc/self/mountinfo"], capture_output=True, text=True, check=True).stdout
        folders = [path for name in ("state", "shared") for path in (self.folder / name).iterdir()]
        return [*map(str, folders), *(line for line in mounts.splitlines() if f"{self.folder}/shared" in line)]


# Runs under the copied interpreter, with the standard library alone.
_PROGRAM = r'''
import hashlib, json, os, shutil, signal, subprocess, sys, threading, time

VALUES = ("log", "log-format", "root", "bundle", "pid-file", "console-socket")


def read(words):
    options, names = {}, []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        options[name] = value if equals else words.pop(0) if name in VALUES else ""
    return options, names


def folders(name):
    return f"{FOLDER}/state/{name}", f"{FOLDER}/shared/{name}"


def mount(*words):
    subprocess.run(["/bin/mount", *words], check=True, env={})


def share(spec, shared):
    """Each bind's source alone, without what lies below it; nothing that is mounted later comes in."""
    found = {}
    for number, entry in enumerate(spec["mounts"]):
        if entry.get("type") == "bind" or {"bind", "rbind"} & set(entry.get("options", ())):
            place = f"{shared}/{number}"
            os.mkdir(place) if os.path.isdir(entry["source"]) else open(place, "w").close()
            mount("--bind", entry["source"], place)
            mount("--make-private", place)
            found[entry["destination"]] = place
    return found


def unshare(shared):
    for name in sorted(os.listdir(shared)) if os.path.isdir(shared) else ():
        subprocess.run(["/bin/umount", "--lazy", f"{shared}/{name}"], env={}, stderr=subprocess.DEVNULL)
    shutil.rmtree(shared, ignore_errors=True)


def hooks(spec, stage, name, bundle, pid):
    """state: no annotations, no status, no version."""
    state = json.dumps({"ociVersion": "", "id": name, "status": "", "pid": pid, "bundle": bundle})
    for hook in (spec.get("hooks") or {}).get(stage, ()):
        environment = dict(entry.split("=", 1) for entry in hook.get("env", ()))
        done = subprocess.run(
            hook.get("args") or [hook["path"]], executable=hook["path"], env=environment, input=state,
            capture_output=True, text=True, timeout=hook.get("timeout"),
        )
        if done.returncode:
            raise RuntimeError(f"{stage} hook: exit status {done.returncode}: {done.stderr.strip()}")


def create(name, bundle, pid_file):
    state, shared = folders(name)
    spec = json.load(open(f"{bundle}/config.json"))
    if spec["process"]["args"][0] == "/no-such-program":
        raise RuntimeError("the stand-in refuses to create this one, before any hook")
    os.mkdir(state)
    os.mkdir(shared)
    try:
        places = share(spec, shared)
        ended, told = threading.Event(), []

        def thread():
            told.append(threading.get_native_id())
            ended.wait()

        runner = threading.Thread(target=thread)
        runner.start()
        try:
            while not told:
                time.sleep(0.01)
            hooks(spec, "prestart", name, bundle, told[0])
        finally:
            ended.set()
            runner.join()
        json.dump({"bundle": bundle, "places": places, "args": spec["process"]["args"]}, open(f"{state}/run", "w"))
        machine = subprocess.Popen([sys.executable, "-IS", sys.argv[0], "machine", name], stdin=subprocess.DEVNULL)
        open(f"{state}/pid", "w").write(str(machine.pid))
        open(pid_file, "w").write(str(machine.pid))
    except BaseException:
        unshare(shared)
        shutil.rmtree(state)
        raise


def machine(name):
    """The hypervisor and its guest."""
    state, _ = folders(name)
    known = json.load(open(f"{state}/run"))
    while not os.path.exists(f"{state}/started"):
        time.sleep(0.02)
    seen = {}
    for destination, place in known["places"].items():
        files = {}
        for folder, _, names in os.walk(place):
            for each in names:
                path = os.path.join(folder, each)
                data = open(path, "rb").read()
                files[os.path.relpath(path, place)] = hashlib.sha256(data).hexdigest()
        seen[destination] = files
    json.dump(seen, open(f"{FOLDER}/seen/.{name}", "w"))
    os.rename(f"{FOLDER}/seen/.{name}", f"{FOLDER}/seen/{name}")
    if known["args"][0] == "sleep":
        time.sleep(float(known["args"][1]))


def pid_of(state):
    return int(open(f"{state}/pid").read())


def is_alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def main():
    options, names = read(sys.argv[1:])
    verb, *rest = names or [""]
    if verb == "create":
        return create(rest[0], options["bundle"], options["pid-file"])
    if verb == "machine":
        return machine(rest[0])
    if not rest:
        return print("kata-runtime  : 1.12.1 (a stand-in)")
    state, shared = folders(rest[0])
    if not os.path.isdir(state):
        raise RuntimeError(f"container {rest[0]} does not exist")
    alive = is_alive(pid_of(state))
    if verb == "start":
        open(f"{state}/started", "w").close()
    elif verb == "kill":
        if not alive:
            raise RuntimeError("process not running: os: process already finished")
        number = rest[1] if len(rest) > 1 else "15"
        os.kill(pid_of(state), int(number) if number.isdecimal() else getattr(signal, number))
    elif verb == "state":
        status = ("running" if os.path.exists(f"{state}/started") else "created") if alive else "stopped"
        known = json.load(open(f"{state}/run"))
        print(json.dumps({"ociVersion": "1.0.2", "id": rest[0], "pid": pid_of(state), "status": status,
                          "bundle": known["bundle"]}))
    elif verb == "delete":
        if alive:
            os.kill(pid_of(state), signal.SIGKILL)
        bundle = json.load(open(f"{state}/run"))["bundle"]
        spec = json.load(open(f"{bundle}/config.json"))
        unshare(shared)
        shutil.rmtree(state)
        hooks(spec, "poststop", rest[0], bundle, 0)


try:
    main()
except Exception as error:
    sys.exit(f"kata-runtime: {error}")
'''
