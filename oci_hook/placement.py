"""How the host's store changes: bundles staged beside the models, verified by `intake`, then placed; and removed.

One lock is held while anything is placed or removed; it ends with the process that holds it. A reader, the hook, needs
none: what a name means is there before the name, and goes after it. A bundle or grant that no name means is what a
removal, a replacement or a crash left; whoever holds the lock next removes it. Nothing is verified here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence

from oci_hook.errors import ModelUnknown, SczError
from oci_hook.store import Store, entries, system_calls
from oci_hook.trusted_file import make_private_directory, replace_file, sync_directory

_STAGING = ".staging."


@contextlib.contextmanager
def locked(store: Store) -> Iterator[None]:
    """Hold the store's lock.

    Raises:
        FileUnreadable: A system call failed.
    """
    make_private_directory(store.directory)
    path = store.path(".lock")
    with system_calls(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with system_calls(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging(store: Store) -> Iterator[str]:
    """A private folder beside the models, to copy bundles into; what is left in it at the end is removed.

    Raises:
        FileUnreadable: A system call failed.
    """
    folder = store.path("models", _STAGING + secrets.token_hex(8))
    with contextlib.ExitStack() as stack:
        with locked(store):
            _sweep(store)
            make_private_directory(store.path("models"))
            with system_calls(folder):
                os.mkdir(folder, 0o700)
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # says that its maker lives, whichever pids are used again
        yield folder


def place(store: Store, bundles: Sequence[tuple[str, str]], documents: Sequence[tuple[str, bytes]]) -> None:
    """Put what was verified into its place, under the lock; all documents are on the disk before the first rename.

    Args:
        store: The store; `locked` is held.
        bundles: Staged folders and their image digests.
        documents: Paths, by the store's `revocations_path`, `grant_path`, `boot_policy_path` and `name_entry`, and
            contents, in the order in which they are placed: lists of revocations first, names last.

    Raises:
        FileUnreadable: A system call failed.
    """
    for path in dict.fromkeys(os.path.dirname(path) for path, _ in documents):
        make_private_directory(os.path.dirname(path))
        make_private_directory(path)
    with contextlib.ExitStack() as written:
        temporaries = []
        for path, data in documents:
            temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(6)}")
            written.callback(_unlink_if_there, temporary)
            replace_file(temporary, data)
            temporaries.append((temporary, path))
        for folder, image_digest in bundles:
            _place_bundle(folder, store.bundle_path(image_digest))
        for temporary, path in temporaries:
            with system_calls(path):
                _clear_way(path, for_folder=False)
                os.rename(temporary, path)
                sync_directory(os.path.dirname(path))
    _sweep(store)


def _place_bundle(folder: str, target: str) -> None:
    """Rename a layout into its place.

    One that is there has the same contents, unless it is damaged: it is renewed file by file, so that it is whole at
    every moment, for a hook that reads it and after a crash. What is of another kind than it should be goes first.
    """
    with system_calls(target):
        _clear_way(target, for_folder=True)
        if not os.path.lexists(target):
            os.rename(folder, target)
        else:
            for found, _, names in os.walk(folder):
                into = os.path.normpath(os.path.join(target, os.path.relpath(found, folder)))
                _clear_way(into, for_folder=True)
                os.makedirs(into, mode=0o700, exist_ok=True)
                os.chown(into, 0, 0)
                os.chmod(into, 0o700)  # from now on nobody else puts anything there
                for name in names:
                    _clear_way(os.path.join(into, name), for_folder=False)
                    os.rename(os.path.join(found, name), os.path.join(into, name))
                sync_directory(into)
        sync_directory(os.path.dirname(target))


def _clear_way(path: str, *, for_folder: bool) -> None:
    """Remove what lies at a path if a folder is to be there and it is none, or the other way round (OSError)."""
    is_folder = os.path.isdir(path) and not os.path.islink(path)
    if for_folder and not is_folder and os.path.lexists(path):
        os.unlink(path)
    elif is_folder and not for_folder:
        shutil.rmtree(path)


def remove(store: Store, name: str, version: str) -> None:
    """Forget a model: its name first, then its grant and its bundle if no other name needs them.

    Raises:
        ModelUnknown: It is not here.
        FileUnreadable: A system call failed.
    """
    if not store.knows(name, version):  # looked at first: no lock is made in a store that is not there
        raise ModelUnknown(f"{name}:{version} is not in the store")
    path = store.name_path(name, version)
    with locked(store):
        with system_calls(path):
            _clear_way(path, for_folder=False)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            sync_directory(os.path.dirname(path))
        _sweep(store)


def _sweep(store: Store) -> None:
    """Remove what nothing means, under the lock."""
    for entry in entries(store.path("models"), hidden=True):
        if entry.startswith(_STAGING):
            _remove_unless_locked(store.path("models", entry))
    folders = [store.path("grants"), store.path("revocations")]
    for kind in ("boot-policies", "names"):
        folders += [store.path(kind, entry) for entry in entries(store.path(kind))]
    for folder in folders:
        for entry in entries(folder, hidden=True):  # documents that were never renamed into their places
            _unlink_if_there(os.path.join(folder, entry))
    try:
        models = store.models()
    except SczError:
        return  # what a damaged entry means cannot be told: everything stays until that one is removed
    bundles = {os.path.basename(store.bundle_path(model.image_digest)) for model in models if model.image_digest}
    for entry in set(entries(store.path("models"))) - bundles:
        shutil.rmtree(store.path("models", entry), ignore_errors=True)
        _unlink_if_there(store.path("models", entry))  # a file, where a folder was
    grants = {os.path.basename(store.grant_path(model.manifest_digest)) for model in models}
    for entry in set(entries(store.path("grants"))) - grants:
        _unlink_if_there(store.path("grants", entry))
    for entry in entries(store.path("names")):
        with contextlib.suppress(OSError):
            os.rmdir(store.path("names", entry))  # only if it is empty


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _remove_unless_locked(folder: str) -> None:
    """Remove a staging folder unless the process that made it lives."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
