"""`sczctl enroll`: the four files between a host and a model's owner. No network: a USB stick would do."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from oci_hook.cli import printable
from oci_hook.cli.options import (
    EK_ROOTS,
    KEYS,
    OUTPUT,
    GroupInOrder,
    load_authorities,
    name_of,
    read_input,
    verify_new_output,
    write_output,
)
from oci_hook.config import Config, load_config
from oci_hook.errors import DeviceInvalid, DeviceNotEnrolled, EnrolmentRefused, TrustInvalid
from oci_hook.store import Store
from oci_hook.trust import NAME, NAME_LIMIT, parse_owner
from oci_hook.trusted_file import make_private_directory

if TYPE_CHECKING:
    from oci_hook.attestation.tpm import Tpm
    from oci_hook.owner.records import OwnerRecords

T = TypeVar("T")


def _with_tpm(config: Config, action: Callable[[Tpm], T]) -> T:
    """One transaction with the host's TPM, in this process: enrolment is typed by a person, who can interrupt it."""
    from oci_hook.attestation.tpm import open_tpm

    make_private_directory(config.runtime_directory)
    lock_file = os.path.join(config.runtime_directory, "tpm.lock")
    with open_tpm(config.tpm_tcti, lock_file=lock_file, timeout_seconds=config.tpm_timeout_seconds) as tpm:
        return action(tpm)


def _host_name() -> str:
    name = socket.gethostname().split(".")[0].lower()
    if len(name) > NAME_LIMIT or not re.fullmatch(NAME, name):
        raise click.UsageError("this host's name does not fit for a device: give --device")
    return name


_REPLACE = click.option("--replace", is_flag=True, help="The device of this name has a new TPM: forget the old one.")


def _verify_same_tpm(records: OwnerRecords, device: str, ek_sha256: str, replace: bool) -> str:
    """Refuse another TPM under a name that is taken: grants to that name would be wrapped to it.

    Returns:
        What the device is to the owner, for a message.

    Raises:
        EnrolmentRefused: The name belongs to a device with another EK certificate.
    """
    from oci_hook.attestation.device_record import parse_device_record

    if device not in records.devices():
        return "new device"
    known = parse_device_record(records.load_device(device))
    if known.ek_sha256 == ek_sha256:
        return "known device"
    if replace:
        return "replaced device"
    raise EnrolmentRefused(
        f"the name {device} belongs to a device with another TPM (EK certificate SHA-256 {known.ek_sha256})",
        remedy="enrol it under another name; --replace if the device was given a new TPM",
    )


@click.group(cls=GroupInOrder)
def enroll() -> None:
    """Enrol a host with a model's owner.

    Four files go to and fro, by any way: request (made by the host), challenge (owner), answer (host), and the owner
    accepts.
    """


@enroll.command()
@click.option("--owner", "owner_file", type=click.Path(dir_okay=False), required=True, help="The owner's owner.json.")
@click.option("--device", metavar="NAME", callback=name_of, help="Name of this device; default: the host's name.")
@OUTPUT
@click.pass_obj
def request(config_file: str, owner_file: str, device: str | None, output: str) -> None:
    """HOST: make keys and a counter in the TPM, and ask for acceptance."""
    from oci_hook.attestation.enrolment_documents import format_request
    from oci_hook.attestation.host_device import format_host_device

    verify_new_output(output)
    config = load_config(config_file)
    store = Store(config.store_directory)
    owner = parse_owner(read_input(owner_file, TrustInvalid))
    name = device or _host_name()
    try:
        known = store.load_device()
    except DeviceNotEnrolled:
        known = None
    host, (certificate, ek) = _with_tpm(config, lambda tpm: (tpm.provision(owner.owner_id, known), tpm.ek()))
    document = format_request(
        device=name,
        owner_id=owner.owner_id,
        ek_certificate=certificate,
        ek=ek,
        ak=host.ak,
        srk=host.srk,
        counter=host.counters[owner.owner_id],
    )
    store.save_device(format_host_device(host))
    store.save_request(owner.owner_id, document)
    write_output(output, document)
    click.echo(f"request of device {name} to owner {owner.name} ({owner.owner_id}) in {output}")
    click.echo(f"next, the owner: sczctl enroll challenge {output} --keys … --ek-roots … -o challenge.json")


