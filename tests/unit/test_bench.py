"""The benchmarks' arithmetic, verdicts and documents; what they measure is `tests/integration/test_benchmarks.py`'s."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.bench import report, workspace
from tests.bench.__main__ import Benchmark, measure
from tests.bench.noise import Noise, control, judge
from tests.bench.plot import Bar, Line, bar_plot, line_plot
from tests.bench.rows import Control, Row, failed, make_row, number, row_of, sized, table
from tests.bench.starts import Stations
from tests.bench.timing import Samples, take_turns
from tests.bench.workspace import Workspace, lack, own_folder

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
ABOUT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789-dirty",
    "cores": 2,
    "processor": "a <processor>",
    "memory_gib": 24,
    "kernel": "6",
    "python": "3",
    "cryptography": "50",
}
QUIET = Control(gain=1.95, alone=0.99, together=1.97)
TEXT = "{http://www.w3.org/2000/svg}text"


def row(key: str = "k", own: tuple[float, ...] = (1, 2), baseline: tuple[float, ...] = (2, 2), **more: object) -> Row:
    return make_row(key, f"name of {key}", Samples(own), Samples(baseline), against="cp", **more)  # type: ignore[arg-type]


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, rounds=1, sizes=(1,), containers=(1,), size=1, crowd_size=1, say=lambda _line: None)


class TestStatistics:
    def test_median_minimum_spread(self) -> None:
        samples = Samples((4.0, 1.0, 2.0))
        assert (samples.median, samples.minimum, samples.spread) == (2.0, 1.0, 2.0)

    def test_a_quotient_is_of_each_round(self) -> None:
        """A round in which everything took ten times as long changes nothing."""
        assert Samples((1, 10, 1)).over(Samples((2, 20, 2))) == 0.5

    def test_turns_are_taken_and_turned_round(self) -> None:
        order: list[str] = []

        def act(name: str) -> float:
            order.append(name)
            return float(len(order))

        found = take_turns({name: lambda name=name: act(name) for name in "abc"}, 2)  # type: ignore[misc]
        assert order == list("abccba")
        assert found["a"].values == (1, 6)

    def test_a_baseline_of_nothing_gives_no_quotient(self) -> None:
        made = row(baseline=(0, 1))
        assert (made.ratio, made.ratio_minimum, made.spread) == (None, None, 1.0)


class TestRows:
    @pytest.mark.parametrize(
        ("own", "baseline", "judged", "target", "verdict"),
        [
            ((1, 1, 1), (2, 2, 2), "ratio", 0.5, "met"),
            ((1, 3, 3), (2, 2, 2), "ratio", 0.5, "met by minima"),
            ((3, 3, 3), (2, 2, 2), "ratio", 0.5, "missed"),
            ((0.004, 0.004), (1, 1), "median", 4, "met"),
            ((0.015, 0.015), (0.010, 0.010), "difference", 5, "met"),
            ((0.016, 0.016), (0.010, 0.010), "difference", 5, "missed"),
            ((1,), (2,), "ratio", None, ""),
        ],
    )
    def test_verdict(
        self, own: tuple[float, ...], baseline: tuple[float, ...], judged: str, target: float | None, verdict: str
    ) -> None:
        assert row(own=own, baseline=baseline, judged=judged, target=target).verdict == verdict

    def test_seconds_become_milliseconds(self) -> None:
        made = row(own=(0.002, 0.004), baseline=(0.001, 0.001))
        assert (made.median, made.minimum, made.baseline_median, made.unit) == (3.0, 2.0, 1.0, "ms")

    def test_a_baseline_that_varies_is_noisy(self) -> None:
        assert row(own=(1, 1, 1), baseline=(1, 2, 2)).noisy
        assert not row(own=(1, 1, 1), baseline=(2, 2, 2.5)).noisy

    @pytest.mark.parametrize(
        ("size", "shown"),
        [(8 * GIB, "8 GiB"), (10**8, "100 MB"), (1, "1 byte"), (1234, "1234 bytes"), (64 << 20, "64 MiB")],
    )
    def test_sizes_for_people(self, size: int, shown: str) -> None:
        assert sized(size) == shown

    def test_figures(self) -> None:
        assert [number(value) for value in (None, 1234.5, 12.34, 0.123)] == ["–", "1234", "12.3", "0.12"]

    def test_the_table_has_every_row_and_its_baseline(self) -> None:
        shown = "\n".join(
            table([row("a", target=1.0, note="noted", checks="a tag"), Row("b", "left", left_out="no room")])
        )
        for words in ("name of a", "against cp", "≤ 1", "noted", "authenticates: a tag", "left out: no room"):
            assert words in shown

    def test_json_round_trip(self) -> None:
        made = row(target=1.0, size=GIB, series="sizes", controls=(QUIET, Control(1.4, 0.8, 1.1)))
        assert row_of(json.loads(json.dumps(made.document()))) == made


def steady(others: int) -> Control:
    """What a control shows on two cores that a fair scheduler shares with so many processes that never sleep."""
    alone, together = min(1.0, 2 / (others + 1)), 2 * min(1.0, 2 / (others + 2))
    return Control(gain=together / alone, alone=alone, together=together)


class TestControl:
    @pytest.mark.parametrize("others", [1, 2, 3, 4, 8, 30, 300])
    def test_steady_load_is_seen_however_good_the_gain_looks(self, others: int) -> None:
        assert steady(others).reason

    def test_steady_load_and_the_gain(self) -> None:
        assert steady(0) == Control(2.0, 1.0, 2.0)
        assert [steady(others).gain for others in (4, 30)] == pytest.approx([10 / 6, 62 / 32])

    @pytest.mark.parametrize(
        ("control", "reason"),
        [
            (Control(2.0, 1.0, 2.0), ""),
            (Control(1.6, 0.9, 1.6), ""),
            (Control(2.2, 0.9, 1.99), ""),
            (Control(2.0, 0.89, 1.98), "one process got 0.89 of a core"),
            (Control(1.7, 1.0, 1.59), "two processes got 1.59 cores"),
            (Control(2.21, 1.0, 2.0), "two processes did 2.21 times the work of one"),
            (Control(1.3, 1.0, 2.0), "two processes did 1.30 times the work of one"),
        ],
    )
    def test_reason(self, control: Control, reason: str) -> None:
        assert control.reason == reason

    def test_it_sees_others_that_compute(self) -> None:
        """Four times as many as there are cores: whatever else runs, what a control gets is only less."""
        hogs = [
            subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
            for _ in range(4 * (os.cpu_count() or 1))
        ]
        try:
            for hog in hogs:
                assert hog.stdout is not None
                assert hog.stdout.readline() == b"\n"
            seen = control()
        finally:
            for hog in hogs:
                hog.kill()
                hog.communicate()
        assert seen.gain > 0
        assert 0 < seen.alone < 0.9
        assert "of a core" in seen.reason


class TestNoise:
    def test_a_quiet_machine(self) -> None:
        assert judge([QUIET, QUIET], [row(), row(baseline=(1, 1.1))]).spreads == (1.0, 1.05)
        noise = Noise((QUIET, steady(2), QUIET), (1.0, 1.1, 1.9), 2)
        assert noise.reasons == ()
        assert "1.50 to 1.95 times the work of one, which gets 0.67 to 0.99 of a core" in noise.verdict

    @pytest.mark.parametrize("others", [1, 2, 8, 30])
    def test_a_row_is_noisy_if_others_used_the_cores(self, others: int) -> None:
        assert replace(row(), controls=(QUIET, steady(others))).noisy
        assert not replace(row(), controls=(QUIET, QUIET)).noisy

    def test_a_row_is_noisy_if_two_did_more_than_twice_the_work_of_one(self) -> None:
        assert replace(row(), controls=(replace(QUIET, gain=2.6),)).noisy

    @pytest.mark.parametrize(
        ("noise", "word"),
        [
            (Noise((steady(1), steady(2), QUIET), (1.0,), 2), "2 of 3 controls"),
            (Noise((steady(30), steady(30), steady(30)), (1.0,), 2), "3 of 3 controls"),
            (Noise((replace(QUIET, gain=2.6), QUIET), (1.0,), 2), "1 of 2 controls"),
            (Noise((QUIET,), (1.0, 1.4, 1.5), 2), "2 of 3 baselines"),
            (Noise((QUIET,), (1.0,), 1), "one core"),
        ],
    )
    def test_too_noisy(self, noise: Noise, word: str) -> None:
        assert word in noise.reasons[0]
        assert noise.verdict.startswith("TOO NOISY TO JUDGE")


class TestPlots:
    def test_lines(self) -> None:
        points = ((1e7, 12.0), (float(GIB), 150.0), (8.0 * GIB, 1200.0))
        svg = line_plot(
            "cost & size",
            [Line("ours <1>", points, points), Line("cp", points)],
            x_label="bytes",
            y_label="milliseconds",
            x_text=lambda value: sized(int(value)),
        )
        root = ElementTree.fromstring(svg)
        said = {element.text for element in root.iter(TEXT)}
        assert said >= {
            "cost & size",
            "ours <1>",
            "cp",
            "bytes",
            "milliseconds",
            "10 MB",
            "1 GiB",
            "8 GiB",
            "10",
            "10,000",
        }
        places = [float(element.get("cx", "-1")) for element in root.iter("{http://www.w3.org/2000/svg}circle")]
        assert all(0 <= place <= 760 for place in places)

    def test_one_point_alone(self) -> None:
        line = Line("ours", ((4096.0, 3.0),))
        root = ElementTree.fromstring(line_plot("t", [line], x_label="x", y_label="y", x_text=str))
        assert {"2", "5"} <= {element.text for element in root.iter(TEXT)}

    def test_bars(self) -> None:
        root = ElementTree.fromstring(
            bar_plot("peers", [Bar("ours", 1, "1"), Bar("age", 7.1, "7.1 <x>")], x_label="× ours")
        )
        assert {"ours", "age", "7.1 <x>", "× ours"} <= {element.text for element in root.iter(TEXT)}


def run_of(rows: list[Row]) -> dict[str, object]:
    noise = judge([QUIET], rows)
    return report.document(rows, noise, ABOUT, rounds=5)


ROWS = [
    row("sizes.1", size=GIB, series="sizes", target=0.7),
    row("start.hook", size=GIB, series="starts"),
    row("crowd.4", size=4, series="crowd"),
    row("crowd-memory.4", size=4, series="crowd-memory", unit="MiB", factor=1),
    row("peers.age", size=GIB, series="peers", checks="ChaCha20-Poly1305"),
    Row("peers.gpg", "gpg", series="peers", left_out="not installed: gpg", checks="MDC"),
    Row("sizes.8", "the large one", series="sizes", left_out="needs memory"),
]


class TestReport:
    def test_text_json_and_plots(self) -> None:
        run = json.loads(json.dumps(run_of(ROWS)))
        assert run["schema"] == report.SCHEMA
        assert [entry["key"] for entry in run["rows"]] == [made.key for made in ROWS]
        assert all(made.name in report.text(run) for made in ROWS)
        plots = report.plots(run)
        assert sorted(plots) == [f"performance-{name}.svg" for name in ("crowd", "memory", "peers", "sizes")]
        for svg in plots.values():
            assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"

    def test_when_and_of_what_it_was_measured(self) -> None:
        run = json.loads(json.dumps(run_of(ROWS)))
        assert (run["machine"]["date"], run["machine"]["commit"]) == (ABOUT["date"], ABOUT["commit"])
        assert "Measured 2026-01-02 at commit 0123456789-dirty on 2 cores" in report.markdown(run)
        assert report.text(run).startswith("date 2026-01-02T03:04:05+00:00, commit 0123456789-dirty, cores 2")
        about = report.machine()
        assert set(ABOUT) <= set(about)
        assert abs(datetime.fromisoformat(about["date"]) - datetime.now(UTC)) < timedelta(hours=1)
        assert about["commit"] == report.commit()

    def test_the_commit_of_a_clone(self, tmp_path: Path) -> None:
        def git(*words: str) -> str:
            command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
            command += ["-c", "commit.gpgsign=false", *words]
            return subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout.strip()

        git("init", "--quiet")
        (tmp_path / "file").write_text("x")
        git("add", "file")
        git("commit", "--quiet", "--message", "x")
        git("tag", "v1")
        name = git("rev-parse", "--short=10", "HEAD")
        (tmp_path / "untracked").touch()
        if os.geteuid() == 0:
            os.chown(tmp_path, 65534, 65534)  # another user's
        assert report.commit(tmp_path) == name
        (tmp_path / "file").write_text("y")
        assert report.commit(tmp_path) == f"{name}-dirty"
        inner = tmp_path / "an archive's, below a clone"
        inner.mkdir()
        assert report.commit(inner) == "unknown"

    def test_a_run_of_another_version_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "performance.md").write_text(f"{report.BEGIN}{report.END}")
        with pytest.raises(ValueError, match="measure again"):
            report.write_docs(run_of(ROWS) | {"schema": "scz-smm/bench/v1"}, tmp_path)
        assert (tmp_path / "performance.md").read_text() == f"{report.BEGIN}{report.END}"

    def test_the_section_says_what_a_start_costs_and_what_is_missed(self) -> None:
        rows = [
            row("start.1", own=(0.1, 0.1), size=1),
            row("start.hook", own=(0.3, 0.3), size=GIB, target=0.1),
            row("memory.hook", own=(30, 30), baseline=(29, 29), size=GIB, factor=1, judged="median", target=40),
        ]
        text = report.markdown(run_of(rows))
        assert "takes 100 ms before the first byte of a model, and 200 ms more for each GiB" in text
        assert "both cost the same at 537 MB" in text
        assert "takes 30.0 MiB of memory while it lasts, at 1 GiB as at 1 byte (29.0 MiB)" in text
        assert "- Missed: name of start.hook: 0.15, by minima 0.15, for at most 0.1." in text
        assert text.count("Missed") == 1

    def test_what_was_not_measured_has_no_plot(self) -> None:
        assert report.plots(run_of(ROWS[5:])) == {}

    def test_the_document_gets_its_section(self, tmp_path: Path) -> None:
        page = tmp_path / "performance.md"
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        report.write_docs(run_of(ROWS), tmp_path)
        report.write_docs(run_of(ROWS), tmp_path)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert all(made.name in text for made in ROWS)
        for name in report.plots(run_of(ROWS)):
            assert text.count(f"]({name})") == 1
            assert (tmp_path / name).is_file()

    def test_a_document_without_marks_is_left(self, tmp_path: Path) -> None:
        (tmp_path / "performance.md").write_text("words")
        with pytest.raises(ValueError, match="marks"):
            report.write_docs(run_of(ROWS), tmp_path)
        assert (tmp_path / "performance.md").read_text() == "words"

    def test_the_projects_own_document_has_the_marks(self) -> None:
        text = (Path(__file__).parents[2] / "docs/performance.md").read_text()
        assert (text.count(report.BEGIN), text.count(report.END)) == (1, 1)


def benchmark(*measured: Row, error: BaseException | None = None, at_the_end: bool = False) -> Benchmark:
    """What gives these rows, or fails, then or when the scene ends."""

    def run(_space: Workspace, stations: Stations) -> list[Row]:
        if error is not None and at_the_end:
            stations.stack.callback(fail)
        elif error is not None:
            fail()
        return list(measured)

    def fail() -> None:
        assert error is not None
        raise error

    return run


class TestRun:
    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (subprocess.TimeoutExpired(["program"], 3), "FAILED: TimeoutExpired: Command '['program']' timed out"),
            (subprocess.CalledProcessError(1, ["x"], stderr="why\nnot"), "returned non-zero exit status 1. why not"),
            (subprocess.CalledProcessError(1, ["x"], stderr=b"\xff why"), "status 1. \ufffd why"),
            (AssertionError("no\nsuch thing"), "FAILED: AssertionError: no such thing"),
            (RuntimeError("ended"), "FAILED: RuntimeError: ended"),
            (KeyError("k"), "FAILED: KeyError: 'k'"),
        ],
    )
    def test_what_is_said(self, error: Exception, said: str) -> None:
        assert said in failed(error)
        assert "\n" not in failed(error)

    def test_what_fails_is_a_row_and_the_others_go_on(self, space: Workspace) -> None:
        errors = [subprocess.TimeoutExpired("x", 3), subprocess.CalledProcessError(1, "x"), AssertionError()]
        chosen = {"first": benchmark(row("a"))} | {type(error).__name__: benchmark(error=error) for error in errors}
        rows = measure(chosen | {"last": benchmark(row("z"))}, space)
        assert [made.key for made in rows] == ["a", "TimeoutExpired", "CalledProcessError", "AssertionError", "z"]
        assert [made.rounds for made in rows] == [2, 0, 0, 0, 2]
        assert [made.left_out.startswith("FAILED: ") for made in rows] == [False, True, True, True, False]
        assert [len(made.controls) for made in rows] == [2] * 5

    def test_a_scene_that_does_not_end_well_is_a_row(self, space: Workspace) -> None:
        late = benchmark(row("a"), error=AssertionError("left"), at_the_end=True)
        rows = measure({"a": late, "b": benchmark(row("b"))}, space)
        assert [(made.key, made.left_out) for made in rows] == [
            ("a", ""),
            ("b", ""),
            ("end", "FAILED: AssertionError: left"),
        ]

    def test_an_interrupt_is_not_lost(self, space: Workspace) -> None:
        def interrupted(_space: Workspace, _stations: Stations) -> list[Row]:
            try:
                raise KeyboardInterrupt
            finally:
                raise OSError("while cleaning up")

        with pytest.raises(KeyboardInterrupt):
            measure({"a": benchmark(error=KeyboardInterrupt())}, space)
        with pytest.raises(KeyboardInterrupt):
            measure({"a": interrupted, "b": benchmark(row("b"))}, space)


class TestRoom:
    @pytest.mark.parametrize(
        ("needed", "spare", "free", "said"),
        [
            (GIB, GIB, 2 * GIB, ""),
            (0, 0, 0, ""),
            (GIB, GIB, 2 * GIB - 1, "needs 1.00 GiB of memory and 1.00 to spare; 2.00 free"),
            (8 * GIB, GIB // 2, GIB, "needs 8.00 GiB of memory and 0.50 to spare; 1.00 free"),
        ],
    )
    def test_what_fits(self, needed: int, spare: int, free: int, said: str) -> None:
        assert lack("memory", needed, spare, free) == said

    def test_of_this_machine(self, space: Workspace) -> None:
        frugal = replace(space, memory_spare_bytes=0, disk_spare_bytes=0)
        assert frugal.lacking(memory_bytes=1, disk_bytes=1) == ""
        assert "of memory and 1.50 to spare" in space.lacking(memory_bytes=1 << 60)
        assert "GiB of disk and 0.00 to spare" in frugal.lacking(disk_bytes=1 << 60)
        assert replace(frugal, memory_spare_bytes=1 << 60).lacking().startswith("needs 0.00 GiB of memory")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.bench.workspace import own_folder

parent, when = Path(sys.argv[1]), sys.argv[2]

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def look(event, given):
    if event == "open" and parent in Path(str(given[0])).parents:
        end()

if when == "before it opens its folder":
    sys.addaudithook(look)
with own_folder(parent) as folder:
    (folder / "file").touch()
    end()
"""


