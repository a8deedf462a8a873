"""Two commands in one owner's folder at once: nobody's change is undone, and nothing that was revoked is granted."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
from oci_hook.attestation.policy import policy_ref
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.bundle.revocations import parse_revocations, verify_revocations
from oci_hook.errors import DeviceInvalid, KeyInvalid
from oci_hook.key_errors import GenerationRefused
from oci_hook.owner import keyring
from oci_hook.owner.records import OwnerRecords
from tests.commands import Done, Household, done, refused, sczctl
from tests.enrolments import enrol_in_software


@pytest.fixture
def house(tmp_path: Path) -> Household:
    """Two versions of minilm, granted to two devices."""
    made = Household(tmp_path)
    made.enrolled("edge-1", counter_value=3)
    made.enrolled("edge-2", counter_value=3)
    for version in ("1", "2"):
        out = made.pack(f"packed-{version}", version=version)
        for device in ("edge-1", "edge-2"):
            made.grant(out, model=f"minilm:{version}", device=device, file=f"{device}.jwt")
    return made


def revoke(house: Household, *words: object, out: str) -> None:
    done(sczctl("revoke", "--keys", house.keys, *words, "-o", house.usb / out))


def grant(house: Household, *words: object, out: str, version: str = "2") -> Done:
    return sczctl("grant", f"minilm:{version}", "--keys", house.keys, *words, "-o", house.usb / out)


def record_of(house: Household, device: str) -> DeviceRecord:
    return parse_device_record(OwnerRecords(house.keys).load_device(device))


def read_grant(path: Path, house: Household) -> Grant:
    return verify_grant_signature(parse_grant(path.read_bytes()), owner=house.owner)


class Prompt:
    """The first command that asks for the passphrase waits for a person, who does something else first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self._meanwhile = keyring.open_keyring, list[Callable[[], object]]()
        monkeypatch.setattr(keyring, "open_keyring", self._open)

    def meanwhile(self, action: Callable[[], object]) -> None:
        self._meanwhile.append(action)

    def _open(self, *arguments: Any) -> Any:
        while self._meanwhile:
            self._meanwhile.pop()()
        return self._real(*arguments)


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return Prompt(monkeypatch)


def test_a_device_that_is_revoked_meanwhile_gets_no_grant_and_stays_revoked(house: Household, prompt: Prompt) -> None:
    prompt.meanwhile(lambda: revoke(house, "--device", "edge-2", out="revoked"))
    refused_many = grant(house, "--all-devices", out="many")
    assert (refused_many.code, "edge-2 was revoked" in refused_many.err) == (DeviceInvalid.code, True)
    assert not (house.usb / "many").exists()
    record = record_of(house, "edge-2")
    assert (record.revoked is not None, record.counter_value) == (True, 4)
    refused(grant(house, "--device", "edge-2", out="again.jwt"), DeviceInvalid.code, "was revoked")


def test_a_version_that_is_revoked_meanwhile_is_not_granted(house: Household, prompt: Prompt) -> None:
    prompt.meanwhile(lambda: revoke(house, "--model", "minilm:2", out="revoked"))
    refused(grant(house, "--device", "edge-1", out="late.jwt"), GenerationRefused.code, "minilm:2")
    assert not (house.usb / "late.jwt").exists()
    assert record_of(house, "edge-1").counter_value == 4


def test_a_grant_is_for_what_is_so_after_the_passphrase(house: Household, prompt: Prompt) -> None:
    """Its counter's maximum, its boot policy's epoch; and the next revocation counts beyond it."""
    prompt.meanwhile(lambda: revoke(house, "--model", "minilm:1", "--boot-policy", "minilm:default", out="first"))
    done(grant(house, "--device", "edge-1", out="late.jwt"))
    late = read_grant(house.usb / "late.jwt", house)
    assert (late.counter.maximum, late.policy_ref) == (4, policy_ref("minilm", "default", 1))
    assert record_of(house, "edge-1").counter_value == 4
    revoke(house, "--model", "minilm:2", out="second")
    compact = (house.usb / "second" / "edge-1" / "revocations.jwt").read_bytes()
    value = verify_revocations(parse_revocations(compact), owner=house.owner).value
    assert value > max(late.counter.maximum, read_grant(house.usb / "first/edge-1/minilm@2.jwt", house).counter.maximum)


