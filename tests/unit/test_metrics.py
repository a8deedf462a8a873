"""`metrics`: counted once each, whatever happens to the log; a text that a strict parser of Prometheus' format takes.

The parser is our own, written from the specification of the text format 0.0.4: neither promtool nor a library is here.
"""

from __future__ import annotations

import grp
import json
import math
import os
import re
from pathlib import Path

import pytest

from oci_hook import metrics
from oci_hook.audit import AuditLog
from oci_hook.metrics import BUCKETS, MAX_MODELS, Counters, Resident, expose, load_counters, update
from tests.commands import Household, done, misused, refused, snapshot

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
_LINE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? ([0-9.e+-]+|[+-]Inf|NaN)")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> tuple[Samples, dict[str, str]]:
    """Every sample, and each family's type.

    Raises:
        AssertionError: It is not of the format: a family without help and type before it or in two places, a sample of
            another family, one that is there twice, a name or label or value that is none, a histogram that is none.
    """
    samples: Samples = {}
    kinds: dict[str, str] = {}
    family, helped = "", ""
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            helped = line.split(" ", 3)[2]
            assert helped not in kinds, f"{helped} is there twice"
            assert re.fullmatch(_NAME, helped)
        elif line.startswith("# TYPE "):
            family, kind = line.split(" ")[2:]
            assert family == helped, "a type without help"
            assert kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == family.endswith("_total")
            kinds[family] = kind
        else:
            found = _LINE.fullmatch(line)
            assert found is not None, line
            endings = ("_bucket", "_sum", "_count") if kinds[family] == "histogram" else ("",)
            assert found[1] in {family + ending for ending in endings}, line
            labels = found[2] or ""
            pairs = tuple((m[1], unescaped(m[2])) for m in _LABEL.finditer(labels))
            assert "".join(m[0] for m in _LABEL.finditer(labels)) == labels, line
            assert (found[1], pairs) not in samples, f"{line} is there twice"
            samples[found[1], pairs] = float(found[3])
    for name in [name for name, kind in kinds.items() if kind == "histogram"]:
        buckets = [(dict(pairs)["le"], value) for (each, pairs), value in samples.items() if each == f"{name}_bucket"]
        bounds = [math.inf if bound == "+Inf" else float(bound) for bound, _ in buckets]
        counts = [value for _, value in buckets]
        assert bounds == sorted(bounds)
        assert bounds[-1] == math.inf
        assert counts == sorted(counts)
        assert counts[-1] == samples[f"{name}_count", ()]
    return samples, kinds


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


