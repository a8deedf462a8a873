"""What a container asks for, in its annotations under `smm.scz/`.

They come from whoever creates the container: they select a model and narrow its use, they never relax what its owner
signed. Nothing is looked up here, neither the model nor the destination. An unknown key under the prefix is refused,
as a misspelt requirement would otherwise be dropped in silence. Standard library only: this is the hook's fast path.
Specification: docs/annotations.md; docs/specification.md, "Names".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from oci_hook.documents import DIGEST, shown
from oci_hook.errors import AnnotationInvalid, SczError

PREFIX = "smm.scz/"
MAX_MODELS = 16
MAX_VALUE_BYTES = 1024
RUNTIMES = ("runc", "crun", "runsc", "kata", "process")

_SLOTTED = re.compile(r"(model|path)(?:\.([a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?))?")
_CONTAINER_WIDE = frozenset({"token", "containers", "require"})
CONTAINER_WIDE_KEYS = frozenset(PREFIX + key for key in _CONTAINER_WIDE)
"""What holds for a whole container, whatever it asks for."""
_NAME = re.compile(r"(?=.{1,64}\Z)[a-z0-9]+(?:[._-][a-z0-9]+)*")
_VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Which model is meant.

    Attributes:
        name: The model's name; empty for a bundle in the image, whose manifest names it.
        version: As in `name:version`, else None.
        image_digest: As in `name@sha256:…`, the OCI image manifest's digest, else None.
        rootfs_path: As in `rootfs:/path`, a bundle that the image carries, absolute and normal, else None.
    """

    name: str
    version: str | None = None
    image_digest: str | None = None
    rootfs_path: str | None = None

    def __str__(self) -> str:
        """The annotation's value again."""
        if self.rootfs_path is not None:
            return f"rootfs:{self.rootfs_path}"
        if self.image_digest is not None:
            return f"{self.name}@{self.image_digest}"
        return self.name if self.version is None else f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True)
