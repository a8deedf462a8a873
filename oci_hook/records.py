"""Run-time records: which container holds which models. They are for people and for doing a thing once, not secrets.

One file a container below the run-time directory, named after the id and the bundle (two containerd namespaces may use
one id). It is written before the model becomes visible and marked once it is; what a killed hook left is told apart by
the process that it names. The evidence of the start lies beside it under the same name, and comes and goes with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import FileUnreadable, SczError, SystemCallFailed
from oci_hook.evidence_files import EvidenceFiles
from oci_hook.held import HeldModel, parse_held
from oci_hook.linux.processes import process_start_time
from oci_hook.locks import lock_file
from oci_hook.trusted_file import load_root_file, make_private_directory, remove_half_written, replace_file

_LIMIT_BYTES = 256 << 10
_LOCK, _LOCK_SECONDS = "containers.lock", 10.0


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """One container.

    Attributes:
        references: What was asked for, in the words of the annotations.
        models: `name:version` of what that was.
        manifests: Their manifest digests.
        destinations: Their paths in the container.
        start_time: Of the process `pid`, in clock ticks since boot (proc(5), stat field 22).
        seconds: When the record was opened, since 1970.
        delivered: The models are visible to the container.
        issuer: Of the token.
        bundle: Empty until it is known, of a container whose models came before its `create`.
        runtime: runc, crun, runsc or kata; `unknown`, as the issuer, in records of an earlier version.
        keeper: Pid and start time of the process in whose mount namespace the models are; zeros: on the host's side.
        namespace: Device and inode of that mount namespace.
        held: The mounts, in the order of `models`, once delivered; none in records of an earlier version.
    """

    container_id: str
    bundle: str
    pid: int
    start_time: int
    seconds: int
    references: tuple[str, ...]
    models: tuple[str, ...]
    manifests: tuple[str, ...]
    destinations: tuple[str, ...]
    subject: str
    size_bytes: int
    delivered: bool
    issuer: str = "unknown"
    runtime: str = "unknown"
    keeper: tuple[int, int] = (0, 0)
    namespace: tuple[int, int] = (0, 0)
    held: tuple[HeldModel, ...] = ()

    def is_alive(self) -> bool:
        """Whether the process that the record names still runs."""
        return process_start_time(self.pid) == self.start_time

    def is_released(self, index: int) -> bool:
        """Whether one of its models was taken away again."""
        return len(self.held) == len(self.models) and self.held[index].released

    def has_copy(self, model: HeldModel) -> bool:
        """Whether one of its models is a mount of the same file system, by the records."""
        return any(each.is_same_copy(model) for each in self.held)

    def joined(self, later: ContainerRecord) -> ContainerRecord:
        """This one and a later one of the same container, which got more models by another way."""
        both = {name: getattr(self, name) + getattr(later, name) for name in _LISTS}
        return replace(later, **both, size_bytes=self.size_bytes + later.size_bytes)


_LISTS = ("references", "models", "manifests", "destinations", "held")
_MAX_MODELS = 64


def _parse(data: bytes, path: str) -> ContainerRecord:
    document = parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable)
    fields = Fields(document, what=path, error=FileUnreadable)
    record = ContainerRecord(
        container_id=fields.string("container_id"),
        bundle=fields.take("bundle") if document.get("bundle") == "" else fields.string("bundle", limit=4096),
        pid=fields.integer("pid", low=1, high=1 << 31),
        start_time=fields.integer("start_time", low=0, high=1 << 62),
        seconds=fields.integer("seconds", low=0, high=1 << 53),
        # One model may be asked for twice, at two places.
        references=fields.items("references", str, low=1, high=_MAX_MODELS),
        models=fields.items("models", str, low=1, high=_MAX_MODELS),
        manifests=fields.items("manifests", str, low=1, high=_MAX_MODELS),
        destinations=fields.strings("destinations", low=1, high=_MAX_MODELS, limit=4096),
        subject=fields.string("subject", limit=4096),
        size_bytes=fields.integer("size_bytes", low=0, high=1 << 62),
        delivered=fields.boolean("delivered"),
        **_parse_mounts(fields, path),
    )
    fields.finish()
    return record


def _parse_mounts(fields: Fields, path: str) -> dict[str, Any]:
    """What records of version 0.1 have not."""
    if not fields.has("held"):
        return {}

    def number(value: object) -> int:
        if type(value) is not int or value < 0:
            raise FileUnreadable(f"{path}: a number is none")
        return value

    keeper = fields.items("keeper", number, low=2, high=2)
    namespace = fields.items("namespace", number, low=2, high=2)
    return {
        "issuer": fields.string("issuer", limit=4096),
        "runtime": fields.string("runtime"),
        "keeper": (keeper[0], keeper[1]),
        "namespace": (namespace[0], namespace[1]),
        "held": fields.items("held", lambda value: parse_held(value, path), low=0, high=_MAX_MODELS),
    }


class ContainerRecords:
    """The records below `<runtime_directory>/containers`, and the lock that whoever changes one of them holds.

    What a sweep found dead may be a new container's of the same name a moment later: it looks and removes under the
    lock. It is the last one taken: whoever waits for it holds `host-mounts.lock` at most.

    Args:
        runtime_directory: Root's own, such as /run/scz-smm.
        lock_seconds: How long to wait for others; a hook must not hang.
    """

    def __init__(self, runtime_directory: str, *, lock_seconds: float = _LOCK_SECONDS) -> None:
        self._runtime_directory = runtime_directory
        self._directory = os.path.join(runtime_directory, "containers")
        self._evidence = EvidenceFiles(runtime_directory)
        self._lock_seconds = lock_seconds

    def _locked(self) -> AbstractContextManager[None]:
        path = os.path.join(self._runtime_directory, _LOCK)
        return lock_file(path, timeout_seconds=self._lock_seconds, error=SystemCallFailed)

    @staticmethod
    def _name(container_id: str, bundle: str) -> str:
        return hashlib.sha256(f"{container_id}\0{bundle}".encode()).hexdigest() + ".json"

    def _path(self, container_id: str, bundle: str) -> str:
        return os.path.join(self._directory, self._name(container_id, bundle))

    def _load(self, path: str) -> ContainerRecord | None:
        try:
            return _parse(load_root_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable), path)
        except FileUnreadable:
            if not os.path.lexists(path):
                return None
            raise

    def load(self, container_id: str, bundle: str) -> ContainerRecord | None:
        """A container's record; None if there is none.

        Raises:
            FileUnreadable: It cannot be read, or was not written by us.
        """
        return self._load(self._path(container_id, bundle))

    def delivered(self, container_id: str, bundle: str, pid: int, start_time: int) -> ContainerRecord | None:
        """What this very process was given already, if anything."""
        record = self.load(container_id, bundle)
        if record is None or not record.delivered or (record.pid, record.start_time) != (pid, start_time):
            return None
        return record

    def load_evidence(self, container_id: str, bundle: str) -> bytes | None:
        """A container's evidence, as `attestation.kept_evidence` reads it; None if there is none (FileUnreadable)."""
        return self._evidence.load(self._name(container_id, bundle))

    def keep_evidence(self, record: ContainerRecord, evidence: bytes) -> None:
        """Replace a container's evidence, unless it has ended or was started anew meanwhile.

        Raises:
            FileUnreadable: It cannot be written.
            SystemCallFailed: Others held the lock for too long.
        """
        with self._locked():
            now = self._load(self._path(record.container_id, record.bundle))
            if now is not None and (now.pid, now.start_time) == (record.pid, record.start_time):
                self._evidence.write(self._name(record.container_id, record.bundle), evidence)

    def write(self, record: ContainerRecord, evidence: bytes | None = None) -> None:
        """Write or replace a container's record.

        Args:
            record: The container's.
            evidence: Of its start, at most 4 MiB; None: what is there stays.

        Raises:
            FileUnreadable: It cannot be written.
            SystemCallFailed: Others held the lock for too long; nothing was written.
        """
        make_private_directory(self._runtime_directory)
        make_private_directory(self._directory)
        with self._locked():
            remove_half_written(self._directory, nobody_writes=True)
            if evidence is not None:
                self._evidence.write(self._name(record.container_id, record.bundle), evidence)
            self._replace(record)

    def _replace(self, record: ContainerRecord) -> None:
        document = {**asdict(record), "held": [each.document() for each in record.held]}
        replace_file(self._path(record.container_id, record.bundle), canonical(document), mode=0o600)

    def mark_delivered(self, record: ContainerRecord, held: Sequence[HeldModel] = ()) -> None:
        """The models are visible now, as these mounts."""
        self.write(replace(record, delivered=True, held=(*record.held, *held)))

    def mark_released(self, record: ContainerRecord, model: HeldModel) -> None:
        """A model was taken away from a container, unless that has ended meanwhile.

        Another place of the container may have a mount of the same superblock: that stays.

        Raises:
            FileUnreadable: The record cannot be read or written.
            SystemCallFailed: Others held the lock for too long.
        """
        with self._locked():
            now = self._load(self._path(record.container_id, record.bundle))
            if now is None or (now.pid, now.start_time) != (record.pid, record.start_time):
                return
            gone = (model.device, model.mount_id)
            held = tuple(
                replace(each, released=each.released or (each.device, each.mount_id) == gone) for each in now.held
            )
            self._replace(replace(now, held=held))

    def adopt(self, container_id: str, earlier: str, bundle: str, process: tuple[int, int]) -> None:
        """Give a record, if there is one, to the process that lives as long as the container.

        Args:
            container_id: The container's.
            earlier: The bundle by which it was written, empty if it was not known then.
            bundle: The one that is known now.
            process: Pid and start time.

        Raises:
            FileUnreadable: It cannot be read or written.
            SystemCallFailed: Others held the lock for too long.
        """
        if not os.path.isdir(self._directory):
            return
        with self._locked():
            record = self._load(self._path(container_id, earlier))
            if record is None:
                return
            self._replace(replace(record, bundle=bundle, pid=process[0], start_time=process[1]))
            if bundle != earlier:
                self._evidence.move(self._name(container_id, earlier), self._name(container_id, bundle))
                os.unlink(self._path(container_id, earlier))

    def close(
        self, container_id: str, bundle: str, *, process: tuple[int, int] | None = None
    ) -> ContainerRecord | None:
        """Remove a container's record; returns it, or None if there was none.

        Args:
            container_id: The container's.
            bundle: Its OCI bundle.
            process: Pid and start time; a record that names another process stays. None: whatever it names.

        Raises:
            FileUnreadable: It cannot be read.
            SystemCallFailed: Others held the lock for too long; a sweep will remove it.
        """
        path = self._path(container_id, bundle)
        if not os.path.lexists(path):
            return None
        with self._locked():
            record = self._load(path)
            if record is not None and process not in (None, (record.pid, record.start_time)):
                return None
            self._remove(path)
        return record

    def _remove(self, path: str) -> None:
        """The evidence first, so that none is left without a record."""
        self._evidence.remove(os.path.basename(path))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def live(self) -> Sequence[ContainerRecord]:
        """The records of processes that still run, oldest first."""
        return sorted((r for _, r in self._all() if r.is_alive()), key=lambda record: record.seconds)

    def sweep(self, *, dry_run: bool = False) -> list[ContainerRecord]:
        """Remove the records of processes that ended without a word, or only name them.

        Returns:
            Those that this call removed: of two at once, each record is in one's answer.

        Raises:
            SystemCallFailed: Others held the lock for too long; nothing was removed.
        """
        if dry_run or not os.path.isdir(self._directory):
            return [record for _, record in self._all() if not record.is_alive()]
        found = []
        with self._locked():
            remove_half_written(self._directory, nobody_writes=True)
            for path, record in self._all():
                if not record.is_alive():
                    self._remove(path)
                    found.append(record)
            self._evidence.remove_all_but(self._directory)
        return found

    def _all(self) -> Iterator[tuple[str, ContainerRecord]]:
        """Each record with its path; one that cannot be read is left out, and left alone."""
        for name in os.listdir(self._directory) if os.path.isdir(self._directory) else []:
            path = os.path.join(self._directory, name)
            if not name.endswith(".json"):
                continue
            with contextlib.suppress(SczError):
                record = self._load(path)
                if record is not None:
                    yield path, record
