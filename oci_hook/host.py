"""What the hook needs of this host, loaded once: configuration, trust, store, enrolment, audit log, token bindings."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

from oci_hook.admission import Admission, Container, Host
from oci_hook.audit import AuditLog
from oci_hook.bundle.layout import Layout
from oci_hook.config import Config
from oci_hook.delivery import host_mounts
from oci_hook.delivery.deliver import Attached, ContainerView, DeliverySettings
from oci_hook.delivery.holder import Agent
from oci_hook.delivery.image_bundle import open_image_bundle
from oci_hook.documents import shown
from oci_hook.errors import ModelUnknown, SystemCallFailed
from oci_hook.held import HeldModel
from oci_hook.identity.binding import Bindings
from oci_hook.journal import tell
from oci_hook.oci.annotations import ModelRequest
from oci_hook.oci.engine import EngineFacts
from oci_hook.oci.spec import Mount, Spec
from oci_hook.oci.state import State
from oci_hook.provenance import SignedBundle
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.report import forget_refusal
from oci_hook.store import Store
from oci_hook.trust_folder import Trust
from oci_hook.trusted_file import make_private_directory

_CHILD_SECONDS = 120.0  # for one answer of a child of the delivery; the engine's own timeout bounds the whole hook
_EMPTY_DIR = re.compile(r"(?!.*/\.\.?(?:/|\Z))/.*/pods/([^/]+)/volumes/kubernetes\.io~empty-dir/[^/]+", re.DOTALL)


def load_host(config: Config, *, store_is_shared: bool = False) -> Host:
    """Read everything of root's that a decision rests on.

    Args:
        config: The host's configuration.
        store_is_shared: Others may write the store (in a guest it may lie on a share of the host's).

    Raises:
        InputError: A file of it cannot be used; none is skipped in silence.
        CouldNotTell: This host is not enrolled, or a file cannot be read.
    """
    make_private_directory(config.runtime_directory)
    trust, store = Trust(config.trust_directory), Store(config.store_directory)
    return Host(
        config=config,
        store=store,
        owners=trust.owners(),
        issuers=trust.issuers(),
        device=store.load_device(),
        audit=AuditLog(config.audit_file),
        bindings=bindings_of(config),
        clock=time.time,
        random=os.urandom,
        store_is_shared=store_is_shared,
    )


def sweep_host_mounts(config: Config) -> list[host_mounts.Removed]:
    """Remove the models on the host's side of containers that are gone, and say so in the audit log.

    Raises:
        FileUnreadable: A record cannot be touched.
        CouldNotTell: The lock was held for too long, or the audit log cannot be written.
    """
    removed = host_mounts.sweep(config.runtime_directory)
    for each in removed:
        close_removed(config, each)
    return removed


def close_removed(config: Config, removed: host_mounts.Removed) -> None:
    """A container is gone whose models were removed from the host's side: tell the audit log, free its token.

    Raises:
        CouldNotTell: The audit log cannot be written, or the token's record not removed.
    """
    if removed.models:
        audit_closed(config, removed.container_id, removed.models)
    if removed.container_id and not removed.left:
        bindings_of(config).release(removed.container_id, removed.bundle)


def close_ended(config: Config) -> list[ContainerRecord]:
    """Close the records of containers whose end nobody told, as poststop would have; returns them.

    Raises:
        CouldNotTell: The audit log cannot be written.
    """
    ended = ContainerRecords(config.runtime_directory).sweep()
    for record in ended:
        audit_closed(config, record.container_id, record.models)
    return ended


def close_container(container_id: str, bundle: str, config: Config) -> None:
    """A container's end: take away what is on the host's side, forget its record and its token, tell the audit log.

    A container that was refused has no record: then there is nothing to close.

    Args:
        container_id: The container's.
        bundle: Its OCI bundle; empty: not known, for one whose models came before its `create`.
        config: The host's configuration.

    Raises:
        SystemCallFailed: A model cannot be unmounted on the host's side; a sweep will try again.
        CouldNotTell: A record, a lock or the audit log cannot be used.
    """
    # First: models that are mounted on the host's side stay there until they are taken away.
    removed = host_mounts.close(config.runtime_directory, container_id, bundle)
    for each in dict.fromkeys((bundle, removed.bundle if removed is not None else bundle)):
        record = ContainerRecords(config.runtime_directory).close(container_id, each)
        bindings_of(config).release(container_id, each)
        if record is not None:
            audit_closed(config, record.container_id, record.models)
    if removed is not None and removed.left:
        raise SystemCallFailed(f"a model stays mounted on the host: {'; '.join(removed.left)}")


def audit_closed(config: Config, container_id: str, models: Sequence[str]) -> None:
    """Tell that a container has its models no longer."""
    named = ", ".join(models)
    AuditLog(config.audit_file).append("closed", container=container_id, model=named)
    tell("closed", f"container {shown(container_id, 64)}: {named} gone", container=container_id, model=named)


def container_view(state: State, spec: Spec, facts: EngineFacts, agent: Agent | None = None) -> ContainerView:
    """What the delivery needs of the state, of config.json and of the engine's word."""
    return ContainerView(
        container_id=state.container_id,
        pid=state.pid,
        bundle=state.bundle,
        root_path=spec.root_path,
        tmpfs_destinations=frozenset(mount.destination for mount in spec.mounts if mount.type == "tmpfs"),
        uid_offset=spec.root_uid,
        gid_offset=spec.root_gid,
        mount_namespace_joined=spec.mount_namespace_path is not None or not spec.has_mount_namespace,
        in_sandbox=facts.in_sandbox,
        mount_destinations=tuple(mount.destination for mount in spec.mounts),
        memory_volumes=frozenset(
            mount.destination for mount in spec.mounts if _is_empty_directory(mount, facts.pod_uid)
        ),
        annotations=spec.annotations,
        agent=agent,
    )


def _is_empty_directory(mount: Mount, pod_uid: str | None) -> bool:
    """Whether a bind mount's source is an emptyDir of this very pod, by the kubelet's way of naming it.

    Whether it is memory is seen where it is mounted.
    """
    found = _EMPTY_DIR.fullmatch(mount.source) if mount.is_bind and pod_uid else None
    return found is not None and found[1] == pod_uid


def not_delivered(
    requests: Sequence[ModelRequest], record: ContainerRecord | None, store: Store
) -> tuple[ModelRequest, ...]:
    """What of the requests the container has not got yet.

    Args:
        requests: What it asks for.
        record: What it got by another way; None: nothing.
        store: Where names are looked up: one way may say `name`, the other `name:version`.
    """
    got = list(zip(record.destinations, record.references, record.models, strict=True)) if record else []

    def is_there(request: ModelRequest) -> bool:
        known = {(reference, model) for destination, reference, model in got if destination == request.destination}
        if any(reference == str(request.reference) for reference, _ in known):
            return True
        try:
            found = store.resolve(request.reference) if known and request.reference.rootfs_path is None else None
        except ModelUnknown:
            return False
        return found is not None and any(model == f"{found.name}:{found.version}" for _, model in known)

    return tuple(request for request in requests if not is_there(request))


def open_bundle(request: ModelRequest, bundle: str, spec: Spec, store: Store) -> Layout:
    """Open the bundle that is asked for: the store's, or the image's own; the caller closes it.

    Args:
        request: What is asked for.
        bundle: The OCI bundle's absolute path; empty where it is not known.
        spec: config.json.
        store: The host's.

    Raises:
        InputError: It is not there, or no bundle.
        Refused: It is not what its digests say.
        FileUnreadable: It cannot be read.
    """
    path = request.reference.rootfs_path
    if path is not None:
        return open_image_bundle(bundle, spec.root_path, path)
    return store.open_reference(request.reference)


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
            diagnosis=admission.evidence.remote,  # a remote verifier accepted it, asked by this host about itself
            **({"tee": admission.tee, "evidence": admission.evidence.quote.digest.hex()} if admission.tee else {}),
        )
        model = f"{admission.manifest.model.name}:{admission.manifest.model.version}"
        tell(
            "grant",
            f"container {shown(container.container_id, 64)}: {model} for {shown(admission.identity.subject, 256)}",
            container=container.container_id,
            model=model,
            subject=admission.identity.subject,
            issuer=admission.identity.issuer.issuer,
            manifest=admission.manifest.digest,
        )


