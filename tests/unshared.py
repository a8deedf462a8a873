"""A shell in a mount namespace of its own with a model's mount: a container that may mount, without an engine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci_hook.delivery.reclaim import Reclaimed, reclaim
from oci_hook.held import HeldModel
from oci_hook.linux.mounts import parse_mountinfo
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord


@dataclass
class Container:
    """A shell in a mount namespace of its own; a model's mount is at `path`."""

    process: subprocess.Popen[str]
    path: Path
    record: ContainerRecord

    def do(self, command: str) -> str:
        return told(self.process, command)

    def reclaim(self, *others: ContainerRecord, **how: bool) -> Reclaimed:
        options: dict[str, Any] = {"lazy": False, "dry_run": False, **how}
        return reclaim(self.record, self.record.held[0], others=others, **options)

    def settled(self, *others: ContainerRecord) -> Reclaimed:
        """The answer, once no file system of other tests' has the number of one that is gone: `absent`."""
        until = time.monotonic() + 60
        while (found := self.reclaim(*others)).state != "absent" and time.monotonic() < until:
            time.sleep(0.2)
        return found


def told(process: subprocess.Popen[str], command: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{{ {command}; }} 2>&1; echo end\n")
    process.stdin.flush()
    printed = ""
    for line in process.stdout:
        if line == "end\n":
            return printed
        printed += line
    raise AssertionError(f"the shell ended: {printed}")


def held_at(pid: int, path: Path) -> HeldModel:
    """What a record says of the mount that a process sees at a path."""
    (mount,) = (
        each for each in parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_bytes()) if each.mount_point == str(path)
    )
    fsid = os.statvfs(f"/proc/{pid}/root{path}").f_fsid
    return HeldModel(fsid, mount.device, mount.mount_id, 1 << 16, "o")


@contextlib.contextmanager
def container(place: Path, name: str = "c") -> Iterator[Container]:
    path = place / name / "models" / "m"
    path.mkdir(parents=True)
    words = ["/usr/bin/unshare", "--mount", "--propagation", "private", "/bin/sh"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert told(process, f"mount -t tmpfs scz-smm {path} && head -c 65536 /dev/zero > {path}/file") == ""
            namespace = os.stat(f"/proc/{process.pid}/ns/mnt")
            start_time = process_start_time(process.pid) or 0
            record = ContainerRecord(
                container_id=name * 64,
                bundle=str(place),
                pid=process.pid,
                start_time=start_time,
                seconds=1,
                references=("m",),
                models=("m:1",),
                manifests=("sha256:" + "0" * 64,),
                destinations=(str(path),),
                subject="s",
                size_bytes=1 << 16,
                delivered=True,
                runtime="runc",
                keeper=(process.pid, start_time),
                namespace=(namespace.st_dev, namespace.st_ino),
                held=(held_at(process.pid, path),),
            )
            yield Container(process, path, record)
        finally:
            process.kill()
