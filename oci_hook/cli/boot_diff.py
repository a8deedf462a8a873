"""`sczctl boot-policy diff`: which models a boot state would lock on which device, before the reboot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json
from oci_hook.cli.boot_state import verified_state
from oci_hook.cli.completion import complete_files
from oci_hook.cli.options import JSON, read_input
from oci_hook.config import load_config
from oci_hook.errors import BootPolicyInvalid, BootPolicyRefused, FileUnreadable, SczError
from oci_hook.key_errors import EventLogInvalid

if TYPE_CHECKING:
    from oci_hook.attestation.boot_policy import BootPolicy
    from oci_hook.attestation.lockout import Outcome
    from oci_hook.bundle.grant import Grant
    from oci_hook.trust import Owner


@click.command()
@click.argument("state", metavar="STATE", shell_complete=complete_files)
@click.option(
    "--keys",
    type=click.Path(file_okay=False),
    help="OWNER: the owner's folder, with grants and boot policies; default: this host's store.",
)
@click.option(
    "--boot-policy",
    "documents",
    metavar="FILE",
    multiple=True,
    shell_complete=complete_files,
    help="A boot policy in place of the one in the folder or store: one that is not sent yet; repeat it for more.",
)
@click.option(
    "--pcr-signature",
    metavar="FILE",
    shell_complete=complete_files,
    help="Signatures of PCR 11 (tpm2-pcr-signature.json, an image's .pcrsig) for forms of --pcr-key; default: on a "
    "host the one that it booted with, for an owner none.",
)
@click.option("--whole-class", is_flag=True, help="OWNER: every device of the device's class, as if all were in STATE.")
@JSON
@click.pass_obj
def diff(
    config_file: str,
    state: str,
    keys: str | None,
    documents: tuple[str, ...],
    pcr_signature: str | None,
    whole_class: bool,
    as_json: bool,
) -> int:
    """OWNER or HOST: tell which models a boot state would lock, before the reboot.

    STATE is a file of `boot-policy predict`, or a measurement. The exit code is 1 if a model would be locked.
    """
    if whole_class and not keys:
        raise click.UsageError("--whole-class looks at an owner's devices: give --keys")
    device, values = _load_state(config_file, keys, state)
    given = [read_input(path, BootPolicyInvalid) for path in documents]
    signed = _reader_of(pcr_signature)
    if keys:
        found = list(_of_owner(Path(keys), device, values, given, signed, whole_class=whole_class))
    else:
        found = list(_of_host(config_file, values, given, signed))
    locked = [each for each in found if not each.opens]
    if as_json:
        rows = [
            {
                "model": each.model,
                "device": each.device or device,
                "opens": each.opens,
                "differing": list(each.differing),
                "untold": list(each.untold),
                "words": each.words,
            }
            for each in found
        ]
        print_json({"device": device, "models": rows, "locked": len(locked)})
        return 1 if locked else 0
    for each in found:
        click.echo(f"{each.model} on {each.device or device}: {each.words}")
    summary = f"{len(found)} grant(s) looked at, {len(locked)} would be locked"
    click.echo(summary if found else f"no grant for {device} is here")
    if locked:
        click.echo(
            "  mend: `sczctl boot-policy sign` the running and this state together, and add it before the reboot"
        )
    return 1 if locked else 0


def _load_state(config_file: str, keys: str | None, path: str) -> tuple[str, Mapping[int, bytes]]:
    from oci_hook.attestation.prediction import SCHEMA, parse_prediction

    data = read_input(path, EventLogInvalid)
    if SCHEMA.encode() in data:
        state = parse_prediction(data)
        return state.device, state.pcrs
    return verified_state(config_file, keys, path)


def _verified(given: Iterable[bytes], owner: Owner, model_name: str, device_class: str) -> BootPolicy | None:
    """The first of the documents on the command line that is for this line and class, verified; None: none is."""
    from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy

    for data in given:
        unverified = parse_boot_policy(data)
        about = unverified.unverified_owner_id, unverified.unverified_model_name, unverified.unverified_device_class
        if about == (owner.owner_id, model_name, device_class):
            return verify_boot_policy(unverified, owner=owner, model_name=model_name, device_class=device_class)
    return None


def _reader_of(path: str | None) -> Callable[[BootPolicy], BootPolicy] | None:
    """What tells nested forms which values are signed, by a file of the command line; None: none was given."""
    from oci_hook.attestation.boot_policy import with_host_signatures
    from oci_hook.attestation.pcr_signature import parse_pcr_signatures

    if path is None:
        return None
    entries = parse_pcr_signatures(read_input(path, BootPolicyInvalid))
    return lambda policy: with_host_signatures(policy, entries, path)


def _of_owner(
    keys: Path,
    device: str,
    values: Mapping[int, bytes],
    given: list[bytes],
    signed: Callable[[BootPolicy], BootPolicy] | None,
    *,
    whole_class: bool,
) -> Iterable[Outcome]:
    from oci_hook.attestation.lockout import Outcome
    from oci_hook.owner.policies import load_boot_policy, load_owner
    from oci_hook.owner.records import OwnerRecords

    owner, grants = load_owner(keys), OwnerRecords(keys).grants()
    classes = {grant.device_class for grant in grants if grant.device_name == device}
    policies: dict[tuple[str, str], BootPolicy | SczError] = {}
    for grant in grants:
        if not (grant.device_name == device or (whole_class and grant.device_class in classes)):
            continue
        model, line = f"{grant.model.name}:{grant.model.version}", (grant.model.name, grant.device_class)
        if line not in policies:
            try:
                policy = _verified(given, owner, *line) or load_boot_policy(keys, owner, *line)
                policies[line] = signed(policy) if signed is not None else policy
            except SczError as error:
                policies[line] = error
        found = policies[line]
        if isinstance(found, SczError):
            yield Outcome(model, grant.device_name, problem=found.message)
        else:
            yield _outcome(model, grant, found, values)


def _outcome(model: str, grant: Grant, policy: BootPolicy, values: Mapping[int, bytes]) -> Outcome:
    """What the state does to one grant; a policy of another epoch opens it in no state."""
    from oci_hook.attestation.lockout import Outcome, outcome_of
    from oci_hook.granted import verify_epoch

    try:
        verify_epoch(policy, grant)
    except BootPolicyRefused as error:
        return Outcome(model, grant.device_name, problem=error.message)
    return outcome_of(model, grant.device_name, policy.forms, values)


def _of_host(
    config_file: str,
    values: Mapping[int, bytes],
    given: list[bytes],
    signed: Callable[[BootPolicy], BootPolicy] | None,
) -> Iterable[Outcome]:
    from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
    from oci_hook.attestation.lockout import Outcome
    from oci_hook.boot_signatures import with_signatures_of_host
    from oci_hook.bundle.grant import parse_grant, verify_grant_signature
    from oci_hook.provenance import find_owner
    from oci_hook.store import Store
    from oci_hook.trust_folder import Trust

    config = load_config(config_file)
    store, owners = Store(config.store_directory), Trust(config.trust_directory).owners()
    for name, version in store.names():
        try:
            stored = store.load_model(name, version)
            owner = find_owner(stored.owner_id, owners)
            grant = verify_grant_signature(parse_grant(store.load_grant(stored.manifest_digest)), owner=owner)
            line = grant.model.name, grant.device_class
            policy = _verified(given, owner, *line) or verify_boot_policy(
                parse_boot_policy(store.load_boot_policy(owner.owner_id, *line)),
                owner=owner,
                model_name=line[0],
                device_class=line[1],
            )
        except FileUnreadable:
            raise
        except SczError as error:
            yield Outcome(f"{name}:{version}", "", problem=error.message)
        else:
            policy = signed(policy) if signed is not None else with_signatures_of_host(policy, config)
            yield _outcome(f"{name}:{version}", grant, policy, values)


COMMANDS = {"diff": diff}
