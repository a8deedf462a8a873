"""Programs for UEFI: digests as osslsigncode computes them, sections as systemd-measure does, and files that lie."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given

from oci_hook.attestation.event_log import extend
from oci_hook.attestation.pe_image import authenticode_digest, parse_pe_image, stub_version, unified_sections
from oci_hook.key_errors import EventLogInvalid
from tests.attestation_vectors import changed_bytes
from tests.boot_images import SECTIONS, STUB, write_unified_image

BOOT_LOADER = STUB.with_name("systemd-bootx64.efi")
SYSTEMD_MEASURE = "/usr/lib/systemd/systemd-measure"
STUB_BYTES = STUB.read_bytes()


def signed(path: Path, folder: Path) -> tuple[Path, str]:
    """The program, signed by osslsigncode, and the digest that it says it signed."""
    key, certificate, out = folder / "key.pem", folder / "certificate.pem", folder / f"signed-{path.name}"
    if not key.exists():
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests", "-days", "2"]
        subprocess.run([*words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    words = ["osslsigncode", "sign", "-h", "sha256", "-certs", certificate, "-key", key, "-in", path, "-out", out]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    said = subprocess.run(["osslsigncode", "verify", "-in", out], check=False, capture_output=True, text=True).stdout
    found = re.search(r"Calculated message digest\s*: ([0-9A-F]{64})", said)
    assert found
    return out, found[1].lower()


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unified_image(tmp_path_factory.mktemp("unified") / "image.efi", SECTIONS)


@pytest.mark.parametrize("which", ["stub", "boot loader", "unified"])
def test_osslsigncode_computes_the_same_digest(which: str, unified: Path, tmp_path: Path) -> None:
    path = {"stub": STUB, "boot loader": BOOT_LOADER, "unified": unified}[which]
    out, digest = signed(path, tmp_path)
    image = parse_pe_image(out.read_bytes())
    assert image.certificate_bytes > 0
    assert authenticode_digest(image).hex() == digest
    # A signature changes nothing in what is measured but the padding to eight bytes before it.
    padded = path.read_bytes() + bytes(-path.stat().st_size % 8)
    assert authenticode_digest(parse_pe_image(padded)).hex() == digest


def test_checksum_and_certificates_are_not_measured_and_all_else_is() -> None:
    image = parse_pe_image(STUB_BYTES)
    good = authenticode_digest(image)
    for place in range(image.checksum, image.checksum + 4):
        assert authenticode_digest(parse_pe_image(flipped(place))) == good
    for place in (2, image.checksum + 4, image.header_bytes, len(STUB_BYTES) - 1):
        assert authenticode_digest(parse_pe_image(flipped(place))) != good
    assert authenticode_digest(parse_pe_image(STUB_BYTES + b"x")) != good


def flipped(place: int) -> bytes:
    changed = bytearray(STUB_BYTES)
    changed[place] ^= 1
    return bytes(changed)


def test_systemd_measure_computes_the_same_value(unified: Path, tmp_path: Path) -> None:
    sections = unified_sections(parse_pe_image(unified.read_bytes()))
    assert [name for name, _contents in sections] == [".linux", ".osrel", ".cmdline", ".initrd", ".pcrpkey"]
    assert dict(sections) == SECTIONS
    value = bytes(32)
    for name, contents in sections:
        value = extend(extend(value, hashlib.sha256(name.encode() + b"\0").digest()), hashlib.sha256(contents).digest())
    words = [SYSTEMD_MEASURE, "calculate", "--bank=sha256", "--phase=:"]
    for name, contents in SECTIONS.items():
        (tmp_path / name).write_bytes(contents)
        words.append(f"--{name[1:]}={tmp_path / name}")
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"11:sha256=([0-9a-f]{64})", said) == [value.hex()]


def test_the_stub_says_its_version_and_alone_is_no_unified_image() -> None:
    image = parse_pe_image(STUB_BYTES)
    version = stub_version(image)
    assert version is not None
    assert version >= 252
    with pytest.raises(EventLogInvalid, match="no kernel"):
        unified_sections(image)
    with pytest.raises(EventLogInvalid, match="no unified kernel image"):
        unified_sections(parse_pe_image(BOOT_LOADER.read_bytes()))


@pytest.mark.parametrize(
    ("version", "measured"),
    [(b"252", False), (b"254", True), (b"257", True), (b"253", None), (b"251", None), (b"x", None)],
)
def test_what_is_measured_is_the_stubs_version(unified: Path, version: bytes, measured: bool | None) -> None:
    old = str(stub_version(parse_pe_image(STUB_BYTES))).encode()
    data = unified.read_bytes().replace(b"systemd-stub " + old, b"systemd-stub " + version.ljust(3))
    image = parse_pe_image(data)
    if measured is None:
        with pytest.raises(EventLogInvalid, match="no unified kernel image"):
            unified_sections(image)
    else:
        assert (".sbat" in dict(unified_sections(image))) is measured


@pytest.mark.parametrize(("extra", "why"), [(".profile", "chooses at boot"), (".linux", "twice")])
def test_an_image_with_variants_is_refused(unified: Path, extra: str, why: str, tmp_path: Path) -> None:
    parts = tmp_path / "part"
    parts.write_bytes(b"ID=other\n")
    out = tmp_path / "image.efi"
    words = ["objcopy", "--add-section", f".zz={parts}", "--set-section-flags", ".zz=data,readonly"]
    subprocess.run([*words, "--change-section-vma", ".zz=0x40000000", unified, out], check=True)
    data = out.read_bytes().replace(b".zz\0\0\0\0\0", extra.encode().ljust(8, b"\0"))
    with pytest.raises(EventLogInvalid, match=why):
        unified_sections(parse_pe_image(data))


# --- files that lie ---------------------------------------------------------------------------------------------------

_START = struct.unpack_from("<I", STUB_BYTES, 0x3C)[0]


def with_number(place: int, value: int, size: int = 4) -> bytes:
    return STUB_BYTES[:place] + value.to_bytes(size, "little") + STUB_BYTES[place + size :]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends inside"),
        (b"#!/bin/sh\n" * 20, "no program for UEFI"),
        (STUB_BYTES[:100], "no program|ends inside"),
        (STUB_BYTES[:0x11200], "outside"),
        (with_number(0x3C, 0xFFFFFFFF), "no program"),
        (with_number(_START + 6, 0, 2), "impossible table"),
        (with_number(_START + 6, 97, 2), "impossible table"),
        (with_number(_START + 24, 0x107, 2), "neither PE32"),
        (with_number(_START + 24 + 108, 4), "no entry for certificates"),
        (with_number(_START + 24 + 60, 0xFFFFFFFF), "impossible table"),
        (with_number(_START + 24 + 112 + 36, 64), "behind its certificates"),
        (with_number(_START + 24 + 240 + 20, 0xFFFFFFF0), "overlap"),
        (with_number(_START + 24 + 240 + 40 + 20, 0x400), "overlap"),
    ],
)
def test_what_is_no_program_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(EventLogInvalid, match=why) as refused:
        parse_pe_image(data)
    assert refused.value.code == 28


@given(changed_bytes(STUB_BYTES[:2048]))
def test_fuzzed_headers_give_a_digest_or_our_error(head: bytes) -> None:
    try:
        image = parse_pe_image(head + STUB_BYTES[2048:])
        unified_sections(image)
    except EventLogInvalid:
        return
    assert len(authenticode_digest(image)) == 32


def test_the_tools_are_here() -> None:
    assert shutil.which("osslsigncode")
    assert Path(SYSTEMD_MEASURE).exists()
