"""Runs parts of the tests at the same time, one pytest each: `python -m tests.side_by_side unit integration`.

The longest part, `integration`, is two: every second file of it is `integration-2`, which begins when another part has
ended. Each part's output is shown whole when that part has ended; the last line sums up. It fails if a test failed, if
one was skipped or expected to fail (all are required: what cannot run has not been shown to work), or if a part had no
tests.

Where only root may enter the root directory (mode 0700, as a debootstrapped root can have), gVisor's processes, which
are nobody's, cannot: its tests then run in a mount namespace with an open root, of the same directories.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from tests.engines import RuntimeNamespace, root_is_closed

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_SECONDS = 45 * 60
_AT_ONCE = 6
_IN_TWO = "integration"


@dataclass(frozen=True, slots=True)
class Part:
    """One pytest process and its files below build/tests."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    results: Path


def paths_of(names: Sequence[str]) -> dict[str, list[str]]:
    """What each part's pytest is given, by the part's name; every file of the part that is in two is in one of them."""
    paths = {name: [f"tests/{name}"] for name in names}
    if _IN_TWO in paths:
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / _IN_TWO).glob("test_*.py"))
        paths |= {_IN_TWO: files[0::2], f"{_IN_TWO}-2": files[1::2]}
    return paths


def start(name: str, paths: Sequence[str], prefix: Sequence[str] = ()) -> Part:
    """Start pytest on these paths, behind `prefix`."""
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    log, results = folder / f"{name}.log", folder / f"{name}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *paths, f"--junit-xml={results}"]
    command += ["-o", f"cache_dir={folder}/{name}.cache"]  # one each: they write it at the same time
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*prefix, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    print(f"{name}: started; its output so far is in {log.relative_to(ROOT)}", flush=True)
    return Part(name, process, log, results)


def count(part: Part) -> Counter[str]:
    """How the part's tests ended, by pytest's own record."""
    counts: Counter[str] = Counter()
    if part.results.exists():
        for case in ElementTree.parse(part.results).iter("testcase"):  # our own pytest's file
            endings = {child.tag for child in case} & {"failure", "error", "skipped"}
            counts["skipped" if endings == {"skipped"} else "failed" if endings else "passed"] += 1
    return counts


def finish(part: Part) -> tuple[Counter[str], list[str]]:
    """Show the part's output; returns its counts and what is wrong with it."""
    sys.stdout.flush()
    sys.stdout.buffer.write(f"\n===== {part.name} =====\n".encode() + part.log.read_bytes())
    sys.stdout.flush()
    counts, wrong = count(part), []
    if part.process.returncode != 0:
        wrong.append(f"pytest exited with {part.process.returncode}")
    if counts["skipped"]:
        wrong.append(f"{counts['skipped']} skipped, and every test is required")
    if not counts["passed"]:
        wrong.append("no test passed")
    return counts, wrong


def main(names: list[str]) -> int:
    """Run the parts; the exit code is 0 only if nothing is wrong with any."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    with contextlib.ExitStack() as stack:
        prefixes = {"gvisor": open_root(stack)} if "gvisor" in names and root_is_closed() else {}
        waiting = [partial(start, name, paths, prefixes.get(name, ())) for name, paths in paths_of(names).items()]
        return run(waiting, deadline)


def open_root(stack: contextlib.ExitStack) -> tuple[str, ...]:
    """What enters a mount namespace with an open root."""
    namespace = stack.enter_context(RuntimeNamespace(hide=False))
    return (*namespace.prefix, "env", f"--chdir={ROOT}")


def run(waiting: Sequence[Callable[[], Part]], deadline: float) -> int:
    """Start the parts, so many at once, wait for them, and sum up."""
    total: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    endings: list[str] = []
    running: list[Part] = []
    left = list(waiting)
    try:
        while running or left:
            while left and len(running) < _AT_ONCE:
                running.append(left.pop(0)())
            if time.monotonic() > deadline:
                for part in running:
                    part.process.kill()
            for part in [part for part in running if part.process.poll() is not None]:
                running.remove(part)
                counts, wrong = finish(part)
                total += counts
                endings.append(f"{part.name}: {'; '.join(wrong) or 'all passed'}")
            time.sleep(0.1)
    finally:
        for part in running:
            part.process.terminate()
            part.process.wait()
    print("\n" + "\n".join(endings))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 0 if endings and all(ending.endswith(": all passed") for ending in endings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
