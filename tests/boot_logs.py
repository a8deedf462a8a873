"""A firmware that only measures: logs of the boots of unified kernel images, and changed copies of real logs.

What it writes, `tpm2_eventlog` reads and a TPM can be extended with. Specification: TCG PC Client Platform Firmware
Profile 1.06, chapter 10; systemd-stub(7); drivers/firmware/efi/libstub of Linux.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oci_hook.attestation.event_log import SHA256, Event, EventLog
from oci_hook.attestation.pe_image import authenticode_digest, parse_pe_image

_IMAGE, _VARIABLE, _SEPARATOR, _IPL, _TAG = 0x80000003, 0x80000001, 4, 0xD, 6
_BOOT_VARIABLE, _PARTITIONS = 0x80000002, 0x80000006
_GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")


def log_bytes(events: Iterable[Event]) -> bytes:
    """A crypto-agile log with the SHA-256 bank alone."""
    spec = b"Spec ID Event03\0" + bytes(4) + b"\0\x02\0\x02" + struct.pack("<IHHB", 1, SHA256, 32, 0)
    parts = [struct.pack("<II20sI", 0, 3, bytes(20), len(spec)), spec]
    for event in events:
        parts.append(struct.pack("<IIIH", event.pcr, event.kind, 1, SHA256) + event.digest)
        parts.append(struct.pack("<I", len(event.data)) + event.data)
    return b"".join(parts)


def measured_alone(log: EventLog) -> list[Event]:
    """The events of a log that were measured."""
    return [event for event in log.events if event.is_measured]


@dataclass
class Firmware:
    """Measures as a boot goes on; `bytes` is the log."""

    events: list[Event] = field(default_factory=list)

    def measure(self, pcr: int, kind: int, data: bytes, digest_of: bytes | None = None, digest: bytes = b"") -> None:
        """Log what is measured; its digest is of the data, of something else, or known."""
        digest = digest or hashlib.sha256(data if digest_of is None else digest_of).digest()
        self.events.append(Event(len(self.events) + 1, pcr, kind, {SHA256: digest}, data))

    def load(self, program: bytes, name: str = "") -> None:
        """A program for UEFI is loaded."""
        path = struct.pack("<BBH", 4, 4, 4 + 2 * len(name) + 2) + f"{name}\0".encode("utf-16-le") if name else b""
        data = struct.pack("<QQQQ", 0, len(program), 0, len(path)) + path
        self.measure(4, _IMAGE, data, digest=authenticode_digest(parse_pe_image(program)))

    def variable(self, name: str, value: bytes) -> None:
        """A variable of Secure Boot is read."""
        head = _GLOBAL + struct.pack("<QQ", len(name), len(value))
        self.measure(7, _VARIABLE, head + name.encode("utf-16-le") + value)

    @property
    def bytes(self) -> bytes:
        """The log."""
        return log_bytes(self.events)


def boot_unified(
    unified: bytes, sections: Mapping[str, bytes], *, loader: bytes, dbx: bytes = b"", extra: str = ""
) -> bytes:
    """The log of a boot: boot loader, unified image, its sections, its kernel, and what Linux itself measures.

    Args:
        unified: The image's file.
        sections: Its sections, in the stub's order; `.linux` is a program for UEFI.
        loader: The boot loader's file.
        dbx: The value of that variable.
        extra: A command line from outside, which takes the place of the image's.
    """
    firmware = Firmware()
    firmware.measure(0, 8, b"version 1\0")
    for name, value in (("SecureBoot", b"\1"), ("PK", b"pk"), ("KEK", b"kek"), ("db", b"db"), ("dbx", dbx)):
        firmware.variable(name, value)
    for pcr in range(8):
        firmware.measure(pcr, _SEPARATOR, bytes(4))
    firmware.load(loader, "\\EFI\\systemd\\systemd-bootx64.efi")
    firmware.load(unified, "\\EFI\\Linux\\image.efi")
    for name, contents in sections.items():
        text = f"{name}\0".encode("utf-16-le")
        firmware.measure(11, _IPL, text, digest_of=name.encode() + b"\0")
        firmware.measure(11, _IPL, text, digest_of=contents)
    if extra:
        firmware.measure(12, _IPL, f"{extra}\0".encode("utf-16-le"))
    firmware.load(sections[".linux"])
    options = extra or sections[".cmdline"].rstrip(b"\0").decode()
    tagged = struct.pack("<II", 0x8F3B22ED, 26) + b"LOADED_IMAGE::LoadOptions\0"
    firmware.measure(9, _TAG, tagged, digest_of=f"{options}\0".encode("utf-16-le"))
    tagged = struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0"
    firmware.measure(9, _TAG, tagged, digest_of=sections[".initrd"])
    return firmware.bytes


# --- boots that were measured, and forms that none of them has --------------------------------------------------------

#: The command line of the boots in `tests/fixtures/boots`, behind the root's; another boot's may be another.
KEPT_OPTIONS = "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr no_timer_check mitigations=off random.trust_cpu=on"
_BOOTS = Path(__file__).parent / "fixtures" / "boots"


def kept_boot(name: str) -> tuple[bytes, dict[int, bytes]]:
    """A log of `tests/fixtures/boots` and the values that the TPM had after it."""
    values = json.loads((_BOOTS / f"{name}.json").read_text())
    return (_BOOTS / f"{name}.bin").read_bytes(), {int(pcr): bytes.fromhex(value) for pcr, value in values.items()}


def part_of(log: EventLog, keep: Callable[[Event], bool]) -> bytes:
    """The events of a log that are to be kept, as a log."""
    return log_bytes(event for event in log.events if keep(event))


def older_form(log: EventLog) -> bytes:
    """The same measurements in the form of before TPM 2.0: SHA-1 alone (TCG EFI Platform 1.22, 7.2.1)."""
    parts = []
    for event in measured_alone(log):
        digest = hashlib.sha1(event.data, usedforsecurity=False).digest()
        parts.append(struct.pack("<II20sI", event.pcr, event.kind, digest, len(event.data)) + event.data)
    return b"".join(parts)


def started_from_locality(log: EventLog, number: int) -> bytes:
    """The same log, after a firmware that started the TPM from another locality and says so (TCG, 10.4.5.3)."""
    note = Event(1, 0, 3, {SHA256: bytes(32)}, b"StartupLocality\0" + bytes([number]))
    return log_bytes([note, *log.events])


def boot_by_older_grub(before: Iterable[Event], kernel: bytes, initrd: bytes, options: str) -> bytes:
    """A boot by GRUB with the words of its first patches for TPMs, which name kernel and RAM disk by fixed texts.

    Args:
        before: What shim and firmware measured; boot variables are measured with their names, as some firmware does. A
            partition table, of no partitions, is measured behind them.
        kernel: The kernel's file, a program for UEFI.
        initrd: The initial RAM disk.
        options: The command line, behind the kernel's path.
    """
    firmware = Firmware()
    for event in before:
        known = b"" if event.kind == _BOOT_VARIABLE else event.digest
        firmware.measure(event.pcr, event.kind, event.data, digest=known)
    firmware.measure(5, _PARTITIONS, b"EFI PART" + struct.pack("<II", 0x10000, 92) + bytes(76 + 8))
    for command in ("set timeout=0", "load_video", f"linux /vmlinuz {options}"):
        firmware.measure(8, _IPL, f"grub_cmd {command}\0".encode(), digest_of=command.encode())
    firmware.measure(9, _IPL, b"grub_linuxefi Kernel\0", digest_of=kernel)
    firmware.load(kernel)
    line = f"/vmlinuz {options}".encode()
    firmware.measure(8, _IPL, b"grub_kernel_cmdline " + line + b"\0", digest_of=line)
    firmware.measure(8, _IPL, b"grub_cmd initrd /initrd\0", digest_of=b"initrd /initrd")
    firmware.measure(9, _IPL, b"grub_linuxefi Initrd\0", digest_of=initrd)
    return firmware.bytes