@pytest.mark.parametrize(
    "wrong",
    [
        "scz_x_total 1\n",
        "# HELP a b\n# TYPE a gauge\na 1",
        "# HELP a b\n# TYPE a gauge\nb 1\n",
        "# HELP a b\n# TYPE a gauge\na 1\na 2\n",
        '# HELP a b\n# TYPE a gauge\na{x="1"y="2"} 1\n',
        '# HELP a b\n# TYPE a gauge\na{x="\n"} 1\n',
        '# HELP a b\n# TYPE a gauge\na{x="""} 1\n',
        "# HELP a b\n# TYPE a counter\na 1\n",
        '# HELP a b\n# TYPE a histogram\na_bucket{le="1.0"} 2\na_bucket{le="+Inf"} 1\na_sum 1\na_count 1\n',
    ],
)
def test_the_parser_is_strict(wrong: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        parse(wrong)


def test_the_text() -> None:
    counters = Counters(sequence=9, starts={'a"\\\n:1': 2, "b:1": 1}, refusals={"BootStateRefused": 3, "other": 1})
    for milliseconds in (100, 250, 251, 400_000):
        counters.count({"event": "outcome", "model": "b:1", "bytes": 10, "milliseconds": milliseconds, "time": NOW})
    text = expose(counters, [Resident("b:1", 5), Resident("b:1", 6)], store_models=4, version="9")
    samples, kinds = parse(text)
    assert samples["scz_smm_starts_total", (("model", 'a"\\\n:1'),)] == 2
    assert samples["scz_smm_starts_total", (("model", "b:1"),)] == 5
    assert samples["scz_smm_refusals_total", (("reason", "BootStateRefused"), ("code", "35"))] == 3
    assert samples["scz_smm_refusals_total", (("reason", "other"), ("code", "0"))] == 1
    buckets = [samples["scz_smm_start_seconds_bucket", (("le", str(bound)),)] for bound in (*BUCKETS, "+Inf")]
    assert buckets == [2, *[3] * (len(BUCKETS) - 1), 4]
    assert samples["scz_smm_start_seconds_sum", ()] == 400.601
    assert samples["scz_smm_delivered_bytes_total", ()] == 40
    assert samples["scz_smm_models_resident", ()] == 2
    assert samples["scz_smm_resident_bytes", (("model", "b:1"),)] == 11
    assert samples["scz_smm_store_models", ()] == 4
    assert samples["scz_smm_audit_sequence", ()] == 9
    assert samples["scz_smm_last_start_timestamp_seconds", ()] == 1767225600
    assert samples["scz_smm_info", (("version", "9"),)] == 1
    assert len(kinds) == 11


NOW = "2026-01-01T00:00:00.000Z"


def test_labels_are_bounded() -> None:
    counters = Counters()
    for number in range(MAX_MODELS + 50):
        counters.count({"event": "outcome", "model": f"m{number}:1", "time": NOW})
        counters.count({"event": "refused", "reason": f"r{number}"})
    resident = [Resident(f"m{number}:1", 1) for number in range(MAX_MODELS + 50)]
    samples, _ = parse(expose(counters, resident, store_models=0, version="1"))
    assert samples["scz_smm_starts_total", (("model", "other"),)] == 50
    assert samples["scz_smm_resident_bytes", (("model", "other"),)] == 50
    assert counters.refusals == {"other": MAX_MODELS + 50}
    assert len(samples) < 2 * MAX_MODELS + 50


# --- sczctl metrics ---------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Household:
    return Household(tmp_path)


@pytest.fixture
def log(house: Household) -> AuditLog:
    made = AuditLog(str(house.host / "log" / "audit.jsonl"))
    start(made)
    made.append("refused", container="b", model="x" * 90, code=35, reason="BootStateRefused")
    return made


def start(log: AuditLog) -> None:
    log.append("grant", container="a", model="small", version="1")
    log.append("outcome", container="a", model="small:1, other:2", code=0, bytes=7, milliseconds=300)


def written(house: Household) -> Samples:
    path = house.host / "scz-smm.prom"
    assert done(house.ctl("metrics", "--output", path)).out == ""
    return parse(path.read_text())[0]


SMALL = ("scz_smm_starts_total", (("model", "small:1"),))
SEQUENCE = ("scz_smm_audit_sequence", ())


def test_printing_changes_nothing(house: Household, log: AuditLog) -> None:
    before = snapshot(house.host)
    printed = parse(done(house.ctl("metrics")).out)[0]
    assert (printed[SMALL], printed[SEQUENCE]) == (1, 3)
    shown = done(house.ctl("metrics", "--json")).json
    assert shown["refusals"] == {"BootStateRefused": 1}
    assert (shown["bytes"], shown["sequence"]) == (7, 3)
    assert snapshot(house.host) == before
    assert parse(done(house.ctl("metrics")).out)[0] == printed


def test_on_a_host_where_nothing_happened(house: Household) -> None:
    samples = parse(done(house.ctl("metrics")).out)[0]
    assert samples[SEQUENCE] == 0
    refused(house.ctl("metrics", "--output", house.host / "x.prom"), 68, "install -d")
    assert not (house.host / "x.prom").exists()


def test_counters_never_go_back_and_count_nothing_twice(house: Household, log: AuditLog) -> None:
    folder = house.host / "log"
    assert written(house)[SMALL] == 1
    assert written(house)[SMALL] == 1
    start(log)
    log.rotate()
    start(log)
    assert (written(house)[SMALL], written(house)[SEQUENCE]) == (3, 8)
    for old in folder.glob("audit.jsonl.0*"):  # removed by logrotate, after it was counted
        old.unlink()
    assert written(house)[SMALL] == 3
    start(log)
    assert written(house)[SMALL] == 4
    start(log)
    log.rotate()
    start(log)
    for old in folder.glob("audit.jsonl.0*"):  # before it was counted: what is left is counted
        old.unlink()
    assert written(house)[SMALL] == 5
    for file in folder.glob("audit.jsonl*"):  # another log altogether
        file.unlink()
    assert written(house)[SMALL] == 5
    for _ in range(10):
        start(log)
    assert (written(house)[SMALL], written(house)[SEQUENCE]) == (15, 20)


def test_the_file_is_whole_and_for_one_group(house: Household, log: AuditLog) -> None:
    path = house.host / "scz-smm.prom"
    done(house.ctl("metrics", "--output", path, "--group", "daemon"))
    found = path.stat()
    assert (found.st_mode & 0o777, found.st_gid) == (0o640, grp.getgrnam("daemon").gr_gid)
    assert sorted(os.listdir(house.host)) == ["config.toml", "log", "scz-smm.prom"]
    before = path.read_bytes()
    audit = house.host / "log" / "audit.jsonl"
    audit.write_bytes(audit.read_bytes().replace(b"small", b"smale", 1))
    refused(house.ctl("metrics", "--output", path), 54)
    assert path.read_bytes() == before
    misused(house.ctl("metrics", "--group", "nobody-has-this"), "no group")


@pytest.mark.parametrize(
    "damage",
    [b"{", b"{}", b'{"sequence":-1}', json.dumps({**metrics.asdict(Counters()), "starts": []}).encode(),
     json.dumps({**metrics.asdict(Counters()), "last_start": "x"}).encode(),
     json.dumps({**metrics.asdict(Counters()), "durations": [1]}).encode()],
)  # fmt: skip
def test_damaged_counts(house: Household, log: AuditLog, damage: bytes) -> None:
    state = house.host / "log" / "metrics.json"
    state.write_bytes(damage)
    refused(house.ctl("metrics"), 68, f"remove {state}")


def test_counts_are_kept_as_they_are(house: Household, log: AuditLog) -> None:
    counters = Counters()
    update(counters, log)
    metrics.save_counters(log.path, counters)
    assert load_counters(log.path) == counters
    assert (house.host / "log" / "metrics.json").stat().st_mode & 0o777 == 0o600
