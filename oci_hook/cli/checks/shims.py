"""The way of the shim, for containerd and Docker: its scripts lead somewhere."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator

from oci_hook.cli.checks.check import Check, failed
from oci_hook.engines.plan import SHIM_DIRECTORY, HostFiles
from oci_hook.errors import FileUnreadable

_INTERPRETER = re.compile(rb"#!(/[^ \n]+)")
_PACKAGES = re.compile(rb"^sys\.path\.append\((.+)\)$", re.MULTILINE)
_RUNTIME = re.compile(rb"runtime=((?:'[^'\n]*')|(?:\"[^\"\n]*\"))")


def check_shims(files: HostFiles) -> Iterator[Check]:
    """Scripts whose interpreter, program or runtime has gone: no container of that handler starts then."""
    for engine in ("containerd", "docker"):
        folder = os.path.join(SHIM_DIRECTORY, engine)
        try:
            paths = [path for path in files.below(folder) if os.path.basename(path).startswith("scz-")]
            found = [(path, files.read(path) or b"") for path in paths]
        except FileUnreadable as error:
            yield failed(f"shim {engine}", error)
            continue
        gone = [f"{path}: {what}" for path, data in found for what in _gone(data, files)]
        if gone:
            message = f"{'; '.join(gone[:5])}: no container of it starts"
            yield Check(f"shim {engine}", "fail", message, f"`sczctl install --engine {engine}`")
        elif found:
            yield Check(f"shim {engine}", "ok", f"{', '.join(paths)} lead to programs that are there")


def _gone(data: bytes, files: HostFiles) -> Iterator[str]:
    from oci_hook.invocation import Invocation

    own = Invocation("prestart").command()
    interpreter = _INTERPRETER.match(data)
    packages, runtime = _literal(_PACKAGES, data), _literal(_RUNTIME, data)
    wanted = {
        "interpreter": os.fsdecode(interpreter[1]) if interpreter else None,
        "program": os.path.join(packages, "oci_hook/launch.py") if packages else None,
        "runtime": runtime,
    }
    for what, path in wanted.items():
        if path is None:
            yield f"it names no {what}"
        elif path not in own and not _is_file(path, files):
            yield f"its {what} {path} has gone"


def _literal(pattern: re.Pattern[bytes], data: bytes) -> str | None:
    found = pattern.search(data)
    try:
        value = ast.literal_eval(found[1].decode()) if found else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _is_file(path: str, files: HostFiles) -> bool:
    try:
        return os.path.isfile(files.resolved(path))
    except FileUnreadable:
        return False
