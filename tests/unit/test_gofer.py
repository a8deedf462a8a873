"""gVisor's gofer: that no other process is ever taken for it.

A copy of the interpreter under the name `runsc` is the runtime: it starts children with runsc's command lines, in
namespaces and roots as a test wants them, and then a hook. Real sandboxes: tests/gvisor/test_gvisor.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.delivery.gofer import flag, verify_joining_writes_in_memory, verify_writes_in_memory
from oci_hook.errors import EngineUnsupported, HolderRefused


class TestFlag:
    @pytest.mark.parametrize(
        "words",
        [
            ["--bundle=/b"],
            ["--bundle", "/b"],
            ["-bundle=/b"],
            ["-bundle", "/b"],
            ["gofer", "--x=1", "--bundle", "/b", "y"],
        ],
    )
    def test_every_form_of_go(self, words: list[str]) -> None:
        assert flag(words, "bundle") == "/b"

    @pytest.mark.parametrize(
        ("words", "value"),
        [([], None), (["bundle=/b"], None), (["--bundles=/b"], None), (["--bundle"], ""), (["--bundle="], "")],
    )
    def test_absent_or_empty(self, words: list[str], value: str | None) -> None:
        assert flag(words, "bundle") == value

    def test_twice(self) -> None:
        with pytest.raises(HolderRefused, match="twice"):
            flag(["--bundle=/a", "--root=/r", "-bundle", "/b"], "bundle")

    @given(st.lists(st.text()))
    def test_anything_gives_a_value_or_an_error_of_ours(self, words: list[str]) -> None:
        with suppress(HolderRefused):
            flag(words, "bundle")


class TestWhereWritesGo:
    @pytest.mark.parametrize(
        "words",
        [
            ["--overlay-filestore-fd=-1"],
            ["--gofer-mount-confs=lisafs:none"],
            ["--gofer-mount-confs=lisafs:memory,lisafs:self"],
            ["--gofer-mount-confs", "none:memory"],
        ],
    )
    def test_to_memory_or_through_the_gofer(self, words: list[str]) -> None:
        verify_writes_in_memory(words)

    @pytest.mark.parametrize(
        "words",
        [
            [],
            ["--overlay-filestore-fd=4"],
            ["--overlay-filestore-fds=9", "--overlay-mediums=self"],
            ["--gofer-mount-confs=lisafs:self"],
            ["--gofer-mount-confs=lisafs:anon,lisafs:none"],
            ["--gofer-mount-confs=lisafs:self", "--overlay-filestore-fd=-1"],
            ["--gofer-mount-confs=lisafs"],
            ["--gofer-mount-confs=lisafs:something"],
            ["--gofer-mount-confs="],
        ],
    )
    def test_to_the_disk_or_who_knows(self, words: list[str]) -> None:
        with pytest.raises(EngineUnsupported):
            verify_writes_in_memory(words)


READ_ONLY = ("--gofer-mount-confs=lisafs:none",)
"""What runsc says of a pause container's root."""


class TestWhereWritesOfAPodGo:
    @pytest.mark.parametrize(
        ("sandbox", "runtime"),
        [
            (("--overlay-filestore-fd=-1",), ()),
            *(
                ((*READ_ONLY, f"--overlay2={said}"), ("runsc", f"--overlay2={said}", "create"))
                for said in ("none", "root:memory", "all:memory", "root:memory,size=1g")
            ),
            ((*READ_ONLY, "--overlay2=none"), ("runsc", "--overlay2=root:self", "-overlay2", "none")),
        ],
    )
    def test_to_memory_or_through_the_gofer(self, sandbox: tuple[str, ...], runtime: tuple[str, ...]) -> None:
        verify_joining_writes_in_memory(sandbox, runtime, {"io.kubernetes.cri.container-type": "container"})

    @pytest.mark.parametrize(
        ("sandbox", "runtime"),
        [
            ((), ("--overlay2=none",)),
            (READ_ONLY, ()),
            (READ_ONLY, ("--overlay2=none",)),
            ((*READ_ONLY, "--overlay2=none"), ()),
            ((*READ_ONLY, "--overlay2=none"), ("--overlay2=root:self",)),
            ((*READ_ONLY, "--overlay2=none"), ("--overlay2=none", "--overlay2=root:dir=/d")),
            ((*READ_ONLY, "--overlay2=root:self"), ("--overlay2=root:self",)),
        ],
    )
    def test_to_the_disk_or_who_knows(self, sandbox: tuple[str, ...], runtime: tuple[str, ...]) -> None:
        with pytest.raises(EngineUnsupported, match="disk"):
            verify_joining_writes_in_memory(sandbox, runtime, {})

    @pytest.mark.parametrize("key", ["dev.gvisor.spec.rootfs.overlay", "dev.gvisor.flag.overlay2"])
    def test_by_an_annotation(self, key: str) -> None:
        words = (*READ_ONLY, "--overlay2=none")
        with pytest.raises(EngineUnsupported, match="annotation"):
            verify_joining_writes_in_memory(words, words, {key: "self"})


