"""gVisor below containerd's own shim for runc, for the tests: Debian has no `containerd-shim-runsc-v1`.

containerd-shim-runc-v2 calls runsc as it calls runc; the hooks, the annotations and the pods are the real ones. What
gVisor's own shim would do for a container that joins a pod, and runc's does not, a script between the two does:

* the container's output is that of `runsc start`: it goes where the engine wanted it at `create`;
* the engine waits for the process in the pid file, but such a container has none on the host: the script puts a process
  there that waits with `runsc wait`, and ends as the container did;
* what has ended cannot be killed, which runsc says in other words than runc.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.runtimes import Runsc

_SCRIPT = """\
#!/bin/sh
# The arguments are runc's as go-runc writes them: --root DIR --log BUNDLE/log.json … VERB … ID
root='' bundle='' verb='' id='' before=''
for word in "$@"; do
    case "$before" in --root) root=$word ;; --log) bundle=${word%/*} ;; esac
    case "$verb,$word" in ,create|,start|,kill) verb=$word ;; esac
    before=$word id=$word
done
joins() { grep -Eq '"io.kubernetes.cri.container-type": ?"container"' "$bundle/config.json" 2>/dev/null; }
wait_for_end() {
    while [ -d "$bundle" ] && [ ! -e "$bundle/started" ]; do sleep 0.02; done
    ended=$(RUNSC --root "$root" wait "$id" 2>/dev/null)
    ended=${ended##*\\"exitStatus\\":}
    ended=${ended%%[!0-9]*}
    exit "${ended:-137}"
}
case "$verb" in
create)
    RUNSC "$@" || exit
    joins || exit 0
    wait_for_end &
    printf %s $! >"$bundle/init.pid"
    exit 0 ;;
start)
    joins || exec RUNSC "$@"
    waiting=/proc/$(cat "$bundle/init.pid")/fd
    RUNSC "$@" </dev/null >"$waiting/1" 2>"$waiting/2" || exit
    : >"$bundle/started"
    exit 0 ;;
kill)
    said=$(RUNSC "$@" 2>&1) || { echo "container not running: $said" >&2; exit 1; }
    joins && : >"$bundle/started"
    exit 0 ;;
esac
exec RUNSC "$@"
"""


def write_runsc(folder: Path, runsc: Runsc) -> Path:
    """Write the script below `folder`, as `runsc`; returns its path, to be used in runsc's place."""
    program = folder / "runsc"
    folder.mkdir(parents=True)
    program.write_text(_SCRIPT.replace("RUNSC", shlex.join([str(runsc.program), *runsc.flags])))
    program.chmod(0o755)
    return program
