"""Calls in lanes: those of one lane one after the other in their order, different lanes beside each other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Lanes:
    """A thread for each lane that has something to do; it ends when the lane is empty.

    Args:
        limit: So many lanes, and so many jobs of one lane, at most.
        limit_bytes: So much memory all jobs together may hold, unless one alone holds more.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self._limit, self._limit_bytes = limit, limit_bytes
        self._jobs: dict[str, deque[tuple[Job, int]]] = {}
        self._held_bytes = 0
        self._changed = threading.Condition()

    def put(self, lane: str, job: Job, held_bytes: int = 0) -> bool:
        """Have a job done after those of the same lane; False if there are too many.

        Args:
            lane: Any name.
            job: Raises nothing.
            held_bytes: What it holds until it is done.
        """
        with self._changed:
            if self._held_bytes and self._held_bytes + held_bytes > self._limit_bytes:
                return False
            waiting = self._jobs.get(lane)
            if waiting is not None:
                if len(waiting) >= self._limit:
                    return False
                waiting.append((job, held_bytes))
                self._held_bytes += held_bytes
                return True
            if len(self._jobs) >= self._limit:
                return False
            self._jobs[lane] = deque([(job, held_bytes)])
            try:
                # A daemon: what hangs in the kernel must not keep the process from ending.
                threading.Thread(target=self._run, args=(lane,), name="nri", daemon=True).start()
            except RuntimeError:  # the process may have no more threads
                del self._jobs[lane]
                return False
            self._held_bytes += held_bytes
            return True

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do; False if something still is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, seconds)

    def _run(self, lane: str) -> None:
        jobs = self._jobs[lane]
        while True:
            jobs[0][0]()
            with self._changed:
                self._held_bytes -= jobs.popleft()[1]
                if not jobs:
                    del self._jobs[lane]
                    self._changed.notify_all()
                    return