RUNTIME = """
import json, os, subprocess, sys
plan = json.loads(sys.argv[1])
environment = {"PYTHONHOME": plan["home"]}

def start(each):
    child = '''
import ctypes, os, sys
bundle, unshare, root = sys.argv[1], sys.argv[2], sys.argv[3]
if unshare == "yes" and ctypes.CDLL(None).unshare(0x20000): os._exit(1)
os.chroot(root); os.chdir("/")
os.write(1, b"ready"); os.read(0, 1)
'''
    words = [each["name"], "-c", child, each["bundle"], each["unshare"], each["root"]]
    words += ["--gofer-mount-confs=lisafs:none"]
    process = subprocess.Popen(
        words, executable=each["executable"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.read(5)
    return process

started = [start(each) for each in plan["children"]]
hook = [*plan["hook"], str(started[0].pid)]
print(subprocess.run(hook, capture_output=True, text=True, check=True).stdout, end="")
for each in started:
    each.kill()
    each.wait()
"""

HOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from oci_hook.delivery.holder import ContainerView
from oci_hook.delivery.recognise import hold
from oci_hook.errors import SczError
view = ContainerView(
    "c", int(sys.argv[4]), sys.argv[2], "rootfs", frozenset(), 0, 0, False, in_sandbox=sys.argv[3] == "vouched"
)
try:
    with hold(view, runtime_directory=sys.argv[2] + "/run", timeout_seconds=1) as held:
        held.verify_unchanged()
        print("held by", held.runtime, type(held).__name__)
except SczError as refusal:
    print(refusal.reason, refusal.message)
