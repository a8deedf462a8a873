"""A `scz-nri` for the tests: the installed program, beside a containerd of theirs, in containerd's mount namespace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SCZ_NRI = [os.path.join(os.path.dirname(sys.executable), "scz-nri")]
_SECONDS = 60


class PluginError(RuntimeError):
    """The plugin does not do what was waited for; the message has its log."""


class NriPlugin:
    """One `scz-nri`.

    Args:
        config: The host's configuration.
        runtime_directory: As the configuration has it.
        log: Where its standard error goes.
        prefix: Words that enter the engine's mount namespace.
    """

    def __init__(self, config: Path, runtime_directory: Path, log: Path, prefix: Sequence[str] = ()) -> None:
        self._command = [*prefix, *SCZ_NRI, "--config", str(config)]
        self._connected = runtime_directory / "nri/connected.json"
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the plugin itself; whatever enters the namespace becomes it."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> NriPlugin:
        """Start it, and wait until the engine has configured it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env={}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.wait_until_connected()
        return self

    def wait_until_connected(self) -> None:
        """Until it is connected; the engine calls it for what is created afterwards only."""
        deadline = time.monotonic() + _SECONDS
        while not self.connected():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise PluginError(f"scz-nri does not connect:\n{self.log.read_text()}")
            time.sleep(0.02)

    def connected(self) -> dict[str, object] | None:
        """What it says of itself."""
        try:
            found: dict[str, object] = json.loads(self._connected.read_text())
        except (OSError, ValueError):
            return None
        return found if self._process is not None and found["pid"] == self._process.pid else None

    def stop(self) -> int:
        """End it as systemd does; returns its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(number)
        return process.wait(_SECONDS)

    def __enter__(self) -> NriPlugin:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
