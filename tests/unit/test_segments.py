"""`bundle.segments`: the vectors, real Tink both ways, and the plan."""

from __future__ import annotations

import io
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tink import core, proto_keyset_format, secret_key_access, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from oci_hook.bundle import segments
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.segments import (
    FIRST_PLAINTEXT_BYTES,
    HEADER_BYTES,
    PLAINTEXT_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    ContentKey,
    associated_data,
    ciphertext_size,
    decrypt_stream,
    encrypt_stream,
    plan_decryption,
)
from oci_hook.errors import DecryptionRefused, SourceInvalid
from tests.bundles import digest_of, load_vectors, value_or_none
from tests.vectors.bundle.files import build, place_data, plaintext

FILES = load_vectors("file")
AAD = associated_data(ModelId("demo", "v1", 1), "weights/model.safetensors")
SIZES = [
    0,
    1,
    FIRST_PLAINTEXT_BYTES - 1,
    FIRST_PLAINTEXT_BYTES,
    FIRST_PLAINTEXT_BYTES + 1,
    FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES - 1,
    FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES,
    FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES + 1,
    3 * SEGMENT_BYTES + 12345,
]


def encrypt(data: bytes, key: bytes, *, aad: bytes = AAD, claimed: int | None = None) -> bytes:
    sealed = io.BytesIO()
    encrypt_stream(
        io.BytesIO(data).read,
        sealed.write,
        content_key=ContentKey(key),
        associated_data=aad,
        salt=os.urandom(32),
        nonce_prefix=os.urandom(7),
        plaintext_bytes=len(data) if claimed is None else claimed,
    )
    return sealed.getvalue()


def decrypt(data: bytes, key: bytes, size: int, *, aad: bytes = AAD, ciphertext_bytes: int | None = None) -> bytes:
    plain = io.BytesIO()
    decrypt_stream(
        io.BytesIO(data).read,
        plain.write,
        content_key=ContentKey(key),
        associated_data=aad,
        ciphertext_bytes=len(data) if ciphertext_bytes is None else ciphertext_bytes,
        plaintext_bytes=size,
    )
    return plain.getvalue()


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_vector(name: str) -> None:
    vector = FILES[name]
    sealed = build(vector)
    assert digest_of(sealed) == vector["sha256"]
    read = vector["read"]
    arguments: tuple[Any, ...] = (sealed, bytes.fromhex(read["key"]), read["bytes"])
    if vector["expect"] is None:
        assert decrypt(*arguments, aad=place_data(read)) == plaintext(read["bytes"])
        return
    assert vector["expect"] == "DecryptionRefused"
    with pytest.raises(DecryptionRefused):
        decrypt(*arguments, aad=place_data(read))


# Tink knows no size from elsewhere, and stops at the segment that is marked as the last one, whatever follows.
REFUSED_BY_US_ALONE = {
    "file-empty-last-segment",
    "file-extended-by-a-segment",
    "file-extended-by-a-segment-and-size-too",
    "file-size-larger",
    "file-size-negative",
    "file-size-smaller",
}


@pytest.mark.parametrize("name", [name for name, vector in FILES.items() if vector["expect"]])
def test_tink_refuses_the_same_vectors(name: str) -> None:
    """A vector is broken by itself, not by our reader; the list says where we are stricter than the format."""
    vector = FILES[name]
    sealed, read = build(vector), vector["read"]
    try:
        tink_decrypt(sealed, bytes.fromhex(read["key"]), place_data(read))
    except (core.TinkError, OSError):
        accepted = False
    else:
        accepted = True
    assert accepted == (name in REFUSED_BY_US_ALONE)


# --- real Tink --------------------------------------------------------------------------------------------------------


class Kept(io.BytesIO):
    """Tink closes what it wrote to."""

    def close(self) -> None:
        pass


