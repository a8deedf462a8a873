"""The access policy: which workloads may have a model, as its owner signed it in the manifest.

Pure. Reads and writes the policy; whether a token satisfies it is for `identity.token` and `admission` to say.
Specification: docs/specification.md, "Manifest".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oci_hook.documents import Fields
from oci_hook.errors import SczError
from oci_hook.tee_policy import TeePolicy, parse_tee_policy, tee_policy_document
from oci_hook.trust import PLAIN_TEXT

RUNTIMES = ("runc", "crun", "runsc", "kata", "process")
APPRAISALS = ("keylime",)
TOKEN_AGE_LOW_SECONDS, TOKEN_AGE_HIGH_SECONDS = 60, 31_622_400
THUMBPRINT = "[A-Za-z0-9_-]{43}"
TIME_HIGH = 253_402_300_799  # the end of the year 9999


@dataclass(frozen=True, slots=True)
class AcceptedIdentity:
    """Workloads of one issuer: exact subjects, one audience. `keys` are thumbprints; empty means not pinned."""

    issuer: str
    audience: str
    subjects: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Who may have the model, when and where. Times in seconds since 1970; empty `runtimes` means any recognised.

    `broker`: a key needs a broker's share beside the TPM's. `appraisal` is `keylime` if a remote verifier has to
    accept the evidence, too.
    `tee` is what it asks of a trusted execution environment; None: nothing.
    """

    identities: tuple[AcceptedIdentity, ...]
    token_age_seconds: int
    not_before: int | None
    not_after: int | None
    runtimes: tuple[str, ...]
    share: bool
    broker: bool = False
    appraisal: str | None = None
    tee: TeePolicy | None = None


def _identity(value: object, error: type[SczError]) -> AcceptedIdentity:
    fields = Fields(value, what="access policy: identity", error=error)
    identity = AcceptedIdentity(
        issuer=fields.string("issuer", pattern=PLAIN_TEXT),
        audience=fields.string("audience", pattern=PLAIN_TEXT),
        subjects=fields.strings("subjects", low=1, high=64, pattern=PLAIN_TEXT),
        # An empty list would read as "no key at all" but act as "any key": it must be left out instead.
        keys=fields.strings("keys", low=1, high=64, pattern=THUMBPRINT) if fields.has("keys") else (),
    )
    fields.finish()
    return identity


def parse_access_policy(value: object, *, error: type[SczError]) -> AccessPolicy:
    """Check an access policy.

    Args:
        value: What JSON gave.
        error: What to raise.

    Raises:
        SczError: The class `error`: an unknown key, no identity, a list that names nothing, a window that is empty.
    """
    fields = Fields(value, what="access policy", error=error)
    policy = AccessPolicy(
        identities=fields.items("identities", lambda item: _identity(item, error), low=1, high=64),
        token_age_seconds=fields.integer("token_age_seconds", low=TOKEN_AGE_LOW_SECONDS, high=TOKEN_AGE_HIGH_SECONDS),
        not_before=fields.integer("not_before", low=0, high=TIME_HIGH) if fields.has("not_before") else None,
        not_after=fields.integer("not_after", low=0, high=TIME_HIGH) if fields.has("not_after") else None,
        runtimes=(
            fields.strings("runtimes", low=1, high=len(RUNTIMES), pattern="|".join(RUNTIMES))
            if fields.has("runtimes")
            else ()
        ),
        share=fields.boolean("share"),
        broker=fields.boolean("broker") if fields.has("broker") else False,
        appraisal=fields.string("appraisal", pattern="|".join(APPRAISALS)) if fields.has("appraisal") else None,
        tee=parse_tee_policy(fields.take("tee"), error=error) if fields.has("tee") else None,
    )
    fields.finish()
    if policy.not_before is not None and policy.not_after is not None and policy.not_before >= policy.not_after:
        raise error("access policy: not_before is not earlier than not_after")
    return policy


def access_policy_document(policy: AccessPolicy) -> dict[str, Any]:
    """The JSON value of a policy; `parse_access_policy` gives the same policy again."""
    document: dict[str, Any] = {
        "identities": [
            {
                "issuer": identity.issuer,
                "audience": identity.audience,
                "subjects": list(identity.subjects),
                **({"keys": list(identity.keys)} if identity.keys else {}),
            }
            for identity in policy.identities
        ],
        "token_age_seconds": policy.token_age_seconds,
        "share": policy.share,
    }
    if policy.not_before is not None:
        document["not_before"] = policy.not_before
    if policy.not_after is not None:
        document["not_after"] = policy.not_after
    if policy.runtimes:
        document["runtimes"] = list(policy.runtimes)
    if policy.broker:
        document["broker"] = True
    if policy.appraisal is not None:
        document["appraisal"] = policy.appraisal
    if policy.tee is not None:
        document["tee"] = tee_policy_document(policy.tee)
    return document
