"""`attestation.ear` and `results`: the structure by another's eyes, and every way in which a result may be wrong."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from jose import jwt

from oci_hook.attestation.ear import (
    CLOCK_LEEWAY_SECONDS,
    LIMIT_BYTES,
    PROFILE,
    Ear,
    Submodule,
    parse_ear,
    sign_ear,
    status_of,
    verify_ear,
)
from oci_hook.attestation.evidence_appraisal import appraise_kept
from oci_hook.attestation.kept_evidence import format_evidence
from oci_hook.attestation.results import result_of
from oci_hook.errors import EvidenceRefused, KeyInvalid
from oci_hook.jws import PublicJwk, parse_jwk, public_jwk, sign_compact
from oci_hook.key_errors import EvidenceInvalid
from tests.attestation_vectors import changed_bytes, value_or_ours
from tests.kept import APPROVED, make_witness

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = parse_jwk(public_jwk(KEY.public_key()), error=KeyInvalid)
NOW = 1_767_225_600
PART = Submodule("small:1", "affirming", {"executables": 3, "instance-identity": 2}, "policy", ("as approved",))
EAR = Ear(NOW, "scz-smm", "1", "appraisal", (PART,), b"evidence")


def claims(ear: Ear = EAR) -> dict[str, Any]:
    payload = sign_ear(ear, KEY).split(b".")[1]
    return dict(json.loads(base64.urlsafe_b64decode(payload + b"==")))


def signed(document: dict[str, Any] | bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return sign_compact(payload, typ="eat+jwt", kid=PUBLIC.thumbprint, key=key)


def read(compact: bytes, now: float = NOW, key: PublicJwk = PUBLIC) -> Ear:
    return verify_ear(parse_ear(compact), key, now=now)


def test_what_is_signed_is_read_again() -> None:
    assert read(sign_ear(EAR, KEY)) == EAR
    assert read(sign_ear(EAR, KEY) + b"\n") == EAR


def test_another_library_reads_it() -> None:
    compact = sign_ear(EAR, KEY).decode()
    found = jwt.decode(compact, public_jwk(KEY.public_key()), algorithms=["ES256"])
    assert found["eat_profile"] == PROFILE
    assert found["iat"] == NOW
    assert found["ear.verifier-id"] == {"developer": "scz-smm", "build": "1"}
    assert base64.urlsafe_b64decode(found["ear.raw-evidence"] + "==") == b"evidence"
    (name, part), *others = found["submods"].items()
    assert (name, others) == ("small:1", [])
    assert part["ear.status"] == "affirming"
    assert part["ear.trustworthiness-vector"] == {"executables": 3, "instance-identity": 2}
    assert part["ear.appraisal-policy-id"] == "policy"
    assert found["scz-smm.kind"] == "appraisal"
    assert jwt.get_unverified_header(compact) == {"alg": "ES256", "kid": PUBLIC.thumbprint, "typ": "eat+jwt"}


def test_its_signature_holds_without_any_library_for_tokens() -> None:
    header, payload, signature = sign_ear(EAR, KEY).split(b".")
    raw = base64.urlsafe_b64decode(signature + b"==")
    r, s = (int.from_bytes(part, "big") for part in (raw[:32], raw[32:]))
    verified = KEY.public_key().verify(encode_dss_signature(r, s), header + b"." + payload, ec.ECDSA(hashes.SHA256()))
    assert verified is None
    assert len(raw) == 64


def test_another_s_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(EvidenceRefused, match="signature"):
        read(signed(claims(), other))
    larger = parse_jwk(public_jwk(ec.generate_private_key(ec.SECP384R1()).public_key()), error=KeyInvalid)
    with pytest.raises(EvidenceRefused, match="not one for ES256"):
        read(sign_ear(EAR, KEY), key=larger)


def test_the_future_is_refused() -> None:
    assert read(sign_ear(EAR, KEY), NOW - CLOCK_LEEWAY_SECONDS).issued == NOW
    with pytest.raises(EvidenceRefused, match="future"):
        read(sign_ear(EAR, KEY), NOW - CLOCK_LEEWAY_SECONDS - 1)


def test_validity_that_others_set_counts() -> None:
    """RFC 7519, 4.1.4 and 4.1.5: ours set neither `exp` nor `nbf`."""
    leeway = CLOCK_LEEWAY_SECONDS
    for accepted in ({"exp": NOW - leeway + 1}, {"nbf": NOW + leeway}, {"exp": NOW + 0.5, "nbf": NOW - 0.5}):
        assert read(signed({**claims(), **accepted})).submodules == (PART,)
    for claim, message in (({"exp": NOW - leeway}, "expired"), ({"nbf": NOW + leeway + 1}, "not valid yet")):
        with pytest.raises(EvidenceRefused, match=message):
            read(signed({**claims(), **claim}))
    for value in (None, "1", True, [NOW], {}):
        for name in ("exp", "nbf"):
            with pytest.raises(EvidenceInvalid, match="NumericDate"):
                read(signed({**claims(), name: value}))


def test_another_document_by_the_same_key_is_none() -> None:
    payload = json.dumps(claims()).encode()
    for typ in ("JWT", "application/eat+jwt"):
        assert read(sign_compact(payload, typ=typ, kid=PUBLIC.thumbprint, key=KEY)) == EAR
    with pytest.raises(EvidenceInvalid, match="typ"):
        read(sign_compact(payload, typ="scz-smm-grant+jwt", kid=PUBLIC.thumbprint, key=KEY))


WRONG: dict[str, dict[str, Any]] = {
    "another profile": {"eat_profile": "tag:example.org,2026:other"},
    "no time": {"iat": None},
    "time in words": {"iat": "now"},
    "no verifier": {"ear.verifier-id": None},
    "verifier without a build": {"ear.verifier-id": {"developer": "d"}},
    "no submodule": {"submods": {}},
    "too many": {"submods": {str(n): {"ear.status": "none"} for n in range(65)}},
    "submodules in a list": {"submods": []},
    "submodule that is none": {"submods": {"a": 1}},
    "nameless submodule": {"submods": {"": {"ear.status": "none"}}},
    "unknown status": {"submods": {"a": {"ear.status": "fine"}}},
    "no status": {"submods": {"a": {}}},
    "unknown kind": {"scz-smm.kind": "proof"},
    "raw evidence that is none": {"ear.raw-evidence": "=="},
    "claim that AR4SI has not": {"submods": {"a": {"ear.status": "none", "ear.trustworthiness-vector": {"luck": 2}}}},
    "value beyond a byte": {
        "submods": {"a": {"ear.status": "contraindicated", "ear.trustworthiness-vector": {"hardware": 128}}}
    },
    "better than its vector": {
        "submods": {"a": {"ear.status": "affirming", "ear.trustworthiness-vector": {"executables": 33}}}
    },
    "none beside a bad vector": {
        "submods": {"a": {"ear.status": "none", "ear.trustworthiness-vector": {"executables": 99}}}
    },
    "reasons in one word": {"submods": {"a": {"ear.status": "none", "scz-smm.reasons": "because"}}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_signed_document_of_another_form_is_refused(name: str) -> None:
    document = {**claims(), **WRONG[name]}
    with pytest.raises(EvidenceInvalid):
        read(signed({key: value for key, value in document.items() if value is not None}))


def test_a_status_may_be_worse_than_its_vector_and_unknown_claims_are_ignored() -> None:
    submods = {"a": {"ear.status": "warning", "ear.trustworthiness-vector": {"hardware": 2}, "vendor.more": 1}}
    found = read(signed({**claims(), "submods": submods, "eat_nonce": "x"}))
    assert [each.status for each in found.submodules] == ["warning"]


def test_oversized_duplicate_and_unsigned_are_refused() -> None:
    compact = sign_ear(EAR, KEY)
    with pytest.raises(EvidenceInvalid, match="larger"):
        parse_ear(compact + b"A" * LIMIT_BYTES)
    doubled = json.dumps(claims()).replace('"iat":', '"iat": 1, "iat":', 1).encode()
    with pytest.raises(EvidenceInvalid, match="duplicate"):
        read(signed(doubled))
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=")
    with pytest.raises(EvidenceRefused):
        read(header + b"." + compact.split(b".")[1] + b".")


def test_fuzz_no_changed_result_is_accepted() -> None:
    good = sign_ear(EAR, KEY)

    @settings(max_examples=200, deadline=None)
    @given(changed_bytes(good))
    def run(data: bytes) -> None:
        found = value_or_ours(read, data)
        assert (found is not None) == (data.removesuffix(b"\n") == good)

    run()


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ((), "none"),
        ((0, 1, -1), "none"),
        ((2,), "affirming"),
        ((31, -2, -32), "affirming"),
        ((2, 32), "warning"),
        ((-33, 95, -96), "warning"),
        ((2, 96), "contraindicated"),
        ((-97,), "contraindicated"),
        ((127, -128), "contraindicated"),
    ],
)
def test_a_vector_s_status_is_its_worst_tier(values: tuple[int, ...], status: str) -> None:
    assert status_of({str(place): value for place, value in enumerate(values)}) == status


def test_an_appraisal_s_outcome_as_a_result(tmp_path: Path) -> None:
    witness = make_witness(tmp_path)
    changed = witness.start(2, pcrs={**APPROVED, 9: b"x" * 32})
    kept = witness.kept(witness.start(1), changed, witness.start(3, nonce=bytes(32)), witness.start(4))
    raw = format_evidence(kept)
    found = appraise_kept(kept, witness.references(), None)
    made = read(sign_ear(result_of(found, kind="diagnosis", issued=NOW, raw_evidence=raw, host=True), KEY))
    assert [(each.name, each.status) for each in made.submodules] == [
        ("small:1", "affirming"),
        ("small:1#2", "warning"),
        ("small:1#3", "contraindicated"),
        ("small:1#4", "affirming"),
    ]
    assert made.kind == "diagnosis"
    assert made.build.endswith("on the attested host")
    assert made.raw_evidence == raw
    assert "PCR 9" in made.submodules[1].reasons[-1]
    every = {pcr: bytes([pcr + 1]) * 32 for pcr in range(24)}
    most = witness.kept(*(witness.start(1, pcrs=every, model_name="m" * 64, model_version="v" * 64),) * 64)
    found = appraise_kept(most, witness.references(), None)
    largest = result_of(found, kind="appraisal", issued=NOW, raw_evidence=format_evidence(most))
    assert len(read(sign_ear(largest, KEY)).submodules) == 64
    (unknown,) = appraise_kept(witness.kept(), witness.references(boot_policies=()), None)
    assert result_of([unknown], kind="appraisal", issued=NOW, raw_evidence=raw).submodules[0].status == "none"
