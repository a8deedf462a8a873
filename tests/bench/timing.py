"""Taking turns: every row of a table is timed once in each round, beside the others. Times in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MS = 1e3


@dataclass(frozen=True, slots=True)
class Samples:
    """What was measured of one thing, in the order of the rounds; at least one value, in any unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value in the middle."""
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        """The least disturbed value."""
        return min(self.values)

    @property
    def spread(self) -> float:
        """The median ÷ the minimum: 1 on a machine that does nothing else."""
        return self.median / self.minimum if self.minimum > 0 else 1.0

    def over(self, baseline: Samples) -> float:
        """The median of the quotients of each round: what disturbs a round for a while disturbs both."""
        return statistics.median(
            own / other for own, other in zip(self.values, baseline.values, strict=True) if other > 0
        )


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def take_turns(
    actions: Mapping[str, Callable[[], float]], rounds: int, say: Callable[[str], None] = lambda _line: None
) -> dict[str, Samples]:
    """Let each action measure itself once in every round; every other round goes backwards.

    Args:
        actions: By name; each returns what it measured of itself, so that what prepares it is not counted.
        rounds: At least one.
        say: Called before each round.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        order: Sequence[str] = list(actions) if number % 2 == 0 else list(actions)[::-1]
        for name in order:
            found[name].append(actions[name]())
    return {name: Samples(tuple(values)) for name, values in found.items()}
