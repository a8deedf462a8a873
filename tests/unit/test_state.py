"""oci.state: what runtimes really send, and what nobody should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.errors import StateInvalid
from oci_hook.oci.state import MAX_STATE_BYTES, State, parse_state

GOOD: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "id": "b7c1",
    "status": "creating",
    "pid": 4711,
    "bundle": "/run/bundle",
    "annotations": {"smm.scz/model": "minilm"},
}


def encoded(**changes: Any) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...}).encode()


def test_state() -> None:
    assert parse_state(encoded()) == State("b7c1", 4711, "/run/bundle", "creating", {"smm.scz/model": "minilm"})


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"root": "/run/bundle/rootfs", "created": "2026-01-01T00:00:00Z", "owner": ""}, "pid", 4711),  # crun
        ({"status": "", "ociVersion": ""}, "status", ""),  # Kata
        ({"status": ..., "ociVersion": ...}, "status", ""),
        ({"status": 7, "ociVersion": []}, "status", ""),
        ({"pid": 0, "status": "stopped"}, "pid", 0),  # poststop
        ({"pid": -1, "status": "stopped"}, "pid", 0),  # poststop of runsc
        ({"pid": ...}, "pid", 0),
        ({"annotations": None}, "annotations", {}),
        ({"annotations": ...}, "annotations", {}),
        ({"annotations": {"a": "", "": "b"}}, "annotations", {"a": "", "": "b"}),
        ({"id": "A.b_c+d-9"}, "container_id", "A.b_c+d-9"),
        ({"id": "..."}, "container_id", "..."),
        ({"id": "a" * 255}, "container_id", "a" * 255),
        ({"bundle": "/"}, "bundle", "/"),
        ({"bundle": "/run/ä b"}, "bundle", "/run/ä b"),
    ],
)
def test_state_of_other_runtimes(changes: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(parse_state(encoded(**changes)), attribute) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ...},
        {"id": ""},
        {"id": None},
        {"id": 7},
        {"id": "a/b"},
        {"id": "."},
        {"id": ".."},
        {"id": "a b"},
        {"id": "a\n"},
        {"id": "ä"},
        {"id": "a" * 256},
        {"pid": -2},
        {"pid": True},
        {"pid": 1.0},
        {"pid": "1"},
        {"pid": None},
        {"pid": 1 << 31},
        {"bundle": ...},
        {"bundle": ""},
        {"bundle": "run/bundle"},
        {"bundle": "/a\0b"},
        {"bundle": "/" + "a" * 4096},
        {"bundle": ["/"]},
        {"annotations": []},
        {"annotations": "a=b"},
        {"annotations": {"a": None}},
        {"annotations": {"a": 1}},
        {"annotations": {"a": ["b"]}},
    ],
)
def test_malformed_state(changes: dict[str, Any]) -> None:
    with pytest.raises(StateInvalid):
        parse_state(encoded(**changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"\xef\xbb\xbf" + encoded(),
        encoded() + encoded(),
        encoded()[:-1],
        encoded().replace(b'"pid": 4711', b'"pid": 4711, "pid": 1'),
        encoded().replace(b'"minilm"', b'"minilm", "smm.scz/model": "other"'),
        encoded().replace(b"4711", b"NaN"),
        encoded().replace(b"4711", b"1" * 5000),
        encoded().replace(b'"minilm"', b'"\\ud800"'),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b" " * (MAX_STATE_BYTES + 1),
        encoded(x="a" * MAX_STATE_BYTES),
    ],
)
def test_not_a_state(data: bytes) -> None:
    with pytest.raises(StateInvalid):
        parse_state(data)


def test_large_but_bounded() -> None:
    data = encoded(annotations={f"k{number}": "v" * 1000 for number in range(900)})
    assert len(data) < MAX_STATE_BYTES
    assert len(parse_state(data).annotations) == 900


def test_annotations_cannot_be_changed() -> None:
    state = parse_state(encoded())
    with pytest.raises(TypeError):
        state.annotations["smm.scz/model"] = "other"  # type: ignore[index]


def test_fast_path_imports_the_standard_library_alone() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from oci_hook.oci.annotations import has_ours, merge_annotations, parse_requests\n"
        "from oci_hook.oci.state import parse_state\n"
        "state = parse_state(sys.stdin.buffer.read())\n"
        "assert has_ours(state.annotations) and parse_requests(state.annotations).models\n"
        "known = set(sys.stdlib_module_names) | {'oci_hook', '__main__'}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - known))\n"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-I", "-S", "-c", script, root]
    assert subprocess.run(command, input=encoded(), capture_output=True, check=True).stdout == b"[]\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(StateInvalid):
        parse_state(data)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "root"]), JSON, max_size=4))
def test_arbitrary_members(changes: dict[str, Any]) -> None:
    try:
        state = parse_state(encoded(**changes))
    except StateInvalid:
        return
    assert state.container_id not in ("", ".", "..")
    assert "/" not in state.container_id
    assert state.bundle.startswith("/")
    assert state.pid >= 0
