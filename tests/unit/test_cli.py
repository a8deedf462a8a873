"""`cli`: what all commands have in common: help, exit codes, and errors of one line with their remedy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from oci_hook import __version__, cli, report
from oci_hook.config import Config
from oci_hook.errors import ConfigInvalid, FileUnreadable, InternalError, ModelUnknown, SczError
from oci_hook.key_errors import all_errors
from oci_hook.oci.state import State
from tests.commands import Household, done, misused, refused, sczctl, snapshot

FOLDER = Path(cli.__file__).parent


def commands(group: click.Group = cli.cli, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


ALL = dict(commands())


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_and_option_explains_itself(words: tuple[str, ...]) -> None:
    command = ALL[words]
    assert command.help
    assert command.help.rstrip().endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, (words, parameter.name)
    for flag in ("-h", "--help"):
        shown = sczctl(*words, flag)
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.startswith(f"Usage: sczctl {' '.join(words)} ")


def test_the_commands_that_the_documents_name_are_there() -> None:
    names = {" ".join(words) for words in ALL}
    assert {
        "keygen", "pack", "grant", "inspect", "verify", "boot-policy measure", "boot-policy sign", "enroll request",
        "enroll challenge", "enroll answer", "enroll accept", "add", "list", "rm", "trust add owner",
        "trust add issuer", "trust list", "trust rm", "token init", "token issue", "install", "uninstall", "why",
        "audit show", "audit verify",
    } <= names  # fmt: skip


def test_what_changes_a_host_can_be_tried_without_changing_it() -> None:
    for words in ("add", "rm", "install", "uninstall", "trust add owner", "trust add issuer", "trust rm"):
        assert "--dry-run" in sczctl(*words.split(), "--help").out, words


def test_what_gives_data_gives_json() -> None:
    for words in (
        "pack", "grant", "inspect", "verify", "boot-policy sign", "add", "list", "rm", "trust list", "install",
        "uninstall", "why", "audit show", "audit verify",
    ):  # fmt: skip
        assert "--json" in sczctl(*words.split(), "--help").out, words


def test_the_version() -> None:
    shown = sczctl("--version")
    assert (shown.code, shown.out) == (0, f"sczctl, version {__version__}\n")


def test_help_and_why_load_no_tpm_library() -> None:
    for words in (["--help"], ["why", "35"]):
        script = (
            "import sys, atexit; from oci_hook.cli import main; "
            "atexit.register(lambda: print('tpm2_pytss' in sys.modules, file=sys.stderr)); main(sys.argv[1:])"
        )
        started = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        assert started.stderr.splitlines()[-1] == "False"


def test_modules_of_commands_stay_small() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["frobnicate"], ["pack"], ["--frob"], ["list", "--frob"], ["trust", "add"], ["rm"]])
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    done = sczctl(*words)
    assert (done.code, done.out) == (2, "")
    assert "Usage: sczctl" in done.err
    assert "Traceback" not in done.err


def test_no_command_at_all_shows_what_there_is() -> None:
    done = sczctl()
    assert done.code == 2
    assert "keygen" in done.out + done.err


def raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `sczctl list` raise something."""

    def command(_context: click.Context) -> None:
        raise error

    found = cli.LazyGroup.get_command

    def get_command(group: cli.LazyGroup, context: click.Context, name: str) -> click.Command | None:
        return (
            click.Command("list", callback=lambda: command(context)) if name == "list" else found(group, context, name)
        )

    monkeypatch.setattr(cli.LazyGroup, "get_command", get_command)


@pytest.mark.parametrize("code", all_errors())
def test_each_error_leaves_with_its_code_one_line_and_its_remedy(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    error = all_errors()[code]
    raises(monkeypatch, error("the check that failed"))
    done = sczctl("list")
    refused(done, code)
    assert done.err == f"sczctl: {error.__name__} ({code}): the check that failed\n  remedy: {error.remedy}\n"


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), KeyError("x"), OSError(5, "Input/output error"), RecursionError()]
)
def test_our_own_mistakes_are_one_line_too(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raises(monkeypatch, error)
    refused(sczctl("list"), InternalError.code, type(error).__name__)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EOFError(), click.Abort()])
def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    raises(monkeypatch, error)
    done = sczctl("list")
    assert (done.code, done.out, done.err.strip()) == (130, "", "sczctl: aborted")


def test_hostile_words_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, FileUnreadable("a\x1b[2Jb\rc\nd\x9be\u202ef", remedy="r\x1b]0;x\x07"))
    done = sczctl("list")
    refused(done, 68, "a?[2Jb?c?d?e?f")
    assert "\x1b" not in done.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_everything_undoes_nothing(house: Household, encoding: str) -> None:
    words = [str(word) for word in house.pack_words(house.usb / "b")]
    started = subprocess.run(
        [sys.executable, "-c", "from oci_hook.cli import main; main()", *words],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith(b"packed minilm:1")


def test_a_reader_that_goes_away_is_no_error(house: Household) -> None:
    house.trust()
    script = "from oci_hook.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    started = subprocess.run(
        [sys.executable, "-c", script, "--config", str(house.config), "why", "--codes"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in started.stderr
    assert "InternalError" not in started.stderr


# --- the configuration ------------------------------------------------------------------------------------------------

HOST_COMMANDS = [
    ["add", "x"],
    ["list"],
    ["rm", "a:1"],
    ["trust", "list"],
    ["install", "--engine", "podman"],
    ["audit", "show"],
    ["audit", "verify"],
    ["token", "issue", "--subject", "s", "-o", "x"],
]


@pytest.mark.parametrize("words", HOST_COMMANDS, ids=" ".join)
def test_a_configuration_that_cannot_be_used(house: Household, words: list[str]) -> None:
    before = snapshot(house.host)
    refused(sczctl("--config", house.host / "absent.toml", *words), FileUnreadable.code, "absent.toml")
    house.config.chmod(0o666)
    refused(house.ctl(*words), 13, "writable by others")
    house.config.chmod(0o644)
    text = house.config.read_text()
    house.config.write_text(text + "frob = 1\n")
    refused(house.ctl(*words), 13, "'frob'")
    house.config.write_text(text)
    assert snapshot(house.host) == before


def test_why_answers_when_the_configuration_is_what_is_wrong(
    house: Household, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "Config", lambda: Config(runtime_directory=str(tmp_path / "default-run")))
    house.config.chmod(0o666)
    state = State("c1", 7, "/b", "", {"smm.scz/model": "m"})
    assert report.report_refusal(str(house.config), state, ConfigInvalid("writable by others")) == ConfigInvalid.code
    assert not (house.host / "log").exists()  # whose log it is cannot be known
    answer = done(house.ctl("why", "--json")).json
    assert (answer["code"], answer["container_id"]) == (ConfigInvalid.code, "c1")


def test_a_configuration_may_be_named_from_here(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house.host)
    assert sczctl("--config", "config.toml", "list").code == 0


def test_the_owner_s_commands_need_no_configuration(house: Household) -> None:
    absent = house.host / "absent.toml"
    assert sczctl("--config", absent, *house.pack_words(house.usb / "b")).code == 0
    assert sczctl("--config", absent, "inspect", house.usb / "b").code == 0
    assert sczctl("--config", absent, "why", "35").code == 0
    misused(sczctl("--config", house.host, "list"), "--config")


def test_an_error_tells_its_advice_from_its_class() -> None:
    error: SczError = ModelUnknown("x")
    assert error.advice == ModelUnknown.remedy
    assert ModelUnknown("x", remedy="y").advice == "y"
