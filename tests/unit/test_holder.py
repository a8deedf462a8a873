"""The holder: which runtimes are recognised, and what the root file system is."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.delivery.holder import ContainerView, Holder, RootIdentity, identify_root
from oci_hook.delivery.recognise import hold, recognise_runtime
from oci_hook.errors import HolderGone, HolderRefused, SpecInvalid
from oci_hook.linux.mounts import Mount


@pytest.mark.parametrize("name", ["runc", "crun", "runsc", "runc-1.3.6", "crun_cloned:", "runc.real", "crun\n"])
def test_runtimes_that_are_known(name: str) -> None:
    assert recognise_runtime(name) == ("runsc" if name == "runsc" else name[:4])


@pytest.mark.parametrize(
    "name", ["", "runscx", "runcx", "xrunc", "containerd-shim-runsc-v1", "kata-runtimes", "youki", "Runc", "bash"]
)
def test_runtimes_that_are_not(name: str) -> None:
    with pytest.raises(HolderRefused):
        recognise_runtime(name)


@pytest.mark.parametrize("name", ["kata-runtime", "kata-runtime-3.20", "containerd-shim-kata-v2"])
def test_vm_sandboxes(name: str) -> None:
    assert recognise_runtime(name) == "kata"


@given(st.text())
def test_any_name_gives_a_runtime_or_an_error_of_ours(name: str) -> None:
    try:
        found = recognise_runtime(name)
    except HolderRefused:
        return
    assert name.startswith(("kata-runtime", "containerd-shim-kata") if found == "kata" else found)


class TestRoot:
    def test_relative_to_the_bundle_and_through_the_hosts_links(self, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "real").mkdir()
        (tmp_path / "bundle/rootfs").symlink_to("../real")
        seen = (tmp_path / "real").stat()
        expected = RootIdentity(str(tmp_path / "real"), seen.st_dev, seen.st_ino)
        assert identify_root(str(tmp_path / "bundle"), "rootfs") == expected
        assert identify_root(str(tmp_path / "bundle"), str(tmp_path / "real")) == expected

    @pytest.mark.parametrize("root_path", ["/", "../../../../../../../..", "/proc/self/root"])
    def test_the_hosts_own(self, tmp_path: Path, root_path: str) -> None:
        with pytest.raises(HolderRefused, match="the host's own"):
            identify_root(str(tmp_path), root_path)

    @pytest.mark.parametrize(("bundle", "root_path"), [("relative", "rootfs"), ("/", "absent"), ("/", "a\0b")])
    def test_one_that_is_not_there(self, bundle: str, root_path: str) -> None:
        with pytest.raises(SpecInvalid):
            identify_root(bundle, root_path)

    def test_it_is_found_again(self, tmp_path: Path) -> None:
        root = identify_root(str(tmp_path), ".")
        onto_itself = mounted_at(str(tmp_path))
        for fd in (
            root.open_here(),
            root.open_in_namespace([onto_itself], []),
            root.open_in_namespace([onto_itself, onto_itself], [onto_itself]),
        ):
            assert os.path.sameopenfile(fd, os.open(tmp_path, os.O_PATH))
            os.close(fd)

    def test_a_directory_that_the_runtime_has_not_mounted_is_not_it(self, tmp_path: Path) -> None:
        root = identify_root(str(tmp_path), ".")
        before = len(os.listdir("/proc/self/fd"))
        for mounts in ([], [mounted_at(str(tmp_path))]):
            with pytest.raises(HolderRefused):
                root.open_in_namespace(mounts, mounts)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_another_directory_at_its_path_is_not_it(self, tmp_path: Path) -> None:
        root = identify_root(str(tmp_path), ".")
        before = len(os.listdir("/proc/self/fd"))
        for other in (dataclasses.replace(root, inode=root.inode + 1), dataclasses.replace(root, device=1)):
            with pytest.raises(HolderRefused):
                other.open_in_namespace([mounted_at(str(tmp_path))], [])
            with pytest.raises(HolderRefused):
                other.open_here()
        assert len(os.listdir("/proc/self/fd")) == before


def mounted_at(path: str) -> Mount:
    return Mount(1, 1, "0:1", "/", path, frozenset(), (), "ext4", frozenset())


PR_SET_CHILD_SUBREAPER = 36
VIEW = ContainerView("c", 1, "/", "tmp", frozenset(), 0, 0, mount_namespace_joined=False)


def held(**changes: Any) -> Holder:
    return hold(dataclasses.replace(VIEW, **changes), runtime_directory="/nonexistent", timeout_seconds=1)


class TestHolder:
    @pytest.mark.parametrize("pid", [-1, 0, 1])
    def test_no_container_has_such_a_process(self, pid: int) -> None:
        with pytest.raises(HolderRefused):
            held(pid=pid)

    def test_a_process_that_is_gone(self) -> None:
        with pytest.raises(HolderGone):
            held(pid=2**22 + 1)

    def test_a_namespace_that_was_joined_by_path(self) -> None:
        with pytest.raises(HolderRefused, match="by path"):
            held(pid=os.getpid(), mount_namespace_joined=True)

    def test_a_parent_that_is_no_runtime(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(HolderRefused, match="is not recognised"):
            held(pid=os.getpid())
        assert len(os.listdir("/proc/self/fd")) == before


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from oci_hook.delivery.holder import ContainerView
from oci_hook.delivery.recognise import hold
from oci_hook.errors import SczError
view = ContainerView("c", int(sys.argv[2]), "/", "tmp", frozenset(), 0, 0, mount_namespace_joined=False)
try:
    with hold(view, runtime_directory="/nonexistent", timeout_seconds=1) as held:
        held.verify_unchanged()
        print("held by", held.runtime)
except SczError as refusal:
    print(refusal.reason, refusal.message)
"""


