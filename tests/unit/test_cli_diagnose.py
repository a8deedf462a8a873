"""`sczctl why` and `sczctl audit`: what happened, told to people and to scripts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from oci_hook.audit import EMPTY_HEAD, AuditLog
from oci_hook.errors import AuditRefused, TokenExpired, TokenMissing
from oci_hook.key_errors import all_errors
from oci_hook.report import keep_refusal
from tests.commands import Done, Household, done, misused, refused, snapshot

FIRST, SECOND = "c" * 64, "d1" * 32


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def refusals(house: Household) -> None:
    """Two containers that did not start, the second a minute later."""
    run = str(house.host / "run")
    keep_refusal(run, FIRST, TokenMissing("no token at /var/run/x"))
    for path in (house.host / "run" / "last").iterdir():
        os.utime(path, (1, 1))
    keep_refusal(run, SECOND, TokenExpired("expired 3 s ago", remedy="issue one"))


def nothing(tried: Done, *words: str) -> None:
    assert (tried.code, tried.out) == (1, "")
    assert len(tried.err.splitlines()) == 1
    for word in words:
        assert word in tried.err


# --- why: codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", all_errors())
def test_each_code_has_a_reason_and_a_remedy(house: Household, code: int) -> None:
    cls = all_errors()[code]
    told = done(house.ctl("why", str(code)))
    assert told.out == f"{cls.__name__} ({code}, {cls.family}): {cls.summary}\nremedy: {cls.remedy}\n"
    assert done(house.ctl("why", str(code), "--json")).json == {
        "code": code,
        "reason": cls.__name__,
        "family": cls.family,
        "summary": cls.summary,
        "remedy": cls.remedy,
    }


def test_all_codes_are_listed(house: Household) -> None:
    lines = done(house.ctl("why", "--codes")).out.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(all_errors())
    shown = done(house.ctl("why", "--codes", "--json")).json
    assert {int(code) for code in shown} == set(all_errors())
    assert all(set(entry) == {"reason", "family", "summary", "remedy"} for entry in shown.values())


@pytest.mark.parametrize(
    ("code", "word"), [("0", "--codes"), ("9", "--codes"), ("999", "--codes"), ("125", "podman"), ("126", "podman")]
)
def test_a_number_that_is_none_of_ours(house: Household, refusals: None, code: str, word: str) -> None:
    nothing(house.ctl("why", code), "not an exit code of the hook", word)
    nothing(house.ctl("why", code, "--json"))


# --- why: containers --------------------------------------------------------------------------------------------------


def test_nothing_is_known_at_first(house: Household) -> None:
    before = snapshot(house.host)
    nothing(house.ctl("why"), "no refusal is known")
    nothing(house.ctl("why", "--json"))
    nothing(house.ctl("why", "abc"), "for abc")
    assert snapshot(house.host) == before


def test_the_last_refusal_is_told(house: Household, refusals: None) -> None:
    told = done(house.ctl("why")).out.splitlines()
    assert told[0].endswith(f" container {SECOND[:12]}")
    assert told[1:] == ["TokenExpired (38): expired 3 s ago", "remedy: issue one"]


def test_a_container_is_named_by_the_beginning_of_its_id(house: Household, refusals: None) -> None:
    for prefix in ("c", FIRST[:12], FIRST):
        shown = done(house.ctl("why", prefix, "--json")).json
        assert (shown["container_id"], shown["code"], shown["reason"]) == (FIRST, 18, "TokenMissing")
        assert shown["message"] == "no token at /var/run/x"
        assert shown["remedy"] == TokenMissing.remedy
    nothing(house.ctl("why", "cd"), "for cd")
    nothing(house.ctl("why", FIRST + "c"))
    nothing(house.ctl("why", "²"))


def test_what_a_container_s_maker_chose_does_not_reach_the_terminal(house: Household) -> None:
    keep_refusal(str(house.host / "run"), "e\x1b[2J", TokenMissing("a\x1b[31mb\x9bc"))
    for words in (["why"], ["why", "e\x1b"], ["why", "--json"], ["why", "\x1b[2J"]):
        told = house.ctl(*words)
        assert not [character for character in told.out + told.err if character != "\n" and not character.isprintable()]


def test_a_damaged_report_hides_no_other(house: Household, refusals: None) -> None:
    for path in (house.host / "run" / "last").iterdir():
        if b"TokenExpired" in path.read_bytes():
            path.write_bytes(b"?")
    assert "TokenMissing" in done(house.ctl("why")).out


# --- audit ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def audit(house: Household) -> Path:
    """Four records, a minute apart."""
    path = house.host / "log" / "audit.jsonl"
    now = [1_767_225_600.0]
    log = AuditLog(str(path), lambda: now[0])
    for event, container in (("grant", FIRST), ("outcome", FIRST), ("refused", SECOND), ("closed", FIRST)):
        log.append(event, container=container, model="minilm")
        now[0] += 60
    return path


def events(told: Done) -> list[str]:
    return [json.loads(line)["event"] for line in done(told).out.splitlines()]


def test_show_prints_a_record_a_line(house: Household, audit: Path) -> None:
    told = done(house.ctl("audit", "show")).out.splitlines()
    assert [line.split()[:3] for line in told] == [
        ["1", "2026-01-01T00:00:00.000Z", "grant"],
        ["2", "2026-01-01T00:01:00.000Z", "outcome"],
        ["3", "2026-01-01T00:02:00.000Z", "refused"],
        ["4", "2026-01-01T00:03:00.000Z", "closed"],
    ]
    lines = done(house.ctl("audit", "show", "--json")).out.splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in audit.read_text().splitlines()]


def test_show_filters(house: Household, audit: Path) -> None:
    show = ["audit", "show", "--json"]
    assert events(house.ctl(*show, "--event", "refused")) == ["refused"]
    assert events(house.ctl(*show, "--container", "cccc")) == ["grant", "outcome", "closed"]
    assert events(house.ctl(*show, "--container", SECOND)) == ["refused"]
    assert events(house.ctl(*show, "--container", "d1d2")) == []
    assert events(house.ctl(*show, "--since", "2026-01-01T00:02:00")) == ["refused", "closed"]
    assert events(house.ctl(*show, "--since", "2026-01-01 00:02:01")) == ["closed"]
    assert events(house.ctl(*show, "--since", "2026-01-01")) == ["grant", "outcome", "refused", "closed"]
    assert events(house.ctl(*show, "--since", "2026-01-02")) == []
    assert events(house.ctl(*show, "--container", "c", "--event", "closed", "--since", "2026-01-01")) == ["closed"]
    misused(house.ctl("audit", "show", "--event", "other"), "--event")
    misused(house.ctl("audit", "show", "--since", "yesterday"), "--since")


def test_verify_prints_the_head(house: Household, audit: Path) -> None:
    head = AuditLog(str(audit)).head()
    assert done(house.ctl("audit", "verify")).out == (
        f"4 records, each follows the one before; head {head.digest.hex()}\n"
    )
    assert done(house.ctl("audit", "verify", "--json")).json == {
        "records": 4,
        "head": head.digest.hex(),
        "last": "2026-01-01T00:03:00.000Z",
        "first": 1,
        "after": EMPTY_HEAD.hex(),
    }


def test_a_log_that_is_not_there_is_not_made(house: Household) -> None:
    before = snapshot(house.host)
    assert done(house.ctl("audit", "show")).out == ""
    shown = done(house.ctl("audit", "verify", "--json")).json
    assert shown == {
        "records": 0,
        "head": EMPTY_HEAD.hex(),
        "last": None,
        "first": 0,
        "after": EMPTY_HEAD.hex(),
    }
    assert "0 records" in done(house.ctl("audit", "verify")).out
    assert snapshot(house.host) == before
    assert not (house.host / "log").exists()


def changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"minilm", b"minimm"), *lines[2:]]


def removed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def slipped_in(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"hello\n", *lines[2:]]


@pytest.mark.parametrize("tamper", [changed, removed, swapped, slipped_in])
def test_a_broken_chain_ends_with_54(house: Household, audit: Path, tamper: object) -> None:
    assert callable(tamper)
    audit.write_bytes(b"".join(tamper(audit.read_bytes().splitlines(keepends=True))))
    before = snapshot(house.host)
    refused(house.ctl("audit", "verify"), 54, "line ", "AuditRefused")
    refused(house.ctl("audit", "verify", "--json"), 54)
    shown = house.ctl("audit", "show")
    assert shown.code == AuditRefused.code == 54
    assert shown.err.startswith("sczctl: AuditRefused (54): line ")
    assert snapshot(house.host) == before


def test_verify_does_not_change_the_log(house: Household, audit: Path) -> None:
    before = snapshot(house.host)
    done(house.ctl("audit", "verify"))
    done(house.ctl("audit", "show"))
    assert snapshot(house.host) == before


def test_hostile_members_do_not_reach_the_terminal(house: Household, audit: Path) -> None:
    AuditLog(str(audit)).append("refused", container="x\x9b2J\u202e", message="a\x1b[31m\nb")
    for words in (["audit", "show"], ["audit", "show", "--json"]):
        told = done(house.ctl(*words))
        assert not [character for character in told.out if character != "\n" and not character.isprintable()]
        assert len(told.out.splitlines()) == 5
