"""The event log of a measured boot that we made: it leads to the TPM's values, and covers what a boot policy asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oci_hook.attestation.boot_policy import verify_coverage
from oci_hook.errors import BootPolicyInvalid
from tests.event_log import parse_event_log, replay

FOLDER = Path(__file__).parents[1] / "fixtures" / "guest_boot"
LOG = (FOLDER / "event-log.bin").read_bytes()
VALUES = {int(pcr): bytes.fromhex(value) for pcr, value in json.loads((FOLDER / "pcrs.json").read_text()).items()}
BY_LINUX = 10


def test_the_log_leads_to_the_values() -> None:
    measured = {pcr: value for pcr, value in VALUES.items() if any(value) and pcr != BY_LINUX}
    assert {pcr: value for pcr, value in replay(LOG).items() if pcr != BY_LINUX} == measured


def test_the_image_that_ran_is_in_it() -> None:
    named = [event.data.decode("utf-16-le").rstrip("\0") for event in parse_event_log(LOG) if event.pcr == 11]
    # Each section's name, then its contents (systemd-stub of Debian 12).
    assert named == [name for name in (".linux", ".osrel", ".cmdline", ".initrd") for _ in range(2)]


def test_a_changed_event_leads_elsewhere() -> None:
    place = LOG.index(".cmdline".encode("utf-16-le")) - 20
    changed = LOG[:place] + bytes([LOG[place] ^ 1]) + LOG[place + 1 :]
    assert replay(changed)[11] != VALUES[11]
    assert {pcr for pcr, value in replay(changed).items() if value != replay(LOG)[pcr]} == {11}


def test_it_covers_a_unified_image_and_not_a_boot_loader() -> None:
    verify_coverage({pcr: VALUES[pcr] for pcr in (4, 7, 9, 11, 12)}, BootPolicyInvalid)
    assert not any(VALUES[12])  # no command line from outside
    with pytest.raises(BootPolicyInvalid, match="PCR 8 has never been measured"):
        verify_coverage({pcr: VALUES[pcr] for pcr in (4, 8, 9)}, BootPolicyInvalid)
