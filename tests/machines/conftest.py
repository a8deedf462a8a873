"""A kernel for the guests, fetched once, an initramfs of the stand-in's agent for each kind of share, and the scene of
the integration tests, once more: these tests run beside those."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import Kernel, fetch_kernel
from tests.integration.conftest import model_source, scene
from tests.sandboxes import KINDS, write_agent

__all__ = ["agents", "guests_folder", "kernel", "model_source", "scene"]


@pytest.fixture(scope="session")
def guests_folder() -> Iterator[Path]:
    """A folder with a short path: sockets lie below it, and file systems are mounted there."""
    folder = Path(tempfile.mkdtemp(prefix="scz-machines.", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def kernel(guests_folder: Path) -> Kernel:
    """Debian's kernel, of the suite that this machine runs."""
    return fetch_kernel(guests_folder / "kernel")


@pytest.fixture(scope="session")
def agents(guests_folder: Path, kernel: Kernel) -> dict[str, Path]:
    """The initramfs of a sandbox's guest, by the kind of its share."""
    return {kind: write_agent(guests_folder, kernel, kind) for kind in KINDS}
