"""The room that a model takes."""

from __future__ import annotations

import pytest

from oci_hook.delivery.room import Room, directories_of, measure_room
from oci_hook.linux.mounts import PAGE_BYTES


@pytest.mark.parametrize(
    ("sizes", "paths", "expected"),
    [
        ([], [], Room(0, 1)),
        ([0], ["a"], Room(0, 2)),
        ([1], ["a"], Room(PAGE_BYTES, 2)),
        ([PAGE_BYTES, PAGE_BYTES + 1], ["a", "b"], Room(3 * PAGE_BYTES, 3)),
        ([1, 1], ["d/e/a", "d/b"], Room(2 * PAGE_BYTES, 5)),
    ],
)
def test_whole_pages_and_every_inode(sizes: list[int], paths: list[str], expected: Room) -> None:
    assert measure_room(sizes, paths) == expected


def test_parents_come_first() -> None:
    assert directories_of(["a/b/c/x", "a-b/x", "a/b/y", "z"]) == ["a", "a-b", "a/b", "a/b/c"]
