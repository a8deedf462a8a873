"""`nri.prepared`: what the plugin keeps of the containers that it prepared, whatever lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from oci_hook.errors import FileUnreadable
from oci_hook.nri.prepared import Connected, Prepared, forget_connected, load_connected, write_connected


def test_containers_come_and_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepared = Prepared(str(run))
    assert (prepared.ids(), prepared.has("a")) == ((), False)
    for name in ("b", "a", "a"):
        prepared.add(name)
    assert (prepared.ids(), prepared.has("a")) == (("a", "b"), True)
    assert Prepared(str(run)).ids() == ("a", "b")
    prepared.remove("a")
    prepared.remove("a")
    assert prepared.ids() == ("b",)
    assert (run / "nri/prepared").stat().st_mode & 0o777 == 0o700


def test_what_is_not_ours_is_left_out(tmp_path: Path) -> None:
    prepared = Prepared(str(tmp_path / "run"))
    prepared.add("a")
    folder = tmp_path / "run/nri/prepared"
    (folder / "x").write_text("{")
    (folder / "y").write_text('{"container": "../../etc"}')
    (folder / "z").mkdir()
    (folder / "link").symlink_to("/dev/zero")
    assert prepared.ids() == ("a",)


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "run/nri/prepared"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(FileUnreadable):
        Prepared(str(tmp_path / "run")).add("a")


def test_what_the_plugin_says_of_itself(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert load_connected(run) is None
    forget_connected(run)
    said = Connected(17, 1234, "containerd 2.1.9", 100)
    write_connected(run, said)
    assert load_connected(run) == said
    (tmp_path / "run/nri/connected.json").write_text('{"pid": "x"}')
    with pytest.raises(FileUnreadable):
        load_connected(run)
    forget_connected(run)
    assert load_connected(run) is None
