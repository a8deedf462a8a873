"""A program for UEFI as firmware and systemd-stub measure it: its Authenticode digest, and a unified image's sections.

Pure; every offset is checked, and sections that overlap are refused: two readers could see two programs in one file.
It verifies no signature: firmware and shim do.
Sources: Microsoft, "PE Format" and "Windows Authenticode Portable Executable Signature Format", "Calculating the PE
Image Hash"; TCG PC Client Platform Firmware Profile 1.06, 10.2.3; systemd-stub(7), systemd-measure(1).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from oci_hook.key_errors import EventLogInvalid

LIMIT_BYTES: Final = 1 << 30
_SECTIONS_LIMIT: Final = 96
_PADDING_LIMIT: Final = 64 << 20
_CERTIFICATE_TABLE: Final = 4

# The order in which systemd-stub measures (its "canonical order"), with the version that began to. `.pcrsig` never is.
STUB_SECTIONS: Final = (
    (".linux", 252),
    (".osrel", 252),
    (".cmdline", 252),
    (".initrd", 252),
    (".ucode", 256),
    (".splash", 252),
    (".dtb", 252),
    (".uname", 254),
    (".sbat", 254),
    (".pcrpkey", 252),
)
_SEVERAL_VARIANTS: Final = (".profile", ".dtbauto", ".hwids", ".efifw")
_OLDEST_STUB: Final = 252
_UNSURE_STUB: Final = 253  # between those whose order is known


@dataclass(frozen=True, slots=True)
class Section:
    """One section: where its bytes lie in the file, and how long it is in memory."""

    name: str
    memory_bytes: int
    start: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class PeImage:
    """An image as parsed.

    Attributes:
        data: The whole file.
        checksum: Offset of the optional header's CheckSum, which is not hashed.
        certificate_entry: Offset of the certificate table's directory entry, which is not hashed.
        certificate_bytes: Length of the certificate table, at the end of the file.
        header_bytes: SizeOfHeaders.
        sections: In the order of the section table.
    """

    data: bytes
    checksum: int
    certificate_entry: int
    certificate_bytes: int
    header_bytes: int
    sections: tuple[Section, ...]


def _number(data: bytes, place: int, size: int) -> int:
    if not 0 <= place <= len(data) - size:
        raise EventLogInvalid("the program for UEFI ends inside its headers")
    return int.from_bytes(data[place : place + size], "little")


def parse_pe_image(data: bytes) -> PeImage:
    """Parse a PE32 or PE32+ image.

    Args:
        data: The whole file, at most 1 GiB.

    Raises:
        EventLogInvalid: It is none, truncated, its sections overlap, or its certificates do not end it.
    """
    if len(data) > LIMIT_BYTES:
        raise EventLogInvalid(f"the program for UEFI is larger than {LIMIT_BYTES} bytes")
    start = _number(data, 0x3C, 4)
    if data[:2] != b"MZ" or data[start : start + 4] != b"PE\0\0":
        raise EventLogInvalid("it is no program for UEFI (PE image)", remedy="give the .efi file or the kernel")
    count, optional_bytes = _number(data, start + 6, 2), _number(data, start + 20, 2)
    optional = start + 24
    magic = _number(data, optional, 2)
    if magic not in (0x10B, 0x20B):
        raise EventLogInvalid("the program for UEFI is neither PE32 nor PE32+")
    directories = optional + (96 if magic == 0x10B else 112)
    if _number(data, directories - 4, 4) <= _CERTIFICATE_TABLE or optional + optional_bytes < directories + 40:
        raise EventLogInvalid("the program for UEFI has no entry for certificates")
    entry = directories + 8 * _CERTIFICATE_TABLE
    certificate, certificate_bytes = _number(data, entry, 4), _number(data, entry + 4, 4)
    if certificate_bytes and certificate + certificate_bytes != len(data):
        raise EventLogInvalid("the program for UEFI has bytes behind its certificates, or fewer than it says")
    header_bytes = _number(data, optional + 60, 4)
    table = optional + optional_bytes
    if not 0 < count <= _SECTIONS_LIMIT or not table + 40 * count <= header_bytes <= len(data) - certificate_bytes:
        raise EventLogInvalid("the program for UEFI has an impossible table of sections")
    sections = tuple(_section(data, table + 40 * number) for number in range(count))
    _verify_sections(sections, header_bytes, len(data) - certificate_bytes)
    return PeImage(data, optional + 64, entry, certificate_bytes, header_bytes, sections)


def _section(data: bytes, place: int) -> Section:
    name = data[place : place + 8].rstrip(b"\0").decode("ascii", "replace")
    memory, file = _number(data, place + 8, 4), _number(data, place + 16, 4)
    return Section(name, memory, _number(data, place + 20, 4), file)


def _verify_sections(sections: tuple[Section, ...], header_bytes: int, end: int) -> None:
    place = header_bytes
    for section in _in_file(sections):
        if section.start < place or section.start + section.file_bytes > end:
            raise EventLogInvalid("the program for UEFI has sections that overlap or lie outside of it")
        place = section.start + section.file_bytes


def _in_file(sections: tuple[Section, ...]) -> list[Section]:
    return sorted((section for section in sections if section.file_bytes), key=lambda section: section.start)


def authenticode_digest(image: PeImage) -> bytes:
    """What the firmware measures when it loads the image, and what Secure Boot's signatures are over: 32 bytes.

    As the firmware's own (EDK II) code does, the tail is counted from the sum of the hashed lengths.
    """
    hashed = hashlib.sha256(image.data[: image.checksum])
    hashed.update(image.data[image.checksum + 4 : image.certificate_entry])
    hashed.update(image.data[image.certificate_entry + 8 : image.header_bytes])
    total = image.header_bytes
    view = memoryview(image.data)
    for section in _in_file(image.sections):
        hashed.update(view[section.start : section.start + section.file_bytes])
        total += section.file_bytes
    hashed.update(view[total : len(image.data) - image.certificate_bytes])
    return hashed.digest()


def section_contents(image: PeImage, section: Section) -> bytes:
    """A section as it is in memory.

    Raises:
        EventLogInvalid: It is much longer in memory than in the file.
    """
    missing = section.memory_bytes - section.file_bytes
    if missing > _PADDING_LIMIT:
        raise EventLogInvalid(f"the section {section.name} is {missing} bytes longer in memory than in the file")
    return image.data[section.start : section.start + min(section.memory_bytes, section.file_bytes)] + bytes(
        max(0, missing)
    )


def stub_version(image: PeImage) -> int | None:
    """The version of systemd-stub in a unified kernel image; None: it has none."""
    for section in image.sections:
        if section.name == ".sdmagic":
            found = re.match(rb"#### LoaderInfo: systemd-stub (\d{1,4})\b", section_contents(image, section))
            return int(found[1]) if found else None
    return None


def unified_sections(image: PeImage) -> tuple[tuple[str, bytes], ...]:
    """Name and contents of what systemd-stub measures into PCR 11 of a unified kernel image, in its order.

    Raises:
        EventLogInvalid: It has no systemd-stub, one of a version whose order is not known, no kernel, a section twice,
            or several profiles or device trees among which the stub chooses at boot.
    """
    version = stub_version(image)
    if version is None or version < _OLDEST_STUB or version == _UNSURE_STUB:
        raise EventLogInvalid(
            "it is no unified kernel image with a systemd-stub that is known"
            + (f": its version is {version}" if version else ""),
            remedy="give an image made with systemd-stub 252, or 254 or later (ukify)",
        )
    named: dict[str, Section] = {}
    for section in image.sections:
        if section.name in _SEVERAL_VARIANTS:
            raise EventLogInvalid(f"the unified kernel image has {section.name}: the stub chooses at boot")
        if section.name in named:
            raise EventLogInvalid(f"the unified kernel image has the section {section.name!a} twice")
        named[section.name] = section
    if ".linux" not in named:
        raise EventLogInvalid("the unified kernel image has no kernel (.linux)")
    return tuple(
        (name, section_contents(image, named[name]))
        for name, since in STUB_SECTIONS
        if name in named and since <= version and named[name].memory_bytes
    )
