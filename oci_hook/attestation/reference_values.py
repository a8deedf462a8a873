"""Reference values of a measured boot: the programs, keys and command lines that a log proves, by their roles.

Pure. A value is here only if it is an event's digest, or if that digest was computed anew from it; names of files are
claims beside a digest. Whether the log itself is true is for a quote to say (`explanation`).
Sources: TCG PC Client Platform Firmware Profile 1.06, 3.3.4; shim's and GRUB's documentation; systemd-stub(7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from oci_hook.attestation.event_log import Event, EventLog
from oci_hook.attestation.event_words import (
    COMMAND_LINE_PREFIXES,
    EV_EFI_BOOT_SERVICES_APPLICATION,
    EV_EFI_VARIABLE_AUTHORITY,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_IPL,
    Proof,
    event_text,
    image_path,
    measured_text,
    parse_variable,
    prove,
    section_name,
)

LOADER_PCR: Final = 4
SECURE_BOOT_PCR: Final = 7
COMMANDS_PCR: Final = 8
FILES_PCR: Final = 9
UNIFIED_PCR: Final = 11
OVERRIDE_PCR: Final = 12
_KEYS: Final = ("PK", "KEK", "db", "dbx")


@dataclass(frozen=True, slots=True)
class BootChain:
    """The programs of a boot in the order in which they ran; each by every event that measured it.

    Attributes:
        loaders: Shim and boot loader, or the one of them.
        unified: The unified kernel image; empty: none ran.
        kernel: The kernel as firmware or shim loaded it; empty: no event in PCR 4 is its.
        sections: The events of the unified image's sections, names and contents in turn.
    """

    loaders: tuple[tuple[Event, ...], ...]
    unified: tuple[Event, ...]
    kernel: tuple[Event, ...]
    sections: tuple[Event, ...]


def boot_chain(log: EventLog) -> BootChain:
    """Tell the programs in PCR 4 apart, by what was measured between them: no event says what its program is.

    Raises:
        EventLogInvalid: The log has no SHA-256 digests.
    """
    programs = [e for e in log.events if e.pcr == LOADER_PCR and e.kind == EV_EFI_BOOT_SERVICES_APPLICATION]
    sections = tuple(e for e in log.events if e.pcr == UNIFIED_PCR and section_name(e) is not None)
    by_grub = [e.number for e in log.events if e.pcr == COMMANDS_PCR and measured_text(e) is not None]
    before: list[Event]
    unified: list[Event] = []
    if sections:
        before = [e for e in programs if e.number < sections[0].number]
        after = [e for e in programs if e.number > sections[-1].number]
        before, unified = before[:-1], before[-1:]
        unified = [e for e in programs if unified and e.digest == unified[0].digest]
        before = [e for e in before if not unified or e.digest != unified[0].digest]
    elif by_grub:
        before = [e for e in programs if e.number < by_grub[0]]
        after = [e for e in programs if e.number > by_grub[0]]
    else:
        before, after = (programs[:-1], programs[-1:]) if len(programs) > 1 else (programs, [])
    loaders: dict[bytes, list[Event]] = {}
    for event in before:
        loaders.setdefault(event.digest, []).append(event)
    kernel = tuple(e for e in after if e.digest == after[-1].digest)
    return BootChain(tuple(map(tuple, loaders.values())), tuple(unified), kernel, sections)


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """What a log proves of a boot; digests are SHA-256 in hexadecimal, programs' are Authenticode's.

    Attributes:
        secure_boot: Whether it was on; None: the log does not prove it.
        keys: Digest of the value of each variable of Secure Boot: PK, KEK, db, dbx.
        authorities: What vouched for a program that ran: "variable: digest of the certificate or key".
        sbat_level: The lowest generations that shim accepts; None: no shim that measures it.
        boot_loaders: (path as claimed, digest), in the order in which they ran.
        unified_image: (path as claimed, digest) of the unified kernel image; None: none ran.
        kernel: Digest of the kernel in PCR 4; None: nothing in that PCR is the kernel's.
        sections: Digest of the contents of each measured section of the unified kernel image.
        command_lines: As GRUB or systemd-boot measured them, proven; without those inside a unified kernel image.
        files: (name as claimed, digest) of what GRUB read: configuration, kernel, initial RAM disk.
    """

    secure_boot: bool | None
    keys: Mapping[str, str]
    authorities: tuple[str, ...]
    sbat_level: str | None
    boot_loaders: tuple[tuple[str, str], ...]
    unified_image: tuple[str, str] | None
    kernel: str | None
    sections: Mapping[str, str]
    command_lines: tuple[str, ...]
    files: tuple[tuple[str, str], ...]


def reference_values(log: EventLog) -> ReferenceValues:
    """Read the reference values off a log.

    Raises:
        EventLogInvalid: The log has no SHA-256 digests.
    """
    chain = boot_chain(log)
    variables: dict[str, bytes] = {}
    authorities: list[str] = []
    sbat_level = None
    for event in log.events:
        proven = event.pcr == SECURE_BOOT_PCR and prove(event) is Proof.DATA
        variable = parse_variable(event.data) if proven else None
        if variable is None:
            continue
        if event.kind == EV_EFI_VARIABLE_DRIVER_CONFIG:
            variables.setdefault(variable.name, variable.value)
        elif event.kind == EV_EFI_VARIABLE_AUTHORITY and variable.name == "SbatLevel":
            sbat_level = variable.value.decode("utf-8", "replace").rstrip("\0")
        elif event.kind == EV_EFI_VARIABLE_AUTHORITY:
            authorities.append(f"{variable.name}: {hashlib.sha256(variable.value).hexdigest()}")
    secure = variables.get("SecureBoot")
    return ReferenceValues(
        secure_boot=None if secure is None else secure == b"\x01",
        keys={name: hashlib.sha256(variables[name]).hexdigest() for name in _KEYS if name in variables},
        authorities=tuple(authorities),
        sbat_level=sbat_level,
        boot_loaders=tuple((image_path(each[0].data), each[0].digest.hex()) for each in chain.loaders),
        unified_image=(image_path(chain.unified[0].data), chain.unified[0].digest.hex()) if chain.unified else None,
        kernel=chain.kernel[0].digest.hex() if chain.kernel else None,
        sections={name: digest.hex() for name, digest in section_digests(chain).items()},
        command_lines=tuple(dict.fromkeys(_command_lines(log))),
        files=tuple(
            (event_text(event.data) or "", event.digest.hex())
            for event in log.events
            if event.pcr == FILES_PCR and event.is_measured and event.kind == EV_IPL
        ),
    )


def section_digests(chain: BootChain) -> dict[str, bytes]:
    """Digest of each section of the unified image that ran: the event after the one whose digest is its name's."""
    return {
        section_name(name) or "": contents.digest
        for name, contents in zip(chain.sections[::2], chain.sections[1::2], strict=False)
        if prove(name) is Proof.NAME and section_name(contents) == section_name(name)
    }


def _command_lines(log: EventLog) -> list[str]:
    found = []
    for event in log.events:
        if event.pcr == COMMANDS_PCR and event.data.startswith(COMMAND_LINE_PREFIXES) and prove(event) is Proof.TEXT:
            found.append((measured_text(event) or b"").decode("utf-8", "replace"))
        elif event.pcr in (COMMANDS_PCR, OVERRIDE_PCR) and event.kind == EV_IPL and prove(event) is Proof.DATA:
            found.append(event_text(event.data) or "")
    return found
