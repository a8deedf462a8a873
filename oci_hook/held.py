"""A delivered model's mount, as a container's record keeps it. Pure; the records are `oci_hook.records`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from oci_hook.documents import Fields
from oci_hook.errors import FileUnreadable


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A delivered model's mount, by what it is known again wherever its directory has been moved to.

    Attributes:
        fsid: `f_fsid` of its file system; 0 for a ramfs.
        device: `major:minor` of its superblock: no two that live have one.
        mount_id: Of the mount itself.
        size_bytes: Of its plaintext.
        owner: The owner's id.
        released: `sczctl release` has taken it away.
        shareable: Another container may have the same copy; never in records of an earlier version. What follows is
            kept for such models alone.
        root_inode: Of the root directory.
        uid: On the host, of its files.
        gid: The same.
        filled_by: The container whose start decrypted it, if it was another's: to its control group it is charged.
    """

    fsid: int
    device: str
    mount_id: int
    size_bytes: int
    owner: str
    released: bool = False
    shareable: bool = False
    root_inode: int = 0
    uid: int = 0
    gid: int = 0
    filled_by: str = ""

    def document(self) -> dict[str, object]:
        """For JSON. What is not shareable is written as by versions that shared nothing, which refuse other keys."""
        document = asdict(self)
        return document if self.shareable else {key: document[key] for key in document if key not in _SHARING}

    def is_same_copy(self, other: HeldModel) -> bool:
        """Whether both are mounts of one file system, which both containers still have."""
        gone = self.released or other.released
        return not gone and self.fsid != 0 and (self.fsid, self.device) == (other.fsid, other.device)


_SHARING = ("shareable", "root_inode", "uid", "gid", "filled_by")


def parse_held(value: object, path: str) -> HeldModel:
    """Check what a record has of one model.

    Args:
        value: What JSON gave.
        path: Of the record, for messages.

    Raises:
        FileUnreadable: A field is missing, unknown or malformed.
    """
    fields = Fields(value, what=path, error=FileUnreadable)
    model = HeldModel(
        fsid=fields.integer("fsid", low=0, high=(1 << 64) - 1),
        device=fields.string("device", pattern=r"[0-9]+:[0-9]+"),
        mount_id=fields.integer("mount_id", low=0, high=1 << 62),
        size_bytes=fields.integer("size_bytes", low=0, high=1 << 62),
        owner=fields.string("owner"),
        released=fields.boolean("released"),
        **_parse_sharing(fields, path),
    )
    fields.finish()
    return model


def _parse_sharing(fields: Fields, path: str) -> dict[str, Any]:
    """What a model that is not shareable has not, nor any in records of versions that shared nothing."""
    if not fields.has("shareable"):
        return {}
    return {
        "shareable": fields.boolean("shareable"),
        "root_inode": fields.integer("root_inode", low=0, high=(1 << 64) - 1),
        "uid": fields.integer("uid", low=0, high=(1 << 32) - 1),
        "gid": fields.integer("gid", low=0, high=(1 << 32) - 1),
        "filled_by": _filler(fields.take("filled_by"), path),
    }


def _filler(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) > 1024:
        raise FileUnreadable(f"{path}: 'filled_by' is not a string of at most 1024 characters")
    return value
