"""Before `create`: models that are complete on the host before a runtime is told of the container, by a bind entry.

    asking ─► refusals that need no key ─► token ─► admission ─► fill ─► audit ─► record ─► attach below bound/ ─► entries

Under a VM sandbox nothing that a prestart hook mounts reaches the guest; a tmpfs that was there before does. The shim,
podman's precreate and the NRI plugin call `prepare`; the prestart hook looks for the record, compares config.json with
it and adopts it. The mark is that record alone: an annotation could be set by anyone.
Decision: docs/adr/0014-before-create.md. Facts: docs/runtimes.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from oci_hook.config import Config
from oci_hook.oci.annotations import Requests
from oci_hook.oci.engine import EngineFacts
from oci_hook.oci.spec import Spec

OPTIONS = ("bind", "ro", "nosuid", "nodev", "noexec")
"""Of every bind entry of ours. Never `rbind`: nothing lies below a model."""


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
    """

    container_id: str
    bundle: str
    spec: Spec
    facts: EngineFacts
    requests: Requests
    runtime: str
    creator: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BindEntry:
    """A mount for config.json, of type `bind`.

    Attributes:
        destination: In the container, as the annotation names it.
        source: Directory on the host: the root of the model's read-only tmpfs.
        options: `OPTIONS`.
    """

    destination: str
    source: str
    options: tuple[str, ...] = OPTIONS


def prepare(asking: Asking, config: Config) -> tuple[BindEntry, ...]:
    """Admit, decrypt and seal what a container asks for, and attach it on the host's side.

    Whatever raises leaves nothing. For a container that has been prepared by the same creator the entries are those of
    its record again.

    Args:
        asking: Who asks; with no model in its requests the answer is empty.
        config: The host's configuration.

    Returns:
        One entry for each model, in the order of the requests.

    Raises:
        SczError: The container must not be created.
    """
    raise NotImplementedError


def discard(container_id: str, bundle: str, config: Config) -> None:
    """Take a container's models away: its creation failed, or it has ended.

    They are truncated and unmounted, the records closed, the audit log told, the token freed. For a container without
    any of that it does nothing.

    Args:
        container_id: The engine's.
        bundle: As it was prepared, or as it was adopted; empty: not known.
        config: The host's configuration.

    Raises:
        SystemCallFailed: A model stays mounted; a sweep will try again.
        CouldNotTell: A record, the lock or the audit log cannot be used.
    """
    raise NotImplementedError


def known(config: Config) -> tuple[str, ...]:
    """The ids of the containers that have a record of this kind, sorted.

    Raises:
        FileUnreadable: The folder of records cannot be read.
    """
    raise NotImplementedError


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
    raise NotImplementedError
