"""An event log in which some of what was measured is replaced: what a machine would measure at its next boot.

Pure. Nothing is guessed: a component is replaced where the log shows that the old one was measured, and a PCR of which
a replacement cannot be told is named. `prediction` makes PCR values of it.
Sources: as `reference_values`, and Linux's EFI stub (drivers/firmware/efi/libstub).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final

from oci_hook.attestation.event_log import Event, EventLog, extend, initial_value
from oci_hook.attestation.event_words import (
    COMMAND_LINE_PREFIXES,
    EV_IPL,
    IMAGES,
    VARIABLES,
    Proof,
    describe,
    event_text,
    is_linux_initrd,
    is_linux_options,
    measured_text,
    parse_variable,
    prove,
    section_name,
)
from oci_hook.attestation.pe_image import authenticode_digest, parse_pe_image, unified_sections
from oci_hook.attestation.reference_values import COMMANDS_PCR, FILES_PCR, OVERRIDE_PCR, boot_chain, section_digests
from oci_hook.documents import shown
from oci_hook.key_errors import EventLogInvalid

_ATTRIBUTES_BYTES: Final = 4  # before a variable's value in efivarfs
_ATTRIBUTES_LIMIT: Final = 0xFF  # UEFI 2.10, 8.2: the attributes that there are
_MENU_COMMAND: Final = re.compile(rb"\n[^\S\n]*linux")  # one line's white space: a text of line feeds costs one pass
_LOOK: Final = "`sczctl boot-policy log` numbers the events; give --replace NUMBER=FILE"


@dataclass(frozen=True, slots=True)
class Replacement:
    """One event that will be another: its number, PCR and words, and its digests (None: there is none)."""

    event: int
    pcr: int
    words: str
    before: bytes | None
    after: bytes | None


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(slots=True)
class Draft:
    """A log that is being changed; `prediction.predict` makes values of it.

    Args:
        log: Of the boot that is running; it has SHA-256 digests (else EventLogInvalid when it is asked for them).
    """

    log: EventLog
    _digests: dict[int, bytes | None] = field(default_factory=dict)
    _inserted: dict[int, list[tuple[str, bytes]]] = field(default_factory=dict)
    _unknown: dict[int, str] = field(default_factory=dict)
    _texts: dict[int, bytes] = field(default_factory=dict)

    # --- what an owner replaces ---

    def replace_boot_loader(self, program: bytes, *, is_shim: bool = False) -> None:
        """The boot loader, or the shim before it, as the program's file.

        Raises:
            EventLogInvalid: The log shows none, or the file is no program.
        """
        loaders = boot_chain(self.log).loaders
        if not loaders or (is_shim and len(loaders) < 2):
            raise EventLogInvalid(f"the log shows no {'shim' if is_shim else 'boot loader'} in PCR 4", remedy=_LOOK)
        self._set(loaders[0 if is_shim else -1], authenticode_digest(parse_pe_image(program)))

    def replace_kernel(self, program: bytes) -> None:
        """The kernel of a system without a unified image, as the file: its image in PCR 4, GRUB's reading of it in 9.

        Raises:
            EventLogInvalid: The log shows a unified kernel image, or no kernel; or the file is no kernel for UEFI.
        """
        chain = boot_chain(self.log)
        if chain.unified or chain.sections:
            raise EventLogInvalid("the log shows a unified kernel image", remedy="give --uki FILE")
        read = self._read_by_grub("linux", "grub_linuxefi Kernel")
        if not chain.kernel and not read:
            raise EventLogInvalid("the log shows no kernel, neither in PCR 4 nor in PCR 9", remedy=_LOOK)
        image = parse_pe_image(program)
        self._set(chain.kernel, authenticode_digest(image))
        self._set(read, _sha256(program))

    def replace_initrd(self, contents: bytes) -> None:
        """The initial RAM disk as the file, in PCR 9: GRUB's reading of it, or Linux's own measurement.

        Raises:
            EventLogInvalid: The log shows none, or several of GRUB's.
        """
        read = self._read_by_grub("initrd", "grub_linuxefi Initrd")
        by_linux = tuple(event for event in self.log.events if is_linux_initrd(event))
        if len({event.digest for event in read}) > 1:
            raise EventLogInvalid("the log shows several initial RAM disks", remedy=_LOOK)
        if not read and not by_linux:
            raise EventLogInvalid("the log shows no initial RAM disk in PCR 9", remedy=_LOOK)
        self._set(read, _sha256(contents))
        for event in by_linux:
            if read and event.digest != read[0].digest:
                self._unknown[event.pcr] = "Linux measured another initial RAM disk than GRUB read"
            else:
                self._set((event,), _sha256(contents))

    def replace_command_line(self, text: str) -> None:
        """The kernel's command line, without the kernel's path, as GRUB or systemd-boot gives it.

        Raises:
            EventLogInvalid: The log proves none: a unified kernel image has its own.
        """
        grub = [e for e in self.log.events if e.data.startswith(COMMAND_LINE_PREFIXES) and prove(e) is Proof.TEXT]
        if grub:
            path, _, old = (measured_text(grub[-1]) or b"").decode("utf-8", "replace").partition(" ")
            if not old:
                raise EventLogInvalid("GRUB's command line in the log is empty", remedy="give --text OLD NEW")
            self._replace_with_path(path, old, text)
            return
        given = [
            event
            for event in self.log.events
            if event.pcr in (COMMANDS_PCR, OVERRIDE_PCR) and event.kind == EV_IPL and prove(event) is Proof.DATA
        ]
        if not given or len({event.digest for event in given}) > 1:
            raise EventLogInvalid("the log proves no command line, or several", remedy="give --uki FILE, or --replace")
        self._set(tuple(given), _sha256(_utf16(text)))
        self._replace_options(_utf16(event_text(given[0].data) or ""), _utf16(text))

    def replace_text(self, old: str, new: str) -> None:
        """A text in every command and command line of GRUB's, PCR 8: a version in kernels' names, for example.

        Args:
            old: Not empty.
            new: What takes its place; in texts that were replaced before, in what they are by then.

        Raises:
            EventLogInvalid: It is in none of them.
        """
        texts = [(event, text) for event, text in self._commands() if old.encode() in text]
        if not texts or not old:
            raise EventLogInvalid(f"no command of GRUB's in the log has the text {shown(old)}")
        for event, text in texts:
            self._set_text(event, text.replace(old.encode(), new.encode()))

    def replace_unified_image(self, program: bytes) -> None:
        """The unified kernel image as the file: its sections in PCR 11, itself and its kernel in PCR 4, Linux's in 9.

        Raises:
            EventLogInvalid: The log shows none, or the file is none that can be told.
        """
        chain = boot_chain(self.log)
        before = section_digests(chain)
        if not chain.unified or 2 * len(before) != len(chain.sections):
            raise EventLogInvalid("the log shows no unified kernel image, or one that was measured in another way")
        image = parse_pe_image(program)
        sections = dict(unified_sections(image))
        self._set(chain.unified, authenticode_digest(image))
        for event in chain.sections:
            self._digests[event.number] = None
        self._inserted[chain.sections[0].number] = [
            pair
            for name, contents in sections.items()
            for pair in ((f"name of section {name}", _sha256(name.encode() + b"\0")), (name, _sha256(contents)))
        ]
        if chain.kernel:
            self._set(chain.kernel, authenticode_digest(parse_pe_image(sections[".linux"])))
        for event in self.log.events:
            if is_linux_initrd(event) and event.digest == before.get(".initrd") and ".initrd" in sections:
                self._set((event,), _sha256(sections[".initrd"]))
            elif is_linux_initrd(event):
                self._unknown[event.pcr] = "Linux measured more into its initial RAM disk than the unified image has"
        self._replace_unified_options(sections.get(".cmdline", b""))

    def replace_event(self, number: int, contents: bytes) -> None:
        """Whatever an event measured, by a file: a program, a file that GRUB read, or a variable as efivarfs has it.

        Raises:
            EventLogInvalid: There is no such event, or what it measured cannot be made from a file.
        """
        (event,) = [event for event in self.log.events if event.number == number and event.is_measured] or (None,)
        if event is None:
            raise EventLogInvalid(f"the log has no event {number} that was measured", remedy=_LOOK)
        if event.kind in IMAGES:
            digest = authenticode_digest(parse_pe_image(contents))
        elif event.kind in VARIABLES:
            digest = _variable_digest(event, contents)
        elif section_name(event) is not None or prove(event) is Proof.TEXT:
            raise EventLogInvalid(f"event {number} is not a file's", remedy="give --uki FILE, or --text OLD NEW")
        else:
            digest = _sha256(contents)
        same = [e for e in self.log.events if e.is_measured and (e.pcr, e.kind) == (event.pcr, event.kind)]
        self._set(tuple(e for e in same if e.digest == event.digest), digest)

    # --- the values ---

    def replacements(self) -> tuple[Replacement, ...]:
        """What was replaced, in the order of the log."""
        found = []
        for event in self.log.events:
            for words, digest in self._inserted.get(event.number, []):
                found.append(Replacement(event.number, event.pcr, words, None, digest))
            if event.number in self._digests and self._digests[event.number] != event.digest:
                after = self._digests[event.number]
                found.append(Replacement(event.number, event.pcr, describe(event), event.digest, after))
        return tuple(found)

    def values(self) -> dict[int, bytes]:
        """Where the changed log leads."""
        values: dict[int, bytes] = {}
        for event in self.log.events:
            if not event.is_measured:
                continue
            digest = self._digests.get(event.number, event.digest)
            for each in [*(inserted for _words, inserted in self._inserted.get(event.number, [])), digest]:
                if each is not None:
                    start = values.get(event.pcr) or initial_value(event.pcr, self.log.startup_locality)
                    values[event.pcr] = extend(start, each)
        return values

    def unknown(self) -> dict[int, str]:
        """PCRs of which a replacement cannot be told."""
        return dict(self._unknown)

    # --- inside ---

    def _set(self, events: tuple[Event, ...], digest: bytes) -> None:
        for event in events:
            self._digests[event.number] = digest

    def _commands(self) -> list[tuple[Event, bytes]]:
        """GRUB's proven commands and command lines, with their text as it was replaced so far."""
        return [
            (event, self._texts.get(event.number) or measured_text(event) or b"")
            for event in self.log.events
            if event.pcr == COMMANDS_PCR and measured_text(event) is not None and prove(event) is Proof.TEXT
        ]

    def _set_text(self, event: Event, text: bytes) -> None:
        end = b"" if _sha256(measured_text(event) or b"") == event.digest else b"\0"
        self._texts[event.number] = text
        self._set((event,), _sha256(text + end))

    def _replace_with_path(self, path: str, old: str, new: str) -> None:
        """The arguments after the kernel's path; what is generated with them in menu entries' bodies cannot be told."""
        kernel, before, after = path.encode(), f"{path} {old}".encode(), f"{path} {new}".encode()
        for event, text in self._commands():
            if text.endswith(before):
                self._set_text(event, text.removesuffix(before) + after)
            elif _MENU_COMMAND.search(text) or kernel in text:
                self._unknown[event.pcr] = "menu entries have command lines, too: give --text OLD NEW for all of them"

    def _read_by_grub(self, command: str, fixed_name: str) -> tuple[Event, ...]:
        """The events in PCR 9 of the files that GRUB's last such command names."""
        paths: frozenset[str] = frozenset()
        for event in self.log.events:
            text = measured_text(event) if event.pcr == COMMANDS_PCR and prove(event) is Proof.TEXT else None
            words = (text or b"").decode("utf-8", "replace").split()
            if words and words[0] in (command, f"{command}efi"):
                paths = frozenset(words[1:2] if command == "linux" else words[1:])
        return tuple(
            event
            for event in self.log.events
            if event.pcr == FILES_PCR and event.kind == EV_IPL and _names(event, paths, fixed_name)
        )

    def _replace_options(self, old: bytes, new: bytes) -> None:
        """Linux's own measurement of its load options, if it is of the old ones."""
        for event in self.log.events:
            if is_linux_options(event):
                if event.digest == _sha256(old):
                    self._set((event,), _sha256(new))
                else:
                    self._unknown[event.pcr] = "Linux measured another command line than the log shows"

    def _replace_unified_options(self, section: bytes) -> None:
        """Linux gets the image's own command line, unless one from outside (PCR 12) took its place."""
        override = any(event.pcr == OVERRIDE_PCR and event.is_measured for event in self.log.events)
        text = section.rstrip(b"\0").decode("utf-8", "replace")
        for event in self.log.events:
            if is_linux_options(event) and not override:
                if any(character < " " for character in text) or not text:
                    self._unknown[event.pcr] = "the stub changes the command line before Linux measures it"
                else:
                    self._set((event,), _sha256(_utf16(text)))


