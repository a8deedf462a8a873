"""`scz-nri`: the service. Connects to the engine again and again, until it is told to end. Manual: scz-nri(8).

Everything that decides is root's: the configuration, the socket. Nothing comes from the environment but what systemd
gives, and none of that is read.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from oci_hook.config import DEFAULT_CONFIG_FILE, load_config
from oci_hook.errors import SczError
from oci_hook.host import verify_privileges
from oci_hook.nri.connection import Plugin
from oci_hook.nri.plugin import ModelPlugin
from oci_hook.nri.prepared import forget_connected

NAME, INDEX = "scz-smm", "50"
"""Under which the engine knows the plugin: required plugins are named so."""
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_USAGE = "usage: scz-nri [--config FILE]"
_FIRST_SECONDS, _LONGEST_SECONDS = 0.25, 8.0
_LAST_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--help"]:
        print(_USAGE)
        return 0
    if words and (len(words) != 2 or words[0] != "--config"):
        print(_USAGE, file=sys.stderr)
        return 2
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    try:
        return _serve(words[1] if words else DEFAULT_CONFIG_FILE)
    except SczError as error:
        _say(f"{error.reason} ({error.code}): {error.message}; {error.advice}")
        return error.code


def _serve(config_file: str) -> int:
    verify_privileges()
    config = load_config(config_file)
    plugin = Plugin(NAME, INDEX, ModelPlugin(config, config_file, _say))
    told = threading.Event()

    def end(_number: int, _frame: object) -> None:
        told.set()
        plugin.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    pause, last = _FIRST_SECONDS, ""
    while not told.is_set():
        said = "the engine ended the connection"
        try:
            plugin.serve(config.nri_socket)
            pause = _FIRST_SECONDS
        except SczError as error:
            said = f"{error.reason} ({error.code}): {error.message}; {error.advice}"
        forget_connected(config.runtime_directory)
        if not told.is_set() and said != last:
            _say(f"{said}; trying again")
        last = said if said != "the engine ended the connection" else ""
        told.wait(pause)
        pause = min(2 * pause, _LONGEST_SECONDS)
    return 0 if plugin.wait(_LAST_SECONDS) else 1


def _say(line: str) -> None:
    print(f"scz-nri: {line}", file=sys.stderr, flush=True)
