"""`sczctl enroll ek`, `request` and `answer`: the host's side, which speaks with the TPM."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from oci_hook.cli import print_json
from oci_hook.cli.options import JSON, OUTPUT, name_of
from oci_hook.cli.streams import STREAM, read_document, say, verify_new_document, write_document
from oci_hook.config import Config, load_config
from oci_hook.errors import DeviceInvalid, TrustInvalid
from oci_hook.store import Store
from oci_hook.trust import NAME, NAME_LIMIT, parse_owner
from oci_hook.trusted_file import make_private_directory

if TYPE_CHECKING:
    from oci_hook.attestation.enrolment_documents import Answer, Challenge, Request
    from oci_hook.attestation.host_device import HostDevice
    from oci_hook.attestation.structures import Public
    from oci_hook.attestation.tpm import Tpm

T = TypeVar("T")

_DEVICE = click.option(
    "--device", metavar="NAME", callback=name_of, help="Name of this device; default: the host's name."
)


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


def _verify_one_on_stdout(output: str, as_json: bool) -> None:
    if output == STREAM and as_json:
        raise click.UsageError("--json and `-o -` would both be on standard output")


@click.command()
@_DEVICE
@JSON
@click.pass_obj
def ek(config_file: str, device: str | None, as_json: bool) -> None:
    """HOST: show the TPM's endorsement key, for an owner's list.

    The line that it prints belongs into the list (--ek-list) of an owner who is to accept a TPM without a certificate.
    The list is worth what the way is worth on which the line goes there: read it off the machine that you have in
    hands. Nothing is changed.
    """
    from oci_hook.attestation.ek_list import ek_digest

    name = device or _host_name()
    certificate, public = _with_tpm(load_config(config_file), lambda tpm: tpm.ek())
    digest = ek_digest(public)
    if as_json:
        print_json({"device": name, "ek_sha256": digest, "kind": public.kind, "certificate": certificate is not None})
        return
    click.echo(f"{digest} {name}")
    if certificate is not None:
        click.echo("this TPM has an EK certificate: its owner needs no list", err=True)


@click.command()
@click.option(
    "--owner", "owner_file", type=click.Path(dir_okay=False), required=True, help="The owner's owner.json; - for stdin."
)
@_DEVICE
@OUTPUT
@click.option(
    "--without-certificate",
    is_flag=True,
    help="Leave the TPM's EK certificate out: nobody can verify it, and the owner's list has this TPM.",
)
@JSON
@click.pass_obj
def request(
    config_file: str, owner_file: str, device: str | None, output: str, without_certificate: bool, as_json: bool
) -> None:
    """HOST: make keys and a counter in the TPM, and ask for acceptance.

    A TPM that has no EK certificate is accepted by an owner whose list names it (`sczctl enroll ek`). FILE may be - for
    standard output.
    """
    from oci_hook.attestation.enrolment_documents import format_request
    from oci_hook.enrolled import ask_for_enrolment

    _verify_one_on_stdout(output, as_json)
    verify_new_document(output)
    config = load_config(config_file)
    store = Store(config.store_directory)
    owner = parse_owner(read_document(owner_file, TrustInvalid))
    name = device or _host_name()

    def provision(known: HostDevice | None, newest: int) -> tuple[HostDevice, tuple[bytes, bool]]:
        def transact(tpm: Tpm) -> tuple[HostDevice, tuple[bytes | None, Public], tuple[bytes, ...]]:
            return tpm.provision(owner.owner_id, known, newest_grant=newest), tpm.ek(), tpm.ek_chain()

        host, (certificate, public), chain = _with_tpm(config, transact)
        if without_certificate or certificate is None:
            certificate, chain = None, ()
        made = format_request(
            device=name,
            owner_id=owner.owner_id,
            ek_certificate=certificate,
            ek=public,
            ak=host.ak,
            srk=host.srk,
            counter=host.counters[owner.owner_id],
            ek_chain=chain,
        )
        return host, (made, certificate is not None)

    document, has_certificate = ask_for_enrolment(store, owner, provision)
    store.save_request(owner.owner_id, document)
    write_document(output, document)
    if as_json:
        print_json({"device": name, "owner": owner.owner_id, "file": output, "certificate": has_certificate})
        return
    say(output, f"request of device {name} to owner {owner.name} ({owner.owner_id}) in {output}")
    vouched = "--ek-roots …" if has_certificate else "--ek-list …"
    if not has_certificate:
        say(output, "it has no EK certificate: the owner's list must have what `sczctl enroll ek` shows")
    say(output, f"next, the owner: sczctl enroll challenge {output} --keys … {vouched} -o challenge.json")


@click.command()
@click.argument("challenge_file", metavar="CHALLENGE", type=click.Path(dir_okay=False))
@OUTPUT
@JSON
@click.pass_obj
def answer(config_file: str, challenge_file: str, output: str, as_json: bool) -> None:
    """HOST: let the TPM answer, and vouch for its keys and boot state.

    CHALLENGE and FILE may be - for standard input and output.
    """
    from oci_hook.attestation.enrolment_documents import format_answer, parse_challenge, parse_request

    _verify_one_on_stdout(output, as_json)
    verify_new_document(output)
    config = load_config(config_file)
    store = Store(config.store_directory)
    asked = parse_challenge(read_document(challenge_file, DeviceInvalid))
    host, asked_for = store.load_device(), parse_request(store.load_request(asked.owner_id))
    if asked.device != asked_for.device or asked.owner_id not in host.counters:
        raise DeviceInvalid(f"the challenge is for the device {asked.device}, which is not what this host asked as")
    made = _with_tpm(config, lambda tpm: _answer(tpm, host, asked, asked_for))
    write_document(output, format_answer(made))
    if as_json:
        print_json({"device": asked.device, "owner": asked.owner_id, "file": output})
        return
    say(output, f"answer of {asked.device} in {output}; next, the owner: sczctl enroll accept {output} --keys …")


def _answer(tpm: Tpm, host: HostDevice, asked: Challenge, asked_for: Request) -> Answer:
    from oci_hook.attestation.enrolment import enrolment_qualifying_data, proof
    from oci_hook.attestation.enrolment_documents import Answer
    from oci_hook.attestation.measurement import MEASURED_PCRS

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
