"""Measured boots of shim, GRUB and kernel with Secure Boot, and of systemd-boot: their logs, and their next boots.

QEMU without KVM, swtpm as the TPM; firmware, boot loaders and kernel are Debian's own, with the signatures that Debian
and Microsoft gave them. Each chain boots twice, with another command line and another initial RAM disk the second time,
and the first boot's log has to predict what the TPM has after the second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.attestation.boot_draft import Draft
from oci_hook.attestation.event_log import SHA1, SHA256, EventLog, parse_event_log, replay
from oci_hook.attestation.explanation import explain_values
from oci_hook.attestation.prediction import predict
from oci_hook.attestation.reference_values import reference_values
from tests.boot_disks import Disk, DiskGuest, fetch_loaders, write_shim_and_grub, write_systemd_boot, write_teller
from tests.guest_image import COMMAND_LINE, told, told_pcrs
from tests.guests import Kernel, Machine
from tests.software_tpm import SoftwareTpm

BY_LINUX = 10
SHA384 = 0x000C
#: Of the TPM that systemd-boot measures into; the other chain's has SHA-256 alone.
BANKS = "sha1,sha256,sha384"
OTHER = COMMAND_LINE.replace("loglevel=1", "loglevel=2")


@dataclass(frozen=True, slots=True)
class Boot:
    """A boot that ended: what was on its disk, the log that Linux was handed, and the TPM's values."""

    disk: Path
    initramfs: Path
    log: EventLog
    pcrs: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Boots:
    """The two boots of both chains."""

    grub: tuple[Boot, Boot]
    systemd: tuple[Boot, Boot]


@pytest.fixture(scope="module")
def boots(kernel: Kernel) -> Iterator[Boots]:
    folder = Path(tempfile.mkdtemp(prefix="scz-boots.", dir="/var/tmp"))
    try:
        loaders = fetch_loaders(folder / "loaders")
        first, second = write_teller(folder / "first", kernel), write_teller(folder / "second", kernel)
        with second.open("ab") as file:
            file.write(bytes(512))  # which the kernel skips
        one = SoftwareTpm(folder / "tpm", certified=False)
        with one, SoftwareTpm(folder / "tpm-3", certified=False, banks=BANKS) as three:

            def boot(disk: Path, initramfs: Path, *, secure_boot: bool) -> Boot:
                with (one if secure_boot else three).lent() as control:
                    machine = Machine(kernel, initramfs, memory_mib=512, firmware=True, tpm=control)
                    with DiskGuest(machine, Disk(disk, secure_boot)) as guest:
                        lines = guest.finish()
                return Boot(disk, initramfs, parse_event_log(told(lines, "log")), told_pcrs(lines))

            grub, systemd = [], []
            for number, (initramfs, words) in enumerate(((first, COMMAND_LINE), (second, OTHER))):
                disk = write_shim_and_grub(folder / f"grub-{number}", loaders, kernel, initramfs, words)
                grub.append(boot(disk, initramfs, secure_boot=True))
                disk = write_systemd_boot(folder / f"systemd-{number}", kernel, initramfs, words)
                systemd.append(boot(disk, initramfs, secure_boot=False))
            yield Boots((grub[0], grub[1]), (systemd[0], systemd[1]))
    finally:
        shutil.rmtree(folder)


def without_linux(values: dict[int, bytes]) -> dict[int, bytes]:
    """The PCRs that anything was measured into before Linux ran: IMA's first entry is in no firmware's log."""
    return {pcr: value for pcr, value in values.items() if any(value) and pcr != BY_LINUX}


def test_the_logs_lead_to_what_the_tpm_has(boots: Boots) -> None:
    for boot in (*boots.grub, *boots.systemd):
        assert without_linux(replay(boot.log)) == without_linux(boot.pcrs)
        told_of = explain_values(boot.log, without_linux(boot.pcrs))
        assert all(each.is_explained for each in told_of), [each.words for each in told_of]


def test_a_log_has_a_digest_for_each_bank_of_its_tpm(boots: Boots) -> None:
    assert [boot.log.algorithms for boot in boots.grub] == [(SHA256,)] * 2
    assert [set(boot.log.algorithms) for boot in boots.systemd] == [{SHA1, SHA256, SHA384}] * 2


def test_shim_and_grub_are_told_as_what_they_are(boots: Boots) -> None:
    values = reference_values(boots.grub[0].log)
    assert values.secure_boot is True
    assert (values.sbat_level or "").startswith("sbat,1,")
    assert [path for path, _digest in values.boot_loaders] == ["\\EFI\\BOOT\\BOOTX64.EFI", "\\EFI\\BOOT\\grubx64.efi"]
    assert values.authorities
    (line,) = values.command_lines
    assert line.endswith(f" root=/dev/vda1 ro {COMMAND_LINE}")
    assert {4, 7, 8, 9, 14} <= set(without_linux(boots.grub[0].pcrs))


def test_systemd_boot_is_told_as_what_it_is(boots: Boots) -> None:
    values = reference_values(boots.systemd[0].log)
    assert values.secure_boot is False
    assert [path for path, _digest in values.boot_loaders] == ["\\EFI\\BOOT\\BOOTX64.EFI"]
    assert values.kernel == reference_values(boots.grub[0].log).kernel
    assert any(COMMAND_LINE in line for line in values.command_lines)


def test_the_next_boot_by_grub_has_the_predicted_values(boots: Boots) -> None:
    first, second = boots.grub
    draft = Draft(first.log)
    draft.replace_text("loglevel=1", "loglevel=2")
    draft.replace_initrd(second.initramfs.read_bytes())
    configuration, *again = [  # one event in Debian 12, more in 13
        event for event in first.log.events if event.data.endswith(b"/EFI/debian/grub.cfg\0") and event.pcr == 9
    ]
    for event in (configuration, *again):
        draft.replace_event(event.number, (second.disk / "EFI/debian/grub.cfg").read_bytes())
    predicted = predict(draft, first.pcrs)
    assert (predicted.changed, predicted.unknown) == ((8, 9), {})
    assert without_linux(dict(predicted.pcrs)) == without_linux(second.pcrs)
    assert second.pcrs[8] != first.pcrs[8]


def test_the_next_boot_by_systemd_boot_has_the_predicted_values(boots: Boots) -> None:
    first, second = boots.systemd
    draft = Draft(first.log)
    (line,) = reference_values(first.log).command_lines
    draft.replace_command_line(line.replace("loglevel=1", "loglevel=2"))
    draft.replace_initrd(second.initramfs.read_bytes())
    predicted = predict(draft, first.pcrs)
    assert (predicted.changed, predicted.unknown) == ((9, 12), {})
    assert without_linux(dict(predicted.pcrs)) == without_linux(second.pcrs)
    assert second.pcrs[12] != first.pcrs[12]
