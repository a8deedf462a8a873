"""`scz-nri`: the service. Connects to the engine again and again, until it is told to end. Manual: scz-nri(8).

Everything that decides is root's: the configuration, the socket. Of the environment NOTIFY_SOCKET alone is read, to
which systemd is told that the engine has let the plugin in (sd_notify(3)).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from oci_hook.config import DEFAULT_CONFIG_FILE, load_config
from oci_hook.errors import SczError
from oci_hook.linux.processes import harden_process, verify_privileges
from oci_hook.nri.connection import Plugin
from oci_hook.nri.plugin import ModelPlugin
from oci_hook.nri.prepared import forget_connected
from oci_hook.nri.preparing import end_children

NAME, INDEX = "scz-smm", "50"
"""Under which the engine knows the plugin: required plugins are named so."""
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_USAGE = "usage: scz-nri [--config FILE]"
# To try costs nothing, and whatever is created before the engine has let the plugin in has no model.
_AGAIN_SECONDS = 0.25
_LAST_SECONDS = 2.0
_UNREAD = "the engine's list of pods and containers is too long to be read; `sczctl sweep` removes what nobody needs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--help"]:
        print(_USAGE)
        return 0
    if words and (len(words) != 2 or words[0] != "--config"):
        print(_USAGE, file=sys.stderr)
        return 2
    notify_socket = os.environ.get("NOTIFY_SOCKET", "")
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    try:
        return _serve(words[1] if words else DEFAULT_CONFIG_FILE, notify_socket)
    except SczError as error:
        Journal().say(f"{error.reason} ({error.code}): {error.message}; {error.advice}")
        return error.code


def _serve(config_file: str, notify_socket: str) -> int:
    verify_privileges()
    harden_process()
    config = load_config(config_file)
    journal = Journal()

    def synchronized(was_read: bool) -> None:
        journal.begin_anew()
        if not was_read:
            journal.say(_UNREAD)
        notify(notify_socket, "READY=1")

    plugin = Plugin(NAME, INDEX, ModelPlugin(config, config_file, journal.say), synchronized)
    told = threading.Event()

    def end(_number: int, _frame: object) -> None:
        told.set()
        plugin.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while not told.is_set():
        said = "the engine ended the connection"
        try:
            plugin.serve(config.nri_socket)
        except SczError as error:
            said = f"{error.reason} ({error.code}): {error.message}; {error.advice}"
        forget_connected(config.runtime_directory)
        if not told.is_set():
            journal.say(f"{said}; trying again")
            journal.hold()
            told.wait(_AGAIN_SECONDS)
    end_children()
    if not plugin.wait(_LAST_SECONDS):
        journal.say("ended beside calls that were under way; what they made is removed at the next start")
        os._exit(0)  # their threads, which may hang in the kernel, must not meet the interpreter's end
    return 0


class Journal:
    """Lines for people; while the plugin tries to get in, each of them once."""

    def __init__(self) -> None:
        self._once = True
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        """Write a line, unless it says nothing new."""
        if not self._once or line not in self._said:
            self._said.add(line)
            print(f"scz-nri: {line}", file=sys.stderr, flush=True)

    def hold(self) -> None:
        """The connection has ended: until there is another one, lines come once."""
        self._once = True

    def begin_anew(self) -> None:
        """The engine has let the plugin in: every line counts."""
        self._once = False
        self._said.clear()


def notify(path: str, state: str) -> None:
    """Tell systemd a state (sd_notify(3)); nothing is told where it did not ask, and nobody waits for it.

    Args:
        path: NOTIFY_SOCKET: empty, a path, or an abstract name after `@`.
        state: As `READY=1`.
    """
    if path[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
        notifying.setblocking(False)
        notifying.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
