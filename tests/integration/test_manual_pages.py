"""The manual pages and completions by the programs that read them: man, mandoc, lexgrog, bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import sczctl
from tests.manual import completions, manual

PAGES = manual.manual()
COMMANDS = [tuple(page.names[1:]) for page in manual.pages()]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make man` writes."""
    folder = tmp_path_factory.mktemp("built")
    assert manual.main([str(folder / "man")]) == 0
    assert completions.main([str(folder / "completions")]) == 0
    return folder


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environment},
    )  # fmt: skip


def rendered(path: Path) -> str:
    """The page as a person reads it, on a wide terminal."""
    shown = run("/usr/bin/man", "--nh", "--nj", "-P", "cat", "-l", path, MANWIDTH="200")
    assert shown.returncode == 0, shown.stderr
    return re.sub(".\b", "", shown.stdout)


def flat(text: str) -> str:
    """Without what differs by the width of the page: blanks, hyphens at ends of lines; quotes as typed."""
    return re.sub(r"[\s`‐-]+", "", text.replace("’", "'").replace("‘", "'"))


# --- manual pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(PAGES))
def test_man_and_mandoc_find_nothing_wrong(built: Path, page: str) -> None:
    path = built / "man" / page
    lint = run("/usr/bin/mandoc", "-T", "lint", "-W", "warning", path)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    # As lintian asks, but for its width.
    groff = run("/usr/bin/man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", path, MANROFFSEQ="", MANWIDTH="80")
    assert (groff.returncode, groff.stderr) == (0, "")
    name = path.name.rpartition(".")[0]
    assert run("/usr/bin/lexgrog", path).stdout.startswith(f'{path}: "{name} - ')


def entries(section: str, indent: str) -> dict[str, str]:
    """Each option of a list with its text; the key is as written. groff 1.22 indents by 5, 1.23 by 7."""
    found = re.split(rf"^ {{{indent}}}(?=-)", section, flags=re.MULTILINE)[1:]
    return {re.split(r"\s{2,}", entry.strip())[0]: entry for entry in found}


