"""An event of a measured boot in words, and how much of what it says is proven.

Pure. The TPM vouches for an event's digest alone. So each event's data is believed only where the digest is computed
anew from it; what merely stands beside a digest (a file's name beside the file's digest) is said to be a claim.
Sources: TCG PC Client Platform Firmware Profile 1.06, 10.4.1 (event types, and what their digests are of); GRUB's
manual, "Measured Boot"; systemd-stub(7); UAPI, "Linux TPM PCR registry"; UEFI 2.10, 3.1.3 and 10.3 (device paths).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.event_log import SHA256, Event

EV_SEPARATOR: Final = 0x4
EV_EVENT_TAG: Final = 0x6
EV_IPL: Final = 0xD
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_BOOT_SERVICES_APPLICATION: Final = 0x80000003
EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0
IMAGES: Final = frozenset({EV_EFI_BOOT_SERVICES_APPLICATION, 0x80000004, 0x80000005})  # digests are Authenticode's
VARIABLES: Final = frozenset({EV_EFI_VARIABLE_DRIVER_CONFIG, 0x80000002, 0x8000000C, EV_EFI_VARIABLE_AUTHORITY})

# Type: its name in the standard, in words, and what its digest is of, as the standard or its writer says.
EVENT_TYPES: Final = {
    0x0: ("EV_PREBOOT_CERT", "certificate", "nothing"),
    0x1: ("EV_POST_CODE", "firmware code", "the code"),
    0x3: ("EV_NO_ACTION", "note, measured nowhere", "nothing"),
    EV_SEPARATOR: ("EV_SEPARATOR", "end of a stage", "the data"),
    0x5: ("EV_ACTION", "action", "the data"),
    EV_EVENT_TAG: ("EV_EVENT_TAG", "tagged measurement", "the data, or what the tag names"),
    0x7: ("EV_S_CRTM_CONTENTS", "root of trust's code", "the code"),
    0x8: ("EV_S_CRTM_VERSION", "root of trust's version", "the data"),
    0x9: ("EV_CPU_MICROCODE", "microcode", "the code"),
    0xA: ("EV_PLATFORM_CONFIG_FLAGS", "platform settings", "the data"),
    0xB: ("EV_TABLE_OF_DEVICES", "table of devices", "the data"),
    0xC: ("EV_COMPACT_HASH", "value of the firmware's", "something else"),
    EV_IPL: ("EV_IPL", "boot loader's measurement", "the data, a text in it, or a file that it names"),
    0xE: ("EV_IPL_PARTITION_DATA", "partition data", "the data"),
    0xF: ("EV_NONHOST_CODE", "code of another processor", "the code"),
    0x10: ("EV_NONHOST_CONFIG", "settings of another processor", "the settings"),
    0x11: ("EV_NONHOST_INFO", "other processors", "the data"),
    0x12: ("EV_OMIT_BOOT_DEVICE_EVENTS", "boot devices omitted", "the data"),
    EV_EFI_VARIABLE_DRIVER_CONFIG: ("EV_EFI_VARIABLE_DRIVER_CONFIG", "variable of secure boot", "the data"),
    0x80000002: ("EV_EFI_VARIABLE_BOOT", "boot variable", "the data, or the variable's value"),
    EV_EFI_BOOT_SERVICES_APPLICATION: ("EV_EFI_BOOT_SERVICES_APPLICATION", "boot program", "the image"),
    0x80000004: ("EV_EFI_BOOT_SERVICES_DRIVER", "firmware driver", "the image"),
    0x80000005: ("EV_EFI_RUNTIME_SERVICES_DRIVER", "firmware run-time driver", "the image"),
    0x80000006: ("EV_EFI_GPT_EVENT", "partition table", "the data"),
    0x80000007: ("EV_EFI_ACTION", "firmware action", "the data"),
    0x80000008: ("EV_EFI_PLATFORM_FIRMWARE_BLOB", "firmware volume", "the volume"),
    0x80000009: ("EV_EFI_HANDOFF_TABLES", "firmware tables", "the tables"),
    0x8000000A: ("EV_EFI_PLATFORM_FIRMWARE_BLOB2", "firmware volume", "the volume"),
    0x8000000B: ("EV_EFI_HANDOFF_TABLES2", "firmware tables", "the tables"),
    0x8000000C: ("EV_EFI_VARIABLE_BOOT2", "boot variable", "the variable's value"),
    0x8000000D: ("EV_EFI_GPT_EVENT2", "partition table", "the table"),
    0x80000010: ("EV_EFI_HCRTM_EVENT", "hardware root of trust", "the data"),
    EV_EFI_VARIABLE_AUTHORITY: ("EV_EFI_VARIABLE_AUTHORITY", "authority of a signed program", "the data"),
    0x800000E1: ("EV_EFI_SPDM_FIRMWARE_BLOB", "device's firmware", "the firmware"),
    0x800000E2: ("EV_EFI_SPDM_FIRMWARE_CONFIG", "device's settings", "the settings"),
    0x800000E3: ("EV_EFI_SPDM_DEVICE_POLICY", "device policy", "the data"),
    0x800000E4: ("EV_EFI_SPDM_DEVICE_AUTHORITY", "device's authority", "the data"),
}

COMMAND_PREFIXES: Final = (b"grub_cmd: ", b"grub_cmd ")
COMMAND_LINE_PREFIXES: Final = (b"kernel_cmdline: ", b"grub_kernel_cmdline ", b"module_cmdline: ")
_LOAD_OPTIONS_TAG: Final = 0x8F3B22ED  # Linux, drivers/firmware/efi/libstub
_INITRD_TAG: Final = 0x8F3B22EC
_TEXT_LIMIT: Final = 400


class Proof(enum.Enum):
    """What the digest was computed anew from; the value is for people. Only `NONE` leaves the data a claim."""

    DATA = "its data"
    DATA_WITHOUT_NUL = "its data without the closing NUL"
    TEXT = "the text in its data"
    NAME = "the name in its data"
    VALUE = "the variable's value"
    NONE = "nothing here: the digest is of something that the log does not hold"


@dataclass(frozen=True, slots=True)
class Variable:
    """A UEFI_VARIABLE_DATA (TCG, 10.4.2): the firmware's variable, its value as bytes."""

    vendor: bytes
    name: str
    value: bytes


