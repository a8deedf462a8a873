"""Work on many small things by all processors: for what needs no secret, as it is done in forked workers.

A thousand things or fewer are done here: starting workers would take longer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_ALONE = 1000
_CHUNK = 250
_WORKERS = 8


def map_chunks(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """The results of `work` on `items`, in their order.

    Args:
        work: Gives one result for each item; a function of a module, or a `partial` of one, with what pickle takes.
        items: What to work on.

    Raises:
        SczError: What `work` raised first.
    """
    if len(items) <= _ALONE:
        return work(items)
    from concurrent.futures import ProcessPoolExecutor

    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    # An interrupt is for this process alone: a worker would only print where it was.
    with ProcessPoolExecutor(
        min(os.cpu_count() or 1, _WORKERS), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as workers:
        try:
            return [result for results in workers.map(work, chunks) for result in results]
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
