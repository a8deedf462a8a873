"""The host's store of models.

A model enters through `sczctl add` only after its owner's signature and every layer's digest were verified on the copy
that stays; the hook then relies on the folder being root's alone and on the files' own authentication. Below the
store's directory::

    models/<image digest>/                       the OCI layout, as its owner made it
    names/<name>/<version>                       {"image" or null, "manifest", "owner"}: written last
    grants/<manifest digest>.jwt                 this device's grant
    boot-policies/<owner id>/<name>@<class>.json
    revocations/<owner id>.jwt
    device.json                                  this host's enrolment

`placement` changes the first five, under a lock; reading needs none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from oci_hook.attestation.host_device import HostDevice, parse_host_device
from oci_hook.bundle.layout import Layout, open_layout
from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import (
    BootPolicyInvalid,
    BootPolicyRefused,
    DeviceInvalid,
    DeviceNotEnrolled,
    FileUnreadable,
    GrantInvalid,
    GrantMissing,
    ModelUnknown,
    StoreInvalid,
)
from oci_hook.key_errors import RevocationsMissing
from oci_hook.oci.annotations import ModelReference
from oci_hook.trusted_file import load_root_file, make_private_directory, replace_file

_NAME_FILE_BYTES = 4 << 10
_DOCUMENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One line of `sczctl list`: what `names/<name>/<version>` says.

    Attributes:
        image_digest: Of its bundle here; None if only its grant is here, and images carry the bundle.
    """

    name: str
    version: str
    image_digest: str | None
    manifest_digest: str
    owner_id: str


def entries(directory: str, *, hidden: bool = False) -> list[str]:
    """The sorted names in a directory that may be absent: all but the hidden ones, or only those."""
    try:
        return sorted(entry for entry in os.listdir(directory) if entry.startswith(".") == hidden)
    except FileNotFoundError:
        return []
    except OSError as cause:
        raise FileUnreadable(f"{directory}: {cause.strerror}") from cause


@contextlib.contextmanager
def system_calls(path: str) -> Iterator[None]:
    """What the system refuses inside the block is `FileUnreadable`, with the path that it names."""
    try:
        yield
    except OSError as cause:
        raise FileUnreadable(f"{cause.filename or path}: {cause.strerror}") from cause


