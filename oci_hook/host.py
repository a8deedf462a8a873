"""What the hook needs of this host, loaded once: configuration, trust, store, enrolment, audit log, token bindings."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from oci_hook.admission import Admission, Container, Host
from oci_hook.audit import AuditLog
from oci_hook.config import Config, load_config
from oci_hook.delivery.deliver import Attached, ContainerView, DeliverySettings
from oci_hook.identity.binding import Bindings
from oci_hook.oci.spec import Spec
from oci_hook.oci.state import State
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.report import forget_refusal
from oci_hook.store import Store, Trust
from oci_hook.trusted_file import make_private_directory

_CHILD_SECONDS = 120.0  # for one answer of a child of the delivery; the engine's own timeout bounds the whole hook


def load_host(config_file: str) -> Host:
    """Read everything of root's that a decision rests on.

    Raises:
        InputError: A file of it cannot be used; none is skipped in silence.
        CouldNotTell: This host is not enrolled, or a file cannot be read.
    """
    config = load_config(config_file)
    make_private_directory(config.runtime_directory)
    trust, store = Trust(config.trust_directory), Store(config.store_directory)
    return Host(
        config=config,
        store=store,
        owners=trust.owners(),
        issuers=trust.issuers(),
        device=store.load_device(),
        audit=AuditLog(config.audit_file),
        bindings=_bindings(config),
        clock=time.time,
        random=os.urandom,
    )


def close_container(state: State, config_file: str) -> None:
    """poststop: forget the container's record and its token, and say so in the audit log.

    A container that was refused has no record: then there is nothing to close.
    """
    config = load_config(config_file)
    record = ContainerRecords(config.runtime_directory).close(state.container_id, state.bundle)
    _bindings(config).release(state.container_id)
    if record is not None:
        AuditLog(config.audit_file).append("closed", container=state.container_id, model=", ".join(record.models))


def container_view(state: State, spec: Spec) -> ContainerView:
    """What the delivery needs of the state and of config.json."""
    return ContainerView(
        container_id=state.container_id,
        pid=state.pid,
        bundle=state.bundle,
        root_path=spec.root_path,
        tmpfs_destinations=frozenset(mount.destination for mount in spec.mounts if mount.type == "tmpfs"),
        uid_offset=spec.root_uid,
        gid_offset=spec.root_gid,
        mount_namespace_joined=spec.mount_namespace_path is not None or not spec.has_mount_namespace,
    )


def delivery_settings(config: Config) -> DeliverySettings:
    """What the delivery needs of the configuration."""
    return DeliverySettings(
        memory_reserve_bytes=config.memory_reserve_bytes,
        runtime_directory=config.runtime_directory,
        workers=None,
        timeout_seconds=_CHILD_SECONDS,
    )


def audit_grants(host: Host, container: Container, admissions: Sequence[Admission]) -> None:
    """One record for each model, on the disk when this returns.

    Raises:
        CouldNotTell: It cannot be written; then nothing may become visible.
    """
    for admission in admissions:
        host.audit.append(
            "grant",
            container=container.container_id,
            model=admission.manifest.model.name,
            version=admission.manifest.model.version,
            manifest=admission.manifest.digest,
            issuer=admission.identity.issuer.issuer,
            subject=admission.identity.subject,
            quoted=admission.audit_head.hex(),
        )


def audit_outcome(host: Host, container: Container, attached: Sequence[Attached]) -> None:
    """The container can read its models; an older refusal of it is of no interest any more."""
    forget_refusal(host.config.runtime_directory, container.container_id)
    size_bytes = sum(model.size_bytes for model in attached)
    host.audit.append("outcome", container=container.container_id, code=0, bytes=size_bytes)


def open_record(
    container: Container, bundle: str, admissions: Sequence[Admission], *, seconds: float
) -> ContainerRecord:
    """The run-time record of a container whose models are about to become visible."""
    return ContainerRecord(
        container_id=container.container_id,
        bundle=bundle,
        pid=container.pid,
        start_time=container.start_time,
        seconds=int(seconds),
        models=tuple(f"{a.manifest.model.name}:{a.manifest.model.version}" for a in admissions),
        manifests=tuple(admission.manifest.digest for admission in admissions),
        destinations=tuple(admission.request.destination for admission in admissions),
        subject=admissions[0].identity.subject,
        size_bytes=sum(file.size for admission in admissions for file in admission.manifest.files),
        delivered=False,
    )


def _bindings(config: Config) -> Bindings:
    return Bindings(os.path.join(config.runtime_directory, "tokens"))
