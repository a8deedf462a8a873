"""Before `create`: models that are complete on the host before a runtime is told of the container, by a bind entry.

    asking ─► refusals without a key ─► token ─► admission ─► fill ─► audit ─► record ─► attach below bound/ ─► entries

Under a VM sandbox nothing that a prestart hook mounts reaches the guest; a tmpfs that was there before does. The shim,
podman's precreate and the NRI plugin call `prepare`; the prestart hook looks for the record, compares config.json with
it and adopts it. The mark is that record alone: an annotation could be set by anyone.
Decision: docs/adr/0014-before-create.md. Facts: docs/runtimes.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from oci_hook.admission import Admission, Container, Host, admit
from oci_hook.adoption import LOCK_SECONDS, adopt, withdraw_own
from oci_hook.attestation.deadline import Standby
from oci_hook.bound_checks import (
    OPTIONS,
    BindEntry,
    plan_entries,
    verify_container,
    verify_in_place,
)
from oci_hook.config import Config
from oci_hook.delivery import host_mounts
from oci_hook.delivery.bound import Bound
from oci_hook.delivery.deliver import Attached, ContainerView, Delivery
from oci_hook.delivery.holder import Runtime
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostRecords
from oci_hook.documents import shown
from oci_hook.errors import DestinationRefused, HolderRefused, SczError, SystemCallFailed
from oci_hook.host import (
    audit_closed,
    audit_grants,
    audit_outcome,
    bindings_of,
    close_container,
    close_ended,
    close_removed,
    delivery_settings,
    held_models,
    load_host,
    not_delivered,
    open_bundle,
    open_record,
    sweep_host_mounts,
)
from oci_hook.identity.sources import load_token
from oci_hook.keeping import kept_evidence
from oci_hook.linux import mounts
from oci_hook.oci.annotations import ModelRequest, Requests
from oci_hook.oci.engine import EngineFacts
from oci_hook.oci.spec import Spec
from oci_hook.provenance import verify_signed
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.standby import tpm_standby

__all__ = ["OPTIONS", "Asking", "BindEntry", "adopt", "discard", "known", "prepare"]


@dataclass(frozen=True, slots=True)
class Asking:
    """A container that does not exist yet.

    Attributes:
        container_id: The engine's.
        bundle: Absolute path of the OCI bundle; empty where the engine does not tell it (NRI, precreate).
        spec: config.json, or what is known of it; without `root_path` a bundle of the image cannot be had.
        facts: What the engine vouches for.
        requests: The models that concern this container.
        runtime: As access policies and `smm.scz/require` name it: `kata`.
        creator: Pid and start time (clock ticks since boot) of a process that lives until the container is adopted.
        folder: The engine's own folder of the container, without which it will never come; empty: not known.
    """

    container_id: str
    bundle: str
    spec: Spec
    facts: EngineFacts
    requests: Requests
    runtime: str
    creator: tuple[int, int]
    folder: str = ""


def prepare(asking: Asking, config: Config) -> tuple[BindEntry, ...]:
    """Admit, decrypt and seal what a container asks for, and attach it on the host's side.

    Whatever raises leaves nothing. A container that the same creator has had prepared, with the same bundle, is
    admitted anew, and what was decrypted stays; where no bundle is known, that goes, and it is decrypted anew, too.

    Args:
        asking: Who asks; with no model in its requests the answer is empty.
        config: The host's configuration.

    Returns:
        One entry for each model, in the order of the requests.

    Raises:
        SczError: The container must not be created.
    """
    if not asking.requests.models:
        return ()
    began = time.monotonic()
    runtime = verify_container(asking.container_id, asking.creator, asking.runtime)
    # As the runtime will name it: it resolves links, too.
    asking = replace(asking, bundle=os.path.realpath(asking.bundle) if asking.bundle else "")
    wanted = asking.requests.models
    entries = plan_entries(asking.container_id, asking.bundle, asking.spec, wanted, config.runtime_directory)
    with tpm_standby(config) as standby:  # forked before anything is here that a child may not have
        host = replace(load_host(config), standby=standby)
        with suppress(SystemCallFailed):  # another start or the timer holds the lock: it does the same
            sweep_host_mounts(config)
        close_ended(config)
        _made_ready(asking, host)  # what an earlier one left goes before the folder is locked, which goes with it
        _deliver(asking, runtime, entries, host, standby, began=began)
    return entries


def _made_ready(asking: Asking, host: Host, *, is_locked: bool = False) -> ContainerRecord | None:
    """What the same creator has had made ready for this very container; what is left of an earlier one is removed.

    Args:
        asking: Who asks.
        host: Where.
        is_locked: The container's folder is: what is there by now is another preparation's, and stays.

    Raises:
        HolderRefused: A container of this name lives, what it left cannot be removed, or another one was faster.
    """
    config, name = host.config, shown(asking.container_id)
    records, removed = HostRecords(config.runtime_directory), None
    if records.exist():
        with records.locked(timeout_seconds=LOCK_SECONDS):
            # One without a bundle is another container's where this one has one.
            earlier = (records.load if asking.bundle else records.find)(asking.container_id, asking.bundle)
            if isinstance(earlier, BoundRecord):
                if (kept := _of_the_same(earlier, asking, host)) is not None:
                    return kept
                if earlier.is_held_by_another(NOBODY):
                    raise HolderRefused(
                        f"a container {name} has its models from before its create, and lives",
                        remedy="end it first; `sczctl ps` shows its process",
                    )
                if is_locked:
                    raise HolderRefused(f"another process has made the models of the container {name} ready meanwhile")
                removed = host_mounts.forget(records, earlier)
                if removed.left:
                    what = shown(removed.left[0])
                    raise HolderRefused(f"a model of an earlier container of this name cannot be removed: {what}")
    if removed is not None:
        close_removed(config, removed)
    living = ContainerRecords(config.runtime_directory).load(asking.container_id, asking.bundle)
    if living is not None and living.is_alive() and (living.pid, living.start_time) != asking.creator:
        raise HolderRefused(
            f"a container {name} with this bundle has its models, and lives",
            remedy="end it first; `sczctl ps` shows its process",
        )
    return None


def _of_the_same(record: BoundRecord, asking: Asking, host: Host) -> ContainerRecord | None:
    """What was made ready, if it is exactly what is asked for, by the same creator, and in its place.

    A container whose bundle is not known may be another of that name: an engine's service creates many.
    """
    if not asking.bundle or record.creator != asking.creator or record.runtime != asking.runtime:
        return None
    if record.is_held_by_another(asking.creator):
        return None
    records, wanted = ContainerRecords(host.config.runtime_directory), asking.requests.models
    delivered = records.delivered(asking.container_id, asking.bundle, *asking.creator)
    if delivered is None or not_delivered(wanted, delivered, host.store):
        return None
    try:
        verify_in_place(record)
    except DestinationRefused:
        return None
    destinations = [request.destination for request in wanted]
    is_same = [mount.destination for mount in record.mounts] == list(delivered.destinations) == destinations
    return delivered if is_same and len(delivered.held) == len(wanted) else None


def _deliver(
    asking: Asking, runtime: Runtime, entries: Sequence[BindEntry], host: Host, standby: Standby, *, began: float
) -> None:
    """The pipeline of `start.deliver`, with a folder of the host in the place of the container."""
    config, wanted, settings = host.config, asking.requests.models, delivery_settings(host.config)

    def find() -> Bound:
        return Bound(
            asking.container_id,
            asking.bundle,
            runtime,
            asking.creator,
            [entry.destination for entry in entries],
            engine_folder=asking.folder,
            runtime_directory=config.runtime_directory,
            timeout_seconds=settings.timeout_seconds,
        )

    with Delivery(_view(asking), settings, find=find) as delivery, ExitStack() as bundles, ExitStack() as undo:
        kept = _made_ready(asking, host, is_locked=True)
        undo.callback(_forget if kept is None else _withdraw, asking, config)
        if kept is None:
            delivery.prepare([f"/{number}" for number in range(len(wanted))])
        opened = [bundles.enter_context(open_bundle(one, asking.bundle, asking.spec, host.store)) for one in wanted]
        signed = [verify_signed(layout, host.owners) for layout in opened]
        container = Container(
            container_id=asking.container_id,
            bundle=asking.bundle,
            pid=asking.creator[0],
            start_time=asking.creator[1],
            runtime=runtime,
            pod_uid=asking.facts.pod_uid,
            token=load_token(asking.spec.mounts, asking.requests.token_path or config.token_path),
        )
        admissions = [admit(*each, container, host) for each in zip(wanted, signed, strict=True)]
        standby.end()  # the TPM has done its part: nothing of it is to be there while the models are decrypted
        if kept is None:
            record, attached = _attach(delivery, entries, container, admissions, host, undo)
        else:
            record, attached = kept, _keep(kept, asking, container, admissions, host)
        audit_outcome(host, container, record, attached, seconds=time.monotonic() - began)
        undo.pop_all()


def _attach(
    delivery: Delivery,
    entries: Sequence[BindEntry],
    container: Container,
    admissions: Sequence[Admission],
    host: Host,
    undo: ExitStack,
) -> tuple[ContainerRecord, tuple[Attached, ...]]:
    """Fill and attach what was admitted; the record, and what is visible now."""
    models = [replace(admission.delivery(), destination=f"/{n}") for n, admission in enumerate(admissions)]
    delivery.fill(models)
    record = open_record(container, admissions, None, keeper=delivery.keeper, seconds=host.clock())
    audit_grants(host, container, admissions)  # synced: if it cannot be written, nothing becomes visible
    undo.callback(_tell_closed, record, host.config)
    records = ContainerRecords(host.config.runtime_directory)
    records.write(record, kept_evidence(container, admissions, None, records))
    attached = _in_container(delivery.attach(), [admission.request for admission in admissions])
    for entry in entries:
        mounts.make_private(entry.source)
    records.mark_delivered(record, held_models(admissions, attached))
    return record, attached


def _keep(
    kept: ContainerRecord, asking: Asking, container: Container, admissions: Sequence[Admission], host: Host
) -> tuple[Attached, ...]:
    """What was made ready before and was admitted again: it is visible, and the audit log is told of the decision.

    Raises:
        HolderRefused: It is another version's by now, or was taken away meanwhile.
        CouldNotTell: The audit log cannot be written.
    """
    is_same = kept.manifests == tuple(admission.manifest.digest for admission in admissions)
    if not is_same or _made_ready(asking, host, is_locked=True) != kept:
        raise HolderRefused(
            f"the models that were made ready for the container {shown(asking.container_id)} are not those that it "
            "would get now",
            remedy="start the container again",
        )
    audit_grants(host, container, admissions)
    records = ContainerRecords(host.config.runtime_directory)
    records.keep_evidence(kept, kept_evidence(container, admissions, None, records))
    return tuple(
        Attached(request.slot, request.destination, held.fsid, held.device, held.mount_id, held.size_bytes)
        for request, held in zip(asking.requests.models, kept.held, strict=True)
    )


def _in_container(attached: Sequence[Attached], wanted: Sequence[ModelRequest]) -> tuple[Attached, ...]:
    """What was attached, by its destination in the container instead of its place in the folder."""
    return tuple(
        replace(each, destination=wanted[int(each.destination.removeprefix("/"))].destination) for each in attached
    )


def _view(asking: Asking) -> ContainerView:
    """For the folder: nothing of the container's own mounts lies there."""
    return ContainerView(
        container_id=asking.container_id,
        pid=asking.creator[0],
        bundle=asking.bundle,
        root_path="",
        tmpfs_destinations=frozenset(),
        uid_offset=asking.spec.root_uid,
        gid_offset=asking.spec.root_gid,
        mount_namespace_joined=False,
    )


