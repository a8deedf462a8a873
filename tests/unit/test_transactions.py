"""attestation.transactions: a request says all that was given; what a TPM makes of it, tests/integration shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from oci_hook.attestation import transactions
from oci_hook.attestation.boot_policy import BootForm
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import parse_host_device
from oci_hook.attestation.sealed import WrappedSecret
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.errors import BootPolicyRefused, TpmUnavailable
from oci_hook.jws import owner_jwk
from oci_hook.lease import Lease
from oci_hook.trust import parse_owner
from tests.attestation_vectors import fresh
from tests.unit.test_host_device import DEVICE

FORMS = [BootForm({pcr: bytes([pcr] * 32) for pcr in (4, 8, 9)}, bytes(32), b"r" * 32, bytes([n]) * 32) for n in (1, 2)]


def test_a_quote_request_says_it_all() -> None:
    asked = json.loads(transactions.quote_request(DEVICE, FORMS, b"x" * 32))
    assert bytes.fromhex(asked["quote"]) == b"x" * 32
    assert [transactions._form(document) for document in asked["forms"]] == FORMS
    assert parse_host_device(asked["device"].encode()) == replace(DEVICE, counters={})


def test_an_unseal_request_says_it_all() -> None:
    vector = next(vector for vector in fresh().values() if "owner" in vector)
    owner = parse_owner(json.dumps(vector["owner"]).encode())
    asked = json.loads(
        transactions.unseal_request(
            DEVICE,
            Unsealing(
                sealed=WrappedSecret(b"p", b"d", b"s"),
                form=FORMS[1],
                boot_policy_key=owner.boot_policy_key,
                policy_ref=b"y" * 32,
                counter_index=7,
                counter_maximum=1 << 63,
                lease=Lease(clock_ms=5),
            ),
        )
    )
    assert asked["lease"] == {"clock_ms": 5}
    assert {name: bytes.fromhex(part) for name, part in asked["unseal"].items()} == {
        "public": b"p",
        "duplicate": b"d",
        "seed": b"s",
    }
    assert [transactions._form(document) for document in asked["forms"]] == [FORMS[1]]
    key = owner_jwk(asked["boot_policy_key"], error=BootPolicyRefused)
    assert key.thumbprint == owner.boot_policy_key.thumbprint
    assert (asked["counter_index"], asked["counter_maximum"]) == (7, 1 << 63)
    assert bytes.fromhex(asked["policy_ref"]) == b"y" * 32


def test_a_quote_crosses() -> None:
    evidence = Evidence(b"attest", b"signature", {0: bytes(32), 23: b"z" * 32})
    for each in (evidence, replace(evidence, counter=1 << 63)):
        assert transactions.read_quote(transactions._quote_document(each)) == each


def test_a_tpm_that_is_away_is_said(tmp_path: object) -> None:
    request = transactions.quote_request(DEVICE, FORMS, bytes(32))
    with pytest.raises(TpmUnavailable):
        transactions.perform(
            request, tcti=f"swtpm:path={tmp_path}/none", lock_file=f"{tmp_path}/lock", timeout_seconds=1
        )
