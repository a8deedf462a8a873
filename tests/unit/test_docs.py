"""The documents: commands and options that they show exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from oci_hook.cli import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands in indented blocks of the documents, continued lines joined, comments left out."""
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    (sczctl .+)$", text, re.MULTILINE):
            yield document.name, shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(("document", "words"), list(shown_commands()), ids=lambda value: " ".join(value)[:60])
def test_commands_in_the_documents_parse(document: str, words: list[str]) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="sczctl")
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{document}: no command {name} in {words}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    parser = command.make_parser(context)
    parser.parse_args(list(rest))  # raises on an option that does not exist
    options = {word for word in rest if word.startswith("-")}
    required = {p.opts[0] for p in command.params if isinstance(p, click.Option) and p.required}
    assert {name for name in required if not options & set(_spellings(command, name))} == set(), (document, words)


def _spellings(command: click.Command, name: str) -> list[str]:
    return next(p.opts for p in command.params if isinstance(p, click.Option) and name in p.opts)
