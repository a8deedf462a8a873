"""The shim's script before real runtimes while the package is replaced, damaged or gone: what runs can be ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook.errors import InstallationIncomplete
from tests.engines import RuntimeNamespace
from tests.runtimes import make_bundle, own_runsc, prestart

PACKAGE = Path(__file__).resolve().parents[2] / "oci_hook"
REFUSED = InstallationIncomplete.code
_SCRIPT = """
import sys
place, runtime, config_file = sys.argv[1:]
sys.path.insert(0, place)
from oci_hook.shim import shim_script
sys.stdout.buffer.write(shim_script(runtime=runtime, engine="docker", config_file=config_file))
"""


def unpack(place: Path) -> None:
    (place / ".incomplete").touch()


def damage(place: Path) -> None:
    (place / "oci_hook/oci/command_line.py").write_bytes(bytes(100))


def remove(place: Path) -> None:
    shutil.rmtree(place)


class Alone:
    """A script before one runtime, of an installation in a folder of its own, and a container that it started."""

    def __init__(self, kind: str, folder: Path, prefix: tuple[str, ...]) -> None:
        self.kind, self.folder, self.prefix, self.place = kind, folder, prefix, folder / "lib"
        shutil.copytree(PACKAGE, self.place / "oci_hook", ignore=shutil.ignore_patterns("__pycache__"))
        self.script = folder / f"scz-{kind}"
        command = [sys.executable, "-I", "-S", "-c", _SCRIPT, self.place, f"/usr/bin/{kind}", folder / "config.toml"]
        self.script.write_bytes(
            subprocess.run([*map(str, command)], capture_output=True, check=True, timeout=60).stdout
        )
        self.script.chmod(0o755)
        self.flags = (*own_runsc().flags, "--ignore-cgroups") if kind == "runsc" else ()
        self.name = f"scz-alone-{uuid.uuid4().hex[:8]}"
        hook = prestart("/bin/sh", "-c", "cat > /dev/null; exit 1")  # ours ends so then; crun 1.8.1 needs a reader
        self.bundle = make_bundle(folder / "bundle", args=["sleep", "600"], hooks={"poststop": [hook]})

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Call the runtime by the script, with a state folder of its own."""
        command = [*self.prefix, self.script, "--root", self.folder / "state", *self.flags, *words]
        with (self.folder / "said").open("w+") as said:  # a container keeps what it is given: no pipe
            done = subprocess.run(
                [*map(str, command)],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
            said.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, said.read())

    def status(self) -> str:
        return str(json.loads(self.call("state", self.name).stdout)["status"])


@pytest.fixture(params=["runc", "crun", "runsc"])
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Alone]:
    """A container of each runtime, created and started through the script while the installation was whole."""
    tmp_path.chmod(0o755)
    with RuntimeNamespace() as namespace:
        made = Alone(request.param, tmp_path, namespace.prefix)
        try:
            assert made.call("create", "--bundle", made.bundle, made.name).returncode == 0
            assert made.call("start", made.name).returncode == 0
            yield made
        finally:
            command = [*made.prefix, f"/usr/bin/{made.kind}", "--root", tmp_path / "state", *made.flags]
            subprocess.run([*map(str, command), "delete", "--force", made.name], capture_output=True, check=False)


@pytest.mark.parametrize("change", [unpack, damage, remove])
def test_what_runs_is_entered_stopped_and_deleted_and_nothing_starts(
    alone: Alone, change: Callable[[Path], None]
) -> None:
    assert alone.status() == "running"
    change(alone.place)
    assert alone.call("--version").returncode == 0
    assert alone.call("exec", alone.name, "true").returncode == 0
    other = alone.name.replace("alone", "other")
    for words in (("create",), ("run",), ("restore",), ("--debug", "create"), ("--", "run"), ("--log", "/l", "create")):
        refused = alone.call(*words, "--bundle", alone.bundle, other)
        assert refused.returncode == REFUSED, refused
        assert "remedy: `dpkg --configure -a`" in refused.stdout
    assert other not in alone.call("list").stdout
    assert alone.status() == "running"
    assert alone.call("kill", alone.name, "KILL").returncode == 0
    assert alone.call("delete", "--force", alone.name).returncode == 0
    assert alone.name not in alone.call("list").stdout
