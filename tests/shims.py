"""Shim scripts of the installed package; what tests import may be the source folder, which no hook can run from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys
from oci_hook.shim import shim_script
runtime, engine, config_file = sys.argv[1:]
sys.stdout.buffer.write(shim_script(runtime=runtime, engine=engine, config_file=config_file))
"""


def write_shim(path: Path, *, runtime: str | os.PathLike[str], engine: str, config_file: Path) -> Path:
    """Write the executable script for a runtime and an engine; returns its path."""
    command = [sys.executable, "-I", "-c", _SCRIPT, os.fspath(runtime), engine, str(config_file)]
    path.write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    path.chmod(0o755)
    return path
