"""What doctor says of a model's grant, boot policy, lease and revocations: what a start would find, before it.

The TPM's answer is made here; integration/test_release.py and matrix/test_doctor.py have it from a TPM.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from oci_hook.attestation.device_record import format_device_record
from oci_hook.attestation.policy import ZERO_DIGEST, policy_pcr
from oci_hook.attestation.tpm_properties import TpmProperties
from oci_hook.cli.checks.check import Check
from oci_hook.cli.checks.models import check_models
from oci_hook.cli.checks.tpm import Counted, TpmAnswer
from oci_hook.config import load_config
from oci_hook.owner.records import OwnerRecords
from oci_hook.trust_folder import Trust
from tests.commands import ISSUER, SUBJECT, Household, done, sczctl
from tests.devices import measured
from tests.sev_snp import Maker, policy_document

SIGNED = b"\x77" * 32


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path / "household")


def look(
    house: Household,
    pcrs: Mapping[int, bytes] | None = None,
    *,
    counter: int | None = 1,
    resets: int = 1,
    clock_ms: int = 1000,
    enrolled: int | None = None,
) -> Check:
    """Doctor's line about the model, by a TPM that says this."""
    device = house.devices["edge-1"].host
    if enrolled is not None:
        device = replace(device, counter_values={house.owner.owner_id: enrolled})
    counted = Counted(resets, clock_ms, {each.index: counter for each in device.counters.values()})
    answer = TpmAnswer(dict(pcrs or measured()), TpmProperties("IBM", "", "1", False, 0, 3, 1000), counted)
    owners = Trust(str(house.host / "trust")).owners()
    (line,) = check_models(load_config(str(house.config)), owners, device, answer, [], deep=False)
    return line


def failed(check: Check, *words: str) -> None:
    assert check.status == "fail", check
    for word in words:
        assert word in f"{check.message} {check.remedy}", check


def ready(house: Household) -> Household:
    done(house.ctl("add", house.prepared()))
    assert look(house).status == "ok"
    return house


def revoked(house: Household, *words: str) -> Path:
    """An owner's revocation; the device's folder."""
    done(sczctl("revoke", "--keys", house.keys, *words, "-o", house.usb / "revoked"))
    return house.usb / "revoked/edge-1"


# --- forms of which another key signs PCR 11 --------------------------------------------------------------------------


class Signer:
    """An operating system's signer, and this host's file of its signatures."""

    def __init__(self, house: Household) -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        self.pem, self._file = house.usb / "pcr.pem", house.host / "signatures.json"
        public, encoding = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.Encoding.PEM
        self.pem.write_bytes(self._key.public_key().public_bytes(encoding, public))
        house.config.write_text(house.config.read_text() + f'[boot]\npcr_signature = "{self._file}"\n')

    def signs(self, value: bytes) -> None:
        policy = policy_pcr(ZERO_DIGEST, {11: value})
        signature = base64.b64encode(self._key.sign(policy, padding.PKCS1v15(), hashes.SHA256())).decode()
        self._file.write_text(json.dumps({"sha256": [{"pcrs": [11], "pol": policy.hex(), "sig": signature}]}))
        os.chmod(self._file, 0o600)


def test_a_signed_pcr_11_is_approved_and_another_is_a_line(house: Household) -> None:
    signer = Signer(house)
    house.is_device(house.enrolled())
    house.trust()
    out = house.pack()
    house.grant(out)
    words = ["boot-policy", "sign", "--keys", house.keys, "--model", "minilm", "--device", "edge-1", "--pcr", "7,12"]
    done(sczctl(*words, "--pcr-key", signer.pem, "-o", out / "policy.json"))
    done(house.ctl("add", out))
    now = measured({11: SIGNED})
    failed(look(house, now), "PCR 11 (unified kernel image)", "there is no")
    signer.signs(SIGNED)
    assert look(house, now).status == "ok"
    failed(look(house, measured({11: b"\x66" * 32})), "PCR 11", "1 signature(s) by the form's key, none of them")
    line = look(house, measured({11: SIGNED, 7: b"\x07" * 32}))
    failed(line, "PCR 7")
    assert "signature" not in line.message


