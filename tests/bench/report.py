"""What a run gives: text, JSON, plots, and the section of docs/performance.md that is made of them."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cryptography

from tests.bench.noise import Noise
from tests.bench.plot import Bar, Line, bar_plot, line_plot
from tests.bench.rows import Row, number, row_of, sized, table

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "scz-smm/bench/v2"
BEGIN, END = (
    "<!-- made by `python -m tests.bench docs`: begin -->",
    "<!-- made by `python -m tests.bench docs`: end -->",
)
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PLOTS = {
    "sizes": "Time by the size of the model",
    "crowd": "Time by the number of containers",
    "memory": "Memory of the models, by the number of containers of one model",
    "peers": "Other programs that decrypt the same file",
}


def commit(folder: Path = ROOT) -> str:
    """What is measured, as git calls it for short; with `-dirty` where tracked files differ from it.

    Args:
        folder: The top of a clone.

    Returns:
        `unknown` where git does not say: no clone, or no git.
    """
    if not (folder / ".git").exists():  # git would look further up
        return "unknown"
    # Root may measure another user's clone, whose programs it runs as well.
    command = ["git", "-c", f"safe.directory={folder}", "-C", str(folder)]
    command += ["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, Any]:
    """When and what was measured, and on what; no names."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory_gib": round(memory / (1 << 30)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cryptography": cryptography.__version__,
        "load_before": round(os.getloadavg()[0], 1),
    }


def document(rows: Sequence[Row], noise: Noise, about: Mapping[str, Any], *, rounds: int) -> dict[str, Any]:
    """A run as JSON."""
    return {
        "schema": SCHEMA,
        "machine": dict(about),
        "rounds": rounds,
        "controls": [asdict(control) for control in noise.controls],
        "noisy": bool(noise.reasons),
        "verdict": noise.verdict,
        "rows": [row.document() for row in rows],
    }


def text(run: Mapping[str, Any]) -> str:
    """A run as a table."""
    about = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    head = [about, f"machine: {run['verdict']}", ""]
    return "\n".join([*head, *table([row_of(row) for row in run["rows"]])]) + "\n"


def plots(run: Mapping[str, Any]) -> dict[str, str]:
    """The SVGs of a run, by the names of their files; none where nothing of a series was measured."""
    rows = [row_of(row) for row in run["rows"]]
    made = {
        "sizes": _sizes([row for row in rows if row.series in ("sizes", "starts") and row.rounds]),
        "crowd": _crowd([row for row in rows if row.series == "crowd" and row.rounds]),
        "memory": _memory([row for row in rows if row.series == "crowd-memory" and row.rounds]),
        "peers": _peers([row for row in rows if row.series == "peers" and row.rounds]),
    }
    return {f"performance-{name}.svg": svg for name, svg in made.items() if svg}


