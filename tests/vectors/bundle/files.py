"""Encrypted files with one failure each, described so that a file of megabytes fits into a line.

`build` makes the ciphertext: a plaintext from SHAKE-256, encrypted with a given salt and nonce prefix, then edited. Its
SHA-256 stands in the vector, so a change of the writer does not go unseen.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import (
    FIRST_PLAINTEXT_BYTES,
    PLAINTEXT_BYTES,
    SEGMENT_BYTES,
    ContentKey,
    associated_data,
    encrypt_stream,
    plan_decryption,
)

KEY, OTHER_KEY = bytes(range(32)).hex(), bytes(range(1, 33)).hex()
SALT, PREFIX = bytes(range(100, 132)), bytes(range(200, 207))
THREE = FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES + 1000  # two full segments and a short one
TWO_FULL = FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES


def plaintext(size: int) -> bytes:
    """The plaintext of a vector."""
    return hashlib.shake_256(b"scz-smm vector").digest(size)


def encrypt(size: int, key: str, place: dict[str, Any]) -> bytes:
    """The ciphertext of `plaintext(size)`, at a place."""
    sealed = io.BytesIO()
    encrypt_stream(
        io.BytesIO(plaintext(size)).read,
        sealed.write,
        content_key=ContentKey(bytes.fromhex(key)),
        associated_data=place_data(place),
        salt=SALT,
        nonce_prefix=PREFIX,
        plaintext_bytes=size,
    )
    return sealed.getvalue()


def place_data(place: dict[str, Any]) -> bytes:
    """The associated data of a vector's place."""
    return associated_data(ModelId(place["name"], place["version"], 1), place["path"])


def build(vector: dict[str, Any]) -> bytes:
    """The ciphertext that a vector describes."""
    written = vector["written"]
    data = encrypt(written["bytes"], written["key"], written)
    for edit, *arguments in vector["edits"]:
        data = _EDITS[edit](data, *arguments)
    return data


def _pieces(data: bytes) -> list[bytes]:
    return [data[at : at + SEGMENT_BYTES] for at in range(0, len(data), SEGMENT_BYTES)]


def _swap(data: bytes, first: int, second: int) -> bytes:
    pieces = _pieces(data)
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return b"".join(pieces)


def _double(data: bytes, number: int) -> bytes:
    pieces = _pieces(data)
    return b"".join([*pieces[: number + 1], *pieces[number:]])


def _flip(data: bytes, offset: int) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= 1
    return bytes(changed)


def _empty_last(data: bytes) -> bytes:
    """The last full segment, sealed as not the last, and an empty one: to a lax reader the same file."""
    plan = plan_decryption(
        data[:40],
        content_key=ContentKey(bytes.fromhex(KEY)),
        associated_data=place_data(PLACE),
        ciphertext_bytes=len(data),
        plaintext_bytes=TWO_FULL,
    )
    cipher, last = AESGCM(plan.file_key), plan.segment(plan.segments - 1)
    body = plaintext(TWO_FULL)[last.offset_plaintext :]
    sealed = cipher.encrypt(last.nonce[:-1] + b"\0", body, None)
    empty = cipher.encrypt(PREFIX + plan.segments.to_bytes(4, "big") + b"\1", b"", None)
    return data[: last.offset_ciphertext] + sealed + empty


_EDITS: dict[str, Any] = {
    "truncate": lambda data, size: data[:size],
    "append": lambda data, text: data + bytes.fromhex(text),
    "flip": _flip,
    "swap": _swap,
    "double": _double,
    "empty-last": _empty_last,
}

PLACE = {"name": "demo", "version": "v1", "path": "weights/model.safetensors"}


def _vector(
    expect: str | None, size: int, *edits: list[Any], read_bytes: int | None = None, key: str = KEY, **written: object
) -> dict[str, Any]:
    return {
        "expect": expect,
        "written": {"bytes": size, "key": key, **PLACE, **written},
        "edits": list(edits),
        "read": {"bytes": size if read_bytes is None else read_bytes, "key": KEY, **PLACE},
    }


_NO = "DecryptionRefused"
_FIRST, _ALL = FIRST_PLAINTEXT_BYTES, 40 + THREE + 3 * 16
FILE_VECTORS: dict[str, dict[str, Any]] = {
    "file-good-empty": _vector(None, 0),
    "file-good-one-byte": _vector(None, 1),
    "file-good-first-segment-less-one": _vector(None, _FIRST - 1),
    "file-good-first-segment-full": _vector(None, _FIRST),
    "file-good-first-segment-and-one": _vector(None, _FIRST + 1),
    "file-good-two-full-segments": _vector(None, TWO_FULL),
    "file-good-three-segments": _vector(None, THREE),
    "file-nothing": _vector(_NO, 0, ["truncate", 0]),
    "file-header-only": _vector(_NO, 0, ["truncate", 40]),
    "file-header-truncated": _vector(_NO, 1, ["truncate", 39]),
    "file-truncated-by-a-byte": _vector(_NO, 100, ["truncate", 155]),
    "file-truncated-and-size-too": _vector(_NO, 100, ["truncate", 155], read_bytes=99),
    "file-truncated-by-a-segment": _vector(_NO, THREE, ["truncate", 2 * SEGMENT_BYTES]),
    "file-truncated-by-a-segment-and-size-too": _vector(
        _NO, THREE, ["truncate", 2 * SEGMENT_BYTES], read_bytes=TWO_FULL
    ),
    "file-extended-by-a-byte": _vector(_NO, 100, ["append", "00"]),
    "file-extended-and-size-too": _vector(_NO, 100, ["append", "00"], read_bytes=101),
    "file-extended-by-a-segment": _vector(_NO, TWO_FULL, ["double", 1]),
    "file-extended-by-a-segment-and-size-too": _vector(
        _NO, TWO_FULL, ["double", 1], read_bytes=TWO_FULL + PLAINTEXT_BYTES
    ),
    "file-empty-last-segment": _vector(_NO, TWO_FULL, ["empty-last"]),
    "file-segments-reordered": _vector(_NO, TWO_FULL + PLAINTEXT_BYTES, ["swap", 1, 2]),
    "file-first-and-second-reordered": _vector(_NO, TWO_FULL, ["swap", 0, 1]),
    "file-header-length-flipped": _vector(_NO, 100, ["flip", 0]),
    "file-salt-flipped": _vector(_NO, 100, ["flip", 1]),
    "file-nonce-prefix-flipped": _vector(_NO, 100, ["flip", 39]),
    "file-body-flipped": _vector(_NO, 100, ["flip", 40]),
    "file-tag-flipped": _vector(_NO, 100, ["flip", -1]),
    "file-second-segment-flipped": _vector(_NO, THREE, ["flip", SEGMENT_BYTES + 5]),
    "file-last-tag-flipped": _vector(_NO, THREE, ["flip", _ALL - 1]),
    "file-of-another-model": _vector(_NO, 100, name="other"),
    "file-of-another-version": _vector(_NO, 100, version="v2"),
    "file-of-another-name": _vector(_NO, 100, path="config.json"),
    "file-under-another-key": _vector(_NO, 100, key=OTHER_KEY),
    "file-size-smaller": _vector(_NO, 100, read_bytes=99),
    "file-size-larger": _vector(_NO, 100, read_bytes=101),
    "file-size-negative": _vector(_NO, 0, read_bytes=-1),
}
