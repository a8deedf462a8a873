"""The event log: logs of real boots lead where the TPM was and where `tpm2_eventlog` says, and no byte changes unseen.

Forms that no boot here has (SHA-1 alone, another startup locality, older words of GRUB) are those of `tests.boot_logs`.
"""

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
from oci_hook.attestation.event_log import LIMIT_BYTES, SHA1, EventLog, extend, initial_value, parse_event_log, replay
from oci_hook.attestation.event_words import Proof, describe, prove, section_name, type_name
from oci_hook.errors import BootPolicyInvalid
from oci_hook.key_errors import EventLogInvalid
from tests.attestation_vectors import changed_bytes
from tests.boot_logs import KEPT_OPTIONS, boot_by_older_grub, kept_boot, older_form, started_from_locality
from tests.guest_image import STUB
from tests.software_tpm import SoftwareTpm

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "guest_boot"
LOG = (FOLDER / "event-log.bin").read_bytes()
VALUES = {int(pcr): bytes.fromhex(value) for pcr, value in json.loads((FOLDER / "pcrs.json").read_text()).items()}
SHIM_GRUB, SHIM_GRUB_VALUES = kept_boot("shim-grub")
SYSTEMD_BOOT, SYSTEMD_BOOT_VALUES = kept_boot("systemd-boot")
BOOTED = {
    "guest": (LOG, VALUES),
    "shim-grub": (SHIM_GRUB, SHIM_GRUB_VALUES),
    "systemd-boot": (SYSTEMD_BOOT, SYSTEMD_BOOT_VALUES),
}
PARSED = parse_event_log(SHIM_GRUB)
LOGS = {name: log for name, (log, _values) in BOOTED.items()} | {
    "older-grub": boot_by_older_grub(PARSED.events[:29], STUB.read_bytes(), b"initrd", "root=/dev/vda1 ro"),
    "startup-locality": started_from_locality(PARSED, 3),
    "sha1-only": older_form(PARSED),
}
AGILE = sorted(set(LOGS) - {"sha1-only"})
BY_LINUX = 10
INITRD = "boot loader's measurement: /initrd.img-6.1.0-56-amd64"
OPTIONS = f"initrd=\\initrd.img-6.1.0-56-amd64 root=/dev/vda1 ro {KEPT_OPTIONS}"


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
    path.write_bytes(LOGS[name])
    events, values = by_tpm2_eventlog(path)
    log = parse_event_log(LOGS[name])
    assert [(event.pcr, type_name(event.kind), event.digest.hex()) for event in log.events] == events
    ours = hexadecimal(replay(log))
    if log.startup_locality:  # which that program leaves out
        del ours[0], values[0]
    assert ours == values


@pytest.mark.parametrize("name", sorted(BOOTED))
def test_the_log_leads_to_the_values(name: str) -> None:
    log, values = BOOTED[name]
    measured = {pcr: value for pcr, value in values.items() if any(value) and pcr != BY_LINUX}
    assert {pcr: value for pcr, value in replay(parse_event_log(log)).items() if pcr != BY_LINUX} == measured


def test_a_log_of_several_banks_is_read_whole() -> None:
    log = parse_event_log(SYSTEMD_BOOT)
    assert sorted(log.algorithms) == [0x0004, 0x000B, 0x000C]
    for event in log.events:
        if prove(event) is Proof.DATA:
            assert event.digests[0x000C] == hashlib.sha384(event.data).digest()


def test_a_tpm_that_was_started_from_another_locality_has_the_value_of_the_log(tmp_path: Path) -> None:
    log = parse_event_log(LOGS["startup-locality"])
    digests = [event.digest for event in log.events if event.is_measured and event.pcr == 0]
    with SoftwareTpm(tmp_path / "tpm", certified=False) as tpm:
        tpm.restart(locality=log.startup_locality)
        for digest in digests:
            tpm.extend_digest(0, digest)
        words = ["tpm2_pcrread", "sha256:0", "-T", tpm.tcti, "-Q", "-o", tmp_path / "value"]
        subprocess.run(words, check=True)
    assert (log.startup_locality, replay(log)[0]) == (3, (tmp_path / "value").read_bytes())
    assert replay(log)[0] != SHIM_GRUB_VALUES[0]


