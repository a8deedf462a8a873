"""Benchmarks: `python -m tests.bench NAME`, `all` for the whole; `docs FILE` writes docs/performance.md from a run.

Each row is timed beside its baseline in the same rounds. What does not fit into memory or on the disk, and a program
that is not installed, is a line that says so. Files lie in one folder, which goes at the end, however that comes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tests.bench import hot_path, peers, report, shim, starts, startup
from tests.bench.noise import judge
from tests.bench.report import ROOT
from tests.bench.rows import FAILED, Row, failed
from tests.bench.starts import Stations
from tests.bench.workspace import GIB, Workspace, own_folder, progress

Benchmark = Callable[[Workspace, Stations], list[Row]]
BENCHMARKS: dict[str, Benchmark] = {
    "startup": lambda space, _: startup.measure(space),
    "hot-path": lambda space, _: hot_path.measure(space),
    "start": starts.measure_start,
    "second": starts.measure_second,
    "crowd": starts.measure_crowd,
    "peers": lambda space, _: peers.measure(space),
    "shim": lambda space, _: shim.measure(space),
    "sizes": lambda space, _: hot_path.measure_sizes(space),
    "memory": starts.measure_memory,
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def main() -> int:
    """Measure, print, write; 1 if a benchmark failed, 2 if none can begin, 130 if it was interrupted."""
    given = _parser().parse_args()
    if given.name == "docs":
        run = json.loads(Path(given.run or ROOT / "build/bench/bench.json").read_text())
        report.write_docs(run, ROOT / "docs")
        return 0
    if os.geteuid() != 0:
        print("the benchmarks mount file systems and start containers: run them as root", file=sys.stderr)
        return 2
    about = report.machine()
    # A shell's background job ignores an interrupt, and so would what it starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with own_folder(given.folder) as folder:
            space = _workspace(given, folder)
            chosen = BENCHMARKS if given.name == "all" else {given.name: BENCHMARKS[given.name]}
            rows = measure(chosen, space)
    except KeyboardInterrupt:
        print("interrupted: mounts, containers and files are gone", file=sys.stderr)
        return 130
    run = report.document(rows, judge(space.controls, rows), about, rounds=space.rounds)
    print(report.text(run), end="")
    for path, made in ((given.json, json.dumps(run, indent=2) + "\n"), (given.text, report.text(run))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made)
    if given.svg is not None:
        given.svg.mkdir(parents=True, exist_ok=True)
        for name, svg in report.plots(run).items():
            (given.svg / name).write_text(svg)
    return int(any(row.left_out.startswith(FAILED) for row in rows))


def measure(benchmarks: Mapping[str, Benchmark], space: Workspace) -> list[Row]:
    """The rows of all, in this order: what fails is a row that says so, and the others' results are not lost."""
    rows: list[Row] = []
    space.look_at_the_machine()
    try:
        with ExitStack() as stack:
            stations = Stations(space, stack)
            for name, benchmark in benchmarks.items():
                space.say(f"--- {name}")
                before = len(space.controls) - 1
                try:
                    measured = benchmark(space, stations)
                except Exception as error:
                    measured = [Row(name, name, left_out=failed(error))]
                    space.say("".join(traceback.format_exception(error)))
                space.look_at_the_machine()
                rows += [replace(row, controls=tuple(space.controls[before:])) for row in measured]
    except Exception as error:  # of the scene, when it ends
        rows.append(Row("end", "the end of the scene", left_out=failed(error)))
    return rows


def _workspace(given: argparse.Namespace, folder: Path) -> Workspace:
    size = given.size[0] if given.size else GIB
    sizes = given.size or ([10**7, GIB] if given.quick else [10**7, 10**8, GIB, 8 * GIB])
    containers = given.containers or ([1, 4, 16] if given.quick else [1, 2, 4, 8, 16, 32])
    return Workspace(
        folder=folder,
        rounds=given.rounds or (3 if given.quick else 5),
        sizes=tuple(sorted(set(sizes))),
        containers=tuple(sorted(set(containers))),
        size=size,
        crowd_size=min(size, 64 << 20),
        say=progress,
        **{} if given.spare is None else {"memory_spare_bytes": given.spare, "disk_spare_bytes": given.spare},
    )


def _size(text: str) -> int:
    digits = text.rstrip("KMGiB")
    return int(digits) * _UNITS[text[len(digits) :]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=["all", "docs", *BENCHMARKS])
    parser.add_argument("run", nargs="?", help="docs: the JSON of a run (default: build/bench/bench.json)")
    parser.add_argument("--rounds", type=int, help="of each row; the rows take turns in each (default: 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, at most 1 GiB, fewer containers")
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        help="of the model, such as 100MB or 2GiB; again for more sizes in `sizes` and `memory` (default: 1GiB)",
    )
    parser.add_argument("--containers", type=int, action="append", help="started at once in `crowd`; may be repeated")
    parser.add_argument(
        "--spare",
        type=_size,
        help="what a benchmark leaves free, or it is left out (default: 1.5 GiB of memory, 2 GiB of disk)",
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for the files (default: /var/tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run as JSON")
    parser.add_argument("--text", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="write the plots")
    return parser


if __name__ == "__main__":
    sys.exit(main())
