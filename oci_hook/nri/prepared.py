"""The containers that this plugin prepared, on the disk: what it has to look after when it is started again.

One file each below `<runtime_directory>/nri/prepared`, written before `prepare` is started and removed when the models
are gone. It says no more than whose they are: what is mounted where is in the records of `before_create`. Beside them
lies what `sczctl doctor` reads of the plugin itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass

from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import FileUnreadable, SczError
from oci_hook.oci.state import CONTAINER_ID
from oci_hook.trusted_file import load_file, make_private_directory, remove_half_written, replace_file

_LIMIT_BYTES = 4 << 10
_MAX_FILES = 100_000


class Prepared:
    """The files of one host.

    Args:
        runtime_directory: Of the configuration.
    """

    def __init__(self, runtime_directory: str) -> None:
        self._parent = os.path.join(runtime_directory, "nri")
        self._folder = os.path.join(self._parent, "prepared")

    def add(self, container_id: str) -> None:
        """Note a container.

        Raises:
            FileUnreadable: It cannot be written.
        """
        for folder in (os.path.dirname(self._parent), self._parent, self._folder):
            make_private_directory(folder)
        replace_file(self._file(container_id), canonical({"container": container_id}))

    def has(self, container_id: str) -> bool:
        """Whether a container is noted."""
        return os.path.lexists(self._file(container_id))

    def remove(self, container_id: str) -> None:
        """Forget a container; harmless if it is not noted."""
        with contextlib.suppress(OSError):
            os.unlink(self._file(container_id))

    def ids(self) -> tuple[str, ...]:
        """All of them, sorted; what cannot be read is left out, as a sweep finds its models by their records.

        Raises:
            FileUnreadable: The folder cannot be read.
        """
        try:
            names = sorted(os.listdir(self._folder))[:_MAX_FILES]
        except FileNotFoundError:
            return ()
        except OSError as cause:
            raise FileUnreadable(f"{self._folder}: {cause.strerror}") from cause
        remove_half_written(self._folder)
        found = []
        for name in names:
            with contextlib.suppress(SczError):
                path = os.path.join(self._folder, name)
                data = load_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)
                document = parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable)
                fields = Fields(document, what=path, error=FileUnreadable)
                found.append(fields.string("container", pattern=CONTAINER_ID, limit=255))
        return tuple(sorted(found))

    def _file(self, container_id: str) -> str:
        return os.path.join(self._folder, hashlib.sha256(container_id.encode("utf-8", "replace")).hexdigest())


@dataclass(frozen=True, slots=True)
class Connected:
    """What a running plugin says of itself.

    Attributes:
        pid: Its process.
        start_time: Of that process, clock ticks since boot.
        engine: As the engine calls itself, with its version.
        request_seconds: How long the engine waits for an answer; 0 if it does not say (containerd before 2).
    """

    pid: int
    start_time: int
    engine: str
    request_seconds: int


def _status(runtime_directory: str) -> str:
    return os.path.join(runtime_directory, "nri", "connected.json")


def write_connected(runtime_directory: str, connected: Connected) -> None:
    """Say that the plugin is connected.

    Raises:
        FileUnreadable: It cannot be written.
    """
    for folder in (runtime_directory, os.path.join(runtime_directory, "nri")):
        make_private_directory(folder)
    replace_file(_status(runtime_directory), canonical(asdict(connected)))


def forget_connected(runtime_directory: str) -> None:
    """Say that it is not."""
    with contextlib.suppress(OSError):
        os.unlink(_status(runtime_directory))


def load_connected(runtime_directory: str) -> Connected | None:
    """What the plugin said last; None if it is not connected. The caller looks whether its process lives.

    Raises:
        FileUnreadable: It cannot be read.
    """
    path = _status(runtime_directory)
    if not os.path.lexists(path):
        return None
    data = load_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)
    fields = Fields(
        parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable), what=path, error=FileUnreadable
    )
    found = Connected(
        fields.integer("pid", low=1, high=1 << 31),
        fields.integer("start_time", low=0, high=1 << 63),
        fields.string("engine", limit=256),
        fields.integer("request_seconds", low=0, high=1 << 31),
    )
    fields.finish()
    return found
