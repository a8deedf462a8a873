"""`packaging/manual.py` and `completions.py` for the tests, and what its hand-written pages say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scz_{name}", ROOT / "packaging" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


manual, completions = _load("manual"), _load("completions")
"""The modules of `packaging/`."""


def source(name: str) -> str:
    """A hand-written page without mdoc's escapes."""
    return (ROOT / "docs" / "man" / name).read_text().replace("\\&", "").replace("\\-", "-")


def items(text: str, macro: str) -> dict[str, str]:
    """Tag and text of each item of the page's lists whose tag is set in a macro."""
    found = re.findall(rf"^\.It {macro} (.+?)$\n(.*?)(?=^\.It {macro} |^\.S[sh] |\Z)", text, re.MULTILINE | re.DOTALL)
    return {tag.replace(" Ns Ar ", ""): body for tag, body in found}
