"""`enrolled`: two who change `device.json` at once lose nothing of each other's; what a refused enrolment leaves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook import enrolled
from oci_hook.attestation.host_device import AskedAgain, HostDevice, format_host_device
from oci_hook.bundle.grant import Grant, parse_grant, verify_grant_signature
from oci_hook.enrolled import ask_for_enrolment, remember_granted
from oci_hook.errors import DeviceNotEnrolled, TpmUnavailable
from oci_hook.store import Store
from tests.commands import Household

OTHER = "B" * 43


@pytest.fixture
def house(tmp_path: Path) -> Household:
    """The host has asked its owner again, and does not know yet whether it was accepted."""
    made = Household(tmp_path)
    device, owner_id = made.enrolled().host, made.owner.owner_id
    made.store.save_device(
        format_host_device(device.with_counter(owner_id, device.counters[owner_id], 0, AskedAgain(1, 0)))
    )
    return made


@pytest.fixture
def grant(house: Household) -> Grant:
    path = house.grant(house.pack())
    return verify_grant_signature(parse_grant(path.read_bytes()), owner=house.owner)


class Meanwhile:
    """Somebody else, who begins when told to, and goes on until it is done or waits for the lock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
        self._waits = threading.Event()
        self._other = threading.Thread(target=action)
        real = enrolled.locked

        @contextlib.contextmanager
        def locked(store: Store) -> Iterator[None]:
            if threading.current_thread() is self._other:
                self._waits.set()
            with real(store):
                yield

        monkeypatch.setattr(enrolled, "locked", locked)

    def begin(self) -> None:
        self._other.start()
        while not self._waits.is_set() and self._other.is_alive():
            self._other.join(0.01)

    def end(self) -> None:
        self._other.join()


def with_another_owner(house: Household, device: HostDevice | None) -> HostDevice:
    assert device is not None
    return device.with_counter(OTHER, device.counters[house.owner.owner_id], 7)


def of_both(house: Household) -> tuple[int | None, ...]:
    """The values at the enrolments with the other owner and with the first, who accepted again."""
    return tuple(house.store.load_device().counter_values.get(each) for each in (OTHER, house.owner.owner_id))


def test_an_enrolment_is_not_undone_by_a_grant_that_comes_meanwhile(
    house: Household, grant: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enrol() -> None:
        ask_for_enrolment(house.store, house.owner, lambda known, _newest: (with_another_owner(house, known), None))

    other, real = Meanwhile(monkeypatch, enrol), format_host_device

    def slower(device: HostDevice) -> bytes:
        monkeypatch.setattr(enrolled, "format_host_device", real)
        other.begin()
        return real(device)

    monkeypatch.setattr(enrolled, "format_host_device", slower)
    remember_granted(house.store, [grant])
    other.end()
    assert of_both(house) == (7, 1)


def test_what_a_grant_showed_is_not_undone_by_an_enrolment(
    house: Household, grant: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Meanwhile(monkeypatch, lambda: remember_granted(house.store, [grant]))

    def provision(known: HostDevice | None, newest: int) -> tuple[HostDevice, int]:
        other.begin()
        return with_another_owner(house, known), newest

    assert ask_for_enrolment(house.store, house.owner, provision) == 0
    other.end()
    assert of_both(house) == (7, 1)


def test_a_tpm_that_refuses_leaves_what_was_there(house: Household) -> None:
    def refuses(known: HostDevice | None, newest: int) -> tuple[HostDevice, None]:
        raise TpmUnavailable("it was taken out")

    before = house.store.load_device()
    with pytest.raises(TpmUnavailable):
        ask_for_enrolment(house.store, house.owner, refuses)
    assert house.store.load_device() == before
    remember_granted(house.store, [])
    fresh = Store(str(house.host / "fresh"))
    with pytest.raises(TpmUnavailable):
        ask_for_enrolment(fresh, house.owner, refuses)
    with pytest.raises(DeviceNotEnrolled):
        fresh.load_device()


def test_the_first_enrolment_knows_of_none(house: Household) -> None:
    fresh = Store(str(house.host / "fresh"))
    device = replace(house.devices["edge-1"].host, asked_again={})
    seen = list[object]()

    def provision(known: HostDevice | None, newest: int) -> tuple[HostDevice, str]:
        seen.extend((known, newest))
        return device, "made"

    assert ask_for_enrolment(fresh, house.owner, provision) == "made"
    assert (seen, fresh.load_device()) == ([None, 0], device)
