"""attestation.structures: public areas and NV public areas, their Names, what is not known, and fuzz."""

from __future__ import annotations

import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.structures import (
    STRUCTURE_LIMIT_BYTES,
    NvAttributes,
    ObjectAttributes,
    Reader,
    ecdsa_signing_public,
    parse_nv_public,
    parse_public,
    tpm2b,
)
from oci_hook.errors import DeviceInvalid
from tests.attestation_vectors import changed_bytes, public_of, t, value_or_ours

P256, RSA_KEY = t.p256(), rsa.generate_private_key(65537, 2048)
AK = t.ecc_public(P256, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
SRK = t.ecc_public(P256, t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)
EK = t.rsa_public(RSA_KEY, t.EK_ATTRIBUTES, policy=bytes(range(32)), symmetric=t.AES_128_CFB)
SEALED = struct.pack(">HHI", t.KEYEDHASH, t.SHA256, t.NO_DA) + tpm2b(bytes(32)) + struct.pack(">H", t.NULL) + tpm2b(b"")
COUNTER = t.nv_public(0x01812345)


def parse(raw: bytes):
    return parse_public(raw, what="a key", error=DeviceInvalid)


def parse_nv(raw: bytes):
    return parse_nv_public(raw, what="an index", error=DeviceInvalid)


def test_ecc() -> None:
    public = public_of(AK)
    assert (public.kind, public.curve, public.symmetric, public.scheme) == ("ecc", 3, None, (0x18, 0x0B))
    assert public.attributes == t.AK_ATTRIBUTES
    assert public.attributes & ObjectAttributes.SIGN
    assert public.key() == P256.public_key()
    assert public.raw == AK
    assert public.marshalled == tpm2b(AK)
    assert public_of(SRK).symmetric == (6, 128, 0x43)


def test_rsa_and_its_default_exponent() -> None:
    public = public_of(EK)
    assert (public.kind, public.curve, public.auth_policy) == ("rsa", None, bytes(range(32)))
    assert public.key() == RSA_KEY.public_key()
    assert public_of(t.rsa_public(RSA_KEY, t.EK_ATTRIBUTES, exponent=65537)).key() == RSA_KEY.public_key()


def test_keyed_hash_has_no_key() -> None:
    public = public_of(SEALED)
    assert (public.kind, public.attributes) == ("keyedhash", ObjectAttributes.NO_DA)
    with pytest.raises(TypeError):
        public.key()


@pytest.mark.parametrize("raw", [AK, SRK, EK, SEALED])
def test_name_is_the_algorithm_and_the_digest_of_the_public_area(raw: bytes) -> None:
    public = public_of(raw)
    name = bytes.fromhex("000b") + hashlib.sha256(raw).digest()
    assert public.name == name
    qualified = bytes.fromhex("000b") + hashlib.sha256(bytes.fromhex("4000000b") + name).digest()
    assert public.qualified_name_in_endorsement == qualified


def test_name_with_sha384() -> None:
    raw = t.ecc_public(P256, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256, name_alg=t.SHA384)
    assert public_of(raw).name == bytes.fromhex("000c") + hashlib.sha384(raw).digest()


def test_boot_policy_key_as_the_specification_fixes_it() -> None:
    key = ec.derive_private_key(1, ec.SECP256R1())  # the public key is the curve's base point, in every textbook
    x = "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    y = "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
    head = "0023000b00040040000000100018000b00030010"
    made = ecdsa_signing_public(key.public_key())
    assert made.hex() == f"{head}0020{x}0020{y}"
    public = public_of(made)
    assert public.attributes == ObjectAttributes.SIGN | ObjectAttributes.USER_WITH_AUTH
    assert public.key() == key.public_key()
    with pytest.raises(ValueError):
        ecdsa_signing_public(ec.generate_private_key(ec.SECP384R1()).public_key())


def test_nv_public_and_its_name() -> None:
    index = parse_nv(tpm2b(COUNTER))
    assert (index.index, index.data_size, index.auth_policy) == (0x01812345, 8, b"")
    assert index.attributes & NvAttributes.WRITTEN
    assert index.name == bytes.fromhex("000b") + hashlib.sha256(COUNTER).digest()
    assert index.marshalled == tpm2b(COUNTER)
    unwritten = t.nv_public(0x01812345, t.COUNTER_ATTRIBUTES & ~t.NV_WRITTEN)
    assert parse_nv(tpm2b(unwritten)).name != index.name


# --- what is refused --------------------------------------------------------------------------------------------------


def replaced(raw: bytes, offset: int, value: int, size: int = 2) -> bytes:
    return raw[:offset] + value.to_bytes(size, "big") + raw[offset + size :]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (replaced(AK, 0, 0x0025), "unknown type 0x0025"),
        (replaced(AK, 2, 0x0004), "unknown hash algorithm 0x0004"),
        (replaced(AK, 2, 0x0010), "unknown hash algorithm 0x0010"),
        (replaced(AK, 12, 0x001A), "unknown scheme 0x001a"),
        (replaced(AK, 14, 0x0004), "unknown hash algorithm 0x0004"),
        (replaced(AK, 16, 0x0001), "unknown curve 0x0001"),
        (replaced(AK, 18, 0x0099), "unknown key derivation 0x0099"),
        (replaced(AK, 20, 0x0021), "field of 33 bytes, more than 32"),
        (t.flipped(AK), "point that is not on its curve"),
        (AK[:22] + bytes(32) + AK[54:56] + bytes(32), "point that is not on its curve"),
        (AK[:22] + b"\xff" * 32 + AK[54:], "point that is not on its curve"),
        (AK[:-1], "ends too early"),
        (AK + b"\0", "bytes after its end"),
        (AK[:9], "ends too early"),
        (b"", "ends too early"),
        (replaced(AK, 8, 65), "field of 65 bytes, more than 64"),
        (replaced(EK, 50, 1024), "RSA key of another size"),
        (replaced(EK, 50, 4096), "RSA key of another size"),
        (replaced(EK, 52, 2, 4), "is not an RSA key"),
        (replaced(EK, 52, 1, 4), "is not an RSA key"),
        (replaced(SEALED, 42, 0x0005), "keyed-hash object with a scheme"),
    ],
)
def test_public_refused(raw: bytes, says: str) -> None:
    with pytest.raises(DeviceInvalid, match=says):
        parse(tpm2b(raw))


