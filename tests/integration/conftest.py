"""One scene for the integration tests of a start: owner, host with a software TPM, podman, and a small model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scene import Scene

MIB = 1 << 20
FIELDS = {"framework": "none", "licence": "Apache-2.0", "privacy": {"method": "differential privacy", "epsilon": 3.5}}
#: Sizes around the boundaries of segments; contents that no two files share.
FILES = {
    "weights.safetensors": 2 * MIB + 4321,
    "shards/first.bin": MIB - 56,
    "shards/second.bin": MIB - 55,
    "config.json": 17,
    "empty": 0,
}


def contents(name: str, size: int) -> bytes:
    """A file's bytes: different for each name and in each block."""
    return b"".join(f"{name} {block:>12}\n".encode() for block in range(size // (len(name) + 14) + 1))[:size]


@pytest.fixture(scope="session")
def model_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plaintext folder."""
    folder = tmp_path_factory.mktemp("model")
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents(name, size))
    return folder


@pytest.fixture(scope="module")
def scene(model_source: Path) -> Iterator[Scene]:
    """A scene with two models, `small:1` and `other:1`, granted and installed."""
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    folder.chmod(0o711)  # root of a user namespace has to get through to its root file system
    try:
        with Scene(folder) as made:
            fields = made.owner / "fields.json"
            fields.write_text(json.dumps(FIELDS))
            made.prepare(model_source, name="small", extra=("--fields", str(fields)))
            other = made.pack(model_source, name="other")
            made.grant(other, name="other")
            made.add(other)
            made.image = made.podman.busybox_image()
            yield made
    finally:
        shutil.rmtree(folder)