def test_a_log_of_the_older_form_is_told_as_such_and_has_no_values() -> None:
    log = parse_event_log(LOGS["sha1-only"])
    assert (log.is_crypto_agile, log.algorithms, len(log.events)) == (False, (0x0004,), len(PARSED.events))
    with pytest.raises(EventLogInvalid, match="no SHA-256") as refused:
        replay(log)
    assert "SHA-256 bank" in refused.value.advice
    assert {prove(event) for event in log.events} == {Proof.NONE}


def test_tpm2_eventlog_reads_the_older_form_as_we_do(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    path.write_bytes(LOGS["sha1-only"])
    said = subprocess.run(["tpm2_eventlog", path], capture_output=True, text=True, check=True).stdout
    theirs = re.findall(r'PCRIndex: (\d+)\n  EventType: (\S+)\n[^"]*sha1\n    Digest: "([0-9a-f]{40})"', said)
    ours = [
        (str(event.pcr), type_name(event.kind), event.digests[SHA1].hex())
        for event in parse_event_log(LOGS["sha1-only"]).events
    ]
    assert theirs == ours


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
        ("shim-grub", 4, Proof.DATA, "variable of secure boot: SecureBoot, 1 bytes"),
        ("shim-grub", 11, Proof.VALUE, "boot variable: Boot0001, 78 bytes"),
        ("older-grub", 11, Proof.DATA, "boot variable: Boot0001, 78 bytes"),
        ("shim-grub", 26, Proof.DATA, "authority of a signed program: SbatLevel, 32 bytes"),
        ("shim-grub", 27, Proof.NONE, "boot loader's measurement: MokListTrusted"),
        ("shim-grub", 29, Proof.NONE, "boot program \\EFI\\BOOT\\grubx64.efi"),
        ("shim-grub", 36, Proof.TEXT, "boot loader's measurement: grub_cmd: set default=0"),
        ("shim-grub", 49, Proof.NONE, INITRD),
        ("older-grub", 30, Proof.DATA, "partition table"),
        ("older-grub", 32, Proof.TEXT, "boot loader's measurement: grub_cmd load_video"),
        ("systemd-boot", 24, Proof.DATA, f"boot loader's measurement: {OPTIONS}"),
        ("systemd-boot", 26, Proof.NONE, "tagged measurement: Linux initrd"),
    ],
)
def test_an_event_in_words(name: str, number: int, proof: Proof, words: str) -> None:
    (event,) = [event for event in parse_event_log(LOGS[name]).events if event.number == number]
    assert (prove(event), describe(event)) == (proof, words)


@pytest.mark.parametrize("name", AGILE)
def test_data_of_which_a_byte_was_changed_is_proven_no_more(name: str) -> None:
    log = parse_event_log(LOGS[name])
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


@pytest.mark.parametrize("name", ["guest", "systemd-boot", "sha1-only"])
def test_every_byte_changed_gives_a_log_or_our_error(name: str) -> None:
    good, other = LOGS[name], 0
    values = None if name == "sha1-only" else replay(parse_event_log(good))
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 0x81
        log = read(bytes(changed))
        other += log is None or replay(log) != values
    # Only types, data and the header's own words are not covered by the values.
    assert other > len(good) // 8


@pytest.mark.parametrize("name", sorted(LOGS))
def test_a_log_cut_short_ends_between_two_events_or_is_refused(name: str) -> None:
    whole = len(parse_event_log(LOGS[name]).events)
    lengths = set()
    for end in range(0, len(LOGS[name]), 7):
        log = None
        try:
            log = parse_event_log(LOGS[name][:end])
        except EventLogInvalid:
            continue
        lengths.add(len(log.events))
    assert all(length < whole for length in lengths)


@given(changed_bytes(LOG) | st.binary(max_size=200))
def test_fuzz(data: bytes) -> None:
    log = read(data)
    assert log is None or len(log.events) < 20_000


@given(changed_bytes(LOGS["systemd-boot"]))
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
