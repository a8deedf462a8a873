"""Boot policies whose PCR 11 is approved by systemd's signatures, on a real TPM, with systemd-measure's own files.

The TPM is the last witness: each refusal here is tried a second time with the appraisal left out, as by a host that
edited it, and the TPM must refuse by itself and be left without an object or a session.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from oci_hook.attestation import tpm as tpm_module
from oci_hook.attestation.appraisal import AttestationResult, appraise_evidence, nearest_form
from oci_hook.attestation.boot_policy import (
    BootForm,
    BootPolicy,
    parse_boot_policy,
    sign_boot_policy,
    verify_boot_policy,
    with_host_signatures,
)
from oci_hook.attestation.evidence import qualifying_data
from oci_hook.attestation.pcr_signature import (
    PcrSignature,
    SignedPcrs,
    fingerprint,
    load_signer_pem,
    parse_pcr_signatures,
    parse_signer_key,
)
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.transactions import perform, quote_request, read_quote, unseal_request
from oci_hook.errors import BootPolicyRefused, BootStateRefused, KeyRefused, TpmFailed
from oci_hook.jws import public_jwk
from oci_hook.key_errors import LeaseExpired
from oci_hook.lease import Lease
from oci_hook.owner.keyring import Keyring, create_keyring, open_keyring
from tests.integration.test_attestation import CLASS, LOCK_SECONDS, MODEL, SECRET, Host, Sealing, wrapped
from tests.integration.test_lease import HOUR_MS, counted
from tests.pcr_signer import IMAGE, PHASES, UPDATE, PcrSigner, boot_image
from tests.software_tpm import SoftwareTpm

FIXED = (7, 12, 14)
tss = tpm_module.tss


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    folder = tmp_path_factory.mktemp("owner") / "keys"
    create_keyring(folder, "acme", None)
    return open_keyring(folder, lambda: "")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> PcrSigner:
    return PcrSigner(tmp_path_factory.mktemp("signer") / "keys")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> PcrSigner:
    """Who signs for another operating system."""
    return PcrSigner(tmp_path_factory.mktemp("stranger") / "keys")


@pytest.fixture(scope="module")
def _machine(keyring: Keyring) -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    try:
        with SoftwareTpm(folder / "tpm") as tpm:
            host = Host(tpm, folder / "tpm.lock")
            host.provision(keyring.owner.owner_id)
            yield host
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def host(_machine: Host) -> Iterator[Host]:
    """The host, booted with a unified kernel image; nothing may be left in its TPM after any test."""
    boot_image(_machine.tpm)
    yield _machine
    assert _machine.handles() == []


def signed_policy(
    keyring: Keyring, nested: list[tuple[Mapping[int, bytes], SignedPcrs]], *plain: Mapping[int, bytes]
) -> BootPolicy:
    """A boot policy as a host has it, before it looked for signatures."""
    owner = keyring.owner
    document = sign_boot_policy(
        plain,
        owner_id=owner.owner_id,
        model_name=MODEL,
        device_class=CLASS,
        created=1,
        key=keyring.boot_policy_key,
        nested=nested,
    )
    return verify_boot_policy(parse_boot_policy(document), owner=owner, model_name=MODEL, device_class=CLASS)


@pytest.fixture
def nested(host: Host, keyring: Keyring, signer: PcrSigner) -> BootPolicy:
    """What the owner signed once: the signer's PCR 11, the others as they are now."""
    return signed_policy(keyring, [(host.pcrs(FIXED), SignedPcrs(load_signer_pem(signer.public.read_bytes())))])


@pytest.fixture
def sealing(host: Host, keyring: Keyring, nested: BootPolicy) -> Sealing:
    maximum = host.count(keyring)
    return Sealing(host, keyring, nested.forms[0], wrapped(host, keyring, maximum), maximum)


def here(policy: BootPolicy, file: bytes) -> BootPolicy:
    """The policy as this host reads it, with its signature file."""
    return with_host_signatures(policy, parse_pcr_signatures(file), "the file")


