"""How a refusal reaches a person: a line on stderr, in the journal and in the audit log, a file for `sczctl why`.

crun and podman's precreate show only an exit code, and podman throws a runtime's stderr away in places, so the file
under the run-time directory is what `sczctl why` reads. Nothing here may fail a start or hide the error that it
reports: every problem of its own is swallowed, on purpose and only here. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from dataclasses import dataclass

from oci_hook.audit import AuditLog
from oci_hook.config import Config, load_config
from oci_hook.documents import Fields, canonical, parse_object, shown
from oci_hook.errors import FileUnreadable, SczError
from oci_hook.journal import tell
from oci_hook.key_errors import all_errors
from oci_hook.oci.state import State
from oci_hook.trusted_file import load_file, make_private_directory, remove_half_written, replace_file

_KEPT = 256
_LIMIT_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Refusal:
    """What `sczctl why` prints; `seconds` since 1970."""

    container_id: str
    seconds: int
    code: int
    reason: str
    message: str
    remedy: str


def _folder(runtime_directory: str) -> str:
    return os.path.join(runtime_directory, "last")


def _file(runtime_directory: str, container_id: str, bundle: str) -> str:
    name = hashlib.sha256(f"{container_id}\0{bundle}".encode()).hexdigest()
    return os.path.join(_folder(runtime_directory), f"{name}.json")


def report_refusal(config_file: str, state: State | None, error: SczError, *, program: str = "scz-hook") -> int:
    """Say it on stderr, in the journal, in the audit log and in the file for `sczctl why`.

    Args:
        config_file: The host's configuration, which says where; the defaults serve if it cannot be used.
        state: Whose start was refused; None if not even that is known.
        error: Why.
        program: Who says so, on stderr.

    Returns:
        The exit code.
    """
    config, readable = reporting_config(config_file)
    container_id = state.container_id if state else "unknown"
    with contextlib.suppress(OSError):
        print(f"{program}: {error.reason} ({error.code}): {error.message}; {error.advice}", file=sys.stderr, flush=True)
    tell(
        "refused",
        f"container {shown(container_id, 64)}: {error.reason} ({error.code}): {error.message}; {error.advice}",
        priority=3,
        identifier=program,
        container=container_id,
        code=error.code,
        reason=error.reason,
        model=state.annotations.get("smm.scz/model", "")[:256] if state else "",
    )
    keep_refusal(config.runtime_directory, container_id, error, bundle=state.bundle if state else "")
    if readable and state is not None and state.pid:  # a poststop that fails refuses nothing
        with contextlib.suppress(SczError):  # it is refused either way, and the other places say why
            AuditLog(config.audit_file).append(
                "refused",
                container=container_id,
                model=state.annotations.get("smm.scz/model", "")[:256],
                code=error.code,
                reason=error.reason,
                message=error.message[:1024],
            )
    return error.code


def reporting_config(config_file: str) -> tuple[Config, bool]:
    """The configuration, and whether it could be used; if not, the defaults say where refusals are kept."""
    try:
        return load_config(config_file), True
    except SczError:
        return Config(), False


def keep_refusal(runtime_directory: str, container_id: str, error: SczError, *, bundle: str = "") -> None:
    """Write the file that `sczctl why` reads: one for each id and bundle, as two containers may have one id."""
    document = {
        "container": container_id,
        "seconds": int(time.time()),
        "code": error.code,
        "reason": error.reason,
        "message": error.message[:2048],
        "remedy": error.advice[:1024],
    }
    with contextlib.suppress(OSError, FileUnreadable):
        make_private_directory(runtime_directory)
        make_private_directory(_folder(runtime_directory))
        replace_file(_file(runtime_directory, container_id, bundle), canonical(document))
        _prune(runtime_directory)


def forget_refusal(runtime_directory: str, container_id: str, *, bundle: str = "") -> None:
    """The container started after all: an old refusal of it would mislead."""
    with contextlib.suppress(OSError):
        os.unlink(_file(runtime_directory, container_id, bundle))


def _by_age(runtime_directory: str) -> list[str]:
    """The files, newest first; one that is taken away meanwhile counts as oldest."""

    def age(path: str) -> float:
        try:
            return os.stat(path).st_mtime
        except OSError:
            return 0.0

    folder = _folder(runtime_directory)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((os.path.join(folder, n) for n in names if n.endswith(".json")), key=age, reverse=True)


def _prune(runtime_directory: str) -> None:
    remove_half_written(_folder(runtime_directory))
    for path in _by_age(runtime_directory)[_KEPT:]:
        with contextlib.suppress(OSError):
            os.unlink(path)


def load_refusals(runtime_directory: str) -> list[Refusal]:
    """All that are kept, newest first; a file that cannot be read is left out."""
    found = []
    for path in _by_age(runtime_directory):
        with contextlib.suppress(FileUnreadable):
            found.append(_parse(load_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)))
    return found


def _parse(data: bytes) -> Refusal:
    document = parse_object(data, limit_bytes=_LIMIT_BYTES, what="refusal", error=FileUnreadable)
    fields = Fields(document, what="refusal", error=FileUnreadable)
    return Refusal(
        fields.string("container", limit=1024),
        fields.integer("seconds", low=0, high=1 << 53),
        fields.integer("code", low=1, high=255),
        fields.string("reason"),
        fields.string("message", limit=2048),
        fields.string("remedy"),
    )


def explain(code: int) -> tuple[str, str, str, str] | None:
    """An exit code's (reason, family, summary, remedy); None for a number that is not ours."""
    cls = all_errors().get(code)
    return (cls.__name__, cls.family, cls.summary, cls.remedy) if cls else None
