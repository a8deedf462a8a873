"""The next boot's values: a changed log leads where the other boot's own log does, and what cannot be told is said."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from oci_hook.attestation.boot_draft import Draft
from oci_hook.attestation.event_log import SHA256, Event, EventLog, extend, parse_event_log, replay
from oci_hook.attestation.explanation import differing_events, explain_values, with_phases
from oci_hook.attestation.pe_image import authenticode_digest, parse_pe_image
from oci_hook.attestation.prediction import format_prediction, parse_prediction, predict
from oci_hook.attestation.reference_values import boot_chain, reference_values
from oci_hook.key_errors import EventLogInvalid
from tests.attestation_vectors import changed_bytes, hostile, value_or_ours
from tests.boot_images import SECTIONS, write_unified_image
from tests.boot_logs import (
    KEPT_OPTIONS,
    Firmware,
    boot_by_older_grub,
    boot_unified,
    kept_boot,
    log_bytes,
    measured_alone,
    older_form,
    part_of,
)
from tests.guest_image import STUB

FIXTURES = Path(__file__).parents[1] / "fixtures"
GUEST = parse_event_log((FIXTURES / "guest_boot/event-log.bin").read_bytes())
GUEST_PCRS = {int(p): bytes.fromhex(v) for p, v in json.loads((FIXTURES / "guest_boot/pcrs.json").read_text()).items()}
GUEST_OPTIONS = "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr mitigations=off random.trust_cpu=on"
KERNEL = STUB.read_bytes()  # a program for UEFI, as a kernel is
LOADER = STUB.with_name("systemd-bootx64.efi").read_bytes()
OLD = SECTIONS | {".linux": KERNEL}
NEW = SECTIONS | {
    ".linux": KERNEL + b"newer",
    ".initrd": b"another initrd",
    ".cmdline": b"root=/dev/vda2 rw\0",
    ".osrel": b"ID=next\n",
}
MEASURE = "/usr/lib/systemd/systemd-measure"


GRUB = parse_event_log(kept_boot("shim-grub")[0])
SYSTEMD_BOOT = parse_event_log(kept_boot("systemd-boot")[0])
# As where GRUB's entries come from files of their own (blscfg), and no menu is measured.
NO_MENU = parse_event_log(part_of(GRUB, lambda event: not event.data.startswith(b"grub_cmd: menuentry")))
FIRMWARE_ALONE = parse_event_log(part_of(GRUB, lambda event: event.number < 22))
OLDER_LINUX = parse_event_log(part_of(SYSTEMD_BOOT, lambda event: event.number < 24))  # which measures nothing itself


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("images")
    return tuple(  # type: ignore[return-value]
        write_unified_image(folder / f"{number}.efi", sections).read_bytes()
        for number, sections in enumerate((OLD, NEW))
    )


def logs(images: tuple[bytes, bytes]) -> tuple[EventLog, EventLog]:
    return tuple(  # type: ignore[return-value]
        parse_event_log(boot_unified(image, sections, loader=LOADER))
        for image, sections in zip(images, (OLD, NEW), strict=True)
    )


# --- a unified kernel image -------------------------------------------------------------------------------------------


def test_a_new_unified_image_gives_the_values_of_its_boot(images: tuple[bytes, bytes]) -> None:
    old, new = logs(images)
    draft = Draft(old)
    draft.replace_unified_image(images[1])
    prediction = predict(draft, None)
    assert prediction.pcrs == replay(new)
    assert (prediction.changed, prediction.unknown) == ((4, 9, 11), {})
    assert {each.pcr for each in prediction.replacements} == {4, 9, 11}


def test_the_value_of_pcr_11_is_systemd_measures(images: tuple[bytes, bytes], tmp_path: Path) -> None:
    old, _new = logs(images)
    quoted = replay(old)
    quoted[11] = with_phases(quoted[11], 4)
    draft = Draft(old)
    draft.replace_unified_image(images[1])
    words = [MEASURE, "calculate", "--bank=sha256", "--phase=enter-initrd:leave-initrd:sysinit:ready"]
    for name, contents in NEW.items():
        (tmp_path / name).write_bytes(contents)
        words.append(f"--{name[1:]}={tmp_path / name}")
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"11:sha256=([0-9a-f]{64})", said) == [predict(draft, quoted).pcrs[11].hex()]


def test_the_measured_guest_measures_as_the_model_of_a_boot_does() -> None:
    """What the predictions rest on, in a boot of real firmware, stub and Linux: whose digests are which."""
    options, initrd = (event for event in GUEST.events if event.kind == 6)
    assert options.digest == hashlib.sha256(f"{GUEST_OPTIONS}\0".encode("utf-16-le")).digest()
    values = reference_values(GUEST)
    assert initrd.digest.hex() == values.sections[".initrd"]
    assert list(values.sections) == [".linux", ".osrel", ".cmdline", ".initrd"]
    chain = boot_chain(GUEST)
    assert ([e.number for e in chain.unified], [e.number for e in chain.kernel], chain.loaders) == ([10], [29], ())


def test_an_image_that_is_not_known_to_have_run_cannot_be_replaced(images: tuple[bytes, bytes]) -> None:
    for log in (GRUB, SYSTEMD_BOOT, FIRMWARE_ALONE):
        with pytest.raises(EventLogInvalid, match="no unified kernel image"):
            Draft(log).replace_unified_image(images[1])
    with pytest.raises(EventLogInvalid, match="shows a unified kernel image"):
        Draft(GUEST).replace_kernel(KERNEL)


def test_a_section_that_was_measured_under_another_name_is_not_believed(images: tuple[bytes, bytes]) -> None:
    events = list(logs(images)[0].events)
    place = next(number for number, event in enumerate(events) if event.pcr == 11)
    del events[place]  # a name is missing: contents would be taken for names
    with pytest.raises(EventLogInvalid, match="measured in another way"):
        Draft(parse_event_log(log_bytes(events))).replace_unified_image(images[1])


def test_what_linux_got_besides_makes_pcr_9_unknown(images: tuple[bytes, bytes]) -> None:
    events = list(logs(images)[0].events)
    firmware = Firmware(events)
    firmware.events = events[:-1]
    firmware.measure(9, 6, events[-1].data, digest_of=OLD[".initrd"] + b"credentials")
    draft = Draft(parse_event_log(firmware.bytes))
    draft.replace_unified_image(images[1])
    prediction = predict(draft, None)
    assert 9 not in prediction.pcrs
    assert "more into its initial RAM disk" in prediction.unknown[9]
    assert prediction.changed == (4, 11)


def test_a_command_line_from_outside_stays(images: tuple[bytes, bytes]) -> None:
    old = parse_event_log(boot_unified(images[0], OLD, loader=LOADER, extra="single"))
    new = parse_event_log(boot_unified(images[1], NEW, loader=LOADER, extra="single"))
    draft = Draft(old)
    draft.replace_unified_image(images[1])
    assert predict(draft, None).pcrs == replay(new)


def test_a_boot_loader_and_a_variable_give_the_values_of_their_boot(images: tuple[bytes, bytes]) -> None:
    loader = LOADER + b"newer"
    new = parse_event_log(boot_unified(images[0], OLD, loader=loader, dbx=b"longer than before"))
    draft = Draft(logs(images)[0])
    draft.replace_boot_loader(loader)
    (number,) = [e.number for e in draft.log.events if "dbx".encode("utf-16-le") in e.data]
    draft.replace_event(number, b"\x27\0\0\0longer than before")  # efivarfs has the attributes before it
    prediction = predict(draft, None)
    assert prediction.pcrs == replay(new)
    assert prediction.changed == (4, 7)


@pytest.mark.parametrize("contents", [b"", b"\x27\0\0", b"\0\0\0\0value", bytes.fromhex("a159c0a5") + b"raw list"])
def test_what_is_no_variable_of_efivarfs_is_refused(images: tuple[bytes, bytes], contents: bytes) -> None:
    draft = Draft(logs(images)[0])
    (number,) = [e.number for e in draft.log.events if "dbx".encode("utf-16-le") in e.data]
    with pytest.raises(EventLogInvalid, match="no variable of the firmware"):
        draft.replace_event(number, contents)
    assert draft.replacements() == ()


def test_a_boot_variable_whose_value_alone_was_measured() -> None:
    draft = Draft(GRUB)
    boot = next(e for e in draft.log.events if e.kind == 0x80000002)
    draft.replace_event(boot.number, b"\x07\0\0\0other")
    assert [each.after for each in draft.replacements()] == [sha256(b"other")]


# --- GRUB, shim, systemd-boot: real logs ------------------------------------------------------------------------------


def by_tpm2_eventlog(data: bytes, path: Path) -> dict[int, str]:
    path.write_bytes(data)
    said = subprocess.run(["tpm2_eventlog", path], capture_output=True, text=True, check=True).stdout
    return {int(pcr): value for pcr, value in re.findall(r"(\d+) *: 0x([0-9a-f]{64})", said.partition("\npcrs:\n")[2])}


def changed_log(log: EventLog, changes: dict[int, bytes]) -> bytes:
    """A log with other digests at some events."""
    firmware = Firmware()
    for event in measured_alone(log):
        firmware.measure(event.pcr, event.kind, event.data, digest=changes.get(event.number, event.digest))
    return firmware.bytes


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_a_kernel_an_initrd_and_a_version_under_shim_and_grub(tmp_path: Path) -> None:
    log = GRUB
    draft = Draft(log)
    draft.replace_kernel(KERNEL)
    draft.replace_initrd(b"initrd")
    draft.replace_text("6.1.0-56", "6.1.0-57")
    image = authenticode_digest(parse_pe_image(KERNEL))
    changes = {43: sha256(KERNEL), 44: image, 45: image, 49: sha256(b"initrd")}
    for event in log.events:
        text = event.data.rstrip(b"\0").partition(b": ")[2]
        if event.pcr == 8 and b"6.1.0-56" in text:
            changes[event.number] = sha256(text.replace(b"0-56", b"0-57"))
    assert len(changes) == 9
    expected = by_tpm2_eventlog(changed_log(log, changes), tmp_path / "log")
    prediction = predict(draft, None)
    assert {pcr: value.hex() for pcr, value in prediction.pcrs.items()} == expected
    assert prediction.changed == (4, 8, 9)


def test_the_older_words_of_grub(tmp_path: Path) -> None:
    log = parse_event_log(boot_by_older_grub(GRUB.events[:29], LOADER, b"old", "root=/dev/vda1"))
    draft = Draft(log)
    draft.replace_kernel(KERNEL)
    draft.replace_initrd(b"initrd")
    changes = {34: sha256(KERNEL), 35: authenticode_digest(parse_pe_image(KERNEL)), 38: sha256(b"initrd")}
    assert by_tpm2_eventlog(log_bytes(log.events), tmp_path / "log") == {p: v.hex() for p, v in replay(log).items()}
    expected = by_tpm2_eventlog(changed_log(log, changes), tmp_path / "log")
    assert {pcr: value.hex() for pcr, value in predict(draft, None).pcrs.items()} == expected


def test_another_command_line_of_grubs(tmp_path: Path) -> None:
    log = NO_MENU
    (line,) = reference_values(log).command_lines
    draft = Draft(log)
    draft.replace_command_line("root=/dev/sda1 quiet")
    touched = [each.event for each in draft.replacements()]
    assert {41, 45} <= set(touched)
    events = {event.number: event for event in log.events}
    old = line.partition(" ")[2].encode()
    changes = {
        number: sha256(events[number].data.rstrip(b"\0").partition(b": ")[2].replace(old, b"root=/dev/sda1 quiet"))
        for number in touched
    }
    expected = by_tpm2_eventlog(changed_log(log, changes), tmp_path / "log")
    assert {pcr: value.hex() for pcr, value in predict(draft, None).pcrs.items()} == expected


def test_another_command_line_of_systemd_boots(tmp_path: Path) -> None:
    log = SYSTEMD_BOOT
    draft = Draft(log)
    draft.replace_command_line("root=/dev/sda1")
    other = sha256("root=/dev/sda1\0".encode("utf-16-le"))
    expected = by_tpm2_eventlog(changed_log(log, {24: other, 25: other}), tmp_path / "log")
    assert {pcr: value.hex() for pcr, value in predict(draft, None).pcrs.items()} == expected


def test_shim_and_boot_loader_are_told_apart() -> None:
    chain = boot_chain(GRUB)
    assert [[event.number for event in each] for each in chain.loaders] == [[23], [29]]
    assert [event.number for event in chain.kernel] == [44, 45]
    for is_shim, number in ((True, 23), (False, 29)):
        draft = Draft(GRUB)
        draft.replace_boot_loader(LOADER, is_shim=is_shim)
        assert [(each.event, each.after) for each in draft.replacements()] == [
            (number, authenticode_digest(parse_pe_image(LOADER)))
        ]


@pytest.mark.parametrize(
    ("log", "change", "why"),
    [
        (FIRMWARE_ALONE, lambda draft: draft.replace_boot_loader(LOADER), "no boot loader"),
        (SYSTEMD_BOOT, lambda draft: draft.replace_boot_loader(LOADER, is_shim=True), "no shim"),
        (FIRMWARE_ALONE, lambda draft: draft.replace_kernel(KERNEL), "no kernel"),
        (OLDER_LINUX, lambda draft: draft.replace_initrd(b"x"), "no initial RAM disk"),
        (OLDER_LINUX, lambda draft: draft.replace_command_line("x"), "no command line"),
        (GRUB, lambda draft: draft.replace_text("nowhere there", "x"), "no command of GRUB's"),
        (GRUB, lambda draft: draft.replace_event(0, b"x"), "no event 0"),
        (GRUB, lambda draft: draft.replace_event(52, b"x"), "no event 52"),
        (GRUB, lambda draft: draft.replace_event(42, b"x"), "not a file's"),
        (GRUB, lambda draft: draft.replace_event(44, b"x"), "program for UEFI"),
        (GRUB, lambda draft: draft.replace_kernel(b"x"), "program for UEFI"),
        (parse_event_log(older_form(GRUB)), lambda draft: draft.replace_boot_loader(LOADER), "no SHA-256"),
    ],
)
def test_what_the_log_does_not_show_is_not_replaced(log: EventLog, change: object, why: str) -> None:
    with pytest.raises(EventLogInvalid, match=why):
        change(Draft(log))  # type: ignore[operator]


def test_nothing_replaced_is_no_prediction() -> None:
    draft = Draft(GRUB)
    with pytest.raises(EventLogInvalid, match="nothing would be measured otherwise"):
        predict(draft, None)
    draft.replace_text("quiet", "quiet") if b"quiet" in log_bytes(draft.log.events) else draft.replace_text("xy", "xy")
    with pytest.raises(EventLogInvalid, match="nothing would be measured otherwise"):
        predict(draft, None)


def test_a_menu_entry_that_spells_the_command_line_in_another_way_makes_pcr_8_unknown() -> None:
    draft = Draft(GRUB)
    draft.replace_command_line("root=/dev/sda1 quiet")
    prediction = predict(draft, None)
    assert "menu entries have command lines" in prediction.unknown[8]
    assert 8 not in prediction.pcrs


def test_a_short_command_line_is_not_taken_for_a_part_of_other_commands() -> None:
    firmware = Firmware()
    for text in (b"grub_cmd: error rode", b"grub_cmd: linux /vmlinuz ro", b"kernel_cmdline: /vmlinuz ro"):
        firmware.measure(8, 0xD, text + b"\0", digest_of=text.partition(b": ")[2])
    draft = Draft(parse_event_log(firmware.bytes))
    draft.replace_command_line("rw")
    assert [each.event for each in draft.replacements()] == [2, 3]
    draft.replace_text("rw", "rw quiet")  # on top of it
    assert [each.after for each in draft.replacements()] == [
        sha256(b"linux /vmlinuz rw quiet"),
        sha256(b"/vmlinuz rw quiet"),
    ]


def everything(log: EventLog, unified: bytes) -> None:
    """Whatever can be replaced in a log; what cannot is our error."""
    for change in (
        lambda draft: draft.replace_unified_image(unified),
        lambda draft: draft.replace_boot_loader(LOADER),
        lambda draft: draft.replace_boot_loader(LOADER, is_shim=True),
        lambda draft: draft.replace_kernel(KERNEL),
        lambda draft: draft.replace_initrd(b"x"),
        lambda draft: draft.replace_command_line("x"),
        lambda draft: draft.replace_text("linux", "x"),
        lambda draft: draft.replace_event(5, b"x"),
        lambda draft: draft.replace_event(21, LOADER),
    ):
        with contextlib.suppress(EventLogInvalid):
            draft = Draft(log)
            change(draft)
            predict(draft, None)
            predict(draft, dict.fromkeys(range(16), bytes(32)))


@given(data=changed_bytes(log_bytes(GUEST.events)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_logs_of_a_unified_image_give_predictions_or_our_error(images: tuple[bytes, bytes], data: bytes) -> None:
    with contextlib.suppress(EventLogInvalid):
        log = parse_event_log(data)
        everything(log, images[1])
        assert all(name.startswith(".") for name in reference_values(log).sections)


@given(data=changed_bytes(log_bytes(GRUB.events)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_logs_of_grub_give_predictions_or_our_error(images: tuple[bytes, bytes], data: bytes) -> None:
    log = None
    with contextlib.suppress(EventLogInvalid):
        log = parse_event_log(data)
        everything(log, images[1])
    assert log is None or len(differing_events(log, GRUB, range(16))) <= 13


# --- beside a quote ---------------------------------------------------------------------------------------------------


def test_a_log_that_does_not_explain_the_quote_predicts_only_what_stays(images: tuple[bytes, bytes]) -> None:
    old, _new = logs(images)
    draft = Draft(old)
    draft.replace_unified_image(images[1])
    quoted = {pcr: replay(old).get(pcr, bytes(32)) for pcr in range(16)}
    quoted |= {4: sha256(b"other"), 10: sha256(b"IMA"), 11: with_phases(quoted[11], 3)}
    prediction = predict(draft, quoted)
    assert prediction.unknown == {4: "the log does not lead to the value that the TPM quoted"}
    assert prediction.pcrs[10] == quoted[10]
    assert prediction.pcrs[7] == quoted[7]
    assert prediction.changed == (9, 11)
    assert set(prediction.pcrs) == set(range(16)) - {4}


def test_the_log_explains_the_guests_values_but_for_ima() -> None:
    told = explain_values(GUEST, {pcr: value for pcr, value in GUEST_PCRS.items() if pcr < 16})
    assert [each.pcr for each in told if not each.is_explained] == [10]
    assert "NOT EXPLAINED" in told[10].words
    assert told[11].words == "explained"


def test_each_of_systemds_phases_is_recognised_and_no_other_word() -> None:
    value = GUEST_PCRS[11]
    for count, phase in enumerate(("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"), 1):
        value = extend(value, sha256(phase.encode()))
        (told,) = explain_values(GUEST, {11: value})
        assert (told.is_explained, told.phases) == (True, count)
        assert phase in told.words
    (told,) = explain_values(GUEST, {11: extend(value, sha256(b"another"))})
    assert not told.is_explained


def test_what_differs_in_words(images: tuple[bytes, bytes]) -> None:
    old, new = logs(images)
    lines = differing_events(old, new, [4, 7, 11])
    assert [line.split(": sha256")[0] for line in lines] == [
        "PCR 4: unified kernel image, boot program \\EFI\\Linux\\image.efi",
        "PCR 4: kernel, boot program",
        *(f"PCR 11: unified kernel image: contents of section {name}" for name in list(NEW)[:4]),
    ]
    digest = hashlib.sha256(OLD[".cmdline"]).hexdigest()
    assert lines[4].endswith(f"sha256:{hashlib.sha256(NEW['.cmdline']).hexdigest()}, approved is sha256:{digest}")


def test_what_is_new_or_missing_in_words_and_not_without_end(images: tuple[bytes, bytes]) -> None:
    old, _new = logs(images)
    more = parse_event_log(boot_unified(images[0], OLD, loader=LOADER, extra="single"))
    digest = sha256("single\0".encode("utf-16-le")).hex()
    assert differing_events(old, more, [12]) == [f"PCR 12: boot loader's measurement: single: sha256:{digest} is new"]
    (line,) = differing_events(more, old, [12])
    assert line.endswith("is missing")
    many = differing_events(SYSTEMD_BOOT, GRUB, range(16))
    assert len(many) == 13
    assert re.fullmatch(r"and \d+ more", many[-1])


# --- hostile logs: the work grows with the log, not with its square ---------------------------------------------------


def hostile_log(*events: tuple[int, int, bytes, bytes]) -> EventLog:
    """A log of (PCR, kind, data, digest), parsed as a file of that many bytes is."""
    return parse_event_log(
        log_bytes([Event(n, pcr, kind, {SHA256: d}, x) for n, (pcr, kind, x, d) in enumerate(events, 1)])
    )


def test_thousands_of_programs_are_told_apart_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 15_000
    log = hostile_log(*((4, 0x80000003, b"", sha256(b"%d" % number)) for number in range(count)))
    looks, digest = [], Event.digest.fget

    def look(event: Event) -> bytes:
        looks.append(event.number)
        return digest(event)

    monkeypatch.setattr(Event, "digest", property(look))
    assert len(boot_chain(log).loaders) == count - 1
    assert len(looks) < 10 * count
    looks.clear()
    assert len(reference_values(log).boot_loaders) == count - 1
    assert len(looks) < 20 * count


def test_events_that_have_much_in_common_are_compared_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    same, count, matched = sha256(b"same"), 1000, []
    matcher = difflib.SequenceMatcher

    def matching(junk: None, old: list[bytes], new: list[bytes], *, autojunk: bool) -> difflib.SequenceMatcher[bytes]:
        matched.append(len(old) * len(new))
        return matcher(junk, old, new, autojunk=autojunk)

    monkeypatch.setattr(difflib, "SequenceMatcher", matching)
    every = [(8, 0xD, b"", same)] * count
    some = [(8, 0xD, b"", same if number % 2 else sha256(b"%d" % number)) for number in range(count)]
    lines = differing_events(hostile_log(*every), hostile_log(*some), [8])
    assert (len(lines), lines[-1]) == (13, f"and {count // 2 - 12} more")
    assert all(size <= 1 << 16 for size in matched)
    # What is before and behind does not count: one event more in a long list is one line.
    events = [(8, 0xD, b"", sha256(b"%d" % number)) for number in range(count - 1)]
    (line,) = differing_events(hostile_log(*events), hostile_log(*events[:500], every[0], *events[500:]), [8])
    assert line.endswith(f"sha256:{same.hex()} is new")
    (line,) = differing_events(hostile_log(*events), hostile_log(*events[:500], *events[501:]), [8])
    assert line.endswith("is missing")


def command(text: bytes) -> tuple[int, int, bytes, bytes]:
    return (8, 0xD, b"grub_cmd: " + text + b"\0", sha256(text))


def test_a_command_of_a_million_names_is_looked_up_once_for_each_file() -> None:
    names = b" ".join(b"%x" % number for number in range(300_000))
    files = [(9, 0xD, b"(hd0,gpt2)/f%d\0" % number, sha256(b"%d" % number)) for number in range(15_000)]
    log = hostile_log(command(b"initrd /f7 " + names), *files)
    draft = Draft(log)
    draft.replace_initrd(b"new")
    assert [each.before for each in draft.replacements()] == [sha256(b"7")]


def test_a_menu_entry_of_line_feeds_is_searched_once() -> None:
    line = b"/vmlinuz root=/dev/vda1"
    options = (8, 0xD, b"kernel_cmdline: " + line + b"\0", sha256(line))
    for entry, is_told in ((b"menuentry {" + b"\n" * (1 << 21), True), (b"menuentry {\n\n \tlinux /other", False)):
        draft = Draft(hostile_log(command(entry), options))
        draft.replace_command_line("root=/dev/vda2")
        assert (8 not in draft.unknown()) is is_told


# --- reference values -------------------------------------------------------------------------------------------------


def test_reference_values_of_a_machine_with_shim_and_grub() -> None:
    values = reference_values(GRUB)
    assert values.secure_boot is True
    assert values.sbat_level == "sbat,1,2025021800\nshim,4\ngrub,5\n"
    assert [path for path, _digest in values.boot_loaders] == ["\\EFI\\BOOT\\BOOTX64.EFI", "\\EFI\\BOOT\\grubx64.efi"]
    assert values.kernel == "6b1bf35c3bee9918250f593a6fff889c75c1e239cd2fe9e5bb0cd3de9dcb8e51"
    assert values.command_lines == (f"/vmlinuz-6.1.0-56-amd64 root=/dev/vda1 ro {KEPT_OPTIONS}",)
    assert [authority.split(":")[0] for authority in values.authorities] == ["db", "MokListRT"]
    assert sorted(values.keys) == ["KEK", "PK", "db", "dbx"]
    assert [name for name, _digest in values.files] == [
        "(hd0,msdos1)/EFI/debian/grub.cfg",
        "/vmlinuz-6.1.0-56-amd64",
        "/initrd.img-6.1.0-56-amd64",
    ]


def test_the_same_kernel_has_one_digest_under_both_boot_loaders() -> None:
    assert reference_values(SYSTEMD_BOOT).kernel == reference_values(GRUB).kernel


@pytest.mark.parametrize(("log", "secure_boot"), [(GUEST, False), (SYSTEMD_BOOT, False), (GRUB, True)])
def test_secure_boot_is_told(log: EventLog, secure_boot: bool) -> None:
    assert reference_values(log).secure_boot is secure_boot


def test_a_variable_whose_data_is_not_what_was_measured_is_not_told() -> None:
    firmware = Firmware()
    firmware.variable("SecureBoot", b"\0")
    lying = firmware.events[0]
    firmware.events.clear()
    firmware.measure(7, lying.kind, lying.data[:-1] + b"\1", digest=lying.digest)  # "on", but "off" was measured
    assert reference_values(parse_event_log(firmware.bytes)).secure_boot is None


# --- the document -----------------------------------------------------------------------------------------------------


def test_a_prediction_is_read_as_it_was_written(images: tuple[bytes, bytes]) -> None:
    draft = Draft(logs(images)[0])
    draft.replace_unified_image(images[1])
    prediction = predict(draft, None)
    state = parse_prediction(format_prediction("edge-1", 5, prediction))
    assert (state.device, state.created, state.pcrs) == ("edge-1", 5, prediction.pcrs)


@given(
    hostile(
        json.dumps({"schema": "scz-smm/prediction/v1", "device": "a", "created": 1, "pcrs": {"4": "00" * 32}}).encode()
    )
)
def test_a_hostile_prediction_is_a_value_or_our_error(data: bytes) -> None:
    value_or_ours(parse_prediction, data)
