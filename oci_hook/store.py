"""The host's store of models, and the owners and issuers that this host trusts.

A model enters through `sczctl add` only after its owner's signature and every layer's digest were verified on the copy
that stays; the hook then relies on the folder being root's alone and on the files' own authentication. Below the
store's directory::

    models/<image digest>/                       the OCI layout, as its owner made it
    names/<name>/<version>                       {"image", "manifest", "owner"}: written last
    grants/<manifest digest>.jwt                 this device's grant
    boot-policies/<owner id>/<name>@<class>.json
    device.json                                  this host's enrolment
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from oci_hook.attestation.host_device import HostDevice, parse_host_device
from oci_hook.bundle.layout import Layout, open_layout
from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import (
    BootPolicyInvalid,
    BootPolicyRefused,
    DeviceNotEnrolled,
    EngineUnsupported,
    FileUnreadable,
    GrantInvalid,
    GrantMissing,
    ModelUnknown,
    StoreInvalid,
    TrustInvalid,
)
from oci_hook.oci.annotations import ModelReference
from oci_hook.trust import Issuer, Owner, parse_issuer, parse_owner
from oci_hook.trusted_file import load_root_file, make_private_directory, replace_file

_NAME_FILE_BYTES = 4 << 10
_DOCUMENT_BYTES = 1 << 20
_MAX_TRUSTED = 256


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One line of `sczctl list`: what `names/<name>/<version>` says."""

    name: str
    version: str
    image_digest: str
    manifest_digest: str
    owner_id: str