def test_small_rsa_keys_are_refused() -> None:
    small = rsa.generate_private_key(65537, 1024)
    with pytest.raises(DeviceInvalid, match="RSA key of another size"):
        parse(tpm2b(t.rsa_public(small, t.EK_ATTRIBUTES)))


@pytest.mark.parametrize("parser", [parse, parse_nv])
def test_the_size_must_be_that_of_what_follows(parser) -> None:
    raw = AK if parser is parse else COUNTER
    for data in (tpm2b(raw)[:-1], tpm2b(raw) + b"\0", b"", b"\0", b"\0\0", raw, bytes(2) + raw):
        with pytest.raises(DeviceInvalid):
            parser(data)
    with pytest.raises(DeviceInvalid, match="longer than 4096 bytes"):
        parser(tpm2b(bytes(STRUCTURE_LIMIT_BYTES)))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (t.nv_public(1)[:-1], "ends too early"),
        (t.nv_public(1) + b"\0", "bytes after its end"),
        (replaced(COUNTER, 4, 0x0012), "unknown hash algorithm 0x0012"),
        (replaced(COUNTER, 10, 65), "field of 65 bytes"),
    ],
)
def test_nv_public_refused(raw: bytes, says: str) -> None:
    with pytest.raises(DeviceInvalid, match=says):
        parse_nv(tpm2b(raw))


# --- fuzz -------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([AK, SRK, EK, SEALED]).flatmap(changed_bytes).map(tpm2b))
def test_fuzz_public(data: bytes) -> None:
    public = value_or_ours(parse, data)
    if public is not None:
        assert public.marshalled == data
        assert len(public.name) in (34, 50, 66)
        assert (public.public_key is None) == (public.kind == "keyedhash")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | changed_bytes(COUNTER).map(tpm2b))
def test_fuzz_nv_public(data: bytes) -> None:
    index = value_or_ours(parse_nv, data)
    if index is not None:
        assert index.marshalled == data
        assert 0 <= index.data_size <= 0xFFFF


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.lists(st.integers(0, 20), max_size=8))
def test_reader_takes_in_order_and_never_beyond_the_end(data: bytes, sizes: list[int]) -> None:
    def read(taken: bytes) -> bytes:
        reader = Reader(taken, what="bytes", error=DeviceInvalid)
        parts = [reader.take(size) for size in sizes]
        reader.finish()
        return b"".join(parts)

    made = value_or_ours(read, data)
    assert made == (data if sum(sizes) == len(data) else None)
