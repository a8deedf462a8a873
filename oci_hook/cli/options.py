"""What several commands take: the owner's folder and its passphrase, inputs and outputs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from oci_hook.errors import FileUnreadable, KeyInvalid, OutputExists, SczError
from oci_hook.trusted_file import load_file, replace_file

if TYPE_CHECKING:
    from oci_hook.attestation.ek_chain import CaCertificates

_DOCUMENT_BYTES = 1 << 20
_PASSPHRASE_BYTES = 1024
_MAX_AUTHORITIES = 1000

KEYS = click.option(
    "--keys", type=click.Path(file_okay=False), required=True, help="The owner's folder (`sczctl keygen`)."
)
OUTPUT = click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="File to write.")
EK_ROOTS = click.option(
    "--ek-roots",
    type=click.Path(file_okay=False),
    required=True,
    help="Folder with the CA certificates of the TPM manufacturers that you accept (PEM or DER).",
)
CLASS = click.option("--class", "device_class", default="default", show_default=True, help="The device class.")


PASSPHRASE_FILE = click.option(
    "--passphrase-file", type=click.Path(dir_okay=False), help="Read the keys' passphrase from this file."
)


def passphrase_source(passphrase_file: str | None, *, confirm: bool = False) -> Callable[[], str]:
    """Where the passphrase of the owner's keys comes from: a file, or a person at the terminal.

    The function that is returned raises `KeyInvalid` if nobody can be asked.
    """

    def ask() -> str:
        if passphrase_file:
            data = load_file(passphrase_file, limit_bytes=_PASSPHRASE_BYTES, error=KeyInvalid)
            return data.decode("utf-8", "surrogateescape").rstrip("\n")
        if not sys.stdin.isatty():
            raise KeyInvalid(
                "a passphrase is needed, and there is no terminal to ask on", remedy="give --passphrase-file FILE"
            )
        return str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))

    return ask


@contextlib.contextmanager
def show_progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error; what it yields takes the bytes done so far, of `total`."""
    with click.progressbar(length=max(total, 1), label=label, file=sys.stderr) as bar:

        def advance(done: int) -> None:
            if done > bar.pos:
                bar.update(done - bar.pos)

        yield advance


def load_authorities(folder: str) -> CaCertificates:
    """The CA certificates of an owner's folder of EK roots.

    Raises:
        KeyInvalid: The folder has no root, or a file that is no certificate.
        FileUnreadable: It cannot be read.
    """
    from oci_hook.attestation.ek_chain import parse_ca_certificates

    try:
        names = sorted(os.listdir(folder))
    except OSError as cause:
        raise FileUnreadable(f"{folder}: {cause.strerror}") from cause
    if len(names) > _MAX_AUTHORITIES:
        raise KeyInvalid(f"{folder} holds more than {_MAX_AUTHORITIES} files")
    return parse_ca_certificates([read_input(os.path.join(folder, name), KeyInvalid) for name in names])


def read_input(path: str, error: type[SczError]) -> bytes:
    """Read a document of at most 1 MiB."""
    return load_file(path, limit_bytes=_DOCUMENT_BYTES, error=error)


def write_output(path: str, data: bytes, *, mode: int = 0o644) -> None:
    """Write a new file, whole or not at all.

    Raises:
        OutputExists: There is something already.
        FileUnreadable: It cannot be written.
    """
    if os.path.lexists(path):
        raise OutputExists(f"{path} exists")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise FileUnreadable(f"{path}: the folder does not exist")
    replace_file(os.path.abspath(path), data, mode=mode)
