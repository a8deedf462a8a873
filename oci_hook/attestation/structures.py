"""TPM structures as bytes: a bounded big-endian reader, public areas and NV public areas with their Names.

Frozen values out; neither a TPM nor tpm2_pytss. It knows the structures, not which of them are acceptable: that is
`key_checks`. Algorithms that it does not know are refused, not skipped. What a TPM signs is `attest`.
Specification: TPM 2.0 Library, Part 2, chapters 8 to 13; Part 1, chapter 16 (Names).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Final, Literal, NewType

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from oci_hook.errors import SczError

Handle = NewType("Handle", int)  # an ESYS_TR: number of an object, session or NV index within one open TPM

STRUCTURE_LIMIT_BYTES: Final = 4096  # far above any of these structures with the algorithms below
NAME_BYTES: Final = 34

# Part 2, 6.3 (TPM_ALG_ID), 6.4 (TPM_ECC_CURVE)
ALG_RSA: Final = 0x0001
ALG_AES: Final = 0x0006
ALG_KEYEDHASH: Final = 0x0008
ALG_SHA256: Final = 0x000B
ALG_NULL: Final = 0x0010
ALG_RSASSA: Final = 0x0014
ALG_RSAES: Final = 0x0015
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
ALG_CFB: Final = 0x0043
CURVE_P256: Final = 0x0003
_HASHES: Final = {ALG_SHA256: hashlib.sha256, 0x000C: hashlib.sha384, 0x000D: hashlib.sha512}
_CURVES: Final = {CURVE_P256: ec.SECP256R1(), 0x0004: ec.SECP384R1(), 0x0005: ec.SECP521R1()}
_SCHEMES_WITH_HASH: Final = frozenset({0x0014, 0x0016, 0x0017, ALG_ECDSA, 0x001C, 0x0019})
_KDFS: Final = frozenset({0x0020, 0x0021, 0x0022, 0x0007})

_RH_ENDORSEMENT: Final = 0x4000000B  # Part 2, 7.4 (TPM_RH)


class ObjectAttributes(enum.IntFlag):
    """TPMA_OBJECT (Part 2, 8.3)."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


class NvAttributes(enum.IntFlag):
    """TPMA_NV (Part 2, 13.4). Bits 4 to 7 are the index type: 1 is a counter."""

    OWNER_WRITE = 1 << 1
    AUTH_WRITE = 1 << 2
    COUNTER = 1 << 4
    POLICY_DELETE = 1 << 10
    OWNER_READ = 1 << 17
    AUTH_READ = 1 << 18
    NO_DA = 1 << 25
    WRITTEN = 1 << 29
    PLATFORM_CREATE = 1 << 30


NV_TYPE_MASK: Final = 0xF0


class Reader:
    """Takes big-endian fields off bytes; what is not there is refused, and `finish` refuses what is left.

    Args:
        data: The bytes, at most `STRUCTURE_LIMIT_BYTES`.
        what: Their name, for messages.
        error: What to raise.
    """

    __slots__ = ("_data", "_error", "_offset", "_what")

    def __init__(self, data: bytes, *, what: str, error: type[SczError]) -> None:
        self._data, self._what, self._error, self._offset = data, what, error, 0
        if len(data) > STRUCTURE_LIMIT_BYTES:
            raise self.fail(f"is longer than {STRUCTURE_LIMIT_BYTES} bytes")

    def fail(self, problem: str) -> SczError:
        """The error to raise for a problem of this structure."""
        return self._error(f"{self._what}: {problem}")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self._data) - self._offset:
            raise self.fail("ends too early")
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def number(self, size: int) -> int:
        """The next unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, limit: int) -> bytes:
        """The next TPM2B: a 16-bit size, then at most `limit` bytes."""
        size = self.number(2)
        if size > limit:
            raise self.fail(f"has a field of {size} bytes, more than {limit}")
        return self.take(size)

    def finish(self) -> None:
        """Refuse bytes that were not taken."""
        if self._offset != len(self._data):
            raise self.fail("has bytes after its end")


def tpm2b(data: bytes) -> bytes:
    """A TPM2B: 16-bit size, then the bytes."""
    return len(data).to_bytes(2, "big") + data


# --- public areas -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Public:
    """A TPMT_PUBLIC. `symmetric` is (algorithm, bits, mode), `scheme` (algorithm, hash); None is TPM_ALG_NULL."""

    raw: bytes
    kind: Literal["ecc", "rsa", "keyedhash"]
    name_alg: int
    attributes: ObjectAttributes
    auth_policy: bytes
    symmetric: tuple[int, int, int] | None
    scheme: tuple[int, int] | None
    curve: int | None
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | None

    @property
    def name(self) -> bytes:
        """The object's Name: its name algorithm, then the digest of the public area; 34 bytes with SHA-256."""
        return _name(self.name_alg, self.raw)

    @property
    def marshalled(self) -> bytes:
        """The TPM2B_PUBLIC."""
        return tpm2b(self.raw)

    @property
    def qualified_name_in_endorsement(self) -> bytes:
        """The Qualified Name that the object has as a primary of the endorsement hierarchy (Part 1, 26.5)."""
        return _name(self.name_alg, _RH_ENDORSEMENT.to_bytes(4, "big") + self.name)

    def key(self) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
        """The public key.

        Raises:
            TypeError: A keyed-hash object has none; a mistake of the caller's.
        """
        if self.public_key is None:
            raise TypeError("a keyed-hash object has no public key")
        return self.public_key


