"""A quote in the files that `tpm2_checkquote` of tpm2-tools takes, so that nobody need believe this project's verifier.

Pure. The file of PCR values is tpm2-tools' own form ("serialized"), which is a C structure written out: little-endian,
with all of its unused room. Source: tpm2-tools 5.4, lib/tpm2_util and tools/tpm2_quote; read back by the real tool in
the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oci_hook.attestation.kept_evidence import KeptEvidence, StartEvidence
from oci_hook.attestation.structures import ALG_SHA256

_SELECTIONS: Final = 16  # TPM2_NUM_PCR_BANKS
_SELECT_BYTES: Final = 4  # TPM2_PCR_SELECT_MAX
_DIGESTS: Final = 8  # of a TPML_DIGEST
_DIGEST_ROOM: Final = 64  # of a TPM2B_DIGEST


def pcrs_file(pcrs: Mapping[int, bytes]) -> bytes:
    """The PCR values of the SHA-256 bank as `tpm2_quote --pcr` writes them.

    Args:
        pcrs: Values by number, 0 to 23, 32 bytes each.
    """
    bits = sum(1 << pcr for pcr in pcrs)
    selection = struct.pack("<HB", ALG_SHA256, 3) + bits.to_bytes(3, "little").ljust(_SELECT_BYTES, b"\0")
    # The structure is aligned to two bytes: 2 + 1 + 4, and one to fill.
    selections = struct.pack("<I", 1) + selection.ljust(8, b"\0").ljust(8 * _SELECTIONS, b"\0")
    values = [pcrs[pcr] for pcr in sorted(pcrs)]
    lists = [values[start : start + _DIGESTS] for start in range(0, len(values), _DIGESTS)]
    return selections + struct.pack("<I", len(lists)) + b"".join(_digest_list(each) for each in lists)


def _digest_list(values: list[bytes]) -> bytes:
    digests = b"".join(struct.pack("<H", len(value)) + value.ljust(_DIGEST_ROOM, b"\0") for value in values)
    return struct.pack("<I", len(values)) + digests.ljust(_DIGESTS * (2 + _DIGEST_ROOM), b"\0")


def quote_files(kept: KeptEvidence, start: StartEvidence) -> dict[str, bytes]:
    """The files of one start by their names: message, signature, PCRs, key in two forms, qualifying data."""
    return {
        "quote.msg": start.quote.attest,
        "quote.sig": start.quote.signature,
        "quote.pcrs": pcrs_file(start.quote.pcrs),
        "ak.pem": start.ak.key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "ak.tss": start.ak.marshalled,
        "qualifying-data.hex": start.qualifying_data(kept.container_id).hex().encode() + b"\n",
    }