@enroll.command()
@click.argument("request_file", metavar="REQUEST", type=click.Path(dir_okay=False))
@KEYS
@EK_ROOTS
@OUTPUT
@_REPLACE
def challenge(request_file: str, keys: str, ek_roots: str, output: str, replace: bool) -> None:
    """OWNER: check a device's TPM and challenge it.

    What fails a check is refused with the check's number.
    """
    from oci_hook.attestation.enrolment import make_challenge, verify_request
    from oci_hook.attestation.enrolment_documents import format_pending, parse_request
    from oci_hook.attestation.tpm import make_credential
    from oci_hook.owner.keyring import load_owner
    from oci_hook.owner.records import OwnerRecords

    verify_new_output(output)  # before the waiting challenge is replaced, which an older file may still answer
    found = parse_request(read_input(request_file, DeviceInvalid))
    if found.owner_id != load_owner(Path(keys)).owner_id:
        raise DeviceInvalid(f"the request of {found.device} is for another owner")
    verified = verify_request(found, authorities=load_authorities(ek_roots), now=datetime.now(UTC))
    records = OwnerRecords(Path(keys))
    state = _verify_same_tpm(records, found.device, verified.ek_certificate.sha256, replace)
    document, pending = make_challenge(verified, secret=secrets.token_bytes(32), make_credential=make_credential)
    records.save_pending(found.device, format_pending(pending))
    write_output(output, document)
    subject = printable(verified.ek_certificate.subject) or "(no subject)"
    click.echo(f"{state} {found.device}: EK certificate {subject}, SHA-256 {verified.ek_certificate.sha256}")
    click.echo(
        f"challenge for {found.device} in {output}; next, the host: sczctl enroll answer {output} -o answer.json"
    )


@enroll.command()
@click.argument("challenge_file", metavar="CHALLENGE", type=click.Path(dir_okay=False))
@OUTPUT
@click.pass_obj
def answer(config_file: str, challenge_file: str, output: str) -> None:
    """HOST: let the TPM answer, and vouch for its keys and boot state."""
    from oci_hook.attestation.enrolment import enrolment_qualifying_data, proof
    from oci_hook.attestation.enrolment_documents import Answer, format_answer, parse_challenge, parse_request
    from oci_hook.attestation.measurement import MEASURED_PCRS

    verify_new_output(output)
    config = load_config(config_file)
    store = Store(config.store_directory)
    asked = parse_challenge(read_input(challenge_file, DeviceInvalid))
    host, asked_for = store.load_device(), parse_request(store.load_request(asked.owner_id))
    if asked.device != asked_for.device or asked.owner_id not in host.counters:
        raise DeviceInvalid(f"the challenge is for the device {asked.device}, which is not what this host asked as")

    def transact(tpm: Tpm) -> Answer:
        secret = tpm.activate_credential(host, asked.id_object, asked.encrypted_secret)
        srk, counter, quote = (
            enrolment_qualifying_data(kind, secret, asked_for.digest) for kind in ("srk", "counter", "quote")
        )
        return Answer(
            device=asked.device,
            owner_id=asked.owner_id,
            proof=proof(secret, asked_for.digest),
            srk_certify=tpm.certify(host, srk),
            counter_certify=tpm.nv_certify(host, host.counters[asked.owner_id], counter),
            quote=tpm.quote(host, sorted(MEASURED_PCRS), quote),
        )

    write_output(output, format_answer(_with_tpm(config, transact)))
    click.echo(
        f"answer of {asked.device} in {output}; next, the owner: sczctl enroll accept {output} --keys … --ek-roots …"
    )


@enroll.command()
@click.argument("answer_file", metavar="ANSWER", type=click.Path(dir_okay=False))
@KEYS
@EK_ROOTS
@click.option(
    "--class",
    "device_class",
    metavar="NAME",
    callback=name_of,
    help="The device class: devices of one class share a boot policy. Default: as before, or `default`.",
)
@_REPLACE
def accept(answer_file: str, keys: str, ek_roots: str, device_class: str | None, replace: bool) -> None:
    """OWNER: verify the answer, and keep the device's record.

    From then on models can be granted to it.
    """
    from oci_hook.attestation.device_record import format_device_record, parse_device_record
    from oci_hook.attestation.enrolment import verify_answer
    from oci_hook.attestation.enrolment_documents import parse_answer, parse_pending
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.owner.revoking import enrolled_again

    records = OwnerRecords(Path(keys))
    found = parse_answer(read_input(answer_file, DeviceInvalid))
    if device_class is None and found.device in records.devices():
        device_class = parse_device_record(records.load_device(found.device)).device_class
    record = verify_answer(
        parse_pending(records.load_pending(found.device)),
        found,
        authorities=load_authorities(ek_roots),
        now=datetime.now(UTC),
        device_class=device_class or "default",
    )
    state = _verify_same_tpm(records, record.device, record.ek_sha256, replace)
    known = parse_device_record(records.load_device(record.device)) if record.device in records.devices() else None
    record = enrolled_again(record, known, forget=replace)
    records.save_device(record.device, format_device_record(record))
    records.remove_pending(record.device)
    click.echo(
        f"enrolled {state} {record.device} (class {record.device_class}, counter {record.counter_value}), "
        f"EK certificate SHA-256 {record.ek_sha256}"
    )


COMMANDS = {"enroll": enroll}
