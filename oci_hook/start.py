"""A container's start: from what it asks for to models that it can read, for every entry point that has a hook's state.

    holder ─► destinations held ─► token ─► admission ─► share ─► fill ─► audit ─► record ─► attach ─► outcome

Specification: docs/design.md, "The way of the data".
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import replace

from oci_hook.admission import Container, admit
from oci_hook.adoption import adopt_prepared
from oci_hook.attestation.deadline import Standby
from oci_hook.config import Config
from oci_hook.delivery.deliver import Delivery
from oci_hook.delivery.holder import Agent
from oci_hook.errors import SystemCallFailed
from oci_hook.host import (
    audit_grants,
    audit_outcome,
    close_ended,
    container_view,
    delivery_settings,
    held_models,
    load_host,
    may_share,
    not_delivered,
    open_bundle,
    open_record,
    shareable,
    sweep_host_mounts,
)
from oci_hook.identity.sources import TokenFile, load_token
from oci_hook.keeping import kept_evidence
from oci_hook.oci.annotations import Requests
from oci_hook.oci.engine import EngineFacts
from oci_hook.oci.spec import Spec
from oci_hook.oci.state import State
from oci_hook.provenance import verify_signed
from oci_hook.records import ContainerRecords


def deliver(
    state: State,
    spec: Spec,
    facts: EngineFacts,
    requests: Requests,
    config: Config,
    standby: Standby,
    agent: Agent | None = None,
) -> None:
    """Give a container its models, once.

    Whatever raises before `attach` leaves nothing visible: until then the decrypted files have no path. A container
    whose models came before its `create` is adopted, if config.json shows it exactly those, and gets nothing more.

    Args:
        state, spec: What the runtime says; config.json.
        facts, requests: What the engine vouches for; the models that concern this container.
        config, standby: The host's configuration; what does the TPM's transactions, which the caller ends.
        agent: In a Kata guest, who called the hook.

    Raises:
        SczError: The container must not start.
    """
    began = time.monotonic()
    host = replace(load_host(config, store_is_shared=agent is not None), standby=standby)
    with suppress(SystemCallFailed):  # another start or the timer holds the lock: it does the same
        sweep_host_mounts(config)
    close_ended(config)
    if adopt_prepared(state, spec, requests, config):
        return
    records = ContainerRecords(config.runtime_directory)
    view = container_view(state, spec, facts, agent)
    with ExitStack() as bundles, Delivery(view, delivery_settings(config)) as delivery:
        earlier = records.delivered(state.container_id, state.bundle, state.pid, delivery.start_time)
        wanted = not_delivered(requests.models, earlier, host.store)
        if not wanted:
            return  # reached by two ways, hooks.d and CDI say: once is enough
        # The destinations are resolved and held by a child in the container's mount namespace before any key is here.
        delivery.prepare([request.destination for request in wanted])
        opened = (bundles.enter_context(open_bundle(request, state.bundle, spec, host.store)) for request in wanted)
        signed = [verify_signed(layout, host.owners) for layout in opened]
        # Children that enter other containers, if need be: before any key, and before the token.
        if spec.can_share and may_share(wanted, signed):
            delivery.expect_copies(records.live())
        token = load_token(spec.mounts, requests.token_path or config.token_path)
        container = _container(state, facts, delivery, token)
        admissions = [admit(*each, container, host) for each in zip(wanted, signed, strict=True)]
        standby.end()  # the TPM has done its part: nothing of it is to be there while the models are decrypted
        shared = delivery.share([each.delivery() for each in shareable(admissions, spec)], records.live)
        delivery.fill([each.delivery() for each in admissions if each.request.destination not in shared])
        audit_grants(host, container, admissions)  # synced: if it cannot be written, nothing becomes visible
        record = open_record(container, admissions, earlier, keeper=delivery.keeper, seconds=host.clock())
        records.write(record, kept_evidence(container, admissions, earlier, records))
        attached, seconds = delivery.attach(), time.monotonic() - began
        records.mark_delivered(record, held_models(admissions, attached))
    audit_outcome(host, container, record, attached, seconds=seconds)


def _container(state: State, facts: EngineFacts, delivery: Delivery, token: TokenFile) -> Container:
    """What admission knows of the container."""
    return Container(
        container_id=state.container_id,
        bundle=state.bundle,
        pid=state.pid,
        start_time=delivery.start_time,
        runtime=delivery.runtime,
        pod_uid=facts.pod_uid,
        token=token,
    )
