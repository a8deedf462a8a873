"""What a delivery has made visible, and what a container's record keeps of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from oci_hook.delivery.room import ModelDelivery
from oci_hook.held import HeldModel
from oci_hook.linux import syscalls


@dataclass(frozen=True, slots=True)
class Attached:
    """A model that a container can read.

    Attributes:
        slot: The model's slot.
        destination: Absolute path in the container.
        fsid: `f_fsid` of its file system, by which a live mount is known again.
        device: `major:minor` of its superblock.
        mount_id: Of the mount.
        size_bytes: Of its plaintext.
        root_inode: Of its root directory.
        uid: Host uid of its files.
        gid: The same for the group.
        shareable: Another container may have the same copy.
        filled_by: The container that has had the copy before; empty: it was decrypted now.
    """

    slot: str
    destination: str
    fsid: int
    device: str
    mount_id: int
    size_bytes: int
    root_inode: int = 0
    uid: int = 0
    gid: int = 0
    shareable: bool = False
    filled_by: str = ""

    def held(self, owner: str) -> HeldModel:
        """For the container's record; `owner`: the owner's id."""
        return HeldModel(
            fsid=self.fsid,
            device=self.device,
            mount_id=self.mount_id,
            size_bytes=self.size_bytes,
            owner=owner,
            shareable=self.shareable,
            root_inode=self.root_inode,
            uid=self.uid,
            gid=self.gid,
            filled_by=self.filled_by,
        )


def look_at(model: ModelDelivery, fd: int, filled_by: str, *, shareable: bool) -> Attached:
    """What a mount is known by.

    Args:
        model: What it holds.
        fd: Of its root.
        filled_by: The container that has had it before; empty: none.
        shareable: Another container may have the same copy.
    """
    root = os.fstat(fd)
    return Attached(
        slot=model.slot,
        destination=model.destination,
        fsid=os.fstatvfs(fd).f_fsid,
        device=f"{os.major(root.st_dev)}:{os.minor(root.st_dev)}",
        mount_id=syscalls.statx_mount_id(fd),
        size_bytes=sum(entry.size for entry in model.manifest.files),
        root_inode=root.st_ino,
        uid=root.st_uid,
        gid=root.st_gid,
        shareable=shareable,
        filled_by=filled_by,
    )
