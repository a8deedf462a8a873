"""`sczctl doctor` on a whole host: software TPM, enrolment, model and podman, as parts of it fail; and the grades of
real containers, for each reason that a container itself can give."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oci_hook.cli.checks.hooks import read_directories
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import HostFiles
from tests.commands import done, sczctl
from tests.engines import Podman, container_limits
from tests.scene import AUDIENCE, ISSUER, SUBJECT, Scene
from tests.software_tpm import SoftwareTpm
from tests.suites import version

USERNS = ("--uidmap", "0:200000:65536", "--gidmap", "0:200000:65536")
NO_CORES = tuple(word for limit in ("core=0", *container_limits()) for word in ("--ulimit", limit))
# What this machine's kernel and its software TPM add to every container's reasons.
OF_THE_HOST = {"software-tpm", "core-dumps", "swap"}

PROGRAMS = {"podman": "/usr/bin/podman", "runc": "/usr/sbin/runc", "crun": "/usr/bin/crun"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with podman and its runtimes, as no test writes into the directory that the machine's podman reads."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    for name, path in PROGRAMS.items():
        shutil.copy(path, tmp_path / "usr/bin" / name)
    return tmp_path


# What this machine's kernel, its clock and its devices add; the rest of a host that is ready is ok.
MACHINES = ("swap", "kdump", "hibernation", "core dumps", "suid_dumpable", "ptrace", "clock", "TPM access")


def ask(scene: Scene, root: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    told = scene.sczctl("doctor", "--root", root, "--json", check=False)
    assert told.stderr == ""
    return told.returncode, {check["name"]: check for check in json.loads(told.stdout)["checks"]}


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_second_copy_of_the_hook_does_run_twice(tmp_path: Path, root: Path, runtime: str) -> None:
    """What doctor says of two files is what podman does with them."""
    trace, script = tmp_path / "trace", tmp_path / "hook"
    script.write_text(f'#!/bin/sh\ncat > /dev/null\necho "$*" >> {trace}\n')
    script.chmod(0o755)
    done(sczctl("install", "--engine", "podman", "--root", root))
    folder = root / DEFAULT_DIRECTORY.lstrip("/")
    for file in folder.iterdir():
        document = json.loads(file.read_text())
        document["hook"]["path"] = str(script)  # the arguments stay
        file.write_text(json.dumps(document))
    shutil.copy(folder / "scz-smm-prestart.json", folder / "second.json")
    told = sczctl("doctor", "--root", root, "--json").json
    (warning,) = (check for check in told["checks"] if (check["name"], check["status"]) == ("hooks podman", "warn"))
    assert "both call the hook at prestart: it runs twice" in warning["message"]
    assert warning["remedy"] == f"rm {DEFAULT_DIRECTORY}/second.json"
    with (
        tempfile.TemporaryDirectory(prefix="scz-hooks.", dir="/var/tmp") as made,
        Podman(f"{made}/podman", hooks_directories=[folder]) as podman,
    ):
        image = podman.busybox_image()
        podman.run(["--rm", "--annotation", "smm.scz/model=x", image, "true"], runtime=runtime)
    assert [line.split()[-1] for line in trace.read_text().splitlines()] == ["prestart", "prestart", "poststop"]


def test_podman_reads_what_doctor_says(tmp_path: Path) -> None:
    """podman's own files below /etc/containers, in a mount namespace: the last file that names `hooks_dir` counts."""
    containers = tmp_path / "root/etc/containers"
    (containers / "containers.conf.d").mkdir(parents=True)
    trace = tmp_path / "trace"
    for name in ("main", "first", "last", "no-drop-in"):
        folder = tmp_path / name
        folder.mkdir()
        script = f"#!/bin/sh\ncat > /dev/null\necho {name} >> {trace}\n"
        (folder / "hook").write_text(script)
        (folder / "hook").chmod(0o755)
        hook = {"path": str(folder / "hook"), "env": ["PATH=/bin"], "timeout": 10}
        when = {"annotations": {"^x$": "yes"}}
        document = {"version": "1.0.0", "hook": hook, "when": when, "stages": ["prestart"]}
        (folder / f"{name}.json").write_text(json.dumps(document))
    with (
        tempfile.TemporaryDirectory(prefix="scz-hooks.", dir="/var/tmp") as made,
        Podman(f"{made}/podman") as podman,
    ):
        image = podman.busybox_image()
        own = Path(podman.environment["CONTAINERS_CONF"]).read_text()
        (containers / "containers.conf").write_text(
            own.replace("[engine]", f'[engine]\nhooks_dir = ["{tmp_path}/main"]')
        )
        for file, name in (("10.conf", "first"), ("20.conf", "last"), ("30.toml", "no-drop-in")):
            text = f'[engine]\nhooks_dir = ["{tmp_path}/{name}"]\n'
            (containers / "containers.conf.d" / file).write_text(text)
        bind = f'mount --bind {containers} /etc/containers && exec "$@"'
        words = podman.command(*podman._new("run"), "--rm", "--annotation", "x=yes", image, "true")
        prefix = podman.namespace.prefix
        environment = {name: value for name, value in podman.environment.items() if name != "CONTAINERS_CONF"}
        ran = subprocess.run(
            [*prefix, "unshare", "--mount", "sh", "-c", bind, "sh", *words[len(prefix) :]],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    assert trace.read_text().split() == ["last"]
    assert read_directories("podman", HostFiles(str(tmp_path / "root"))) == [f"{tmp_path}/last"]


@contextmanager
def running(
    scene: Scene, *options: str, runtime: str = "runc", model: str = "small:1", ttl_seconds: int = 600
) -> Iterator[str]:
    """A container that holds the model; its id. It is gone at the end."""
    token = scene.token(f"token-{len(options)}-{ttl_seconds}", ttl_seconds=ttl_seconds)
    words = ["--detach", *options]
    started = scene.run(scene.image, ["sleep", "600"], model=model, token=token, runtime=runtime, options=words)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        yield container
    finally:
        scene.podman.call("rm", "--force", "--time", "0", container)


def graded(scene: Scene, root: Path, container: str, *, model: str = "small:1") -> tuple[str, dict[str, str]]:
    """What doctor says of the one container: its grade, and its reasons with their weights."""
    told = json.loads(scene.sczctl("doctor", "--root", root, "--json", check=False).stdout)
    (found,) = told["containers"]
    assert (found["container_id"], found["models"]) == (container, [model])
    assert all(reason["remedy"] for reason in found["reasons"])
    return found["grade"], {reason["name"]: reason["weight"] for reason in found["reasons"]}


@pytest.mark.parametrize(
    ("runtime", "options", "grade", "reasons"),
    [
        ("runc", (*NO_CORES, *USERNS), "weak", {}),
        ("crun", (*NO_CORES, *USERNS), "weak", {}),
        ("runc", NO_CORES, "weak", {"no-user-namespace": "weak"}),
        ("crun", ("--security-opt", "seccomp=unconfined", *USERNS), "weak", {"no-seccomp": "weak"}),
        ("runc", ("--cap-add", "SYS_PTRACE", *USERNS), "weak", {"ptrace": "weak"}),
        (
            "crun",
            ("--cap-add", "DAC_READ_SEARCH"),
            "insecure",
            {"privileged": "insecure", "no-user-namespace": "weak"},
        ),
        (
            "runc",
            ("--privileged",),
            "insecure",
            {"privileged": "insecure", "no-user-namespace": "weak", "no-seccomp": "weak", "ptrace": "weak"},
        ),
        (
            "crun",
            ("--pid", "host", "--cap-add", "SYS_PTRACE"),
            "insecure",
            {"host-pids": "insecure", "no-user-namespace": "weak"},
        ),
    ],
)
def test_each_container_is_graded(
    scene: Scene, root: Path, runtime: str, options: Sequence[str], grade: str, reasons: dict[str, str]
) -> None:
    with running(scene, *options, runtime=runtime) as container:
        judged, found = graded(scene, root, container)
    assert judged == grade
    assert {name: weight for name, weight in found.items() if name not in OF_THE_HOST} == reasons
    assert found["software-tpm"] == "weak"
    if options[: len(NO_CORES)] == NO_CORES:  # then only a program that the kernel starts whatever the limit says
        assert "core-dumps" not in found or Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")
    told = json.loads(scene.sczctl("doctor", "--root", root, "--json", check=False).stdout)
    assert told["containers"] == []


def test_a_token_that_is_valid_for_long(scene: Scene, root: Path, model_source: Path) -> None:
    access = scene.owner / "patient.json"
    identity = {"issuer": ISSUER, "audience": AUDIENCE, "subjects": [SUBJECT]}
    access.write_text(json.dumps({"identities": [identity], "token_age_seconds": 7 * 86400, "share": False}))
    out = scene.usb / "patient"
    out.mkdir()
    scene.sczctl("pack", model_source, "-o", out / "bundle", "--keys", scene.owner / "keys", "--name", "patient",
                 "--version", "1", "--access", access)  # fmt: skip
    scene.grant(out, name="patient")
    scene.add(out)
    with running(scene, *USERNS, model="patient:1", ttl_seconds=3 * 86400) as container:
        assert graded(scene, root, container, model="patient:1")[1]["long-token"] == "weak"
        text = scene.sczctl("doctor", "--root", root, check=False).stdout.splitlines()
        assert f"  weak     {container[:12]} (patient:1)" in text
        assert "1 weak" in text[-1]
    scene.sczctl("rm", "patient:1")


def test_a_model_that_its_container_has_changed(scene: Scene, root: Path) -> None:
    with running(scene, "--privileged") as container:
        scene.podman.call("exec", container, "mount", "-o", "remount,rw", "/models/small")
        judged, found = graded(scene, root, container)
        assert (judged, found["mount-writable"]) == ("insecure", "insecure")
        scene.podman.call("exec", container, "umount", "/models/small")
        assert graded(scene, root, container)[1]["mount-gone"] == "weak"


def test_a_gvisor_sandbox(scene: Scene, root: Path) -> None:
    path = shutil.which("runsc")
    assert path is not None, "packaging/prepare-host tests"
    # runsc of 2022 has no layer over its root, and no flag for it.
    runsc = f"{path} platform=ptrace network=none" + ("" if "~2022" in version(Path(path)) else " overlay2=none")
    with running(scene, runtime=runsc) as container:
        told = json.loads(scene.sczctl("doctor", "--root", root, "--json", check=False).stdout)
        (found,) = told["containers"]
    assert (found["container_id"], found["sandbox"]) == (container, "gvisor")
    assert {reason["name"] for reason in found["reasons"]} <= OF_THE_HOST
    assert "inside the sandbox" in found["unseen"][0]


def tpm2(tpm: SoftwareTpm, *command: str) -> int:
    """Run one of tpm2-tools; its exit code."""
    environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": tpm.tcti}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode


def _fail_an_authorisation(tpm: SoftwareTpm) -> None:
    """Use a key under dictionary-attack protection with a wrong password."""
    key = tpm.directory / "protected.ctx"
    assert tpm2(tpm, "tpm2_createprimary", "-Q", "-C", "o", "-p", "right", "-c", str(key)) == 0
    assert tpm2(tpm, "tpm2_create", "-Q", "-C", str(key), "-P", "wrong", "-u", "/dev/null", "-r", "/dev/null") != 0
    assert tpm2(tpm, "tpm2_flushcontext", "--transient-object") == 0


def test_a_tpm_in_lockout(scene: Scene, root: Path) -> None:
    """Its counter is said before, the lockout after as many failures as the TPM allows."""
    limits = ("--max-tries=3", "--recovery-time=1000", "--lockout-recovery-time=1000")
    assert tpm2(scene.tpm, "tpm2_dictionarylockout", "--setup-parameters", *limits) == 0
    _fail_an_authorisation(scene.tpm)
    _, found = ask(scene, root)
    assert (found["TPM lockout"]["status"], "1 of 3 failures" in found["TPM lockout"]["message"]) == ("warn", True)
    _fail_an_authorisation(scene.tpm)
    _fail_an_authorisation(scene.tpm)
    _, found = ask(scene, root)
    assert found["TPM lockout"]["message"].startswith("in dictionary-attack lockout (3 of 3 failures)")
    assert "tpm2_dictionarylockout --clear-lockout" in found["TPM lockout"]["remedy"]
    assert found["TPM"]["status"] == "ok"
    assert tpm2(scene.tpm, "tpm2_dictionarylockout", "--clear-lockout") == 0
    assert ask(scene, root)[1]["TPM lockout"]["status"] == "ok"


def test_a_host_that_is_ready_and_one_that_no_longer_is(scene: Scene, root: Path) -> None:
    code, found = ask(scene, root)
    assert found["engines"]["remedy"] == "`sczctl install --engine ENGINE`"
    scene.sczctl("install", "--engine", "podman", "--root", root)
    (root / "etc/logrotate.d").mkdir(parents=True)
    (root / "etc/logrotate.d/scz-smm").write_text(f"{scene.audit} {{\n}}\n")
    code, found = ask(scene, root)
    wrong = [check for check in found.values() if check["status"] != "ok" and not check["name"].startswith(MACHINES)]
    assert [(check["name"], check["status"]) for check in wrong] == [("TPM kind", "warn")]
    assert code == 0
    assert "is the one that was enrolled" in found["TPM"]["message"]
    assert "software TPM (IBM SW TPM" in found["TPM kind"]["message"]
    assert found["TPM lockout"]["message"].startswith("none: 0 of ")
    assert "that this boot state meets" in found["model small:1"]["message"]
    deep = json.loads(scene.sczctl("doctor", "--root", root, "--deep", "--json").stdout)
    assert "every file hashed" in next(c for c in deep["checks"] if c["name"] == "model small:1")["message"]

    scene.tpm.extend(8, "another kernel")
    code, found = ask(scene, root)
    failing = [name for name, check in found.items() if check["status"] == "fail"]
    assert (code, failing) == (1, ["model other:1", "model small:1"])
    assert "boot-policy measure" in found["model small:1"]["remedy"]

    scene.tpm.stop()
    code, found = ask(scene, root)
    failing = [name for name, check in found.items() if check["status"] == "fail"]
    assert (code, failing) == (1, ["TPM"])
    assert "tpm.tcti" in found["TPM"]["remedy"]
