"""Packing one version of a model: its bundle and the content key that opens it appear together.

A bundle without its key could never be granted to anybody, so the key is kept before the bundle gets its name. What is
killed before that leaves neither; `kill -9` between the two steps leaves a key without a bundle, and says so when the
version is packed again. How a bundle is made is `bundle.pack`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oci_hook.access_policy import AccessPolicy
from oci_hook.bundle.files import NewFolder, uninterrupted
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.pack import PackedBundle, bundle_need, pack, scan_source
from oci_hook.bundle.segments import KEY_BYTES, ContentKey
from oci_hook.disk_space import Need, full_disk_explained
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable, OutputExists
from oci_hook.owner.keyring import Keyring, seal_content_key
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from oci_hook.owner.recovery import load_recipient, recovery_copy
from oci_hook.trusted_file import sync_directory

_RECORD_BYTES = 16 << 10  # of a content key, with its folders


def pack_version(
    keyring: Keyring,
    source: Path,
    output: Path,
    *,
    model: ModelId,
    access: AccessPolicy,
    fields: Mapping[str, Any],
    created: int,
    random: Callable[[int], bytes],
    progress: Callable[[int], object],
) -> PackedBundle:
    """Pack a folder under a new content key, and keep that key in the owner's folder.

    Args:
        keyring: The owner's, opened.
        source: A folder of regular files.
        output: The bundle's folder; its parent exists, it does not.
        model: What it is called; each version is packed once.
        access: Who may have it.
        fields: The owner's free object.
        created: Seconds since 1970.
        random: Gives so many random bytes, as `os.urandom` does.
        progress: Called with the bytes of plaintext done so far.

    Raises:
        OutputExists: The output is there, or the version was packed before.
        KeyInvalid: The offline recovery key of the folder is not one that its owner named.
        SourceInvalid: The source, the fields or the policy cannot be packed.
        FileUnreadable: The system said no; a disk has no room.
    """
    OwnerRecords(keyring.folder).verify_new_version(model.name, model.version)
    recipient = load_recipient(keyring.folder, keyring.owner)
    content_key = ContentKey(random(KEY_BYTES))
    folder = Path(os.path.abspath(output)).parent
    try:
        with (
            full_disk_explained(str(folder), lambda: bundle_need(scan_source(source), folder)),
            NewFolder(output) as new,
        ):
            bundle = new.partial / "bundle"
            packed = pack(
                source,
                bundle,
                model=model,
                access=access,
                fields=fields,
                created=created,
                owner_id=keyring.owner.owner_id,
                key=keyring.manifest_key,
                content_key=content_key,
                random=random,
                progress=progress,
                annotate=lambda digest: {} if recipient is None else recovery_copy(content_key, digest, recipient),
            )
            record = _record(keyring, model, packed, content_key, broker=access.broker)
            _keep_and_publish(record, keyring.folder, bundle, output)
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or output)}: {cause.strerror}") from cause
    return packed


def _record(
    keyring: Keyring, model: ModelId, packed: PackedBundle, content_key: ContentKey, *, broker: bool
) -> ContentKeyRecord:
    sealed = seal_content_key(content_key, manifest_digest=packed.manifest_digest, owner=keyring.owner)
    return ContentKeyRecord(model, packed.manifest_digest, packed.image_digest, sealed, broker)


def _keep_and_publish(record: ContentKeyRecord, keys: Path, bundle: Path, output: Path) -> None:
    # The keys may lie on another disk than the bundle, and that one may be full.
    need = Need(_RECORD_BYTES, 1, "free {size} on {mount}, where the folder of --keys is (`df -h {mount}`)")
    with uninterrupted():  # for two renames
        with full_disk_explained(str(keys), lambda: need):
            OwnerRecords(keys).save_content_key(record)
        try:
            _publish(bundle, output)
        except (OSError, OutputExists):  # the key opens nothing, and would be in the way of the next attempt
            keys.joinpath("models", record.model.name, f"{record.model.version}.json").unlink()
            raise


def _publish(bundle: Path, output: Path) -> None:
    if os.path.lexists(output):  # rename(2) would replace an empty folder
        raise OutputExists(f"{shown(output)} appeared meanwhile")
    os.rename(bundle, output)
    sync_directory(os.path.dirname(os.path.abspath(output)))
