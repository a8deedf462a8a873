"""What the shells complete: click's own protocol, asked in this process; nothing is written, nothing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from oci_hook.cli import cli
from oci_hook.cli.completion import complete_containers
from oci_hook.errors import TokenMissing
from oci_hook.linux.processes import process_start_time
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.report import keep_refusal
from tests.commands import Household, done, snapshot


def complete(*words: object, incomplete: str = "") -> list[str]:
    found = ShellComplete(cli, {}, "sczctl", "_SCZCTL_COMPLETE").get_completions(
        [str(word) for word in words], incomplete
    )
    return [str(item.value) for item in found if item.type == "plain"]


@pytest.fixture
def house(tmp_path: Path) -> Household:
    house = Household(tmp_path)
    done(house.ctl("add", house.prepared()))
    return house


def test_commands_and_options() -> None:
    assert complete("boot-policy", incomplete="s") == ["sign"]
    assert complete("enroll") == ["ek", "request", "challenge", "answer", "accept", "run"]
    assert "--dry-run" in complete("sweep", incomplete="--")
    assert set(complete("install", "--engine")) == {"podman", "cri-o", "containerd", "docker"}


def test_models_of_the_store(house: Household) -> None:
    before = snapshot(house.host)
    for words in (("rm",), ("cdi", "generate")):
        assert complete("--config", house.config, *words) == ["minilm:1"]
        assert complete("--config", house.config, *words, incomplete="x") == []
    assert snapshot(house.host) == before


def test_what_an_owner_s_folder_has(house: Household) -> None:
    keys = ("--keys", house.keys)
    assert complete("grant", *keys) == ["minilm:1"]
    assert complete("grant", *keys, "--device") == ["edge-1"]
    assert complete("boot-policy", "sign", *keys, "--model") == ["minilm"]
    assert complete("boot-policy", "sign", *keys, "--device", incomplete="edge") == ["edge-1"]
    assert complete("grant") == []  # whose?


def test_who_is_trusted(house: Household) -> None:
    assert complete("--config", house.config, "trust", "rm", "owner") == ["acme"]
    assert complete("--config", house.config, "trust", "rm", "issuer") == []


def test_containers_that_were_refused(house: Household) -> None:
    keep_refusal(str(house.host / "run"), "3f9c", TokenMissing("none"))
    assert complete("--config", house.config, "why") == ["3f9c"]


def test_containers_that_hold_a_model(house: Household) -> None:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    record = ContainerRecord(
        container_id="3f9c",
        bundle="/b",
        pid=os.getpid(),
        start_time=start_time,
        seconds=1,
        references=("minilm",),
        models=("minilm:1",),
        manifests=("sha256:" + "0" * 64,),
        destinations=("/models/minilm",),
        subject="s",
        size_bytes=1,
        delivered=True,
    )
    ContainerRecords(str(house.host / "run")).write(record)
    context = click.Context(cli, info_name="sczctl")
    context.params["config_file"] = str(house.config)
    assert [item.value for item in complete_containers(context, cli.params[0], "3")] == ["3f9c"]


def test_what_cannot_be_read_completes_to_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text("engine = ")
    for config in (broken, tmp_path / "absent"):
        assert complete("--config", config, "rm") == []
        assert complete("--config", config, "why") == []
        assert complete("--config", config, "trust", "rm", "owner") == []
    assert complete("grant", "--keys", tmp_path / "absent") == []
    assert complete("grant", "--keys", broken, "--device") == []


def test_files_are_the_shell_s() -> None:
    found = ShellComplete(cli, {}, "sczctl", "_SCZCTL_COMPLETE").get_completions(["grant", "-o"], "out/")
    assert [(item.type, item.value) for item in found] == [("file", "out/")]


@pytest.mark.parametrize("words", ["sczctl ", "sczctl boot-policy s", "sczctl rm ", "sczctl install --engine "])
def test_the_tpm_s_library_is_not_loaded(words: str) -> None:
    code = (
        "import sys\n"
        "from oci_hook.cli import main\n"
        "try:\n main([])\n"
        "finally:\n sys.stderr.write('tpm2_pytss' * ('tpm2_pytss' in sys.modules))\n"
    )
    environment = {
        "_SCZCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "PATH": os.environ["PATH"],
    }
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (asked.returncode, asked.stderr) == (0, "")


def test_who_is_not_root_is_told_nothing_and_sees_no_error(house: Household) -> None:
    for folder in (house.store_folder, house.host / "trust", house.keys):
        folder.chmod(0o700)
    os.seteuid(65534)
    try:
        for words in (("rm",), ("cdi", "generate"), ("trust", "rm", "owner"), ("why",)):
            assert complete("--config", house.config, *words) == []
        assert complete("grant", "--keys", house.keys) == []
        assert complete("grant", "--keys", house.keys, "--device") == []
    finally:
        os.seteuid(0)