"""


class Stage:
    """A bundle, and what a runtime `runsc` has made of it when its hook runs."""

    def __init__(self, folder: Path) -> None:
        self.bundle = folder / "bundle"
        (self.bundle / "rootfs").mkdir(parents=True)
        self.runsc, self.other = folder / "runsc", folder / "other/runsc"
        self.other.parent.mkdir()
        for program in (self.runsc, self.other):
            shutil.copy(os.path.realpath(sys.executable), program)
        self.folder = folder

    def child(self, name: str, **changes: Any) -> dict[str, Any]:
        """A child as runsc makes it."""
        usual = {
            "name": name,
            "bundle": f"--bundle={self.bundle}",
            "unshare": "yes",
            "root": str(self.bundle / "rootfs"),
            "executable": str(self.runsc),
        }
        return usual | changes

    def hold(self, *children: dict[str, Any], vouched: bool = False) -> str:
        """What the hook of a runtime with these children says; the first is `state.pid`."""
        (self.folder / "hook.py").write_text(HOOK)
        project = str(Path(__file__).parents[2])
        said = "vouched" if vouched else "alone"
        plan = {
            "home": sys.base_prefix,
            "children": children,
            "hook": [sys.executable, "-I", str(self.folder / "hook.py"), project, str(self.bundle), said],
        }
        ended = subprocess.run(
            [self.runsc, "-c", RUNTIME, json.dumps(plan)],
            env={"PYTHONHOME": sys.base_prefix},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout.strip()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


class TestGofer:
    @pytest.mark.parametrize("vouched", [False, True])
    def test_the_only_one_that_there_is(self, stage: Stage, vouched: bool) -> None:
        said = stage.hold(stage.child("runsc-sandbox"), stage.child("runsc-gofer"), vouched=vouched)
        assert said == "held by runsc Gofer"

    @pytest.mark.parametrize("count", [0, 2])
    @pytest.mark.parametrize("vouched", [False, True])
    def test_none_or_a_choice(self, stage: Stage, count: int, vouched: bool) -> None:
        gofers = [stage.child("runsc-gofer")] * count
        said = stage.hold(stage.child("runsc-sandbox"), *gofers, vouched=vouched)
        assert said == f"HolderRefused the runtime has {count} gofers where it must have one"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"bundle": "--bundle=/another"}, "serves the bundle '/another'"),
            ({"bundle": "--bundles=/another"}, "serves the bundle 'None'"),
            ({"executable": "other"}, "not the runtime's own executable"),
            ({"unshare": "no"}, "the host's or the runtime's own mount namespace"),
            ({"root": "/root"}, "the gofer's root is not"),
            ({"name": "runsc-gofer2"}, "the runtime has 0 gofers"),
        ],
        ids=["another bundle", "no bundle", "another program", "the host's namespace", "another root", "another name"],
    )
    def test_one_that_is_not_it(self, stage: Stage, changes: dict[str, str], message: str) -> None:
        if "executable" in changes:
            changes = changes | {"executable": str(stage.other)}
        said = stage.hold(stage.child("runsc-sandbox"), stage.child("runsc-gofer") | changes)
        assert said.startswith("HolderRefused")
        assert message in said

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "runsc-gofer"}, "is not a runsc-sandbox"),
            ({"bundle": "--bundle=/another"}, "the runsc-sandbox"),
            ({"executable": "other"}, "not the runtime's own executable"),
        ],
    )
    def test_a_sandbox_that_is_not_it(self, stage: Stage, changes: dict[str, str], message: str) -> None:
        if "executable" in changes:
            changes = changes | {"executable": str(stage.other)}
        said = stage.hold(stage.child("runsc-sandbox") | changes, stage.child("runsc-gofer"))
        assert said.startswith("HolderRefused")
        assert message in said


class TestSomebodyElsesSandbox:
    """`state.pid` is no child of the runtime: a container that joins a pod, or a pid that was used again."""

    def hold(self, stage: Stage, *children: dict[str, Any], vouched: bool) -> str:
        stranger = ["runsc-sandbox", "-c", "import os; os.write(1, b'ready'); os.read(0, 1)", "--root=/r", "sandbox"]
        with subprocess.Popen(
            stranger,
            executable=stage.runsc,
            env={"PYTHONHOME": sys.base_prefix},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.read(5)
            (stage.folder / "hook.py").write_text(HOOK)
            try:
                # The hook's last argument is the stranger; what follows it is not read.
                said = "vouched" if vouched else "alone"
                hook = [sys.executable, "-I", str(stage.folder / "hook.py"), str(Path(__file__).parents[2])]
                plan = {
                    "home": sys.base_prefix,
                    "children": children or [stage.child("idle")],
                    "hook": [*hook, str(stage.bundle), said, str(process.pid)],
                }
                ended = subprocess.run(
                    [stage.runsc, "-c", RUNTIME, json.dumps(plan)],
                    env={"PYTHONHOME": sys.base_prefix},
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                )
            finally:
                process.kill()
        return ended.stdout.strip()

    def test_nobody_vouches(self, stage: Stage) -> None:
        assert "vouches that the container joins a pod" in self.hold(stage, vouched=False)

    def test_a_gofer_is_there_already(self, stage: Stage) -> None:
        said = self.hold(stage, stage.child("runsc-gofer"), vouched=True)
        assert said == "HolderRefused a container that joins a pod has a gofer already while its hook runs"

    def test_the_runtimes_state_does_not_have_it(self, stage: Stage) -> None:
        said = self.hold(stage, vouched=True)
        assert said == "HolderRefused the runtime's state does not have this container in the sandbox 'sandbox'"
