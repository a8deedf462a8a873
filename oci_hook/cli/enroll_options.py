"""The options of the owner's commands that enrol, and their sum."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli.options import load_authorities, name_of, read_input
from oci_hook.errors import KeyInvalid

if TYPE_CHECKING:
    from oci_hook.owner.enrolling import Enroller

EK_ROOTS = click.option(
    "--ek-roots",
    type=click.Path(file_okay=False),
    help="Folder with the CA certificates of the TPM manufacturers that you accept (PEM or DER).",
)
EK_LIST = click.option(
    "--ek-list",
    type=click.Path(dir_okay=False),
    help="File with TPMs' EKs and names, as `sczctl enroll ek` prints them: needed for TPMs without certificate.",
)
REPLACE = click.option(
    "--replace",
    is_flag=True,
    help="The device of this name has a new TPM, AK or counter, or this TPM has a new name: set the old record aside.",
)
UNREVOKE = click.option(
    "--unrevoke", is_flag=True, help="If this very TPM was revoked: it may have models again, by new grants."
)
DEVICE_CLASS = click.option(
    "--class",
    "device_class",
    metavar="NAME",
    callback=name_of,
    help="The device class: devices of one class share a boot policy. Default: as before, or `default`.",
)


def enroller_of(
    keys: str, ek_roots: str | None, ek_list: str | None, *, replace: bool, unrevoke: bool = False
) -> Enroller:
    """The owner's side, from a command's options."""
    from oci_hook.attestation.ek_list import parse_ek_list
    from oci_hook.owner.enrolling import Enroller, Vouchers
    from oci_hook.owner.keyring import load_owner
    from oci_hook.owner.records import OwnerRecords

    if ek_roots is None and ek_list is None:
        raise click.UsageError("give --ek-roots, --ek-list or both: somebody has to vouch for the TPM")
    vouchers = Vouchers(
        authorities=None if ek_roots is None else load_authorities(ek_roots),
        ek_list=None if ek_list is None else parse_ek_list(read_input(ek_list, KeyInvalid)),
    )
    owner_id = load_owner(Path(keys)).owner_id
    return Enroller(
        OwnerRecords(Path(keys)),
        owner_id=owner_id,
        vouchers=vouchers,
        replace=replace,
        random=secrets.token_bytes,
        unrevoke=unrevoke,
    )
