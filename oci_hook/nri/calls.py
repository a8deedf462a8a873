"""An engine's requests as calls of a handler's methods: which, in which lane, and what is answered. No I/O.

Engines before NRI 0.12 tell events that have no answer by `StateChange`, later ones by a call for each; they end in the
same methods. What is not known is answered `UNIMPLEMENTED`, which newer engines take for an older plugin.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oci_hook.documents import shown
from oci_hook.errors import CouldNotTell, EngineUnsupported, InputError, SczError
from oci_hook.nri import encoding
from oci_hook.nri.handler import Handler
from oci_hook.nri.messages import Adjustment, Container, Event, PodSandbox, Settings
from oci_hook.nri.ttrpc import Code, Request, Response, encode_request

PLUGIN_SERVICE = "nri.pkg.api.v1alpha1.Plugin"
#: What one list of pods and containers may have, in however many requests.
MAX_SYNCHRONIZE_BYTES = 64 << 20
MAX_ANSWER_BYTES = 1 << 20
_MAX_REASON = 4096
_NOT_THE_HANDLERS = (Event.UPDATE_CONTAINER, Event.POST_UPDATE_CONTAINER, Event.VALIDATE_CONTAINER_ADJUSTMENT)
_METHODS: dict[Event, str] = {event: event.name.lower() for event in Event if event not in _NOT_THE_HANDLERS}
_EVENTS = {event.name.title().replace("_", ""): event for event in _METHODS}
_FIRST_WITH_VALIDATION = {"containerd": (2, 2), "cri-o": (1, 34)}
_MAX_REMEMBERED = 256
_POD_EVENTS = (Event.RUN_POD_SANDBOX, Event.STOP_POD_SANDBOX, Event.REMOVE_POD_SANDBOX)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is ready to be served.

    Attributes:
        lane: Calls with the same one are served in their order.
        run: Calls the handler.
        encode: Makes the answer from what the handler returned.
        deadline: `time.monotonic()` until which the answer has to be with the engine; infinite where it is no matter.
        lost: To be called if the handler returned and its answer did not arrive.
        is_configure: Whether this is the call that begins it all.
        is_synchronize: Whether this is the last one before the engine asks the plugin for each container.
    """

    lane: str
    run: Callable[[], Any]
    encode: Callable[[Any], bytes] = lambda _: b""
    deadline: float = math.inf
    lost: Callable[[], None] | None = None
    is_configure: bool = False
    is_synchronize: bool = False


def subscribed(handler: Handler) -> frozenset[Event]:
    """The events whose methods the handler's class overrides.

    Raises:
        ValueError: There are none: an engine would subscribe it to all.
    """
    chosen = (one for one, name in _METHODS.items() if getattr(type(handler), name) is not getattr(Handler, name))
    events = frozenset(chosen)
    if not events:
        raise ValueError("the handler wants to hear of nothing")
    return events


