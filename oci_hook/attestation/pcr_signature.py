"""PCR values that an operating system's signer approves: systemd's `tpm2-pcr-signature.json`, and its key in a form.

Pure. A form of the boot policy may name such a key instead of a value for PCR 11: the owner signs the form once, and
the signer's later systems need no owner. A signature stays good as long as the form does: the signer cannot withdraw
one. Specification: systemd-measure(1) (the file; a signature is over the digest of PolicyPCR, without a
policyRef); TPM 2.0 Library, Part 3, 23.16 (PolicyAuthorize); docs/specification.md, "TPM policy".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.structures import (
    ALG_ECDSA,
    ALG_RSASSA,
    ALG_SHA256,
    ecdsa_signing_public,
    rsassa_signing_public,
    tpm2b,
)
from oci_hook.documents import Fields, decode_base64url, encode_base64url, parse_object
from oci_hook.errors import BootPolicyInvalid, KeyInvalid, SczError
from oci_hook.jws import PublicJwk, ec_public_key, parse_jwk, public_jwk

LIMIT_BYTES: Final = 256 << 10
ENTRIES_LIMIT: Final = 128  # of one bank; systemd writes one for each boot phase and key
SIGNED_PCRS: Final = (11,)  # the only one that systemd-measure signs
PCR_SIGNATURE_BYTES: Final = 512
_PEM_LIMIT_BYTES: Final = 16 << 10
_BLANK: Final = frozenset({bytes(32), b"\xff" * 32})


@dataclass(frozen=True, slots=True)
class UnverifiedPcrSignature:
    """An entry of the file's `sha256` bank; nothing in it may be believed before `SignedPcrs.with_signatures`."""

    unverified_pcrs: tuple[int, ...]
    unverified_policy: bytes
    unverified_signature: bytes


@dataclass(frozen=True, slots=True)
class PcrSignature:
    """A policy (32 bytes: PolicyPCR over one value of each PCR) and the signer's signature, as the file has it."""

    policy: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedPcrs:
    """The PCRs of a form whose values another key approves.

    Attributes:
        key: The signer's public key: RSA of 2048 bits or P-256.
        signatures: Those of this host's by that key, verified; empty where nobody looked for them.
        source: Where they were looked for, in words.
    """

    key: PublicJwk
    pcrs: tuple[int, ...] = SIGNED_PCRS
    signatures: tuple[PcrSignature, ...] = field(default=(), compare=False)
    source: str = field(default="no signature file was read", compare=False)

    def with_signatures(self, entries: Sequence[UnverifiedPcrSignature], source: str) -> SignedPcrs:
        """The same with the entries that are signed by its key for its PCRs; all others are left out.

        Args:
            entries: From `parse_pcr_signatures`.
            source: Where they come from, for messages.
        """
        good = (
            PcrSignature(entry.unverified_policy, entry.unverified_signature)
            for entry in entries
            if entry.unverified_pcrs == self.pcrs
            and is_signed(self.key, entry.unverified_policy, entry.unverified_signature)
        )
        return replace(self, signatures=tuple(dict.fromkeys(good)), source=source)

    def signature_for(self, values: Mapping[int, bytes]) -> PcrSignature | None:
        """The signature that approves these values, if there is one; never of a PCR that nothing was measured into."""
        found = {pcr: values[pcr] for pcr in self.pcrs if pcr in values}
        if len(found) != len(self.pcrs) or _BLANK & set(found.values()):
            return None
        wanted = policy_pcr(ZERO_DIGEST, found)
        return next((each for each in self.signatures if each.policy == wanted), None)

    def document(self) -> dict[str, object]:
        """A form's member `signed`."""
        return {"pcrs": list(self.pcrs), "key": dict(self.key.members)}

    @property
    def what_is_missing(self) -> str:
        """Why no signature approves the present values, in words."""
        if not self.signatures:
            return f"{self.source}: no signature by the form's key (pkfp {fingerprint(self.key).hex()[:16]}…)"
        return f"{self.source}: {len(self.signatures)} signature(s) by the form's key, none of them for this value"


# --- the file ---------------------------------------------------------------------------------------------------------


def parse_pcr_signatures(data: bytes) -> tuple[UnverifiedPcrSignature, ...]:
    """Parse a `tpm2-pcr-signature.json`; only its `sha256` bank is looked at.

    It is another project's format: members that it may add are ignored.

    Args:
        data: At most 256 KiB.

    Returns:
        The bank's entries in their order; none if it has no such bank.

    Raises:
        BootPolicyInvalid: Malformed, or more than 128 entries in the bank.
    """
    what = "tpm2-pcr-signature.json"
    document = parse_object(data, limit_bytes=LIMIT_BYTES, what=what, error=BootPolicyInvalid)
    fields = Fields(document, what=what, error=BootPolicyInvalid)
    return fields.items("sha256", _parse_entry, low=0, high=ENTRIES_LIMIT) if fields.has("sha256") else ()