class Store:
    """The store below `directory`; see the module's text for its shape."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def path(self, *parts: str) -> str:
        """A path below the store's directory."""
        return os.path.join(self.directory, *parts)

    def nearest_folder(self) -> str:
        """The store's directory, or the next one above it that exists: the disk that the store is, or will be, on."""
        folder = os.path.abspath(self.directory)
        while not os.path.isdir(folder) and folder != "/":
            folder = os.path.dirname(folder)
        return folder

    # --- reading: the hook ---

    def resolve(self, reference: ModelReference) -> StoredModel:
        """Find a model by what an annotation says.

        A name without a version means the only version that is here.

        Raises:
            ModelUnknown: It is not here, or the name alone is ambiguous.
        """
        if reference.rootfs_path is not None:
            raise ModelUnknown("a bundle that the image carries (rootfs:) is not looked up in the store")
        name = reference.name
        found = self._of_name(name)
        if reference.version is not None:
            found = [model for model in found if model.version == reference.version]
        if reference.image_digest is not None:
            found = [model for model in found if model.image_digest == reference.image_digest]
        if not found:
            raise ModelUnknown(f"no model {reference} is in the store")
        if len(found) > 1:
            raise ModelUnknown(f"{name} has {len(found)} versions in the store: name one (name:version)")
        return found[0]

    def _of_name(self, name: str) -> list[StoredModel]:
        return [self.load_model(name, version) for version in entries(self.path("names", name))]

    def load_model(self, name: str, version: str) -> StoredModel:
        """The model of that name and version.

        Raises:
            StoreInvalid: Its entry is damaged.
            FileUnreadable: There is none.
        """
        path = self.name_path(name, version)
        data = load_root_file(path, limit_bytes=_NAME_FILE_BYTES, error=StoreInvalid, remedy=StoreInvalid.remedy)
        fields = Fields(
            parse_object(data, limit_bytes=_NAME_FILE_BYTES, what=path, error=StoreInvalid),
            what=path,
            error=StoreInvalid,
        )
        carried = fields.rest()
        if carried.get("image", "") is None:
            del carried["image"]
        fields = Fields(carried, what=path, error=StoreInvalid)
        image = fields.digest("image") if "image" in carried else None
        model = StoredModel(name, version, image, fields.digest("manifest"), fields.string("owner", limit=64))
        fields.finish()
        return model

    def open_model(self, model: StoredModel) -> Layout:
        """Open the model's layout; the caller closes it.

        Raises:
            ModelUnknown: Only its grant is here.
            StoreInvalid: The folder does not hold the image that the name means, or others could have written it.
            BundleInvalid, BundleMismatch: It is damaged.
        """
        if model.image_digest is None:
            raise ModelUnknown(
                f"only the grant of {model.name}:{model.version} is in the store, not its bundle",
                remedy="name the bundle in the image (smm.scz/model: rootfs:/path), or `sczctl add` the bundle",
            )
        path = self.bundle_path(model.image_digest)
        remedy = f"`sczctl add FOLDER` again, with what its owner sent: it mends {model.name}:{model.version}"
        layout = open_layout(path, root_alone=True, remedy=remedy)
        if layout.image_digest != model.image_digest:
            layout.close()
            raise StoreInvalid(f"{path} holds another image than its name says", remedy=remedy)
        return layout

    def verify_present(self, model: StoredModel) -> None:
        """Check that all files of a model's bundle are here with their sizes, and root's alone; none is read whole.

        Raises:
            StoreInvalid, BundleInvalid, BundleMismatch: The bundle is damaged.
            FileUnreadable: The system said no.
        """
        if model.image_digest is not None:
            with self.open_model(model) as layout:
                for layer in layout.layers:
                    os.close(layout.open_blob(layer.digest))

    def open_reference(self, reference: ModelReference) -> Layout:
        """`resolve`, then `open_model`."""
        return self.open_model(self.resolve(reference))

    def load_grant(self, manifest_digest: str) -> bytes:
        """This device's grant for a manifest, unverified.

        Raises:
            GrantMissing: There is none.
        """
        path = self.grant_path(manifest_digest)
        if not os.path.lexists(path):
            raise GrantMissing(f"no grant for the manifest {manifest_digest} is in the store")
        return load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=GrantInvalid, remedy=GrantInvalid.remedy)

    def load_boot_policy(self, owner_id: str, model_name: str, device_class: str) -> bytes:
        """The owner's boot policy for a model line and device class, unverified.

        Raises:
            BootPolicyRefused: There is none.
        """
        path = self.boot_policy_path(owner_id, model_name, device_class)
        if not os.path.lexists(path):
            raise BootPolicyRefused(f"no boot policy for {model_name} and device class {device_class} is in the store")
        return load_root_file(
            path, limit_bytes=_DOCUMENT_BYTES, error=BootPolicyInvalid, remedy=BootPolicyInvalid.remedy
        )

    def load_revocations(self, owner_id: str) -> bytes | None:
        """An owner's list of revocations, unverified; None: there is none.

        Raises:
            RevocationsMissing: It could have been written by others than root.
            FileUnreadable: It cannot be read.
        """
        path = self.revocations_path(owner_id)
        if not os.path.lexists(path):
            return None
        return load_root_file(
            path, limit_bytes=_DOCUMENT_BYTES, error=RevocationsMissing, remedy=RevocationsMissing.remedy
        )

    def revocations_path(self, owner_id: str) -> str:
        """Where an owner's list of revocations lies."""
        return self.path("revocations", f"{owner_id}.jwt")

    def boot_policy_path(self, owner_id: str, model_name: str, device_class: str) -> str:
        """Where an owner's boot policy for a model line and device class lies."""
        return self.path("boot-policies", owner_id, f"{model_name}@{device_class}.json")

    def grant_path(self, manifest_digest: str) -> str:
        """Where this device's grant for a manifest lies."""
        return self.path("grants", manifest_digest.removeprefix("sha256:") + ".jwt")

    def name_entry(self, model: StoredModel) -> tuple[str, bytes]:
        """Path and contents of what makes a model known under its name."""
        document = {"image": model.image_digest, "manifest": model.manifest_digest, "owner": model.owner_id}
        return self.name_path(model.name, model.version), canonical(document)

    def name_path(self, name: str, version: str) -> str:
        """Where the entry of a name and version lies."""
        return self.path("names", name, version)

    def bundle_path(self, image_digest: str) -> str:
        """Where the layout with that image digest lies."""
        return self.path("models", image_digest.removeprefix("sha256:"))

    def load_device(self) -> HostDevice:
        """This host's enrolment.

        Raises:
            DeviceNotEnrolled: There is none.
        """
        path = self.path("device.json")
        if not os.path.lexists(path):
            raise DeviceNotEnrolled(f"{path} is absent: this host was never enrolled")
        return parse_host_device(load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=DeviceInvalid))

    # --- enrolment and lists: sczctl ---

    def save_device(self, document: bytes) -> None:
        """Write this host's enrolment (FileUnreadable)."""
        make_private_directory(self.directory)
        replace_file(self.path("device.json"), document)

    def save_request(self, owner_id: str, document: bytes) -> None:
        """Keep an enrolment request until the owner's challenge comes."""
        make_private_directory(self.path("enrolment"))
        replace_file(self.path("enrolment", f"{owner_id}.json"), document)

    def load_request(self, owner_id: str) -> bytes:
        """The last enrolment request to an owner.

        Raises:
            DeviceNotEnrolled: There is none.
        """
        path = self.path("enrolment", f"{owner_id}.json")
        if not os.path.lexists(path):
            raise DeviceNotEnrolled("this host made no enrolment request to that owner")
        return load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=DeviceInvalid)

    def names(self) -> list[tuple[str, str]]:
        """Name and version of every model here, sorted; a damaged entry is one of them."""
        return [
            (name, version) for name in entries(self.path("names")) for version in entries(self.path("names", name))
        ]

    def models(self) -> list[StoredModel]:
        """Every model here, sorted by name and version.

        Raises:
            StoreInvalid: An entry is damaged.
        """
        return [self.load_model(name, version) for name, version in self.names()]

    def knows(self, name: str, version: str) -> bool:
        """Whether there is an entry of that name and version, damaged or not."""
        return os.path.lexists(self.name_path(name, version))

    def has_grant(self, manifest_digest: str) -> bool:
        """Whether this device has a grant for the manifest."""
        return os.path.lexists(self.grant_path(manifest_digest))