def _name(algorithm: int, data: bytes) -> bytes:
    return algorithm.to_bytes(2, "big") + _HASHES[algorithm](data).digest()


def parse_public(data: bytes, *, what: str, error: type[SczError]) -> Public:
    """Parse a TPM2B_PUBLIC.

    Args:
        data: Size and TPMT_PUBLIC, nothing after it.
        what: Its name, for messages.
        error: What to raise.

    Raises:
        SczError: The class `error`: malformed, an algorithm that is not known here, or a point that is on no curve.
    """
    outer = Reader(data, what=what, error=error)
    raw = outer.sized(STRUCTURE_LIMIT_BYTES)
    outer.finish()
    reader = Reader(raw, what=what, error=error)
    kind = reader.number(2)
    name_alg = _known_hash(reader)
    attributes = ObjectAttributes(reader.number(4))
    auth_policy = reader.sized(64)
    symmetric: tuple[int, int, int] | None = None
    curve: int | None = None
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | None = None
    label: Literal["ecc", "rsa", "keyedhash"]
    if kind == ALG_ECC:
        label, symmetric, scheme = "ecc", _symmetric(reader), _scheme(reader)
        curve, key = _ecc_key(reader)
    elif kind == ALG_RSA:
        label, symmetric, scheme = "rsa", _symmetric(reader), _scheme(reader)
        key = _rsa_key(reader)
    elif kind == ALG_KEYEDHASH:
        label, scheme = "keyedhash", None
        if reader.number(2) != ALG_NULL:
            raise reader.fail("is a keyed-hash object with a scheme")
        reader.sized(64)
    else:
        raise reader.fail(f"has the unknown type {kind:#06x}")
    reader.finish()
    return Public(raw, label, name_alg, attributes, auth_policy, symmetric, scheme, curve, key)


def _known_hash(reader: Reader) -> int:
    algorithm = reader.number(2)
    if algorithm not in _HASHES:
        raise reader.fail(f"has the unknown hash algorithm {algorithm:#06x}")
    return algorithm


def _symmetric(reader: Reader) -> tuple[int, int, int] | None:
    """TPMT_SYM_DEF_OBJECT (Part 2, 11.1.7)."""
    algorithm = reader.number(2)
    if algorithm == ALG_NULL:
        return None
    return algorithm, reader.number(2), reader.number(2)


def _scheme(reader: Reader) -> tuple[int, int] | None:
    """TPMT_RSA_SCHEME or TPMT_ECC_SCHEME (Part 2, 11.2.4.2 and 11.2.5.6), without the anonymous ones."""
    algorithm = reader.number(2)
    if algorithm == ALG_NULL:
        return None
    if algorithm == ALG_RSAES:
        return algorithm, ALG_NULL
    if algorithm not in _SCHEMES_WITH_HASH:
        raise reader.fail(f"has the unknown scheme {algorithm:#06x}")
    return algorithm, _known_hash(reader)


