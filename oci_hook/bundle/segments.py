"""Encrypted files: Tink's streaming AEAD `AES256_GCM_HKDF_1MB`, planned segment by segment.

`plan_decryption` is pure and serves every reader: `decrypt_stream` here, one thread, for `sczctl verify` and the tests,
and `delivery.fill`, the hot path, which reads segments in any order. That a file is the owner's is for the manifest's
digests to say: the AEAD proves only that somebody who holds the content key wrote it.
Specification: docs/specification.md, "Encrypted file"; Tink, "Streaming AEAD: AES-GCM-HKDF".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from oci_hook.bundle.model import ModelId
from oci_hook.errors import DecryptionRefused, SczError, SourceInvalid

KEY_BYTES = 32
SALT_BYTES, PREFIX_BYTES = 32, 7
HEADER_BYTES = 1 + SALT_BYTES + PREFIX_BYTES
SEGMENT_BYTES = 2**20
TAG_BYTES = 16
FIRST_PLAINTEXT_BYTES = SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES
PLAINTEXT_BYTES = SEGMENT_BYTES - TAG_BYTES
FILE_LIMIT_BYTES = 2**48  # of plaintext; far below the 2**32 segments that a nonce can count
_LABEL = b"scz-smm/file/v1"
_SHA256 = SHA256()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ContentKey:
    """The key of one model version: 32 bytes in `value`, shown nowhere. Compared by identity."""

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) != KEY_BYTES:
            raise ValueError(f"a content key has {KEY_BYTES} bytes")

    def __repr__(self) -> str:
        return "ContentKey(<32 bytes>)"


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one segment lies; the ciphertext's length includes the tag. The nonce is 12 bytes."""

    offset_ciphertext: int
    length_ciphertext: int
    offset_plaintext: int
    length_plaintext: int
    nonce: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """All that is needed to decrypt the segments of one file, in any order."""

    file_key: bytes = field(repr=False)
    nonce_prefix: bytes = field(repr=False)
    ciphertext_bytes: int
    plaintext_bytes: int
    segments: int

    def segment(self, index: int) -> Segment:
        """The segment `index`, 0 to `segments` − 1.

        Raises:
            IndexError: There is no such segment.
        """
        if not 0 <= index < self.segments:
            raise IndexError(f"segment {index} of {self.segments}")
        start = index * SEGMENT_BYTES if index else HEADER_BYTES
        length = min((index + 1) * SEGMENT_BYTES, self.ciphertext_bytes) - start
        return Segment(
            offset_ciphertext=start,
            length_ciphertext=length,
            offset_plaintext=FIRST_PLAINTEXT_BYTES + (index - 1) * PLAINTEXT_BYTES if index else 0,
            length_plaintext=length - TAG_BYTES,
            nonce=self.nonce_prefix + index.to_bytes(4, "big") + bytes([index == self.segments - 1]),
        )

    def all_segments(self) -> Iterator[Segment]:
        """Every segment, first to last."""
        return (self.segment(index) for index in range(self.segments))


def associated_data(model: ModelId, path: str) -> bytes:
    """What binds a file to its model, version and path: neither it nor its name can be swapped."""
    return b"\0".join((_LABEL, model.name.encode(), model.version.encode(), path.encode()))