class Requirements:
    """What `smm.scz/require` asks beyond the owner's policy: memory that never swaps, a copy of its own, a runtime."""

    noswap: bool = False
    private: bool = False
    runtime: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One model for one container.

    Attributes:
        slot: The suffix of its keys; empty for `smm.scz/model` itself.
        destination: Absolute and normal, in the container; not yet looked at on any file system.
        token_path: The token's absolute path in the container; None: the configuration's.
    """

    slot: str
    reference: ModelReference
    destination: str
    token_path: str | None
    requirements: Requirements


@dataclass(frozen=True, slots=True)
class Requests:
    """All that a container asks for: models sorted by slot, and the containers of the pod that it concerns."""

    models: tuple[ModelRequest, ...]
    containers: tuple[str, ...]

    @property
    def token_path(self) -> str | None:
        """The container's one token path; None: the configuration's."""
        return self.models[0].token_path if self.models else None

    def concerns(self, container_name: str | None) -> bool:
        """Whether the container of this name in its pod is meant.

        Where the engine gives no name there is no pod to choose in, so the answer is yes: the checks follow, and a
        container that should have a model does not start without one in silence.
        """
        return not self.containers or container_name is None or container_name in self.containers


def has_ours(annotations: Mapping[str, str]) -> bool:
    """Whether any key lies under `smm.scz/`."""
    return any(key.startswith(PREFIX) for key in annotations)


def parse_annotations(value: object, *, what: str, error: type[SczError]) -> Mapping[str, str]:
    """Check the `annotations` member of a state or a config.json: an object of strings, or null.

    Raises:
        SczError: The class `error`.
    """
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{what}: 'annotations' is not an object of strings")
    return MappingProxyType(value)


def merge_annotations(
    state: Mapping[str, str], spec: Mapping[str, str], where: str = "the state and config.json"
) -> Mapping[str, str]:
    """The union of what the state and config.json say; Kata passes none in the state.

    Runtimes copy one to the other, so a key with two values means that something came between. One way: runc 1.1
    keeps annotations as `key=value` lines, where the key `io.kubernetes.pod.uid=x` turns into another key's value.

    Raises:
        AnnotationInvalid: One key has two values.
    """
    for key in state.keys() & spec.keys():
        if state[key] != spec[key]:
            raise AnnotationInvalid(f"the annotation {shown(key)} differs between {where}")
    return MappingProxyType({**spec, **state})


def parse_requests(annotations: Mapping[str, str]) -> Requests:
    """Read every annotation of ours.

    Args:
        annotations: The container's; keys that are not under `smm.scz/` are ignored.

    Returns:
        The requests; without a key of ours, none.

    Raises:
        AnnotationInvalid: An unknown key or a malformed value, a value over 1 KiB, keys of ours without a model, a
            path without its model, more than 16 models, or destinations that are equal or nested.
    """
    ours = {key.removeprefix(PREFIX): text for key, text in annotations.items() if key.startswith(PREFIX)}
    if not ours:
        return Requests((), ())
    models: dict[str, str] = {}
    paths: dict[str, str] = {}
    for key, text in ours.items():
        _verify_value(key, text)
        if key in _CONTAINER_WIDE:
            continue
        match = _SLOTTED.fullmatch(key)
        if match is None:
            raise AnnotationInvalid(f"the annotation {shown(PREFIX + key)} is not known")
        (models if match[1] == "model" else paths)[match[2] or ""] = text
    _verify_slots(models, paths)
    token_path = _path("token", ours["token"]) if "token" in ours else None
    requirements = _requirements(ours["require"]) if "require" in ours else Requirements()
    requests = tuple(_request(slot, models[slot], paths.get(slot), token_path, requirements) for slot in sorted(models))
    _verify_destinations(requests)
    return Requests(requests, _container_names(ours["containers"]) if "containers" in ours else ())


def gather_requests(annotations: Mapping[str, str], given: Mapping[str, str], container_name: str | None) -> Requests:
    """What concerns a container: by its annotations, and by the command line of the hook.

    A device of CDI names one container, so `smm.scz/containers` does not narrow it; what else holds for the whole
    container does.

    Args:
        annotations: The container's.
        given: Annotations of ours that the hook's command line carries.
        container_name: In its pod; None where there are no pods.

    Raises:
        AnnotationInvalid: As `parse_requests`; or the two contradict each other.
    """
    for key in given:
        if not key.startswith(PREFIX):
            raise AnnotationInvalid(f"the hook's command line carries {shown(key)}, which is not ours")
    wide = {key: text for key, text in annotations.items() if key in CONTAINER_WIDE_KEYS}
    only_wide = wide.keys() == {key for key in annotations if key.startswith(PREFIX)}
    asked = Requests((), ()) if given and only_wide else parse_requests(annotations)
    if not asked.concerns(container_name):
        asked = Requests((), ())
    added = (
        parse_requests(merge_annotations(given, wide, "the hook's command line and the annotations"))
        if given
        else asked
    )
    models = list(asked.models)
    for request in added.models:
        if not any((request.destination, request.reference) == (m.destination, m.reference) for m in models):
            models.append(request)
    _verify_destinations(models)
    return Requests(tuple(models), ())


def _verify_value(key: str, text: str) -> None:
    size = len(text.encode("utf-8", "replace"))
    if not 0 < size <= MAX_VALUE_BYTES or _CONTROL.search(text):
        raise AnnotationInvalid(
            f"the annotation {shown(PREFIX + key)} is not 1 to {MAX_VALUE_BYTES} bytes without control characters"
        )


def _verify_slots(models: Mapping[str, str], paths: Mapping[str, str]) -> None:
    for slot in sorted(paths.keys() - models.keys()):
        raise AnnotationInvalid(f"{_key('path', slot)} has no {_key('model', slot)} beside it")
    if not models:
        raise AnnotationInvalid(f"there are annotations under {PREFIX} but no {_key('model', '')}")
    if len(models) > MAX_MODELS:
        raise AnnotationInvalid(f"the container asks for {len(models)} models; {MAX_MODELS} is the most")


def _key(kind: str, slot: str) -> str:
    return f"{PREFIX}{kind}.{slot}" if slot else f"{PREFIX}{kind}"


def _request(
    slot: str, model: str, path: str | None, token_path: str | None, requirements: Requirements
) -> ModelRequest:
    reference = _reference(slot, model)
    if path is not None:
        destination = _path(_key("path", slot).removeprefix(PREFIX), path)
    elif reference.rootfs_path is None:
        destination = f"/models/{reference.name}"
    else:
        raise AnnotationInvalid(f"{_key('model', slot)} names a bundle in the image: {_key('path', slot)} is needed")
    return ModelRequest(slot, reference, destination, token_path, requirements)


def _reference(slot: str, text: str) -> ModelReference:
    if text.startswith("rootfs:/"):
        key = _key("model", slot).removeprefix(PREFIX)
        return ModelReference("", rootfs_path=_path(key, text.removeprefix("rootfs:")))
    name, at, digest = text.partition("@")
    name, colon, version = name.partition(":")
    if at and colon:
        raise AnnotationInvalid(f"{_key('model', slot)} has both a version and a digest: give one of them")
    if (
        not _NAME.fullmatch(name)
        or (colon and not _VERSION.fullmatch(version))
        or (at and not DIGEST.fullmatch(digest))
    ):
        raise AnnotationInvalid(
            f"{_key('model', slot)} is {shown(text)}, not name[:version], name@sha256:… or rootfs:/…"
        )
    return ModelReference(name, version if colon else None, digest if at else None)


def _path(key: str, text: str) -> str:
    """An absolute path in its one normal spelling, below the root."""
    parts = text.split("/")[1:]
    normal = text.startswith("/") and all(0 < len(part.encode("utf-8", "replace")) <= 255 for part in parts)
    if not normal or "." in parts or ".." in parts:
        raise AnnotationInvalid(f"{PREFIX}{key} holds {shown(text)}, not a normal absolute path below /")
    return text


def _requirements(text: str) -> Requirements:
    items = text.split(",")
    if len(set(items)) != len(items):
        raise AnnotationInvalid(f"{PREFIX}require asks for something twice")
    runtime: str | None = None
    for item in items:
        name, equals, value = item.partition("=")
        if name == "runtime" and value in RUNTIMES and runtime is None:
            runtime = value
        elif equals or name not in ("noswap", "private"):
            raise AnnotationInvalid(
                f"{PREFIX}require has {shown(item)}; known: noswap, private and one runtime= of {', '.join(RUNTIMES)}"
            )
    return Requirements("noswap" in items, "private" in items, runtime)


def _container_names(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if len(set(names)) != len(names) or not all(_CONTAINER_NAME.fullmatch(name) for name in names):
        raise AnnotationInvalid(f"{PREFIX}containers is not a list of different names, separated by commas only")
    return tuple(names)


def _verify_destinations(requests: Sequence[ModelRequest]) -> None:
    """None equal to or below another: the second mount would hide the first, or need a place inside it."""
    sorted_parts = sorted(request.destination.split("/") for request in requests)
    for upper, lower in pairwise(sorted_parts):
        if lower[: len(upper)] == upper:
            raise AnnotationInvalid(f"two models would lie at or below {shown('/'.join(upper))}: give each an own path")