def options_of_page(text: str) -> dict[frozenset[str], str]:
    """By their spellings; in the page each stands with its value."""
    section = re.split(r"^OPTIONS$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^[A-Z][A-Z ]+$", section, flags=re.MULTILINE)[0]
    return {
        frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", key)): body for key, body in entries(section, "5,7").items()
    }


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(("sczctl", *words)))
def test_a_page_says_what_help_says(built: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    asked = sczctl(*words, "--help")
    assert (asked.code, asked.err) == (0, "")
    before, _, rest = asked.out.partition("\nOptions:\n")
    options, _, commands = rest.partition("\nCommands:\n")
    text = rendered(built / "man" / "man1" / f"{'-'.join(('sczctl', *words))}.1")
    for paragraph in before.strip().split("\n\n")[1:]:
        assert flat(paragraph) in flat(text)
    page, helped = options_of_page(text), entries(options, "2")
    spelled = {frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", key)): key for key in helped}
    assert set(page) == set(spelled)
    for names, key in spelled.items():
        _verify_option(key, helped[key][len(key) :], page[names])
    for name, summary in re.findall(r"^  (\S+) +(\S.*)$", commands, re.MULTILINE):
        assert f"{'-'.join(('sczctl', *words, name))}(1)" in text
        assert flat(summary.removesuffix("...")) in flat(text)


def _verify_option(key: str, helped: str, page: str) -> None:
    value = key.rsplit(maxsplit=1)[-1]
    if not value.startswith("-"):
        assert flat(value) in flat(page.splitlines()[0]), key
    sentence, bracket, facts = re.sub(r"\s+", " ", helped).strip().partition(" [")
    assert flat(sentence.strip().rstrip(".")) in flat(page), key
    for fact in re.split(r"; |\] \[", facts.removesuffix("]")) if bracket else ():
        if between := re.fullmatch(r"(-?\d+)<=x<=(-?\d+)", fact):
            assert f"Range: {between[1]} to {between[2]}." in page, key
        elif fact == "required":
            assert "Required." in page, key
        else:
            name, colon, said = fact.partition(": ")
            assert (name, colon) == ("default", ": "), fact
            assert flat(f"Default: {said}") in flat(page), key


def test_man_finds_the_pages_by_name(built: Path) -> None:
    for page in PAGES:
        name, _, section = page.split("/")[1].rpartition(".")
        found = run("/usr/bin/man", "-M", built / "man", "-w", section, name)
        assert found.stdout.strip() == str(built / "man" / page), found.stderr


# --- completions ------------------------------------------------------------------------------------------------------


class Terminal:
    """A shell on a terminal of its own, to which a person types."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> None:
        """Read on until the text is there."""
        end = time.monotonic() + 60
        while text not in self._seen:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self._seen!r}"
            self._seen += os.read(self._descriptor, 4096).decode(errors="replace").replace("\r", "")
        self._seen = self._seen.partition(text)[2]

    def completed(self, typed: str, end: str) -> None:
        """Type the words and a TAB, then let the shell say what its line is now; it has to be `typed` + `end`."""
        self.type(f"{typed}\t")
        self.wait_for(end)
        self.type("\x01echo '=\x05='\n")  # Control-A and -E: to the beginning of the line, to its end
        self.wait_for(f"\n={typed}{end.strip()}")  # zsh takes its blank back
        self.wait_for("READY> ")


@contextmanager
def shell(words: list[str], environment: dict[str, str]) -> Iterator[Terminal]:
    process, descriptor = pty.fork()
    if process == 0:
        os.execve(words[0], words, {"PATH": f"{BIN}:/usr/bin:/bin", "TERM": "dumb", "LC_ALL": "C.UTF-8", **environment})
    try:
        terminal = Terminal(descriptor)
        terminal.wait_for("READY> ")
        yield terminal
    finally:
        os.close(descriptor)  # a hang-up ends the shell
        os.waitpid(process, 0)


TYPED = (
    ("sczctl boot-policy s", "ign "),
    ("sczctl sweep --dr", "y-run "),
    ("sczctl install --engine pod", "man "),
)


def test_bash_completes(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bash-completion" / "completions"
    folder.mkdir(parents=True)
    (folder / "sczctl").write_bytes((built / "completions/bash/sczctl").read_bytes())
    environment = {"PS1": "READY> ", "XDG_DATA_DIRS": str(tmp_path), "HOME": str(tmp_path), "HISTFILE": ""}
    with shell(["/usr/bin/bash", "--norc", "--noprofile", "-i"], environment) as terminal:
        terminal.type("source /usr/share/bash-completion/bash_completion; bind 'set bell-style none'\n")
        terminal.wait_for("READY> ")
        for typed, end in TYPED:
            terminal.completed(typed, end)
        (tmp_path / "model.json").touch()
        terminal.completed(f"sczctl verify x --owner {tmp_path}/mod", "el.json ")


def test_zsh_completes(built: Path, tmp_path: Path) -> None:
    environment = {"PS1": "READY> ", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
    with shell(["/usr/bin/zsh", "-f", "-i"], environment) as terminal:
        terminal.type(
            f"unsetopt PROMPT_SP; bindkey -e; fpath=({built}/completions/zsh $fpath); autoload -Uz compinit; "
            "compinit -u -D; echo LOADED\n"
        )
        terminal.wait_for("\nLOADED")
        terminal.wait_for("READY> ")
        for typed, end in TYPED:
            terminal.completed(typed, end)


def test_fish_completes(built: Path, tmp_path: Path) -> None:
    for typed, end in TYPED:
        asked = run(
            "/usr/bin/fish", "--no-config", "-c",
            f"set -g fish_complete_path {built}/completions/fish; complete -C '{typed}'",
            HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path),
        )  # fmt: skip
        assert asked.stderr == ""
        words = [line.split("\t")[0] for line in asked.stdout.splitlines()]
        assert words == [typed.split()[-1] + end.strip()]
