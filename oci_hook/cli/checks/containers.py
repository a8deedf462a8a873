"""The facts by which `grade` judges each running container: from its record, and from /proc of its process.

Nothing here believes a container: its files are opened beneath its own root, without its links leading out, and a
token's claims are read for its lifetime alone. Sources: proc(5), capabilities(7), user_namespaces(7), core(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oci_hook.attestation.deadline import with_deadline
from oci_hook.cli.checks.grade import ContainerFacts, Grade, HostFacts, ModelMount, Reason, Sandbox, grade
from oci_hook.delivery.resident import memory_bytes
from oci_hook.documents import decode_base64url, parse_object
from oci_hook.errors import FileUnreadable, HolderGone, SczError, TokenMalformed
from oci_hook.linux.mounts import SOURCE, Mount, load_mountinfo
from oci_hook.linux.processes import HeldProcess
from oci_hook.linux.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.trusted_file import load_file, read_regular

_TOKEN_LIMIT_BYTES = 16 << 10
_TOKEN_READ_SECONDS, _ALL_TOKENS_SECONDS = 3.0, 15.0
_SPEC_LIMIT_BYTES = 4 << 20
MOST_CONTAINERS = 1000
_SANDBOXES: Mapping[str, Sandbox] = {"runc": "none", "crun": "none", "runsc": "gvisor"}
_CALLED_SANDBOX = re.compile(r"runsc.*|exe|qemu.*|cloud-hypervisor|firecracker|stratovirt|containerd-shim-kata.*")


@dataclass(frozen=True, slots=True)
class GradedContainer:
    """A line of doctor's: a container, its grade, the reasons for it; `unseen` says what could not be looked at."""

    container_id: str
    models: tuple[str, ...]
    pid: int
    sandbox: Sandbox | None
    grade: Grade | None
    reasons: tuple[Reason, ...]
    unseen: tuple[str, ...]


def grade_containers(runtime_directory: str, token_path: str, host: HostFacts) -> Iterator[GradedContainer]:
    """Every running container that has a record, with its grade; the thousand oldest of more.

    Args:
        runtime_directory: Where the records are.
        token_path: Where a container has its token if its annotation says nothing.
        host: What they share.
    """
    records = ContainerRecords(runtime_directory).live()[:MOST_CONTAINERS]
    tokens = _Tokens(token_path)
    for record, taken in zip(records, memory_bytes(records), strict=True):
        try:
            facts, unseen = load_facts(record, taken, tokens)
        except HolderGone:
            continue  # it ended meanwhile
        except (SczError, OSError, ValueError) as error:
            why = error.message if isinstance(error, SczError) else str(error)
            yield GradedContainer(record.container_id, record.models, record.pid, None, None, (), (why,))
            continue
        judged, reasons = grade(facts, host)
        yield GradedContainer(
            record.container_id, record.models, record.pid, facts.sandbox, judged, reasons, tuple(unseen)
        )


