"""Many small files that get their places together: all are written and synced first, then renamed.

A kill before the renames leaves what was there before, one between them some new files and some old ones, each whole;
temporary files that it leaves are removed by the next who writes there. rename(2), fsync(2).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from oci_hook.bundle.files import create_file
from oci_hook.documents import shown
from oci_hook.errors import FileUnreadable
from oci_hook.trusted_file import remove_half_written, sync_directory


class _Staged(NamedTuple):
    temporary: Path
    place: Path
    data: bytes


def save_together(
    base: Path, files: Sequence[tuple[Path, bytes]], writers: Executor, progress: Callable[[int], object]
) -> None:
    """Put files of mode 0600 into their places, replacing what is there.

    Args:
        base: A folder that exists; what is missing below it is made, with mode 0700.
        files: Each with its place below `base`; no place is there twice.
        writers: In which they are written side by side.
        progress: Called with the number of files written so far.

    Raises:
        FileUnreadable: The system said no; before the first rename, nothing was replaced.
    """
    staged = [_Staged(_temporary(place), place, data) for place, data in files]
    folders = sorted({place.parent for _, place, _ in staged})
    try:
        for folder in folders:
            _make_folders(base, folder)
            remove_half_written(str(folder))
        with _removed(staged):
            for number, _ in enumerate(writers.map(_write, staged), 1):
                progress(number)
            for each in staged:
                os.rename(each.temporary, each.place)
        for folder in folders:
            sync_directory(str(folder))
    except OSError as cause:
        raise FileUnreadable(f"{shown(cause.filename or base)}: {cause.strerror}") from cause


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(6)}")


def _make_folders(base: Path, folder: Path) -> None:
    parts = folder.relative_to(base).parts
    for depth in range(1, len(parts) + 1):
        base.joinpath(*parts[:depth]).mkdir(mode=0o700, exist_ok=True)


def _write(staged: _Staged) -> None:
    create_file(staged.temporary, staged.data, mode=0o600)


@contextlib.contextmanager
def _removed(staged: Sequence[_Staged]) -> Iterator[None]:
    """Whatever happens inside, no temporary file stays; but for a kill."""
    try:
        yield
    except BaseException:
        for each in staged:
            with contextlib.suppress(OSError):
                each.temporary.unlink()
        raise