def appraise(host: Host, policy: BootPolicy) -> AttestationResult:
    """A quote by the request that the hook makes, and its appraisal."""
    extra_data = qualifying_data(b"n" * 32, b"t" * 32, "c", "sha256:" + "0" * 64, b"a" * 32)
    request = quote_request(host.device, policy.forms, extra_data)
    answer = perform(request, tcti=host.tpm.tcti, lock_file=str(host.lock_file), timeout_seconds=LOCK_SECONDS)
    return appraise_evidence(read_quote(answer), ak=host.device.ak, expected_extra_data=extra_data, boot_policy=policy)


def release(sealing: Sealing, form: BootForm) -> bytes:
    """The secret by the request that the hook makes."""
    host = sealing.host
    request = unseal_request(host.device, replace(sealing, form=form).asked)
    return perform(request, tcti=host.tpm.tcti, lock_file=str(host.lock_file), timeout_seconds=LOCK_SECONDS)


def refused(sealing: Sealing, policy: BootPolicy, match: str) -> None:
    """The appraisal refuses with these words, and so does the TPM without it."""
    host = sealing.host
    with host.refused(BootStateRefused, match):
        appraise(host, policy)
    for form in policy.forms:
        with host.refused(BootStateRefused):
            release(sealing, form)


# --- what works -------------------------------------------------------------------------------------------------------


def test_a_signed_boot_opens_and_its_key_is_the_one_that_systemd_names(
    sealing: Sealing, nested: BootPolicy, signer: PcrSigner
) -> None:
    file = signer.sign(sealing.host.tpm)
    policy = here(nested, file)
    assert appraise(sealing.host, policy).form is policy.forms[0]
    assert release(sealing, policy.forms[0]) == SECRET
    named = {entry["pkfp"] for entry in json.loads(file)["sha256"]}
    assert named == {fingerprint(load_signer_pem(signer.public.read_bytes())).hex()}


def test_an_update_of_the_system_needs_no_owner(sealing: Sealing, nested: BootPolicy, signer: PcrSigner) -> None:
    boot_image(sealing.host.tpm, UPDATE)
    refused(sealing, here(nested, signer.sign(sealing.host.tpm, IMAGE)), "none of them for this value")
    policy = here(nested, signer.sign(sealing.host.tpm, UPDATE))
    assert release(sealing, appraise(sealing.host, policy).form) == SECRET


def test_a_lease_on_a_nested_form_ends_with_its_last_boot(
    sealing: Sealing, nested: BootPolicy, keyring: Keyring, signer: PcrSigner
) -> None:
    host = sealing.host
    resets, clock, _ = counted(host)
    lease = Lease(resets, clock + HOUR_MS)
    leased = replace(sealing, blob=wrapped(host, keyring, sealing.maximum, lease=lease), lease=lease)
    policy = here(nested, signer.sign(host.tpm))
    assert release(leased, appraise(host, policy).form) == SECRET
    with host.refused(KeyRefused):  # a host that leaves the lease out of the walk
        release(replace(leased, lease=None), policy.forms[0])
    boot_image(host.tpm)
    with host.refused(LeaseExpired, "boots"):
        release(leased, appraise(host, policy).form)


def test_each_phase_that_is_signed_opens_and_the_next_one_does_not(
    sealing: Sealing, nested: BootPolicy, signer: PcrSigner
) -> None:
    file = signer.sign(sealing.host.tpm)
    policy = here(nested, file)
    assert len(policy.forms[0].signed.signatures) == len(PHASES)  # type: ignore[union-attr]
    sealing.host.tpm.extend(11, "shutdown")
    refused(sealing, policy, r"PCR 11 \(unified kernel image\); the file: 4 signature\(s\) by the form's key, none of")


