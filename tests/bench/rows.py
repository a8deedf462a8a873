"""One line of the table: a result, its baseline of the same rounds, its target, and whether it is met. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.timing import Samples

#: Of a baseline, median ÷ minimum: above, its row cannot be judged by its median.
NOISY_SPREAD = 1.3
#: Two processes have to do this much more work than one, and to get as much CPU time for each second.
LEAST_GAIN = 1.6
#: They cannot do more than twice the work: above, the one was disturbed.
MOST_GAIN = 2.2
#: A process that runs alone has to get this much CPU time for each second.
LEAST_ALONE = 0.9
#: How `left_out` begins where something did not work that should have.
FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Control:
    """One look at the machine: a process that only computes, and then two of them for as long.

    The gain alone would not do: with N others that compute all the time on two cores it is 2(N+1)/(N+2), nearly two
    where they are many. The CPU time shows them.

    Attributes:
        gain: Work of the two ÷ work of the one.
        alone: CPU time of the one ÷ wall time: cores that it got.
        together: The same of the two, added up.
    """

    gain: float
    alone: float
    together: float

    @property
    def reason(self) -> str:
        """Why others used the cores at that time; empty if they did not."""
        if self.alone < LEAST_ALONE:
            return f"one process got {self.alone:.2f} of a core"
        if self.together < LEAST_GAIN:
            return f"two processes got {self.together:.2f} cores"
        if not LEAST_GAIN <= self.gain <= MOST_GAIN:
            return f"two processes did {self.gain:.2f} times the work of one"
        return ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line.

    Attributes:
        key: Names it in JSON; unique in a run.
        name: For people.
        unit: Of `median`, `minimum` and the baseline's.
        rounds: How many values there are of it and of its baseline; 0 if it was left out.
        baseline: What the baseline is.
        ratio: The median of each round's result ÷ its baseline.
        ratio_minimum: The minimum ÷ the baseline's minimum.
        spread: Of the baseline: median ÷ minimum.
        controls: Those before, during and after its benchmark.
        judged: What the target speaks of: `ratio`, `median` or `difference` (result − baseline).
        target: At most this; None: there is none.
        size: Bytes of plaintext, or containers; of what a row of a series was measured at.
        series: The series of a plot, if it is of one.
        checks: For a program that decrypts: whether what it writes is authenticated, and by what.
        note: What a reader has to know.
        left_out: Why there is no result.
    """

    key: str
    name: str
    unit: str = "ms"
    rounds: int = 0
    median: float | None = None
    minimum: float | None = None
    baseline: str = ""
    baseline_median: float | None = None
    baseline_minimum: float | None = None
    ratio: float | None = None
    ratio_minimum: float | None = None
    spread: float | None = None
    controls: tuple[Control, ...] = ()
    judged: str = "ratio"
    target: float | None = None
    size: int | None = None
    series: str = ""
    checks: str = ""
    note: str = ""
    left_out: str = ""

    @property
    def value(self) -> float | None:
        """What the target speaks of, by medians."""
        return self._judged(self.ratio, self.median, self.baseline_median)

    @property
    def best(self) -> float | None:
        """The same by minima."""
        return self._judged(self.ratio_minimum, self.minimum, self.baseline_minimum)

    def _judged(self, ratio: float | None, own: float | None, baseline: float | None) -> float | None:
        if self.judged == "difference":
            return None if own is None or baseline is None else own - baseline
        return ratio if self.judged == "ratio" else own

    @property
    def noisy(self) -> bool:
        """Whether the baseline varied too much to judge by medians, or others used the cores at that time."""
        return self.unit == "ms" and bool(
            (self.spread and self.spread > NOISY_SPREAD) or any(control.reason for control in self.controls)
        )

    @property
    def verdict(self) -> str:
        """`met`, `met by minima`, `missed`, or nothing where there is no target or no result."""
        if self.target is None or self.value is None or self.best is None:
            return ""
        if self.value <= self.target:
            return "met"
        return "met by minima" if self.best <= self.target else "missed"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"value": self.value, "best": self.best, "verdict": self.verdict, "noisy": self.noisy}


def make_row(
    key: str,
    name: str,
    own: Samples,
    baseline: Samples,
    *,
    against: str,
    factor: float = 1e3,
    **more: Any,
) -> Row:
    """A line from two sets of samples of the same rounds.

    Args:
        key: See `Row`.
        name: See `Row`.
        own: In seconds or, with `factor` 1, in the row's unit.
        baseline: The same.
        against: What the baseline is.
        factor: From the samples' unit to the row's.
        more: Further attributes of `Row`.
    """
    zero = baseline.minimum <= 0
    return Row(
        key=key,
        name=name,
        rounds=len(own.values),
        median=own.median * factor,
        minimum=own.minimum * factor,
        baseline=against,
        baseline_median=baseline.median * factor,
        baseline_minimum=baseline.minimum * factor,
        ratio=None if zero else own.over(baseline),
        ratio_minimum=None if zero else own.minimum / baseline.minimum,
        spread=baseline.spread,
        **more,
    )


def failed(error: Exception) -> str:
    """What `left_out` says of something that did not work that should have: one line.

    Raises:
        KeyboardInterrupt: It came of cleaning up after one, which is not to be lost.
    """
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        before = before.__context__
    said = [f"{FAILED}: {type(error).__name__}: {error}"]
    if stderr := getattr(error, "stderr", None):  # of a program
        said.append((stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr)[-800:])
    return " ".join(" ".join(said).split())


def row_of(document: Mapping[str, Any]) -> Row:
    """A line from its JSON."""
    known = {name: document[name] for name in Row.__dataclass_fields__ if name in document}
    return Row(**known | {"controls": tuple(Control(**control) for control in document.get("controls", ()))})


def sized(size_bytes: int) -> str:
    """A size for people: 8 GiB, 100 MB, 300 bytes."""
    if size_bytes == 1:
        return "1 byte"
    for unit, name in ((1 << 30, "GiB"), (10**9, "GB"), (1 << 20, "MiB"), (10**6, "MB"), (1 << 10, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes} bytes"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text: a head, then each row on one line, its baseline and note below it."""
    lines = [f"{'':<56}{'median':>10}{'min':>10}{'':>5}{'ratio':>8}{'by min':>8}{'target':>9}  verdict"]
    for row in rows:
        if row.left_out:
            lines += [f"{row.name:<56}  left out: {row.left_out}"]
            continue
        target = "" if row.target is None else f"≤ {row.target:g}"
        verdict = row.verdict + (" (noisy)" if row.noisy else "")
        lines += [
            f"{row.name:<56}{number(row.median):>10}{number(row.minimum):>10}{row.unit:>5}{number(row.ratio):>8}"
            f"{number(row.ratio_minimum):>8}{target:>9}  {verdict}"
        ]
        about = f"    against {row.baseline}: {number(row.baseline_median)}, {number(row.baseline_minimum)} {row.unit}"
        about += "" if row.judged != "difference" else f"; difference {number(row.value)}, by minima {number(row.best)}"
        about += f"; authenticates: {row.checks}" if row.checks else ""
        lines += [about + f"; rounds: {row.rounds}" + (f"; {row.note}" if row.note else "")]
    return lines


def number(value: float | None) -> str:
    """Three figures that matter."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