def hold_under(folder: Path, runtime: str, script: str, *arguments: str) -> str:
    """What a hook sees that a program named `runtime` starts: busybox under that name, which runs `script`.

    `$hold PID` in the script is the hook.
    """
    program = folder / runtime
    shutil.copy("/bin/busybox", program)
    (folder / "hold.py").write_text(HOLD)
    root = str(Path(__file__).parents[2])
    hook = f"hold='{sys.executable} -I {folder}/hold.py {root}'; {script}; true"
    ended = subprocess.run(
        ["sh", "-c", hook, "sh", *arguments], executable=program, capture_output=True, text=True, check=True, timeout=30
    )
    assert ended.stderr == ""
    return ended.stdout.strip()


OWN_NAMESPACE = "/usr/bin/unshare --mount sleep 60 & sleep 0.3"


class TestUnderRuntime:
    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_its_child_in_a_namespace_of_its_own(self, tmp_path: Path, runtime: str) -> None:
        assert hold_under(tmp_path, runtime, f"{OWN_NAMESPACE}; $hold $!; kill $!") == f"held by {runtime}"

    def test_its_child_in_the_hosts_namespace(self, tmp_path: Path) -> None:
        said = hold_under(tmp_path, "runc", "sleep 60 & $hold $!; kill $!")
        assert said.startswith("HolderRefused the container runs in the host's")

    @pytest.mark.parametrize("runtime", ["runc", "crun"])
    def test_somebody_elses_child(self, tmp_path: Path, runtime: str) -> None:
        with subprocess.Popen(["/usr/bin/unshare", "--mount", "sleep", "60"]) as stranger:
            time.sleep(0.3)
            said = hold_under(tmp_path, runtime, "$hold $1", str(stranger.pid))
            stranger.kill()
        assert said.startswith(f"HolderRefused process {stranger.pid} was not made by the runtime")

    @pytest.mark.parametrize(("runtime", "expected"), [("crun", "held by crun"), ("runc", "HolderRefused process")])
    def test_a_grandchild_that_an_ancestor_adopted(self, tmp_path: Path, runtime: str, expected: str) -> None:
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            script = f"pid=$({OWN_NAMESPACE} >/dev/null; echo $!); $hold $pid; kill $pid"
            said = hold_under(tmp_path, runtime, script.replace(" & ", " >/dev/null & "))
            os.waitpid(-1, 0)
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert said.startswith(expected)