def _forget(asking: Asking, config: Config) -> None:
    """Undo what was remembered of a container that will not be; what names another process stays."""
    name, creator = (asking.container_id, asking.bundle), asking.creator
    with suppress(SczError):
        ContainerRecords(config.runtime_directory).close(*name, process=creator)
    with suppress(SczError):
        bindings_of(config).release(*name, process=creator)


def _tell_closed(record: ContainerRecord, config: Config) -> None:
    with suppress(SczError):
        audit_closed(config, record.container_id, record.models)


def _withdraw(asking: Asking, config: Config) -> None:
    """A container that is not admitted again loses what it was admitted to before, unless it lives by now."""
    with suppress(SczError):
        withdraw_own(asking.container_id, asking.bundle, asking.creator, config)


# --- what was made ready ----------------------------------------------------------------------------------------------


def discard(container_id: str, bundle: str, config: Config) -> None:
    """Take a container's models away: its creation failed, or it has ended.

    They are truncated and unmounted, the records closed, the audit log told, the token freed. For a container without
    any of that it does nothing.

    Args:
        container_id: The engine's.
        bundle: As it was prepared, or as it was adopted; empty: not known.
        config: The host's configuration.

    Raises:
        HolderRefused: No bundle is known, and there are several records of this id.
        SystemCallFailed: A model stays mounted; a sweep will try again.
        CouldNotTell: A record, the lock or the audit log cannot be used.
    """
    close_container(container_id, os.path.realpath(bundle) if bundle else "", config)


def known(config: Config) -> tuple[str, ...]:
    """The ids of the containers that have a record of this kind, sorted.

    Raises:
        FileUnreadable: The folder of records cannot be read.
    """
    return tuple(sorted({record.container_id for record in HostRecords(config.runtime_directory).bound()}))