# --- whom a start asks beside the TPM ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "words", "mended"),
    [
        (
            {"appraisal": "keylime"},
            ("names no verifier", "[keylime]"),
            '[keylime]\naddress = "https://v.example"\n{ca}',
        ),
        ({"tee": policy_document(Maker())}, ("asks for a TEE's report", "/sys/kernel/config"), ""),
    ],
    ids=["verifier", "tee"],
)
def test_what_this_host_cannot_ask_for(
    house: Household, asks: dict[str, object], words: tuple[str, ...], mended: str
) -> None:
    access, ca = house.usb / "access.json", house.usb / "ca.pem"
    identity = {"issuer": ISSUER, "audience": "scz-smm", "subjects": [SUBJECT]}
    access.write_text(json.dumps({"identities": [identity], "token_age_seconds": 3600, "share": False, **asks}))
    house.is_device(house.enrolled())
    house.trust()
    out = house.usb / "out"
    out.mkdir()
    pack = ["pack", house.source, "-o", out / "bundle", "--keys", house.keys, "--name", "minilm", "--version", "1"]
    done(sczctl(*pack, "--access", access))
    house.grant(out)
    done(sczctl(*house.sign_words(out / "boot-policy.json")))
    done(house.ctl("add", out))
    before = house.config.read_text()
    house.config.write_text(before.replace("[paths]\n", f'[paths]\ntsm = "{house.host / "tsm"}"\n'))
    failed(look(house), *words)
    ca.write_text("PEM")
    (house.host / "tsm").mkdir()
    house.config.write_text(house.config.read_text() + mended.format(ca=f'ca_file = "{ca}"\n'))
    assert look(house).status == "ok"


# --- what the owner took back -----------------------------------------------------------------------------------------


def test_a_grant_of_another_epoch_than_the_boot_policy(house: Household) -> None:
    folder = revoked(ready(house), "--boot-policy", "minilm:default")
    done(house.ctl("add", folder / "minilm@1.jwt"))
    failed(look(house), "the boot policy is of epoch 0", "latest boot policy and grant")


def test_a_generation_that_was_revoked(house: Household) -> None:
    ready(house)
    house.pack("two", version="2")  # of the same generation: the list is made for what comes after it
    folder = revoked(house, "--below-generation", "minilm:2")
    path = Path(house.store.revocations_path(house.owner.owner_id))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes((folder / "revocations.jwt").read_bytes())
    failed(look(house), "generation 1, the owner allows 2")


def test_a_list_that_is_gone(house: Household) -> None:
    ready(house)
    assert look(house, counter=4, enrolled=None).status == "fail"  # the grant's maximum, without a value to compare
    failed(look(house, counter=4, enrolled=1), "no list is here", "latest revocation")


def test_a_counter_beyond_the_grant_or_deleted(house: Household) -> None:
    ready(house)
    failed(look(house, counter=2), "the owner's counter is 2, the grant opens up to 1", "sczctl grant")
    failed(look(house, counter=None), "was deleted", "enrol again")


def test_a_lease_that_has_ended(house: Household) -> None:
    house.is_device(house.enrolled())
    house.trust()
    record = replace(house.devices["edge-1"].record, resets=5, clock_ms=1000)
    OwnerRecords(house.keys).save_device("edge-1", format_device_record(record))
    out = house.pack()
    lease = ["--lease-boots", 2, "--lease-hours", 1]
    done(sczctl("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", *lease, "-o", out / "grant.jwt"))
    done(sczctl(*house.sign_words(out / "boot-policy.json")))
    done(house.ctl("add", out))
    last_ms = 1000 + 3_600_000
    assert look(house, resets=7, clock_ms=last_ms).status == "ok"
    failed(look(house, resets=8), "the TPM counts 8 boots, the lease allows 7", "sczctl lease request")
    failed(look(house, resets=7, clock_ms=last_ms + 1), "powered-on milliseconds", "sczctl lease request")