def audit_outcome(
    host: Host, container: Container, record: ContainerRecord, attached: Sequence[Attached], *, seconds: float
) -> None:
    """The container can read its models; an older refusal of it is of no interest any more.

    Args:
        host: Where.
        container: Who.
        record: The container's; what was attached now is its end.
        attached: What became visible.
        seconds: From the beginning of the start to that, by a clock that nobody sets.
    """
    forget_refusal(host.config.runtime_directory, container.container_id, bundle=container.bundle)
    size_bytes, milliseconds = sum(model.size_bytes for model in attached), round(seconds * 1000)
    models, shared = ", ".join(record.models[-len(attached) :]), sum(bool(model.filled_by) for model in attached)
    host.audit.append(
        "outcome",
        container=container.container_id,
        model=models,
        code=0,
        bytes=size_bytes,
        milliseconds=milliseconds,
        shared=shared,
    )
    tell(
        "outcome",
        f"container {shown(container.container_id, 64)}: {models} delivered, {size_bytes} bytes in {milliseconds} ms"
        f"{f', {shared} by a copy that was there' if shared else ''}",
        container=container.container_id,
        model=models,
        code=0,
        bytes=size_bytes,
        milliseconds=milliseconds,
        shared=shared,
    )


def open_record(
    container: Container,
    admissions: Sequence[Admission],
    earlier: ContainerRecord | None,
    *,
    keeper: tuple[tuple[int, int], tuple[int, int]],
    seconds: float,
) -> ContainerRecord:
    """The run-time record of a container whose models are about to become visible, with what it got before."""
    record = ContainerRecord(
        container_id=container.container_id,
        bundle=container.bundle,
        pid=container.pid,
        start_time=container.start_time,
        seconds=int(seconds),
        references=tuple(str(admission.request.reference) for admission in admissions),
        models=tuple(f"{a.manifest.model.name}:{a.manifest.model.version}" for a in admissions),
        manifests=tuple(admission.manifest.digest for admission in admissions),
        destinations=tuple(admission.request.destination for admission in admissions),
        subject=admissions[0].identity.subject,
        size_bytes=sum(file.size for admission in admissions for file in admission.manifest.files),
        delivered=False,
        issuer=admissions[0].identity.issuer.issuer,
        runtime=container.runtime,
        keeper=keeper[0],
        namespace=keeper[1],
    )
    return earlier.joined(record) if earlier is not None else record


def held_models(admissions: Sequence[Admission], attached: Sequence[Attached]) -> tuple[HeldModel, ...]:
    """The mounts of what was admitted, in its order."""
    visible = {model.destination: model for model in attached}
    return tuple(visible[each.request.destination].held(each.manifest.owner_id) for each in admissions)


def shareable(admissions: Sequence[Admission], spec: Spec) -> tuple[Admission, ...]:
    """Those whose copy other containers may have: owner and container allow it, and it cannot make it writable."""
    if not spec.can_share:
        return ()
    return tuple(each for each in admissions if each.manifest.access.share and not each.request.requirements.private)


def may_share(requests: Sequence[ModelRequest], bundles: Sequence[SignedBundle]) -> bool:
    """Whether owner and container allow for any of the models, each with its bundle, that others have its copy."""
    pairs = zip(requests, bundles, strict=True)
    return any(each.manifest.access.share and not request.requirements.private for request, each in pairs)


def bindings_of(config: Config) -> Bindings:
    """The tokens that live containers hold."""
    return Bindings(os.path.join(config.runtime_directory, "tokens"))
