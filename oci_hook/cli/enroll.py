"""`sczctl enroll`: the files between hosts and a model's owner, by hand or in one go."""

from __future__ import annotations

import click

from oci_hook.cli.enroll_host import answer, ek, request
from oci_hook.cli.enroll_owner import accept, challenge
from oci_hook.cli.enroll_run import run
from oci_hook.cli.options import GroupInOrder


@click.group(cls=GroupInOrder)
def enroll() -> None:
    """Enrol a host with a model's owner.

    Four files go to and fro, by any way: request (made by the host), challenge (owner), answer (host), and the owner
    accepts. Where the owner reaches the host, `run` does it all.
    """


for _command in (ek, request, challenge, answer, accept, run):
    enroll.add_command(_command)

COMMANDS = {"enroll": enroll}
