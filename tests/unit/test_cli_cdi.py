"""`sczctl cdi`: files as the CDI specification has them, for models that are in the store; nobody else's is touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from oci_hook.errors import AnnotationInvalid, ModelUnknown, OutputExists
from oci_hook.invocation import parse_invocation
from oci_hook.oci.annotations import parse_requests
from tests.commands import Household, done, misused, refused, snapshot

DIGEST = "0" * 64


@pytest.fixture
def house(tmp_path: Path) -> Household:
    made = Household(tmp_path)
    done(made.ctl("add", made.prepared(), made.pack("two", version="2") / "bundle"))
    return made


@pytest.fixture
def file(house: Household) -> Path:
    return house.host / "cdi" / "scz-smm.json"


def test_the_file_is_as_the_specification_has_it(house: Household, file: Path) -> None:
    told = done(house.ctl("cdi", "generate", "--all", "--engine", "podman", "--timeout", "42", "-o", file))
    assert told.out == f"wrote {file}\ndevice smm.scz/model=minilm:1\ndevice smm.scz/model=minilm:2\n"
    document = json.loads(file.read_text())
    # SPEC.md and schema.json of the specification: unknown members are refused by its readers.
    assert set(document) == {"cdiVersion", "kind", "devices"}
    assert (document["cdiVersion"], document["kind"]) == ("0.5.0", "smm.scz/model")
    assert [device["name"] for device in document["devices"]] == ["minilm:1", "minilm:2"]
    for device in document["devices"]:
        assert set(device) == {"name", "containerEdits"}
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*[A-Za-z0-9]", device["name"])
        assert set(device["containerEdits"]) == {"hooks"}
        assert [hook["hookName"] for hook in device["containerEdits"]["hooks"]] == ["prestart", "poststop"]
        for hook in device["containerEdits"]["hooks"]:
            assert set(hook) == {"hookName", "path", "args", "env", "timeout"}
            assert hook["path"] == hook["args"][0]
            assert hook["path"].startswith("/")
            assert hook["timeout"] == 42
            assert all("=" in variable for variable in hook["env"])
            assert hook["env"]
            invocation = parse_invocation(hook["args"][4:])
            assert invocation is not None
            assert (invocation.stage, invocation.engine) == (hook["hookName"], "podman")
            assert invocation.config_file == str(house.config)
            assert invocation.requests == {"smm.scz/model": device["name"]}
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("words", "name", "requests"),
    [
        (["minilm:1"], "minilm:1", {"smm.scz/model": "minilm:1"}),
        (["minilm:1", "--path", "/m"], "minilm:1", {"smm.scz/model": "minilm:1", "smm.scz/path": "/m"}),
        (["minilm:2", "--name", "2nd"], "2nd", {"smm.scz/model": "minilm:2"}),
        (
            ["rootfs:/bundle", "--name", "own", "--path", "/models/own"],
            "own",
            {"smm.scz/model": "rootfs:/bundle", "smm.scz/path": "/models/own"},
        ),
    ],
)
def test_a_device_carries_the_request(house: Household, words: list[str], name: str, requests: dict[str, str]) -> None:
    (device,) = json.loads(done(house.ctl("cdi", "generate", *words, "-o", "-")).out)["devices"]
    assert device["name"] == name
    invocation = parse_invocation(device["containerEdits"]["hooks"][0]["args"][4:])
    assert invocation is not None
    assert (invocation.requests, invocation.engine) == (requests, None)
    assert parse_requests(invocation.requests).models[0].destination


def test_a_digest_is_no_part_of_a_devices_name(house: Household) -> None:
    (model,) = (each for each in house.store.models() if each.version == "1")
    told = done(house.ctl("cdi", "generate", f"minilm@{model.image_digest}", "-o", "-")).out
    assert json.loads(told)["devices"][0]["name"] == "minilm"


def test_a_dry_run_and_json(house: Household, file: Path) -> None:
    before = snapshot(house.host)
    assert "would write" in done(house.ctl("cdi", "generate", "minilm:1", "-o", file, "--dry-run")).out
    shown = done(house.ctl("cdi", "generate", "minilm:1", "-o", file, "--dry-run", "--json")).json
    assert snapshot(house.host) == before
    assert not file.parent.exists()
    written = done(house.ctl("cdi", "generate", "minilm:1", "-o", file, "--json")).json
    assert (shown.pop("dry_run"), written.pop("dry_run")) == (True, False)
    assert shown == written
    assert (written["devices"], written["document"]) == (["smm.scz/model=minilm:1"], json.loads(file.read_text()))


def test_what_is_refused_changes_nothing(house: Household, file: Path) -> None:
    before = snapshot(house.host)
    for words, code, word in (
        (["other:1"], ModelUnknown.code, "other:1"),
        (["minilm"], ModelUnknown.code, "2 versions"),
        (["Minilm:1"], AnnotationInvalid.code, ""),
        (["minilm:1", "--path", "relative"], AnnotationInvalid.code, ""),
        (["minilm:1", "--path", "/proc/../m"], AnnotationInvalid.code, ""),
        (["minilm:1", "--name", "a/b"], AnnotationInvalid.code, "--name"),
        (["minilm:1", "--name", "-a"], AnnotationInvalid.code, "--name"),
        (["rootfs:/bundle", "--path", "/models/b"], AnnotationInvalid.code, "--name"),
        (["minilm:1", "minilm:1"], AnnotationInvalid.code, "once"),
    ):
        refused(house.ctl("cdi", "generate", *words, "-o", file), code, word)
        assert snapshot(house.host) == before
    misused(house.ctl("cdi", "generate", "-o", file), "--all")
    misused(house.ctl("cdi", "generate", "minilm:1", "--all", "-o", file), "--all")
    misused(house.ctl("cdi", "generate", "minilm:1", "minilm:2", "--path", "/m", "-o", file), "one MODEL")
    misused(house.ctl("cdi", "generate", "minilm:1", "--engine", "nerdctl", "-o", file), "podman")
    assert snapshot(house.host) == before


def test_all_of_an_empty_store(tmp_path: Path) -> None:
    house = Household(tmp_path)
    refused(house.ctl("cdi", "generate", "--all", "-o", tmp_path / "f.json"), ModelUnknown.code, "sczctl add")


def test_only_our_file_is_replaced_or_removed(house: Household, file: Path) -> None:
    nothing = done(house.ctl("cdi", "rm", "-o", file))
    assert (nothing.out, "nothing of ours" in nothing.err) == ("", True)
    done(house.ctl("cdi", "generate", "minilm:1", "-o", file))
    done(house.ctl("cdi", "generate", "minilm:2", "-o", file))
    assert [device["name"] for device in json.loads(file.read_text())["devices"]] == ["minilm:2"]
    assert done(house.ctl("cdi", "rm", "-o", file, "--dry-run")).out == f"would remove {file}\n"
    assert file.exists()
    assert done(house.ctl("cdi", "rm", "-o", file, "--json")).json == {"dry_run": False, "files": [str(file)]}
    assert not file.exists()
    for text in ("{}", '{"cdiVersion": "0.5.0", "kind": "vendor.com/gpu", "devices": []}', "?", "[]"):
        file.write_text(text)
        refused(house.ctl("cdi", "generate", "minilm:1", "-o", file), OutputExists.code, "-o FILE")
        refused(house.ctl("cdi", "rm", "-o", file), OutputExists.code)
        assert file.read_text() == text
