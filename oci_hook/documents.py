"""Strict reading of hostile JSON: bounded, no duplicate keys, no unknown keys, every field of its type and range.

`parse_object` turns bytes into a dictionary; `Fields` takes the dictionary apart. Both raise the error class that the
caller names, so that each document is refused under its own code. Source: RFC 8259, and section 4 of its advice that
names be unique. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from oci_hook.errors import SczError

T = TypeVar("T")

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_INTEGER_DIGITS = 20
_MAX_DEPTH = 64
_SAFE = re.compile(r"[^\x20-\x7e]")


def shown(text: object, limit: int = 80) -> str:
    """A hostile value, made fit for one line of a message: printable ASCII, quoted, at most `limit` characters."""
    plain = _SAFE.sub("?", str(text))
    return f"'{plain[:limit]}{'…' if len(plain) > limit else ''}'"


def parse_object(data: bytes, *, limit_bytes: int, what: str, error: type[SczError]) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8, without a byte order mark.
        limit_bytes: More than this is refused unread.
        what: The document's name, for messages.
        error: What to raise.

    Returns:
        The object; its strings hold no lone surrogates.

    Raises:
        SczError: The class `error`: too large, not JSON, not an object, a duplicate key, NaN, too deep.
    """
    if len(data) > limit_bytes:
        raise error(f"{what} is larger than {limit_bytes} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise error(f"{what} has a duplicate key")
        return found

    def constant(name: str) -> Any:
        raise error(f"{what} has {name}, which JSON does not know")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise error(f"{what} has a number of more than {_MAX_INTEGER_DIGITS} digits")
        return int(digits)

    def fraction(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise error(f"{what} has a number that is too large")
        return number

    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer, parse_float=fraction
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate would surface later, elsewhere
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not JSON in UTF-8") from cause
    if not isinstance(value, dict):
        raise error(f"{what} is not a JSON object")
    _verify_depth(value, what, error)
    return value


def _verify_depth(value: object, what: str, error: type[SczError]) -> None:
    """The parser's own bound differs between versions of Python, and later code recurses into what it is given."""
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise error(f"{what} is nested more than {_MAX_DEPTH} levels deep")


def canonical(value: object) -> bytes:
    """The bytes that we write for a JSON value: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def encode_base64url(data: bytes) -> str:
    """Base64url without padding (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_base64url(text: str, *, what: str, error: type[SczError]) -> bytes:
    """Decode base64url without padding; anything but the one canonical spelling is refused."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error) as cause:
        raise error(f"{what} is not base64url") from cause
    if encode_base64url(data) != text:
        raise error(f"{what} is not canonical base64url")
    return data


class Fields:
    """Takes one JSON object apart, field by field; `finish` refuses what was not asked for.

    Args:
        value: The object, or anything: what is not an object is refused.
        what: Its name, for messages.
        error: What to raise.
    """

    def __init__(self, value: object, *, what: str, error: type[SczError]) -> None:
        if not isinstance(value, dict):
            raise error(f"{what} is not an object")
        self._left: dict[str, Any] = dict(value)
        self._what = what
        self._error = error

    def _fail(self, name: str, problem: str) -> SczError:
        return self._error(f"{self._what}: {shown(name)} {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not yet taken."""
        return name in self._left

    def take(self, name: str) -> Any:
        """The raw value of a required field."""
        try:
            return self._left.pop(name)
        except KeyError:
            raise self._fail(name, "is missing") from None

    def string(self, name: str, *, pattern: str | None = None, limit: int = 1024) -> str:
        """A required string of 1 to `limit` characters that fully matches `pattern`."""
        value = self.take(name)
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            raise self._fail(name, f"is not a string of 1 to {limit} characters")
        if pattern is not None and not re.fullmatch(pattern, value):
            raise self._fail(name, f"does not match {pattern}")
        return value

    def literal(self, name: str, expected: str) -> str:
        """A required string that is exactly `expected`."""
        if self.string(name) != expected:
            raise self._fail(name, f"is not {shown(expected)}")
        return expected

    def integer(self, name: str, *, low: int, high: int) -> int:
        """A required whole number in [low, high]; true and 1.0 are not numbers here."""
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            raise self._fail(name, f"is not a whole number from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        """A required true or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise self._fail(name, "is neither true nor false")
        return value

    def digest(self, name: str) -> str:
        """A required `sha256:` digest, lower case."""
        return self.string(name, pattern=DIGEST.pattern)

    def hexadecimal(self, name: str, *, low: int, high: int) -> bytes:
        """A required lower-case hexadecimal string of `low` to `high` bytes."""
        text = self.string(name, pattern=r"([0-9a-f]{2})+", limit=2 * high)
        if not low <= len(text) // 2 <= high:
            raise self._fail(name, f"is not {low} to {high} bytes long")
        return bytes.fromhex(text)

    def base64url(self, name: str, *, low: int, high: int) -> bytes:
        """A required base64url string of `low` to `high` bytes."""
        data = decode_base64url(self.string(name, limit=2 * high + 4), what=f"{self._what}: {name}", error=self._error)
        if not low <= len(data) <= high:
            raise self._fail(name, f"is not {low} to {high} bytes long")
        return data

    def fields(self, name: str) -> Fields:
        """A required object, to be taken apart in turn."""
        return Fields(self.take(name), what=f"{self._what}: {name}", error=self._error)

    def items(self, name: str, read: Callable[[object], T], *, low: int, high: int) -> tuple[T, ...]:
        """A required list of `low` to `high` items, each read by `read`."""
        value = self.take(name)
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self._fail(name, f"is not a list of {low} to {high} items")
        return tuple(read(item) for item in value)

    def strings(
        self, name: str, *, low: int, high: int, pattern: str | None = None, limit: int = 1024
    ) -> tuple[str, ...]:
        """A required list of different strings."""

        def read(item: object) -> str:
            return Fields({name: item}, what=self._what, error=self._error).string(name, pattern=pattern, limit=limit)

        found = self.items(name, read, low=low, high=high)
        if len(set(found)) != len(found):
            raise self._fail(name, "names something twice")
        return found

    def rest(self) -> dict[str, Any]:
        """What was not taken; the caller answers for it."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        """Refuse any field that was not taken."""
        if self._left:
            raise self._fail(min(self._left), "is not known here")
