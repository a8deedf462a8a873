"""`python -m tests.bench NAME [--runs N] [--json]`: one benchmark, as a table or as JSON."""

from __future__ import annotations

import argparse
import json

from tests.bench import shim

BENCHMARKS = {"shim": shim.measure}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--runs", type=int, default=100, help="of each row; the rows take turns")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows = BENCHMARKS[given.name](given.runs)
    if given.json:
        print(
            json.dumps({"benchmark": given.name, "runs": given.runs, "rows": [row.__dict__ for row in rows]}, indent=2)
        )
        return
    print(f"{'':<48}{'median ms':>11}{'best ms':>10}{'added ms':>10}{'of a bare start':>17}")
    for row in rows:
        print(f"{row.name:<48}{row.median_ms:>11.2f}{row.best_ms:>10.2f}{row.added_ms:>10.2f}{row.ratio:>16.2f}×")


if __name__ == "__main__":
    main()
