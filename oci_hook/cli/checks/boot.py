"""What this boot measured otherwise than an approved one: after a refusal, from event logs, for an operator.

Nothing is decided here. A kept log speaks for an approved state only where its replay leads to the approved value.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping

from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.event_log import parse_event_log
from oci_hook.attestation.explanation import differing_events, explain_values, explained_pcrs
from oci_hook.attestation.log_files import kept_event_logs, load_event_log
from oci_hook.config import Config
from oci_hook.errors import SczError
from oci_hook.provenance import find_owner
from oci_hook.store import Store, entries
from oci_hook.trust_folder import Trust


def what_differs(
    config: Config, approved: Mapping[int, Collection[bytes]], now: Mapping[int, bytes] | None
) -> list[str]:
    """Lines about the events that differ; none, if no log tells.

    Args:
        config: Says where this boot's log is, and the store, which keeps those of measured boots.
        approved: The values that are approved, of each PCR that has another one.
        now: What the TPM has; None: not asked, this boot's log is taken for true.
    """
    try:
        current = parse_event_log(load_event_log(config.tpm_event_log))
        left = set(approved)
        if now is not None:
            told = explain_values(current, {pcr: now[pcr] for pcr in left if pcr in now})
            left = {each.pcr for each in told if each.is_explained}
        lines: list[str] = []
        for log in kept_event_logs(config.store_directory):
            proven = explained_pcrs(log, {pcr: approved[pcr] for pcr in left})
            if proven:
                lines += differing_events(log, current, sorted(proven))
                left -= proven
    except SczError:
        return []
    return lines


def why_refused(config: Config, message: str) -> list[str]:
    """Lines about a refusal of the boot state (35), by the PCRs that its message names and the store's policies."""
    refused = {int(pcr) for pcr in re.findall(r"\bPCR (\d{1,2}) \(", message)}
    with contextlib.suppress(SczError):
        forms = [form for policy in _policies(config) for form in policy.forms]
        return what_differs(config, {pcr: {f.pcrs[pcr] for f in forms if pcr in f.pcrs} for pcr in refused}, None)
    return []


def _policies(config: Config) -> list[BootPolicy]:
    store, owners = Store(config.store_directory), Trust(config.trust_directory).owners()
    found = []
    for owner_id in entries(store.path("boot-policies")):
        for file in entries(store.path("boot-policies", owner_id)):
            model_name, _, device_class = file.removesuffix(".json").partition("@")
            with contextlib.suppress(SczError):
                unverified = parse_boot_policy(store.load_boot_policy(owner_id, model_name, device_class))
                owner = find_owner(owner_id, owners)
                found.append(
                    verify_boot_policy(unverified, owner=owner, model_name=model_name, device_class=device_class)
                )
    return found
