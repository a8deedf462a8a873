"""The options of `sczctl pack` and `sczctl grant` for a key broker: what is refused before anybody is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oci_hook.bundle.broker_share import BrokerShare
from oci_hook.bundle.grant import parse_grant, unwrap_content_key, verify_grant, verify_grant_signature
from oci_hook.bundle.layout import open_layout
from oci_hook.errors import DeviceInvalid, GrantInvalid
from oci_hook.key_errors import BrokerRefused, BrokerUnavailable
from oci_hook.owner import broker_shares, revoking
from oci_hook.owner.broker_shares import EncryptedShare, OwnersBroker
from oci_hook.owner.granting import make_grant
from oci_hook.owner.keyring import open_keyring
from oci_hook.owner.records import OwnerRecords
from oci_hook.provenance import verified_manifest
from tests.bundles import CREATED, read_bundle
from tests.commands import FILES, Household, done, misused, refused, sczctl, snapshot
from tests.tls import TestAuthority

MEMBER = BrokerShare("vault:v1:" + 80 * "A", "models", "transit", "auth/jwt", "recommender")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Household:
    """An owner with one version that needs a broker, and one that does not."""
    for name in ("BAO_TOKEN", "VAULT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = Household(tmp_path)
    made.enrolled()
    made.pack("plain", version="0")
    done(sczctl(*made.pack_words(made.usb / "bundle"), "--broker"))
    (made.usb / "ca.pem").write_bytes(TestAuthority().certificate)
    return made


def words(house: Household, *more: object, version: str = "1") -> list[object]:
    usb = house.usb
    return ["grant", f"minilm:{version}", "--keys", house.keys, "--device", "edge-1", "-o", usb / "grant.jwt", *more]


def broker(house: Household, **changes: object) -> list[object]:
    options = {"broker": "https://127.0.0.1:1", "broker-ca": house.usb / "ca.pem"}
    options |= {"broker-key": "models", "broker-role": "recommender", **changes}
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]


def test_the_manifest_asks_for_a_broker(house: Household) -> None:
    with open_layout(house.usb / "bundle") as layout:
        assert verified_manifest(layout, [house.owner])[0].access.broker
    assert OwnerRecords(house.keys).load_content_key("minilm", "1").broker
    assert not OwnerRecords(house.keys).load_content_key("minilm", "0").broker


def test_pack_takes_a_file_or_the_option(house: Household) -> None:
    policy = house.usb / "access.json"
    policy.write_text("{}")
    pack = ["pack", house.source, "-o", house.usb / "b2", "--keys", house.keys, "--name", "x", "--version", "1"]
    misused(sczctl(*pack, "--access", policy, "--broker"), "--broker")


def test_options_that_do_not_go_together(house: Household) -> None:
    for missing in ("broker-ca", "broker-key", "broker-role"):
        misused(sczctl(*words(house), *broker(house, **{missing: None})), "--broker needs")
    misused(sczctl(*words(house), *broker(house, broker=None)), "go with --broker")
    for name, value in (
        ("broker", "http://127.0.0.1:1"),
        ("broker", "https://127.0.0.1:1/v1"),
        ("broker-key", "a/b"),
        ("broker-role", ".."),
        ("broker-mount", "/transit"),
        ("broker-auth", "jwt"),
        ("broker-timeout", "0"),
    ):
        misused(sczctl(*words(house), *broker(house, **{name: value})), f"--{name}")
    assert not (house.usb / "grant.jwt").exists()


def test_a_grant_has_the_shares_that_its_version_asks_for(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(sczctl(*words(house)), 16, "asks for a broker's share", "--broker-role")
    monkeypatch.setenv("BAO_TOKEN", "s.token")
    refused(sczctl(*words(house, version="0"), *broker(house)), 16, "asks for no broker's share")
    refused(sczctl(*words(house), *broker(house)), 73, "cannot be reached")
    assert not (house.usb / "grant.jwt").exists()


def test_tokens_that_are_none(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(sczctl(*words(house), *broker(house)), 24, "no usable token", "BAO_TOKEN")
    for text in ("", "two words", "s.\u00e9", "s" * 3000):
        monkeypatch.setenv("VAULT_TOKEN", text)
        refused(sczctl(*words(house), *broker(house)), 24, "no usable token")
    monkeypatch.setenv("VAULT_TOKEN", "s.token")
    file = house.usb / "token"
    file.write_text("\n")
    refused(sczctl(*words(house), *broker(house), "--broker-token-file", file), 24, "no usable token")
    file.write_text("s.token\n")
    refused(sczctl(*words(house), *broker(house), "--broker-token-file", file), 73, "cannot be reached")


def travelled(house: Household, *, broker: bool) -> Path:
    """What a host adds: the version that needs a broker, with a grant that has a share, or none, against the policy."""
    out = house.usb / "out"
    out.mkdir()
    (house.usb / "bundle").rename(out / "bundle")
    keyring = open_keyring(house.keys, lambda: "")
    content = replace(OwnerRecords(house.keys).load_content_key("minilm", "1"), broker=broker)
    share = EncryptedShare(os.urandom(32), MEMBER) if broker else None
    record = house.devices["edge-1"].record
    made = make_grant(keyring, content, record, maximum=None, created=CREATED, random=os.urandom, share=share)
    (out / "grant.jwt").write_bytes(made[1])
    done(sczctl(*house.sign_words(out / "boot-policy.json")))
    house.is_device(house.devices["edge-1"])
    house.trust()
    return out


def test_a_host_does_not_add_a_grant_of_the_tpm_s_share_alone(house: Household) -> None:
    refused(house.ctl("add", travelled(house, broker=False)), 32, "has no share of a broker")


def test_doctor_tells_a_model_that_needs_a_broker_where_none_is_named(house: Household) -> None:
    done(house.ctl("add", travelled(house, broker=True)))

    def line() -> dict[str, str]:
        (found,) = (each for each in house.ctl("doctor", "--json").json["checks"] if each["name"] == "model minilm:1")
        return found

    assert (line()["status"], "names no broker" in line()["message"]) == ("fail", True)
    assert "[broker]" in line()["remedy"]
    with house.config.open("a") as file:
        file.write(f'[broker]\naddress = "https://127.0.0.1:1"\nca_file = "{house.usb / "ca.pem"}"\n')
    assert "broker" not in line()["message"]


def test_both_shares_open_what_was_granted_and_neither_alone(house: Household) -> None:
    keyring = open_keyring(house.keys, lambda: "")
    content = OwnerRecords(house.keys).load_content_key("minilm", "1")
    device, share = house.devices["edge-1"], EncryptedShare(os.urandom(32), MEMBER)
    how = {"maximum": None, "created": CREATED, "random": os.urandom}
    with pytest.raises(GrantInvalid):
        make_grant(keyring, content, device.record, **how)  # type: ignore[arg-type]
    with pytest.raises(GrantInvalid):
        make_grant(keyring, replace(content, broker=False), device.record, share=share, **how)  # type: ignore[arg-type]
    _, compact = make_grant(keyring, content, device.record, share=share, **how)  # type: ignore[arg-type]
    with open_layout(house.usb / "bundle") as layout:
        manifest, _ = verified_manifest(layout, [house.owner])
    grant = verify_grant(parse_grant(compact), owner=house.owner, manifest=manifest)
    assert grant.broker == MEMBER
    assert share.value not in compact
    secret = device.unseal(grant.sealed.public, grant.sealed.duplicate, grant.sealed.seed)
    for wrong in (os.urandom(32), secret):
        with pytest.raises(BrokerRefused):
            unwrap_content_key(grant.wrapped_key, secret, grant.manifest_digest, wrong)
    key = unwrap_content_key(grant.wrapped_key, secret, grant.manifest_digest, share.value)
    assert read_bundle(house.usb / "bundle", house.owner, key)[1] == FILES


# --- shares of what a revocation grants anew --------------------------------------------------------------------------


def far_end(monkeypatch: pytest.MonkeyPatch) -> list[OwnersBroker]:
    """A broker that gives any share, and whom it was asked as."""
    asked = list[OwnersBroker]()

    def encrypt_shares(
        self: OwnersBroker, _owner: object, _content: object, count: int, random: Callable[[int], bytes]
    ) -> list[EncryptedShare]:
        asked.append(self)
        member = BrokerShare(MEMBER.ciphertext, self.key, self.mount, self.auth, self.role)
        return [EncryptedShare(random(32), member) for _ in range(count)]

    monkeypatch.setattr(OwnersBroker, "encrypt_shares", encrypt_shares)
    monkeypatch.setenv("BAO_TOKEN", "t")
    return asked


def member_of(house: Household, path: Path) -> BrokerShare | None:
    return verify_grant_signature(parse_grant(path.read_bytes()), owner=house.owner).broker


def test_each_grant_that_is_made_anew_keeps_its_key_and_role(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = far_end(monkeypatch)
    done(sczctl(*house.pack_words(house.usb / "payroll", name="payroll"), "--broker"))
    out = ["--keys", house.keys, "--device", "edge-1", "-o"]
    staff = {"broker-key": "hr", "broker-role": "payroll", "broker-mount": "hr-transit", "broker-auth": "auth/hr-jwt"}
    done(sczctl("grant", "minilm:1", *out, house.usb / "m.jwt", *broker(house)))
    done(sczctl("grant", "payroll:1", *out, house.usb / "p.jwt", *broker(house, **staff)))
    done(sczctl("grant", "minilm:0", *out, house.usb / "plain.jwt"))
    asked.clear()
    revoke = ["revoke", "--keys", house.keys, "--model", "minilm:0"]
    before = snapshot(house.keys, house.usb)
    tried = sczctl(*revoke, "-o", house.usb / "no")
    assert (tried.code, "asks for a broker's share" in tried.err) == (GrantInvalid.code, True)
    assert snapshot(house.keys, house.usb) == before
    address = broker(house, **{"broker-key": None, "broker-role": None})
    done(sczctl(*revoke, "-o", house.usb / "r", *address))
    folder = house.usb / "r" / "edge-1"
    assert member_of(house, folder / "minilm@1.jwt") == MEMBER
    assert member_of(house, folder / "payroll@1.jwt") == BrokerShare(
        MEMBER.ciphertext, "hr", "hr-transit", "auth/hr-jwt", "payroll"
    )
    assert {each.key for each in asked} == {"models", "hr"}
    assert {each.endpoint.address for each in asked} == {"https://127.0.0.1:1"}


def test_a_key_that_is_given_is_for_all_of_them(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    far_end(monkeypatch)
    out = ["--keys", house.keys, "--device", "edge-1", "-o"]
    done(sczctl("grant", "minilm:1", *out, house.usb / "m.jwt", *broker(house, **{"broker-mount": "old"})))
    done(sczctl("grant", "minilm:0", *out, house.usb / "plain.jwt"))
    moved = broker(house, **{"broker-key": "moved", "broker-role": None})
    done(sczctl("revoke", "--keys", house.keys, "--model", "minilm:0", "-o", house.usb / "r", *moved))
    found = member_of(house, house.usb / "r" / "edge-1" / "minilm@1.jwt")
    assert found is not None
    assert (found.key, found.mount, found.role) == ("moved", "old", "recommender")


def test_what_needs_a_share_and_changes_meanwhile_is_not_revoked_half(
    house: Household, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares were encrypted for other grants than those that would be made anew now."""
    far_end(monkeypatch)
    out = ["--keys", house.keys, "--device", "edge-1", "-o"]
    done(sczctl("grant", "minilm:0", *out, house.usb / "plain.jwt"))
    real = broker_shares.shares_for

    def slower(*arguments: Any) -> Any:
        found = real(*arguments)
        monkeypatch.setattr(revoking, "shares_for", real)
        done(sczctl("grant", "minilm:1", *out, house.usb / "m.jwt", *broker(house)))
        return found

    monkeypatch.setattr(revoking, "shares_for", slower)
    revoke = ["revoke", "--keys", house.keys, "--model", "minilm:0", *broker(house)]
    tried = sczctl(*revoke, "-o", house.usb / "r")
    assert (tried.code, "changed meanwhile" in tried.err) == (DeviceInvalid.code, True)
    assert not (house.usb / "r").exists()
    assert OwnerRecords(house.keys).load_line("minilm").revoked == ()
    done(sczctl(*revoke, "-o", house.usb / "r"))


