"""`journal`: entries in journald's native protocol, received by a real socket and parsed as journald does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook import journal
from oci_hook.journal import MESSAGE_IDS, entry, tell


def parse(data: bytes) -> dict[str, str]:
    """systemd, "Native Journal Protocol": NAME=value, or NAME, a length of 64 bits little-endian, and the value."""
    fields: dict[str, str] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[8 + length :]
            assert data[:1] == b"\n"
            data = data[1:]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(path)
        made.settimeout(5)
        monkeypatch.setattr(journal, "SOCKET", path)
        yield made


@pytest.mark.parametrize("event", MESSAGE_IDS)
def test_every_event(receiver: socket.socket, event: str) -> None:
    tell(event, "what\nhappened", container="c1", code=35, subject="a\nSCZ_CODE=0\nb")
    assert parse(receiver.recv(65536)) == {
        "MESSAGE": "what happened",
        "MESSAGE_ID": MESSAGE_IDS[event],
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "scz-hook",
        "SCZ_EVENT": event,
        "SCZ_CONTAINER": "c1",
        "SCZ_CODE": "35",
        "SCZ_SUBJECT": "a\nSCZ_CODE=0\nb",
    }


def test_message_ids_are_128_bits_each_its_own() -> None:
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)
    assert all(len(each) == 32 and int(each, 16) and each == each.lower() for each in MESSAGE_IDS.values())


def test_what_is_long_is_cut_and_what_is_no_name_is_refused() -> None:
    assert len(entry({"A": "x" * 10_000})) == 4096 + 3
    assert parse(entry({"A": "\ud800"})) == {"A": "?"}
    for name in ("", "a", "_A", "A=B", "A\nB"):
        with pytest.raises(ValueError, match="not a field"):
            entry({name: "x"})


def test_a_journal_that_is_full_or_absent_delays_nobody(receiver: socket.socket, tmp_path: Path) -> None:
    for _ in range(10_000):
        tell("grant", "x" * 1000)
    receiver.close()
    tell("grant", "nobody listens")
    (tmp_path / "socket").unlink()
    tell("grant", "nothing is there")
