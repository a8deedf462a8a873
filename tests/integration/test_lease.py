"""Leases and epochs with a real TPM (swtpm): it alone counts boots and powered-on time, and it alone refuses.

Nothing is mocked: a boot is a TPM Reset, time is moved on by TPM2_ClockSet (forward only, which needs the owner's
authorisation: it can end a lease early, never prolong it). tpm2-tools are the other witness of what the TPM counts.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.attestation.policy import policy_ref
from oci_hook.errors import BootPolicyRefused, DeviceInvalid, DeviceNotEnrolled, KeyRefused, Revoked
from oci_hook.key_errors import LeaseExpired
from oci_hook.lease import Lease
from oci_hook.owner.keyring import Keyring
from tests.integration import test_attestation as attestation
from tests.integration.test_attestation import CLASS, GRUB, MODEL, SECRET, Host, Sealing, approve, seal, wrapped

HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return attestation._keyring(tmp_path_factory.mktemp("owner") / "keys", "acme")


@pytest.fixture(scope="module")
def machine(keyring: Keyring) -> Iterator[Host]:
    with attestation._machine() as machine:
        machine.provision(keyring.owner.owner_id)
        yield machine


@pytest.fixture
def host(machine: Host) -> Iterator[Host]:
    """Freshly booted; nothing may be left in its TPM after any test."""
    machine.boot()
    yield machine
    assert machine.handles() == []


def counted(host: Host) -> tuple[int, int, bool]:
    """Resets, clock in milliseconds and its `safe` flag, by tpm2-tools."""
    said = host.tool("tpm2_readclock").stdout
    number = {name: int(value) for name, value in re.findall(r"(clock|reset_count):\s*(\d+)", said)}
    return number["reset_count"], number["clock"], "safe: yes" in said


def leased(host: Host, keyring: Keyring, lease: Lease | None) -> Sealing:
    sealing = seal(host, keyring)
    return replace(sealing, blob=wrapped(host, keyring, sealing.maximum, lease=lease), lease=lease)


def forward(host: Host, milliseconds: int) -> None:
    _, clock, _ = counted(host)
    host.tool("tpm2_setclock", str(clock + milliseconds))


def test_a_lease_of_boots_ends_with_the_boot_after_the_last(host: Host, keyring: Keyring) -> None:
    resets, _, _ = counted(host)
    sealing = leased(host, keyring, Lease(resets=resets + 2))
    for boots in range(3):
        assert counted(host)[0] == resets + boots
        assert sealing.open() == SECRET
        host.boot()
    for _ in range(2):
        with host.refused(LeaseExpired, "boots"):
            sealing.open()
        host.boot()


def test_a_boot_without_a_shutdown_counts_too(host: Host, keyring: Keyring) -> None:
    """Power cut: the clock may go back to what the TPM had saved, the count of resets goes up."""
    resets, _, _ = counted(host)
    sealing = leased(host, keyring, Lease(resets=resets))
    assert sealing.open() == SECRET
    host.tpm.stop()
    host.tpm.start()
    host.tpm.measure_boot()
    assert counted(host)[0] == resets + 1
    with host.refused(LeaseExpired):
        sealing.open()


def test_a_lease_of_time_ends_with_the_time_and_not_with_a_boot(host: Host, keyring: Keyring) -> None:
    _, clock, _ = counted(host)
    sealing = leased(host, keyring, Lease(clock_ms=clock + HOUR_MS))
    host.boot()
    assert sealing.open() == SECRET
    forward(host, HOUR_MS)
    with host.refused(LeaseExpired, "powered-on time"):
        sealing.open()
    host.boot()
    with host.refused(LeaseExpired):  # an orderly shutdown saves the clock
        sealing.open()
    assert host.tool("tpm2_setclock", str(clock), check=False).returncode != 0  # it cannot be set back
    assert counted(host)[1] > clock + HOUR_MS


def test_the_clock_runs_by_itself(host: Host, keyring: Keyring) -> None:
    _, clock, _ = counted(host)
    sealing = leased(host, keyring, Lease(clock_ms=clock + 1500))
    assert sealing.open() == SECRET
    while counted(host)[1] <= clock + 1500:
        time.sleep(0.05)
    with host.refused(LeaseExpired):
        sealing.open()


@pytest.mark.parametrize("over", ["boots", "time"])
def test_of_two_bounds_each_one_holds(host: Host, keyring: Keyring, over: str) -> None:
    resets, clock, _ = counted(host)
    sealing = leased(host, keyring, Lease(resets, clock + HOUR_MS))
    assert sealing.open() == SECRET
    if over == "boots":
        host.boot()
    else:
        forward(host, HOUR_MS)
    with host.refused(LeaseExpired):
        sealing.open()


def test_a_lease_cannot_be_left_out_or_stretched(host: Host, keyring: Keyring) -> None:
    """Who edits the hook asks the TPM for another policy than the object is sealed to."""
    resets, clock, _ = counted(host)
    lease = Lease(resets, clock + HOUR_MS)
    sealing = leased(host, keyring, lease)
    assert sealing.open() == SECRET
    stretched = (
        None,
        Lease(resets=resets),
        Lease(clock_ms=clock + HOUR_MS),
        Lease(resets + 1, clock + HOUR_MS),
        Lease(resets, clock + HOUR_MS + 1),
        Lease((1 << 32) - 1, (1 << 64) - 1),
    )
    for other in stretched:
        with host.refused(KeyRefused):
            replace(sealing, lease=other).open()
    without = leased(host, keyring, None)
    with host.refused(KeyRefused):
        replace(without, lease=lease).open()


def test_a_revoked_grant_says_so_whatever_its_lease(host: Host, keyring: Keyring) -> None:
    resets, _, _ = counted(host)
    sealing = leased(host, keyring, Lease(resets=resets))
    host.boot()
    with host.transaction() as tpm:
        tpm.increment_counter(host.counter(keyring).index)
    with host.refused(Revoked):
        sealing.open()


def test_a_power_cut_can_set_the_clock_back_but_not_the_count_of_boots(host: Host, keyring: Keyring) -> None:
    """Why a lease of time alone does not bound a thief who cuts the power again and again."""
    resets, clock, _ = counted(host)
    hours = leased(host, keyring, Lease(clock_ms=clock + HOUR_MS))
    both = leased(host, keyring, Lease(resets, clock + HOUR_MS))
    os.kill(host.tpm.pid, signal.SIGKILL)
    host.tpm.stop()
    host.tpm.start()
    host.tpm.measure_boot()
    now, _, safe = counted(host)
    assert now == resets + 1
    assert not safe  # the TPM says itself that its clock may have been higher before
    assert hours.open() == SECRET
    with host.refused(LeaseExpired, "boots"):
        both.open()


def test_an_epoch_withdraws_what_was_signed_before(host: Host, keyring: Keyring) -> None:
    sealing = seal(host, keyring)
    old = sealing.form
    sealed = wrapped(host, keyring, sealing.maximum, epoch=1)
    renewed = replace(sealing, blob=sealed, reference=policy_ref(MODEL, CLASS, 1))
    with host.refused(BootPolicyRefused):  # the very same state, signed in the epoch before
        renewed.open()
    new = approve(keyring, host.pcrs(GRUB), epoch=1)
    assert new.policy_ref == renewed.reference
    assert new.forms[0].policy == old.policy
    assert replace(renewed, form=new.forms[0]).open() == SECRET
    with host.refused(BootPolicyRefused):  # and the new signature opens no grant of the epoch before
        replace(sealing, form=new.forms[0]).open()
    with host.refused(KeyRefused):
        replace(renewed, form=old, reference=policy_ref(MODEL, CLASS)).open()


# --- counting an owner's counter up -----------------------------------------------------------------------------------


def test_a_counter_is_counted_up_and_no_further(host: Host, keyring: Keyring) -> None:
    counter, value = host.counter(keyring), host.count(keyring)
    with host.transaction() as tpm:
        for asked, reached in ((value - 1, value), (value, value), (value + 3, value + 3), (value + 1, value + 3)):
            assert tpm.raise_counter(counter, asked) == reached
        assert tpm.counter_if_any(counter.index) == value + 3
    with host.refused(DeviceInvalid, "more than 1024"), host.transaction() as tpm:
        tpm.raise_counter(counter, value + 3 + 1025)
    assert host.count(keyring) == value + 3  # too far is seen before the first step


def test_another_index_in_the_counter_s_place_is_not_counted(host: Host, tmp_path: Path) -> None:
    keyring = attestation._keyring(tmp_path / "keys", "brief")
    host.provision(keyring.owner.owner_id)
    assert host.device.counter_values[keyring.owner.owner_id] == host.count(keyring)
    counter = host.counter(keyring)
    host.tool("tpm2_nvundefine", "-C", "o", hex(counter.index))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.raise_counter(counter, 1 << 40)
    with host.transaction() as tpm:
        assert tpm.counter_if_any(counter.index) is None
    host.tool("tpm2_nvdefine", hex(counter.index), "-C", "o", "-s", "8", "-a", "nt=counter|authread|authwrite")
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.raise_counter(counter, 1 << 40)
    with host.transaction() as tpm:
        assert tpm.counter_if_any(counter.index) is None  # never written
    host.tool("tpm2_nvundefine", "-C", "o", hex(counter.index))
