"""What `sczctl install` writes, read by the real containerd and dockerd; nothing of the machine's own is touched.

containerd: this machine's, Debian 13's and what Debian's unstable suite holds today: the answer to `config dump`, and
this machine's started, to see that it still offers pods. Docker: this machine's dockerd started, Debian 13's by
`--validate`. No CRI-O runs: its drop-in is compared with its documentation in unit tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from oci_hook.engines.programs import major_minor, program_version
from tests.commands import done, sczctl
from tests.suites import NotInSuite, program

START_SECONDS, END_SECONDS = 60, 30
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
SECTIONS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
CONTAINERDS = ("here", "trixie", "sid")


def containerd_of(suite: str) -> Path | None:
    """None, with a warning, if the unstable suite has none today."""
    if suite == "here":
        return Path("/usr/bin/containerd")
    try:
        return program(suite, "containerd")
    except NotInSuite:
        if suite != "sid":
            raise
        warnings.warn("no containerd in sid today", stacklevel=1)
        return None


def config_dump(containerd: Path, config: Path) -> dict[str, Any]:
    """The configuration that containerd puts together from a file and what it imports: its plugin for pods."""
    command = [containerd, "--config", config, "config", "dump"]
    told = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=START_SECONDS)
    document = tomllib.loads(told.stdout)
    plugin: dict[str, Any] = document["plugins"][SECTIONS[min(document["version"], 3)]]
    return plugin


def install(containerd: Path, config: Path, shims: Path) -> list[str]:
    version = program_version(str(containerd))
    words = ["--engine-version", version, "--engine-config", config, "--shim-dir", shims]
    told = done(sczctl("install", "--engine", "containerd", "--runtime", "/usr/sbin/runc", *words, "--json")).json
    steps: list[str] = told["next"]
    return steps


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    return tmp_path / "etc" / "config.toml"


def imports(config: Path) -> str:
    return f'imports = ["{config.parent}/conf.d/*.toml"]\n'


@pytest.mark.parametrize("suite", CONTAINERDS)
@pytest.mark.parametrize("version", [2, 3])
def test_containerd_has_the_handlers(tmp_path: Path, config: Path, suite: str, version: int) -> None:
    containerd = containerd_of(suite)
    if containerd is None or (version == 3 and (major_minor(program_version(str(containerd))) or (0, 0)) < (2, 0)):
        return  # 1.x does not know version 3
    config.write_text(f"version = {version}\n{imports(config)}")
    assert install(containerd, config, tmp_path / "shims") == ["systemctl restart containerd"]
    found = config_dump(containerd, config)["containerd"]
    assert set(found["runtimes"]) == {"runc", "scz-runc"}
    assert found["default_runtime_name"] == "runc"
    ours = found["runtimes"]["scz-runc"]
    assert (ours["runtime_type"], ours["pod_annotations"]) == ("io.containerd.runc.v2", ["smm.scz/*"])
    assert os.access(ours["options"]["BinaryName"], os.X_OK)
    done(sczctl("uninstall", "--engine", "containerd", "--engine-config", config, "--shim-dir", tmp_path / "shims"))
    assert set(config_dump(containerd, config)["containerd"]["runtimes"]) == {"runc"}


@pytest.mark.parametrize("suite", CONTAINERDS)
def test_containerd_keeps_what_the_administrator_says(tmp_path: Path, config: Path, suite: str) -> None:
    containerd = containerd_of(suite)
    if containerd is None:
        return
    prefix = f'plugins."{SECTIONS[2]}"'
    mine = (
        f'version = 2\n{imports(config)}[{prefix}.cni]\nbin_dir = "/mine/cni"\n'
        f'[{prefix}.containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'
        f"[{prefix}.containerd.runtimes.runc.options]\nSystemdCgroup = true\n"
    )
    config.write_text(mine)
    steps = install(containerd, config, tmp_path / "shims")
    assert config.read_text() == mine
    if len(steps) > 1:  # up to 1.7: by hand
        lines = steps[0].partition("\n\n")[2]
        assert config_dump(containerd, config)["cni"]["bin_dir"] == "/mine/cni"
        # The reason: as a drop-in, the same lines undo the administrator's.
        (config.parent / "conf.d").mkdir()
        (config.parent / "conf.d" / "naive.toml").write_text("version = 2\n" + lines)
        assert "/mine/cni" not in str(config_dump(containerd, config)["cni"])
        (config.parent / "conf.d" / "naive.toml").unlink()
        config.write_text(mine + lines)
    found = config_dump(containerd, config)
    assert "/mine/cni" in str(found["cni"])
    runtimes = found["containerd"]["runtimes"]
    assert set(runtimes) == {"runc", "scz-runc"}
    assert [each["options"]["SystemdCgroup"] for each in runtimes.values()] == [True, True]


@contextlib.contextmanager
def daemon(command: Sequence[str | Path], ask: Sequence[str | Path], log: Path) -> Iterator[str]:
    """Start a daemon; yields what it answers once it does. It is ended by its own signal, and waited for."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            asked = subprocess.run(ask, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
            if asked.returncode == 0 and asked.stdout.strip() != "null":  # Docker's client, since 23, for none there
                break
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield asked.stdout
    finally:
        started.terminate()
        try:
            started.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def test_containerd_here_still_offers_pods(tmp_path: Path, config: Path) -> None:
    containerd = Path("/usr/bin/containerd")
    config.write_text(f"version = 2\n{imports(config)}")
    install(containerd, config, tmp_path / "shims")
    socket = tmp_path / "s"
    command = [containerd, "--config", config, "--root", tmp_path / "r", "--state", tmp_path / "t", "--address", socket]
    with daemon(command, ["/usr/bin/ctr", "--address", socket, "plugins", "ls"], tmp_path / "log") as told:
        rows = [line.split() for line in told.splitlines()]
        assert [row[-1] for row in rows if row[:2] == ["io.containerd.grpc.v1", "cri"]] == ["ok"]


