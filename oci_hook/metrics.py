"""Counters from the audit log, and the text that Prometheus reads.

The hook counts nothing: its audit records are counted here, each once. What was counted so far lies in a small file
beside the log, with the number and the digest of the last record that it holds, so counters survive rotation, removal
of old files and a reboot, and never go back. Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from oci_hook.audit import AuditLog
from oci_hook.audit_chain import Verified, seconds_of
from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import FileUnreadable
from oci_hook.key_errors import all_errors
from oci_hook.trusted_file import load_root_file, replace_file

BUCKETS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds, seconds."""
MAX_MODELS = 200
OTHER = "other"
_LIMIT_BYTES = 1 << 20


@dataclass(slots=True)
class Counters:
    """What was counted.

    Attributes:
        sequence: Of the last record that is in it; 0: none.
        digest: SHA-256 of that record's line, hexadecimal.
        starts: By `name:version`; beyond `MAX_MODELS` of them under `other`.
        refusals: By reason, the name of one of our errors.
        size_bytes: Delivered.
        durations: Starts by bucket, not cumulative; the last: longer than all.
        milliseconds: All durations together.
        released: Models taken away before their container's end.
        last_start: Seconds since 1970; 0: none yet.
    """

    sequence: int = 0
    digest: str = "0" * 64
    starts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    milliseconds: int = 0
    released: int = 0
    last_start: float = 0.0

    def count(self, record: Mapping[str, Any]) -> None:
        """Count one record; members of others than this version are left out."""
        event = record.get("event")
        if event == "outcome":
            for model in str(record.get("model", OTHER)).split(", "):
                known = model if model in self.starts or len(self.starts) < MAX_MODELS else OTHER
                self.starts[known] = self.starts.get(known, 0) + 1
            self.size_bytes += _number(record.get("bytes"))
            self.last_start = max(self.last_start, seconds_of(record["time"]))
            if "milliseconds" in record:
                taken = _number(record["milliseconds"])
                self.milliseconds += taken
                self.durations[sum(taken > 1000 * bound for bound in BUCKETS)] += 1
        elif event == "refused":
            names = {cls.__name__ for cls in all_errors().values()}
            reason = str(record.get("reason"))
            reason = reason if reason in names else OTHER
            self.refusals[reason] = self.refusals.get(reason, 0) + 1
        elif event == "released":
            self.released += 1


