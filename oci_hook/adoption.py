"""Adoption: a container whose models came before its `create` has a process now, and its records become that one's.

The prestart hook looks for the record, compares config.json with it, and delivers nothing more; the NRI plugin adopts
by what the engine tells it. Decision: docs/adr/0014-before-create.md.
"""

from __future__ import annotations

import os
from dataclasses import replace

from oci_hook.bound_checks import lasting_process, verify_entries, verify_in_place, verify_runtime
from oci_hook.config import Config
from oci_hook.delivery.host_records import NOBODY, BoundRecord, HostRecords
from oci_hook.documents import shown
from oci_hook.errors import DestinationRefused, HolderRefused
from oci_hook.host import bindings_of, close_container, not_delivered
from oci_hook.linux.processes import HeldProcess, process_of_thread
from oci_hook.oci.annotations import Requests
from oci_hook.oci.spec import Spec
from oci_hook.oci.state import State
from oci_hook.records import ContainerRecords
from oci_hook.report import forget_refusal
from oci_hook.store import Store

LOCK_SECONDS = 60.0


def adopt_prepared(state: State, spec: Spec, requests: Requests, config: Config) -> bool:
    """prestart: adopt a container whose models came before its `create`, if config.json shows it exactly those.

    Args:
        state: What the runtime says.
        spec: config.json.
        requests: The models that concern this container.
        config: The host's configuration.

    Returns:
        False: its models did not come before; it is to get them now.

    Raises:
        RequirementRefused: Another runtime runs it than they were made ready for.
        DestinationRefused: config.json does not show them, or others are asked for, or they are not there.
        HolderRefused: Another process has adopted them.
        CouldNotTell: A record, a lock or /proc cannot be used.
    """
    record = _prepared(state.container_id, state.bundle, config, spec)
    if record is None:
        return False
    if record.is_stale():  # of an earlier container; the sweep could not have the lock
        close_container(state.container_id, state.bundle, config)
        return False
    with HeldProcess(os.getppid()) as runtime:
        # 1. The runtime is the one that the owner's policy was asked about.
        verify_runtime(runtime, record)
        # 2. Each model is asked for, and the container sees it: exactly the entry, and no other mount over it.
        verify_entries(record, spec, requests.models)
        _verify_references(record, requests, config)
        # 3. The runtime will find the models there.
        verify_in_place(record)
        process = lasting_process(state.pid, runtime)
    _adopt(state.container_id, state.bundle, process, config, spec)
    forget_refusal(config.runtime_directory, state.container_id, bundle=state.bundle)
    return True


def verify_none_prepared(state: State, spec: Spec, config: Config) -> None:
    """prestart of a container that asks for no model: refuse it if models came before its `create` all the same.

    What asked for them is gone from config.json, and the bind entries may be there still, under any runtime.

    Args:
        state: What the runtime says.
        spec: config.json.
        config: The host's configuration.

    Raises:
        DestinationRefused: They did.
        CouldNotTell: A record, the lock or the audit log cannot be used.
    """
    record = _prepared(state.container_id, state.bundle, config, spec)
    if record is None:
        return
    if record.is_stale():  # of an earlier container of this name: emptied before this one begins
        close_container(record.container_id, record.bundle, config)
        return
    raise DestinationRefused(
        f"models were made ready for the container {shown(state.container_id)} before its create, and config.json no "
        "longer asks for them",
        remedy="let nothing change annotations behind scz-runtime, precreate or scz-nri, and start the container again",
    )


def _verify_references(record: BoundRecord, requests: Requests, config: Config) -> None:
    of_container = [
        each
        for each in ContainerRecords(config.runtime_directory).live()
        if (each.container_id, each.bundle) == (record.container_id, record.bundle) and each.delivered
    ]
    store = Store(config.store_directory)
    if not of_container or not_delivered(requests.models, of_container[0], store):
        raise DestinationRefused("the container asks for other models than were made ready for it")


def adopt(container_id: str, bundle: str, pid: int, config: Config) -> None:
    """Bind a prepared container's records and token to the process that lives as long as it does.

    Args:
        container_id: The engine's.
        bundle: Absolute path of the OCI bundle; empty if it is still not known.
        pid: The container's process on the host, a hypervisor or a shim, say; a thread's id stands for its process.
        config: The host's configuration.

    Raises:
        HolderRefused: It was not prepared, or has been adopted by another process that lives.
        HolderGone: The process does not exist.
        CouldNotTell: A record or the lock cannot be used.
    """
    with HeldProcess(process_of_thread(pid)) as process:
        _adopt(container_id, bundle, (process.pid, process.start_time), config)


def _adopt(container_id: str, bundle: str, process: tuple[int, int], config: Config, spec: Spec | None = None) -> None:
    """Whatever ends this half-way, the host's record comes last: until then it is stale with the creator."""
    records = HostRecords(config.runtime_directory)
    with records.locked(timeout_seconds=LOCK_SECONDS):
        record = _prepared(container_id, bundle, config, spec)
        if record is None:
            raise HolderRefused(f"nothing was made ready for the container {shown(container_id)} before its create")
        if record.is_held_by_another(process):
            raise HolderRefused(f"the models of the container {shown(container_id)} are another process's")
        adopted = replace(record, bundle=bundle or record.bundle, container=process)
        ContainerRecords(config.runtime_directory).adopt(container_id, record.bundle, adopted.bundle, process)
        bindings_of(config).adopt(container_id, record.bundle, adopted.bundle, process)
        records.write(adopted)
        if adopted.bundle != record.bundle:
            records.remove(record)


def withdraw(state: State, config: Config) -> None:
    """Take away what was made ready for a container that its prestart hook refuses.

    Raises:
        SystemCallFailed: A model stays mounted; a sweep will try again.
        CouldNotTell: A record, the lock, the audit log or /proc cannot be used.
    """
    record = _prepared(state.container_id, state.bundle, config)
    if record is None:
        return
    if record.container != NOBODY:
        with HeldProcess(os.getppid()) as runtime:
            if record.is_held_by_another(lasting_process(state.pid, runtime)):
                return  # another container's, which lives
    close_container(record.container_id, record.bundle, config)


def withdraw_own(container_id: str, bundle: str, creator: tuple[int, int], config: Config) -> None:
    """Take away what was made ready for a container that its creator does not create.

    Args:
        container_id: The engine's.
        bundle: As it was prepared.
        creator: Pid and start time; what another one asked for stays.
        config: The host's configuration.

    Raises:
        SystemCallFailed: A model stays mounted; a sweep will try again.
        CouldNotTell: A record, the lock or the audit log cannot be used.
    """
    record = _prepared(container_id, bundle, config)
    if record is not None and (record.creator, record.container) == (creator, NOBODY):
        close_container(record.container_id, record.bundle, config)


def _prepared(container_id: str, bundle: str, config: Config, spec: Spec | None = None) -> BoundRecord | None:
    """The container's record; with config.json also that of a living one of its id, whose models it is shown."""
    records = HostRecords(config.runtime_directory)
    if not records.exist():
        return None
    record = records.find(container_id, bundle)
    if record is None and spec is not None:
        another, sources = records.load(container_id, ""), {mount.source for mount in spec.mounts}
        if isinstance(another, BoundRecord) and not sources.isdisjoint(mount.path for mount in another.mounts):
            return another
    return record if isinstance(record, BoundRecord) else None