def _variable_digest(event: Event, contents: bytes) -> bytes:
    """The digest of a variable's event with another value, as efivarfs shows it: four bytes of attributes before it."""
    variable, proof = parse_variable(event.data), prove(event)
    if variable is None or proof not in (Proof.DATA, Proof.VALUE):
        raise EventLogInvalid(f"the log does not prove what variable event {event.number} is")
    value = contents[_ATTRIBUTES_BYTES:]
    attributes = int.from_bytes(contents[:_ATTRIBUTES_BYTES], "little")
    if len(contents) < _ATTRIBUTES_BYTES or not 0 < attributes <= _ATTRIBUTES_LIMIT:
        raise EventLogInvalid("it is no variable of the firmware", remedy="give a file of /sys/firmware/efi/efivars")
    if proof is Proof.VALUE:
        return _sha256(value)
    name = event.data[32 : len(event.data) - len(variable.value)]
    return _sha256(event.data[:24] + len(value).to_bytes(8, "little") + name + value)


def _names(event: Event, paths: Set[str], fixed_name: str) -> bool:
    """Whether GRUB's event is of a file that a command names, with the device before it, "(hd0,gpt2)", or without."""
    name = event_text(event.data) or ""
    return name == fixed_name or name in paths or name.partition(")")[2] in paths


def _utf16(text: str) -> bytes:
    """As firmware's load options are: UTF-16 with a closing NUL."""
    return f"{text}\0".encode("utf-16-le")