def _entries(directory: str) -> list[str]:
    try:
        return sorted(entry for entry in os.listdir(directory) if not entry.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as cause:
        raise FileUnreadable(f"{directory}: {cause.strerror}") from cause


class Trust:
    """The trust folder: `owners/<name>.json` and `issuers/<name>.json`, root's alone."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def path(self, kind: str, name: str) -> str:
        """Where the file of an owner (`owners`) or issuer (`issuers`) lies."""
        return os.path.join(self._directory, kind, f"{name}.json")

    def _load(self, kind: str) -> Iterator[bytes]:
        directory = os.path.join(self._directory, kind)
        names = [name for name in _entries(directory) if name.endswith(".json")]
        if len(names) > _MAX_TRUSTED:
            raise TrustInvalid(f"{directory} holds more than {_MAX_TRUSTED} files")
        for name in names:
            yield load_root_file(os.path.join(directory, name), limit_bytes=_DOCUMENT_BYTES, error=TrustInvalid)

    def owners(self) -> tuple[Owner, ...]:
        """The trusted owners.

        Raises:
            TrustInvalid: One of the files cannot be used: none is skipped in silence.
        """
        return tuple(parse_owner(data) for data in self._load("owners"))

    def issuers(self) -> tuple[Issuer, ...]:
        """The trusted issuers of identity tokens; raises as `owners` does."""
        return tuple(parse_issuer(data) for data in self._load("issuers"))

    def add(self, kind: str, name: str, document: bytes) -> str:
        """Write one file; returns its path."""
        directory = os.path.join(self._directory, kind)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        path = self.path(kind, name)
        replace_file(path, document, mode=0o644)
        return path

    def remove(self, kind: str, name: str) -> None:
        """Remove one file.

        Raises:
            TrustInvalid: There is none of that name.
        """
        try:
            os.unlink(self.path(kind, name))
        except FileNotFoundError as cause:
            raise TrustInvalid(f"no {kind.rstrip('s')} named {name} is trusted here") from cause


class Store:
    """The store below `directory`; see the module's text for its shape."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def _path(self, *parts: str) -> str:
        return os.path.join(self.directory, *parts)

    # --- reading: the hook ---

    def resolve(self, reference: ModelReference) -> StoredModel:
        """Find a model by what an annotation says.

        A name without a version means the only version that is here.

        Raises:
            ModelUnknown: It is not here, or the name alone is ambiguous.
        """
        if reference.rootfs_path is not None:
            raise EngineUnsupported("a bundle inside the image (rootfs:) is not supported by this version")
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
        return [self._named(name, version) for version in _entries(self._path("names", name))]

    def _named(self, name: str, version: str) -> StoredModel:
        path = self._path("names", name, version)
        data = load_root_file(path, limit_bytes=_NAME_FILE_BYTES, error=StoreInvalid)
        fields = Fields(
            parse_object(data, limit_bytes=_NAME_FILE_BYTES, what=path, error=StoreInvalid),
            what=path,
            error=StoreInvalid,
        )
        model = StoredModel(
            name, version, fields.digest("image"), fields.digest("manifest"), fields.string("owner", limit=64)
        )
        fields.finish()
        return model

    def open_model(self, model: StoredModel) -> Layout:
        """Open the model's layout; the caller closes it.

        Raises:
            StoreInvalid: The folder does not hold the image that the name means.
        """
        path = self._path("models", model.image_digest.removeprefix("sha256:"))
        layout = open_layout(path)
        if layout.image_digest != model.image_digest:
            layout.close()
            raise StoreInvalid(f"{path} holds another image than its name says")
        return layout

    def open_reference(self, reference: ModelReference) -> Layout:
        """`resolve`, then `open_model`."""
        return self.open_model(self.resolve(reference))

    def load_grant(self, manifest_digest: str) -> bytes:
        """This device's grant for a manifest, unverified.

        Raises:
            GrantMissing: There is none.
        """
        path = self._path("grants", manifest_digest.removeprefix("sha256:") + ".jwt")
        if not os.path.lexists(path):
            raise GrantMissing(f"no grant for the manifest {manifest_digest} is in the store")
        return load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=GrantInvalid)

    def load_boot_policy(self, owner_id: str, model_name: str, device_class: str) -> bytes:
        """The owner's boot policy for a model line and device class, unverified.

        Raises:
            BootPolicyRefused: There is none.
        """
        path = self._boot_policy_path(owner_id, model_name, device_class)
        if not os.path.lexists(path):
            raise BootPolicyRefused(f"no boot policy for {model_name} and device class {device_class} is in the store")
        return load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=BootPolicyInvalid)

    def _boot_policy_path(self, owner_id: str, model_name: str, device_class: str) -> str:
        return self._path("boot-policies", owner_id, f"{model_name}@{device_class}.json")

    def load_device(self) -> HostDevice:
        """This host's enrolment.

        Raises:
            DeviceNotEnrolled: There is none.
        """
        path = self._path("device.json")
        if not os.path.lexists(path):
            raise DeviceNotEnrolled(f"{path} is absent: this host was never enrolled")
        return parse_host_device(load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=StoreInvalid))

    # --- changing: sczctl ---

    def save_device(self, document: bytes) -> None:
        """Write this host's enrolment."""
        make_private_directory(self.directory)
        replace_file(self._path("device.json"), document)

    def save_request(self, owner_id: str, document: bytes) -> None:
        """Keep an enrolment request until the owner's challenge comes."""
        make_private_directory(self._path("enrolment"))
        replace_file(self._path("enrolment", f"{owner_id}.json"), document)

    def load_request(self, owner_id: str) -> bytes:
        """The last enrolment request to an owner.

        Raises:
            DeviceNotEnrolled: There is none.
        """
        path = self._path("enrolment", f"{owner_id}.json")
        if not os.path.lexists(path):
            raise DeviceNotEnrolled("this host made no enrolment request to that owner")
        return load_root_file(path, limit_bytes=_DOCUMENT_BYTES, error=StoreInvalid)

    def models(self) -> list[StoredModel]:
        """Every model that has a name here, sorted by name and version."""
        return [model for name in _entries(self._path("names")) for model in self._of_name(name)]

    def has_grant(self, manifest_digest: str) -> bool:
        """Whether this device has a grant for the manifest."""
        return os.path.lexists(self._path("grants", manifest_digest.removeprefix("sha256:") + ".jwt"))

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A private folder beside the models, to copy a bundle into; removed at the end unless it was placed."""
        make_private_directory(self.directory)
        make_private_directory(self._path("models"))
        self._sweep_staging()
        folder = self._path("models", f".staging.{os.getpid()}.{secrets.token_hex(4)}")
        os.mkdir(folder, 0o700)
        try:
            yield os.path.join(folder, "layout")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep_staging(self) -> None:
        """Remove what an `add` that was killed left behind."""
        for entry in os.listdir(self._path("models")):
            found = re.fullmatch(r"\.staging\.([0-9]+)\.[0-9a-f]+", entry)
            if found and not os.path.exists(f"/proc/{found[1]}"):
                shutil.rmtree(self._path("models", entry), ignore_errors=True)

    def place_bundle(self, staged: str, image_digest: str) -> None:
        """Rename a verified layout into its place; one that is already there is replaced."""
        target = self._path("models", image_digest.removeprefix("sha256:"))
        if os.path.lexists(target):
            os.rename(target, f"{staged}.old")
        os.rename(staged, target)

    def place_grant(self, manifest_digest: str, grant: bytes) -> None:
        """Write this device's grant for a manifest."""
        make_private_directory(self._path("grants"))
        replace_file(self._path("grants", manifest_digest.removeprefix("sha256:") + ".jwt"), grant)

    def place_boot_policy(self, owner_id: str, model_name: str, device_class: str, policy: bytes) -> None:
        """Write an owner's boot policy for a model line and device class."""
        make_private_directory(self._path("boot-policies", owner_id))
        replace_file(self._boot_policy_path(owner_id, model_name, device_class), policy)

    def place_name(self, model: StoredModel) -> None:
        """Make the model known under its name: the last step of `add`."""
        make_private_directory(self._path("names", model.name))
        document = {"image": model.image_digest, "manifest": model.manifest_digest, "owner": model.owner_id}
        replace_file(self._path("names", model.name, model.version), canonical(document))

    def remove(self, model: StoredModel) -> None:
        """Forget a model: its name first, then its grant and its bundle if no other name needs them."""
        os.unlink(self._path("names", model.name, model.version))
        with contextlib.suppress(OSError):
            os.rmdir(self._path("names", model.name))
        left = self.models()
        if all(other.manifest_digest != model.manifest_digest for other in left):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path("grants", model.manifest_digest.removeprefix("sha256:") + ".jwt"))
        if all(other.image_digest != model.image_digest for other in left):
            shutil.rmtree(self._path("models", model.image_digest.removeprefix("sha256:")), ignore_errors=True)
