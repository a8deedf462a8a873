"""`bundle.model`: names and paths."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.bundle.model import ModelId, parse_model_id, verify_path
from oci_hook.documents import Fields
from oci_hook.errors import BundleInvalid, SourceInvalid
from tests.bundles import value_or_none


def parse(value: object) -> ModelId:
    return parse_model_id(Fields(value, what="model", error=BundleInvalid))


@pytest.mark.parametrize("name", ["a", "mini-lm_l6.v2", "0", "a" * 64])
@pytest.mark.parametrize("version", ["v1", "1.0.0-rc_1", "_", "A" * 64])
def test_model_ids(name: str, version: str) -> None:
    value = {"name": name, "version": version, "generation": 2**63 - 1}
    assert parse(value) == ModelId(name, version, 2**63 - 1)
    assert parse(value).document() == value


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "A"},
        {"name": "-a"},
        {"name": "a-"},
        {"name": "a--b"},
        {"name": "a/b"},
        {"name": "a\n"},
        {"name": "a" * 65},
        {"version": ""},
        {"version": ".."},
        {"version": "-1"},
        {"version": "1+2"},
        {"version": "v1\n"},
        {"version": "v" * 65},
        {"version": 1},
        {"generation": 0},
        {"generation": 2**63},
        {"generation": 1.0},
        {"generation": True},
        {"generation": "1"},
        {"extra": 1},
    ],
)
def test_refused_model_ids(changes: dict[str, object]) -> None:
    with pytest.raises(BundleInvalid):
        parse({"name": "demo", "version": "v1", "generation": 1, **changes})


@pytest.mark.parametrize(
    "path",
    [
        *("a", "...", ".hidden", "a/b/c", "ä/ü", "with space", "back\\slash"),
        *("a" * 255, "ä" * 127, "/".join("a" * 16), "/".join(["a" * 203] * 5) + "/abcd"),
    ],
)
def test_paths(path: str) -> None:
    assert verify_path(path, error=SourceInvalid) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/a", "a/", "a//b", ".", "..", "./a", "a/..", "a/../b"),
        *("a\0", "a\x1f", "a\x7f", "a\x85", "a\n/b", "\udcff", "a/\ud800"),
        *("a" * 256, "ä" * 128, "/".join("a" * 17), "/".join(["a" * 203] * 5) + "/abcde"),
    ],
)
def test_refused_paths(path: str) -> None:
    with pytest.raises(SourceInvalid):
        verify_path(path, error=SourceInvalid)


@given(st.text(max_size=40) | st.lists(st.sampled_from(["a", "..", ".", "", "b\0"]), max_size=5).map("/".join))
def test_an_accepted_path_stays_below(path: str) -> None:
    accepted = value_or_none(lambda: verify_path(path, error=SourceInvalid), SourceInvalid)
    assert accepted is None or os.path.normpath(os.path.join("/base", path)) == "/base/" + path
