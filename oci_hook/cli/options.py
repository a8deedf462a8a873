"""What several commands take: the owner's folder and its passphrase, inputs and outputs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from oci_hook.bundle.model import VERSION
from oci_hook.cli.completion import complete_files
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, KeyInvalid, ModelUnknown, OutputExists, SczError
from oci_hook.trust import NAME, NAME_LIMIT
from oci_hook.trusted_file import load_file, replace_file

if TYPE_CHECKING:
    from oci_hook.attestation.ek_chain import CaCertificates
    from oci_hook.store import Store, StoredModel

DOCUMENT_BYTES = 1 << 20
_PASSPHRASE_BYTES = 1024
_MAX_AUTHORITIES = 1000


def name_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Check an option that is a name, before any work is done."""
    if value is not None and (len(value) > NAME_LIMIT or not re.fullmatch(NAME, value)):
        raise click.BadParameter(
            f"{shown(value)} is not a name: at most {NAME_LIMIT} lower-case letters and digits, with . _ - between them"
        )
    return value


def names_of(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """`name_of` for an option that may be given several times."""
    for name in value:
        name_of(context, parameter, name)
    return value


def container_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Check an option that is a container's id or its beginning: every id begins with nothing (an unset variable)."""
    if value == "":
        raise click.BadParameter("it is empty: give a container's id, or its beginning")
    return value


def version_of(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Check an option that is a model's version."""
    if not re.fullmatch(VERSION, value):
        raise click.BadParameter(f"{shown(value)} is not a version: at most 64 letters, digits and . _ -")
    return value


def model_of(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, str]:
    """Take the argument `name:version` apart."""
    name, colon, version = value.partition(":")
    if not colon:
        raise click.BadParameter(f"{shown(value)} has no version: give name:version, such as {shown(value + ':1')}")
    name_of(context, parameter, name)
    return name, version_of(context, parameter, version)


class GroupInOrder(click.Group):
    """Lists its commands in the order of the work, which is that of the module, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """All commands."""
        return list(self.commands)


def is_model(text: str) -> bool:
    """Whether a text is `name:version`, as a model in the store is called."""
    name, colon, version = text.partition(":")
    return bool(colon and len(name) <= NAME_LIMIT and re.fullmatch(NAME, name) and re.fullmatch(VERSION, version))


def known_model(store: Store, text: str) -> StoredModel:
    """The model of the store that `name:version` means.

    Raises:
        ModelUnknown: There is none.
        StoreInvalid: Its entry is damaged.
    """
    known = [":".join(found) for found in store.names()]
    verify_one_of("model", text, known, ModelUnknown, remedy="`sczctl list` shows what is in the store")
    name, _, version = text.partition(":")
    return store.load_model(name, version)


KEYS = click.option(
    "--keys", type=click.Path(file_okay=False), required=True, help="The owner's folder (`sczctl keygen`)."
)
OUTPUT = click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    shell_complete=complete_files,
    help="File to write; nothing is overwritten.",
)
PASSPHRASE_FILE = click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False),
    help="Read the keys' passphrase from this file; default: ask on the terminal.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")


def hook_timeout(seconds: str = "Seconds") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--timeout` of what makes an engine call the hook; `seconds` begins its help."""
    return click.option(
        "--timeout",
        "timeout_seconds",
        type=click.IntRange(10, 3600),
        metavar="SECONDS",
        default=300,
        show_default=True,
        help=f"{seconds} after which the runtime ends the hook and the container.",
    )


def verify_one_of(what: str, wanted: str, known: Sequence[str], error: type[SczError], *, remedy: str) -> None:
    """Check that something is among what is known; a person is told what is.

    Raises:
        SczError: The class `error`.
    """
    if wanted not in known:
        few = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise error(f"there is no {what} {wanted}; there {'is ' + few if few else 'are none'}", remedy=remedy)


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
    return load_file(path, limit_bytes=DOCUMENT_BYTES, error=error)


def verify_new_output(path: str) -> None:
    """Check, before the work is done and a person is asked, that nothing is in the way of what will be written.

    Raises:
        OutputExists: There is something already.
        FileUnreadable: Its folder does not exist.
    """
    if os.path.lexists(path):
        raise OutputExists(f"{path} exists")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileUnreadable(f"{path}: the folder {folder} does not exist", remedy=f"mkdir -p {folder}")


def write_output(path: str, data: bytes, *, mode: int = 0o644) -> None:
    """Write a new file, whole or not at all.

    Raises:
        OutputExists: There is something already.
        FileUnreadable: It cannot be written.
    """
    verify_new_output(path)
    replace_file(os.path.abspath(path), data, mode=mode)
