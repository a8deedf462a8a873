"""Whether the machine is quiet enough to judge: two processes that only compute, against one.

On two free cores they do twice the work in the same time, and each gets a core to itself. This is looked at throughout
a run, and with it the spread of every baseline.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.rows import NOISY_SPREAD, Control, Row

_SECONDS = 0.15
_BLOCK = bytes(1 << 16)
#: At most this share of the controls may have a reason, and of the baselines vary by `NOISY_SPREAD`.
_MOST_NOISY = 0.34


@dataclass(frozen=True, slots=True)
class Noise:
    """What a run says of the machine.

    Attributes:
        controls: Each time that it was looked at; at least one.
        spreads: Of the baselines: median ÷ minimum.
        cores: Those this process may use.
    """

    controls: tuple[Control, ...]
    spreads: tuple[float, ...]
    cores: int

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the machine is too noisy to judge; empty if it is not."""
        found = []
        if self.cores < 2:
            found.append("there is one core only: the targets are for two")
        disturbed = [control.reason for control in self.controls if control.reason]
        if self.cores >= 2 and len(disturbed) > _MOST_NOISY * len(self.controls):
            found.append(f"{len(disturbed)} of {len(self.controls)} controls were disturbed, the first: {disturbed[0]}")
        noisy = [spread for spread in self.spreads if spread > NOISY_SPREAD]
        if len(noisy) > _MOST_NOISY * len(self.spreads):
            found.append(
                f"{len(noisy)} of {len(self.spreads)} baselines vary by more than {NOISY_SPREAD} (median ÷ minimum)"
            )
        return tuple(found)

    @property
    def verdict(self) -> str:
        """One sentence."""
        gains = [control.gain for control in self.controls]
        alone = [control.alone for control in self.controls]
        seen = f"control: two processes do {min(gains):.2f} to {max(gains):.2f} times the work of one, "
        seen += f"which gets {min(alone):.2f} to {max(alone):.2f} of a core"
        if not self.reasons:
            return f"quiet enough to judge ({seen})"
        return f"TOO NOISY TO JUDGE: {'; '.join(self.reasons)} ({seen}); look at the minima, and repeat"


def judge(controls: Sequence[Control], rows: Sequence[Row]) -> Noise:
    """The verdict on a run, from its controls and its rows."""
    # Several rows can have one baseline, which is told once.
    spreads = {(row.baseline, row.size, row.baseline_median): row.spread for row in rows if row.spread is not None}
    return Noise(tuple(controls), tuple(spreads.values()), len(os.sched_getaffinity(0)))


def control() -> Control:
    """What one process gets and does, and what two do, now."""
    one, two = _work(1), _work(2)
    return Control(gain=two.blocks / max(one.blocks, 1), alone=one.cores, together=two.cores)


@dataclass(frozen=True, slots=True)
class _Done:
    """What some processes did in the same short time.

    Attributes:
        blocks: Hashed, by all of them.
        cores: CPU time ÷ wall time of each, added up.
    """

    blocks: int
    cores: float


def _work(processes: int) -> _Done:
    began = time.monotonic()
    children = [_child(began) for _ in range(processes)]
    blocks, cores = 0, 0.0
    for pid, end in children:
        with os.fdopen(end, "rb") as stream:
            done, cpu, wall = (stream.read() or b"0 0 1").split()
        os.waitpid(pid, 0)
        blocks += int(done)
        cores += float(cpu) / float(wall)
    return _Done(blocks, cores)


def _child(began: float) -> tuple[int, int]:
    """Its pid, and where it says: blocks, CPU seconds, and wall seconds since `began`, before the fork."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid:
        os.close(send)
        return pid, receive
    try:
        count = 0
        while time.monotonic() < began + _SECONDS:
            hashlib.sha256(_BLOCK)
            count += 1
        # A process's CPU time begins at its fork.
        said = f"{count} {time.process_time()} {time.monotonic() - began}"
        os.write(send, said.encode())
    finally:
        os._exit(0)
