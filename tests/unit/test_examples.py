"""`config/`: the examples are what the code reads and writes, but for the paths of a packaged installation."""

from __future__ import annotations

import configparser
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click
import pytest

from oci_hook.cli import cli
from oci_hook.engines import cdi, containerd, crio, docker, hooks_directory, podman
from oci_hook.engines.plan import KINDS, HostFiles, Plan, Runtime, Settings
from oci_hook.invocation import Invocation

CONFIG = Path(__file__).parents[2] / "config"
CONFIG_FILE = "/etc/scz-smm/config.toml"
PACKAGED = ["/usr/bin/python3", "-I", "-S", "/usr/lib/scz-smm/oci_hook/launch.py"]
SETTINGS = Settings(
    config_file=CONFIG_FILE,
    runtimes=tuple(Runtime(kind, f"/usr/bin/{kind}") for kind in KINDS),
    script=lambda **_words: b"#!/usr/bin/python3 -IS\n",
)


def packaged(data: bytes) -> bytes:
    """With the paths of a packaged installation for those of this one."""
    here = Invocation("prestart").command()
    return data.replace(here[3].encode(), PACKAGED[3].encode()).replace(here[0].encode(), PACKAGED[0].encode())


def written(plan: Plan) -> Mapping[str, bytes]:
    return {change.path: packaged(change.data) for change in plan.changes if change.data is not None}


@pytest.mark.parametrize("stage", ["prestart", "poststop"])
@pytest.mark.parametrize("engine", [podman, crio])
def test_hooks_d_examples_are_what_install_writes(tmp_path: Path, engine: object, stage: str) -> None:
    folder = "hooks.d" if engine is podman else "crio/hooks.d-cri-o"
    plan = (podman if engine is podman else crio).plan_install(SETTINGS, HostFiles(str(tmp_path)))
    (found,) = (data for path, data in written(plan).items() if path.endswith(f"scz-smm-{stage}.json"))
    assert (CONFIG / folder / f"scz-smm-{stage}.json").read_bytes() == found


def test_podmans_examples_before_create_are_what_install_writes(tmp_path: Path) -> None:
    found = written(podman.plan_install(replace(SETTINGS, before_create=True), HostFiles(str(tmp_path))))
    for example in ("hooks.d-podman/scz-smm-precreate.json", "containers.conf.d/60-scz-smm-before-create.conf"):
        (data,) = (data for path, data in found.items() if path.endswith(f"/{example}"))
        assert (CONFIG / "podman" / example).read_bytes() == data


def test_hooks_never_inherit_an_environment_and_always_end() -> None:
    for document in hooks_directory.hooks_d_documents("podman", "/c", 300).values():
        hook = json.loads(document)["hook"]
        assert hook["env"]
        assert hook["timeout"] > 0
        assert hook["args"][1:3] == ["-I", "-S"]


def test_the_podman_drop_in_names_both_directories() -> None:
    drop_in = tomllib.loads((CONFIG / "containers.conf.d" / "50-scz-smm.conf").read_text())
    assert drop_in == {"engine": {"hooks_dir": ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"]}}


def test_the_cri_o_drop_in_is_what_install_writes(tmp_path: Path) -> None:
    found = written(crio.plan_install(SETTINGS, HostFiles(str(tmp_path))))
    assert (CONFIG / "crio/crio.conf.d/50-scz-smm.conf").read_bytes() == found["/etc/crio/crio.conf.d/50-scz-smm.conf"]


@pytest.mark.parametrize(("example", "version"), [("1.x", 2), ("2.x", 3)])
def test_the_containerd_drop_ins_are_what_install_writes(tmp_path: Path, example: str, version: int) -> None:
    main = tmp_path / "etc/containerd/config.toml"
    main.parent.mkdir(parents=True)
    main.write_text(f'version = {version}\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    plan = containerd.plan_install(SETTINGS, HostFiles(str(tmp_path)))
    expected = written(plan)["/etc/containerd/conf.d/50-scz-smm.toml"]
    assert (CONFIG / "containerd" / example / "50-scz-smm.toml").read_bytes() == expected
    assert plan.next_steps == ("systemctl restart containerd",)


def test_the_docker_example_is_what_install_writes(tmp_path: Path) -> None:
    found = written(docker.plan_install(SETTINGS, HostFiles(str(tmp_path))))
    assert (CONFIG / "docker/daemon.json").read_bytes() == found["/etc/docker/daemon.json"]


def test_the_cdi_example_is_what_generate_writes() -> None:
    devices = [cdi.model_device("minilm:1")]
    data = cdi.device_file(devices, config_file=CONFIG_FILE, engine="podman", timeout_seconds=300)
    assert (CONFIG / "cdi/scz-smm.json").read_bytes() == packaged(data)


def test_the_units_sweep_at_boot_and_every_few_minutes() -> None:
    units = {}
    for kind in ("service", "timer"):
        units[kind] = configparser.ConfigParser(strict=True, interpolation=None)
        units[kind].optionxform = str  # type: ignore[assignment,method-assign]
        units[kind].read_string((CONFIG / "systemd" / f"scz-smm-sweep.{kind}").read_text())
    program, *words = units["service"]["Service"]["ExecStart"].split()
    assert program == "/usr/bin/sczctl"
    assert isinstance(cli.get_command(click.Context(cli), words[0]), click.Command)
    assert units["service"]["Service"]["Type"] == "oneshot"
    # A namespace of its own would hide the host's mounts from it; systemd makes one for each of these.
    private = {"PrivateMounts", "ProtectSystem", "ProtectHome", "PrivateTmp", "ReadOnlyPaths", "ProtectKernelTunables"}
    assert not private & set(units["service"]["Service"])
    assert {"OnBootSec", "OnUnitInactiveSec"} <= set(units["timer"]["Timer"])
    assert units["timer"]["Install"]["WantedBy"] == "timers.target"
