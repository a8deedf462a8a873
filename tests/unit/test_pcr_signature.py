"""attestation.pcr_signature: a file that systemd-measure 252 wrote (tests/fixtures), hostile ones, keys, forms.

The private half of the stored file's key was thrown away; tests/integration makes files anew and asks a TPM.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook import boot_signatures
from oci_hook.attestation.appraisal import differing_pcrs, nearest_form
from oci_hook.attestation.boot_policy import (
    BootPolicy,
    parse_boot_policy,
    sign_boot_policy,
    verify_boot_policy,
    with_host_signatures,
)
from oci_hook.attestation.pcr_signature import (
    ENTRIES_LIMIT,
    LIMIT_BYTES,
    SignedPcrs,
    UnverifiedPcrSignature,
    fingerprint,
    load_signer_pem,
    parse_pcr_signatures,
    signer_tpm_public,
)
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.structures import parse_public, tpm2b
from oci_hook.boot_signatures import with_signatures_of_host
from oci_hook.config import Config
from oci_hook.documents import canonical
from oci_hook.errors import BootPolicyInvalid, BootPolicyRefused, DeviceInvalid, KeyInvalid
from tests.attestation_vectors import builder, hostile, owner_of, value_or_ours
from tests.pcr_signer import IMAGE, PHASES, changed

FOLDER = Path(__file__).parents[1] / "fixtures" / "pcr-signature"
FILE, PEM = ((FOLDER / name).read_bytes() for name in ("tpm2-pcr-signature.json", "pcr.pem"))
KEY = load_signer_pem(PEM)
FIXED = {pcr: hashlib.sha256(b"%d" % pcr).digest() for pcr in (7, 12, 14)}


def measured(phases: int) -> bytes:
    """PCR 11 after the image of `tests.pcr_signer` and so many phases, replayed here."""
    words = [part for name, text in IMAGE.items() for part in (f".{name}\0", text)] + list(PHASES[:phases])
    value = bytes(32)
    for word in words:
        value = hashlib.sha256(value + hashlib.sha256(word.encode()).digest()).digest()
    return value


def signed(file: bytes = FILE) -> SignedPcrs:
    return SignedPcrs(KEY).with_signatures(parse_pcr_signatures(file), "the file")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_of_systemd_measure_approves_its_four_phases_and_nothing_else() -> None:
    found = signed()
    assert len(found.signatures) == len(PHASES)
    for phases in range(1, 5):
        approved = found.signature_for({11: measured(phases)})
        assert approved is not None
        assert approved.policy == policy_pcr(ZERO_DIGEST, {11: measured(phases)})
    assert found.signature_for({11: measured(0)}) is None
    assert found.signature_for({}) is None
    assert {entry["pkfp"] for entry in json.loads(FILE)["sha256"]} == {fingerprint(KEY).hex()}


def test_blank_pcrs_are_never_approved() -> None:
    key = rsa.generate_private_key(65537, 2048)
    for value in (bytes(32), b"\xff" * 32):
        pol = policy_pcr(ZERO_DIGEST, {11: value})
        entry = UnverifiedPcrSignature((11,), pol, key.sign(pol, padding.PKCS1v15(), hashes.SHA256()))
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        found = SignedPcrs(load_signer_pem(pem)).with_signatures([entry], "made")
        assert len(found.signatures) == 1
        assert found.signature_for({11: value}) is None


def _moved(document: dict[str, Any]) -> None:
    document["sha1"] = document.pop("sha256")


def _tampered_sig(document: dict[str, Any]) -> None:
    for entry in document["sha256"]:
        raw = bytearray(base64.b64decode(entry["sig"]))
        raw[-1] ^= 1
        entry["sig"] = base64.b64encode(raw).decode()


def _crossed(document: dict[str, Any]) -> None:
    sigs = [entry["sig"] for entry in document["sha256"]]
    for entry, sig in zip(document["sha256"], sigs[1:] + sigs[:1], strict=True):
        entry["sig"] = sig


@pytest.mark.parametrize("change", [_moved, _tampered_sig, _crossed])
def test_what_the_key_did_not_sign_is_left_out(change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(FILE)
    change(document)
    found = signed(json.dumps(document).encode())
    assert found.signatures == ()
    assert found.signature_for({11: measured(4)}) is None


@pytest.mark.parametrize("members", [{"pol": "00" * 32}, {"pcrs": [12]}, {"pcrs": [11, 12]}, {"pcrs": [11, 11]}])
def test_other_policies_and_pcrs_are_left_out(members: dict[str, Any]) -> None:
    assert signed(changed(FILE, **members)).signatures == ()


def test_what_systemd_may_add_is_ignored() -> None:
    document = json.loads(changed(FILE, new="member", pkfp="anything"))
    document.update({"sha384": [{"no": "entry"}], "version": 9})
    assert len(signed(json.dumps(document).encode()).signatures) == len(PHASES)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"[]",
        b"{",
        b'{"sha256": {}}',
        b'{"sha256": [1]}',
        b'{"sha256": [], "sha256": []}',
        changed(FILE, pcrs=[]),
        changed(FILE, pcrs=[24]),
        changed(FILE, pcrs=[True]),
        changed(FILE, pcrs="11"),
        changed(FILE, pol="00" * 31),
        changed(FILE, pol="00" * 33),
        changed(FILE, sig="!"),
        changed(FILE, sig=""),
        changed(FILE, sig="A" * 1025),
        changed(FILE, sig=None),
        json.dumps({"sha256": json.loads(FILE)["sha256"][:1] * 1000}).encode(),
        json.dumps({"sha256": [{"pcrs": [11], "pol": "00" * 32, "sig": "AAAA"}] * (ENTRIES_LIMIT + 1)}).encode(),
        b" " * LIMIT_BYTES + b"{}",
    ],
)
def test_malformed_files_are_refused(file: bytes) -> None:
    with pytest.raises(BootPolicyInvalid) as raised:
        parse_pcr_signatures(file)
    assert raised.value.message.isprintable()


@settings(max_examples=200)
@given(st.data())
def test_any_bytes_are_a_value_or_refused_and_approve_nothing_new(data: st.DataObject) -> None:
    entries = value_or_ours(parse_pcr_signatures, data.draw(hostile(FILE)))
    found = SignedPcrs(KEY).with_signatures(entries or (), "fuzz")
    assert set(found.signatures) <= set(signed().signatures)


# --- keys -------------------------------------------------------------------------------------------------------------


def pem_of(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        PEM[:100],
        PEM.replace(b"PUBLIC", b"PRIVATE"),
        pem_of(rsa.generate_private_key(65537, 3072)),
        pem_of(rsa.generate_private_key(3, 2048)),
        pem_of(ec.generate_private_key(ec.SECP384R1())),
        pem_of(ec.generate_private_key(ec.SECP256K1())),
        pem_of(ed25519.Ed25519PrivateKey.generate()),
    ],
)
def test_keys_that_a_tpm_need_not_know_are_refused(pem: bytes) -> None:
    with pytest.raises(KeyInvalid):
        load_signer_pem(pem)


def test_the_public_area_is_the_keys_own() -> None:
    for key in (KEY, load_signer_pem(pem_of(ec.generate_private_key(ec.SECP256R1())))):
        public = parse_public(tpm2b(signer_tpm_public(key)), what="a signer", error=DeviceInvalid)
        assert load_signer_pem(public.key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)) == key


# --- forms ------------------------------------------------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    owner = builder().owner
    names = {"owner_id": owner.owner_id, "model_name": "resnet", "device_class": "default"}
    made = sign_boot_policy([], **names, created=1, key=owner.boot_policy, nested=[(FIXED, SignedPcrs(KEY))])
    whole: dict[str, Any] = json.loads(made)
    whole["forms"][0].update(changes)
    return whole


def read(value: dict[str, Any]) -> BootPolicy:
    return verify_boot_policy(
        parse_boot_policy(canonical(value)),
        owner=owner_of({"owner": builder().owner.document}),
        model_name="resnet",
        device_class="default",
    )


def test_a_nested_form_is_read_as_it_was_signed() -> None:
    (form,) = read(document()).forms
    assert (form.pcrs, form.signed, form.selection) == (FIXED, SignedPcrs(KEY), {7, 11, 12, 14})


def _key(**members: Any) -> dict[str, Any]:
    return {"pcrs": [11], "key": {**KEY.members, **members}}


@pytest.mark.parametrize(
    "signed_member",
    [
        None,
        [],
        {},
        {"pcrs": [11]},
        {"key": dict(KEY.members)},
        {**_key(), "more": 1},
        {**_key(), "pcrs": [12]},
        {**_key(), "pcrs": [11, 12]},
        {**_key(), "pcrs": []},
        {**_key(), "pcrs": [11, 11]},
        _key(e="AQAC"),
        _key(kid="x"),
        _key(d="AQAB"),
        _key(kty="oct"),
        _key(n=KEY.members["n"][:-8]),
    ],
)
def test_malformed_nested_members_are_refused(signed_member: Any) -> None:
    with pytest.raises(BootPolicyInvalid):
        parse_boot_policy(canonical(document(signed=signed_member)))


def test_a_form_that_was_changed_is_not_the_owners() -> None:
    other = {"pcrs": [11], "key": dict(load_signer_pem(pem_of(rsa.generate_private_key(65537, 2048))).members)}
    for changes in ({"signed": other}, {"pcrs": {"12": "11" * 32}}, {"policy": "00" * 32}):
        with pytest.raises(BootPolicyRefused, match="the policy is not that of its PCR values"):
            read(document(**changes))
    whole = document()
    del whole["forms"][0]["signed"]
    with pytest.raises(BootPolicyInvalid, match="cover neither"):
        read(whole)
    with pytest.raises(BootPolicyRefused, match="is not signed by the owner"):
        read(document(signature={"r": "11" * 32, "s": "11" * 32}))


@pytest.mark.parametrize(
    "fixed", [{7: b"\1" * 32}, {11: b"\1" * 32, 12: b"\1" * 32}, {4: b"\1" * 32, 8: b"\1" * 32}, {}]
)
def test_coverage_holds_for_nested_forms(fixed: dict[int, bytes]) -> None:
    owner = builder().owner
    with pytest.raises(BootPolicyInvalid):
        sign_boot_policy(
            [],
            owner_id=owner.owner_id,
            model_name="resnet",
            device_class="default",
            created=1,
            key=owner.boot_policy,
            nested=[(fixed, SignedPcrs(KEY))],
        )


def test_the_nearest_form_counts_a_missing_signature() -> None:
    owner = builder().owner
    names = {"owner_id": owner.owner_id, "model_name": "resnet", "device_class": "default"}
    values = {**FIXED, 11: measured(4)}
    nested = [(FIXED, SignedPcrs(KEY))]
    made = sign_boot_policy([values], **names, created=1, key=owner.boot_policy, nested=nested)
    policy = read(json.loads(made))
    assert nearest_form(policy.forms, values).signed is None
    later = {**FIXED, 11: measured(3)}
    assert differing_pcrs(policy.forms[1], later) == (11,)
    signed_here = with_host_signatures(policy, parse_pcr_signatures(FILE), "the file")
    assert differing_pcrs(signed_here.forms[1], later) == ()
    assert nearest_form(signed_here.forms, later).signed is not None


# --- the host's file --------------------------------------------------------------------------------------------------


def signed_of(policy: BootPolicy) -> SignedPcrs:
    (form,) = policy.forms
    assert form.signed is not None
    return form.signed


def test_the_configured_file_is_read_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    policy, path = read(document()), tmp_path / "signatures.json"
    config = Config(boot_pcr_signature=str(path))
    path.write_bytes(FILE)
    path.chmod(0o644)
    assert len(signed_of(with_signatures_of_host(policy, config)).signatures) == len(PHASES)
    path.chmod(0o666)
    found = signed_of(with_signatures_of_host(policy, config))
    assert found.signatures == ()
    assert "writable by others than root" in found.what_is_missing
    path.chmod(0o644)
    path.write_bytes(b"{" * (LIMIT_BYTES + 1))
    assert "is larger than" in signed_of(with_signatures_of_host(policy, config)).what_is_missing


def test_the_packages_file_is_read_where_the_other_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "run.json", tmp_path / "lib.json"
    monkeypatch.setattr(boot_signatures, "SECOND_FILE", str(second))
    policy, config = read(document()), Config(boot_pcr_signature=str(first))
    assert signed_of(with_signatures_of_host(policy, config)).source == f"there is no {first} and no {second}"
    second.write_bytes(FILE)
    assert signed_of(with_signatures_of_host(policy, config)).source == str(second)
    first.write_bytes(FILE)
    assert signed_of(with_signatures_of_host(policy, config)).source == str(first)
    first.write_bytes(b"broken")
    assert signed_of(with_signatures_of_host(policy, config)).signatures == ()
