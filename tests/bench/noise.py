"""Whether the machine is quiet enough to judge: two processes that only compute, against one.

On two free cores they do twice the work in the same time; where others use the cores, less. The gain is looked at
throughout a run, and with it the spread of every baseline.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.rows import LEAST_GAIN, NOISY_SPREAD, Row

_SECONDS = 0.15
_BLOCK = bytes(1 << 16)
#: At most this share of the controls may show less than `LEAST_GAIN`, and of the baselines vary by `NOISY_SPREAD`.
_MOST_NOISY = 0.34


@dataclass(frozen=True, slots=True)
class Noise:
    """What a run says of the machine.

    Attributes:
        gains: Work of two processes ÷ work of one, each time it was looked at.
        spreads: Of the baselines: median ÷ minimum.
        cores: Those this process may use.
    """

    gains: tuple[float, ...]
    spreads: tuple[float, ...]
    cores: int

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the machine is too noisy to judge; empty if it is not."""
        found = []
        if self.cores < 2:
            found.append("there is one core only: the targets are for two")
        low = [gain for gain in self.gains if gain < LEAST_GAIN]
        if self.cores >= 2 and len(low) > _MOST_NOISY * len(self.gains):
            found.append(f"{len(low)} of {len(self.gains)} controls show less than {LEAST_GAIN}")
        noisy = [spread for spread in self.spreads if spread > NOISY_SPREAD]
        if len(noisy) > _MOST_NOISY * len(self.spreads):
            found.append(
                f"{len(noisy)} of {len(self.spreads)} baselines vary by more than {NOISY_SPREAD} (median ÷ minimum)"
            )
        return tuple(found)

    @property
    def verdict(self) -> str:
        """One sentence."""
        seen = f"control: two processes do {min(self.gains):.2f} to {max(self.gains):.2f} times the work of one"
        if not self.reasons:
            return f"quiet enough to judge ({seen})"
        return f"TOO NOISY TO JUDGE: {'; '.join(self.reasons)} ({seen}); look at the minima, and repeat"


def judge(gains: Sequence[float], rows: Sequence[Row]) -> Noise:
    """The verdict on a run, from its controls and its rows."""
    # Several rows can have one baseline, which is told once.
    spreads = {(row.baseline, row.size, row.baseline_median): row.spread for row in rows if row.spread is not None}
    return Noise(tuple(gains), tuple(spreads.values()), len(os.sched_getaffinity(0)))


def control() -> float:
    """How much more work two processes do than one, now."""
    one, two = _work(1), _work(2)
    return two / one


def _work(processes: int) -> int:
    """Blocks that so many processes hash in the same short time."""
    until = time.monotonic() + _SECONDS
    children = [_child(until) for _ in range(processes)]
    done = 0
    for pid, end in children:
        with os.fdopen(end, "rb") as stream:
            done += int(stream.read() or b"0")
        os.waitpid(pid, 0)
    return max(done, 1)


def _child(until: float) -> tuple[int, int]:
    receive, send = os.pipe()
    pid = os.fork()
    if pid:
        os.close(send)
        return pid, receive
    try:
        count = 0
        while time.monotonic() < until:
            hashlib.sha256(_BLOCK)
            count += 1
        os.write(send, str(count).encode())
    finally:
        os._exit(0)
