"""The identity token: from hostile bytes to an `Identity` that the model's access policy names.

Pure: the keys, the policy and the clock are arguments. `jws` verifies one signature with one key and one algorithm;
which key, and what every claim must say, is decided here, as JWT libraries leave most of it out. Whether the token is
this container's own is `binding`'s question, the policy's dates and runtimes are `admission`'s.
Specification: docs/specification.md, "Identity token"; RFC 7515, 7517, 7519, 8725; SPIFFE JWT-SVID and SPIFFE-ID.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oci_hook.access_policy import TIME_HIGH, AcceptedIdentity, AccessPolicy
from oci_hook.documents import Fields, parse_object, shown
from oci_hook.errors import (
    IdentityRefused,
    IssuerUntrusted,
    TokenAlgorithmRefused,
    TokenClaimsRefused,
    TokenExpired,
    TokenMalformed,
    TokenSignatureRefused,
)
from oci_hook.jws import ALGORITHMS, PublicJwk, parse_compact, verify_compact
from oci_hook.trust import Issuer

TOKEN_LIMIT_BYTES = 16 << 10
LEEWAY_HIGH_SECONDS = 60

_WHAT = "identity token"
_TYPES = frozenset({"jwt", "jose", "at+jwt"})  # RFC 7519, section 5.1; JWT-SVID, section 2; RFC 9068, section 2.1
_MAX_AUDIENCES = 64
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123, as Kubernetes names things
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_UID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
# SPIFFE-ID, sections 2.1 to 2.3: lower-case trust domain; a workload's path is not empty and has no dot segments.
_SPIFFE_ID = re.compile(r"(?=.{1,2048}\Z)spiffe://([a-z0-9._-]{1,255})(/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+")
_AUTHORITY = re.compile(r"(?:spiffe|https)://([^/:?#@]+)(?:[/:?#].*)?")


@dataclass(frozen=True, slots=True)
class Identity:
    """A workload whose token was verified; made by `verify_token` alone.

    Attributes:
        issuer: Whose key signed.
        accepted: The identity of the access policy that it satisfies.
        subject: `sub`, one of the policy's.
        audience: The policy's, which `aud` contains.
        issued: `iat`, seconds since 1970.
        expires: `exp`, seconds since 1970.
        token_hash: SHA-256 of the token's bytes, for the evidence.
        signed_hash: SHA-256 of header and payload alone, for the binding. Whoever has a token can spell its ECDSA
            signature in a second way, (r, n − s), and so give the same token another hash.
        pod_uid: The pod that a Kubernetes token is bound to, else None.
        namespace: The service account's, else None.
        service_account: Its name, else None.
    """

    issuer: Issuer
    accepted: AcceptedIdentity
    subject: str
    audience: str
    issued: float
    expires: float
    token_hash: bytes
    signed_hash: bytes
    pod_uid: str | None = None
    namespace: str | None = None
    service_account: str | None = None


def verify_token(
    data: bytes, *, issuers: Sequence[Issuer], access: AccessPolicy, now: float, leeway_seconds: int
) -> Identity:
    """Verify a token and match it with the access policy.

    Args:
        data: One JWS in compact form, without a line feed.
        issuers: Those that this host trusts.
        access: The policy that the model's owner signed.
        now: Seconds since 1970.
        leeway_seconds: How far clocks may differ, 0 to 60.

    Returns:
        The workload's identity.

    Raises:
        TokenMalformed: Not one JWS of at most 16 KiB with a strict JSON header and strict JSON claims.
        TokenAlgorithmRefused: `alg` is not one of RS256, RS384, RS512, ES256, ES384, ES512.
        IssuerUntrusted: `iss` is not trusted here, or the key is not one that the model's owner pinned.
        TokenSignatureRefused: No single key fits, or the signature is not that key's.
        TokenClaimsRefused: A claim is missing, of the wrong type, or false; the lifetime is too long.
        TokenExpired: Expired, or not yet valid.
        IdentityRefused: The policy does not name this issuer, or not this subject.
        ValueError: `now` or `leeway_seconds` cannot be; a fault of ours.
    """
    if not math.isfinite(now) or not 0 <= leeway_seconds <= LEEWAY_HIGH_SECONDS:
        raise ValueError(f"now is not a time, or the leeway is not 0 to {LEEWAY_HIGH_SECONDS} seconds")
    # 1-5. Signed by the one fitting key of a trusted issuer.
    issuer, key, claims = _signed_claims(data, issuers)
    # 6. Subject and audience are there and of their types.
    subject, audiences = _subject(claims), _audiences(claims)
    # 7. The times (RFC 7519, sections 4.1.4 to 4.1.6) and the lifetime that the owner allows.
    issued, expires = _verified_times(claims, now, leeway_seconds, access.token_age_seconds)
    # 8. What the issuer's kind asks besides.
    namespace, service_account, pod_uid = _kubernetes(claims, subject) if issuer.kind == "kubernetes" else (None,) * 3
    if issuer.kind == "spiffe":
        _verify_spiffe_id(subject, issuer)
    # 9. One identity of the access policy has this issuer, this key, one of these audiences and this subject.
    accepted = _accepted(access, issuer, key, audiences, subject)
    return Identity(
        issuer=issuer,
        accepted=accepted,
        subject=subject,
        audience=accepted.audience,
        issued=issued,
        expires=expires,
        token_hash=hashlib.sha256(data).digest(),
        signed_hash=hashlib.sha256(data.rpartition(b".")[0]).digest(),
        pod_uid=pod_uid,
        namespace=namespace,
        service_account=service_account,
    )


def _signed_claims(data: bytes, issuers: Sequence[Issuer]) -> tuple[Issuer, PublicJwk, Mapping[str, object]]:
    """Checks 1 to 5: whose key, and what it signed."""
    # 1. Form: bounded, three parts, canonical base64url, strict JSON, no crit and no b64 (RFC 7515, section 5.2).
    token = parse_compact(data, limit_bytes=TOKEN_LIMIT_BYTES, what=_WHAT, error=TokenMalformed)
    _verify_type(token.unverified_header)
    # 2. The algorithm is one of a literal list (RFC 8725, section 3.1).
    algorithm = _algorithm(token.unverified_header)
    # 3. The issuer is trusted here. Still unverified: it only chooses whose keys are tried.
    issuer = _issuer(_claims(token.unverified_payload), issuers)
    # 4. One key of that issuer fits kid, kty, curve, alg, use and key_ops; keys that the token brings are never used.
    key = _key(token.unverified_header, algorithm, issuer)
    # 5. The signature.
    return issuer, key, _claims(verify_compact(token, key, algorithm, error=TokenSignatureRefused))


# --- the header -------------------------------------------------------------------------------------------------------


def _verify_type(header: Mapping[str, object]) -> None:
    """What is signed for another purpose is no token, even by a trusted key (RFC 8725, section 3.11)."""
    typ = header.get("typ", "JWT")
    if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in _TYPES:
        raise TokenMalformed(f"the identity token's typ is {shown(typ)}, not JWT")


def _algorithm(header: Mapping[str, object]) -> str:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise TokenAlgorithmRefused(f"the identity token's algorithm is {shown(algorithm)}")
    return algorithm


def _key(header: Mapping[str, object], algorithm: str, issuer: Issuer) -> PublicJwk:
    kid = header.get("kid")
    if "kid" in header and not isinstance(kid, str):
        raise TokenMalformed("the identity token's kid is not a string")
    fitting = [key for key in issuer.keys if key.fits(algorithm) and kid in (None, key.kid)]
    if len(fitting) != 1:
        wanted = "without kid" if kid is None else f"with kid {shown(kid)}"
        number = "no key" if not fitting else "more than one key"
        raise TokenSignatureRefused(f"the issuer {shown(issuer.name)} has {number} for {algorithm} {wanted}")
    return fitting[0]


# --- the claims -------------------------------------------------------------------------------------------------------


def _claims(payload: bytes) -> Mapping[str, object]:
    return parse_object(payload, limit_bytes=TOKEN_LIMIT_BYTES, what=f"{_WHAT}: claims", error=TokenMalformed)


def _issuer(unverified_claims: Mapping[str, object], issuers: Sequence[Issuer]) -> Issuer:
    name = unverified_claims.get("iss")
    if not isinstance(name, str):
        raise TokenClaimsRefused("the claim iss is missing or not a string")
    found = [issuer for issuer in issuers if issuer.issuer == name]
    if len(found) != 1:
        problem = "is not trusted here" if not found else "is trusted by more than one file"
        raise IssuerUntrusted(f"the issuer {shown(name)} {problem}")
    return found[0]


def _subject(claims: Mapping[str, object]) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise TokenClaimsRefused("the claim sub is missing or not a string")
    return subject


def _audiences(claims: Mapping[str, object]) -> tuple[str, ...]:
    value = claims.get("aud")
    audiences = [value] if isinstance(value, str) else value
    if not isinstance(audiences, list) or not 0 < len(audiences) <= _MAX_AUDIENCES:
        raise TokenClaimsRefused("the claim aud is missing, or neither a string nor a list of strings")
    if not all(isinstance(audience, str) for audience in audiences):
        raise TokenClaimsRefused("the claim aud is a list with something else than strings")
    return tuple(audiences)


def _seconds(claims: Mapping[str, object], name: str) -> float:
    """A NumericDate. By exact type, as true is an int to Python; the comparison also refuses infinity."""
    value = claims.get(name)
    if (type(value) is not int and type(value) is not float) or not 0 <= value <= TIME_HIGH:
        raise TokenClaimsRefused(f"the claim {name} is missing or not a time in seconds")
    return value


def _verified_times(
    claims: Mapping[str, object], now: float, leeway_seconds: int, age_seconds: int
) -> tuple[float, float]:
    issued, expires = _seconds(claims, "iat"), _seconds(claims, "exp")
    if expires <= issued:
        raise TokenClaimsRefused("the identity token expires before it is issued")
    if expires - issued > age_seconds:
        raise TokenClaimsRefused(f"the identity token lives longer than the {age_seconds} s of the access policy")
    if issued > now + leeway_seconds:
        raise TokenExpired(f"the identity token is issued {issued - now:.0f} s in the future")
    if "nbf" in claims and _seconds(claims, "nbf") > now + leeway_seconds:
        raise TokenExpired("the identity token is not yet valid")
    # With the bound on its lifetime above, this also bounds its age: now − iat < age_seconds + leeway_seconds.
    if now >= expires + leeway_seconds:
        raise TokenExpired(f"the identity token expired {now - expires:.0f} s ago")
    return issued, expires


def _kubernetes(claims: Mapping[str, object], subject: str) -> tuple[str, str, str]:
    """Namespace, service account and pod of a bound service account token; the account must be the subject."""
    fields = Fields(claims.get("kubernetes.io"), what="claim kubernetes.io", error=TokenClaimsRefused)
    namespace = fields.string("namespace", pattern=_LABEL)
    account = fields.fields("serviceaccount").string("name", pattern=_SUBDOMAIN)
    uid = fields.fields("pod").string("uid", pattern=_UID)
    if subject != f"system:serviceaccount:{namespace}:{account}":
        raise TokenClaimsRefused("the claim kubernetes.io names another service account than sub")
    return namespace, account, uid


def _verify_spiffe_id(subject: str, issuer: Issuer) -> None:
    match = _SPIFFE_ID.fullmatch(subject)
    if match is None:
        raise TokenClaimsRefused(f"the subject {shown(subject)} is not the SPIFFE id of a workload")
    authority = _AUTHORITY.fullmatch(issuer.issuer)
    if match[1] not in (authority[1] if authority else None, issuer.name):
        raise TokenClaimsRefused(f"the subject {shown(subject)} is not of the issuer's trust domain")


# --- the access policy ------------------------------------------------------------------------------------------------


def _accepted(
    access: AccessPolicy, issuer: Issuer, key: PublicJwk, audiences: tuple[str, ...], subject: str
) -> AcceptedIdentity:
    """Narrowed one condition at a time: all hold for one and the same identity, and the message names what failed."""
    candidates = [identity for identity in access.identities if identity.issuer == issuer.issuer]
    if not candidates:
        raise IdentityRefused(f"the access policy names no workload of the issuer {shown(issuer.issuer)}")
    candidates = [identity for identity in candidates if not identity.keys or key.thumbprint in identity.keys]
    if not candidates:
        raise IssuerUntrusted(f"the model's owner pinned other keys of the issuer {shown(issuer.issuer)}")
    candidates = [identity for identity in candidates if identity.audience in audiences]
    if not candidates:
        raise TokenClaimsRefused("the claim aud does not contain the audience of the access policy")
    candidates = [identity for identity in candidates if subject in identity.subjects]
    if not candidates:
        raise IdentityRefused(f"the access policy does not name the subject {shown(subject)}")
    return candidates[0]