def test_a_version_that_is_packed_again_meanwhile_is_not_granted(house: Household, prompt: Prompt) -> None:
    def pack_again() -> None:
        (house.keys / "models" / "minilm" / "2.json").unlink()
        house.pack("again", version="2")

    prompt.meanwhile(pack_again)
    refused(grant(house, "--device", "edge-1", out="late.jwt"), KeyInvalid.code, "meanwhile")


def test_a_revocation_locks_what_was_granted_at_its_prompt(house: Household, prompt: Prompt) -> None:
    prompt.meanwhile(lambda: done(grant(house, "--device", "edge-1", "--maximum", 50, out="ahead.jwt")))
    revoke(house, "--model", "minilm:2", out="revoked")
    compact = (house.usb / "revoked" / "edge-1" / "revocations.jwt").read_bytes()
    assert verify_revocations(parse_revocations(compact), owner=house.owner).value == 51


def test_two_revocations_at_once_have_two_values(house: Household, prompt: Prompt) -> None:
    prompt.meanwhile(lambda: revoke(house, "--model", "minilm:1", out="inner"))
    revoke(house, "--model", "minilm:2", out="outer")
    values = {
        verify_revocations(parse_revocations(path.read_bytes()), owner=house.owner).value
        for path in house.usb.glob("*er/edge-1/revocations.jwt")
    }
    assert values == {4, 5}
    assert OwnerRecords(house.keys).load_line("minilm").revoked == ("1", "2")
    assert list((house.usb / "outer" / "edge-1").iterdir()) == [house.usb / "outer" / "edge-1" / "revocations.jwt"]


def test_a_lease_request_is_not_forgotten_for_an_older_one(house: Household, prompt: Prompt) -> None:
    """What the TPM counted may be written by another command meanwhile: the lease starts from there."""
    records = OwnerRecords(house.keys)
    records.save_device("edge-1", format_device_record(replace(record_of(house, "edge-1"), resets=5, clock_ms=1000)))
    later = replace(record_of(house, "edge-1"), resets=9, clock_ms=9000)
    prompt.meanwhile(lambda: records.save_device("edge-1", format_device_record(later)))
    done(grant(house, "--device", "edge-1", "--lease-boots", 2, out="leased.jwt"))
    lease = read_grant(house.usb / "leased.jwt", house).lease
    assert lease is not None
    assert lease.resets == 11
    assert record_of(house, "edge-1").resets == 9


# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unlocked_writes(house: Household, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The writes of records that were made while others could have had the lock; and at the end, that some were not."""
    found, under_lock = list[str](), list[str]()

    def watched(name: str) -> None:
        real = getattr(OwnerRecords, name)

        def write(*arguments: Any, **named: Any) -> Any:
            descriptor = os.open(house.keys / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(name)
            except BlockingIOError:
                under_lock.append(name)
            finally:
                os.close(descriptor)
            return real(*arguments, **named)

        monkeypatch.setattr(OwnerRecords, name, write)

    for name in ("save_device", "save_line", "save_grant", "save_grants", "remove_grant"):
        watched(name)
    yield found
    assert under_lock


def test_records_are_written_under_the_lock_alone(house: Household, unlocked_writes: list[str]) -> None:
    done(grant(house, "--device", "edge-1", "--maximum", 9, out="one.jwt"))
    done(grant(house, "--all-devices", "--maximum", 10, out="many"))
    revoke(house, "--model", "minilm:1", "--device", "edge-2", out="revoked")
    enrol_in_software(house, ["edge-5"], device_class="default")
    assert unlocked_writes == []


def test_the_lock_goes_with_its_holder(house: Household) -> None:
    child = os.fork()
    if child == 0:
        with OwnerRecords(house.keys).locked():
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done(grant(house, "--device", "edge-1", out="after.jwt"))
