"""A stand-in for a runtime that has entered the container's root file system before hooks run, as crun from 1.29 can.

    PYTHONHOME=… FOLDER/crun early_pivot.py BUNDLE ID [ROOTFS]

`FOLDER/crun` is a copy of the Python interpreter: the hook knows its parent by its executable's name. It makes a mount
namespace, binds what config.json binds, enters the root file system with pivot_root and lets go of the host's, runs the
prestart hooks with the state, and then the workload; afterwards the poststop hooks. ROOTFS takes the place of
`root.path`, as if config.json had been changed meanwhile. It is no container: no other namespace, no cgroup, no limits.
Needs root, util-linux, busybox in the root file system.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENTER = """
set -e
root=$1; shift
mount --bind "$root" "$root"
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
cd "$root"
pivot_root . .
umount -l .
cd /
mount -t proc proc /proc
echo ready
read go
exec "$@"
"""


def main(bundle: Path, container_id: str, rootfs: str | None) -> int:
    """Run the container; returns its exit code, or 1 if a hook failed."""
    spec: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    binds = [
        word for each in spec["mounts"] if each["type"] == "bind" for word in (each["source"], each["destination"])
    ]
    words = [rootfs or str(bundle / spec["root"]["path"]), *binds, "--", *spec["process"]["args"]]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            return 1
        state = {"ociVersion": "1.0.2", "id": container_id, "status": "created", "pid": process.pid}
        state |= {"bundle": str(bundle), "annotations": spec["annotations"]}
        if not all(run(hook, state) for hook in spec["hooks"].get("prestart", [])):
            process.kill()
            return 1
        process.stdin.write("\n")
        process.stdin.flush()
        sys.stdout.write(process.stdout.read())
        process.wait()
    for hook in spec["hooks"].get("poststop", []):
        run(hook, {**state, "status": "stopped", "pid": 0})
    return process.returncode


def run(hook: dict[str, Any], state: dict[str, Any]) -> bool:
    """Run a hook as the specification says; whether it succeeded."""
    environment = dict(entry.split("=", 1) for entry in hook["env"])
    done = subprocess.run(hook["args"], input=json.dumps(state), text=True, env=environment, check=False, timeout=120)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or [None])[0]))
