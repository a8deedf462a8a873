"""How the hook is started: its command line, written by `sczctl`, the shim and CDI files, and read by the hook.

    python3 -I -S …/oci_hook/launch.py --config FILE [--engine ENGINE] [--request KEY=VALUE]… [--spec-digest HEX] STAGE

Whoever writes this command line is root, so it says what may not come from a container: which engine calls here, whose
annotations are then believed. `--request` carries annotations of ours where an engine cannot set them (CDI). With
`--spec-digest` the hook refuses a config.json that is not the one into which the shim wrote it.
Nothing but `os` and `sys` is imported: this is the fast path of hook and shim. OCI runtime specification,
"POSIX-platform Hooks".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

DEFAULT_CONFIG_FILE = "/etc/scz-smm/config.toml"
ENGINES = ("podman", "cri-o", "containerd", "docker")
STAGES = ("prestart", "createRuntime", "poststop", "precreate", "prepare", "guest-prestart", "guest-poststop")
"""`precreate` is podman's alone (`precreate.py`); `prepare` is no hook's: what asks before `create` (`prepare.py`).
Those with `guest-` run under Kata's agent, in the guest (`guest.py`)."""
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")
"""For every hook that we write: where none is named, a runtime passes its own on."""
PACKAGE_DIRECTORY = "/usr/lib/scz-smm"
"""Where the packages (deb, rpm) put this."""
NO_DIGEST = "0" * 64
"""Stands in config.json for the digest while the digest is made."""


class Invocation:
    """One command line of the hook.

    Attributes:
        stage: One of `STAGES`.
        config_file: Path of the configuration.
        engine: Who calls; None: as the configuration says.
        requests: Annotations of ours that this command line carries.
        spec_digest: SHA-256 of config.json as the shim left it, in hex, with `NO_DIGEST` in the digest's own place.
    """

    __slots__ = ("config_file", "engine", "requests", "spec_digest", "stage")

    def __init__(
        self,
        stage: str,
        *,
        config_file: str = DEFAULT_CONFIG_FILE,
        engine: str | None = None,
        requests: Mapping[str, str] | None = None,
        spec_digest: str | None = None,
    ) -> None:
        self.stage = stage
        self.config_file = config_file
        self.engine = engine
        self.requests = dict(requests or {})
        self.spec_digest = spec_digest

    def command(self) -> list[str]:
        """The argument list that starts the hook so: the interpreter itself, isolated, without site packages."""
        launcher = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")
        words = [interpreter(), "-I", "-S", launcher, "--config", os.path.abspath(self.config_file)]
        if self.engine is not None:
            words += ["--engine", self.engine]
        for key, value in self.requests.items():
            words += ["--request", f"{key}={value}"]
        if self.spec_digest is not None:
            words += ["--spec-digest", self.spec_digest]
        return [*words, self.stage]


def is_packaged() -> bool:
    """Whether this runs from where a package put it."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == PACKAGE_DIRECTORY


def interpreter() -> str:
    """The Python that files which outlive us name: the very one that runs, so that a virtual environment may go.

    For the package it is the distribution's name for it: `python3.11` is gone when the distribution is upgraded.
    """
    return "/usr/bin/python3" if is_packaged() else os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def parse_invocation(arguments: Sequence[str]) -> Invocation | None:
    """Read a command line; None if it has not the form above."""
    if not arguments or arguments[-1] not in STAGES or not len(arguments) % 2:
        return None
    parsed = Invocation(arguments[-1])
    seen = set()
    for option, value in zip(arguments[:-1:2], arguments[1:-1:2], strict=True):
        if option == "--request":
            key, equals, text = value.partition("=")
            if not equals or key in parsed.requests:
                return None
            parsed.requests[key] = text
            continue
        if option in seen:
            return None
        seen.add(option)
        if option == "--config":
            parsed.config_file = value
        elif option == "--engine" and value in ENGINES:
            parsed.engine = value
        elif option == "--spec-digest":
            parsed.spec_digest = value
        else:
            return None
    return parsed
