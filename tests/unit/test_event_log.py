"""The event log: real machines' logs lead where `tpm2_eventlog` says, and none of their bytes can be changed unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.attestation.boot_policy import verify_coverage
from oci_hook.attestation.event_log import LIMIT_BYTES, EventLog, extend, initial_value, parse_event_log, replay
from oci_hook.attestation.event_words import Proof, describe, prove, section_name, type_name
from oci_hook.errors import BootPolicyInvalid
from oci_hook.key_errors import EventLogInvalid
from tests.attestation_vectors import changed_bytes

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "guest_boot"
LOG = (FOLDER / "event-log.bin").read_bytes()
VALUES = {int(pcr): bytes.fromhex(value) for pcr, value in json.loads((FOLDER / "pcrs.json").read_text()).items()}
REAL = {path.stem: path.read_bytes() for path in sorted((FIXTURES / "event_logs").glob("*.bin"))} | {"guest": LOG}
AGILE = sorted(set(REAL) - {"sha1-only"})
BY_LINUX = 10
INITRAMFS = "boot loader's measurement: (hd0,gpt2)/initramfs-5.14.0-130.el9.x86_64.img"
# What the laptop's own TPM held (go-eventlog's test): its firmware started the TPM from locality 3.
LAPTOP_PCR_0 = "0e5ea849d7647a1ac1becc096fee4df98f00f8015f934afadaab0b8aa20b38a5"


def by_tpm2_eventlog(path: Path) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """PCR, type and SHA-256 digest of each event, and the values of the SHA-256 bank, by the other program."""
    said = subprocess.run(["tpm2_eventlog", path], capture_output=True, text=True, check=True).stdout
    listed, _, ends = said.partition("\npcrs:\n")
    events = []
    for entry in listed.split("- EventNum: ")[2:]:
        pcr, kind = re.search(r"PCRIndex: (\d+)", entry), re.search(r"EventType: (\S+)", entry)
        digest = re.search(r'AlgorithmId: sha256\s+Digest: "([0-9a-f]{64})"', entry)
        assert pcr
        assert kind
        assert digest
        events.append((int(pcr[1]), kind[1], digest[1]))
    bank = re.search(r"  sha256:\n((?:    .*\n?)*)", ends)
    assert bank
    return events, {int(pcr): value for pcr, value in re.findall(r"(\d+) *: 0x([0-9a-f]{64})", bank[1])}


def hexadecimal(values: dict[int, bytes]) -> dict[int, str]:
    return {pcr: value.hex() for pcr, value in values.items()}


@pytest.mark.parametrize("name", AGILE)
def test_tpm2_eventlog_reads_the_same_events_and_values(name: str, tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    path.write_bytes(REAL[name])
    events, values = by_tpm2_eventlog(path)
    log = parse_event_log(REAL[name])
    assert [(event.pcr, type_name(event.kind), event.digest.hex()) for event in log.events] == events
    ours = hexadecimal(replay(log))
    if log.startup_locality:  # which that program leaves out
        assert ours.pop(0) == LAPTOP_PCR_0
        del values[0]
    assert ours == values


def test_the_log_leads_to_the_values() -> None:
    measured = {pcr: value for pcr, value in VALUES.items() if any(value) and pcr != BY_LINUX}
    assert {pcr: value for pcr, value in replay(parse_event_log(LOG)).items() if pcr != BY_LINUX} == measured


def test_a_log_of_the_older_form_is_told_as_such_and_has_no_values() -> None:
    log = parse_event_log(REAL["sha1-only"])
    assert (log.is_crypto_agile, log.algorithms, len(log.events)) == (False, (0x0004,), 17)
    with pytest.raises(EventLogInvalid, match="no SHA-256") as refused:
        replay(log)
    assert "SHA-256 bank" in refused.value.advice
    assert {prove(event) for event in log.events} == {Proof.NONE}


def test_the_image_that_ran_is_in_it() -> None:
    named = [section_name(event) for event in parse_event_log(LOG).events if event.pcr == 11]
    # Each section's name, then its contents (systemd-stub of Debian 12).
    assert named == [name for name in (".linux", ".osrel", ".cmdline", ".initrd") for _ in range(2)]


def test_a_changed_event_leads_elsewhere() -> None:
    place = LOG.index(".cmdline".encode("utf-16-le")) - 20
    changed = LOG[:place] + bytes([LOG[place] ^ 1]) + LOG[place + 1 :]
    good, other = replay(parse_event_log(LOG)), replay(parse_event_log(changed))
    assert {pcr for pcr, value in other.items() if value != good[pcr]} == {11}
    assert other[11] != VALUES[11]


def test_it_covers_a_unified_image_and_not_a_boot_loader() -> None:
    verify_coverage({pcr: VALUES[pcr] for pcr in (4, 7, 9, 11, 12)}, BootPolicyInvalid)
    assert not any(VALUES[12])  # no command line from outside
    with pytest.raises(BootPolicyInvalid, match="PCR 8 has never been measured"):
        verify_coverage({pcr: VALUES[pcr] for pcr in (4, 8, 9)}, BootPolicyInvalid)


# --- what is proven of an event ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "proof", "words"),
    [
        ("guest", 21, Proof.NAME, "unified kernel image: name of section .linux"),
        ("guest", 22, Proof.NONE, "unified kernel image: contents of section .linux"),
        ("guest", 31, Proof.NONE, "tagged measurement: Linux initrd"),
        ("rhel9-shim-grub", 4, Proof.DATA, "variable of secure boot: SecureBoot, 1 bytes"),
        ("rhel9-shim-grub", 28, Proof.DATA, "authority of a signed program: SbatLevel, 18 bytes"),
        ("rhel9-shim-grub", 32, Proof.NONE, "boot program \\EFI\\redhat\\grubx64.efi"),
        ("rhel9-shim-grub", 86, Proof.TEXT, "boot loader's measurement: grub_cmd: set gfxpayload=keep"),
        (
            "rhel9-shim-grub",
            94,
            Proof.NONE,
            INITRAMFS,
        ),
        ("rhel8-secure-boot", 70, Proof.TEXT, "boot loader's measurement: grub_cmd load_video"),
        ("fedora37-systemd-boot", 23, Proof.DATA, "boot loader's measurement:  console=ttyS0 console=tty0 efi=debug "),
    ],
)
def test_an_event_in_words(name: str, number: int, proof: Proof, words: str) -> None:
    (event,) = [event for event in parse_event_log(REAL[name]).events if event.number == number]
    assert (prove(event), describe(event)) == (proof, words)


@pytest.mark.parametrize("name", AGILE)
def test_data_of_which_a_byte_was_changed_is_proven_no_more(name: str) -> None:
    log = parse_event_log(REAL[name])
    proven = [event for event in log.events if prove(event) is Proof.DATA]
    assert len(proven) > 5
    for event in proven:
        for place in range(0, len(event.data), 1 + len(event.data) // 64):
            changed = bytearray(event.data)
            changed[place] ^= 1
            assert prove(dataclasses.replace(event, data=bytes(changed))) is Proof.NONE


# --- hostile logs -----------------------------------------------------------------------------------------------------


def read(data: bytes) -> EventLog | None:
    """The log, read to the end and put into words; None if it is refused as ours."""
    try:
        log = parse_event_log(data)
        replay(log)
    except EventLogInvalid:
        return None
    assert all(describe(event) is not None and prove(event) for event in log.events)
    return log


@pytest.mark.parametrize("name", ["guest", "fedora37-systemd-boot", "sha1-only"])
def test_every_byte_changed_gives_a_log_or_our_error(name: str) -> None:
    good, other = REAL[name], 0
    values = None if name == "sha1-only" else replay(parse_event_log(good))
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 0x81
        log = read(bytes(changed))
        other += log is None or replay(log) != values
    # Only types, data and the header's own words are not covered by the values.
    assert other > len(good) // 8


@pytest.mark.parametrize("name", sorted(REAL))
def test_a_log_cut_short_ends_between_two_events_or_is_refused(name: str) -> None:
    whole = len(parse_event_log(REAL[name]).events)
    lengths = set()
    for end in range(0, len(REAL[name]), 7):
        log = None
        try:
            log = parse_event_log(REAL[name][:end])
        except EventLogInvalid:
            continue
        lengths.add(len(log.events))
    assert all(length < whole for length in lengths)


@given(changed_bytes(LOG) | st.binary(max_size=200))
def test_fuzz(data: bytes) -> None:
    log = read(data)
    assert log is None or len(log.events) < 20_000


@given(changed_bytes(REAL["fedora37-systemd-boot"]))
def test_fuzz_of_another(data: bytes) -> None:
    log = read(data)
    assert log is None or log.startup_locality in (0, 3, 4)


def header(sizes: bytes, count: int, vendor: bytes = b"\0", after: bytes = b"") -> bytes:
    data = b"Spec ID Event03\0" + bytes(4) + b"\0\x02\0\x02" + struct.pack("<I", count) + sizes + vendor + after
    return struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data


GOOD = header(struct.pack("<HH", 0x0B, 32), 1)


def event(pcr: int = 7, kind: int = 4, digests: bytes = struct.pack("<H", 0x0B) + bytes(32), count: int = 1) -> bytes:
    return struct.pack("<III", pcr, kind, count) + digests + struct.pack("<I", 4) + bytes(4)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (bytes(LIMIT_BYTES + 1), "larger than"),
        (b"\0" * 31, "ends inside"),
        (GOOD + b"\0", "ends inside"),
        (header(b"", 0), "0 algorithms"),
        (header(struct.pack("<HH", 0x0B, 32) * 9, 9), "9 algorithms"),
        (header(struct.pack("<HH", 0x0B, 32) * 2, 2), "unknown or twice"),
        (header(struct.pack("<HH", 0x0B, 31), 1), "unknown or twice"),
        (header(struct.pack("<HH", 0x99, 32), 1), "unknown or twice"),
        (header(struct.pack("<HH", 0x0B, 32), 1, vendor=b"\x05ab"), "ends inside"),
        (header(struct.pack("<HH", 0x0B, 32), 1, after=b"x"), "bytes after its end"),
        (header(struct.pack("<HH", 0x0B, 32), 0xFFFFFFFF), "algorithms"),
        (GOOD + event(pcr=24), "PCR 24"),
        (GOOD + event(pcr=0xFFFFFFFF), "which there is not"),
        (GOOD + event(count=0, digests=b""), "one digest for each bank"),
        (GOOD + event(count=0xFFFFFFFF), "one digest for each bank"),
        (GOOD + event(digests=struct.pack("<H", 0x04) + bytes(20)), "unknown or twice"),
        (GOOD + event()[:-8] + b"\xff\xff\xff\xff" + bytes(4), "ends inside"),
        (GOOD + event() * 20_000, "more than 20000 events"),
    ],
)
def test_what_is_no_log_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(EventLogInvalid, match=why) as refused:
        parse_event_log(data)
    assert refused.value.code == 28
    assert "\n" not in refused.value.message


def test_a_digest_twice_and_a_bank_left_out_are_refused() -> None:
    two = header(struct.pack("<HHHH", 0x04, 20, 0x0B, 32), 2)
    twice = (struct.pack("<H", 0x0B) + bytes(32)) * 2
    with pytest.raises(EventLogInvalid, match="unknown or twice"):
        parse_event_log(two + event(digests=twice, count=2))
    with pytest.raises(EventLogInvalid, match="one digest for each bank"):
        parse_event_log(two + event())


def locality(number: int) -> bytes:
    data = b"StartupLocality\0" + bytes([number])
    return struct.pack("<III", 0, 3, 1) + struct.pack("<H", 0x0B) + bytes(32) + struct.pack("<I", 17) + data


def test_the_startup_locality_is_where_pcr_0_begins() -> None:
    measured = event(pcr=0)
    for number in (0, 3, 4):
        log = parse_event_log(GOOD + locality(number) + measured)
        assert replay(log) == {0: hashlib.sha256(bytes(31) + bytes([number]) + bytes(32)).digest()}
    for wrong in (locality(1), locality(255), locality(3) + locality(4)):
        with pytest.raises(EventLogInvalid, match="startup locality"):
            parse_event_log(GOOD + wrong)


def test_pcrs_of_a_dynamic_launch_begin_with_ones() -> None:
    assert replay(parse_event_log(GOOD + event(pcr=17))) == {17: extend(b"\xff" * 32, bytes(32))}
    assert initial_value(17) == b"\xff" * 32
    assert initial_value(23) == bytes(32)