def tink_primitive(key: bytes) -> streaming_aead.StreamingAead:
    """Tink's own AES256_GCM_HKDF_1MB with this key."""
    streaming_aead.register()
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    proto = aes_gcm_hkdf_streaming_pb2
    format_ = proto.AesGcmHkdfStreamingKeyFormat.FromString(template.value)
    assert (format_.params.ciphertext_segment_size, format_.params.derived_key_size) == (SEGMENT_BYTES, 32)
    assert format_.params.hkdf_hash_type == common_pb2.SHA256
    keyset = tink_pb2.Keyset(primary_key_id=1)
    entry = keyset.key.add(key_id=1, status=tink_pb2.ENABLED, output_prefix_type=tink_pb2.RAW)
    entry.key_data.type_url = template.type_url
    message = proto.AesGcmHkdfStreamingKey(version=0, key_value=key, params=format_.params)
    entry.key_data.value = message.SerializeToString()
    entry.key_data.key_material_type = tink_pb2.KeyData.SYMMETRIC
    handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def tink_encrypt(data: bytes, key: bytes, aad: bytes) -> bytes:
    sealed = Kept()
    with tink_primitive(key).new_encrypting_stream(sealed, aad) as stream:
        stream.write(data)
    return sealed.getvalue()


def tink_decrypt(data: bytes, key: bytes, aad: bytes) -> bytes:
    with tink_primitive(key).new_decrypting_stream(io.BytesIO(data), aad) as stream:
        return bytes(stream.read())


@pytest.mark.parametrize("size", SIZES)
def test_tink_reads_what_we_write(size: int) -> None:
    data, key = os.urandom(size), os.urandom(32)
    sealed = encrypt(data, key)
    assert len(sealed) == ciphertext_size(size)
    assert tink_decrypt(sealed, key, AAD) == data


@pytest.mark.parametrize("size", SIZES)
def test_we_read_what_tink_writes(size: int) -> None:
    data, key = os.urandom(size), os.urandom(32)
    sealed = tink_encrypt(data, key, AAD)
    assert len(sealed) == ciphertext_size(size)
    assert decrypt(sealed, key, size) == data


# --- the plan ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5 * SEGMENT_BYTES) | st.sampled_from(SIZES) | st.integers(0, 2**48))
def test_the_plan_covers_everything_once(size: int) -> None:
    plan = plan_decryption(
        bytes([40]) + bytes(39),
        content_key=ContentKey(bytes(32)),
        associated_data=AAD,
        ciphertext_bytes=ciphertext_size(size),
        plaintext_bytes=size,
    )
    assert plan.ciphertext_bytes == HEADER_BYTES + size + TAG_BYTES * plan.segments
    first, last = plan.segment(0), plan.segment(plan.segments - 1)
    assert (first.offset_ciphertext, first.offset_plaintext) == (HEADER_BYTES, 0)
    assert last.offset_ciphertext + last.length_ciphertext == plan.ciphertext_bytes
    assert last.offset_plaintext + last.length_plaintext == size
    assert last.nonce[-1] == 1
    assert size == 0 or last.length_plaintext > 0
    for number in range(min(plan.segments - 1, 8)):
        here, after = plan.segment(number), plan.segment(number + 1)
        assert here.nonce == bytes(7) + number.to_bytes(4, "big") + b"\0"
        assert here.length_ciphertext == here.length_plaintext + TAG_BYTES
        assert (
            here.offset_ciphertext + here.length_ciphertext == after.offset_ciphertext == (number + 1) * SEGMENT_BYTES
        )
        assert here.offset_plaintext + here.length_plaintext == after.offset_plaintext
    for wrong in (-1, plan.segments):
        with pytest.raises(IndexError):
            plan.segment(wrong)


@pytest.mark.parametrize(
    ("header", "ciphertext_bytes", "plaintext_bytes"),
    [
        (bytes([40]) + bytes(38), 156, 100),
        (bytes([40]) + bytes(40), 156, 100),
        (bytes([41]) + bytes(39), 156, 100),
        (bytes([40]) + bytes(39), 155, 100),
        (bytes([40]) + bytes(39), 157, 100),
        (bytes([40]) + bytes(39), 156, 99),
        (bytes([40]) + bytes(39), 40, -16),
        (bytes([40]) + bytes(39), 2 * SEGMENT_BYTES + 16, FIRST_PLAINTEXT_BYTES + PLAINTEXT_BYTES),
        (bytes([40]) + bytes(39), ciphertext_size(2**48 + 1), 2**48 + 1),
    ],
)
def test_headers_and_sizes_that_do_not_belong_together(
    header: bytes, ciphertext_bytes: int, plaintext_bytes: int
) -> None:
    """The hot path of delivery relies on the plan alone."""
    with pytest.raises(DecryptionRefused):
        plan_decryption(
            header,
            content_key=ContentKey(bytes(32)),
            associated_data=AAD,
            ciphertext_bytes=ciphertext_bytes,
            plaintext_bytes=plaintext_bytes,
        )


