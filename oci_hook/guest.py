"""The hook in a Kata guest: the agent that runs it waits a few seconds and ignores how it ends, so it refuses inside.

    agent ─► supervisor (this) ─► worker: the hook's own pipeline, until the time is up
                     └ failed ─► a read-only text at each destination ─► [not even that: the workload is killed]

The pipeline runs in a fork, which the supervisor ends when the time is up, whatever it waits for. A refusal is told
where the model would have been, unless the worker had begun to attach: what is visible then nobody can say, and the
workload is killed, as it is where nothing can be told. The hook exits with the reason's code all the same.

If the supervisor itself is killed, its worker ends with it: the workload then finds no model, and no text.
Source: Kata Containers, src/libs/kata-sys-util/src/hooks.rs (10 s, failures are logged); docs/adr/0016-guest-mode.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from oci_hook.config import Config
from oci_hook.delivery.agent import refusal_text, tell_inside
from oci_hook.delivery.holder import Agent
from oci_hook.delivery.recognise import hold
from oci_hook.documents import shown
from oci_hook.errors import HolderGone, InstallationIncomplete, InternalError, SczError, Terminated
from oci_hook.host import container_view
from oci_hook.invocation import Invocation
from oci_hook.journal import tell
from oci_hook.linux.namespaces import Channel, Child, Report
from oci_hook.linux.processes import HeldProcess, process_start_time
from oci_hook.oci.annotations import gather_requests, merge_annotations
from oci_hook.oci.engine import read_engine_facts
from oci_hook.oci.spec import load_spec
from oci_hook.oci.state import State
from oci_hook.report import reporting_config

_WHAT = "the process that delivers in the guest"
_SHARE_FOR_REFUSING = 8
_LATE = "give the guest more processors or a smaller model; `timeout_seconds` below [guest] if the agent waits longer"


def supervise(state: State, invocation: Invocation, deliver: Callable[[Agent], None]) -> None:
    """Deliver in time, or refuse where the workload sees it.

    Args:
        state: What the agent says.
        invocation: How it called.
        deliver: The hook's pipeline; runs in a process of its own.

    Raises:
        SczError: Why there is no model; the workload has been told, or was killed.
    """
    config, _ = reporting_config(invocation.config_file)  # one that cannot be used is the worker's to refuse
    caller = os.getppid()
    with HeldProcess(state.pid) as workload:
        announced, announce = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        agent = Agent(caller, config.guest_agent, announce)
        try:
            _run(lambda: deliver(agent), _seconds_left(config.guest_timeout_seconds))
        except BaseException as cause:
            error = cause if isinstance(cause, SczError) else InternalError(f"{type(cause).__name__}: {cause}")
            told = False
            try:
                with suppress(SczError):
                    _refuse_inside(state, invocation, agent, _has_announced(announced), error, config)
                    told = True
            finally:
                if not told:
                    _kill(state, workload, agent, error)
            raise
        finally:
            os.close(announced)
            os.close(announce)


def _seconds_left(budget_seconds: float) -> float:
    """Of the time since this process was made, which is when the agent began to count."""
    started = process_start_time(os.getpid())
    ticks = os.sysconf("SC_CLK_TCK")
    if started is None:
        return budget_seconds
    return max(0.0, budget_seconds - (time.clock_gettime(time.CLOCK_BOOTTIME) - started / ticks))


def _run(work: Callable[[], None], seconds: float) -> None:
    """Run it in a child that is ended when the time is up.

    Raises:
        SczError: What it raised.
        Terminated: It took too long, or ended without a word.
    """

    def body(_channel: Channel) -> Report:
        try:
            work()
        except ImportError as cause:
            raise InstallationIncomplete(f"{type(cause).__name__}: {cause}") from cause
        return {}

    with Child(_WHAT, body, gone=Terminated, ending_seconds=1.0) as worker:
        try:
            worker.receive(seconds)
        except Terminated as late:
            raise Terminated(late.message, remedy=_LATE) from late


def _has_announced(announced_fd: int) -> bool:
    """Whether the worker, which is gone, had begun to attach."""
    with suppress(BlockingIOError):
        return bool(os.read(announced_fd, 1))
    return False


def _refuse_inside(
    state: State, invocation: Invocation, agent: Agent, attaching: bool, error: SczError, config: Config
) -> None:
    """Tell the workload.

    Raises:
        SczError: It cannot be told.
    """
    if attaching:
        raise HolderGone("models were being attached")
    spec = load_spec(state.bundle, digest=invocation.spec_digest)
    annotations = merge_annotations(state.annotations, spec.annotations)
    facts = read_engine_facts(invocation.engine or config.engine, annotations)
    requests = gather_requests(annotations, invocation.requests, facts.container_name)
    container = container_view(state, spec, facts, agent)
    destinations = [request.destination for request in requests.models]
    seconds = config.guest_timeout_seconds / _SHARE_FOR_REFUSING
    with hold(container, runtime_directory=config.runtime_directory, timeout_seconds=seconds) as holder:
        tell_inside(holder, container, destinations, refusal_text(error), timeout_seconds=seconds)


def _kill(state: State, workload: HeldProcess, agent: Agent, error: SczError) -> None:
    """End what would run without having been told; only a child of whoever called, as anyone could write a state."""
    if workload.parent_pid != agent.pid:
        return
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(workload.pidfd, signal.SIGKILL)
    tell(
        "killed",
        f"container {shown(state.container_id, 64)}: {error.reason} ({error.code}) could not be told inside: killed",
        priority=3,
        container=state.container_id,
        code=error.code,
        reason=error.reason,
    )
