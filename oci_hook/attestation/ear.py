"""EAT attestation results (EAR): the outcome of an appraisal as a signed JWT that other programs understand.

Pure. Claims and their names are those of the EAR profile `tag:github.com,2023:veraison/ear`, on which
draft-ietf-rats-ear builds, with the trustworthiness vector of draft-ietf-rats-ar4si; RFC 9711 (EAT), RFC 7519 (JWT).
A host's result about itself is a `diagnosis`, never an `appraisal`: whoever is root there can sign what he likes.
Claims of others that are not known here are ignored, as RFC 9711 asks; our own are all under `scz-smm.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.documents import Fields, canonical, encode_base64url, parse_object
from oci_hook.errors import EvidenceRefused
from oci_hook.jws import (
    ALGORITHMS,
    PublicJwk,
    UnverifiedJws,
    parse_compact,
    parse_jwk,
    public_jwk,
    sign_compact,
    verify_compact,
)
from oci_hook.key_errors import EvidenceInvalid

PROFILE: Final = "tag:github.com,2023:veraison/ear"
TYP: Final = "eat+jwt"
LIMIT_BYTES: Final = 8 << 20
SUBMODULES_LIMIT: Final = 64
REASONS_LIMIT: Final = 64
CLOCK_LEEWAY_SECONDS: Final = 60
_TYPES: Final = (None, TYP, "application/eat+jwt", "JWT")
_RAW_LIMIT_BYTES: Final = 4 << 20
_TIME_LIMIT: Final = 1 << 40
_PRINTABLE: Final = r"[^\x00-\x1f\x7f]+"

Status = Literal["none", "affirming", "warning", "contraindicated"]
Kind = Literal["diagnosis", "appraisal"]
_STATUSES: Final = r"none|affirming|warning|contraindicated"
# AR4SI, 2.3: what each claim is about; values are signed bytes, the tiers are 2 to 31, 32 to 95, 96 to 127.
_VECTOR: Final = frozenset(
    {
        "instance-identity",
        "configuration",
        "executables",
        "file-system",
        "hardware",
        "runtime-opaque",
        "storage-opaque",
        "sourced-data",
    }
)
# AR4SI, 2.3.4: a recognised instance; approved executables were loaded during the boot; an approved configuration.
AFFIRMED: Final[Mapping[str, int]] = {"instance-identity": 2, "executables": 3, "configuration": 2}
# The state is not one that is approved: 33, not recognised executables; the quote itself is genuine.
BOOT_STATE_DIFFERS: Final[Mapping[str, int]] = {"instance-identity": 2, "executables": 33}
# 96: recognised, but its key is one of a device that is not trusted.
DEVICE_REVOKED: Final[Mapping[str, int]] = {"instance-identity": 96}
# 99: the evidence does not hold cryptographically.
NOT_GENUINE: Final[Mapping[str, int]] = {"instance-identity": 99}


@dataclass(frozen=True, slots=True)
class Submodule:
    """One appraised start: its status, trustworthiness vector, reference values' id, and reasons in words."""

    name: str
    status: Status
    vector: Mapping[str, int]
    policy_id: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ear:
    """An attestation result; `kind` is None if its maker did not say whether it is about itself."""

    issued: int
    developer: str
    build: str
    kind: Kind | None
    submodules: tuple[Submodule, ...]
    raw_evidence: bytes | None


@dataclass(frozen=True, slots=True)
class UnverifiedEar:
    """An EAR as it came; nothing in it may be believed before `verify_ear`."""

    _jws: UnverifiedJws


def status_of(vector: Mapping[str, int]) -> Status:
    """The status that a vector has: its worst claim's tier (AR4SI, 2.3.1); `none` if it claims nothing."""

    def tier(value: int) -> int:
        if value in (-1, 0, 1):
            return 0
        size = value if value > 0 else -value - 1
        return 1 if size < 32 else 2 if size < 96 else 3

    tiers: tuple[Status, ...] = ("none", "affirming", "warning", "contraindicated")
    return tiers[max(map(tier, vector.values()), default=0)]


# --- writing ----------------------------------------------------------------------------------------------------------


