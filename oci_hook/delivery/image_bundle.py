"""A model bundle that the container's image carries: `smm.scz/model: rootfs:/path`.

The image is hostile, and the hook looks at it from the host's side, before anything of the container runs: every part
of the path is a directory of the root file system itself, never a link nor a mount. Nothing of the bundle is believed
for being there; admission checks signature and digests. Specification: docs/annotations.md; openat2(2).
"""

from __future__ import annotations

import os

from oci_hook.bundle.layout import Layout, open_layout
from oci_hook.delivery.holder import identify_root
from oci_hook.documents import shown
from oci_hook.errors import BundleInvalid
from oci_hook.linux import syscalls

_WALK = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
)


def open_image_bundle(bundle: str, root_path: str, path: str) -> Layout:
    """Open a bundle beneath the container's root file system; the caller closes it.

    Args:
        bundle: Absolute path of the OCI bundle.
        root_path: `root.path` of config.json.
        path: Of the model's bundle in the container, absolute and normal.

    Raises:
        BundleInvalid: There is none, or a part of the path is a link, a mount or no directory.
        SpecInvalid: `root.path` is no directory.
        HolderRefused: It is the host's own root, or changes meanwhile.
        SystemCallFailed: The root file system cannot be opened.
        FileUnreadable: The system said no.
    """
    root = identify_root(bundle, root_path).open_here()
    try:
        folder = syscalls.openat2(root, path.lstrip("/"), os.O_RDONLY | os.O_DIRECTORY, resolve=_WALK)
    except OSError as cause:
        raise BundleInvalid(
            f"the image has no bundle at {shown(path)}: {cause.strerror}",
            remedy="put the bundle into the image as `sczctl pack` made it, and name a path without links",
        ) from cause
    finally:
        os.close(root)
    try:
        return open_layout(folder)
    finally:
        os.close(folder)
