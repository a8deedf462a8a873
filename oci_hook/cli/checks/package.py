"""The installation itself: whether all of it is there, and of one version."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterator

import oci_hook
from oci_hook import __version__
from oci_hook.cli.checks.check import Check

DEPENDENCIES = {
    "click": "click",
    "cryptography": "cryptography.hazmat.bindings._rust",
    "jose": "oci_hook.jws",
    "protobuf": "oci_hook.nri.schema",
    "psutil": "psutil",
    "tpm2-pytss": "oci_hook.attestation.tpm",
}
"""What the package needs besides Python, by the modules that show whether it works (compiled parts included)."""
MEND = "install the package scz-smm again (`apt install --reinstall scz-smm`)"
_REQUIRED = ("launch", "hook", "shim", "admission", "release", "delivery.fill", "attestation.tpm", "identity.token")
_VERSION = re.compile(rb'^__version__ = "([^"\n]{1,64})"', re.MULTILINE)


def check_package(folder: str = os.path.dirname(os.path.abspath(oci_hook.__file__))) -> Iterator[Check]:
    """Whether the modules are all there, of one version, and what they need can be imported.

    Args:
        folder: Where the package lies.
    """
    missing = [name for name in _REQUIRED if not os.path.isfile(os.path.join(folder, *name.split(".")) + ".py")]
    empty = _empty_modules(folder)
    broken = [f"{name}: {why}" for name, module in DEPENDENCIES.items() if (why := _why_not(module)) is not None]
    problems = [f"oci_hook.{name} is missing" for name in missing] + [f"oci_hook.{name} is empty" for name in empty]
    problems += broken
    on_disk = _version_of(folder)
    if on_disk != __version__:
        problems.append(f"version {on_disk} lies in {folder}, but {__version__} runs")
    for other in _metadata_versions(folder):
        if other != __version__:
            problems.append(f"beside the modules of {__version__} lies the description of version {other}")
    for problem in problems[:8]:
        yield Check("package", "fail", f"half installed: {problem}", MEND)
    if not problems:
        yield Check("package", "ok", f"scz-smm {__version__} in {folder}, with all that it needs")


def _empty_modules(folder: str) -> Iterator[str]:
    """An upgrade that ran out of disk leaves files of no length; of ours, only an `__init__.py` may have none."""
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = os.path.join(place, name)
            if name.endswith(".py") and name != "__init__.py" and not os.path.getsize(path):
                yield os.path.relpath(path, folder).removesuffix(".py").replace("/", ".")


def _why_not(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, SyntaxError, ValueError, AttributeError) as error:
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def _version_of(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, "__init__.py"), "rb") as file:
            found = _VERSION.search(file.read(1 << 16))
    except OSError:
        return None
    return found[1].decode("utf-8", "replace") if found else None


def _metadata_versions(folder: str) -> Iterator[str]:
    """Of the installer's description of this package (`*.dist-info`), where there is one beside it."""
    for each in importlib.metadata.distributions(name="scz-smm", path=[os.path.dirname(folder)]):
        version = each.metadata["Version"]
        if version:
            yield version
