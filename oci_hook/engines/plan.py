"""What an installation would change: files with their contents, in their order, and what is left to a person.

Plans are made from settings and from what `HostFiles` reads; nothing is written here.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oci_hook.errors import ConfigInvalid, FileUnreadable, OutputExists
from oci_hook.trusted_file import load_file

KINDS = ("runc", "crun", "runsc")
"""Runtimes that the shim goes before wherever they are; also docs/runtimes.md."""
BY_NAME_ONLY = ("kata-runtime",)
"""Those that it goes before only where `--runtime` names them: Kata 1's command line."""
SHIM_DIRECTORY = "/usr/local/libexec/scz-smm"
_LIMIT_BYTES = 1 << 20
_MAX_LINKS = 40  # of Linux (include/linux/namei.h)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime that the shim goes before: what it is (`runc`) and where."""

    kind: str
    path: str

    @property
    def handler(self) -> str:
        """Its name towards the engine."""
        return f"scz-{self.kind}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator chose.

    Attributes:
        config_file: The hook's configuration.
        hooks_directory: For podman and CRI-O; None: the engine's default.
        shim_directory: For containerd and Docker; a folder below it belongs to each of them.
        runtimes: For containerd and Docker.
        engine_config: The engine's own main file; None: its default place.
        engine_version: Of containerd; None if nobody knows.
        script: Makes the shim's script (`oci_hook.shim.shim_script`).
        before_create: For podman: also what delivers before `create`, to VM sandboxes; on removing, that alone.
        base_spec: What `ctr oci spec` prints, for a guard of handlers under NRI; None: no guard is asked for.
        keep_scripts: On removing, leave the shim's: containers that were started through them need them.
    """

    config_file: str
    timeout_seconds: int = 300
    hooks_directory: str | None = None
    shim_directory: str = SHIM_DIRECTORY
    runtimes: tuple[Runtime, ...] = ()
    engine_config: str | None = None
    engine_version: tuple[int, int] | None = None
    script: Callable[..., bytes] | None = None
    keep_scripts: bool = False
    base_spec: bytes | None = None
    before_create: bool = False

    def script_path(self, engine: str, handler: str) -> str:
        """Where the script for a handler lies."""
        return os.path.join(self.shim_directory, engine, handler)

    def scripts(self, engine: str) -> tuple[Change, ...]:
        """One executable script a runtime.

        Raises:
            TypeError: The settings have no maker of scripts (our bug).
        """
        if self.script is None:
            raise TypeError("settings without a maker of scripts")
        return tuple(
            Change(
                self.script_path(engine, runtime.handler),
                self.script(runtime=runtime.path, engine=engine, config_file=self.config_file),
                0o755,
            )
            for runtime in self.runtimes
        )

    def scripts_to_remove(self, engine: str, files: HostFiles) -> tuple[tuple[Change, ...], tuple[str, ...]]:
        """The scripts of an engine that go when it is put back, and what a person then has to know.

        Raises:
            FileUnreadable: Their directory cannot be read.
        """
        below = files.below(os.path.join(self.shim_directory, engine))
        found = [path for path in below if os.path.basename(path).startswith("scz-")]
        if self.keep_scripts:
            return (), tuple(
                f"remove {path} when no container is left that was started through it: those need it to be stopped"
                for path in found
            )
        step = f"remove the containers that were started through the shim: {engine} cannot stop them without the script"
        return tuple(Change(path, None) for path in found), (step,)


@dataclass(frozen=True, slots=True)
class Change:
    """One file that is written, or removed if `data` is None; the path is the host's, without the prefix of a root."""

    path: str
    data: bytes | None
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done, in this order, and what is then left to do.

    Attributes:
        changes: On installing, what starts containers comes last; on removing, first.
        directories: Ours: removed if they are empty afterwards.
        next_steps: For a person; none: it works as it is.
    """

    changes: tuple[Change, ...] = ()
    directories: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


class HostFiles:
    """Reads an engine's files below a root directory, `/` or that of an image that is being built."""

    def __init__(self, root: str = "/") -> None:
        self._root = root

    def real(self, path: str) -> str:
        """Where a path of the host lies for us; the links of a root's directories stay in it, as for chroot(2).

        Raises:
            FileUnreadable: Its links go round in a circle.
        """
        folder, name = os.path.split(path)
        return path if self._root == "/" else os.path.join(self.resolved(folder), name)

    def resolved(self, path: str) -> str:
        """The same where the last part is a link, too: what it leads to.

        Raises:
            FileUnreadable: Its links go round in a circle.
        """
        if self._root == "/":
            return os.path.realpath(path)
        done: list[str] = []
        left, links = path.split("/")[::-1], 0
        while left:
            part = left.pop()
            if part in ("", ".", ".."):
                done = done[:-1] if part == ".." else done
                continue
            real = os.path.join(self._root, *done, part)
            if not os.path.islink(real):
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise FileUnreadable(f"{os.path.join(self._root, path.lstrip('/'))}: too many symbolic links")
            target = os.readlink(real)
            done = [] if target.startswith("/") else done
            left += target.split("/")[::-1]
        return os.path.join(self._root, *done)

    def exists(self, path: str) -> bool:
        """Whether there is anything of that name."""
        return os.path.lexists(self.real(path))

    def read(self, path: str) -> bytes | None:
        """A regular file of at most 1 MiB; None if there is none.

        Raises:
            FileUnreadable: It cannot be read, or is not such a file.
        """
        if not self.exists(path):
            return None
        return load_file(self.resolved(path), limit_bytes=_LIMIT_BYTES, error=FileUnreadable)

    def read_toml(self, path: str) -> dict[str, Any] | None:
        """A TOML file; None if there is none.

        Raises:
            ConfigInvalid: It is not TOML.
            FileUnreadable: It cannot be read.
        """
        data = self.read(path)
        try:
            return None if data is None else tomllib.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as cause:
            raise ConfigInvalid(f"{path} is not TOML: {cause}", remedy=f"correct {path}, then run it again") from cause

    def below(self, directory: str) -> list[str]:
        """Every file below a directory, as Go's filepath.Walk visits them: by name, folders at their place.

        Raises:
            FileUnreadable: A directory cannot be read.
        """
        found = []
        real = self.resolved(directory)
        try:
            names = sorted(os.listdir(real)) if os.path.isdir(real) else []
        except OSError as cause:
            raise FileUnreadable(f"{real}: {cause.strerror}") from cause
        for name in names:
            path = os.path.join(directory, name)
            is_folder = os.path.isdir(self.real(path)) and not os.path.islink(self.real(path))
            found += self.below(path) if is_folder else [path]
        return found

    def verify_not_a_link(self, path: str) -> None:
        """Check that a file which is replaced is the file itself.

        Raises:
            OutputExists: It is a symbolic link: what it leads to would be cut off.
        """
        if os.path.islink(self.real(path)):
            raise OutputExists(
                f"{self.real(path)} is a symbolic link", remedy="give the file that it leads to (--engine-config)"
            )


def table(value: object, *keys: str) -> dict[str, Any]:
    """A table inside tables; empty if it is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def strings(value: object) -> list[str]:
    """The strings of a list; none if it is no list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