class Calls:
    """The calls of one connection: made by the one thread that reads it, run in those of their lanes."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self._events = handler, subscribed(handler)
        self._pods: list[PodSandbox] = []
        self._containers: list[Container] = []
        self._bytes = 0
        self._added: dict[str, Adjustment] = {}
        self._adding = threading.Lock()

    def call(self, request: Request, received: float) -> Call | None:
        """What a request asks for; None if it is of a method that is not known here.

        Args:
            request: As it came.
            received: When, as of `time.monotonic()`.

        Raises:
            EngineUnsupported: It is malformed, or asks for too much.
        """
        if request.service != PLUGIN_SERVICE:
            return None
        others = {
            "Configure": self._configure,
            "Synchronize": self._synchronize,
            "Shutdown": self._shutdown,
            "StateChange": self._state_change,
            "ValidateContainerAdjustment": self._validate,
        }
        if request.method in others:
            return others[request.method](request.payload)
        event = _EVENTS.get(request.method)
        if event is None:
            return None
        pod, container = encoding.parse_event(request.payload)
        if event is Event.CREATE_CONTAINER:
            left = math.inf if request.timeout_seconds is None else request.timeout_seconds
            return self._create(pod, container, received + left)
        return self._event(event, pod, container)

    def _configure(self, payload: bytes) -> Call:
        settings, events = encoding.parse_settings(payload), set(self._events)
        if Event.CREATE_CONTAINER in events and knows_validation(settings):
            events.add(Event.VALIDATE_CONTAINER_ADJUSTMENT)
        run: Callable[[Settings], None] = self._handler.configure
        return Call("", functools.partial(run, settings), lambda _: encoding.configured(events), is_configure=True)

    def _synchronize(self, payload: bytes) -> Call:
        pods, containers, more = encoding.parse_synchronize(payload)
        self._bytes += len(payload)
        if self._bytes > MAX_SYNCHRONIZE_BYTES:
            raise EngineUnsupported(f"the engine's list of pods and containers exceeds {MAX_SYNCHRONIZE_BYTES} bytes")
        self._pods += pods
        self._containers += containers
        if more:
            return Call("", lambda: None, lambda _: encoding.synchronized(more=True))
        run = functools.partial(self._handler.synchronize, tuple(self._pods), tuple(self._containers))
        self._pods, self._containers, self._bytes = [], [], 0
        return Call("", run, lambda _: encoding.synchronized(more=False), is_synchronize=True)

    def _shutdown(self, _payload: bytes) -> Call:
        return Call("", self._handler.shutdown)

    def _state_change(self, payload: bytes) -> Call:
        number, pod, container = encoding.parse_state_change(payload)
        known = [event for event in _METHODS if event == number and event is not Event.CREATE_CONTAINER]
        return self._event(known[0], pod, container) if known else Call("", lambda: None)

    def _validate(self, payload: bytes) -> Call:
        """Whether what was added is still there after the other plugins.

        To be asked is the point: an engine whose plugin did not answer in time goes on without it, but where that
        plugin also validates, it cannot ask it, and refuses the container.
        """
        container_id, together = encoding.parse_validation(payload)
        return Call(container_id, lambda: self._missing(container_id, together), encoding.validated)

    def _missing(self, container_id: str, together: Adjustment) -> str:
        with self._adding:
            added = self._added.pop(container_id, Adjustment())
        have = {(mount.destination, mount.source) for mount in together.mounts}
        for mount in added.mounts:
            if (mount.destination, mount.source) not in have:
                return f"scz-smm: another plugin took away its mount {shown(mount.destination, 200)}"
        for stage in encoding.STAGES:
            left = {(hook.path, hook.args) for hook in getattr(together.hooks, stage)}
            if any((hook.path, hook.args) not in left for hook in getattr(added.hooks, stage)):
                return f"scz-smm: another plugin took away its hook of the stage {stage}"
        return ""

    def _event(self, event: Event, pod: PodSandbox, container: Container) -> Call:
        method = getattr(self._handler, _METHODS[event])
        if event in _POD_EVENTS:
            return Call(pod.id, functools.partial(method, pod))
        return Call(container.id, functools.partial(method, pod, container))

    def _create(self, pod: PodSandbox, container: Container, deadline: float) -> Call:
        handler = self._handler

        def run() -> Adjustment | None:
            adjustment = handler.create_container(pod, container, deadline)
            if adjustment is not None:
                with self._adding:
                    self._added[container.id] = adjustment
                    if len(self._added) > _MAX_REMEMBERED:  # engines that do not ask never take them
                        del self._added[next(iter(self._added))]
            return adjustment

        return Call(
            container.id,
            run,
            _created,
            deadline,
            functools.partial(handler.create_container_lost, pod, container),
        )


def is_synchronize(beginning: bytes) -> bool:
    """Whether a request of which only the beginning is here is `Synchronize`; its fields come in their order."""
    return beginning.startswith(encode_request(Request(PLUGIN_SERVICE, "Synchronize", b"")))


def knows_validation(settings: Settings) -> bool:
    """Whether an engine asks plugins to validate: NRI 0.10, so containerd 2.2 and CRI-O 1.34; NRI 0.12 says so itself.

    An engine that does not would refuse a plugin that subscribes to it.
    """
    if re.match(r"v?(0\.1[2-9]|0\.[2-9][0-9]|[1-9][0-9]*\.[0-9]+)\.", settings.nri_version):
        return True
    found = re.match(r"v?([0-9]{1,4})\.([0-9]{1,4})\b", settings.runtime_version)
    first = _FIRST_WITH_VALIDATION.get(settings.runtime_name)
    return found is not None and first is not None and (int(found[1]), int(found[2])) >= first


def _created(adjustment: Adjustment | None) -> bytes:
    data = encoding.created(adjustment)
    if len(data) > MAX_ANSWER_BYTES:
        raise EngineUnsupported(f"what is to be added to the container has {len(data)} bytes, too much for an answer")
    return data


def refusal(error: Exception) -> Response:
    """What an engine is answered for a handler's exception: code and words of a `SczError`; of others only the kind."""
    if not isinstance(error, SczError):
        return Response(code=Code.INTERNAL, message=f"scz-smm: internal error: {type(error).__name__}")
    code = Code.FAILED_PRECONDITION
    if isinstance(error, InputError):
        code = Code.INVALID_ARGUMENT
    elif isinstance(error, CouldNotTell):
        code = Code.UNAVAILABLE
    text = f"scz-smm: {error.reason} ({error.code}): {error.message}; {error.advice}"
    return Response(code=code, message=shown(text, _MAX_REASON)[1:-1])
