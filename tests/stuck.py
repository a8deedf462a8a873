"""A file system that answers nothing: a FUSE server that says hello to the kernel, takes every request and keeps it.

Whoever looks something up below it waits in the kernel where no signal, SIGKILL neither, reaches it: as a container can
have it that may mount FUSE. It needs no package: the protocol's first message alone is spoken (linux/fuse.h).
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_INIT, _HEADER_BYTES = 26, 40
_DEVICE = "/dev/fuse"


@contextmanager
def stuck_filesystem(directory: Path, *, pid: int | None = None) -> Iterator[None]:
    """Mount one at a directory, in the mount namespace of a process or in ours; all who wait in it go on at the end."""
    enter = ["/usr/bin/nsenter", "--target", str(pid), "--mount"] if pid is not None else []
    with subprocess.Popen(
        [*enter, sys.executable, __file__, str(directory)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()  # closes the device: the kernel ends every request
            server.wait()
            if pid is None:
                subprocess.run(["/usr/bin/umount", "--lazy", str(directory)], check=True)


def _open_device() -> int:
    """/dev/fuse, also where no device manager has made it."""
    if not os.path.exists(_DEVICE):
        with suppress(OSError):
            subprocess.run(["/usr/sbin/modprobe", "fuse"], check=False)
    if os.path.exists(_DEVICE):
        return os.open(_DEVICE, os.O_RDWR)
    with tempfile.TemporaryDirectory() as made:
        node = f"{made}/fuse"
        os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
        return os.open(node, os.O_RDWR)


def _serve(directory: str) -> None:
    fd = _open_device()
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    mount = ["/usr/bin/mount", "-i", "-t", "fuse", "-o", options, "stuck", directory]
    subprocess.run(mount, pass_fds=[fd], check=True)
    while data := os.read(fd, 1 << 20):
        _, opcode, unique = struct.unpack_from("=IIQ", data)
        if opcode == _INIT:
            major, minor, readahead, _ = struct.unpack_from("=IIII", data, _HEADER_BYTES)
            answer = struct.pack("=IIIIHHII32x", major, min(minor, 31), readahead, 0, 12, 9, 1 << 16, 1)
            answer = answer.ljust(64, b"\0")
            os.write(fd, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
            print("ready", flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
