"""Documents that come from a file or, as `-`, from standard input, and go to one or to standard output.

So that a host's commands can be run from afar with nothing left on its disk. On standard output there is then the
document alone, and what a person is told goes to standard error.
"""

from __future__ import annotations

import sys

import click

from oci_hook.cli.options import DOCUMENT_BYTES, read_input, verify_new_output, write_output
from oci_hook.errors import FileUnreadable, SczError

STREAM = "-"


def read_document(path: str, error: type[SczError]) -> bytes:
    """Read a document of at most 1 MiB from a file or standard input.

    Raises:
        SczError: The class `error`: it is larger, or no regular file.
        FileUnreadable: It cannot be read.
    """
    if path != STREAM:
        return read_input(path, error)
    try:
        data = sys.stdin.buffer.read(DOCUMENT_BYTES + 1)
    except OSError as cause:
        raise FileUnreadable(f"standard input: {cause.strerror}") from cause
    if len(data) > DOCUMENT_BYTES:
        raise error(f"standard input has more than {DOCUMENT_BYTES} bytes")
    return data


def verify_new_document(path: str) -> None:
    """Check that nothing is in the way of what will be written (`verify_new_output`)."""
    if path != STREAM:
        verify_new_output(path)


def write_document(path: str, data: bytes) -> None:
    """Write a new file, whole or not at all, or to standard output (`write_output`)."""
    if path != STREAM:
        write_output(path, data)
        return
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as cause:
        raise FileUnreadable(f"standard output: {cause.strerror}") from cause


def say(path: str, text: str) -> None:
    """Tell a person something; not on standard output if the document is there."""
    click.echo(text, err=path == STREAM)
