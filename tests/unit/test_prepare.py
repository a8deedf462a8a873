"""The stage `prepare`: what it reads, and what the shim makes of its answer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook import shim_binds
from oci_hook.errors import HolderRefused, SczError, StateInvalid, SystemCallFailed
from oci_hook.linux.processes import process_start_time
from oci_hook.prepare import parse_asking
from oci_hook.shim_binds import Told, bind_entries

ASKING: dict[str, Any] = {
    "container_id": "c",
    "bundle": "/b",
    "runtime": "kata",
    "creator": [7, 9],
    "spec": {"annotations": {"smm.scz/model": "small"}, "mounts": []},
}


def test_what_asks() -> None:
    state, runtime, start_time, spec = parse_asking(json.dumps(ASKING).encode())
    assert (state.container_id, state.bundle, state.pid, runtime, start_time) == ("c", "/b", 7, "kata", 9)
    assert state.annotations == {"smm.scz/model": "small"}
    assert json.loads(spec) == ASKING["spec"]
    assert parse_asking(json.dumps(ASKING | {"bundle": ""}).encode())[0].bundle == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"container_id": ""},
        {"container_id": "a/b"},
        {"bundle": "b"},
        {"bundle": None},
        {"runtime": "Kata"},
        {"runtime": ""},
        {"creator": [7]},
        {"creator": [7, -1]},
        {"creator": [True, 1]},
        {"creator": ["7", 9]},
        {"spec": []},
        {"spec": None},
        {"more": 1},
    ],
)
def test_what_does_not(changes: dict[str, Any]) -> None:
    with pytest.raises(StateInvalid):
        parse_asking(json.dumps(ASKING | changes).encode())
    for name in ASKING:
        with pytest.raises(StateInvalid):
            parse_asking(json.dumps({key: value for key, value in ASKING.items() if key != name}).encode())


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.dictionaries(st.text(max_size=9), x)))
def test_arbitrary_documents(value: object) -> None:
    for document in (value, ASKING | value if isinstance(value, dict) else value, {**ASKING, "spec": value}):
        try:
            parse_asking(json.dumps(document).encode())
        except StateInvalid:
            continue


class TestShim:
    """The child is a stand-in: what is seen is what the shim asks, and what it takes for an answer."""

    def ask(self, monkeypatch: pytest.MonkeyPatch, **answer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        asked: dict[str, Any] = {}

        def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
            asked.update(json.loads(how["input"]), command=command, env=how["env"])
            return subprocess.CompletedProcess(
                command, answer.get("code", 0), answer.get("out", b""), answer.get("err")
            )

        monkeypatch.setattr(shim_binds.subprocess, "run", run)
        document = {"annotations": {"a": "b"}, "mounts": [], "process": {"env": ["SECRET=1"]}, "linux": {"seccomp": {}}}
        return bind_entries(document, "c", answer.get("bundle", ""), engine="docker", config_file="/c.toml"), asked

    def test_what_is_asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        found, asked = self.ask(monkeypatch, out=b'{"binds": []}', bundle=str(tmp_path / "link"))
        assert found == []
        assert asked["command"][-5:] == ["--config", "/c.toml", "--engine", "docker", "prepare"]
        assert asked["creator"] == [os.getpid(), process_start_time(os.getpid())]
        assert (asked["container_id"], asked["bundle"], asked["runtime"]) == ("c", str(tmp_path), "kata")
        assert asked["spec"] == {"annotations": {"a": "b"}, "mounts": [], "linux": {}}
        assert set(asked["env"]) == {"PATH", "LC_ALL"}

    def test_its_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bind = {"destination": "/m", "source": "/s", "options": ["bind", "ro"]}
        found, _ = self.ask(monkeypatch, out=json.dumps({"binds": [bind]}).encode())
        assert found == [bind]

    @pytest.mark.parametrize(
        "out", [b"", b"{}", b'{"binds": 1}', b'{"binds": [{}]}', b'{"binds": [], "more": 1}', b'{"binds": []}x']
    )
    def test_what_is_no_answer(self, monkeypatch: pytest.MonkeyPatch, out: bytes) -> None:
        with pytest.raises(SystemCallFailed):
            self.ask(monkeypatch, out=out)

    def test_a_refusal_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(Told) as told:
            self.ask(monkeypatch, code=HolderRefused.code, err=b"scz-hook: no\n")
        assert (told.value.code, told.value.line) == (HolderRefused.code, "scz-hook: no")

    @pytest.mark.parametrize("code", [1, 255, -9])
    def test_a_child_that_failed(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        with pytest.raises(SystemCallFailed):
            self.ask(monkeypatch, code=code, err=b"Killed")

    def test_a_child_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(*_: object, **__: object) -> None:
            raise subprocess.TimeoutExpired("x", 1)

        monkeypatch.setattr(shim_binds.subprocess, "run", run)
        with pytest.raises(SczError):
            bind_entries({}, "c", "", engine="docker", config_file="/c.toml")
