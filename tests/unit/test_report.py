"""`report`, `errors`: what a refusal leaves for `sczctl why`; every code is one reason and in its family's range."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from oci_hook import journal as journal_module
from oci_hook.audit import AuditLog
from oci_hook.errors import CouldNotTell, InputError, Refused, SczError, TokenExpired, TokenMissing
from oci_hook.key_errors import all_errors
from oci_hook.oci.state import State
from oci_hook.report import explain, forget_refusal, keep_refusal, load_refusals, report_refusal


def subclasses(cls: type[SczError]) -> list[type[SczError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *subclasses(sub))]


def test_each_code_is_one_reason_in_its_family() -> None:
    leaves = [cls for cls in subclasses(SczError) if cls not in (InputError, Refused, CouldNotTell)]
    codes = [cls.code for cls in leaves if cls.__module__ in ("oci_hook.errors", "oci_hook.key_errors")]
    assert len(codes) == len(set(codes)) == len(all_errors())
    for code, cls in all_errors().items():
        low, high = {"input": (10, 29), "refused": (30, 59), "could-not-tell": (60, 79)}[cls.family]
        assert low <= code <= high, cls
        assert "\n" not in cls.remedy
        assert cls.remedy
        assert explain(code) == (cls.__name__, cls.family, cls.summary, cls.remedy)
    assert explain(9) is None


def test_a_refusal_is_kept_and_forgotten(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keep_refusal(run, "c" * 64, TokenMissing("no token at /x"))
    keep_refusal(run, "d" * 64, TokenExpired("expired 3 s ago", remedy="issue one"))
    found = load_refusals(run)
    assert {refusal.container_id[0]: (refusal.code, refusal.remedy) for refusal in found} == {
        "c": (18, TokenMissing.remedy),
        "d": (38, "issue one"),
    }
    assert os.stat(tmp_path / "run" / "last").st_mode & 0o777 == 0o700
    forget_refusal(run, "c" * 64)
    assert [refusal.container_id for refusal in load_refusals(run)] == ["d" * 64]


def test_a_refusal_is_told_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[paths]\nruntime = "{tmp_path}/run"\naudit = "{tmp_path}/audit.jsonl"\n')
    state = State("c1", 1, "/b", "created", {"smm.scz/model": "m:1"})
    assert report_refusal(str(config), state, TokenMissing("no token at /x")) == 18
    assert capsys.readouterr().err == f"scz-hook: TokenMissing (18): no token at /x; {TokenMissing.remedy}\n"
    assert [refusal.code for refusal in load_refusals(f"{tmp_path}/run")] == [18]
    (record,) = AuditLog(f"{tmp_path}/audit.jsonl").records()
    assert (record["event"], record["model"], record["code"]) == ("refused", "m:1", 18)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for number in range(300):
        keep_refusal(run, f"c{number}", TokenMissing("x"))
    assert len(load_refusals(run)) == 256


def test_a_report_never_fails_a_start_or_hides_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep_refusal(str(tmp_path / "file"), "c1", TokenMissing("x"))
    assert load_refusals(str(tmp_path / "file")) == []


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keep_refusal(run, "c1", TokenMissing("x"))
    (tmp_path / "run" / "last" / "other.json").write_text("{")
    assert [refusal.container_id for refusal in load_refusals(run)] == ["c1"]


def test_the_journal_gets_one_entry_with_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        journal.settimeout(5)
        monkeypatch.setattr(journal_module, "SOCKET", path)
        config = tmp_path / "config.toml"
        config.write_text(f'[paths]\nruntime = "{tmp_path}/run"\naudit = "{tmp_path}/audit.jsonl"\n')
        report_refusal(str(config), State("c1", 1, "/b", "", {}), TokenMissing("line one\nSCZ_CODE=0"))
        entry = journal.recv(65536).decode()
    fields = dict(line.split("=", 1) for line in entry.splitlines())
    assert fields["SYSLOG_IDENTIFIER"] == "scz-hook"
    assert (fields["SCZ_CODE"], fields["SCZ_REASON"], fields["SCZ_CONTAINER"]) == ("18", "TokenMissing", "c1")
    assert "line one SCZ_CODE=0" in fields["MESSAGE"]
