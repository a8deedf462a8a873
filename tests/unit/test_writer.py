"""The writer's ends that are not its own: what is said of them. Needs root."""

from __future__ import annotations

import faulthandler
import mmap
import os
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.delivery.fill import FillOptions, Target
from oci_hook.delivery.writer import run_writer
from oci_hook.errors import HolderGone, SczError, SystemCallFailed, WriterFailed
from oci_hook.linux.mounts import MemoryFilesystem, create_memory_filesystem
from oci_hook.linux.namespaces import Channel, Child, Report
from tests.models import MIB, TestOwner, noise

OPTIONS = FillOptions(0, 0, 1, drop_cache=False)


def write(target: Target, *, said: list[tuple[int, int]] | None = None) -> None:
    """As a delivery has it done."""
    progress = None if said is None else lambda done, total: said.append((done, total))
    run_writer([target], OPTIONS, None, 30, first=lambda: None, left=lambda _left: None, progress=progress)


def test_what_is_written_is_said(tmp_path: Path) -> None:
    owner, said = TestOwner(tmp_path), []
    model = owner.pack("m", {"a": noise(3 * MIB), "b": b"1"})
    with open_layout(model.bundle) as layout, create_memory_filesystem(4 * MIB, 9, MemoryFilesystem.TMPFS) as mount:
        write(Target(owner.delivery(model, layout), mount), said=said)
        assert said[-1] == (3 * MIB + 1, 3 * MIB + 1)
        assert os.stat("a", dir_fd=mount.fd).st_size == 3 * MIB


def gives_huge_pages() -> bool:
    """Whether a large file of a tmpfs is mapped here; else it is written."""
    with create_memory_filesystem(3 * MIB, 9, MemoryFilesystem.TMPFS) as mount:
        fd = os.open("a", os.O_RDWR | os.O_CREAT, dir_fd=mount.fd)
        try:
            os.ftruncate(fd, 6 * MIB)
            with mmap.mmap(fd, 6 * MIB) as mapping:
                mapping[0] = 0
            return os.fstat(fd).st_blocks * 512 >= 2 * MIB
        finally:
            os.close(fd)


def test_memory_that_runs_out_while_a_mapped_file_is_filled(tmp_path: Path) -> None:
    """The kernel tells a mapping's writer by SIGBUS, with no word of a limit: the remedy names none either."""
    owner = TestOwner(tmp_path)
    model = owner.pack("m", {"a": noise(6 * MIB)})
    with open_layout(model.bundle) as layout, create_memory_filesystem(3 * MIB, 9, MemoryFilesystem.TMPFS) as mount:
        target = Target(owner.delivery(model, layout), mount)

        def body(_channel: Channel) -> Report:
            faulthandler.disable()  # pytest's would print the child's end
            write(target)
            return {}

        with Child("the test's hook", body, gone=HolderGone) as hook, pytest.raises(SczError) as caught:
            hook.receive(60)
    error = caught.value
    if gives_huge_pages():
        assert type(error) is WriterFailed
        assert "memory for the model ran out" in error.message
        assert "container's memory limit" not in error.advice
    else:
        assert type(error) is SystemCallFailed
        assert "No space left" in error.message
