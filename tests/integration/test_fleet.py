"""Grants for a thousand devices from one command, real software TPMs among them whose grants really open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.bundle.grant import parse_grant, unwrap_content_key, verify_grant, verify_grant_signature
from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.manifest import parse_manifest, verify_manifest
from oci_hook.config import load_config
from oci_hook.errors import KeyRefused, SczError
from oci_hook.release import HostTpm
from oci_hook.store import Store
from tests.bundles import read_bundle
from tests.commands import FILES, PCRS, done, sczctl
from tests.enrolments import Enrolment, enrol_in_software, enrolment_in_a_folder, listed

MANY = 997


@pytest.fixture
def enrolment() -> Iterator[Enrolment]:
    with enrolment_in_a_folder() as made:
        yield made


def test_a_thousand_devices(enrolment: Enrolment) -> None:
    house = enrolment.house
    hosts: dict[str, Path] = {}
    for name, certified in (("edge-1", True), ("edge-2", False), ("edge-3", True)):
        hosts[name], _ = enrolment.host(name, certified=certified)
        ek_list = None if certified else listed(enrolment.directory, enrolment.ek_line(hosts[name], name))
        _, challenge = enrolment.challenge(enrolment.request(hosts[name], name), ek_list=ek_list)
        done(enrolment.finish(hosts[name], challenge, "--class", "shops", ek_list=ek_list))
    enrol_in_software(house, [f"till-{number}" for number in range(MANY)], device_class="shops")
    out = house.pack()
    policy = out / "boot-policy.json"
    words = ["boot-policy", "sign", "--keys", house.keys, "--model", "minilm", "--device", "edge-1", "--pcr", PCRS]
    done(sczctl(*words, "-o", policy))
    grants = house.usb / "grants"
    granted = done(sczctl("grant", "minilm:1", "--keys", house.keys, "--class", "shops", "-o", grants, "--json")).json

    assert len(granted) == len({row["device"] for row in granted}) == 1000
    assert {path.name for path in grants.iterdir()} == {f"{row['device']}.jwt" for row in granted}
    rows = done(sczctl("list", "--grants", "--keys", house.keys, "--json")).json
    assert {row["device"] for row in rows} == {row["device"] for row in granted}
    with open_layout(out / "bundle") as layout:
        manifest = verify_manifest(parse_manifest(layout.config_blob), house.owner)
    boot_policy = verify_boot_policy(
        parse_boot_policy(policy.read_bytes()), owner=house.owner, model_name="minilm", device_class="shops"
    )
    for name, file in hosts.items():
        config = load_config(str(file))
        tpm = HostTpm(config, Store(config.store_directory).load_device())
        grant = verify_grant(parse_grant((grants / f"{name}.jwt").read_bytes()), owner=house.owner, manifest=manifest)
        secret = tpm.unseal(grant, boot_policy.forms[0], house.owner)
        content_key = unwrap_content_key(grant.wrapped_key, secret, grant.manifest_digest)
        assert read_bundle(out / "bundle", house.owner, content_key)[1] == FILES
        # Its neighbours' grants open nothing here.
        for other in ("till-0", *(hosts.keys() - {name})):
            theirs = parse_grant((grants / f"{other}.jwt").read_bytes())
            with pytest.raises(SczError) as refused:
                tpm.unseal(verify_grant_signature(theirs, owner=house.owner), boot_policy.forms[0], house.owner)
            assert refused.type is KeyRefused
    again = sczctl("grant", "minilm:1", "--keys", house.keys, "--all-devices", "--missing", "-o", house.usb / "more")
    assert "nothing was written" in done(again).err
