"""What a model is called: its name, version, generation, and the paths of its files.

Pure. Specification: docs/specification.md, "Names".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oci_hook.documents import Fields, shown
from oci_hook.errors import SczError
from oci_hook.trust import NAME, NAME_LIMIT

VERSION = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
VERSION_LIMIT = 64
GENERATION_HIGH = 2**63 - 1
PATH_LIMIT_BYTES, PART_LIMIT_BYTES, PARTS_LIMIT = 1024, 255, 16
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class ModelId:
    """A model line's name, the version's tag, and the owner's count of what the line replaced."""

    name: str
    version: str
    generation: int

    def document(self) -> dict[str, str | int]:
        """The JSON value that manifests, grants and `model.json` carry."""
        return {"name": self.name, "version": self.version, "generation": self.generation}


def parse_model_id(fields: Fields) -> ModelId:
    """Take a model id apart.

    Args:
        fields: The object with exactly `name`, `version` and `generation`.

    Raises:
        SczError: The error class of `fields`.
    """
    model = ModelId(
        name=fields.string("name", pattern=NAME, limit=NAME_LIMIT),
        version=fields.string("version", pattern=VERSION, limit=VERSION_LIMIT),
        generation=fields.integer("generation", low=1, high=GENERATION_HIGH),
    )
    fields.finish()
    return model


def verify_path(path: str, *, error: type[SczError]) -> str:
    """Check the path of a file in a bundle: it stays below the folder that it is joined to.

    Args:
        path: Relative, `/` between parts.
        error: What to raise.

    Returns:
        The path, unchanged.

    Raises:
        SczError: The class `error`: empty, absolute, an empty part, `.` or `..`, a control character, not UTF-8, a part
            over 255 bytes, more than 1024 bytes, more than 16 parts.
    """
    parts = path.split("/")
    try:
        sizes = [len(part.encode("utf-8")) for part in parts]
    except UnicodeEncodeError as cause:
        raise error(f"the file name {shown(path)} is not UTF-8") from cause
    if len(parts) > PARTS_LIMIT or sum(sizes) + len(parts) - 1 > PATH_LIMIT_BYTES:
        raise error(f"the path {shown(path)} has more than {PARTS_LIMIT} parts or {PATH_LIMIT_BYTES} bytes")
    if any(part in ("", ".", "..") for part in parts):
        raise error(f"the path {shown(path)} is not relative, or has an empty part, '.' or '..'")
    if max(sizes) > PART_LIMIT_BYTES:
        raise error(f"the path {shown(path)} has a part of more than {PART_LIMIT_BYTES} bytes")
    if _CONTROL.search(path):
        raise error(f"the path {shown(path)} has a control character")
    return path
