"""The pages for owner, operator and developer, as commands that can be run: blocks, what is awaited, printed, not run.

A block is fenced as `sh` (commands) or `console` (commands after `$ `, and what they print; `…` stands for what
differs, and alone in a line for any lines). `# wait for FILE` is where a reader waits for another one's file. A block
that cannot run with its page says so in the paragraph after it: `*(Not run with this page, but …: `tests/…`.)*`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"\n+\*\(Not run with this page, but [^`]+: `(tests/[\w/.]+)`\.\)\*\n")
_WAIT = re.compile(r"# wait for (\S+)(?: \([^)]*\))?")
KINDS = {"sh", "console", "yaml"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: Where it begins in its page.
        run_by: The test that runs it if it does not run with its page.
    """

    page: str
    line: int
    kind: str
    text: str
    run_by: str | None


@dataclass(frozen=True)
class Wait:
    """The reader waits for a file."""

    path: str


@dataclass(frozen=True)
class Script:
    """Commands that run one after another until one fails."""

    text: str


@dataclass(frozen=True)
class Shown:
    """One command and what the page says that it prints.

    Attributes:
        may_fail: The page asks for its exit code next.
    """

    command: str
    output: str
    may_fail: bool


def blocks(page: str, text: str) -> list[Block]:
    """All blocks of a page; one of an unknown kind is an error, so that none is passed over."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match[1] not in KINDS:
            raise ValueError(f"{page}:{line}: a block of the kind {match[1]!r}")
        note = _NOT_RUN.match(text, match.end())
        found.append(Block(page, line, match[1], match[2], note[1] if note else None))
    if text.count("```") != 2 * len(found):
        raise ValueError(f"{page}: a fence that does not begin its line, or is not closed")
    return found


def steps(block: Block) -> list[Wait | Script | Shown]:
    """What a reader does in a block, in its order."""
    return list(_shown(block.text)) if block.kind == "console" else list(_scripts(block.text))


def _scripts(text: str) -> list[Wait | Script]:
    found: list[Wait | Script] = []
    lines: list[str] = []
    for line in text.splitlines():
        wait = _WAIT.fullmatch(line)
        if wait is None:
            lines.append(line)
            continue
        if lines:
            found.append(Script("\n".join(lines)))
        found.append(Wait(wait[1]))
        lines = []
    return [*found, Script("\n".join(lines))] if lines else found


def _shown(text: str) -> list[Shown]:
    if not text.startswith("$ "):
        raise ValueError(f"a console block begins with its command: {text!r}")
    parts = [part.partition("\n") for part in text.removeprefix("$ ").split("\n$ ")]
    commands = [command for command, _, _ in parts]
    return [
        Shown(command, output.rstrip("\n"), commands[number + 1 : number + 2] == ["echo $?"])
        for number, (command, _, output) in enumerate(parts)
    ]


def prints(expected: str, printed: str) -> bool:
    """Whether a command printed what the page says."""
    pattern = ""
    for line in expected.splitlines():
        pattern += r"(?:[^\n]*\n)*?" if line == "…" else r"[^\n]*".join(map(re.escape, line.split("…"))) + r" *\n"
    text = "".join(f"{line.rstrip()}\n" for line in printed.splitlines() if line.strip())
    return re.fullmatch(pattern, text) is not None


def load(path: Path) -> list[Block]:
    """The blocks of a file."""
    return blocks(path.name, path.read_text())
