"""README.md in a system that has never seen the project: install, protect a model, look, remove; its own words."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.fresh_root import FreshRoot, containers_conf
from tests.packaging.conftest import Packages
from tests.pages import Script, load, steps

ROOT = Path(__file__).resolve().parents[2]
PASSPHRASE = b"correct horse battery staple\n"
STEP_SECONDS = 300
#: `make package` is not run again in the system: the packages of this session are what it makes.
INSTALL, TPM, PROTECT, REMOVE = range(4)


def typed(root: FreshRoot, script: str, *, check: bool = True) -> str:
    """Type a block in a folder of its own, on a terminal; whoever asks for a passphrase gets it. What was shown."""
    command = [*root.prefix, "sh", "-ec", f"cd /root/readme\n{script}"]
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.execvpe(command[0], command, root._environment({}))
        finally:
            os._exit(127)
    shown, waiting, status = b"", b"", None
    deadline = time.monotonic() + STEP_SECONDS
    while status is None and time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        status = status if found else None
        while select.select([terminal], [], [], 0.05)[0]:  # a daemon that was started keeps the terminal open
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # EIO: nobody has it any more
                break
            shown, waiting = shown + piece, waiting + piece
            if waiting.endswith((b"Passphrase: ", b"Repeat for confirmation: ")):
                os.write(terminal, PASSPHRASE)
                waiting = b""
    if status is None:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    os.close(terminal)
    text = shown.decode(errors="replace")
    assert not check or os.waitstatus_to_exitcode(status) == 0, f"{script}\n{text}"
    return text


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """The README's blocks, in order."""
    found = [steps(block) for block in load(ROOT / "README.md")]
    assert all(len(block) == 1 and isinstance(block[0], Script) for block in found)
    return [block[0].text for block in found if isinstance(block[0], Script)]


def test_the_readme_alone_is_enough(clean: FreshRoot, packages: Packages, blocks: list[str]) -> None:
    root = clean
    make, _, install = blocks[INSTALL].partition("\n")
    assert make == "make package"
    (root / "root/readme/dist").mkdir(parents=True)
    shutil.copy(packages.deb, root / "root/readme/dist")
    (root / "etc/containers").mkdir(exist_ok=True)
    (root / "etc/containers/containers.conf").write_text(containers_conf())
    typed(root, install)
    root.apt("install", "runc", "busybox-static")
    root.sh(
        "cd /root/readme && mkdir -p image/bin image/models && cp /bin/busybox image/bin/ && "
        "for name in ls cat true; do ln -s busybox image/bin/$name; done && "
        "tar -C image -cf image.tar . && podman import image.tar localhost/my-application >/dev/null"
    )
    (root / "root/readme/minilm").mkdir()
    (root / "root/readme/minilm/model.safetensors").write_bytes(bytes(range(251)) * 9000)
    typed(root, blocks[TPM])
    assert "model.safetensors" in typed(root, blocks[PROTECT])
    refused = typed(root, "podman run --rm --annotation smm.scz/model=minilm:1 my-application true || sczctl why")
    assert "TokenMissing (18)" in refused
    assert "sczctl token issue" in refused
    typed(root, blocks[REMOVE])
    assert root.call("ls", "/root/readme").stdout.split() == ["dist", "image", "image.tar", "minilm"]
    gone = (
        "/etc/scz-smm",
        "/var/lib/scz-smm",
        "/usr/bin/sczctl",
        "/usr/lib/scz-smm",
        "/var/lib/trial-tpm",
    )
    for path in gone:
        assert root.call("test", "-e", path, check=False).returncode == 1, path
