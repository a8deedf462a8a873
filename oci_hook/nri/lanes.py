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
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[str, deque[Job]] = {}
        self._changed = threading.Condition()

    def put(self, lane: str, job: Job) -> bool:
        """Have a job done after those of the same lane; False if there are too many.

        Args:
            lane: Any name.
            job: Raises nothing.
        """
        with self._changed:
            waiting = self._jobs.get(lane)
            if waiting is not None:
                if len(waiting) < self._limit:
                    waiting.append(job)
                    return True
                return False
            if len(self._jobs) >= self._limit:
                return False
            self._jobs[lane] = deque([job])
            try:
                threading.Thread(target=self._run, args=(lane,), name="nri").start()
            except RuntimeError:  # the process may have no more threads
                del self._jobs[lane]
                return False
            return True

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do; False if something still is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, seconds)

    def _run(self, lane: str) -> None:
        jobs = self._jobs[lane]
        while True:
            jobs[0]()
            with self._changed:
                jobs.popleft()
                if not jobs:
                    del self._jobs[lane]
                    self._changed.notify_all()
                    return
