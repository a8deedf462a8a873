"""The manual pages: every command has one, the hand-written ones say what the code does, examples can be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from oci_hook import config as config_module
from oci_hook.cli import cli
from oci_hook.config import DEFAULT_CONFIG_FILE, Config, load_config, parse_config
from oci_hook.documents import Fields
from oci_hook.errors import AnnotationInvalid, ConfigInvalid
from oci_hook.invocation import STAGES, parse_invocation
from oci_hook.key_errors import all_errors
from oci_hook.oci import annotations
from oci_hook.oci.annotations import CONTAINER_WIDE_KEYS, MAX_MODELS, MAX_VALUE_BYTES, PREFIX, RUNTIMES, parse_requests
from tests.manual import ROOT, items, manual, source

PAGES = manual.manual()


def sections(page: str) -> list[str]:
    return re.findall(r"^\.Sh (.+)$", page, re.MULTILINE)


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    found: set[str] = set()

    def walk(command: click.Command, names: tuple[str, ...]) -> None:
        found.add("man1/" + "-".join(names) + ".1")
        for name, inside in getattr(command, "commands", {}).items():
            walk(inside, (*names, name))

    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        walk(command, ("sczctl", name))
    assert {path for path in PAGES if path.startswith("man1/")} == found | {"man1/sczctl.1"}
    assert len(found) > 30
    assert {path for path in PAGES if not path.startswith("man1/")} == {
        "man5/scz-smm.toml.5",
        "man7/scz-smm-annotations.7",
        "man8/scz-hook.8",
        "man8/scz-nri.8",
        "man8/scz-runtime.8",
    }


@pytest.mark.parametrize("path", sorted(PAGES))
def test_a_page_has_the_usual_sections(path: str) -> None:
    wanted = {"NAME", "DESCRIPTION", "FILES", "EXIT STATUS", "SEE ALSO"}
    if path.startswith("man1/"):
        wanted |= {"SYNOPSIS", "OPTIONS"}
    else:
        wanted |= {"EXAMPLES", "SECURITY"}
        wanted |= {"KEYS"} if path.startswith(("man5/", "man7/")) else {"SYNOPSIS", "OPTIONS", "ENVIRONMENT"}
    assert wanted <= set(sections(PAGES[path]))
    assert PAGES[path].isascii()


def test_references_to_our_pages_lead_somewhere() -> None:
    ours = {(path.split("/")[1].rpartition(".")[0], path[3]) for path in PAGES}
    references = {
        (name, number)
        for page in PAGES.values()
        for name, number in re.findall(r"^\.(?:It |[^\n]*Pq )?Xr (scz\S+) (\d)", page, re.MULTILINE)
    }
    assert len(references) > 30
    assert references <= ours


def test_two_builds_are_equal_wherever_and_whenever(tmp_path: Path) -> None:
    built = []
    for name, environment in (("a", {"TZ": "Asia/Tokyo", "COLUMNS": "40"}), ("b", {"LC_ALL": "C.UTF-8"})):
        where = tmp_path / name
        where.mkdir()
        for script, output in (("manual.py", "man"), ("completions.py", "completions")):
            command = [sys.executable, str(ROOT / "packaging" / script), output]
            subprocess.run(command, cwd=where, env={"PYTHONPATH": str(ROOT), **environment}, check=True, timeout=60)
        files = [path for path in sorted(where.rglob("*")) if path.is_file()]
        built.append({str(path.relative_to(where)): path.read_bytes() for path in files})
    assert built[0] == built[1]
    assert {f"man/{path}" for path in PAGES} <= set(built[0])
    assert {f"completions/{path}" for path in ("bash/sczctl", "zsh/_sczctl", "fish/sczctl.fish")} <= set(built[0])


def test_the_date_is_the_release_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert all(page.startswith(".Dd September 9, 2001\n") for page in manual.manual().values())


# --- examples ---------------------------------------------------------------------------------------------------------


def example_commands() -> Iterator[tuple[str, list[str]]]:
    """Command lines of sczctl in the files of examples and in the hand-written pages."""
    for path in sorted((ROOT / "docs" / "man" / "examples").iterdir()):
        for text, is_command in manual.example_blocks(path):
            for line in text.replace("\\\n", " ").splitlines() if is_command else ():
                if line.startswith("sczctl "):
                    yield path.stem, shlex.split(line, comments=True)[1:]
    for path in sorted((ROOT / "docs" / "man").glob("*.[1-8]")):
        for line in re.findall(r"^(?:\.Dl )?# sczctl (.+)$", source(path.name), re.MULTILINE):
            yield path.name, shlex.split(line)


EXAMPLES = list(example_commands())


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else None)
def test_an_example_is_a_command_line_that_click_takes(page: str, words: list[str]) -> None:
    command: click.Command = cli
    context = cli.make_context("sczctl", list(words))  # raises on an unknown option, a value out of range
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        assert name is not None
        command, context = found, found.make_context(name, rest, parent=context)
    assert not context.args


def test_each_file_of_examples_belongs_to_a_page_and_shows_its_command() -> None:
    shown = {name for name, _words in EXAMPLES}
    for path in (ROOT / "docs" / "man" / "examples").iterdir():
        assert path.suffix == ".txt"
        assert f"man1/{path.stem}.1" in PAGES
        assert path.stem in shown
        names = path.stem.split("-")[1:]
        lines = [" ".join(words) for name, words in EXAMPLES if name == path.stem]
        assert any(line.replace("-", " ").startswith(" ".join(names)) for line in lines), path.stem
        assert ".Sh EXAMPLES" in PAGES[f"man1/{path.stem}.1"]


def test_the_main_commands_have_examples() -> None:
    have = {path.stem for path in (ROOT / "docs" / "man" / "examples").iterdir()}
    main = "keygen pack grant boot-policy-sign enroll add trust-add-owner token-issue install doctor ps why"
    assert {f"sczctl-{name}" for name in main.split()} <= have


# --- scz-smm.toml(5) --------------------------------------------------------------------------------------------------

TOML = source("scz-smm.toml.5")


def documented_keys() -> dict[tuple[str, str], str]:
    """Section (empty: top level) and key, with the page's text on it."""
    keys = TOML.partition(".Sh KEYS\n")[2].partition(".Sh FILES\n")[0]
    found = {}
    for section in re.split(r"^\.Ss ", keys, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        name = "" if title == "Top level" else title.strip("[]")
        found |= {(name, key): text for key, text in items(body, "Ic").items()}
    return found


def known_keys(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """What the code asks an empty configuration for."""
    asked: set[tuple[str, str]] = set()

    def has(fields: Fields, name: str) -> bool:
        asked.add((fields._what, name))
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Fields, "has", has)
        parse_config(b"")
    names = {section for section, _key in asked}
    return {
        ("" if s == "configuration" else s, key)
        for s, key in asked
        if (s, key) not in {("configuration", n) for n in names}
    }


def as_toml(section: str, key: str, value: Any) -> str:
    text = f"{value}" if isinstance(value, int) else json.dumps(value)
    return f"[{section}]\n{key} = {text}\n" if section else f"{key} = {text}\n"


def default_of(text: str) -> Any:
    (written,) = re.findall(r"^Default: (.+)\.$", text, re.MULTILINE)
    return tomllib.loads(f"value = {written}")["value"]


KEYS = documented_keys()


def test_the_page_has_exactly_the_keys_that_the_code_has(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_keys(monkeypatch)
    assert len(known) >= 10
    assert set(KEYS) == known


def test_the_defaults_of_the_page_are_the_code_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for (section, key), text in KEYS.items():
        path.write_text(as_toml(section, key, default_of(text)))
        assert load_config(str(path)) == Config(), (section, key)
    monkeypatch.setattr(config_module, "DEFAULT_CONFIG_FILE", str(tmp_path / "absent"))
    assert load_config(str(tmp_path / "absent")) == Config()
    assert f".Nm {DEFAULT_CONFIG_FILE}" in TOML


@pytest.mark.parametrize(("section", "key"), sorted(KEYS), ids=".".join)
def test_the_range_of_the_page_is_the_code_s(tmp_path: Path, section: str, key: str) -> None:
    text, path = KEYS[section, key], tmp_path / "config.toml"

    def accepts(value: Any) -> bool:
        path.write_text(as_toml(section, key, value))
        try:
            load_config(str(path))
        except ConfigInvalid:
            return False
        return True

    if isinstance(default_of(text), int):
        ((low, high),) = re.findall(r"^Range: (\d+) to (\d+)\.$", text, re.MULTILINE)
        assert [accepts(value) for value in (int(low), int(high))] == [True, True]
        assert [accepts(value) for value in (int(low) - 1, int(high) + 1)] == [False, False]
        assert not accepts("text")
        return
    assert not accepts(1)
    if isinstance(default_of(text), list):
        ((most, longest),) = re.findall(r"at most (\d+) names, each of at most (\d+) of", text)
        assert all(accepts(value) for value in ([], [""], ["a*"] * int(most), ["x" * int(longest)]))
        assert not any(accepts(value) for value in ("a", ["a"] * (int(most) + 1), ["x" * (int(longest) + 1)], ["a/b"]))
        return
    if values := re.findall(r"^One of: (.+)\.$", text, re.MULTILINE):
        words = re.findall(r'"([^"]+)"', values[0])
        assert len(words) > 1
        assert all(accepts(word) for word in words)
        assert not any(accepts(word) for word in (*(f"{word}x" for word in words), "", "kubelet"))
    elif "tcti" in key:
        kinds = re.findall(r"^\.Li (\w+)", text, re.MULTILINE)
        assert [accepts(f"{kind}:a") for kind in kinds] == [True, True, True]
        assert not any(accepts(value) for value in ("mssim:a", "device:a b", "libtss2:a"))
    elif key == "address":
        assert all(accepts(value) for value in ("", "https://a", "https://[::1]:8200", "https://a.example:1"))
        assert not any(accepts(value) for value in ("http://a", "a:1", "a", "https://a b"))
    else:
        assert accepts("/a" * 256)
        assert not any(accepts(value) for value in ("relative", "/" + "a" * 512))
        assert accepts("") == (default_of(text) == "")


def test_the_examples_of_configurations_can_be_used() -> None:
    (example,) = re.findall(r"^\.Bd -literal[^\n]*\n(engine.*?)^\.Ed", TOML, re.MULTILINE | re.DOTALL)
    assert parse_config(example.encode()) != Config()


def test_the_shipped_file_names_every_key_with_its_default() -> None:
    text = (ROOT / "config" / "config.toml").read_text()
    shipped = tomllib.loads(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE))
    values = {
        (section, key): default_of(body) if (section, key) in KEYS else None for (section, key), body in KEYS.items()
    }
    found = {("", k): v for k, v in shipped.items() if not isinstance(v, dict)}
    found |= {(s, k): v for s, keys in shipped.items() if isinstance(keys, dict) for k, v in keys.items()}
    assert found == values


# --- scz-smm-annotations(7) -------------------------------------------------------------------------------------------

ANNOTATIONS = source("scz-smm-annotations.7")
VALUES = {"model": "minilm", "path": "/models/x", "token": "/t", "containers": "a,b", "require": "noswap"}


def documented_annotations() -> set[str]:
    keys = ANNOTATIONS.partition(".Sh KEYS\n")[2].partition(".Sh FILES\n")[0]
    return {key for key in items(keys, "Li") if key.startswith(PREFIX)}


def test_the_page_has_exactly_the_annotations_that_the_parser_takes() -> None:
    slotted = {
        word for word in re.findall("[a-z]+", annotations._SLOTTED.pattern) if annotations._SLOTTED.fullmatch(word)
    }
    known = CONTAINER_WIDE_KEYS | {PREFIX + word for word in slotted} | {f"{PREFIX}{word}.slot" for word in slotted}
    assert documented_annotations() == known


def test_every_annotation_of_the_page_is_accepted_and_any_other_refused() -> None:
    needed = {f"{PREFIX}model": "minilm", f"{PREFIX}model.slot": "other"}
    for key in documented_annotations():
        value = VALUES[key.removeprefix(PREFIX).partition(".")[0]]
        assert parse_requests({**needed, key: "other" if key == f"{PREFIX}model.slot" else value}).models
        with pytest.raises(AnnotationInvalid):
            parse_requests({**needed, f"{key}s": value, f"{key}.": value})
        with pytest.raises(AnnotationInvalid):
            parse_requests({**needed, key: ""})


def test_every_requirement_of_the_page_is_accepted_and_any_other_refused() -> None:
    written = re.findall(r"^\.It Cm (\S+)$", ANNOTATIONS, re.MULTILINE)
    assert set(written) == {"noswap", "private", *(f"runtime={name}" for name in RUNTIMES)}
    model = {f"{PREFIX}model": "minilm"}
    for word in written:
        parse_requests({**model, f"{PREFIX}require": word})
        with pytest.raises(AnnotationInvalid):
            parse_requests({**model, f"{PREFIX}require": f"{word}x"})


def test_the_limits_of_the_page_are_the_parser_s() -> None:
    text = " ".join(ANNOTATIONS.split())
    assert f"A value has at most {MAX_VALUE_BYTES} bytes" in text
    assert f"a container at most {MAX_MODELS} models" in text
    assert f"end the container with {AnnotationInvalid.code}:" in text


def test_the_pod_of_the_page_asks_for_two_models() -> None:
    found = dict(re.findall(r"^    (smm\.scz/\S+): (.+)$", ANNOTATIONS, re.MULTILINE))
    requests = parse_requests(found)
    assert [request.slot for request in requests.models] == ["", "ranker"]
    assert requests.containers == ("recommender",)


# --- scz-hook(8) ------------------------------------------------------------------------------------------------------


def test_the_hook_s_page_explains_every_exit_code() -> None:
    page = PAGES["man8/scz-hook.8"]
    written = dict(re.findall(r"^\.It Li (\d+) Em (\w+)$", page, re.MULTILINE))
    assert written == {str(code): error.__name__ for code, error in all_errors().items()}
    plain = re.sub(r"[\s`]+|\\fB|\\fP|\\&", "", page.replace("\\-", "-").replace("\\(aq", "'"))
    for error in all_errors().values():
        assert re.sub(r"[\s`]+", "", error.summary[1:]) in plain
        assert re.sub(r"[\s`]+", "", error.remedy) in plain


def test_the_hook_takes_the_options_of_its_page_and_no_other() -> None:
    text = source("scz-hook.8")
    options = re.findall(r"^\.It Fl -(\S+) Ar", text, re.MULTILINE)
    values = {"engine": "cri-o", "request": "smm.scz/model=minilm"}
    words = [word for name in options for word in (f"--{name}", values.get(name, "/x"))]
    for stage in STAGES:
        assert parse_invocation([*words, stage]) is not None
    synopsis, description = text.split(".Sh SYNOPSIS")[1].split(".Sh DESCRIPTION")
    stages = [line.removeprefix(".Cm ").split(" | ") for line in synopsis.splitlines() if line.startswith(".Cm ")]
    assert stages == [list(STAGES)]
    assert all(f".Cm {stage}" in description for stage in STAGES)
    assert parse_invocation(["--verbose", "1", "prestart"]) is None
    asked = subprocess.run(
        [sys.executable, "-c", "import sys; from oci_hook.hook import main; sys.exit(main(['--help']))"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ),
    )  # fmt: skip
    assert set(re.findall(r"--([a-z-]+)", asked.stdout)) == set(options)