@given(st.binary(max_size=80) | st.just(bytes([40] * 40)), st.integers(-10, 200), st.integers(-10, 200))
def test_any_header_and_size(header: bytes, ciphertext_bytes: int, plaintext_bytes: int) -> None:
    plan = value_or_none(
        lambda: plan_decryption(
            header,
            content_key=ContentKey(bytes(32)),
            associated_data=b"",
            ciphertext_bytes=ciphertext_bytes,
            plaintext_bytes=plaintext_bytes,
        ),
        DecryptionRefused,
    )
    assert plan is None or (len(header) == 40 and ciphertext_bytes == plaintext_bytes + 56)


@given(st.binary(max_size=200), st.integers(0, 150))
def test_any_ciphertext(data: bytes, size: int) -> None:
    assert value_or_none(lambda: decrypt(data, bytes(32), size), DecryptionRefused) is None


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_secrets_are_not_shown() -> None:
    key = ContentKey(b"\xab" * 32)
    plan = plan_decryption(
        bytes([40]) + b"\xcd" * 39,
        content_key=key,
        associated_data=AAD,
        ciphertext_bytes=ciphertext_size(1),
        plaintext_bytes=1,
    )
    for secret in (key, plan, [key], plan.segment(0), f"{key}", f"{plan!s}"):
        shown = repr(secret)
        assert "\\xab" not in shown
        assert "\\xcd" not in shown
        assert repr(plan.file_key) not in shown
    with pytest.raises(ValueError):
        ContentKey(b"short")


def test_the_associated_data_is_the_specification_s() -> None:
    expected = b"scz-smm/file/v1\0demo\0v1\0weights/model.safetensors"
    assert expected == AAD


@pytest.mark.parametrize("claimed", [99, 101])
def test_a_source_that_changes_is_refused(claimed: int) -> None:
    with pytest.raises(SourceInvalid):
        encrypt(bytes(100), bytes(32), claimed=claimed)


def test_a_ciphertext_that_changes_is_refused() -> None:
    sealed = encrypt(bytes(100), bytes(32))
    for changed in (sealed + b"\0", sealed[:-1]):
        with pytest.raises(DecryptionRefused):
            decrypt(changed, bytes(32), 100, ciphertext_bytes=len(sealed))


def test_short_reads_are_put_together() -> None:
    data, key = os.urandom(300_000), os.urandom(32)
    sealed = io.BytesIO(encrypt(data, key))
    plain = io.BytesIO()
    decrypt_stream(
        lambda size: sealed.read(min(size, 7777)),
        plain.write,
        content_key=ContentKey(key),
        associated_data=AAD,
        ciphertext_bytes=ciphertext_size(len(data)),
        plaintext_bytes=len(data),
    )
    assert plain.getvalue() == data


@pytest.mark.parametrize(("salt", "prefix", "size"), [(31, 7, 0), (32, 8, 0), (32, 7, -1), (32, 7, 2**48 + 1)])
def test_our_own_mistakes_are_value_errors(salt: int, prefix: int, size: int) -> None:
    with pytest.raises(ValueError):
        encrypt_stream(
            io.BytesIO().read,
            io.BytesIO().write,
            content_key=ContentKey(bytes(32)),
            associated_data=b"",
            salt=bytes(salt),
            nonce_prefix=bytes(prefix),
            plaintext_bytes=size,
        )


def test_memory_is_flat() -> None:
    """40 MiB through the stream, at most a few buffers of it in memory."""
    size, block = 40 * 2**20, bytes(2**20)
    left = size

    def read(wanted: int) -> bytes:
        nonlocal left
        piece = block[: min(wanted, left)]
        left -= len(piece)
        return piece

    written = 0

    def write(data: memoryview) -> None:
        nonlocal written
        written += len(data)

    tracemalloc.start()
    try:
        encrypt_stream(
            read,
            write,
            content_key=ContentKey(bytes(32)),
            associated_data=b"",
            salt=bytes(32),
            nonce_prefix=bytes(7),
            plaintext_bytes=size,
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written == ciphertext_size(size)
    assert peak < 6 * segments.SEGMENT_BYTES
