"""Disks with Debian's boot loaders, which the firmware of a small virtual machine starts and a software TPM measures.

Two chains: shim, GRUB and kernel as Debian signs them, and systemd-boot with the same kernel. A disk is a folder that
QEMU shows as a FAT file system (vvfat). With Secure Boot, firmware is OVMF's build with Microsoft's keys enrolled, of
which the variables are behind System Management Mode.

Needs ovmf and systemd-boot-efi; shim-signed and grub-efi-amd64-signed are downloaded and unpacked, not installed.
Specification: UEFI 2.10, 3.5.1.1 (removable media); the shim's README.tpm; GRUB manual, "Measured Boot".
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.guest_image import COMMAND_LINE, STUB, TELL_THE_BOOT
from tests.guests import Guest, Kernel, Machine, fetch_packages, write_initramfs

PACKAGES = ("shim-signed", "grub-efi-amd64-signed")
_SECURE = (Path("/usr/share/OVMF/OVMF_CODE_4M.ms.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd"))
# The entry spells its command line with a variable, as the distributions' configurations do.
_GRUB = """set timeout=0
set default=0
set place=/dev/vda1
if [ -e /missing ]; then set default=1; fi
menuentry 'Debian GNU/Linux' --class debian {{
    echo 'Loading Linux {release} ...'
    linux /vmlinuz-{release} root=$place ro {words}
    echo 'Loading initial ramdisk ...'
    initrd /initrd.img-{release}
}}
"""
_ENTRY = """title Debian GNU/Linux
linux /vmlinuz-{release}
initrd /initrd.img-{release}
options root=/dev/vda1 ro {words}
"""


def write_shim_and_grub(
    folder: Path, loaders: Path, kernel: Kernel, initramfs: Path, words: str = COMMAND_LINE
) -> Path:
    """Write a disk from which shim starts GRUB, and GRUB the kernel.

    Args:
        folder: A new folder.
        loaders: Where `PACKAGES` are unpacked.
        kernel: The kernel.
        initramfs: Its initial RAM disk.
        words: Its command line, behind the root.

    Returns:
        `folder`.
    """
    _write_kernel(folder, kernel, initramfs)
    shutil.copy(loaders / "usr/lib/shim/shimx64.efi.signed", folder / "EFI/BOOT/BOOTX64.EFI")
    shutil.copy(loaders / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", folder / "EFI/BOOT/grubx64.efi")
    (folder / "EFI/debian").mkdir()  # where Debian's GRUB looks, wherever it was started from
    (folder / "EFI/debian/grub.cfg").write_text(_GRUB.format(release=kernel.release, words=words))
    return folder


def write_systemd_boot(folder: Path, kernel: Kernel, initramfs: Path, words: str = COMMAND_LINE) -> Path:
    """Write a disk from which systemd-boot starts the kernel; arguments as of `write_shim_and_grub`."""
    _write_kernel(folder, kernel, initramfs)
    shutil.copy(STUB.with_name("systemd-bootx64.efi"), folder / "EFI/BOOT/BOOTX64.EFI")
    (folder / "loader/entries").mkdir(parents=True)
    (folder / "loader/loader.conf").write_text("timeout 0\n")
    (folder / "loader/entries/debian.conf").write_text(_ENTRY.format(release=kernel.release, words=words))
    return folder


def _write_kernel(folder: Path, kernel: Kernel, initramfs: Path) -> None:
    (folder / "EFI/BOOT").mkdir(parents=True)
    shutil.copy(kernel.image, folder / f"vmlinuz-{kernel.release}")
    shutil.copy(initramfs, folder / f"initrd.img-{kernel.release}")


def write_teller(path: Path, kernel: Kernel) -> Path:
    """Write an initramfs that says on the console what was measured, and ends.

    Args:
        path: The file to write; a folder beside it is used.
        kernel: The kernel that it is for.
    """
    folder = path.with_suffix(".root")
    folder.mkdir()
    (folder / "main").write_text(f"#!/bin/sh\necho\n{TELL_THE_BOOT}")
    (folder / "main").chmod(0o755)
    return write_initramfs(path, folder, kernel, modules=())


def fetch_loaders(folder: Path) -> Path:
    """Shim and GRUB as Debian signs them, unpacked into a new folder."""
    return fetch_packages(folder, *PACKAGES)


@dataclass(frozen=True, slots=True)
class Disk:
    """What firmware starts from.

    Attributes:
        folder: The files.
        secure_boot: Whether firmware asks for signatures.
    """

    folder: Path
    secure_boot: bool


class DiskGuest(Guest):
    """A guest that firmware starts from a disk; the harness's own kernel and ramdisk are left out.

    Args:
        machine: As for `Guest`, with `firmware`; its initramfs is not used.
        disk: What it starts from.
    """

    def __init__(self, machine: Machine, disk: Disk) -> None:
        super().__init__(machine)
        self._disk = disk

    def _command(self, place: Path) -> list[str]:
        words = super()._command(place)
        for option in ("-kernel", "-initrd", "-append"):
            where = words.index(option)
            del words[where : where + 2]
        if self._disk.secure_boot:
            code, variables = _SECURE
            shutil.copy(variables, place / "variables")
            words = [word.rpartition("=")[0] + f"={code}" if "unit=0" in word else word for word in words]
            words[words.index("-machine") + 1] += ",smm=on"
            words += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
            words += ["-global", "ICH9-LPC.disable_s3=1"]
        words += ["-drive", f"if=none,id=disk,format=raw,readonly=on,file=fat:{self._disk.folder}"]
        return [*words, "-device", "virtio-blk-pci,drive=disk,bootindex=1"]