def test_a_phase_that_begins_between_quote_and_release_opens(
    sealing: Sealing, nested: BootPolicy, signer: PcrSigner
) -> None:
    phases = [":".join(PHASES), ":".join((*PHASES, "later"))]
    policy = here(nested, signer.sign(sealing.host.tpm, phases=phases))
    form = appraise(sealing.host, policy).form
    sealing.host.tpm.extend(11, "later")
    assert release(sealing, form) == SECRET


def test_a_form_of_values_beside_a_nested_one_goes_on_opening(
    sealing: Sealing, nested: BootPolicy, keyring: Keyring, signer: PcrSigner
) -> None:
    host = sealing.host
    (form,) = nested.forms
    assert form.signed is not None
    values = host.pcrs((*FIXED, 11))
    both = signed_policy(keyring, [(form.pcrs, form.signed)], values)
    assert release(sealing, appraise(host, here(both, b"{}")).form) == SECRET  # no signature is needed
    assert appraise(host, here(both, b"{}")).form.signed is None
    boot_image(host.tpm, UPDATE)
    policy = here(both, signer.sign(host.tpm, UPDATE))
    assert appraise(host, policy).form.signed is not None
    assert release(sealing, appraise(host, policy).form) == SECRET


def test_a_signer_on_p256_opens_too(sealing: Sealing, keyring: Keyring) -> None:
    """systemd 252 signs with RSA alone; a TPM takes both, and this file is made as it would be."""
    host, key = sealing.host, ec.generate_private_key(ec.SECP256R1())
    pol = policy_pcr(ZERO_DIGEST, host.pcrs((11,)))
    sig = base64.b64encode(key.sign(pol, ec.ECDSA(hashes.SHA256()))).decode()
    file = json.dumps({"sha256": [{"pcrs": [11], "pkfp": "00" * 32, "pol": pol.hex(), "sig": sig}]}).encode()
    jwk = parse_signer_key(public_jwk(key.public_key()), error=BootPolicyRefused)
    policy = here(signed_policy(keyring, [(host.pcrs(FIXED), SignedPcrs(jwk))]), file)
    assert release(sealing, appraise(host, policy).form) == SECRET


# --- what does not ----------------------------------------------------------------------------------------------------


def test_without_a_signature_by_the_key_nothing_opens(
    sealing: Sealing, nested: BootPolicy, stranger: PcrSigner
) -> None:
    refused(sealing, nested, "no signature file was read: no signature by the form's key")
    foreign = stranger.sign(sealing.host.tpm)
    refused(sealing, here(nested, foreign), "the file: no signature by the form's key")


def test_a_part_that_is_fixed_must_be_as_it_was(sealing: Sealing, nested: BootPolicy, signer: PcrSigner) -> None:
    boot_image(sealing.host.tpm, changes={12: "init=/bin/sh", 7: "secure boot off"})
    policy = here(nested, signer.sign(sealing.host.tpm))
    refused(sealing, policy, r"PCR 7 \(secure boot.*PCR 12 \(kernel command line and credentials")
    assert nearest_form(policy.forms, {}) is policy.forms[0]


