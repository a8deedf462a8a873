"""The shim as a script of its own: what reaches the runtime, what is refused, and what it imports on the way.

The runtime here is a program that writes down how it was started; real ones are in tests/matrix/test_shim.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oci_hook.errors import (
    AnnotationInvalid,
    EngineUnsupported,
    FileUnreadable,
    SczError,
    SpecInvalid,
)
from oci_hook.oci.spec import verify_spec_digest
from oci_hook.report import load_refusals
from oci_hook.shim import shim_script

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"annotations": {"smm.scz/model": "small:1"}}
RECORDER = """#!/bin/sh
out={out}
printf '%s\\n' "$0" "$@" > $out/arguments
cat /proc/$$/environ > $out/environment
"""


@dataclass
class Call:
    """One call of the shim."""

    code: int
    stdout: str
    stderr: str
    ran: bool


class Bench:
    """A shim before a runtime that records, a bundle, and a configuration."""

    def __init__(self, folder: Path, engine: str = "containerd", runtime: str = "runc") -> None:
        self.folder, self.bundle, self.out = folder, folder / "bundle", folder / "out"
        for path in (self.bundle, self.out):
            path.mkdir()
        self.runtime, self.shim, self.config = folder / runtime, folder / "scz-runtime", folder / "config.toml"
        self.runtime.write_text(RECORDER.format(out=self.out))
        self.runtime.chmod(0o755)
        self.config.write_text(f'[paths]\nruntime = "{folder}/run"\naudit = "{folder}/audit"\n')
        self.shim.write_bytes(
            shim_script(runtime=str(self.runtime), engine=engine, config_file=str(self.config)),
        )
        self.shim.chmod(0o755)

    def spec(self, document: Mapping[str, Any] | bytes) -> Path:
        """Write config.json; returns its path."""
        path = self.bundle / "config.json"
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return path

    def call(self, *arguments: str, environment: Mapping[str, str] = {}, **how: Any) -> Call:
        """Call the shim."""
        for path in self.out.iterdir():
            path.unlink()
        done = subprocess.run(
            [str(self.shim), *arguments],
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=60,
            **{"stdin": subprocess.DEVNULL, **how},
        )
        return Call(done.returncode, done.stdout, done.stderr, (self.out / "arguments").exists())

    def arguments(self) -> list[str]:
        """What the runtime was given."""
        return (self.out / "arguments").read_text(errors="surrogateescape").splitlines()

    def refused(self, error: type[SczError], *arguments: str, **how: Any) -> Call:
        """Check that the call is refused for that reason, that the runtime does not run, and where it says so."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        call = self.call("--log", str(log), "--log-format", "json", *arguments, **how)
        assert (call.code, call.ran) == (error.code, False), call
        (line,) = log.read_text().splitlines()
        entry = json.loads(line)
        assert set(entry) == {"level", "msg", "time"}
        assert entry["level"] == "error"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["time"])
        assert entry["msg"] == call.stderr.rstrip("\n")
        assert entry["msg"].startswith(f"scz-runtime: {error.__name__} ({error.code}): ")
        return call


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A shim for containerd before a recorder."""
    return Bench(tmp_path)


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [{}, {"annotations": {"a": "b"}}, {"process": {"args": ["a && b"]}}, b"not json"])
@pytest.mark.parametrize("verb", ["create", "run", "restore"])
def test_a_container_without_an_annotation_of_ours_passes_untouched(
    bench: Bench, verb: str, document: dict[str, Any] | bytes
) -> None:
    path = bench.spec(document)
    before, data = path.stat(), path.read_bytes()
    call = bench.call("--root", "/r", verb, "--bundle", str(bench.bundle), "x")
    assert (call.code, call.stdout, call.stderr) == (0, "", "")
    assert bench.arguments() == [str(bench.runtime), "--root", "/r", verb, "--bundle", str(bench.bundle), "x"]
    after = path.stat()
    assert path.read_bytes() == data
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    assert os.listdir(bench.bundle) == ["config.json"]


@pytest.mark.parametrize("escaped", [r"smm.scz\u002fmodel", r"\u0073mm.scz/model", r"smm\u002Escz/model"])
def test_an_escaped_name_is_seen(bench: Bench, escaped: str) -> None:
    path = bench.spec(b'{"annotations":{"' + escaped.encode() + b'":"small:1"}}')
    assert bench.call("create", "-b", str(bench.bundle), "x").code == 0
    assert b"--spec-digest" in path.read_bytes()


def test_our_name_elsewhere_in_the_file_changes_nothing(bench: Bench) -> None:
    path = bench.spec({"process": {"env": ["A=smm.scz/model", "SMM_SCZ_MODEL=x"]}, "annotations": None})
    data = path.read_bytes()
    assert bench.call("create", "-b", str(bench.bundle), "x").ran
    assert path.read_bytes() == data


@pytest.mark.parametrize("verb", ["start", "state", "kill", "delete", "exec", "features", "list", "fancy"])
def test_other_verbs_pass_without_a_look_at_any_bundle(bench: Bench, verb: str) -> None:
    path = bench.spec(MODEL)
    data = path.read_bytes()
    assert bench.call(verb, "--bundle", "/nowhere", "create", cwd=bench.bundle).code == 0
    assert bench.arguments()[1:] == [verb, "--bundle", "/nowhere", "create"]
    assert path.read_bytes() == data


def test_arguments_pass_byte_by_byte(bench: Bench) -> None:
    words = ["state", "", " ", "--", "-", "ü", "a\\n", "\udcff\udcfe", "$(x)", "'", '"', "*"]
    assert bench.call(*words, environment={"LC_ALL": "C"}).code == 0
    assert bench.arguments() == [str(bench.runtime), *words]


def test_only_what_runtimes_read_of_the_environment_passes(bench: Bench) -> None:
    kept = {
        "HOME": "/h",
        "TMPDIR": "/t",
        "LANG": "C",
        "LC_MESSAGES": "C",
        "XDG_RUNTIME_DIR": "/x",
        "NOTIFY_SOCKET": "/n",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "7",
        "LISTEN_FDNAMES": "a",
        "DBUS_SESSION_BUS_ADDRESS": "d",
        "_OCI_SYNCPIPE": "3",
        "_CONTAINERS_USERNS_CONFIGURED": "done",
        "GOMAXPROCS": "2",
    }
    dropped = ["LD_PRELOAD_", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "OPENSSL_CONF", "TSS2_LOG", "GODEBUG"]
    dropped += ["GLIBC_TUNABLES", "GOTRACEBACK", "BASH_ENV", "ENV", "IFS", "HTTP_PROXY", "SMM_SCZ_MODEL", "lang", "X"]
    assert bench.call("state", environment={**kept, **dict.fromkeys(dropped, "")}).code == 0
    found = (bench.out / "environment").read_text().rstrip("\0").split("\0")
    # dash sets PWD for itself, the environment that it was started with is what is read here
    assert dict(entry.split("=", 1) for entry in found) == {"PATH": "/usr/bin:/bin", **kept}


@pytest.fixture
def listing(bench: Bench) -> Bench:
    """A runtime that lists the files that it is told: /bin/ls."""
    bench.runtime.write_bytes(Path("/bin/ls").read_bytes())
    return bench


@pytest.mark.parametrize("document", [{}, MODEL])
def test_descriptors_pass_and_none_is_added(listing: Bench, document: dict[str, Any]) -> None:
    path = listing.spec(document)
    read, write = os.pipe()
    command = [str(listing.shim), "create", "/proc/self/fd"]
    try:
        done = subprocess.run(
            command, cwd=listing.bundle, pass_fds=(read, write), capture_output=True, text=True, check=False
        )
    finally:
        os.close(read)
        os.close(write)
    found = {int(name) for name in done.stdout.split()[1:]}
    assert len(found - {0, 1, 2, read, write}) == 1, done  # the folder that ls reads
    assert {0, 1, 2, read, write} <= found
    assert (b"--spec-digest" in path.read_bytes()) == bool(document)


@pytest.mark.parametrize("closed", [{0}, {2}, {0, 2}])
def test_closed_standard_streams_stay_closed(listing: Bench, closed: set[int]) -> None:
    path = listing.spec(MODEL)
    done = subprocess.run(
        [str(listing.shim), "create", "/proc/self/fd"],
        cwd=listing.bundle,
        preexec_fn=lambda: [os.close(number) for number in closed],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = {int(name) for name in done.stdout.split()[1:]}
    own = min(closed | {3})  # the folder that ls reads takes the first free number
    assert found == {0, 1, 2} - closed | {own}
    assert b"--spec-digest" in path.read_bytes()


def test_signals_are_as_they_were(bench: Bench) -> None:
    bench.runtime.write_bytes(Path("/bin/cat").read_bytes())

    def signals() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def mask(status: str, name: str) -> int:
        return int(next(line for line in status.splitlines() if line.startswith(f"{name}:")).split()[1], 16)

    def bits(*numbers: int) -> int:
        return sum(1 << (number - 1) for number in numbers)

    # Whoever started these tests may ignore more; what Python itself ignores is not passed on to its children.
    before = Path("/proc/self/status").read_text()
    ignored = mask(before, "SigIgn") & ~bits(signal.SIGPIPE, signal.SIGXFSZ)
    status = bench.call("/proc/self/status", preexec_fn=signals).stdout
    assert mask(status, "SigBlk") == mask(before, "SigBlk") | bits(signal.SIGUSR1, signal.SIGTERM)
    assert mask(status, "SigIgn") == ignored | bits(signal.SIGUSR2)
    assert mask(status, "SigCgt") == 0


@pytest.mark.parametrize("code", [0, 1, 12, 125, 255])
def test_the_exit_code_is_the_runtimes(bench: Bench, code: int) -> None:
    bench.runtime.write_text(f"#!/bin/sh\nexit {code}\n")
    bench.spec(MODEL)
    assert bench.call("create", "-b", str(bench.bundle), "x").code == code


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", ["option", "relative", "working directory"])
def test_hooks_are_added_with_owner_and_mode_kept(bench: Bench, bundle: str) -> None:
    path = bench.spec(MODEL)
    path.chmod(0o640)
    os.chown(path, 0, 65534)
    options = {"option": ["-b", str(bench.bundle)], "relative": ["--bundle=bundle"], "working directory": []}[bundle]
    cwd = bench.bundle if bundle == "working directory" else bench.folder
    assert bench.call("create", *options, "x", cwd=cwd).code == 0
    edited = path.read_bytes()
    arguments = json.loads(edited)["hooks"]["prestart"][0]["args"]
    verify_spec_digest(edited, arguments[arguments.index("--spec-digest") + 1])
    assert arguments[arguments.index("--config") + 1] == str(bench.config)
    assert (path.stat().st_mode & 0o777, path.stat().st_uid, path.stat().st_gid) == (0o640, 0, 65534)
    assert os.listdir(bench.bundle) == ["config.json"]


def test_a_second_start_of_the_same_bundle_changes_nothing(bench: Bench) -> None:
    path = bench.spec(MODEL)
    assert bench.call("create", "-b", str(bench.bundle), "x").code == 0
    first = path.read_bytes()
    assert bench.call("create", "-b", str(bench.bundle), "x").code == 0
    assert path.read_bytes() == first


def test_many_shims_at_once_leave_one_file_that_fits(bench: Bench) -> None:
    path = bench.spec(MODEL)
    command = [str(bench.shim), "create", "-b", str(bench.bundle), "x"]
    many = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(8)]
    codes = {process.wait(timeout=60) for process in many}
    edited = path.read_bytes()
    prestart = json.loads(edited)["hooks"]["prestart"]
    arguments = prestart[0]["args"]
    verify_spec_digest(edited, arguments[arguments.index("--spec-digest") + 1])
    assert len(prestart) == 1
    assert codes <= {0, SpecInvalid.code}  # the slower one of two found the file changed
    assert 0 in codes
    assert os.listdir(bench.bundle) == ["config.json"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["absent", "link", "fifo", "socket", "folder", "huge", "not json", "malformed", "other's"]
)
@pytest.mark.parametrize("verb", ["create", "run"])
def test_a_file_that_cannot_be_used(bench: Bench, verb: str, what: str) -> None:
    path = bench.spec(MODEL)
    listener = socket.socket(socket.AF_UNIX)
    if what not in ("not json", "malformed", "huge", "other's"):
        path.rename(bench.folder / "elsewhere")
    if what == "link":
        path.symlink_to(bench.folder / "elsewhere")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        listener.bind(str(path))
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        os.truncate(path, 1 << 40)
    elif what == "not json":
        path.write_bytes(b'{"annotations": {"smm.scz/model": "x"}')
    elif what == "malformed":
        path.write_bytes(b'{"annotations": {"smm.scz/model": 1}}')
    elif what == "other's":
        os.chown(path, 1234, 1234)
    before = sorted(os.listdir(bench.bundle))
    call = bench.refused(SpecInvalid, verb, "-b", str(bench.bundle), "x")
    assert len(call.stderr.splitlines()) == 1
    assert sorted(os.listdir(bench.bundle)) == before
    listener.close()


def test_a_bundle_that_is_not_there(bench: Bench) -> None:
    bench.refused(SpecInvalid, "create", "-b", str(bench.folder / "nowhere"), "x")


@pytest.mark.parametrize("annotations", [{"smm.scz/shim": "1"}, {"smm.scz/shim": "1", **MODEL["annotations"]}])
def test_an_annotation_that_is_not_known(bench: Bench, annotations: dict[str, str]) -> None:
    path = bench.spec({"annotations": annotations})
    data = path.read_bytes()
    bench.refused(AnnotationInvalid, "create", "-b", str(bench.bundle), "x")
    assert path.read_bytes() == data


def test_a_forged_marker(bench: Bench) -> None:
    path = bench.spec(MODEL)
    bench.call("create", "-b", str(bench.bundle), "x")
    document = json.loads(path.read_bytes())
    arguments = document["hooks"]["prestart"][0]["args"]
    arguments[arguments.index("--spec-digest") + 1] = "ab" * 32
    bench.spec(document)
    bench.refused(SpecInvalid, "create", "-b", str(bench.bundle), "x")


def test_restore(bench: Bench) -> None:
    bench.spec(MODEL)
    assert "restored" in bench.refused(EngineUnsupported, "restore", "-b", str(bench.bundle), "x").stderr


def test_an_option_that_may_have_a_value(bench: Bench) -> None:
    words = ("--unheard-of", "value", "create", "-b", str(bench.bundle), "x")
    bench.spec({})
    assert bench.call(*words).ran
    assert bench.call("--unheard-of", "value", "create", "x").ran  # there is no config.json here at all
    bench.spec(MODEL)
    assert "--unheard-of=VALUE" in bench.refused(EngineUnsupported, *words).stderr
    assert bench.call("--unheard-of=value", *words[2:]).ran


@pytest.mark.parametrize("name", ["other.json", "./config.json"])
def test_another_file_than_config_json(tmp_path: Path, name: str) -> None:
    """crun looks for it before it goes into the bundle."""
    bench = Bench(tmp_path, runtime="crun")
    bench.spec({})
    here = tmp_path / "here"
    here.mkdir()
    words = ("create", "--config", name, "-b", str(bench.bundle), "x")
    (here / name).write_text(json.dumps(MODEL))
    bench.refused(EngineUnsupported, *words, cwd=here)
    (here / name).write_text("{}")
    (bench.bundle / "other.json").write_text(json.dumps(MODEL))
    assert bench.call(*words, cwd=here).ran


def test_a_runtime_behind_a_link_is_read_as_what_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, runtime="runc")
    bench.runtime.rename(tmp_path / "crun")
    bench.runtime.symlink_to(tmp_path / "crun")
    path = bench.spec(MODEL)
    assert bench.call("create", f"-b{bench.bundle}", "x").ran  # getopt's shape; runc itself would refuse it
    assert b"--spec-digest" in path.read_bytes()


def test_a_runtime_that_is_not_there(bench: Bench) -> None:
    bench.runtime.unlink()
    for verb in ("create", "state"):
        bench.spec({})
        assert "No such file" in bench.refused(FileUnreadable, verb, "-b", str(bench.bundle), "x").stderr


def test_a_bundle_that_cannot_be_written(bench: Bench) -> None:
    bench.spec(MODEL)
    where = bench.bundle
    script = f"mount -t tmpfs t {where} && cp {bench.folder}/copy {where}/config.json && mount -o remount,ro {where}"
    (bench.folder / "copy").write_text(json.dumps(MODEL))
    command = ["unshare", "-m", "sh", "-c", f"{script} && exec {bench.shim} create -b {where} x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == FileUnreadable.code, done.stderr
    assert "Read-only" in done.stderr
    assert not (bench.out / "arguments").exists()


def test_the_refusal_is_kept_for_why_and_audited(bench: Bench) -> None:
    bench.spec({"annotations": {"smm.scz/modl": "x"}})
    bench.call("create", "-b", str(bench.bundle), "some-container")
    (refusal,) = load_refusals(str(bench.folder / "run"))
    assert (refusal.container_id, refusal.code) == ("some-container", AnnotationInvalid.code)
    record = json.loads((bench.folder / "audit").read_text())
    assert "some-container" in json.dumps(record)


@pytest.mark.parametrize("log", ["text", "none", "stderr", "link", "folder", "fifo", "crun's word"])
def test_logs_of_other_kinds(bench: Bench, log: str) -> None:
    bench.spec({"annotations": {"smm.scz/modl": "x"}})
    path, target = bench.folder / "log", bench.folder / "target"
    options = ["--log", str(path)]
    if log == "none":
        options = []
    elif log == "stderr":
        options = ["--log", "/dev/stderr"]
    elif log == "link":
        path.symlink_to(target)
    elif log == "folder":
        path.mkdir()
    elif log == "fifo":
        os.mkfifo(path)
    elif log == "crun's word":
        options = ["--log", f"file:{path}"]
    call = bench.call(*options, "create", "-b", str(bench.bundle), "x")
    assert (call.code, call.ran) == (AnnotationInvalid.code, False)
    assert not target.exists()
    if log in ("text", "crun's word"):
        (line,) = path.read_text().splitlines()
        assert re.fullmatch(r'time="[0-9TZ:-]+" level=error msg="scz-runtime: AnnotationInvalid \(12\): .*"', line)


# --- the script and what it costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "engine", "config"),
    [
        ("runc", "containerd", "/c"),
        ("/bin/youki", "containerd", "/c"),
        ("/bin/krun", "containerd", "/c"),  # crun by its file, a virtual machine by its name
        ("/bin/runc", "moby", "/c"),
        ("/bin/runc", "docker", "c"),
    ],
)
def test_a_script_is_written_for_what_is_known_only(runtime: str, engine: str, config: str) -> None:
    with pytest.raises(EngineUnsupported):
        shim_script(runtime=runtime, engine=engine, config_file=config)


@pytest.mark.parametrize("interpreter", ["/" + "x" * 250, "/a b/python3"])
def test_an_interpreter_that_a_first_line_cannot_have(monkeypatch: pytest.MonkeyPatch, interpreter: str) -> None:
    monkeypatch.setattr(sys, "_base_executable", interpreter)
    with pytest.raises(EngineUnsupported):
        shim_script(runtime="/usr/bin/runc", engine="docker", config_file="/c")


def test_the_longest_first_line_that_linux_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60) / ("d" * 60)
    folder.mkdir(parents=True)
    interpreter = folder / ("p" * (255 - len(f"#!{folder}/ -IS")))
    interpreter.write_bytes(Path("/bin/echo").read_bytes())
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "_base_executable", str(interpreter))
    script = tmp_path / "scz-runc"
    script.write_bytes(shim_script(runtime="/usr/bin/runc", engine="docker", config_file="/c"))
    script.chmod(0o755)
    assert len(script.read_bytes().split(b"\n")[0]) == 255
    done = subprocess.run([script, "x"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-IS {script} x\n"
    monkeypatch.setattr(sys, "_base_executable", f"{interpreter}p")
    with pytest.raises(EngineUnsupported):
        shim_script(runtime="/usr/bin/runc", engine="docker", config_file="/c")


def test_words_in_the_script_are_data(tmp_path: Path) -> None:
    runtime = tmp_path / 'it\'s "a" \\ runc\udcff'
    runtime.write_text('#!/bin/sh\necho "$@"\n')
    runtime.chmod(0o755)
    script = tmp_path / "scz-runc"
    script.write_bytes(shim_script(runtime=str(runtime), engine="docker", config_file="/'); import nothing; ('"))
    script.chmod(0o755)
    done = subprocess.run([script, "state", "x"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "state x\n", "")


def modules_after(bench: Bench, *arguments: str) -> set[str]:
    """What is imported when the runtime would be executed."""
    stand_in = "os.execve = lambda *words: (os.write(1, ' '.join(sys.modules).encode()), os._exit(0))"
    lines = bench.shim.read_text().splitlines()
    script = bench.folder / "modules.py"
    script.write_text("\n".join([*lines[:-1], "import os", stand_in, lines[-1]]))
    command = [sys.executable, "-IS", script, *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_what_the_fast_path_imports(bench: Bench) -> None:
    bench.spec({"process": {"args": ["a\u0026b"]}})
    listing = [sys.executable, "-IS", "-c", "import sys, os, __future__; print(*sys.modules)"]
    bare = subprocess.run(listing, capture_output=True, text=True, check=True)
    added = modules_after(bench, "create", "-b", str(bench.bundle), "x") - set(bare.stdout.split())
    assert added == {"oci_hook", "oci_hook.shim", "oci_hook.oci", "oci_hook.oci.command_line"}


def test_with_a_model_the_standard_library_is_enough(bench: Bench) -> None:
    bench.spec(MODEL)
    names = {name.split(".")[0] for name in modules_after(bench, "create", "-b", str(bench.bundle), "x")}
    assert names - set(sys.stdlib_module_names) - {"__main__"} == {"oci_hook"}
    assert b"--spec-digest" in (bench.bundle / "config.json").read_bytes()