def parse_variable(data: bytes) -> Variable | None:
    """The variable that an event's data holds; None if it holds none."""
    name_characters = int.from_bytes(data[16:24], "little")
    value_bytes = int.from_bytes(data[24:32], "little")
    end = 32 + 2 * name_characters
    if len(data) < 32 or end > len(data) or value_bytes != len(data) - end:
        return None
    return Variable(data[:16], data[32:end].decode("utf-16-le", "replace").rstrip("\0"), data[end:])


def event_text(data: bytes) -> str | None:
    """A text in UTF-16 or ASCII, without its closing NUL; None if it is none."""
    if len(data) >= 2 and len(data) % 2 == 0 and data[1::2].count(0) == len(data) // 2:
        data = data[::2]
    data = data.rstrip(b"\0")
    if not data or any(byte < 0x20 and byte not in b"\t\n\r" for byte in data):
        return None
    return data.decode("utf-8", "replace")


def measured_text(event: Event) -> bytes | None:
    """The bytes of GRUB's command or command line in an event's data, as GRUB hashes them; proven or not."""
    for prefix in COMMAND_PREFIXES + COMMAND_LINE_PREFIXES:
        if event.data.startswith(prefix):
            return event.data[len(prefix) :].rstrip(b"\0")
    return None


def section_name(event: Event) -> str | None:
    """The section of a unified kernel image that systemd-stub's event names; proven or not."""
    text = event_text(event.data) if event.kind == EV_IPL and event.pcr == 11 else None
    return text if text is not None and text.startswith(".") else None


def prove(event: Event) -> Proof:
    """What the digest of an event is recomputed from: the data is then as certain as the digest."""
    if SHA256 not in event.digests:
        return Proof.NONE
    for proof, candidate in _candidates(event):
        if hashlib.sha256(candidate).digest() == event.digest:
            return proof
    return Proof.NONE


def _candidates(event: Event) -> Iterator[tuple[Proof, bytes]]:
    data = event.data
    yield Proof.DATA, data
    if data.endswith(b"\0"):
        yield Proof.DATA_WITHOUT_NUL, data[:-1]
        yield Proof.DATA_WITHOUT_NUL, data[:-2]
    text = measured_text(event)
    if text is not None:
        yield Proof.TEXT, text
        yield Proof.TEXT, text + b"\0"
    section = section_name(event)
    if section is not None:
        yield Proof.NAME, section.encode() + b"\0"
    variable = parse_variable(data) if event.kind in VARIABLES else None
    if variable is not None:
        yield Proof.VALUE, variable.value


def type_name(kind: int) -> str:
    """The standard's name of an event type."""
    return EVENT_TYPES[kind][0] if kind in EVENT_TYPES else f"{kind:#x}"


def describe(event: Event) -> str:
    """One line about an event, for people: what was measured, and what of that is only said."""
    words = EVENT_TYPES[event.kind][1] if event.kind in EVENT_TYPES else "event of an unknown type"
    if event.kind in IMAGES:
        path = image_path(event.data)
        return f"{words} {path}" if path else words
    variable = parse_variable(event.data) if event.kind in VARIABLES else None
    if variable is not None:
        return f"{words}: {variable.name}, {len(variable.value)} bytes"
    section = section_name(event)
    if section is not None:
        part = "name of section" if prove(event) is Proof.NAME else "contents of section"
        return f"unified kernel image: {part} {section}"
    tagged = tag(event)
    text = tagged[1] if tagged is not None else event_text(event.data)
    return f"{words}: {text[:_TEXT_LIMIT]}" if text else words


def tag(event: Event) -> tuple[int, str] | None:
    """Id and text of a tagged event (TCG_PCClientTaggedEvent); None if it is none."""
    if event.kind != EV_EVENT_TAG or len(event.data) < 8:
        return None
    return int.from_bytes(event.data[:4], "little"), event_text(event.data[8:]) or ""


def is_linux_initrd(event: Event) -> bool:
    """Whether Linux says that it is the digest of the initial RAM disk, all of its parts together."""
    found = tag(event)
    return found is not None and found[0] == _INITRD_TAG


def is_linux_options(event: Event) -> bool:
    """Whether Linux says that it is the digest of its load options: the command line, in UTF-16."""
    found = tag(event)
    return found is not None and found[0] == _LOAD_OPTIONS_TAG


def image_path(data: bytes) -> str:
    """The file that an image's event names, by the last file path of its device path; empty if none. Never proven."""
    path, place = (
        "",
        32,
    )  # UEFI_IMAGE_LOAD_EVENT: address, length, link address, length of the path, 8 bytes each
    while place + 4 <= len(data):
        kind, size = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], "little")
        if size < 4 or kind == b"\x7f\xff":
            break
        if kind == b"\x04\x04":
            path = event_text(data[place + 4 : place + size]) or path
        place += size
    return path[:_TEXT_LIMIT]
