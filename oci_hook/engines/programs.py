"""Runtimes and engines that this host has: where, and of which version. Each that is asked has a time limit."""

from __future__ import annotations

import os
import re
import subprocess

from oci_hook.engines.plan import KINDS, HostFiles, Runtime
from oci_hook.errors import FileUnreadable
from oci_hook.invocation import ENVIRONMENT

_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_SECONDS = 10
_VERSION = re.compile(r"(?:version |release-|containerd\S* |^)v?([0-9][0-9A-Za-z.+~-]*)", re.MULTILINE)


def find_program(name: str, files: HostFiles) -> str | None:
    """Where a program lies; whatever PATH the caller has."""
    for folder in _FOLDERS:
        path = f"{folder}/{name}"
        try:
            real = files.resolved(path)
        except FileUnreadable:  # links in a circle lead to no program
            continue
        if os.path.isfile(real) and os.access(real, os.X_OK):
            return path
    return None


def find_runtimes(files: HostFiles) -> tuple[Runtime, ...]:
    """The runtimes that the shim can go before."""
    found = {kind: find_program(kind, files) for kind in KINDS}
    return tuple(Runtime(kind, path) for kind, path in found.items() if path is not None)


def program_version(path: str) -> str | None:
    """What a program answers to `--version`; None if it gives no answer in time."""
    said = program_output(path, "--version")
    return None if said is None else parse_version(said.decode("utf-8", "replace"))


def program_output(*command: str) -> bytes | None:
    """What a program writes; None if it gives no answer in time."""
    try:
        answered = subprocess.run(
            command,
            env=dict(variable.split("=", 1) for variable in ENVIRONMENT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answered.stdout


def parse_version(text: str) -> str | None:
    """The version in a program's answer."""
    found = _VERSION.search(text)
    return found[1] if found else None


def major_minor(version: str | None) -> tuple[int, int] | None:
    """`1.6.20~ds1` is (1, 6)."""
    found = re.match(r"([0-9]+)\.([0-9]+)", version or "")
    return (int(found[1]), int(found[2])) if found else None