def test_a_host_that_makes_up_signatures_gets_nothing_from_the_tpm(
    sealing: Sealing, nested: BootPolicy, signer: PcrSigner, stranger: PcrSigner
) -> None:
    """The host edits what it attaches to the form: another's signature, a tampered one, one for another value."""
    host = sealing.host
    (form,) = nested.forms
    assert form.signed is not None
    host.tpm.extend(11, "malware")
    pol = policy_pcr(ZERO_DIGEST, host.pcrs((11,)))
    good = here(nested, signer.sign(host.tpm)).forms[0].signed
    assert good is not None
    key = load_pem_private_key(stranger.private.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    signatures = {
        "another's": key.sign(pol, padding.PKCS1v15(), hashes.SHA256()),
        "another value's": good.signatures[-1].signature,
        "tampered": bytes([good.signatures[-1].signature[0] ^ 1]) + good.signatures[-1].signature[1:],
        "empty": b"",
    }
    for what, signature in signatures.items():
        lying = replace(form, signed=replace(form.signed, signatures=(PcrSignature(pol, signature),)))
        with host.refused(BootPolicyRefused):
            release(sealing, lying)
        assert host.handles() == [], what
    mine = load_signer_pem(stranger.public.read_bytes())  # and with the stranger's key in the form
    lying = replace(form, signed=SignedPcrs(mine, signatures=(PcrSignature(pol, signatures["another's"]),)))
    with host.refused(BootPolicyRefused):
        release(sealing, lying)


def test_a_signature_over_a_policy_ref_is_none(sealing: Sealing, nested: BootPolicy, signer: PcrSigner) -> None:
    host = sealing.host
    pol = policy_pcr(ZERO_DIGEST, host.pcrs((11,)))
    key = load_pem_private_key(signer.private.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    sig = key.sign(pol + sealing.reference, padding.PKCS1v15(), hashes.SHA256())
    entry = {"pcrs": [11], "pkfp": "00" * 32, "pol": pol.hex(), "sig": base64.b64encode(sig).decode()}
    refused(sealing, here(nested, json.dumps({"sha256": [entry]}).encode()), "no signature by the form's key")
    (form,) = nested.forms
    assert form.signed is not None
    with host.refused(BootPolicyRefused):
        release(sealing, replace(form, signed=replace(form.signed, signatures=(PcrSignature(pol, sig),))))


def test_the_signer_alone_opens_nothing(sealing: Sealing, nested: BootPolicy, signer: PcrSigner) -> None:
    """A signed PCR 11 is a part of a state: a form without the fixed part is none that the owner signed."""
    policy = here(nested, signer.sign(sealing.host.tpm))
    (form,) = policy.forms
    with sealing.host.refused(BootPolicyRefused):
        release(sealing, replace(form, pcrs={}))
    with sealing.host.refused(BootPolicyRefused):
        release(sealing, replace(form, signed=None))
    with sealing.host.refused(BootPolicyRefused):  # for another model line or device class
        release(replace(sealing, reference=bytes(32)), form)


def open_while(sealing: Sealing, command: str, pcr: int, *words: bytes) -> bytes:
    """Open while words are measured into a PCR, one before each call of a command of the walk."""
    left = list(words)
    with sealing.host.transaction() as tpm:
        walk_on = getattr(tpm, command)

        def measured_first(*arguments: Any) -> Any:
            found = walk_on(*arguments) if command == "_pcr_read" else None
            if left:
                tpm._esys.pcr_event(tss.ESYS_TR(pcr), left.pop(0))
            return found if command == "_pcr_read" else walk_on(*arguments)

        setattr(tpm, command, measured_first)
        opened = sealing.open_in(tpm)
    assert left == []
    return opened


def test_a_phase_that_begins_inside_the_walk_lets_it_begin_again(
    sealing: Sealing, nested: BootPolicy, signer: PcrSigner
) -> None:
    later = [":".join((*PHASES, *["later"] * count)) for count in range(3)]
    form = here(nested, signer.sign(sealing.host.tpm, phases=later)).forms[0]
    signed_here = replace(sealing, form=form)
    assert open_while(signed_here, "_pcr_read", 11, b"later") == SECRET  # read, then changed: PolicyPCR fails
    assert open_while(signed_here, "_policy_unseal_only", 11, b"later") == SECRET  # after both parts
    assert open_while(signed_here, "_policy_unseal_only", 10, b"x", b"y") == SECRET  # a PCR that nobody selected
    with sealing.host.refused(BootStateRefused, "none of them for this value"):
        open_while(signed_here, "_pcr_read", 11, b"a phase that nobody signed")


def test_a_walk_that_never_ends_is_given_up(sealing: Sealing, nested: BootPolicy, signer: PcrSigner) -> None:
    form = here(nested, signer.sign(sealing.host.tpm)).forms[0]
    with sealing.host.refused(TpmFailed, "kept changing"):
        open_while(replace(sealing, form=form), "_policy_unseal_only", 10, *[b"x"] * 5)
