"""attestation.boot_policy: its vectors, stored and fresh; signing; coverage; fuzz."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.attestation.boot_policy import (
    BootPolicy,
    parse_boot_policy,
    pcrs_document,
    sign_boot_policy,
    verify_boot_policy,
    verify_coverage,
)
from oci_hook.attestation.policy import approved_policy
from oci_hook.documents import canonical
from oci_hook.errors import BootPolicyInvalid, BootPolicyRefused
from tests.attestation_vectors import (
    STORED,
    Vector,
    builder,
    fresh,
    hostile,
    names,
    owner_of,
    refusal,
    run_boot_policy,
    value_or_ours,
)

NAMES = names("boot-policy")
GOOD = STORED["boot-policy-good"]
SAYS = {1: "the boot policy is ", 2: "the policy is not that of its PCR values", 3: "is not signed by the owner"}


def check(vector: Vector) -> None:
    if vector["expected"] == "accepted":
        policy = run_boot_policy(vector)
        document = json.loads(vector["document"])
        assert [pcrs_document(form.pcrs) for form in policy.forms] == [form["pcrs"] for form in document["forms"]]
        reference = f"scz-smm/boot-policy/v1\0{vector['model']}\0{vector['class']}"
        assert policy.policy_ref == hashlib.sha256(reference.encode()).digest()
        return
    error = refusal(vector, run_boot_policy)
    if vector["check"] == 0:
        with pytest.raises(BootPolicyInvalid):
            parse_boot_policy(vector["document"].encode())
    else:
        parse_boot_policy(vector["document"].encode())
        assert SAYS[vector["check"]] in error.message


@pytest.mark.parametrize("name", NAMES)
def test_stored_vector(name: str) -> None:
    assert STORED[name]["name"] == name
    check(STORED[name])


def test_fresh_vectors_are_the_stored_ones_and_do_the_same() -> None:
    made = {name: vector for name, vector in fresh().items() if vector["area"] == "boot-policy"}
    assert made.keys() == set(NAMES)
    for name, vector in made.items():
        outline = [(one["expected"], one["check"], one["description"]) for one in (vector, STORED[name])]
        assert outline[0] == outline[1]
        check(vector)


def test_a_second_form_is_named_by_its_number() -> None:
    for name in ("policy-of-second-form-not-of-values", "signature-second-form"):
        assert "form 2 of the boot policy" in refusal(STORED[f"boot-policy-{name}"], run_boot_policy).message


@pytest.mark.parametrize(("model", "device_class"), [("bert", "default"), ("resnet", "lax"), ("resnetdefault", "x")])
def test_a_good_policy_serves_no_other_model_line_or_class(model: str, device_class: str) -> None:
    with pytest.raises(BootPolicyRefused):
        run_boot_policy({**GOOD, "model": model, "class": device_class})


def test_relabelled_policy_is_refused_by_its_signature() -> None:
    document = {**json.loads(GOOD["document"]), "model": "bert"}
    with pytest.raises(BootPolicyRefused, match="is not signed by the owner for this model line"):
        run_boot_policy({**GOOD, "model": "bert", "document": json.dumps(document)})


# --- signing ----------------------------------------------------------------------------------------------------------


def measured(boot: str = "a", pcrs: tuple[int, ...] = (4, 7, 8, 9)) -> dict[int, bytes]:
    return {pcr: hashlib.sha256(f"{boot}{pcr}".encode()).digest() for pcr in pcrs}


def sign(*forms: Mapping[int, bytes]) -> bytes:
    owner = builder().owner
    names = {"owner_id": owner.owner_id, "model_name": "resnet", "device_class": "default"}
    return sign_boot_policy(forms, **names, created=1, key=owner.boot_policy)


def read(document: bytes) -> BootPolicy:
    owner = owner_of({"owner": builder().owner.document})
    return verify_boot_policy(parse_boot_policy(document), owner=owner, model_name="resnet", device_class="default")


def test_what_is_signed_is_read() -> None:
    forms = [measured(str(number)) for number in range(32)]
    policy = read(sign(*forms))
    assert [form.pcrs for form in policy.forms] == forms
    assert [form.policy for form in policy.forms] == [approved_policy(form) for form in forms]
    assert policy.created == 1


def test_signing_refuses_what_a_reader_would_refuse() -> None:
    for forms in (
        [],
        [measured(str(number)) for number in range(33)],
        [measured(), measured()],
        [measured(pcrs=(7,))],
        [measured(), measured(pcrs=(4, 8))],
        [measured(pcrs=(4, 8, 9, 16))],
        [{**measured(), 9: bytes(32)}],
        [{**measured(), 9: b"\xff" * 32}],
        [{**measured(), 24: b"\x11" * 32}],
        [{**measured(), 9: b"\x11" * 48}],
    ):
        with pytest.raises(BootPolicyInvalid):
            sign(*forms)


def test_another_key_s_signature_is_refused() -> None:
    owner = builder().owner
    document = sign_boot_policy(
        [measured()],
        owner_id=owner.owner_id,
        model_name="resnet",
        device_class="default",
        created=1,
        key=ec.generate_private_key(ec.SECP256R1()),
    )
    with pytest.raises(BootPolicyRefused, match="is not signed by the owner"):
        read(document)


def test_an_epoch_is_signed_though_it_stands_beside() -> None:
    """Nobody can lift what was signed into a later epoch, nor say that it is of an earlier one."""
    owner = builder().owner

    def signed(epoch: int) -> dict[str, object]:
        names = {"owner_id": owner.owner_id, "model_name": "resnet", "device_class": "default"}
        document = sign_boot_policy([measured()], **names, created=1, key=owner.boot_policy, epoch=epoch)
        loaded: dict[str, object] = json.loads(document)
        return loaded

    for epoch in (0, 1, 2, (1 << 31) - 1):
        document = signed(epoch)
        assert document.get("epoch", 0) == epoch
        assert read(canonical(document)).epoch == epoch
        for other in {0, 1, 3} - {epoch}:
            moved = {name: value for name, value in document.items() if name != "epoch"}
            with pytest.raises(BootPolicyRefused, match="is not signed by the owner"):
                read(canonical({**moved, "epoch": other} if other else moved))
    assert "epoch" not in signed(0)  # as by versions that know none
    for wrong in (0, -1, 1 << 31, 1.0, True, "1", None):
        with pytest.raises(BootPolicyInvalid):
            read(canonical({**signed(1), "epoch": wrong}))
    with pytest.raises(BootPolicyInvalid):
        signed(1 << 31)


# --- coverage and fuzz ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 23)))
def test_coverage(pcrs: set[int]) -> None:
    enough = ({11, 12} <= pcrs or {4, 8, 9} <= pcrs) and not {16, 23} & pcrs
    values = dict.fromkeys(pcrs, b"\x11" * 32)
    if enough:
        verify_coverage(values, BootPolicyInvalid)
        assert read(sign(values)).forms[0].pcrs == values
    else:
        with pytest.raises(BootPolicyInvalid):
            verify_coverage(values, BootPolicyInvalid)


@settings(max_examples=300, deadline=None)
@given(hostile(GOOD["document"].encode()))
def test_fuzz(data: bytes) -> None:
    unverified = value_or_ours(parse_boot_policy, data)
    if unverified is not None:
        for form in unverified.unverified_forms:
            verify_coverage(form.pcrs, BootPolicyInvalid)
        vector = {**GOOD, "document": data.decode()}
        policy = value_or_ours(lambda _: run_boot_policy(vector), data)
        good = run_boot_policy(GOOD)
        assert policy is None or policy.forms == good.forms


def test_deep_or_large_documents_are_refused() -> None:
    for data in (b" " * (1 << 20) + canonical({}), b'{"a":' * 5000 + b"1" + b"}" * 5000):
        with pytest.raises(BootPolicyInvalid):
            parse_boot_policy(data)


@pytest.mark.parametrize("size", [0, 20, 31, 33, 48])
def test_coverage_wants_sha256_values(size: int) -> None:
    with pytest.raises(BootPolicyInvalid, match="PCR 9 is not a SHA-256 value"):
        verify_coverage({**measured(), 9: b"\x11" * size}, BootPolicyInvalid)
