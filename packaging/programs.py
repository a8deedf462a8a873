"""Running programs, for what builds the packages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class PackageError(Exception):
    """The package cannot be built as it should be."""


def run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a program.

    Raises:
        PackageError: It failed; with what it said.
    """
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PackageError(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
