"""docs/threat-model.md: every attack of its table has a test that proves the answer, and is run with the others.

A test is named as `folder/test_x.py::test_y`; `::test_y` alone is in the file named before it in the same row, and
`…::test_y` in tests/integration/test_start.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
PARTS = ("unit", "integration", "matrix", "gvisor", "machines", "packaging")  # what `make test` runs
_NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py|…)?(?:::(test_\w+))?`")
_FILE = re.compile(r"`(?:tests/)?((?:\w+/)+\w+\.py)")
_OTHERWISE = ("the demo", "by construction")  # a proof that is not a test of ours by name


def rows() -> list[tuple[str, ...]]:
    """The rows of every table with a column of tests: attack, answer, test."""
    found = []
    for block in re.split(r"\n\s*\n", TEXT):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if len(lines) > 2 and re.search(r"\| *tests? *\|$", lines[0]):
            found += [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines[2:]]
    return found


ROWS = rows()


@cache
def functions_of(path: Path) -> frozenset[str]:
    """The tests of a file, those of its classes too."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test"))


def named(cell: str) -> list[tuple[str, str | None]]:
    """The tests that a text names: file below tests/, and function."""
    found: list[tuple[str, str | None]] = []
    file = ""
    for match in _NAMED.finditer(cell):
        if match[1] is None and match[2] is None:
            continue
        file = "integration/test_start.py" if match[1] == "…" else match[1] or file
        found.append((file, match[2]))
    return found


def test_there_is_a_table() -> None:
    assert len(ROWS) >= 50
    assert {len(row) for row in ROWS} == {3}
    assert len({row[0] for row in ROWS}) == len(ROWS)  # an attack has one row


@pytest.mark.parametrize("row", ROWS, ids=[re.sub(r"\W+", "-", row[0])[:60] for row in ROWS])
def test_every_attack_has_a_test_that_is_run(row: tuple[str, ...]) -> None:
    attack, answer, proof = row
    assert attack
    assert answer
    assert named(proof) or any(words in proof for words in _OTHERWISE), proof
    for file, name in named(proof):
        assert file.split("/")[0] in PARTS, f"{file} is in no folder that is collected"
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert functions_of(path), f"{file} has no test"
        assert name is None or name in functions_of(path), f"{file}::{name}"


def test_what_the_rest_of_the_document_names_exists() -> None:
    for file, name in named(TEXT):
        path = ROOT / "tests" / file
        assert not file or path.is_file(), file
        if file and name is not None:
            assert name in functions_of(path), (file, name)
    for file in _FILE.findall(TEXT):
        assert (ROOT / "tests" / file).is_file() or (ROOT / file).is_file(), file
