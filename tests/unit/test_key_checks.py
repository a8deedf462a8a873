"""attestation.key_checks: every attribute of keys and counter, each by itself; the owner's range of indices."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.key_checks import (
    COUNTER_ATTRIBUTES,
    COUNTER_RANGE,
    counter_indices,
    counter_public,
    verify_ak,
    verify_counter,
    verify_ek,
    verify_srk,
)
from oci_hook.attestation.structures import NvAttributes, parse_nv_public
from oci_hook.errors import DeviceInvalid, EnrolmentRefused
from tests.attestation_vectors import public_of, t

KEY, RSA_KEY = t.p256(), rsa.generate_private_key(65537, 2048)
OWNER = "A" * 43
REQUIRED = {
    "fixedTPM": t.FIXED_TPM,
    "fixedParent": t.FIXED_PARENT,
    "sensitiveDataOrigin": t.SENSITIVE_DATA_ORIGIN,
    "restricted": t.RESTRICTED,
}


def ek(attributes: int = t.EK_ATTRIBUTES, **parts) -> None:
    made = t.rsa_public(RSA_KEY, attributes, **{"symmetric": t.AES_128_CFB, **parts})
    verify_ek(public_of(made), RSA_KEY.public_key(), error=EnrolmentRefused)


def ak(attributes: int = t.AK_ATTRIBUTES, **parts) -> None:
    made = t.ecc_public(KEY, attributes, **{"scheme": t.ECDSA_SHA256, **parts})
    verify_ak(public_of(made), error=EnrolmentRefused)


def srk(attributes: int = t.SRK_ATTRIBUTES, **parts) -> None:
    made = t.ecc_public(KEY, attributes, **{"symmetric": t.AES_128_CFB, **parts})
    verify_srk(public_of(made), error=EnrolmentRefused)


def nv(raw: bytes):
    return parse_nv_public(t.tpm2b(raw), what="a counter", error=DeviceInvalid)


KINDS = [
    (ek, t.EK_ATTRIBUTES, "the EK", ("decrypt", t.DECRYPT), ("sign", t.SIGN)),
    (ak, t.AK_ATTRIBUTES, "the AK", ("sign", t.SIGN), ("decrypt", t.DECRYPT)),
    (srk, t.SRK_ATTRIBUTES, "the SRK", ("decrypt", t.DECRYPT), ("sign", t.SIGN)),
]


@pytest.mark.parametrize(("verify", "good", "what", "wanted", "unwanted"), KINDS)
def test_each_attribute_is_named(verify, good: int, what: str, wanted, unwanted) -> None:
    verify(good)
    for word, bit in {**REQUIRED, wanted[0]: wanted[1]}.items():
        with pytest.raises(EnrolmentRefused, match=f"^{what} is not {word}$"):
            verify(good & ~bit)
    with pytest.raises(EnrolmentRefused, match=f"^{what} may also {unwanted[0]}$"):
        verify(good | unwanted[1])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, (1 << 32) - 1))
def test_any_attributes_are_accepted_only_with_all_that_count(kind, attributes: int) -> None:
    verify, _, _, wanted, unwanted = kind
    needed = sum(REQUIRED.values()) | wanted[1]
    if attributes & needed == needed and not attributes & unwanted[1]:
        verify(attributes)
    else:
        with pytest.raises(EnrolmentRefused):
            verify(attributes)


@pytest.mark.parametrize("verify", [ek, srk])
def test_a_storage_key_protects_with_aes_cfb(verify) -> None:
    verify(symmetric=(t.AES, 256, t.CFB))
    for symmetric in (None, (t.AES, 128, t.CTR), (t.AES, 192, t.CFB), (0x0013, 128, t.CFB), (0x0026, 128, t.CFB)):
        with pytest.raises(EnrolmentRefused, match="AES in CFB mode"):
            verify(symmetric=symmetric)


def test_the_ek_is_the_certified_key() -> None:
    public = public_of(t.rsa_public(RSA_KEY, t.EK_ATTRIBUTES, symmetric=t.AES_128_CFB))
    others = [KEY.public_key(), rsa.generate_private_key(65537, 2048).public_key(), None, "key"]
    for other in [*others, ed25519.Ed25519PrivateKey.generate().public_key()]:
        with pytest.raises(EnrolmentRefused, match="does not carry the key of its certificate"):
            verify_ek(public, other, error=EnrolmentRefused)


@pytest.mark.parametrize("verify", [ak, srk])
def test_name_algorithm(verify) -> None:
    with pytest.raises(EnrolmentRefused, match="Name algorithm is not SHA-256"):
        verify(name_alg=t.SHA384)


def test_curve_and_scheme_of_an_ak() -> None:
    p384 = t.ecc_public(ec.generate_private_key(ec.SECP384R1()), t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
    for other in (p384, t.rsa_public(RSA_KEY, t.AK_ATTRIBUTES)):
        with pytest.raises(EnrolmentRefused, match="not on P-256"):
            verify_ak(public_of(other), error=EnrolmentRefused)
    for scheme in (None, (t.ECDSA, t.SHA384), (0x001C, t.SHA256)):
        with pytest.raises(EnrolmentRefused, match="scheme is not ECDSA with SHA-256"):
            ak(scheme=scheme)


# --- counter ----------------------------------------------------------------------------------------------------------


def test_indices_are_the_specification_s() -> None:
    first_20_bits = int(hashlib.sha256(OWNER.encode()).hexdigest()[:5], 16)
    assert counter_indices(OWNER) == range(0x01800000 + first_20_bits, 0x01800000 + first_20_bits + COUNTER_RANGE)


@settings(max_examples=100, deadline=None)
@given(st.text("ABCabc019-_", min_size=43, max_size=43))
def test_indices_stay_with_the_owner_s_handles_of_the_tcg_registry(owner_id: str) -> None:
    indices = counter_indices(owner_id)
    assert indices[0] >= 0x01800000
    assert indices[-1] < 0x01C00000
    assert len(indices) == COUNTER_RANGE


def test_what_an_enrolment_defines_is_accepted_once_written() -> None:
    index = counter_indices(OWNER)[0]
    defined = parse_nv_public(counter_public(index), what="a counter", error=DeviceInvalid)
    assert defined.raw == t.nv_public(index, t.COUNTER_ATTRIBUTES & ~t.NV_WRITTEN)
    with pytest.raises(EnrolmentRefused, match="never written"):
        verify_counter(defined, OWNER, error=EnrolmentRefused)
    verify_counter(nv(t.nv_public(index)), OWNER, error=EnrolmentRefused)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, (1 << 32) - 1) | st.integers(0, 31).map(lambda bit: t.COUNTER_ATTRIBUTES ^ 1 << bit))
def test_any_other_attributes_are_refused(attributes: int) -> None:
    counter = nv(t.nv_public(counter_indices(OWNER)[0], attributes))
    if attributes == int(COUNTER_ATTRIBUTES | NvAttributes.WRITTEN):
        verify_counter(counter, OWNER, error=EnrolmentRefused)
    else:
        with pytest.raises(EnrolmentRefused):
            verify_counter(counter, OWNER, error=EnrolmentRefused)


def test_each_fault_of_a_counter_is_named() -> None:
    index, good = counter_indices(OWNER)[0], t.COUNTER_ATTRIBUTES
    for says, public in {
        "not a counter: it could be rolled back": t.nv_public(index, t.NV_WITHOUT_TYPE),
        "lockout": t.nv_public(index, good & ~t.NV_NO_DA),
        "never written": t.nv_public(index, good & ~t.NV_WRITTEN),
        "deleted by a policy": t.nv_public(index, good | t.NV_POLICY_DELETE),
        "belongs to the platform": t.nv_public(index, good | t.NV_PLATFORMCREATE),
        "its increment could be blocked": t.nv_public(index, good | t.NV_WRITELOCKED),
        "other attributes than": t.nv_public(index, policy=bytes(32)),
        "not eight bytes": t.nv_public(index, size=9),
        "Name algorithm": t.nv_public(index, name_alg=t.SHA384),
        "not in this owner's range": t.nv_public(index - 1),
    }.items():
        with pytest.raises(EnrolmentRefused, match=says):
            verify_counter(nv(public), OWNER, error=EnrolmentRefused)
