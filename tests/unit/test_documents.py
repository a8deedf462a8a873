"""`documents`: strict JSON and base64url, and the reader that takes an object apart."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.documents import (
    Fields,
    canonical,
    decode_base64url,
    encode_base64url,
    parse_object,
    shown,
)
from oci_hook.errors import BundleInvalid


def parse(data: bytes) -> dict[str, object]:
    return parse_object(data, limit_bytes=4096, what="thing", error=BundleInvalid)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":1,"a":2}', "duplicate"),
        (b'{"a":{"b":1,"b":2}}', "duplicate"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":-1e999}', "too large"),
        (b'{"a":' + b"9" * 21 + b"}", "digits"),
        (b'{"a":"\\ud800"}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a":' + b"[" * 1500 + b"]" * 1500 + b"}", "not JSON|nested"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested more than 64"),
        (b'{"a":"' + b"x" * 5000 + b'"}', "larger"),
        (b'{"a":1}x', "not JSON"),
        (b'{"a":"\xff"}', "not JSON"),
    ],
)
def test_hostile_json_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BundleInvalid, match=why):
        parse(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_an_object_or_our_error(data: bytes) -> None:
    try:
        assert isinstance(parse(data), dict)
    except BundleInvalid:
        return


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**60), 2**60), max_size=8))
def test_canonical_is_read_back(value: dict[str, int]) -> None:
    assert parse_object(canonical(value), limit_bytes=1 << 20, what="thing", error=BundleInvalid) == value


@given(st.binary(max_size=64))
def test_base64url_round_trip(data: bytes) -> None:
    assert decode_base64url(encode_base64url(data), what="x", error=BundleInvalid) == data


@pytest.mark.parametrize("text", ["YQ==", "YR", "Y", "Y Q", "+w", "é", "YQ\n"])
def test_other_spellings_of_base64url_are_refused(text: str) -> None:
    with pytest.raises(BundleInvalid):
        decode_base64url(text, what="x", error=BundleInvalid)


def fields(value: object) -> Fields:
    return Fields(value, what="thing", error=BundleInvalid)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 6, -1])
def test_integer_takes_whole_numbers_in_range_only(value: object) -> None:
    with pytest.raises(BundleInvalid, match="whole number"):
        fields({"n": value}).integer("n", low=0, high=5)


def test_fields_refuse_what_was_not_asked_for() -> None:
    reader = fields({"a": "x", "b": 1})
    assert reader.string("a") == "x"
    with pytest.raises(BundleInvalid, match="'b' is not known"):
        reader.finish()


def test_fields_refuse_what_is_missing_or_no_object() -> None:
    with pytest.raises(BundleInvalid, match="missing"):
        fields({}).string("a")
    with pytest.raises(BundleInvalid, match="not an object"):
        fields([])
    with pytest.raises(BundleInvalid, match="twice"):
        fields({"a": ["x", "x"]}).strings("a", low=1, high=3)
    with pytest.raises(BundleInvalid, match="list of 1 to 3"):
        fields({"a": []}).strings("a", low=1, high=3)
    with pytest.raises(BundleInvalid, match="bytes long"):
        fields({"a": "00"}).hexadecimal("a", low=2, high=2)


def test_a_hostile_value_is_one_printable_line() -> None:
    text = shown("a\n\x1b[2Jé" + "x" * 200)
    assert text.isprintable()
    assert len(text) < 90
    assert json.dumps(text)