class TestFolder:
    def test_it_goes_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), own_folder(tmp_path) as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt
        assert not folder.exists()

    def test_what_a_killed_run_left_goes_and_a_live_one_stays(self, tmp_path: Path) -> None:
        with own_folder(tmp_path) as live:
            (live / "file").write_text("x")
            full, empty = (live.with_name(f"{live.name}-{name}") for name in ("full", "empty"))
            (full / "inner").mkdir(parents=True)
            (full / "inner/file").write_text("x")
            empty.mkdir(mode=0o700)  # killed before anything else
            with own_folder(tmp_path) as other:
                assert sorted(tmp_path.iterdir()) == sorted([live, other])
                assert (live / "file").is_file()

    @pytest.mark.parametrize("when", ["before it opens its folder", "with its files there"])
    def test_a_run_that_is_killed_is_swept(self, tmp_path: Path, when: str) -> None:
        """At two points of its life; SIGKILL, so that nothing of its own cleans up."""
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, when], cwd=ROOT, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1
        with own_folder(tmp_path) as folder:
            assert list(tmp_path.iterdir()) == [folder]

    def test_planted_names_are_neither_opened_nor_removed(self, tmp_path: Path) -> None:
        """A FIFO would be waited for, a link followed; in a process of its own, for the first could go on for ever."""
        with own_folder(tmp_path) as live:
            names = {kind: live.with_name(f"{live.name}-{kind}") for kind in ("fifo", "link", "file", "inner", "other")}
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "kept").touch()
        os.mkfifo(names["fifo"])
        names["link"].symlink_to(outside)
        names["file"].touch()
        names["other"].mkdir()
        os.mkfifo(names["other"] / "bench.lock")
        if os.geteuid() == 0:
            os.chown(names["other"], 65534, 65534)
        else:
            shutil.rmtree(names["other"])
        names["inner"].mkdir()  # ours: goes, with the FIFO in it
        os.mkfifo(names["inner"] / "bench.lock")
        code = "import sys\nfrom pathlib import Path\nfrom tests.bench.workspace import own_folder\n"
        code += "with own_folder(Path(sys.argv[1])): pass\n"
        before = set(tmp_path.iterdir())
        subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, timeout=60)
        assert before - set(tmp_path.iterdir()) == {names["inner"]}
        assert (outside / "kept").exists()

    def test_another_run_that_begins_at_any_line_takes_nothing(self, tmp_path: Path) -> None:
        """A whole other run, its sweep first, at each line of a beginning; each line once."""
        seen: set[tuple[str, int]] = set()

        def at(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
            if frame.f_code.co_filename != workspace.__file__:
                return None
            place = (frame.f_code.co_name, frame.f_lineno)
            if event == "line" and place not in seen:
                seen.add(place)
                with own_folder(tmp_path):  # nothing is traced meanwhile
                    pass
            return at

        before = sys.gettrace()
        sys.settrace(at)
        try:
            with own_folder(tmp_path) as folder:
                sys.settrace(before)
                assert list(tmp_path.iterdir()) == [folder]
        finally:
            sys.settrace(before)
        assert {name for name, _ in seen} >= {"own_folder", "_sweep"}
        assert len({line for name, line in seen if name == "_lock"}) >= 4
        assert list(tmp_path.iterdir()) == []