def load_facts(
    record: ContainerRecord, taken: Sequence[int | None] | None, tokens: _Tokens
) -> tuple[ContainerFacts, list[str]]:
    """What is known of a container, and what could not be seen of it.

    Args:
        record: The container's.
        taken: What its models take, as `memory_bytes` saw them.
        tokens: Reads its token.

    Raises:
        HolderGone: Its process ended.
        SystemCallFailed: /proc cannot be read.
    """
    unseen: list[str] = []
    with HeldProcess(record.pid) as process:
        if process.start_time != record.start_time:
            raise HolderGone(f"process {record.pid} is another now")
        status = parse_status(process.read("status").decode("utf-8", "replace"))
        recorded = record.runtime in _SANDBOXES and len(record.held) == len(record.models)
        mounts = model_mounts(record, load_mountinfo(process.proc_fd), taken)
        sandbox = _sandbox(record, process, mounts)
        if sandbox != "none":
            mounts = tuple(ModelMount(path, None) for path in record.destinations)
            unseen.append("its mounts, capabilities and filters: they are inside the sandbox")
        elif not recorded:
            unseen.append("whether what is mounted at its models' places is what was delivered")
        elif taken is None:
            unseen.append("its models: they could not be opened in time")
        token_seconds = tokens.load_seconds(process, record) if sandbox == "none" else None
        if token_seconds is None:
            unseen.append("its token's lifetime")
        facts = ContainerFacts(
            sandbox=sandbox,
            user_namespace=process.identity("ns/user") != _identity("/proc/self/ns/user"),
            host_uid=status.uid,
            capabilities=status.capabilities,
            shares_pids=process.identity("ns/pid") == _identity("/proc/self/ns/pid"),
            seccomp=status.seccomp,
            core_limit_bytes=parse_core_limit(process.read("limits").decode("utf-8", "replace")),
            swapped_bytes=status.swapped_bytes,
            mounts=mounts,
            token_seconds=token_seconds,
            recorded=recorded,
        )
        process.verify_same()
    return facts, unseen


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _sandbox(record: ContainerRecord, process: HeldProcess, mounts: Sequence[ModelMount]) -> Sandbox:
    """What the record says. A program's name is chosen by who made the image: it is worth no more than `unknown`."""
    if record.runtime in _SANDBOXES:
        return _SANDBOXES[record.runtime]
    if any(mount.present for mount in mounts):  # a sandbox has none of the model's mounts outside
        return "none"
    return "unknown" if _CALLED_SANDBOX.fullmatch(process.executable_name()) else "none"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What is read of a `/proc/<pid>/status`."""

    uid: int
    capabilities: frozenset[int]
    seccomp: bool
    swapped_bytes: int


def parse_status(text: str) -> ProcessStatus:
    """Take a `/proc/<pid>/status` apart; what it does not say counts as the worst.

    The bounding set is what counts for capabilities: a program with file capabilities, or root's own, gains those.
    """
    fields: Mapping[str, str] = {
        name: value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines()) if colon
    }
    masks = [int(fields.get(name, "0"), 16) for name in ("CapEff", "CapBnd", "CapPrm", "CapInh", "CapAmb")]
    mask = 0
    for each in masks:
        mask |= each
    swapped = re.match(r"([0-9]+) kB", fields.get("VmSwap", ""))
    return ProcessStatus(
        uid=int(fields.get("Uid", "0").split()[0]),
        capabilities=frozenset(number for number in range(64) if mask >> number & 1),
        seccomp=fields.get("Seccomp", "0") != "0",
        swapped_bytes=int(swapped[1]) * 1024 if swapped else 0,
    )


def parse_core_limit(text: str) -> int | None:
    """The hard limit for cores of a `/proc/<pid>/limits`, in bytes; None: without limit."""
    found = re.search(r"^Max core file size +\S+ +([0-9]+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def model_mounts(
    record: ContainerRecord, mounts: Sequence[Mount], taken: Sequence[int | None] | None
) -> tuple[ModelMount, ...]:
    """What lies at each destination: the last mount there is what the container sees.

    It is the model's if it is the one that the record names, and was opened as that: a container that may mount chooses
    the source of a mount, and gets the numbers of one that it has unmounted. A record without mounts: by the source.
    """
    found = []
    for index, path in enumerate(record.destinations):
        if record.is_released(index):
            found.append(ModelMount(path, None))
            continue
        here = [mount for mount in mounts if mount.mount_point == os.path.normpath(path)]
        held = record.held[index] if len(record.held) == len(record.models) else None
        top = here[-1] if here else None
        if (
            top is None
            or top.source != SOURCE
            or (held is not None and (top.mount_id, top.device) != (held.mount_id, held.device))
            or (held is not None and taken is not None and taken[index] is None)
        ):
            found.append(ModelMount(path, False))
            continue
        read_only = "ro" in top.options and "ro" in top.super_options
        found.append(ModelMount(path, True, read_only, top.kind, "noswap" in top.super_options))
    return tuple(found)


# --- the token --------------------------------------------------------------------------------------------------------


class _Tokens:
    """Reads the tokens of one run's containers, within one time for all.

    Args:
        path: Where a container has its token if its annotation says nothing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._until = time.monotonic() + _ALL_TOKENS_SECONDS

    def load_seconds(self, process: HeldProcess, record: ContainerRecord) -> int | None:
        """How long the token at its place in the container is valid; None if there is none that can be read in time.

        The container may have put a file system of its own there (FUSE), which never answers: a child waits for it.
        """
        named = _annotations(record.bundle).get("smm.scz/token", self._path)
        path = named if isinstance(named, str) and named.startswith("/") else self._path
        seconds = min(_TOKEN_READ_SECONDS, self._until - time.monotonic())
        with contextlib.suppress(SczError):
            if seconds > 0:
                found = with_deadline(lambda: str(_read_lifetime(process, path)).encode(), seconds)
                return int(found) if found != b"None" else None
        return None


def _read_lifetime(process: HeldProcess, path: str) -> int | None:
    with contextlib.suppress(OSError, SczError, ValueError), contextlib.ExitStack() as stack:
        root = process.open_directory("root")
        stack.callback(os.close, root)
        place = openat2(root, path, os.O_PATH, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
        stack.callback(os.close, place)
        # The kind is known before anything is opened: opening a device acts on it, opening a FIFO waits.
        if stat.S_ISREG(os.fstat(place).st_mode):
            file = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
            stack.callback(os.close, file)
            return token_lifetime(read_regular(file, path, limit_bytes=_TOKEN_LIMIT_BYTES, error=TokenMalformed))
    return None


def _annotations(bundle: str) -> Mapping[str, Any]:
    with contextlib.suppress(SczError):
        path = os.path.join(bundle, "config.json")
        data = load_file(path, limit_bytes=_SPEC_LIMIT_BYTES, error=FileUnreadable)
        document = parse_object(data, limit_bytes=_SPEC_LIMIT_BYTES, what=path, error=FileUnreadable)
        annotations = document.get("annotations")
        return annotations if isinstance(annotations, dict) else {}
    return {}


def token_lifetime(token: bytes) -> int | None:
    """`exp` - `iat` of a JWS in compact form, unverified: the hook has verified it; None if it does not say both."""
    parts = token.decode("ascii", "replace").strip().split(".")
    if len(parts) != 3:
        return None
    payload = decode_base64url(parts[1], what="token", error=TokenMalformed)
    claims = parse_object(payload, limit_bytes=_TOKEN_LIMIT_BYTES, what="token", error=TokenMalformed)
    issued, expires = claims.get("iat"), claims.get("exp")
    numbers = type(issued) in (int, float) and type(expires) in (int, float)
    return int(expires - issued) if numbers and issued is not None and expires is not None else None
