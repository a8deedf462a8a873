"""docs/dataflow.svg: well-formed, nothing in it runs or is fetched, its text is text, and it names every stage."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

PATH = Path(__file__).parents[2] / "docs" / "dataflow.svg"
SVG = "{http://www.w3.org/2000/svg}"
ELEMENTS = {"svg", "title", "desc", "style", "rect", "text", "path"}
STAGES = (
    *("The owner's machine", "The host", "The container", "sczctl pack", "Bundle", "Boot policy", "Grant", "Store"),
    *("TPM", "annotations", "signatures", "token", "release", "decrypt", "audit record", "move_mount"),
    *("Detached tmpfs", "Application", "read-only", "Plaintext", "Registry", "gone when it ends"),
)


@pytest.fixture(scope="module")
def image() -> ET.Element:
    return ET.fromstring(PATH.read_bytes())


def texts(image: ET.Element) -> list[str]:
    return ["".join(element.itertext()) for element in image.iter(f"{SVG}text")]


def test_nothing_in_it_runs_or_is_fetched(image: ET.Element) -> None:
    assert {element.tag.removeprefix(SVG) for element in image.iter()} == ELEMENTS
    names = {name for element in image.iter() for name in element.attrib}
    assert not [name for name in names if name.startswith("on") or name.endswith("href")]
    source = PATH.read_text()
    assert re.findall(r"https?://[^\"' ]+", source) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(|@font-face|<!DOCTYPE|<!ENTITY|data:", source)


def test_it_names_every_stage_and_says_what_it_is(image: ET.Element) -> None:
    shown = "\n".join(texts(image))
    assert [stage for stage in STAGES if stage not in shown] == []
    for name in ("title", "desc"):
        assert image.findtext(f"{SVG}{name}")
    assert image.get("aria-labelledby") == "title desc"


def test_plaintext_has_one_look_and_every_class_has_a_dark_one(image: ET.Element) -> None:
    style = image.findtext(f"{SVG}style") or ""
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    used = {name for element in image.iter() for name in (element.get("class") or "").split()}
    coloured = set(re.findall(r"\.([\w-]+) \{[^}]*#", light))
    assert coloured == set(re.findall(r"\.([\w-]+) \{[^}]*#", dark))
    assert used == set(re.findall(r"\.([\w-]+) \{", light))
    assert not [element for element in image.iter() if element.get("fill") or element.get("style")]


def test_everything_lies_within_the_picture(image: ET.Element) -> None:
    _, _, width, height = map(float, (image.get("viewBox") or "").split())
    for rect in image.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name) or 0) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for text in image.iter(f"{SVG}text"):
        assert 0 < float(text.get("x") or 0) < width
        assert 0 < float(text.get("y") or 0) < height