def _ecc_key(reader: Reader) -> tuple[int, ec.EllipticCurvePublicKey]:
    curve = reader.number(2)
    if curve not in _CURVES:
        raise reader.fail(f"is on the unknown curve {curve:#06x}")
    kdf = reader.number(2)
    if kdf in _KDFS:
        _known_hash(reader)
    elif kdf != ALG_NULL:
        raise reader.fail(f"has the unknown key derivation {kdf:#06x}")
    size = (_CURVES[curve].key_size + 7) // 8
    x, y = (int.from_bytes(reader.sized(size), "big") for _ in range(2))
    try:
        return curve, ec.EllipticCurvePublicNumbers(x, y, _CURVES[curve]).public_key()
    except ValueError as cause:
        raise reader.fail("has a point that is not on its curve") from cause


def _rsa_key(reader: Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.number(2), reader.number(4) or 65537  # Part 2, 12.2.3.5: zero is the default exponent
    modulus = int.from_bytes(reader.sized(512), "big")
    if modulus.bit_length() != bits or not 2048 <= bits <= 4096:
        raise reader.fail("is an RSA key of another size than 2048 to 4096 bits")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as cause:
        raise reader.fail("is not an RSA key") from cause


def ecdsa_signing_public(key: ec.EllipticCurvePublicKey) -> bytes:
    """The TPMT_PUBLIC of a boot-policy key, as docs/specification.md, "TPM policy", fixes it.

    Args:
        key: On P-256.

    Raises:
        ValueError: Another curve; a mistake of the caller's.
    """
    if not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("a boot-policy key is on P-256")
    numbers = key.public_numbers()
    attributes = ObjectAttributes.SIGN | ObjectAttributes.USER_WITH_AUTH
    head = (ALG_ECC, ALG_SHA256, attributes >> 16, attributes & 0xFFFF, 0)  # the last: an empty policy
    parameters = (ALG_NULL, ALG_ECDSA, ALG_SHA256, CURVE_P256, ALG_NULL)
    fixed = b"".join(int(value).to_bytes(2, "big") for value in head + parameters)
    return fixed + tpm2b(numbers.x.to_bytes(32, "big")) + tpm2b(numbers.y.to_bytes(32, "big"))


def rsassa_signing_public(key: rsa.RSAPublicKey) -> bytes:
    """The TPMT_PUBLIC of a key that signs PCR values for an operating system; docs/specification.md, "TPM policy".

    Args:
        key: Of 2048 bits, with the exponent 65537.

    Raises:
        ValueError: Another size or exponent; a mistake of the caller's.
    """
    if key.key_size != 2048 or key.public_numbers().e != 65537:
        raise ValueError("a signer's RSA key has 2048 bits and the exponent 65537")
    attributes = ObjectAttributes.SIGN | ObjectAttributes.USER_WITH_AUTH
    head = (ALG_RSA, ALG_SHA256, attributes >> 16, attributes & 0xFFFF, 0)  # the last: an empty policy
    parameters = (ALG_NULL, ALG_RSASSA, ALG_SHA256, key.key_size, 0, 0)  # the last two: the default exponent
    fixed = b"".join(int(value).to_bytes(2, "big") for value in head + parameters)
    return fixed + tpm2b(key.public_numbers().n.to_bytes(256, "big"))


@dataclass(frozen=True, slots=True)
class NvPublic:
    """A TPMS_NV_PUBLIC; the Name covers all of it."""

    raw: bytes
    index: int
    name_alg: int
    attributes: NvAttributes
    auth_policy: bytes
    data_size: int

    @property
    def name(self) -> bytes:
        """The index's Name: its name algorithm, then the digest of the public area."""
        return _name(self.name_alg, self.raw)

    @property
    def marshalled(self) -> bytes:
        """The TPM2B_NV_PUBLIC."""
        return tpm2b(self.raw)


def parse_nv_public(data: bytes, *, what: str, error: type[SczError]) -> NvPublic:
    """Parse a TPM2B_NV_PUBLIC.

    Raises:
        SczError: The class `error`: malformed, or an unknown name algorithm.
    """
    outer = Reader(data, what=what, error=error)
    raw = outer.sized(STRUCTURE_LIMIT_BYTES)
    outer.finish()
    reader = Reader(raw, what=what, error=error)
    index, name_alg, attributes = reader.number(4), _known_hash(reader), NvAttributes(reader.number(4))
    auth_policy, data_size = reader.sized(64), reader.number(2)
    reader.finish()
    return NvPublic(raw, index, name_alg, attributes, auth_policy, data_size)