def test_a_broker_that_is_away_keeps_nobody_from_revoking(house: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs its share is locked with the rest, named, and granted again when the broker is back."""
    far_end(monkeypatch)
    house.pack("other", name="other", version="1")
    out = ["--keys", house.keys, "--device", "edge-1", "-o"]
    done(sczctl("grant", "minilm:1", *out, house.usb / "m.jwt", *broker(house)))
    for model in ("minilm:0", "other:1"):
        done(sczctl("grant", model, *out, house.usb / f"{model}.jwt"))

    def away(*_: object) -> list[EncryptedShare]:
        raise BrokerUnavailable("the key broker at https://127.0.0.1:1 did not answer")

    monkeypatch.setattr(OwnersBroker, "encrypt_shares", away)
    revoke = ["revoke", "--keys", house.keys, "--model", "minilm:0"]
    before = snapshot(house.keys, house.usb)
    address = broker(house, **{"broker-key": None, "broker-role": None})
    for more, code in ((address, BrokerUnavailable.code), ([], GrantInvalid.code)):
        tried = sczctl(*revoke, "-o", house.usb / "r", *more)
        assert (tried.code, "--without-renewal" in tried.err) == (code, True)
    misused(sczctl(*revoke, "-o", house.usb / "r", "--without-renewal", *address), "--without-renewal")
    assert snapshot(house.keys, house.usb) == before
    said = done(sczctl(*revoke, "-o", house.usb / "r", "--without-renewal", "--json"))
    assert "edge-1: not granted anew, so locked as well: minilm:1" in said.err
    (row,) = said.json["devices"]
    assert (row["locked"], row["granted"], row["not_granted"]) == (["minilm:0"], ["other:1"], ["minilm:1"])
    assert sorted(path.name for path in (house.usb / "r" / "edge-1").iterdir()) == ["other@1.jwt", "revocations.jwt"]
    far_end(monkeypatch)
    words = ["grant", "minilm:1", "--keys", house.keys, "--all-devices", "--missing", *broker(house)]
    done(sczctl(*words, "-o", house.usb / "back"))
    found = verify_grant_signature(parse_grant((house.usb / "back" / "edge-1.jwt").read_bytes()), owner=house.owner)
    assert found.counter.maximum == row["counter"]