def sign_ear(ear: Ear, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The EAR as a compact JWS (ES256) whose `kid` is the key's thumbprint (RFC 7638).

    Raises:
        KeyInvalid: Not a P-256 key.
        EvidenceInvalid: What a reader would refuse is never written.
    """
    claims: dict[str, Any] = {
        "eat_profile": PROFILE,
        "iat": ear.issued,
        "ear.verifier-id": {"developer": ear.developer, "build": ear.build},
        "submods": {each.name: _submodule_document(each) for each in ear.submodules},
    }
    if ear.raw_evidence is not None:
        claims["ear.raw-evidence"] = encode_base64url(ear.raw_evidence)
    if ear.kind is not None:
        claims["scz-smm.kind"] = ear.kind
    public = parse_jwk(public_jwk(key.public_key()), error=EvidenceInvalid)
    compact = sign_compact(canonical(claims), typ=TYP, kid=public.thumbprint, key=key)
    verify_ear(parse_ear(compact), public, now=ear.issued)
    return compact


def _submodule_document(submodule: Submodule) -> dict[str, Any]:
    document: dict[str, Any] = {
        "ear.status": submodule.status,
        "ear.trustworthiness-vector": dict(submodule.vector),
        "scz-smm.reasons": list(submodule.reasons),
    }
    if submodule.policy_id is not None:
        document["ear.appraisal-policy-id"] = submodule.policy_id
    return document


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_ear(data: bytes) -> UnverifiedEar:
    """Take an EAR apart, as far as its signature goes.

    Args:
        data: A JWT, at most 8 MiB; a line feed at its end is the file's.

    Raises:
        EvidenceInvalid: Not a JWS.
    """
    compact = data.removesuffix(b"\n")
    return UnverifiedEar(parse_compact(compact, limit_bytes=LIMIT_BYTES, what="EAR", error=EvidenceInvalid))


def verify_ear(unverified: UnverifiedEar, key: PublicJwk, *, now: float) -> Ear:
    """Verify who signed an EAR, and read it.

    Args:
        unverified: From `parse_ear`.
        key: The appraiser's, known from elsewhere: a key that came with the EAR proves nothing.
        now: Seconds since 1970.

    Raises:
        EvidenceRefused: Not signed by this key, issued in the future, or no longer (or not yet) valid.
        EvidenceInvalid: It is, but is no EAR; or a status better than its own vector.
    """
    # 1. The one algorithm that the key is for and the header names.
    named = unverified._jws.unverified_header.get("alg")
    algorithm = next((each for each in sorted(ALGORITHMS) if each == named and key.fits(each)), "ES256")
    # 2. The signature.
    payload = verify_compact(unverified._jws, key, algorithm, error=EvidenceRefused)
    if unverified._jws.unverified_header.get("typ") not in _TYPES:
        raise EvidenceInvalid("EAR: the header's typ is another document's (RFC 8725, 3.11)")
    fields = Fields(
        parse_object(payload, limit_bytes=LIMIT_BYTES, what="EAR", error=EvidenceInvalid),
        what="EAR",
        error=EvidenceInvalid,
    )
    # 3. Neither `exp` nor `nbf`, which others may set, forbids it, and it was not issued in the future.
    _verify_validity(fields, now)
    ear = _read(fields)
    if ear.issued > now + CLOCK_LEEWAY_SECONDS:
        raise EvidenceRefused("the EAR was issued in the future: look at both clocks")
    return ear


def _verify_validity(fields: Fields, now: float) -> None:
    """RFC 7519, 4.1.4 and 4.1.5."""

    def seconds(name: str, otherwise: float) -> float:
        if not fields.has(name):
            return otherwise
        value = fields.take(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EvidenceInvalid(f"EAR: {name} is not a NumericDate")
        return value

    if seconds("exp", math.inf) + CLOCK_LEEWAY_SECONDS <= now:
        raise EvidenceRefused("the EAR has expired", remedy="ask its maker for a newer one")
    if seconds("nbf", -math.inf) > now + CLOCK_LEEWAY_SECONDS:
        raise EvidenceRefused("the EAR is not valid yet: look at both clocks")


def _read(fields: Fields) -> Ear:
    fields.literal("eat_profile", PROFILE)
    verifier = fields.fields("ear.verifier-id")
    submodules = fields.take("submods")
    if not isinstance(submodules, dict) or not 0 < len(submodules) <= SUBMODULES_LIMIT:
        raise EvidenceInvalid(f"EAR: submods is not an object of 1 to {SUBMODULES_LIMIT} members")
    kind = fields.string("scz-smm.kind", pattern="diagnosis|appraisal") if fields.has("scz-smm.kind") else None
    return Ear(
        issued=fields.integer("iat", low=0, high=_TIME_LIMIT),
        developer=verifier.string("developer", pattern=_PRINTABLE),
        build=verifier.string("build", pattern=_PRINTABLE),
        kind=cast(Kind | None, kind),
        submodules=tuple(_read_submodule(name, value) for name, value in submodules.items()),
        raw_evidence=(
            fields.base64url("ear.raw-evidence", low=1, high=_RAW_LIMIT_BYTES)
            if fields.has("ear.raw-evidence")
            else None
        ),
    )


def _read_submodule(name: str, value: object) -> Submodule:
    fields = Fields(value, what="EAR: submodule", error=EvidenceInvalid)
    if not re.fullmatch(_PRINTABLE, name) or len(name) > 256:
        raise EvidenceInvalid("EAR: a submodule's name is not 1 to 256 printable characters")
    status = cast(Status, fields.string("ear.status", pattern=_STATUSES))
    vector = fields.take("ear.trustworthiness-vector") if fields.has("ear.trustworthiness-vector") else {}
    if not isinstance(vector, dict) or not vector.keys() <= _VECTOR:
        raise EvidenceInvalid("EAR: the trustworthiness vector has a claim that AR4SI does not know")
    claims = Fields(vector, what="EAR: trustworthiness vector", error=EvidenceInvalid)
    values = {claim: claims.integer(claim, low=-128, high=127) for claim in vector}
    # AR4SI, 2.3.1: the status is not better than the worst claim. A policy may make it worse.
    order: Sequence[Status] = ("affirming", "warning", "contraindicated")
    least = status_of(values)
    if least != "none" and (status == "none" or order.index(status) < order.index(least)):
        raise EvidenceInvalid(f"EAR: the status {status} is better than the trustworthiness vector ({least})")
    policy = fields.string("ear.appraisal-policy-id") if fields.has("ear.appraisal-policy-id") else None
    reasons = (
        fields.items("scz-smm.reasons", _reason, low=0, high=REASONS_LIMIT) if fields.has("scz-smm.reasons") else ()
    )
    return Submodule(name, status, values, policy, reasons)


def _reason(value: object) -> str:
    return Fields({"reason": value}, what="EAR: reasons", error=EvidenceInvalid).string("reason", limit=1024)
