"""`cli.checks.kernel` and `cli.checks.tpm`: each way by which memory reaches a disk, from files that a test writes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from oci_hook.attestation.tpm_properties import TpmProperties, properties_of
from oci_hook.cli.checks.check import Check
from oci_hook.cli.checks.kernel import KernelState, check_clock, check_kernel, check_leaks, load_kernel_state
from oci_hook.cli.checks.tpm import check_openers, check_properties
from oci_hook.errors import SystemCallFailed
from oci_hook.linux.mounts import MemoryFilesystem

SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
WELL = {
    "proc/swaps": SWAPS,
    "proc/cmdline": "root=/dev/sda1 quiet",
    "proc/sys/kernel/core_pattern": "|/bin/false",
    "proc/sys/fs/suid_dumpable": "0",
    "proc/sys/kernel/yama/ptrace_scope": "1",
    "sys/kernel/kexec_crash_loaded": "0",
    "sys/power/state": "freeze mem",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [never] force",
}


def state(folder: Path, **changes: str) -> KernelState:
    """Of a kernel whose files say this; `__` in a name stands for a slash."""
    for name, text in {**WELL, **{name.replace("__", "/"): text for name, text in changes.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return load_kernel_state(str(folder))


def line(checks: list[Check], name: str) -> Check:
    (found,) = (check for check in checks if check.name == name)
    return found


def leak(folder: Path, name: str, **changes: str) -> Check:
    return line(list(check_leaks(state(folder, **changes))), name)


def test_a_kernel_that_keeps_memory_to_itself(tmp_path: Path) -> None:
    checks = list(check_leaks(state(tmp_path)))
    assert [check.name for check in checks] == [
        "swap",
        "kdump",
        "hibernation",
        "core dumps",
        "suid_dumpable",
        "ptrace",
    ]
    assert {check.status for check in checks} == {"ok"}


def test_a_kernel_that_says_nothing(tmp_path: Path) -> None:
    found = {check.name: check.status for check in check_leaks(load_kernel_state(str(tmp_path)))}
    assert found == {**dict.fromkeys(found, "ok"), "ptrace": "warn"}


def test_swap_is_encrypted_or_said(tmp_path: Path) -> None:
    areas = f"{SWAPS}/dev/dm-1 partition 1024 0 -2\n/swap\\040file file 1024 0 -3\n/dev/zram0 partition 1 0 5\n"
    found = leak(tmp_path, "swap", proc__swaps=areas)
    assert found.status == "warn"
    assert "swapoff /dev/dm-1 '/swap file'" in found.remedy
    assert "zram" not in found.message
    (tmp_path / "sys/class/block/dm-1/dm").mkdir(parents=True)
    (tmp_path / "sys/class/block/dm-1/dm/uuid").write_text("CRYPT-PLAIN-swap\n")
    found = leak(tmp_path, "swap", proc__swaps=f"{SWAPS}/dev/dm-1 partition 1024 0 -2\n")
    assert (found.status, "dm-crypt" in found.message) == ("ok", True)
    (tmp_path / "sys/class/block/dm-1/dm/uuid").write_text("LVM-x\n")
    assert leak(tmp_path, "swap", proc__swaps=f"{SWAPS}/dev/dm-1 partition 1024 0 -2\n").status == "warn"


def test_kdump_that_is_loaded_or_provided_for(tmp_path: Path) -> None:
    found = leak(tmp_path, "kdump", sys__kernel__kexec_crash_loaded="1\n")
    assert (found.status, "loaded" in found.message) == ("warn", True)
    found = leak(tmp_path, "kdump", proc__cmdline="quiet crashkernel=384M-:128M")
    assert (found.status, "crashkernel=384M-:128M" in found.message) == ("warn", True)


@pytest.mark.parametrize(
    ("power", "line_", "swaps", "status"),
    [
        ("freeze mem disk", "resume=/dev/sda2", "", "warn"),
        ("freeze mem disk", "quiet", "/dev/sda2 partition 1 0 -2\n", "warn"),
        ("freeze mem disk", "quiet", "", "ok"),
        ("freeze mem disk", "resume=/dev/sda2 nohibernate", "", "ok"),
        ("freeze mem disk", "resume=/dev/sda2 noresume", "", "ok"),
        ("freeze mem", "resume=/dev/sda2", "/dev/sda2 partition 1 0 -2\n", "ok"),
    ],
)
def test_hibernation(tmp_path: Path, power: str, line_: str, swaps: str, status: str) -> None:
    found = leak(tmp_path, "hibernation", sys__power__state=power, proc__cmdline=line_, proc__swaps=SWAPS + swaps)
    assert (found.status, bool(found.remedy)) == (status, status == "warn")


@pytest.mark.parametrize(
    ("pattern", "status", "word"),
    [
        ("core", "warn", "files named core"),
        ("/var/crash/%e", "warn", "/var/crash/%e"),
        ("|/lib/systemd/systemd-coredump %P", "warn", "systemd-coredump keeps them"),
        ("|/usr/share/apport/apport -p%p", "warn", "apport keeps them"),
        ("|/opt/x %p", "warn", "may keep them"),
        ("|", "warn", "may keep"),
        ("|/bin/false", "ok", "not kept"),
        ("| /usr/bin/false %p", "ok", "not kept"),
        ("", "ok", "writes none"),
    ],
)
def test_where_cores_go(tmp_path: Path, pattern: str, status: str, word: str) -> None:
    found = leak(tmp_path, "core dumps", proc__sys__kernel__core_pattern=pattern)
    assert (found.status, word in found.message) == (status, True), found.message
    assert ("kernel.core_pattern=|/bin/false" in found.remedy) == (status == "warn")


def test_a_collector_that_keeps_nothing(tmp_path: Path) -> None:
    pattern = "|/lib/systemd/systemd-coredump %P"

    def status() -> str:
        return leak(tmp_path, "core dumps", proc__sys__kernel__core_pattern=pattern).status

    conf = tmp_path / "etc/systemd/coredump.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[Coredump]\n#Storage=none\n")
    assert status() == "warn"
    conf.write_text("[Coredump]\nStorage=none\n")
    assert status() == "ok"
    (tmp_path / "etc/systemd/coredump.conf.d").mkdir()
    (tmp_path / "etc/systemd/coredump.conf.d/90.conf").write_text("[Coredump]\n Storage = external\n")
    assert status() == "warn"
    pattern = "|/opt/other"
    conf.write_text("[Coredump]\nStorage=none\n")
    assert status() == "warn"


def test_dumpable_and_ptrace(tmp_path: Path) -> None:
    assert leak(tmp_path, "suid_dumpable", proc__sys__fs__suid_dumpable="1").remedy == "sysctl fs.suid_dumpable=0"
    assert leak(tmp_path, "suid_dumpable", proc__sys__fs__suid_dumpable="2").status == "ok"
    assert "ptrace_scope=1" in leak(tmp_path, "ptrace", proc__sys__kernel__yama__ptrace_scope="0").remedy


def test_the_kernels_own_features(tmp_path: Path) -> None:
    well = dataclasses.replace(state(tmp_path), release="6.12.1", filesystem=MemoryFilesystem.TMPFS)
    assert [check.status for check in check_kernel(well)] == ["ok", "ok", "ok"]
    ramfs = dataclasses.replace(well, release="6.1.0-42", filesystem=MemoryFilesystem.RAMFS)
    assert "ramfs" in line(list(check_kernel(ramfs)), "plaintext").message
    for release in ("5.4.0", "5.13.1", "4.19", "?"):
        assert line(list(check_kernel(dataclasses.replace(well, release=release))), "kernel").status == "fail"
    refused = dataclasses.replace(well, filesystem=None, no_filesystem=SystemCallFailed("no fsopen"))
    assert line(list(check_kernel(refused)), "plaintext").message == "no fsopen"


def test_the_clock_is_asked_and_not_changed() -> None:
    (found,) = check_clock()
    assert (found.status, bool(found.remedy)) in (("ok", False), ("warn", True))


# --- the TPM's own words ----------------------------------------------------------------------------------------------

HARDWARE = TpmProperties("IFX", "SLB9670", "7.85.17.51968", False, 0, 32, 7200)


def test_properties_are_put_together() -> None:
    values = {0x105: 0x49424D00, 0x106: 0x53572020, 0x107: 0x2054504D, 0x10B: 0x20191023, 0x10C: 0x163636}
    found = properties_of({**values, 0x200: 0x200, 0x20E: 3, 0x20F: 3, 0x210: 1000})
    assert found == TpmProperties("IBM", "SW TPM", "8217.4131.22.13878", True, 3, 3, 1000)
    assert properties_of({}) == TpmProperties("", "", "0.0.0.0", False, 0, 0, 0)
    assert properties_of({0x105: 0x1B5B324A}).manufacturer == "[2J"  # what a terminal would obey is gone


def test_software_and_lockout_are_said() -> None:
    assert [check.status for check in check_properties(HARDWARE)] == ["ok", "ok"]
    kind, _ = check_properties(dataclasses.replace(HARDWARE, manufacturer="IBM"))
    assert (kind.status, "protects nothing" in kind.message) == ("warn", True)
    _, lockout = check_properties(dataclasses.replace(HARDWARE, in_lockout=True, lockout_counter=32))
    assert (lockout.status, "tpm2_dictionarylockout --clear-lockout" in lockout.remedy) == ("warn", True)
    _, lockout = check_properties(dataclasses.replace(HARDWARE, lockout_counter=2))
    assert (lockout.status, "2 of 32" in lockout.message) == ("warn", True)


@pytest.mark.parametrize(
    ("mode", "owner", "group", "word"),
    [
        (0o660, 0, 0, ""),
        (0o600, 0, 12345, ""),
        (0o666, 0, 0, "chmod o-rw"),
        (0o662, 0, 0, "chmod o-rw"),
        (0o660, 0, 12345, "chgrp tss"),
        (0o660, 1234567, 0, "chown root"),
    ],
)
def test_who_may_open_the_tpm(tmp_path: Path, mode: int, owner: int, group: int, word: str) -> None:
    path = tmp_path / "tpmrm0"
    path.touch()
    path.chmod(mode)
    os.chown(path, owner, group)
    (found,) = check_openers(str(tmp_path))
    assert (found.status, word in found.remedy) == ("warn" if word else "ok", True)
    assert list(check_openers(str(tmp_path / "absent"))) == []