@pytest.fixture
def no_trust_key() -> Iterator[None]:
    """dockerd before 23 makes a key of its own in /etc/docker wherever its files are; it goes if it was not there."""
    key = Path("/etc/docker/key.json")
    made_by_us = not key.exists()
    yield
    if made_by_us:
        key.unlink(missing_ok=True)


@pytest.mark.usefixtures("no_trust_key")
def test_docker_here_has_the_runtime(tmp_path: Path) -> None:
    config, socket = tmp_path / "daemon.json", f"unix://{tmp_path}/s"
    mine = {"iptables": False, "bridge": "none", "data-root": f"{tmp_path}/data", "exec-root": f"{tmp_path}/exec"}
    config.write_text(json.dumps({**mine, "pidfile": f"{tmp_path}/pid", "hosts": [socket]}))
    words = ["--engine", "docker", "--engine-config", config, "--shim-dir", tmp_path / "shims"]
    done(sczctl("install", *words, "--runtime", "/usr/sbin/runc"))
    ask = ["/usr/bin/docker", "--host", socket, "info", "--format", "{{json .Runtimes}}"]
    with daemon(["/usr/sbin/dockerd", "--config-file", config], ask, tmp_path / "log") as told:
        runtimes = json.loads(told)
    assert "runc" in runtimes
    assert runtimes["scz-runc"]["path"] == str(tmp_path / "shims" / "docker" / "scz-runc")
    done(sczctl("uninstall", *words))
    assert json.loads(config.read_text()) == {**mine, "pidfile": f"{tmp_path}/pid", "hosts": [socket]}


def test_docker_of_debian_13_accepts_the_file(tmp_path: Path) -> None:
    config = tmp_path / "daemon.json"
    words = ["--engine", "docker", "--engine-config", config, "--shim-dir", tmp_path / "shims"]
    done(sczctl("install", *words, "--runtime", "/usr/sbin/runc"))
    command = [program("trixie", "dockerd"), "--validate", "--config-file", config]
    validated = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert (validated.returncode, "configuration OK" in validated.stderr + validated.stdout) == (0, True), validated
    config.write_text('{"runtimes": {"scz-runc": {"path": 1}}}')
    validated = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert validated.returncode != 0  # it would have said so