def _sizes(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    fills = [row for row in rows if row.series == "sizes"]
    starts = [row for row in rows if row.series == "starts"]
    lines = [_line("the whole hook", starts), _line("decrypt + place", fills), _baseline("cp, huge-page tmpfs", fills)]
    return line_plot(
        _PLOTS["sizes"],
        [line for line in lines if line.points],
        x_label="model, bytes of plaintext",
        y_label="milliseconds",
        x_text=lambda value: sized(int(value)),
    )


def _crowd(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return line_plot(
        _PLOTS["crowd"],
        [_line("with the model", rows), _baseline("without a hook", rows)],
        x_label="containers started at once",
        y_label="milliseconds until all have read it",
        x_text=lambda value: f"{value:g}",
    )


def _memory(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return line_plot(
        _PLOTS["memory"],
        [_line("all of them", rows), _baseline("one copy", rows)],
        x_label="containers of one model at once",
        y_label="MiB of memory file systems",
        x_text=lambda value: f"{value:g}",
    )


def _peers(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    bars = [Bar("ours", 1.0, "1 – AES-256-GCM, every segment")]
    for row in sorted(rows, key=lambda row: row.ratio or 0):
        bars.append(Bar(row.name.split(": ")[-1], row.ratio or 0, f"{number(row.ratio)} – {row.checks}"))
    return bar_plot(f"{_PLOTS['peers']}, × ours", bars, x_label="time ÷ ours; and what authenticates the result")


def _line(name: str, rows: Sequence[Row]) -> Line:
    return Line(name, _points(rows, "median"), _points(rows, "minimum"))


def _baseline(name: str, rows: Sequence[Row]) -> Line:
    return Line(name, _points(rows, "baseline_median"), _points(rows, "baseline_minimum"))


def _points(rows: Sequence[Row], attribute: str) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((float(row.size or 0), getattr(row, attribute)) for row in rows))


def markdown(run: Mapping[str, Any]) -> str:
    """The section of the document: machine, verdict, table, plots."""
    about = run["machine"]
    lines = [
        f"Measured {about['date'][:10]} at commit {about['commit']} on {about['cores']} cores "
        f"({about['processor']}) shared with other work, {about['memory_gib']} GiB of memory, "
        f"kernel {about['kernel']}, Python {about['python']}, cryptography {about['cryptography']}; "
        f"{run['rounds']} rounds. The machine: {run['verdict']}.",
        "",
        "| what | median | minimum | baseline: median, minimum | ratio | by minima | target | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row_of(row) for row in run["rows"]]
    lines += [_markdown_row(row, run["rounds"]) for row in rows if row.series != "peers"]
    peers = [row for row in rows if row.series == "peers"]
    if peers:
        lines += ["", "| peer | median | minimum | ÷ ours | by minima | authenticates what it writes? |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_markdown_peer(row) for row in peers]
    lines += _for_an_operator({row.key: row for row in rows})
    notes = [f"- {row.name}: {row.note}." for row in rows if row.note and not row.left_out]
    lines += ["", "Notes:", "", *notes] if notes else []
    for name in plots(run):
        title = _PLOTS[name.removeprefix("performance-").removesuffix(".svg")]
        lines += ["", f"![{title}]({name})"]
    return "\n".join(lines) + "\n"


def _for_an_operator(rows: Mapping[str, Row]) -> list[str]:
    """What the numbers say of a start: what is there before the first byte, what each GiB adds, and memory."""
    said = []
    checks, whole = rows.get("start.1"), rows.get("start.hook")
    if checks and whole and whole.size and checks.minimum is not None and whole.minimum is not None:
        each = (whole.minimum - checks.minimum) / whole.size
        text = f"- A start takes {number(checks.minimum)} ms before the first byte of a model"
        if each > 0:
            text += f", and {number(each * (1 << 30))} ms more for each GiB; both cost the same at "
            text += f"{number(checks.minimum / each / 1e6)} MB (minima)"
        said.append(text + ".")
    hook = rows.get("memory.hook")
    if hook and hook.size and hook.median is not None:
        said.append(
            f"- Beside the model itself a start takes {number(hook.median)} MiB of memory while it lasts, at "
            f"{sized(hook.size)} as at 1 byte ({number(hook.baseline_median)} MiB)."
        )
    for row in rows.values():
        if row.verdict.startswith("missed"):
            unit = "" if row.judged == "ratio" else f" {row.unit}"
            noisy = "; noisy" if row.noisy else ""
            said.append(
                f"- Missed: {row.name}: {number(row.value)}{unit}, by minima {number(row.best)}{unit}, for at most "
                f"{row.target:g}{unit}{noisy}."
            )
    return ["", "In short:", "", *said] if said else []


def _markdown_row(row: Row, usual_rounds: int) -> str:
    if row.left_out:
        return f"| {row.name} | left out: {row.left_out} | | | | | | |"
    target = "" if row.target is None else f"≤ {row.target:g}" + ("" if row.judged == "ratio" else f" {row.unit}")
    against = f"{row.baseline}: {number(row.baseline_median)}, {number(row.baseline_minimum)}"
    if row.judged == "difference":
        against += f"; difference {number(row.value)}, by minima {number(row.best)}"
    verdict = row.verdict + (", noisy" if row.noisy and row.verdict else "")
    rounds = "" if row.rounds == usual_rounds else f" ({row.rounds} rounds)"
    cells = [row.name + rounds, f"{number(row.median)} {row.unit}", f"{number(row.minimum)} {row.unit}", against]
    return "| " + " | ".join([*cells, number(row.ratio), number(row.ratio_minimum), target, verdict]) + " |"


def _markdown_peer(row: Row) -> str:
    if row.left_out:
        return f"| {row.name} | {row.left_out} | | | | {row.checks} |"
    cells = [row.name, f"{number(row.median)} ms", f"{number(row.minimum)} ms"]
    return "| " + " | ".join([*cells, number(row.ratio), number(row.ratio_minimum), row.checks]) + " |"


def write_docs(run: Mapping[str, Any], folder: Path) -> None:
    """Write the plots beside docs/performance.md, and the section between its marks.

    Raises:
        ValueError: The marks are not there, once each; or the run is another version's, and does not say all that the
            section does.
    """
    if run.get("schema") != SCHEMA:
        raise ValueError(f"the run is no {SCHEMA}: measure again")
    page = folder / "performance.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the marks between which the section lies")
    for name, svg in plots(run).items():
        (folder / name).write_text(svg)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(run)}\n{END}{after}")
