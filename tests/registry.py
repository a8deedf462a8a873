"""Debian's `docker-registry` on loopback, for as long as a test needs it; and skopeo, which copies to and from it.

Its storage lies below a folder of the test's, its port is one that the kernel gave. No TLS: nothing leaves the machine.
Needs docker-registry and skopeo.
"""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

_START_SECONDS, _STOP_SECONDS, _COPY_SECONDS = 20, 10, 120
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}


class RegistryError(RuntimeError):
    """The registry did not start, or skopeo failed; with what they said."""


class Registry:
    """A registry with its storage below `directory`; a context manager that also ends it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Registry:
        self.directory.mkdir(mode=0o700)
        for _ in range(5):  # somebody else may take the port in between
            try:
                self._start()
                return self
            except RegistryError:
                self._stop()
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = self.directory / "config.yml"
        config.write_text(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n"
            f"  filesystem:\n    rootdirectory: {self.directory}/storage\nhttp:\n  addr: {self.address}\n"
        )
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/usr/bin/setpriv", "--pdeathsig", "KILL", "/usr/bin/docker-registry", "serve", str(config)],
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RegistryError((self.directory / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.02)

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.address}/v2/", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def skopeo(*words: str | Path) -> str:
    """Run one skopeo command; what it printed.

    Raises:
        RegistryError: It failed.
    """
    command = ["/usr/bin/skopeo", "--insecure-policy", *(str(word) for word in words)]
    done = subprocess.run(
        command,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COPY_SECONDS,
    )
    if done.returncode != 0:
        raise RegistryError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout
