"""The four ways in which a model could come to a container in a virtual machine; one of them is sure.

The shares are built as Kata builds them (tests/sandboxes.py says what stands in for what). facts: docs/runtimes.md,
"Kata, seen running".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engines import unmount_below
from tests.guests import Kernel
from tests.sandboxes import KINDS, Bind, Contained, Sandbox, write_rootfs

MODEL = b"".join(hashlib.sha256(b"%d" % block).digest() for block in range(50_000))
DIGEST = hashlib.sha256(MODEL).hexdigest()


@dataclass
class Host:
    """A sandbox and the host's folders of its containers."""

    sandbox: Sandbox
    folder: Path
    kind: str
    names: list[str] = field(default_factory=list)

    def container(self, *, shared: bool = False) -> tuple[str, Path]:
        """A new container's name and its root file system, which is a shared mount if asked for."""
        name = f"c{len(self.names)}"
        self.names.append(name)
        return name, self.mounted(write_rootfs(self.folder / name / "rootfs"), shared=shared)

    def source(self, name: str, *, shared: bool = False) -> Path:
        """The source of a bind entry, with a folder in it."""
        folder = self.folder / name / "source"
        (folder / "below").mkdir(parents=True)
        return self.mounted(folder, shared=shared)

    def mounted(self, folder: Path, *, shared: bool) -> Path:
        mount("--bind", folder, folder)
        mount("--make-shared" if shared else "--make-private", folder)
        return folder

    def model(self, place: Path) -> Path:
        """Mount a tmpfs with the model there, read-only; returns the place."""
        place.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", "mode=0755,size=8m", "scz-model", place)
        (place / "weights").write_bytes(MODEL)
        mount("-o", "remount,ro", place)
        return place

    def reads(self, name: str, path: str = "/models/weights") -> str:
        """The SHA-256 that a container in the guest computes; `none` if there is no such file."""
        code, lines = self.sandbox.run(name, "sh", "-c", f"test -e {path} || exit 3; sha256sum {path}")
        assert code in (0, 3), lines
        return lines[0].split()[0] if code == 0 else "none"


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, timeout=60)


@pytest.fixture(scope="module", params=KINDS)
def host(
    request: pytest.FixtureRequest, guests_folder: Path, kernel: Kernel, agents: dict[str, Path]
) -> Iterator[Host]:
    """One guest for all of these tests; each has containers of its own in it."""
    kind = str(request.param)
    folder = guests_folder / f"ways-{kind}"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(unmount_below, folder)
        yield Host(stack.enter_context(Sandbox(folder / "sandbox", kernel, agents[kind], kind)), folder, kind)


def test_a_hooks_mount_in_the_root_file_system_does_not_reach_the_guest(host: Host) -> None:
    """The first container of a sandbox: hooks run before its root file system is bound, and not recursively."""
    name, rootfs = host.container(shared=True)
    host.model(rootfs / "models")
    host.sandbox.create(name, Contained(rootfs))
    assert (rootfs / "models/weights").exists()
    assert host.reads(name) == "none"


@pytest.mark.parametrize("shared", [False, True])
def test_a_hooks_mount_in_a_pods_container_reaches_the_guest_only_by_shared_propagation(
    host: Host, shared: bool
) -> None:
    """A further container of a pod: hooks run when its root file system is bound already."""
    name, rootfs = host.container(shared=shared)
    (rootfs / "models").mkdir()
    host.sandbox.create(name, Contained(rootfs))
    host.model(rootfs / "models")
    assert host.reads(name) == (DIGEST if shared else "none")


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_complete_before_create_reaches_the_guest(host: Host, shared: bool) -> None:
    """By a bind entry, whatever the propagation: this is the way that is taken."""
    name, rootfs = host.container(shared=shared)
    source = host.model(host.source(name, shared=shared))
    host.sandbox.create(name, Contained(rootfs, [Bind(source, "/models")]))
    assert host.reads(name) == DIGEST
    code, lines = host.sandbox.run(
        name, "sh", "-c", "echo x > /models/weights; echo y > /models/new; rm /models/weights"
    )
    assert code != 0
    assert len(lines) == 3
    assert all("Read-only file system" in line for line in lines)
    assert host.reads(name) == DIGEST


def test_one_file_reaches_the_guest_as_well(host: Host) -> None:
    name, rootfs = host.container()
    source = host.model(host.source(name))
    host.sandbox.create(name, Contained(rootfs, [Bind(source / "weights", "/weights")]))
    assert host.reads(name, "/weights") == DIGEST


def test_what_a_hook_mounts_on_a_binds_source_reaches_the_first_container(host: Host) -> None:
    """It is bound after the hook has run."""
    name, rootfs = host.container()
    source = host.source(name)
    entry = Bind(source, "/models")
    host.model(source)
    host.sandbox.create(name, Contained(rootfs, [entry]))
    assert host.reads(name) == DIGEST


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_a_hook_mounts_on_a_binds_source_later_reaches_a_pods_container_hardly_ever(
    host: Host, shared: bool, read_only: bool
) -> None:
    """Only over 9p, which looks every path up anew; by shared propagation; and if the entry is not read-only."""
    name, rootfs = host.container()
    source = host.source(name, shared=shared)
    host.sandbox.create(name, Contained(rootfs, [Bind(source, "/models", read_only)]))
    host.model(source)
    reached = host.kind == "9p" and shared and not read_only
    assert host.reads(name) == (DIGEST if reached else "none")


@pytest.mark.parametrize("shared", [False, True])
def test_what_lies_below_a_binds_source_does_not_reach_the_guest(host: Host, shared: bool) -> None:
    """Whether the entry says rbind or bind: it is bound without what is mounted below it."""
    name, rootfs = host.container(shared=shared)
    source = host.source(name, shared=shared)
    host.model(source / "below")
    host.sandbox.create(name, Contained(rootfs, [Bind(source, "/models")]))
    assert host.reads(name, "/models/below/weights") == "none"


def test_a_source_below_kubelets_empty_directories_is_replaced(host: Host) -> None:
    name, rootfs = host.container()
    place = host.folder / name / "kubernetes.io~empty-dir"
    place.mkdir()
    host.sandbox.create(name, Contained(rootfs, [Bind(host.model(place / "model"), "/models")]))
    assert host.reads(name) == "none"
    code, _ = host.sandbox.run(name, "sh", "-c", "echo x > /models/new")
    assert code == 0


def test_what_is_truncated_on_the_host_is_gone_for_the_guest(host: Host) -> None:
    """What keeps the file system, virtiofsd's descriptors say, keeps nothing then; a guest's cache lasts a second."""
    name, rootfs = host.container()
    source = host.model(host.source(name))
    host.sandbox.create(name, Contained(rootfs, [Bind(source, "/models")]))
    assert host.reads(name) == DIGEST
    mount("-o", "remount,rw", source)
    os.truncate(source / "weights", 0)
    waiting = "while [ -s /models/weights ]; do sleep 1; done; cat /models/weights | wc -c"
    assert host.sandbox.run(name, "sh", "-c", waiting) == (0, ["0"])
    host.sandbox.remove(name)
    assert not list(host.sandbox.mounts.glob(f"{name}*"))
    assert not list(host.sandbox.shared.glob(f"{name}*"))