def _parse_entry(value: object) -> UnverifiedPcrSignature:
    fields = Fields(value, what="tpm2-pcr-signature.json: an entry", error=BootPolicyInvalid)
    pcrs = fields.items("pcrs", _pcr, low=1, high=24)
    policy = fields.hexadecimal("pol", low=32, high=32)
    try:
        signature = base64.b64decode(fields.string("sig", limit=PCR_SIGNATURE_BYTES * 2), validate=True)
    except (ValueError, binascii.Error) as cause:
        raise BootPolicyInvalid("tpm2-pcr-signature.json: an entry's sig is not base64") from cause
    return UnverifiedPcrSignature(tuple(sorted(pcrs)), policy, signature)


def _pcr(value: object) -> int:
    return Fields({"pcrs": value}, what="tpm2-pcr-signature.json", error=BootPolicyInvalid).integer(
        "pcrs", low=0, high=23
    )


# --- the key ----------------------------------------------------------------------------------------------------------


def parse_signed_pcrs(fields: Fields, *, error: type[SczError]) -> SignedPcrs:
    """A form's member `signed`: `{"pcrs": [11], "key": JWK}`, the key RSA of 2048 bits or on P-256.

    Raises:
        SczError: The class `error`: malformed, other PCRs, or a key that a TPM need not know.
    """
    signed = fields.fields("signed")
    pcrs = signed.items("pcrs", _pcr, low=1, high=24)
    value = signed.take("key")
    signed.finish()
    if pcrs != SIGNED_PCRS:
        raise error("a form's signed PCRs are exactly [11]")
    return SignedPcrs(parse_signer_key(value, error=error))


def parse_signer_key(value: object, *, error: type[SczError]) -> PublicJwk:
    """Check a signer's JWK: RSA of 2048 bits with the exponent 65537, or P-256; the key's own members and no others."""
    key = parse_jwk(value, error=error)
    if not isinstance(value, dict) or set(value) != set(key.members):
        raise error("the JWK of a PCR signer has the members of its key and no others")
    _signer_public(key, error=error)
    return key


def load_signer_pem(data: bytes) -> PublicJwk:
    """The signer's public key, from the PEM that `ukify` and `systemd-measure` take as `--public-key`.

    Raises:
        KeyInvalid: Not a public key in PEM, or of a kind that a TPM need not know.
    """
    try:
        key = serialization.load_pem_public_key(data[:_PEM_LIMIT_BYTES])
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise KeyInvalid("the PCR key is not a public key in PEM (SubjectPublicKeyInfo)", remedy=_PEM_REMEDY) from cause
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        n, e = (encode_base64url(part.to_bytes((part.bit_length() + 7) // 8, "big")) for part in (numbers.n, numbers.e))
        return parse_signer_key({"kty": "RSA", "n": n, "e": e}, error=KeyInvalid)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return parse_signer_key(public_jwk(key), error=KeyInvalid)
    raise KeyInvalid("the PCR key is neither RSA nor on an elliptic curve", remedy=_PEM_REMEDY)


_PEM_REMEDY: Final = "give the file that the unified kernel image was built with as --pcr-public-key"


def _signer_public(key: PublicJwk, *, error: type[SczError]) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if key.kty == "EC":
        if key.crv != "P-256":
            raise error("a PCR signer's elliptic-curve key is on P-256")
        return ec_public_key(key, error=error)
    n, e = (int.from_bytes(decode_base64url(key.members[part], what=part, error=error), "big") for part in ("n", "e"))
    if n.bit_length() != 2048 or e != 65537:
        raise error("a PCR signer's RSA key has 2048 bits and the exponent 65537: a TPM need not know others")
    return rsa.RSAPublicNumbers(e, n).public_key()


def is_signed(key: PublicJwk, policy: bytes, signature: bytes) -> bool:
    """Whether the signer approved a policy; a filter, as the TPM checks the same signature again."""
    public = _signer_public(key, error=BootPolicyInvalid)
    try:
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, policy, padding.PKCS1v15(), hashes.SHA256())
        else:
            public.verify(signature, policy, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def fingerprint(key: PublicJwk) -> bytes:
    """What systemd calls `pkfp`: SHA-256 of the key as PKCS#1 (RSA) or as an uncompressed point; 32 bytes."""
    public = _signer_public(key, error=BootPolicyInvalid)
    if isinstance(public, rsa.RSAPublicKey):
        encoded = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
    else:
        encoded = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return hashlib.sha256(encoded).digest()


# --- for the TPM ------------------------------------------------------------------------------------------------------


def signer_tpm_public(key: PublicJwk) -> bytes:
    """The TPMT_PUBLIC of a signer's key, for LoadExternal."""
    public = _signer_public(key, error=BootPolicyInvalid)
    return rsassa_signing_public(public) if isinstance(public, rsa.RSAPublicKey) else ecdsa_signing_public(public)


def signer_name(key: PublicJwk) -> bytes:
    """The Name of a signer's key as a TPM object, 34 bytes."""
    return ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(signer_tpm_public(key)).digest()


def tpm_signature(key: PublicJwk, signature: bytes) -> bytes:
    """The TPMT_SIGNATURE of a verified signature: RSASSA or ECDSA with SHA-256."""
    scheme = ALG_RSASSA if key.kty == "RSA" else ALG_ECDSA
    head = scheme.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
    if key.kty == "RSA":
        return head + tpm2b(signature)
    return head + b"".join(tpm2b(part.to_bytes(32, "big")) for part in decode_dss_signature(signature))
