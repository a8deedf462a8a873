"""A resource manager before a software TPM: tpm2-abrmd on a message bus of its own, for the tests.

What /dev/tpmrm0 is to a chip: each connection has its own objects and sessions, which go with it. The daemon holds the
TPM alone, so nobody else can speak to it meanwhile. Needs tpm2-abrmd, libtss2-tcti-tabrmd0 and dbus-daemon.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TCTI = "tabrmd:bus_type=session"
_SECONDS = 10
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
  </policy>
</busconfig>
"""


@contextmanager
def resource_manager(tcti: str) -> Iterator[dict[str, str]]:
    """Run one at a TPM; the value is the environment in which `TCTI` leads to it.

    A process keeps its connection to the bus: connect in a child that has not connected before.

    Raises:
        RuntimeError: It did not start.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="scz-bus-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder)
        (folder / "bus.conf").write_text(_BUS.format(path=folder / "bus"))
        environment = {**_ENVIRONMENT, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={folder}/bus"}
        log = stack.enter_context((folder / "log").open("wb"))

        def run(*command: str) -> subprocess.Popen[bytes]:
            words = ["/usr/bin/setpriv", "--pdeathsig", "KILL", *command]
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(_end, process)
            return process

        bus = run("/usr/bin/dbus-daemon", f"--config-file={folder}/bus.conf", "--nofork", "--nopidfile")
        _wait((folder / "bus").exists, bus, folder / "log")
        manager = run("/usr/sbin/tpm2-abrmd", "--session", "--allow-root", f"--tcti={tcti}")
        _wait(lambda: _answers(environment), manager, folder / "log")
        yield environment


def _answers(environment: dict[str, str]) -> bool:
    command = ["/usr/bin/tpm2_getrandom", "--tcti", TCTI, "--hex", "4"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the resource manager did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def enter(environment: dict[str, str]) -> None:
    """Make a child's connections lead there."""
    os.environ["DBUS_SESSION_BUS_ADDRESS"] = environment["DBUS_SESSION_BUS_ADDRESS"]