def _number(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 62 else 0


def state_path(audit_file: str) -> str:
    """Where the counters are kept."""
    return os.path.join(os.path.dirname(audit_file), "metrics.json")


def load_counters(audit_file: str) -> Counters:
    """What was counted before; nothing if nothing was.

    Raises:
        FileUnreadable: The file is not ours, or damaged.
    """
    path = state_path(audit_file)
    if not os.path.lexists(path):
        return Counters()
    remedy = f"remove {path}: counting begins anew"
    try:
        data = load_root_file(path, limit_bytes=_LIMIT_BYTES, error=FileUnreadable)
        fields = Fields(
            parse_object(data, limit_bytes=_LIMIT_BYTES, what=path, error=FileUnreadable),
            what=path,
            error=FileUnreadable,
        )
        counters = Counters(
            sequence=fields.integer("sequence", low=0, high=1 << 62),
            digest=fields.string("digest", pattern="[0-9a-f]{64}"),
            starts=_counts(fields.take("starts"), path),
            refusals=_counts(fields.take("refusals"), path),
            size_bytes=fields.integer("size_bytes", low=0, high=1 << 80),
            durations=list(fields.items("durations", _number, low=len(BUCKETS) + 1, high=len(BUCKETS) + 1)),
            milliseconds=fields.integer("milliseconds", low=0, high=1 << 80),
            released=fields.integer("released", low=0, high=1 << 62),
            last_start=float(fields.take("last_start")),
        )
        fields.finish()
    except FileUnreadable as cause:
        raise FileUnreadable(cause.message, remedy=remedy) from cause
    except (TypeError, ValueError) as cause:
        raise FileUnreadable(f"{path}: {cause}", remedy=remedy) from cause
    return counters


def _counts(value: object, path: str) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > 2 * MAX_MODELS:
        raise FileUnreadable(f"{path} has no counts")
    return {str(name): _number(count) for name, count in value.items()}


def save_counters(audit_file: str, counters: Counters) -> None:
    """Keep what was counted.

    Raises:
        FileUnreadable: It cannot be written.
    """
    replace_file(state_path(audit_file), canonical(asdict(counters)), mode=0o600)


def update(counters: Counters, log: AuditLog) -> None:
    """Count the records that were not counted yet.

    Raises:
        AuditRefused: The chain is broken.
        AuditFailed: The log cannot be read.
    """
    if counters.sequence:
        verified = log.verified(after=counters.sequence - 1)
        for each in verified:
            if each.record["seq"] == counters.sequence and each.digest.hex() == counters.digest:
                return _count_all(counters, verified)
            if each.record["seq"] >= counters.sequence:
                break
    # Another log than the one that was counted, or one whose next records were removed: all that is there is new.
    return _count_all(counters, log.verified())


def _count_all(counters: Counters, verified: Iterable[Verified]) -> None:
    for each in verified:
        counters.count(each.record)
        counters.sequence, counters.digest = each.record["seq"], each.digest.hex()


@dataclass(frozen=True, slots=True)
class Resident:
    """What is in memory now.

    Attributes:
        model: `name:version`.
        size_bytes: What its mount takes.
    """

    model: str
    size_bytes: int


def expose(counters: Counters, resident: Sequence[Resident], *, store_models: int, version: str) -> str:
    """The text."""
    codes = {cls.__name__: str(code) for code, cls in all_errors().items()}
    refusals = [
        ({"reason": reason, "code": codes.get(reason, "0")}, count)
        for reason, count in sorted(counters.refusals.items())
    ]
    by_model: dict[str, int] = {}
    for each in resident:
        name = each.model if each.model in by_model or len(by_model) < MAX_MODELS else OTHER
        by_model[name] = by_model.get(name, 0) + each.size_bytes
    text = [
        _family("info", "gauge", "The version that wrote this.", [({"version": version}, 1)]),
        _family("starts_total", "counter", "Models delivered to containers.", _labelled("model", counters.starts)),
        _family("refusals_total", "counter", "Starts refused, by reason.", refusals),
        _histogram(counters),
        _family("delivered_bytes_total", "counter", "Plaintext delivered, bytes.", [({}, counters.size_bytes)]),
        _family(
            "released_total", "counter", "Models taken away before their container's end.", [({}, counters.released)]
        ),
        _family(
            "models_resident",
            "gauge",
            "Models in memory now, a shared copy once.",
            [({}, len(resident))],
        ),
        _family("resident_bytes", "gauge", "Memory that they take now, bytes.", _labelled("model", by_model)),
        _family("store_models", "gauge", "Models in the store.", [({}, store_models)]),
        _family("audit_sequence", "gauge", "Number of the last audit record counted.", [({}, counters.sequence)]),
        _family(
            "last_start_timestamp_seconds", "gauge", "When a model was last delivered.", [({}, counters.last_start)]
        ),
    ]
    return "".join(text)


def _labelled(name: str, counts: Mapping[str, int]) -> list[tuple[dict[str, str], float]]:
    return [({name: label}, count) for label, count in sorted(counts.items())]


def _histogram(counters: Counters) -> str:
    samples: list[tuple[str, dict[str, str], float]] = []
    total = 0
    for bound, count in zip((*BUCKETS, None), counters.durations, strict=True):
        total += count
        samples.append(("_bucket", {"le": "+Inf" if bound is None else str(bound)}, total))
    samples += [("_sum", {}, counters.milliseconds / 1000), ("_count", {}, total)]
    name, words = "scz_smm_start_seconds", "From the hook's beginning to a readable model."
    return f"# HELP {name} {words}\n# TYPE {name} histogram\n" + "".join(
        _sample(name + ending, labels, value) for ending, labels, value in samples
    )


def _family(name: str, kind: str, words: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    name = f"scz_smm_{name}"
    lines = "".join(_sample(name, labels, value) for labels, value in samples)
    return f"# HELP {name} {words}\n# TYPE {name} {kind}\n{lines}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    escaped = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{escaped}}} {value}\n" if escaped else f"{name} {value}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
