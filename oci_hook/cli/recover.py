"""`sczctl recover`: a version's key from the copy that its bundle carries for the offline recovery key."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.options import DRY_RUN, JSON, passphrase_source, read_input, show_progress, verify_new_output
from oci_hook.errors import BundleInvalid, KeyInvalid, OutputExists, TrustInvalid

if TYPE_CHECKING:
    from oci_hook.bundle.layout import Layout
    from oci_hook.bundle.manifest import Manifest
    from oci_hook.bundle.segments import ContentKey
    from oci_hook.owner.recovery import Recipient


def load_public_key(path: str) -> Recipient:
    """The public file of an offline recovery key."""
    from oci_hook.owner.recovery import parse_recipient

    return parse_recipient(read_input(path, KeyInvalid))


def make_recovery_key(folder: str, name: str, passphrase: str | None) -> None:
    """`sczctl keygen --recovery-only`."""
    from oci_hook.owner.recovery import create_recovery_key

    recipient = create_recovery_key(Path(folder), name, passphrase)
    public = os.path.join(folder, "recovery.json")
    click.echo(
        f"recovery key {name}, {recipient.key.thumbprint}; name {public} to the owner, and keep the rest offline"
    )


def name_recovery_key(folder: str, recipient: Recipient, passphrase: Callable[[], str]) -> None:
    """`sczctl keygen --recovery-key`."""
    from oci_hook.owner.keyring import open_keyring
    from oci_hook.owner.recovery import name_recipient

    name_recipient(open_keyring(Path(folder), passphrase), recipient)
    click.echo(f"what is packed from now on can be recovered with {recipient.name}, {recipient.key.thumbprint}")


@contextlib.contextmanager
def _unwound() -> Iterator[None]:
    """Let what ends a command unwind it as an interrupt does, so that no plaintext stays; 128 and its number."""

    def end(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # once is enough: what is on its way out must not be ended there
        raise SystemExit(128 + number)

    # What is ignored, as under nohup, stays so.
    before = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in before:
            signal.signal(each, signal.SIG_DFL)


def _decrypt(layout: Layout, manifest: Manifest, content_key: ContentKey, output: Path) -> None:
    from oci_hook.owner.recovery import decrypt_bundle

    with _unwound(), show_progress("decrypting", sum(file.size for file in manifest.files)) as progress:
        decrypt_bundle(layout, manifest, content_key, output, progress)


def _name_leftovers(output: str) -> None:
    """Say what a run that was killed has left: it may be the whole model, and is under no name that anybody knows."""
    from oci_hook.bundle.files import unfinished_folders

    for path in unfinished_folders(Path(output)):
        click.echo(
            printable(f"{path} may hold plaintext of a run that was killed; unless one goes on there: rm -r {path}"),
            err=True,
        )


@click.command()
@click.argument("bundle", metavar="BUNDLE", type=click.Path(file_okay=False))
@click.option(
    "--recovery-key",
    "key_file",
    type=click.Path(dir_okay=False),
    required=True,
    help="The private recovery key: recovery.key, with its passphrase.json beside it.",
)
@click.option(
    "--keys", type=click.Path(file_okay=False), help="The owner's folder, to put the version's key back into."
)
@click.option("-o", "--output", metavar="DIRECTORY", help="Decrypt the bundle into this new folder, instead.")
@click.option(
    "--owner", "owner_file", type=click.Path(dir_okay=False), help="With --output: the owner.json of who packed it."
)
@click.option(
    "--passphrase-file",
    type=click.Path(dir_okay=False),
    help="Read the recovery key's passphrase from this file; default: ask on the terminal.",
)
@DRY_RUN
@JSON
def recover(
    bundle: str,
    key_file: str,
    keys: str | None,
    output: str | None,
    owner_file: str | None,
    passphrase_file: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """OWNER: get a version back with the offline recovery key.

    With --keys its content key is put back into the owner's folder: `sczctl grant` works again, and grants that were
    given go on working. With --output the bundle's plaintext is written, for an owner who lost all keys and has to
    pack it anew under others. The bundle must have been packed after the recovery key was named.

    Until all is decrypted it lies in .NAME.partial-… beside DIRECTORY, which goes when the command ends or is ended. A
    SIGKILL or a power cut leaves it; the next `recover` into DIRECTORY says so.
    """
    from oci_hook.bundle.layout import open_layout
    from oci_hook.owner.keyring import load_owner, open_key_file
    from oci_hook.owner.records import OwnerRecords
    from oci_hook.owner.recovery import recover_content_key, restore_record
    from oci_hook.provenance import verified_manifest
    from oci_hook.trust import parse_owner

    if (keys is None) == (output is None):
        raise click.UsageError("say what for: --keys DIRECTORY or --output DIRECTORY")
    if (output is None) != (owner_file is None):
        raise click.UsageError("--output and --owner belong together")
    if not os.path.isdir(bundle):
        raise BundleInvalid(f"{bundle} is not a folder")
    if output is not None:
        verify_new_output(output)
        _name_leftovers(output)
    owner = load_owner(Path(keys)) if keys is not None else parse_owner(read_input(str(owner_file), TrustInvalid))
    with open_layout(bundle) as layout:
        manifest, _ = verified_manifest(layout, [owner])
        model = f"{manifest.model.name}:{manifest.model.version}"
        known = OwnerRecords(Path(keys)).content_keys() if keys is not None else ()
        if (manifest.model.name, manifest.model.version) in known:
            raise OutputExists(
                f"{keys} has the content key of {model}",
                remedy="`sczctl grant` it; if its record is damaged, move it away first: models/NAME/VERSION.json",
            )
        private = open_key_file(Path(key_file), passphrase_source(passphrase_file))
        content_key = recover_content_key(layout, manifest, private)
        if dry_run:
            done = f"can be recovered: nothing was written to {keys or output}"
        elif keys is not None:
            restore_record(Path(keys), owner, layout, manifest, content_key)
            done = f"its content key is in {keys} again"
        else:
            _decrypt(layout, manifest, content_key, Path(str(output)))
            done = f"{len(manifest.files)} files decrypted into {output}"
    if as_json:
        what = {"restored": keys, "decrypted": output, "dry_run": dry_run, "owner": owner.owner_id}
        print_json({**manifest.model.document(), "manifest": manifest.digest, **what})
        return
    click.echo(f"{model}: {done}")


COMMANDS = {"recover": recover}