def _segments(plaintext_bytes: int) -> int:
    beyond = plaintext_bytes - FIRST_PLAINTEXT_BYTES
    return 1 if beyond <= 0 else 1 + -(-beyond // PLAINTEXT_BYTES)


def ciphertext_size(plaintext_bytes: int) -> int:
    """The size of the encrypted file, in bytes, for a plaintext of 0 to 2^48 bytes."""
    return HEADER_BYTES + plaintext_bytes + TAG_BYTES * _segments(plaintext_bytes)


def _plan(content_key: ContentKey, aad: bytes, salt: bytes, nonce_prefix: bytes, plaintext_bytes: int) -> FilePlan:
    return FilePlan(
        file_key=HKDF(algorithm=_SHA256, length=KEY_BYTES, salt=salt, info=aad).derive(content_key.value),
        nonce_prefix=nonce_prefix,
        ciphertext_bytes=ciphertext_size(plaintext_bytes),
        plaintext_bytes=plaintext_bytes,
        segments=_segments(plaintext_bytes),
    )


def plan_decryption(
    header: bytes, *, content_key: ContentKey, associated_data: bytes, ciphertext_bytes: int, plaintext_bytes: int
) -> FilePlan:
    """Derive a file's key and lay out its segments.

    Args:
        header: The encrypted file's first 40 bytes.
        content_key: The model version's key.
        associated_data: From `associated_data`.
        ciphertext_bytes: The encrypted file's size, as the file system has it.
        plaintext_bytes: The file's size, as the manifest has it.

    Raises:
        DecryptionRefused: The header is not 40 bytes that begin with 40, or the sizes do not belong together:
            truncated, extended, or an empty last segment.
    """
    if len(header) != HEADER_BYTES or header[0] != HEADER_BYTES:
        raise DecryptionRefused("the encrypted file's header is not one of AES256_GCM_HKDF_1MB")
    if not 0 <= plaintext_bytes <= FILE_LIMIT_BYTES or ciphertext_bytes != ciphertext_size(plaintext_bytes):
        raise DecryptionRefused(f"an encrypted file of {ciphertext_bytes} bytes cannot hold {plaintext_bytes} bytes")
    salt, prefix = header[1 : 1 + SALT_BYTES], header[1 + SALT_BYTES :]
    return _plan(content_key, associated_data, salt, prefix, plaintext_bytes)


def _read_exactly(read: Callable[[int], bytes], buffer: memoryview, error: type[SczError], problem: str) -> None:
    done = 0
    while done < len(buffer):
        piece = read(len(buffer) - done)
        if not piece:
            raise error(problem)
        buffer[done : done + len(piece)] = piece
        done += len(piece)


def encrypt_stream(
    read: Callable[[int], bytes],
    write: Callable[[memoryview], object],
    *,
    content_key: ContentKey,
    associated_data: bytes,
    salt: bytes,
    nonce_prefix: bytes,
    plaintext_bytes: int,
) -> None:
    """Encrypt one file with two buffers of 1 MiB, whatever its size.

    Args:
        read: Gives at most so many bytes, none at the end.
        write: Takes all of what it is given; the view is valid only during the call.
        content_key: The model version's key.
        associated_data: From `associated_data`.
        salt: 32 random bytes, never used before.
        nonce_prefix: 7 random bytes.
        plaintext_bytes: The file's size.

    Raises:
        SourceInvalid: The source gave fewer or more bytes than `plaintext_bytes`.
        ValueError: A salt or prefix of another length, or more than 2^48 bytes.
    """
    if len(salt) != SALT_BYTES or len(nonce_prefix) != PREFIX_BYTES or not 0 <= plaintext_bytes <= FILE_LIMIT_BYTES:
        raise ValueError("salt, nonce prefix or size out of range")
    plan = _plan(content_key, associated_data, salt, nonce_prefix, plaintext_bytes)
    cipher = AESGCM(plan.file_key)
    size = min(SEGMENT_BYTES, plan.ciphertext_bytes)
    plain, sealed = memoryview(bytearray(size)), memoryview(bytearray(size))
    write(memoryview(bytes([HEADER_BYTES]) + salt + nonce_prefix))
    for segment in plan.all_segments():
        source = plain[: segment.length_plaintext]
        _read_exactly(read, source, SourceInvalid, "a source file became shorter while it was read")
        target = sealed[: segment.length_ciphertext]
        cipher.encrypt_into(segment.nonce, source, None, target)
        write(target)
    if read(1):
        raise SourceInvalid("a source file became longer while it was read")


def decrypt_stream(
    read: Callable[[int], bytes],
    write: Callable[[memoryview], object],
    *,
    content_key: ContentKey,
    associated_data: bytes,
    ciphertext_bytes: int,
    plaintext_bytes: int,
) -> None:
    """Decrypt one file from its beginning, in order, with flat memory.

    Each segment is authenticated before it is written; that none is missing is known only when this returns.

    Args:
        read: Gives at most so many bytes, none at the end.
        write: Takes all of what it is given; the view is valid only during the call.
        content_key: The model version's key.
        associated_data: From `associated_data`.
        ciphertext_bytes: The encrypted file's size.
        plaintext_bytes: The file's size, as the manifest has it.

    Raises:
        DecryptionRefused: Truncated, extended, reordered, changed, another file's, another key's.
    """
    header = bytearray(HEADER_BYTES)
    short = "the encrypted file ends early"
    _read_exactly(read, memoryview(header), DecryptionRefused, short)
    plan = plan_decryption(
        bytes(header),
        content_key=content_key,
        associated_data=associated_data,
        ciphertext_bytes=ciphertext_bytes,
        plaintext_bytes=plaintext_bytes,
    )
    cipher = AESGCM(plan.file_key)
    size = min(SEGMENT_BYTES, plan.ciphertext_bytes)
    sealed, plain = memoryview(bytearray(size)), memoryview(bytearray(size))
    for index, segment in enumerate(plan.all_segments()):
        source = sealed[: segment.length_ciphertext]
        _read_exactly(read, source, DecryptionRefused, short)
        target = plain[: segment.length_plaintext]
        try:
            cipher.decrypt_into(segment.nonce, source, None, target)
        except InvalidTag as cause:
            raise DecryptionRefused(f"segment {index} of {plan.segments} does not authenticate") from cause
        write(target)
    if read(1):
        raise DecryptionRefused("the encrypted file goes on after its last segment")
