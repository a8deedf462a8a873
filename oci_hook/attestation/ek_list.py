"""The owner's list of endorsement keys: which TPM has which name; it vouches for TPMs that have no certificate.

Pure. One line a device: the SHA-256 of its EK's SubjectPublicKeyInfo in DER, as `openssl pkey -pubin -outform DER |
sha256sum` has it too, and the name that this TPM shall have. The list is worth what the way is worth on which the
hashes came: whoever can add a line can enrol a software TPM. Specification: docs/specification.md, "Enrolment".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oci_hook.attestation.structures import Public
from oci_hook.documents import shown
from oci_hook.errors import KeyInvalid, SczError
from oci_hook.trust import NAME, NAME_LIMIT

LIST_LIMIT_BYTES: Final = 1 << 20
ENTRY_LIMIT: Final = 10_000
_ENTRY: Final = re.compile(rf"([0-9a-f]{{64}})[ \t]+({NAME})")


@dataclass(frozen=True, slots=True)
class EkList:
    """Device names by the EK's SHA-256 (64 lower-case digits); no hash and no name is there twice."""

    names: Mapping[str, str]


def ek_digest(ek: Public) -> str:
    """The SHA-256 of an EK's SubjectPublicKeyInfo in DER, 64 lower-case digits; of nothing, if it is no such key."""
    key = ek.public_key
    encoded = b"" if key is None else key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def parse_ek_list(data: bytes) -> EkList:
    """Parse a list of EKs.

    Args:
        data: ASCII lines of `HASH NAME`; empty lines, and what begins with `#` up to the line's end, say nothing.

    Raises:
        KeyInvalid: More than 1 MiB or 10 000 devices, none at all, a line of another form, a hash or name twice.
    """
    if len(data) > LIST_LIMIT_BYTES:
        raise KeyInvalid("the list of EKs is larger than 1 MiB")
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError as cause:
        raise KeyInvalid("the list of EKs is not ASCII") from cause
    names: dict[str, str] = {}
    taken: set[str] = set()
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip(" \t\r")
        if not entry:
            continue
        found = _ENTRY.fullmatch(entry)
        if found is None or len(found[2]) > NAME_LIMIT:
            raise KeyInvalid(f"the list of EKs, line {number}: not 64 lower-case digits and a device's name")
        digest, name = found[1], found[2]
        if digest in names:
            raise KeyInvalid(f"the list of EKs, line {number}: the EK of {names[digest]} again")
        if name in taken:
            raise KeyInvalid(f"the list of EKs, line {number}: {name} has an EK already")
        names[digest] = name
        taken.add(name)
        if len(names) > ENTRY_LIMIT:
            raise KeyInvalid(f"the list of EKs has more than {ENTRY_LIMIT} devices")
    if not names:
        raise KeyInvalid("the list of EKs is empty")
    return EkList(names)


def verify_listed(ek: Public, device: str, ek_list: EkList, *, error: type[SczError]) -> str:
    """Check 1 without a certificate: the EK is in the owner's list, for this device.

    Args:
        ek: The public area that the host claims; an asymmetric key or not.
        device: The name that the host claims.
        ek_list: The owner's.
        error: What to raise.

    Returns:
        The EK's SHA-256, 64 digits.

    Raises:
        SczError: The class `error`: not listed, or listed for another device.
    """
    if ek.public_key is None:
        raise error("the EK is not an asymmetric key")
    digest = ek_digest(ek)
    if digest not in ek_list.names:
        raise error(f"the EK {digest} is not in the owner's list, and the TPM has no certificate")
    verify_not_listed_otherwise(ek, device, ek_list, error=error)
    return digest


def verify_not_listed_otherwise(ek: Public, device: str, ek_list: EkList, *, error: type[SczError]) -> None:
    """Check that neither another device has this EK in the list, nor this device another EK.

    A certificate says that an EK is a TPM's, not whose: an owner who lists certified TPMs, too, knows which is which.

    Raises:
        SczError: The class `error`, with what the list says.
    """
    digest = ek_digest(ek)
    name = ek_list.names.get(digest)
    if name is not None and name != device:
        raise error(f"the EK {digest} is in the owner's list as {name}, not as {shown(device)}")
    if name is None and device in ek_list.names.values():
        raise error(f"the EK {digest} is not the one that the owner's list has for {shown(device)}")
